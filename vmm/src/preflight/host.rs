//! What the kernel says about itself in /proc and /sys.
//!
//! Reads below a root directory, so that tests can put any host there.

use std::fs;
use std::path::PathBuf;

/// A capability of the process, by its number in `linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capability {
    NetAdmin = 12,
    IpcLock = 14,
    SysAdmin = 21,
    SysNice = 23,
    Bpf = 39,
}

/// A host to read from.
#[derive(Clone, Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// The host that this process runs on.
    pub(super) fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
        }
    }

    #[cfg(test)]
    pub(super) fn below(root: PathBuf) -> Self {
        Self { root }
    }

    /// The trimmed content of a file; none if it cannot be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A file that holds one number.
    pub(super) fn read_number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// Whether a file exists.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Where a file of this host lies.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Release of the kernel, such as `6.1.0-18-amd64`.
    pub(super) fn kernel_release(&self) -> String {
        self.read("/proc/sys/kernel/osrelease")
            .unwrap_or_else(|| "unknown".into())
    }

    /// Whether the kernel is of this version or newer. Unknown releases count as old.
    pub(super) fn kernel_at_least(&self, major: u32, minor: u32) -> bool {
        let release = self.kernel_release();
        let mut parts = release
            .split(|c: char| !c.is_ascii_digit())
            .map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(have_major)), Some(Ok(have_minor))) => {
                (have_major, have_minor) >= (major, minor)
            }
            _ => false,
        }
    }

    /// Whether the process has a capability in effect.
    pub(super) fn has(&self, capability: Capability) -> bool {
        self.read("/proc/self/status")
            .and_then(|status| {
                let line = status
                    .lines()
                    .find_map(|line| line.strip_prefix("CapEff:"))?;
                u64::from_str_radix(line.trim(), 16).ok()
            })
            .is_some_and(|set| set & 1 << capability as u64 != 0)
    }

    /// A value of /proc/meminfo in MiB.
    pub(super) fn meminfo_mib(&self, name: &str) -> Option<u64> {
        let meminfo = self.read("/proc/meminfo")?;
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib / 1024)
    }

    /// The choice in brackets of a file such as `always [madvise] never`.
    pub(super) fn bracketed(&self, path: &str) -> Option<String> {
        let text = self.read(path)?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A host that consists of these files.
    pub(in crate::preflight) fn host_of(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let host = Host::below(dir.path().to_owned());
        (dir, host)
    }

    #[test]
    fn kernel_versions_compare_as_numbers() {
        let (_dir, host) = host_of(&[("/proc/sys/kernel/osrelease", "6.10.3-amd64\n")]);
        assert!(host.kernel_at_least(6, 9) && host.kernel_at_least(6, 10));
        assert!(host.kernel_at_least(5, 19));
        assert!(!host.kernel_at_least(6, 11) && !host.kernel_at_least(7, 0));
        let (_dir, nothing) = host_of(&[]);
        assert!(!nothing.kernel_at_least(2, 6));
    }

    #[test]
    fn capabilities_come_from_the_effective_set() {
        let status = "Name:\tx\nCapPrm:\t0000008000201000\nCapEff:\t0000008000001000\n";
        let (_dir, host) = host_of(&[("/proc/self/status", status)]);
        assert!(host.has(Capability::NetAdmin) && host.has(Capability::Bpf));
        assert!(!host.has(Capability::SysAdmin) && !host.has(Capability::SysNice));
    }

    #[test]
    fn values_are_read_and_absent_ones_are_none() {
        let (_dir, host) = host_of(&[
            (
                "/proc/meminfo",
                "MemTotal:  2097152 kB\nMemAvailable:   1048576 kB\n",
            ),
            ("/sys/thp", "always [madvise] never\n"),
        ]);
        assert_eq!(host.meminfo_mib("MemAvailable"), Some(1024));
        assert_eq!(host.meminfo_mib("Mem"), None);
        assert_eq!(host.bracketed("/sys/thp").as_deref(), Some("madvise"));
        assert_eq!(host.bracketed("/sys/none"), None);
    }
}
