//! `ftprobe`: loads the eBPF probes, hands their maps out, exports what they saw.

use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use ftprobe::causes::with_causes;
use ftprobe::daemon::{Config, Daemon, Mode};
use ftprobe::listen::{self, Listen};
use ftprobe::metrics::{Endpoint, Sources};
use heartbeat::Client;
use heartbeat::protocol::{DEFAULT_SOCKET, FlowStatus, ResponderKind, SessionStatus};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, getppid, pidfd_open, setsid};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;

type AnyError = Box<dyn std::error::Error>;

/// Probes in the kernel for Pollux: heartbeats that a starved host still answers, and what the
/// kernel sees of the logging channel.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Attach the probes and serve VMMs and channel daemons until SIGTERM or SIGINT.
    ///
    /// Needs CAP_BPF and CAP_NET_ADMIN, and CAP_PERFMON for the watch for exits; without them it
    /// answers heartbeats in userspace.
    Run(Run),
    /// Print what a running ftprobe can do here and what it has seen.
    Status {
        /// Socket of the running ftprobe.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print where the time of log entries goes: one histogram for each stage.
    ///
    /// Listens on this machine, or reads what was recorded on the primary's host and on the backup's,
    /// in this order. Listening needs CAP_BPF and CAP_PERFMON.
    Latency {
        /// Recordings to read instead of listening.
        #[arg(num_args = 0..=2)]
        recordings: Vec<PathBuf>,
        #[command(flatten)]
        listen: Listen,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// With --json: also session, position and the ns of all stages of each append.
        #[arg(long, requires = "json")]
        each: bool,
        /// Compare the clocks by heartbeats even where both hosts are one machine.
        #[arg(long)]
        measured_clocks: bool,
    },
    /// Record the stations of log entries on this host, for `latency` and `trace`.
    Record {
        /// The file to write.
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        listen: Listen,
    },
    /// Write a trace for Perfetto or chrome://tracing from the recordings of one host or both.
    Trace {
        /// Recordings of the primary's host and of the backup's, the first with the clock that counts.
        #[arg(required = true, num_args = 1..=2)]
        recordings: Vec<PathBuf>,
        /// The file to write.
        #[arg(long)]
        out: PathBuf,
        /// Compare the clocks by heartbeats even where both hosts are one machine.
        #[arg(long)]
        measured_clocks: bool,
    },
}

#[derive(clap::Args)]
struct Run {
    /// Network interface of the heartbeats; best one that carries nothing else. Without it, the one
    /// that has the address of --address, which is then taken for that of the logging channel too.
    #[arg(long, required_unless_present = "address")]
    interface: Option<String>,
    /// Network interface of the logging channel: its traffic is watched. If it is that of the
    /// heartbeats too, XDP is left out: it would cost the channel most of its throughput.
    #[arg(long)]
    log_interface: Option<String>,
    /// UDP port that heartbeats are answered on.
    #[arg(long, default_value_t = ebpf_events::packet::DEFAULT_PORT)]
    port: u16,
    /// Address to answer on, for a userspace responder only; any if not given.
    #[arg(long)]
    address: Option<IpAddr>,
    /// How to answer.
    #[arg(long, value_enum, default_value_t = ModeName::Auto)]
    mode: ModeName,
    /// Unix socket for VMMs and channel daemons.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Serve metrics at unix:PATH or at a loopback address such as 127.0.0.1:9464.
    #[arg(long, value_name = "WHERE")]
    metrics: Option<Endpoint>,
    /// Operator's socket of the channel daemon (vhost-ftlog --admin): its metrics are served too.
    #[arg(long, value_name = "SOCKET", requires = "metrics")]
    channel: Option<PathBuf>,
    /// API socket of the VMM: its metrics are served too.
    #[arg(long, value_name = "SOCKET", requires = "metrics")]
    vmm: Option<PathBuf>,
    /// End some seconds after the process that started this one: what its peers ask is answered
    /// until then, that it is gone. Leaves its session, so that what ends it does not end this.
    #[arg(long)]
    once: bool,
}

/// How long a peer has to be told that the VMM is gone.
const LINGER: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, ValueEnum)]
enum ModeName {
    /// The best that works here.
    Auto,
    /// XDP in the driver.
    Native,
    /// XDP after the driver.
    Generic,
    /// TCX on the interface's ingress.
    Tcx,
    /// A thread of this process.
    Userspace,
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Auto => Self::Auto,
            ModeName::Native => Self::Only(ResponderKind::XdpNative),
            ModeName::Generic => Self::Only(ResponderKind::XdpGeneric),
            ModeName::Tcx => Self::Only(ResponderKind::Tcx),
            ModeName::Userspace => Self::Only(ResponderKind::Userspace),
        }
    }
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Whoever reads the messages may go first; telling it there would be a panic.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run(arguments),
        Command::Status { socket, json } => status(&socket, json),
        Command::Latency {
            recordings,
            listen,
            json,
            each,
            measured_clocks,
        } => latency(&recordings, &listen, (json, each), measured_clocks),
        Command::Record { out, listen } => {
            signals().and_then(|(stop, _)| Ok(listen.record(&out, &stop)?))
        }
        Command::Trace {
            recordings,
            out,
            measured_clocks,
        } => listen::read(&recordings)
            .and_then(|read| listen::trace(&read, measured_clocks, &out))
            .map_err(AnyError::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ftprobe: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Readable once SIGTERM or SIGINT has come, and the end that makes it so.
fn signals() -> Result<(UnixStream, UnixStream), AnyError> {
    let (signalled, stop) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    Ok((stop, signalled))
}

fn latency(
    recordings: &[PathBuf],
    listen: &Listen,
    (json, each): (bool, bool),
    measured_clocks: bool,
) -> Result<(), AnyError> {
    let read = if recordings.is_empty() {
        vec![listen.hear(&signals()?.0)?]
    } else {
        listen::read(recordings)?
    };
    let stages = listen::stages(&read, measured_clocks);
    if json {
        let mut said = stages.json();
        if each {
            said["each"] = stages.each();
        }
        println!("{said}");
    } else {
        print!("{stages}");
    }
    Ok(())
}

fn run(arguments: Run) -> Result<(), AnyError> {
    let (stop, signalled) = signals()?;
    if arguments.once {
        outlive_parent(signalled.try_clone()?)?;
    }
    let (interface, log_interface) = interfaces(&arguments)?;
    let daemon = Daemon::start(&Config {
        interface,
        log_interface,
        port: arguments.port,
        address: arguments.address,
        mode: arguments.mode.into(),
        socket: arguments.socket,
        metrics: arguments.metrics,
        sources: Sources {
            channel: arguments.channel,
            vmm: arguments.vmm,
        },
    })?;
    if let Some(endpoint) = daemon.metrics() {
        tracing::info!(%endpoint, "metrics");
    }
    Ok(daemon.run(&stop)?)
}

/// Stops this process some time after its parent, and by nothing that stops the parent.
fn outlive_parent(mut signalled: UnixStream) -> Result<(), AnyError> {
    let parent = getppid().ok_or("the process that started this one is gone")?;
    let parent = pidfd_open(parent, PidfdFlags::empty())?;
    // Fails only for the leader of a process group, which is on its own already.
    let _ = setsid();
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        tracing::debug!(%error, "oom_score_adj");
    }
    std::thread::Builder::new()
        .name("parent".to_owned())
        .spawn(move || {
            let mut waiting = [PollFd::new(&parent, PollFlags::IN)];
            while let Err(Errno::INTR) = poll(&mut waiting, None) {}
            tracing::info!("the process that started this one has ended");
            std::thread::sleep(LINGER);
            let _ = signalled.write_all(&[0]);
        })?;
    Ok(())
}

fn interfaces(arguments: &Run) -> Result<(String, Option<String>), AnyError> {
    match (&arguments.interface, arguments.address) {
        (Some(interface), _) => Ok((interface.clone(), arguments.log_interface.clone())),
        (None, Some(address)) => {
            let found = ftprobe::interface::with_address(address)
                .ok_or_else(|| format!("no network interface has the address {address}"))?;
            let log = arguments.log_interface.clone();
            Ok((found.clone(), log.or(Some(found))))
        }
        (None, None) => Err("--interface or --address is needed".into()),
    }
}

fn status(socket: &std::path::Path, json: bool) -> Result<(), AnyError> {
    let status = Client::connect(socket)?.status()?;
    if json {
        println!("{}", serde_json::to_string(&status)?);
        return Ok(());
    }
    let can = &status.abilities;
    println!(
        "heartbeats on {} port {}: answered by {:?}",
        can.interface, can.port, can.responder
    );
    if !can.responder_reason.is_empty() {
        println!("  because {}", can.responder_reason);
    }
    println!(
        "exits are watched by {:?}; departures stamped: {}",
        can.exit_watch, can.departures
    );
    for (name, count) in &status.counters {
        println!("  {name:16} {count}");
    }
    for session in &status.sessions {
        println!("{}", session_line(session));
    }
    for flow in &status.flows {
        println!("{}", flow_line(flow));
    }
    for exits in &status.exits {
        println!(
            "exits of process {}: {} {}",
            exits.process, exits.reason, exits.count
        );
    }
    if status.traffic_watched && status.flows.is_empty() {
        println!("no connection of the logging channel seen");
    }
    Ok(())
}

fn session_line(s: &SessionStatus) -> String {
    let process = |pid: Option<u32>, dead: bool| match (pid, dead) {
        (None, _) => "none".to_owned(),
        (Some(pid), false) => pid.to_string(),
        (Some(pid), true) => format!("{pid} (exited)"),
    };
    format!(
        "session {:016x} epoch {}: VMM {}, channel daemon {}, answered {}, accepted {}",
        s.session,
        s.epoch,
        process(s.vmm, s.vmm_dead),
        process(s.daemon, s.daemon_dead),
        s.answered,
        s.accepted
    )
}

fn flow_line(f: &FlowStatus) -> String {
    format!(
        "log {:016x} {} to {}: out {} B in {} packets, in {} B in {} packets, received {}, \
         replayed {}, ACK p50 {} us p99 {} us of {}, round trip {} us, sent again {}",
        f.session,
        f.local,
        f.remote,
        f.bytes_out,
        f.packets_out,
        f.bytes_in,
        f.packets_in,
        f.received,
        f.replayed,
        f.ack_p50_ns / 1_000,
        f.ack_p99_ns / 1_000,
        f.acks_timed,
        f.rtt_us,
        f.retransmits
    )
}
