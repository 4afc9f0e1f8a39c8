//! The VM as its owner describes it: flags, or a TOML file, or both (flags win).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config_ft::FtOptions;

/// Least memory of a guest, in MiB: a Debian kernel with its initramfs does not start in less.
pub const MIN_MEMORY_MIB: u64 = 96;
/// Most memory of a guest, in MiB.
pub const MAX_MEMORY_MIB: u64 = 64 * 1024;

/// A configuration that makes no VM.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file.
    #[error("{path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file's text.
    #[error("{path}: {source}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Something is missing.
    #[error("no {0} given: use --{0} or set `{0}` in the configuration file")]
    Missing(&'static str),
    /// Too little or too much memory.
    #[error("{0} MiB of memory: a guest has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB")]
    Memory(u64),
    /// A MAC address that is none.
    #[error("{0:?} is no MAC address of one interface: six bytes like 02:00:00:00:00:01")]
    Mac(String),
}

/// What a VM is made of. Every field may come from a flag or from the file.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmOptions {
    /// Debian kernel: a vmlinuz, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk, best uncompressed
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS")]
    pub append: Option<String>,
    /// Memory of the guest in MiB [default: 192]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Raw disk image or block device; of a protected VM an image on storage that all hosts share
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// TAP interface of the guest's network; made if it is not there
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// MAC address of the guest [default: 02:50:4c:58:00:01]
    #[arg(long, value_name = "MAC")]
    pub mac: Option<String>,
    /// Address that the guest image's init gives to its interface, like 10.0.0.2/24
    #[arg(long, value_name = "ADDR/LEN")]
    pub guest_ip: Option<String>,
    /// Gateway for it
    #[arg(long, value_name = "ADDR")]
    pub guest_gateway: Option<IpAddr>,
    /// File for the console's output instead of the terminal
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// Try a kernel series that nobody has checked, as long as nothing in it is missed
    #[arg(long)]
    #[serde(default)]
    pub allow_unknown_kernel: bool,
}

impl VmOptions {
    /// These options, and `file`'s where they are silent.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            kernel: self.kernel.or(file.kernel),
            initramfs: self.initramfs.or(file.initramfs),
            append: self.append.or(file.append),
            memory: self.memory.or(file.memory),
            disk: self.disk.or(file.disk),
            tap: self.tap.or(file.tap),
            mac: self.mac.or(file.mac),
            guest_ip: self.guest_ip.or(file.guest_ip),
            guest_gateway: self.guest_gateway.or(file.guest_gateway),
            console: self.console.or(file.console),
            allow_unknown_kernel: self.allow_unknown_kernel || file.allow_unknown_kernel,
        }
    }

    /// Memory in bytes.
    ///
    /// # Errors
    /// Out of bounds.
    pub fn memory_bytes(&self) -> Result<u64, ConfigError> {
        let mib = self.memory.unwrap_or(192);
        if (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
            Ok(mib << 20)
        } else {
            Err(ConfigError::Memory(mib))
        }
    }

    /// The guest's MAC address.
    ///
    /// # Errors
    /// It is none.
    pub fn mac_address(&self) -> Result<Mac, ConfigError> {
        self.mac.as_deref().unwrap_or("02:50:4c:58:00:01").parse()
    }
}

/// Six bytes of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Mac(text.to_owned());
        let bytes: Vec<u8> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).map_err(|_| bad()))
            .collect::<Result<_, _>>()?;
        let bytes: [u8; 6] = bytes.try_into().map_err(|_| bad())?;
        if bytes == [0; 6] || bytes[0] & 1 != 0 {
            Err(bad())
        } else {
            Ok(Self(bytes))
        }
    }
}

/// The options, with those of a configuration file behind them.
///
/// # Errors
/// The file cannot be read or does not parse.
pub fn merged(
    vm: VmOptions,
    ft: FtOptions,
    file: Option<&Path>,
) -> Result<(VmOptions, FtOptions), ConfigError> {
    let Some(path) = file else {
        return Ok((vm, ft));
    };
    let file = read_file(path)?;
    Ok((vm.over(file.vm), ft.over(file.ft)))
}

/// Reads a configuration file.
///
/// # Errors
/// The file cannot be read or does not parse.
fn read_file(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The VM.
    #[serde(default)]
    pub vm: VmOptions,
    /// How it is protected.
    #[serde(default)]
    pub ft: FtOptions,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_packages_is_a_configuration() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pollux.toml");
        let file = read_file(path.as_ref()).unwrap();
        assert!(file.ft.protect && file.ft.host.is_some() && file.ft.standbys.len() == 3);
        assert!(file.vm.mac_address().is_ok() && file.vm.memory_bytes().is_ok());
        assert!(file.vm.disk.is_some() && file.vm.tap.is_some() && file.ft.api.is_some());
    }

    #[test]
    fn a_file_alone_says_that_a_vm_is_protected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let merged = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            let (vm, ft) = (VmOptions::default(), FtOptions::default());
            super::merged(vm, ft, Some(file.path())).unwrap()
        };
        assert!(merged("[ft]\nprotect = true\n").1.is_given());
        let (vm, ft) = merged("[vm]\nmemory = 256\n");
        assert_eq!((vm.memory, ft.is_given()), (Some(256), false));
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: File = toml::from_str("[vm]\nmemory = 256\ntap = 'tap0'\n").unwrap();
        let flags = VmOptions {
            memory: Some(512),
            ..VmOptions::default()
        };
        let both = flags.over(file.vm);
        assert_eq!(
            (both.memory, both.tap.as_deref()),
            (Some(512), Some("tap0"))
        );
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        assert!(toml::from_str::<File>("[vm]\nmemroy = 256\n").is_err());
        let too_little = VmOptions {
            memory: Some(8),
            ..VmOptions::default()
        };
        assert!(matches!(
            too_little.memory_bytes(),
            Err(ConfigError::Memory(8))
        ));
        for mac in [
            "",
            "02:00",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "02:0:0:0:0:zz",
        ] {
            assert!(mac.parse::<Mac>().is_err(), "{mac}");
        }
        assert_eq!(
            "02:00:00:00:00:0a".parse::<Mac>().unwrap(),
            Mac([2, 0, 0, 0, 0, 10])
        );
    }
}
