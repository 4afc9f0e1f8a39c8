//! Puts the daemon together: sockets, then threads, then waiting for its end.
//!
//! | thread | what it does |
//! |---|---|
//! | data | io_uring, rings, connection: [`Engine`] |
//! | control | vhost-user messages of one VMM at a time |
//! | listen, handshake, dial | connections to the peer's daemon |
//! | admin | metrics |
//! | main | reports of the data thread, signals |

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::bulk::BulkStreams;
use super::control::Control;
use super::engine::uring::{SetupError, Uring, UringOptions};
use super::engine::{Command, Engine, EngineConfig, EngineHandle, Report};
use super::options::{Options, OptionsError, Priority};
use super::peer::Peers;
use super::probes::Probes;
use super::{admin, life};
use crate::config_space::Tuning;

/// Why the daemon does not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The options cannot be used.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// There is no ring to be had.
    #[error(transparent)]
    Uring(#[from] SetupError),
    /// A socket cannot be bound.
    #[error("socket {path}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Anything else that the kernel refuses.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The data thread ended.
    #[error("the data thread ended unexpectedly")]
    DataThread,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Io { what, source }
}

/// How long a daemon that serves one VMM (`--once`) waits for it: a VMM that dies after it started the daemon
/// and before it connects would otherwise leave it behind.
const FIRST_VMM_LIMIT: Duration = Duration::from_secs(15);
/// How long a VMM that has connected may take to be noticed.
const ACCEPT_LIMIT: Duration = Duration::from_secs(1);

/// What wakes the main thread.
enum Wake {
    /// No VMM has ever connected.
    NoVmm,
    Report(Report),
    Terminate,
    DataThreadEnded(Result<(), String>),
}

/// A Unix socket's file, removed at the end.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs the daemon until it is told to end, or (`--once`) its VMM is gone.
///
/// # Errors
/// [`RunError`] says what the operator can do.
pub fn run(options: &Options) -> Result<(), RunError> {
    let key = options.key()?;
    let tuning = options.tuning()?;
    if !options.foreground && life::detach() && options.priority != Priority::None {
        life::lift_session();
    }
    life::spare_from_oom();
    if let Some(group) = &options.cgroup {
        life::enter_cgroup(group).map_err(io_error("enter the control group"))?;
    }
    let (vmm_listener, _vmm_file) = bind(&options.socket)?;
    let admin_socket = options.admin.as_deref().map(bind).transpose()?;
    let sockets = options.sockets();
    let peer_listener = options
        .listen
        .map(|address| sockets.listen(address))
        .transpose()
        .map_err(io_error("listen for the peer"))?;

    let (wake, woken) = mpsc::channel();
    let engine = start_engine(options, tuning, &wake)?;
    let bulk = Arc::new(BulkStreams::default());
    let listening = peer_listener.is_some();
    let peers = Peers::new(engine.clone(), key, sockets, listening, Arc::clone(&bulk));
    let address = peer_listener.as_ref().and_then(|l| l.local_addr().ok());
    if let Some(listener) = peer_listener {
        serve_peers(peers.clone(), listener)?;
    }
    if let Some((listener, _)) = &admin_socket {
        let listener = listener.try_clone().map_err(io_error("admin socket"))?;
        let engine = engine.clone();
        thread("ftlog-admin", move || admin::serve(&listener, &engine))?;
    }
    let has_vmm = Arc::new(AtomicBool::new(false));
    let had_vmm = Arc::new(AtomicBool::new(false));
    let connected = [&has_vmm, &had_vmm];
    serve_vmm(vmm_listener, &engine, &peers, &bulk, connected)?;
    watch_signals(&wake)?;
    if options.announce {
        announce(address);
    }
    if options.once {
        watch_first_vmm(&wake, &had_vmm)?;
    }
    let probes = Probes::start(options.probes.as_deref(), &engine);
    let probes = probes.map_err(io_error("start a thread"))?;
    wait(options.once, &woken, &engine, &peers, &probes, &has_vmm)
}

/// Waits for the end.
fn wait(
    once: bool,
    woken: &mpsc::Receiver<Wake>,
    engine: &EngineHandle,
    peers: &Peers,
    probes: &Probes,
    has_vmm: &AtomicBool,
) -> Result<(), RunError> {
    let mut draining = false;
    for wake in woken {
        match wake {
            Wake::Report(Report::Opened(params)) => {
                peers.opened(params);
                probes.opened(params);
            }
            Wake::Report(Report::Lost) => peers.lost(),
            Wake::Report(Report::Closed) => {
                peers.closed();
                probes.closed();
            }
            Wake::Report(Report::Finished) => {
                if once && !has_vmm.load(Ordering::Acquire) {
                    return Ok(());
                }
            }
            Wake::NoVmm => {
                tracing::warn!("no VMM has connected: the one that started this is gone");
                return Ok(());
            }
            Wake::Terminate if draining => return Ok(()),
            Wake::Terminate => {
                draining = true;
                engine
                    .tell(Command::Drain)
                    .map_err(|_| RunError::DataThread)?;
            }
            Wake::DataThreadEnded(Ok(())) => return Ok(()),
            Wake::DataThreadEnded(Err(error)) => {
                tracing::error!(error, "data thread");
                return Err(RunError::DataThread);
            }
        }
    }
    Err(RunError::DataThread)
}

fn start_engine(
    options: &Options,
    tuning: Tuning,
    wake: &mpsc::Sender<Wake>,
) -> Result<EngineHandle, RunError> {
    let (engine, inbox, doorbell) = EngineHandle::new().map_err(io_error("eventfd"))?;
    let (reports, reported) = mpsc::channel();
    let mut config = EngineConfig {
        linger_ns: options.linger_ms * 1_000_000,
        yield_in_spin: !options.spin_hard,
        yield_to_called: false,
        clock: life::monotonic_ns,
    };
    let (priority, cpu) = (options.priority, options.cpu);
    let ring_options = UringOptions {
        zero_copy: options.send_zc,
        kernel_polls: options.sqpoll,
    };
    let (set_up, is_set_up) = mpsc::sync_channel(1);
    let ended = wake.clone();
    thread("ftlog-data", move || {
        if let Some(Err(error)) = cpu.map(life::pin) {
            tracing::warn!(%error, "the data thread is not pinned");
        }
        // The ring belongs to the thread that makes it.
        let ring = match Uring::new(ring_options) {
            Ok(ring) => ring,
            Err(error) => {
                let _ = set_up.send(Err(error));
                return;
            }
        };
        let _ = set_up.send(Ok(()));
        config.yield_to_called = life::schedule(priority);
        let run = || {
            Engine::new(ring, config, inbox, doorbell, reports).and_then(|mut engine| engine.run())
        };
        // A daemon without its data thread is of no use: it ends too, and is started again.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
            .map_err(|_| "it panicked".to_owned())
            .and_then(|ran| ran.map_err(|error| error.to_string()));
        let _ = ended.send(Wake::DataThreadEnded(result));
    })?;
    is_set_up.recv().map_err(|_| RunError::DataThread)??;
    let forward = wake.clone();
    thread("ftlog-reports", move || {
        for report in reported {
            if forward.send(Wake::Report(report)).is_err() {
                return;
            }
        }
    })?;
    engine
        .tell(Command::Tune(tuning))
        .map_err(|_| RunError::DataThread)?;
    Ok(engine)
}

fn serve_peers(peers: Peers, listener: TcpListener) -> Result<(), RunError> {
    thread("ftlog-listen", move || peers.serve(&listener))
}

fn serve_vmm(
    listener: UnixListener,
    engine: &EngineHandle,
    peers: &Peers,
    bulk: &Arc<BulkStreams>,
    [has_vmm, had_vmm]: [&Arc<AtomicBool>; 2],
) -> Result<(), RunError> {
    let (engine, peers) = (engine.clone(), peers.clone());
    let (bulk, has_vmm, had_vmm) = (Arc::clone(bulk), Arc::clone(has_vmm), Arc::clone(had_vmm));
    thread("ftlog-control", move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            has_vmm.store(true, Ordering::Release);
            had_vmm.store(true, Ordering::Release);
            let control = Control::new(engine.clone(), peers.clone(), Arc::clone(&bulk));
            serve_one(stream, control);
            has_vmm.store(false, Ordering::Release);
            if engine.tell(Command::FrontendGone).is_err() {
                return;
            }
        }
    })
}

fn serve_one(stream: UnixStream, control: Control) {
    let _span = tracing::info_span!("vmm").entered();
    tracing::info!("a VMM has connected");
    let mut handler = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(control)));
    loop {
        match handler.handle_request() {
            Ok(()) | Err(VhostError::ReqHandlerError(_)) => {}
            Err(VhostError::Disconnected) => {
                tracing::info!("the VMM has disconnected");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "the VMM's connection ends");
                return;
            }
        }
    }
}

/// Who started this daemon holds the other end of its standard output until it has connected: that end
/// goes early where it dies.
fn watch_first_vmm(wake: &mpsc::Sender<Wake>, had_vmm: &Arc<AtomicBool>) -> Result<(), RunError> {
    let (wake, had_vmm) = (wake.clone(), Arc::clone(had_vmm));
    thread("ftlog-first-vmm", move || {
        let out = io::stdout();
        let mut out = [PollFd::new(&out, PollFlags::empty())];
        let limit = Timespec {
            tv_sec: FIRST_VMM_LIMIT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        while let Err(Errno::INTR) = poll(&mut out, Some(&limit)) {}
        std::thread::sleep(ACCEPT_LIMIT);
        if !had_vmm.load(Ordering::Acquire) {
            // It ends with the daemon.
            let _ = wake.send(Wake::NoVmm);
        }
    })
}

fn watch_signals(wake: &mpsc::Sender<Wake>) -> Result<(), RunError> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(io_error("signals"))?;
    let wake = wake.clone();
    thread("ftlog-signals", move || {
        for _ in signals.forever() {
            if wake.send(Wake::Terminate).is_err() {
                return;
            }
        }
    })
}

fn announce(address: Option<SocketAddr>) {
    let line = serde_json::json!({
        "ready": true,
        "pid": std::process::id(),
        "listen": address,
    });
    let mut out = io::stdout().lock();
    // Whoever started us and no longer listens does not matter.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), RunError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map(|_| ())
        .map_err(io_error("start a thread"))
}

/// Binds a Unix socket for this user alone, in the place of one that nobody serves any more.
fn bind(path: &Path) -> Result<(UnixListener, SocketFile), RunError> {
    let error = |source| RunError::Socket {
        path: path.to_owned(),
        source,
    };
    let stale = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err();
    if stale {
        std::fs::remove_file(path).map_err(error)?;
    }
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path).map_err(error);
    rustix::process::umask(mask);
    Ok((listener?, SocketFile(path.to_owned())))
}
