//! Fault tolerance as its owner describes it: flags, or the `[ft]` table of a TOML file, or both
//! (flags win), and what comes out of them once they are checked.
//!
//! The list of standbys may name this host too and is left out there, so that one list serves all
//! hosts. Addresses are numbers: a name service would be one more thing to lose with a host.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use ft::{DetectorConfig, HostId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::link::{Key, KeyError, LinkConfig, LinkTimes, MAX_PEERS};

/// Shortest and longest distance between heartbeats, in ms.
pub const HEARTBEAT_INTERVAL_MS: std::ops::RangeInclusive<u64> = 1..=10_000;
/// Shortest and longest time-out, in ms.
pub const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 5..=600_000;
/// Heartbeats that must fit into the host's time-out: fewer would take one lost packet for a lost
/// host.
pub const HEARTBEATS_IN_TIMEOUT: u64 = 3;

/// Options that make no fault tolerance.
#[derive(Debug, Error)]
pub enum FtConfigError {
    /// Something is missing.
    #[error(
        "fault tolerance needs {what}: use {flag}, or set `{field}` in the [ft] table of the \
         configuration file"
    )]
    Missing {
        /// What, for people.
        what: &'static str,
        /// Its flag.
        flag: &'static str,
        /// Its name in the file.
        field: &'static str,
    },
    /// The shared key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The shared directory.
    #[error(
        "shared directory {path}: {why}: it is a directory on storage that all hosts reach under \
         this name"
    )]
    Shared {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A standby whose description does not parse.
    #[error(
        "{0:?} is no standby: write NAME=ADDR:PORT, like castor=192.0.2.7:7700 or castor=[2001:db8::7]:7700"
    )]
    Standby(String),
    /// An address that nobody can be reached at.
    #[error("{what} {address}: {why}")]
    Address {
        /// Whose.
        what: String,
        /// The address.
        address: SocketAddr,
        /// What is wrong.
        why: &'static str,
    },
    /// Too many hosts.
    #[error("{0} standbys, the limit is {MAX_PEERS}")]
    TooMany(usize),
    /// Somebody has to be there to protect the VM.
    #[error(
        "the VM is to be protected, but no other host is named: add --standby NAME=ADDR:PORT, or \
         leave --protect out"
    )]
    NobodyToProtect,
    /// A time out of its bounds.
    #[error("{flag} {value}: it is {least} to {most} ms")]
    Time {
        /// The flag.
        flag: &'static str,
        /// Its value in ms.
        value: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// Too few heartbeats before a host is given up.
    #[error(
        "--host-timeout-ms {timeout} is less than {HEARTBEATS_IN_TIMEOUT} heartbeats of \
         {interval} ms: one lost packet would look like a lost host; raise it or lower \
         --heartbeat-interval-ms"
    )]
    FewHeartbeats {
        /// The time-out in ms.
        timeout: u64,
        /// The interval in ms.
        interval: u64,
    },
}

/// Another host that may run the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standby {
    /// Its name.
    pub name: HostId,
    /// Where it listens.
    pub addr: SocketAddr,
}

impl FromStr for Standby {
    type Err = FtConfigError;

    fn from_str(text: &str) -> Result<Self, FtConfigError> {
        let bad = || FtConfigError::Standby(text.to_owned());
        let (name, addr) = text.split_once('=').ok_or_else(bad)?;
        Ok(Self {
            name: name.parse().map_err(|_| bad())?,
            addr: addr.parse().map_err(|_| bad())?,
        })
    }
}

/// How a VM is protected. Every field may come from a flag or from the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FtOptions {
    /// Keep the VM running through the loss of this host: find a standby and replicate to it
    #[arg(long)]
    pub protect: bool,
    /// Name of this host, unique among those that may run the VM, and always the same
    #[arg(long, value_name = "NAME")]
    pub host: Option<HostId>,
    /// Address on which the other hosts reach this one
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// File with the key that all hosts share, 16 bytes or more
    #[arg(long = "key", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Directory on shared storage that decides who may run the VM
    #[arg(long = "shared", value_name = "DIR")]
    pub shared_dir: Option<PathBuf>,
    /// Another host that may run the VM, the preferred one first; again for each, and for each
    /// further address of one
    #[arg(long = "standby", value_name = "NAME=ADDR:PORT")]
    pub standbys: Vec<Standby>,
    /// Unix socket of the control API, which `pollux ctl` speaks
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Socket of a vhost-ftlog that somebody else runs (a service manager, say), with this host's
    /// --listen port + 1 and the same key [default: one of our own is started]
    #[arg(long, value_name = "SOCKET")]
    pub channel: Option<PathBuf>,
    /// Socket of an ftprobe that somebody else runs, with this host's --listen port + 2
    /// [default: one of our own is started]
    #[arg(long, value_name = "SOCKET")]
    pub probes: Option<PathBuf>,
    /// Network interface of heartbeats and log [default: the one with the address of --listen]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Distance between heartbeats [default: 20]
    #[arg(long, value_name = "MS")]
    pub heartbeat_interval_ms: Option<u64>,
    /// Silence after which a host is lost [default: 200]
    #[arg(long, value_name = "MS")]
    pub host_timeout_ms: Option<u64>,
    /// Standstill after which the VMM of a living host is lost [default: 1000]
    #[arg(long, value_name = "MS")]
    pub vmm_timeout_ms: Option<u64>,
    /// How long an owed acknowledgement may make no progress [default: 1000]
    #[arg(long, value_name = "MS")]
    pub ack_timeout_ms: Option<u64>,
}

/// Checked options.
#[derive(Debug, Clone)]
pub struct FtConfig {
    /// Whether a primary looks for a backup by itself.
    pub protect: bool,
    /// This host.
    pub me: HostId,
    /// Where the other hosts reach it.
    pub listen: SocketAddr,
    /// The file of the shared key, for the other daemons.
    pub key_file: PathBuf,
    /// The shared key, as the control link takes it.
    pub key: Key,
    /// The directory that decides who may run the VM.
    pub shared_dir: PathBuf,
    /// Other hosts in the order of preference, each with its addresses.
    pub standbys: Vec<(HostId, Vec<SocketAddr>)>,
    /// Socket of the control API.
    pub api: Option<PathBuf>,
    /// Socket of a running channel daemon.
    pub channel: Option<PathBuf>,
    /// Socket of a running probe daemon.
    pub probes: Option<PathBuf>,
    /// Interface of heartbeats and log.
    pub interface: Option<String>,
    /// When a peer is lost.
    pub detector: DetectorConfig,
}

impl FtOptions {
    /// These options, and `file`'s where they are silent. Standbys on the command line take the place
    /// of the file's.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            protect: self.protect || file.protect,
            host: self.host.or(file.host),
            listen: self.listen.or(file.listen),
            key_file: self.key_file.or(file.key_file),
            shared_dir: self.shared_dir.or(file.shared_dir),
            standbys: if self.standbys.is_empty() {
                file.standbys
            } else {
                self.standbys
            },
            api: self.api.or(file.api),
            channel: self.channel.or(file.channel),
            probes: self.probes.or(file.probes),
            interface: self.interface.or(file.interface),
            heartbeat_interval_ms: self.heartbeat_interval_ms.or(file.heartbeat_interval_ms),
            host_timeout_ms: self.host_timeout_ms.or(file.host_timeout_ms),
            vmm_timeout_ms: self.vmm_timeout_ms.or(file.vmm_timeout_ms),
            ack_timeout_ms: self.ack_timeout_ms.or(file.ack_timeout_ms),
        }
    }

    /// Whether anything was said about fault tolerance; a VM without it needs none of it.
    #[must_use]
    pub fn is_given(&self) -> bool {
        *self != Self::default()
    }

    /// Checks the options and reads the key.
    ///
    /// # Errors
    /// What is missing or wrong, and what to do about it.
    pub fn check(&self) -> Result<FtConfig, FtConfigError> {
        let me = needed(self.host, "the name of this host", "--host NAME", "host")?;
        let listen = needed(
            self.listen,
            "the address that other hosts reach this one at",
            "--listen ADDR:PORT",
            "listen",
        )?;
        let key_file = needed(
            self.key_file.clone(),
            "the key that all hosts share",
            "--key FILE",
            "key_file",
        )?;
        let shared_dir = needed(
            self.shared_dir.clone(),
            "a directory on shared storage",
            "--shared DIR",
            "shared_dir",
        )?;
        if listen.port() == 0 {
            return Err(FtConfigError::Address {
                what: "--listen".to_owned(),
                address: listen,
                why: "other hosts must know the port: choose one",
            });
        }
        check_shared(&shared_dir)?;
        let standbys = self.other_hosts(me)?;
        if self.protect && standbys.is_empty() {
            return Err(FtConfigError::NobodyToProtect);
        }
        Ok(FtConfig {
            protect: self.protect,
            me,
            listen,
            key: Key::read(&key_file)?,
            key_file,
            shared_dir,
            standbys,
            api: self.api.clone(),
            channel: self.channel.clone(),
            probes: self.probes.clone(),
            interface: self.interface.clone(),
            detector: self.detector()?,
        })
    }

    fn other_hosts(&self, me: HostId) -> Result<Vec<(HostId, Vec<SocketAddr>)>, FtConfigError> {
        let mut hosts: Vec<(HostId, Vec<SocketAddr>)> = Vec::new();
        for standby in self.standbys.iter().filter(|standby| standby.name != me) {
            let address = standby.addr;
            if address.port() == 0 || address.ip().is_unspecified() {
                return Err(FtConfigError::Address {
                    what: format!("standby {}", standby.name),
                    address,
                    why: "nobody can be reached there: give the address and port that it listens on",
                });
            }
            match hosts.iter_mut().find(|(name, _)| *name == standby.name) {
                Some((_, addresses)) => addresses.push(address),
                None => hosts.push((standby.name, vec![address])),
            }
        }
        if hosts.len() > MAX_PEERS {
            return Err(FtConfigError::TooMany(hosts.len()));
        }
        Ok(hosts)
    }

    fn detector(&self) -> Result<DetectorConfig, FtConfigError> {
        let default = DetectorConfig::default();
        let span = |flag, value: Option<u64>, range: std::ops::RangeInclusive<u64>, default| {
            let Some(value) = value else {
                return Ok(default);
            };
            if range.contains(&value) {
                return Ok(Duration::from_millis(value));
            }
            Err(FtConfigError::Time {
                flag,
                value,
                least: *range.start(),
                most: *range.end(),
            })
        };
        let timeout = |flag, value, default| span(flag, value, TIMEOUT_MS, default);
        let probe_every = span(
            "--heartbeat-interval-ms",
            self.heartbeat_interval_ms,
            HEARTBEAT_INTERVAL_MS,
            default.probe_every,
        )?;
        let host_silent = timeout(
            "--host-timeout-ms",
            self.host_timeout_ms,
            default.host_silent,
        )?;
        let (interval, silent) = (
            probe_every.as_millis() as u64,
            host_silent.as_millis() as u64,
        );
        if silent < HEARTBEATS_IN_TIMEOUT * interval {
            return Err(FtConfigError::FewHeartbeats {
                timeout: silent,
                interval,
            });
        }
        // No more probes may be asked for than fit into the time-out.
        let unanswered = default.unanswered.min((silent / interval) as u32);
        Ok(DetectorConfig {
            probe_every,
            host_silent,
            unanswered,
            vmm_still: timeout("--vmm-timeout-ms", self.vmm_timeout_ms, default.vmm_still)?,
            ack_overdue: timeout("--ack-timeout-ms", self.ack_timeout_ms, default.ack_overdue)?,
            ..default
        })
    }
}

impl FtConfig {
    /// The control link of this configuration.
    #[must_use]
    pub fn link(&self) -> LinkConfig {
        LinkConfig {
            me: self.me,
            listen: self.listen,
            key: self.key.clone(),
            peers: self.standbys.clone(),
            times: LinkTimes::default(),
        }
    }
}

fn needed<T>(
    value: Option<T>,
    what: &'static str,
    flag: &'static str,
    field: &'static str,
) -> Result<T, FtConfigError> {
    value.ok_or(FtConfigError::Missing { what, flag, field })
}

/// Finds mistakes in the path. Storage that cannot be reached at the moment is none: it is waited for.
fn check_shared(path: &Path) -> Result<(), FtConfigError> {
    let wrong = |why: String| {
        Err(FtConfigError::Shared {
            path: path.to_owned(),
            why,
        })
    };
    if !path.is_absolute() {
        return wrong("it must be an absolute path".to_owned());
    }
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => wrong("it is no directory".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => wrong(error.to_string()),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the shared directory is not to be had now");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        ft: FtOptions,
    }

    /// Options that are right, and the directory that they need.
    fn good() -> (tempfile::TempDir, FtOptions) {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, [1; 32]).unwrap();
        let line = [
            "pollux",
            "--protect",
            "--host=castor",
            "--listen=[::]:7700",
            "--standby=pollux=192.0.2.2:7700",
            "--standby=castor=192.0.2.1:7700",
            "--standby=helen=[2001:db8::3]:7700",
            "--standby=pollux=198.51.100.2:7700",
        ];
        let mut options = Line::parse_from(line).ft;
        options.key_file = Some(key);
        options.shared_dir = Some(dir.path().to_owned());
        (dir, options)
    }

    #[test]
    fn standbys_keep_their_order_and_this_host_is_left_out() {
        let (_dir, options) = good();
        let config = options.check().unwrap();
        let names: Vec<_> = config
            .standbys
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(names, ["pollux", "helen"]);
        assert_eq!(config.standbys[0].1.len(), 2);
        assert_eq!(config.detector, DetectorConfig::default());
        assert!(config.protect && options.is_given());
        assert!(!FtOptions::default().is_given());
    }

    #[test]
    fn what_is_missing_is_named_with_its_flag() {
        let (_dir, options) = good();
        let without = |change: fn(&mut FtOptions)| {
            let mut options = options.clone();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(without(|o| o.host = None).contains("--host"));
        assert!(without(|o| o.listen = None).contains("--listen"));
        assert!(without(|o| o.key_file = None).contains("key_file"));
        assert!(without(|o| o.shared_dir = None).contains("--shared"));
        assert!(without(|o| o.standbys.clear()).contains("--standby"));
    }

    #[test]
    fn addresses_and_paths_that_lead_nowhere_are_refused() {
        let (dir, options) = good();
        let refused = |change: &dyn Fn(&mut FtOptions)| {
            let mut options = options.clone();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(refused(&|o| o.listen = "[::]:0".parse().ok()).contains("port"));
        let standby = |text: &str| vec![text.parse().unwrap()];
        assert!(refused(&|o| o.standbys = standby("a=0.0.0.0:1")).contains("standby a"));
        assert!(refused(&|o| o.standbys = standby("a=192.0.2.1:0")).contains("standby a"));
        assert!(refused(&|o| o.shared_dir = Some("ft".into())).contains("absolute"));
        assert!(refused(&|o| o.shared_dir = Some(dir.path().join("key"))).contains("no directory"));
        assert!(refused(&|o| o.shared_dir = Some(dir.path().join("none"))).contains("none"));
        let many = |o: &mut FtOptions| {
            o.standbys = (0..=MAX_PEERS)
                .map(|n| format!("h{n}=192.0.2.1:{}", 1 + n).parse().unwrap())
                .collect();
        };
        assert!(refused(&many).contains("limit"));
        for bad in [
            "",
            "castor",
            "castor=",
            "=192.0.2.1:1",
            "a b=192.0.2.1:1",
            "a=host:1",
        ] {
            let error = bad.parse::<Standby>().unwrap_err().to_string();
            assert!(error.contains("NAME=ADDR:PORT"), "{bad}");
        }
    }

    #[test]
    fn times_are_bounded_and_fit_together() {
        let (_dir, options) = good();
        let with = |change: fn(&mut FtOptions)| {
            let mut options = options.clone();
            change(&mut options);
            options.check()
        };
        let fast = with(|o| {
            o.heartbeat_interval_ms = Some(5);
            o.host_timeout_ms = Some(15);
        });
        let fast = fast.unwrap().detector;
        assert_eq!(fast.host_silent, Duration::from_millis(15));
        assert_eq!(fast.unanswered, 3);
        let bad = [
            with(|o| o.heartbeat_interval_ms = Some(0)),
            with(|o| o.heartbeat_interval_ms = Some(100)),
            with(|o| o.host_timeout_ms = Some(59)),
            with(|o| o.vmm_timeout_ms = Some(4)),
            with(|o| o.ack_timeout_ms = Some(600_001)),
        ];
        for (n, result) in bad.into_iter().enumerate() {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("-ms"), "{n}: {error}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_keys_are_refused() {
        let text = "protect = true\nhost = 'helen'\nhost_timeout_ms = 300\n\
                    standbys = [{ name = 'castor', addr = '192.0.2.1:7700' }]\n";
        let file: FtOptions = toml::from_str(text).unwrap();
        let (_dir, flags) = good();
        let both = flags.clone().over(file.clone());
        assert_eq!(both.host, flags.host);
        assert_eq!(both.standbys, flags.standbys);
        assert_eq!(both.host_timeout_ms, Some(300));
        assert_eq!(FtOptions::default().over(file.clone()), file);
        assert!(toml::from_str::<FtOptions>("hots = 'a'").is_err());
        assert!(toml::from_str::<FtOptions>("host = 'a b'").is_err());
    }
}
