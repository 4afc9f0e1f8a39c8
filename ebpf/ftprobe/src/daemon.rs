//! The daemon as a whole: picks the best responder that this host allows, serves, cleans up.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use heartbeat::protocol::{Abilities, ExitWatch, ResponderKind, VERSION};
use heartbeat::{Responder, ResponderError};
use thiserror::Error;

use crate::backend::Backend;
use crate::causes::with_causes;
use crate::exits::Exits;
use crate::interface;
use crate::kernel::{Kernel, KernelConfig, KernelError};
use crate::metrics;
use crate::server::{Listener, serve};
use crate::state::State;
use crate::table::Table;
use crate::traffic::Traffic;
use crate::userspace::Userspace;

/// How heartbeats are to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The best that works: native XDP, generic XDP, TCX, userspace. XDP is left out on the interface
    /// of the logging channel, where it would cost most of its throughput, and on a veth, where replies
    /// would be lost whenever the other end's program goes.
    Auto,
    /// This one or none.
    Only(ResponderKind),
}

/// What the daemon is to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// Interface that heartbeats arrive on.
    pub interface: String,
    /// Interface of the logging channel, if it is known.
    pub log_interface: Option<String>,
    /// UDP port of the responder.
    pub port: u16,
    /// Address of a userspace responder; any address of the interface if `None`.
    pub address: Option<IpAddr>,
    /// How to answer.
    pub mode: Mode,
    /// Socket for VMMs and channel daemons.
    pub socket: PathBuf,
    /// Where metrics are served, if they are.
    pub metrics: Option<metrics::Endpoint>,
    /// Whose metrics are served too.
    pub sources: metrics::Sources,
}

/// Why the daemon could not start or go on.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The socket.
    #[error("socket {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The way that was asked for does not work here.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Not even a userspace responder can run.
    #[error(transparent)]
    Responder(#[from] ResponderError),
    /// Metrics cannot be served.
    #[error("metrics at {endpoint}: {source}")]
    Metrics {
        /// Where.
        endpoint: metrics::Endpoint,
        /// What the system said.
        source: io::Error,
    },
    /// No such interface.
    #[error("no network interface {0}")]
    Interface(String),
    /// Waiting for clients failed.
    #[error("waiting for clients: {0}")]
    Wait(#[source] io::Error),
}

/// A daemon that answers and listens, ready to serve.
pub struct Daemon {
    // Order of drop: nobody is let in any more, then the probes go.
    listener: Listener,
    metrics: Option<metrics::Server>,
    state: Arc<State>,
}

impl Daemon {
    /// Attaches the probes and opens the socket.
    ///
    /// # Errors
    /// [`DaemonError`]; then nothing is left behind.
    pub fn start(config: &Config) -> Result<Self, DaemonError> {
        if !interface::exists(&config.interface) {
            return Err(DaemonError::Interface(config.interface.clone()));
        }
        if let Some(log) = config
            .log_interface
            .as_ref()
            .filter(|name| !interface::exists(name))
        {
            return Err(DaemonError::Interface(log.clone()));
        }
        let listener = Listener::bind(&config.socket).map_err(|source| DaemonError::Socket {
            path: config.socket.clone(),
            source,
        })?;
        let mut traffic = config.log_interface.as_deref().and_then(watch_traffic);
        let table = Table::new(backend(config, traffic.as_mut())?);
        let exits = count_exits(config.mode);
        let state = Arc::new(State::new(table, traffic, exits));
        let metrics = config.metrics.as_ref().map(|endpoint| {
            metrics::serve(endpoint, Arc::clone(&state), config.sources.clone()).map_err(|source| {
                DaemonError::Metrics {
                    endpoint: endpoint.clone(),
                    source,
                }
            })
        });
        Ok(Self {
            listener,
            state,
            metrics: metrics.transpose()?,
        })
    }

    /// Where metrics are served, if they are.
    pub fn metrics(&self) -> Option<&metrics::Endpoint> {
        self.metrics.as_ref().map(metrics::Server::local)
    }

    /// Serves until `stop` becomes readable; then detaches the probes and removes the socket.
    ///
    /// # Errors
    /// [`DaemonError::Wait`].
    pub fn run(self, stop: impl AsFd) -> Result<(), DaemonError> {
        tracing::info!("ready");
        serve(&self.listener, &self.state, stop).map_err(DaemonError::Wait)
    }
}

/// Counting exits can be done without. Who asked for no program in the kernel gets none.
fn count_exits(mode: Mode) -> Option<Exits> {
    if mode == Mode::Only(ResponderKind::Userspace) {
        return None;
    }
    let started = Exits::start();
    if let Err(error) = &started {
        let error = with_causes(error);
        tracing::info!(error, "exits of virtual machines are not counted");
    }
    started.ok()
}

/// The probes of the logging channel can be done without.
fn watch_traffic(interface: &str) -> Option<Traffic> {
    match Traffic::start(interface) {
        Ok(traffic) => {
            tracing::info!(interface, "the logging channel is watched");
            Some(traffic)
        }
        Err(error) => {
            let error = with_causes(&error);
            tracing::warn!(interface, error, "the logging channel is not watched");
            None
        }
    }
}

/// The ways to try, and why others are left out.
fn ways(config: &Config) -> (Vec<ResponderKind>, String) {
    let xdp_left_out = match config.mode {
        Mode::Only(ResponderKind::Userspace) => return (Vec::new(), "asked for".to_owned()),
        Mode::Only(way) => return (vec![way], "asked for".to_owned()),
        Mode::Auto if config.log_interface.as_ref() == Some(&config.interface) => {
            "XDP would cost the logging channel on this interface most of its throughput"
        }
        Mode::Auto if interface::driver(&config.interface).as_deref() == Some("veth") => {
            "on a veth, what XDP sends arrives only where the other end has an XDP program too"
        }
        Mode::Auto => {
            let all = [
                ResponderKind::XdpNative,
                ResponderKind::XdpGeneric,
                ResponderKind::Tcx,
            ];
            return (all.to_vec(), String::new());
        }
    };
    (vec![ResponderKind::Tcx], xdp_left_out.to_owned())
}

fn backend(
    config: &Config,
    mut log: Option<&mut Traffic>,
) -> Result<Box<dyn Backend>, DaemonError> {
    let (ways, left_out) = ways(config);
    if ways.is_empty() {
        return userspace(config, left_out);
    }
    let kernel = KernelConfig {
        interface: config.interface.clone(),
        port: config.port,
        ways,
        left_out,
    };
    match Kernel::start(&kernel, log.as_deref_mut()) {
        Ok(kernel) => {
            let abilities = kernel.abilities();
            tracing::info!(responder = ?abilities.responder, watch = ?abilities.exit_watch,
                departures = abilities.departures, reason = %abilities.responder_reason,
                "heartbeats are answered in the kernel");
            Ok(Box::new(kernel))
        }
        Err(error) if config.mode == Mode::Auto => {
            if let Some(log) = log {
                log.pass_nothing_on();
            }
            let error = with_causes(&error);
            tracing::warn!(
                error,
                "heartbeats are answered in userspace: a starved host will be late"
            );
            userspace(config, error)
        }
        Err(error) => Err(error.into()),
    }
}

fn userspace(config: &Config, reason: String) -> Result<Box<dyn Backend>, DaemonError> {
    let bind = |address: IpAddr| {
        Responder::userspace(
            SocketAddr::new(address, config.port),
            Some(&config.interface),
        )
    };
    let responder = match config.address {
        Some(address) => bind(address)?,
        // Takes IPv4 too, unless IPv6 is switched off.
        None => {
            bind(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| bind(Ipv4Addr::UNSPECIFIED.into()))?
        }
    };
    let abilities = Abilities {
        version: VERSION,
        responder: ResponderKind::Userspace,
        responder_reason: reason,
        exit_watch: ExitWatch::Pidfd,
        departures: false,
        port: responder.local_addr().port(),
        interface: config.interface.clone(),
    };
    Ok(Box::new(Userspace::new(responder, abilities)))
}
