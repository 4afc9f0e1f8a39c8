//! What a session is told besides the checked options of fault tolerance.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ft::HostId;
use thiserror::Error;

use crate::config_ft::FtConfig;

/// The channel's daemon cannot be found.
#[derive(Debug, Error)]
#[error("no vhost-ftlog beside {0} or in PATH: install it there")]
pub struct NoDaemon(PathBuf);

/// The ports of a host, counted from the one that it is reached at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports(pub SocketAddr);

impl Ports {
    /// The logging channel, TCP.
    #[must_use]
    pub fn channel(self) -> SocketAddr {
        self.plus(1)
    }

    /// Heartbeats, UDP.
    #[must_use]
    pub fn heartbeat(self) -> SocketAddr {
        self.plus(2)
    }

    fn plus(self, more: u16) -> SocketAddr {
        SocketAddr::new(self.0.ip(), self.0.port().wrapping_add(more))
    }
}

/// The settings of protection.
#[derive(Debug, Clone)]
pub struct FtSettings {
    /// The checked options.
    pub ft: FtConfig,
    /// The program of the logging channel's daemon.
    pub daemon: PathBuf,
    /// A directory of this process for sockets.
    pub run_dir: PathBuf,
}

impl FtSettings {
    /// Finds what the options do not say.
    ///
    /// # Errors
    /// The channel's daemon is not there.
    pub fn new(ft: FtConfig) -> Result<Self, NoDaemon> {
        let own = std::env::current_exe().unwrap_or_default();
        let run_dir = std::env::temp_dir().join(format!("pollux-{}-{}", ft.me, std::process::id()));
        Ok(Self {
            ft,
            daemon: find_daemon(&own)?,
            run_dir,
        })
    }

    /// Where this host is reached.
    #[must_use]
    pub fn listen(&self) -> Ports {
        Ports(self.ft.listen)
    }

    /// Where a host is reached, by its first address.
    #[must_use]
    pub fn ports_of(&self, host: HostId) -> Option<Ports> {
        let found = self.ft.standbys.iter().find(|(name, _)| *name == host);
        found
            .and_then(|(_, addresses)| addresses.first())
            .map(|address| Ports(*address))
    }

    /// The directory that holds the epochs.
    #[must_use]
    pub fn epochs(&self) -> PathBuf {
        self.ft.shared_dir.join("epochs")
    }
}

fn find_daemon(own: &Path) -> Result<PathBuf, NoDaemon> {
    let beside = own.with_file_name("vhost-ftlog");
    if beside.exists() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("vhost-ftlog"))
        .find(|file| file.exists())
        .ok_or_else(|| NoDaemon(own.to_owned()))
}
