//! What a session is told besides the checked options of fault tolerance.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ft::HostId;
use thiserror::Error;
use vhost_ftlog::frontend::{Daemon, SpawnConfig};

use super::probes::{ProbeDaemon, ProbeSpawn};
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
    /// The logging channel's daemon.
    pub channel: Daemon,
    /// The probe daemon.
    pub probes: ProbeDaemon,
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
            channel: channel(&ft, &own, &run_dir)?,
            probes: probes(&ft, &own, &run_dir),
            ft,
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
        epochs(&self.ft.shared_dir)
    }
}

/// The directory of epoch records on the shared storage `shared`.
#[must_use]
pub fn epochs(shared: &Path) -> PathBuf {
    shared.join("epochs")
}

fn channel(ft: &FtConfig, own: &Path, run_dir: &Path) -> Result<Daemon, NoDaemon> {
    if let Some(socket) = &ft.channel {
        return Ok(Daemon::Running(socket.clone()));
    }
    Ok(Daemon::Spawn(SpawnConfig {
        program: find("vhost-ftlog", own).ok_or_else(|| NoDaemon(own.to_owned()))?,
        socket: run_dir.join("ftlog.sock"),
        args: vec![
            "--listen".to_owned(),
            Ports(ft.listen).channel().to_string(),
            "--key-file".to_owned(),
            ft.key_file.display().to_string(),
            "--admin".to_owned(),
            run_dir.join(CHANNEL_ADMIN).display().to_string(),
            "--probes".to_owned(),
            ft.probes
                .clone()
                .unwrap_or_else(|| run_dir.join(PROBE_SOCKET))
                .display()
                .to_string(),
        ],
    }))
}

/// Names in the directory of a run.
const CHANNEL_ADMIN: &str = "ftlog.admin";
const PROBE_SOCKET: &str = "ftprobe.sock";
const METRICS: &str = "metrics";

fn probes(ft: &FtConfig, own: &Path, run_dir: &Path) -> ProbeDaemon {
    if let Some(socket) = &ft.probes {
        return ProbeDaemon::Running(socket.clone());
    }
    let Some(program) = find("ftprobe", own) else {
        let own = own.display();
        return ProbeDaemon::None(format!("no ftprobe beside {own} or in PATH"));
    };
    let listen = Ports(ft.listen).heartbeat();
    let mut args = vec!["--port".to_owned(), listen.port().to_string()];
    let metrics = run_dir.join(METRICS);
    args.extend([
        "--metrics".to_owned(),
        format!("unix:{}", metrics.display()),
    ]);
    let channel = ft.channel.is_none().then(|| run_dir.join(CHANNEL_ADMIN));
    let api = ft.api.as_deref();
    for (flag, socket) in [("--channel", channel.as_deref()), ("--vmm", api)] {
        if let Some(socket) = socket {
            args.extend([flag.to_owned(), socket.display().to_string()]);
        }
    }
    if !listen.ip().is_unspecified() {
        args.extend(["--address".to_owned(), listen.ip().to_string()]);
    }
    match &ft.interface {
        Some(name) => {
            for flag in ["--interface", "--log-interface"] {
                args.extend([flag.to_owned(), name.clone()]);
            }
        }
        None if listen.ip().is_unspecified() => {
            let why = "--listen names no address: say --interface".to_owned();
            return ProbeDaemon::None(why);
        }
        None => {}
    }
    ProbeDaemon::Spawn(ProbeSpawn {
        program,
        socket: run_dir.join(PROBE_SOCKET),
        args,
    })
}

/// A program beside this one, or in PATH.
pub fn find(name: &str, own: &Path) -> Option<PathBuf> {
    let beside = own.with_file_name(name);
    if beside.exists() {
        return Some(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
}
