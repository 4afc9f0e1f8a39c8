//! `ftprobe`: loads the eBPF probes, hands their maps out, exports what they saw.

use std::io::IsTerminal;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use ftprobe::causes::with_causes;
use ftprobe::daemon::{Config, Daemon, Mode};
use heartbeat::Client;
use heartbeat::protocol::{FlowStatus, ResponderKind, SessionStatus};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;

type AnyError = Box<dyn std::error::Error>;

const DEFAULT_SOCKET: &str = "/run/pollux/ftprobe.sock";

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
}

#[derive(clap::Args)]
struct Run {
    /// Network interface of the heartbeats; best one that carries nothing else.
    #[arg(long)]
    interface: String,
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
}

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
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run(arguments),
        Command::Status { socket, json } => status(&socket, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ftprobe: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Run) -> Result<(), AnyError> {
    let (signalled, stop) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    let daemon = Daemon::start(&Config {
        interface: arguments.interface,
        log_interface: arguments.log_interface,
        port: arguments.port,
        address: arguments.address,
        mode: arguments.mode.into(),
        socket: arguments.socket,
    })?;
    Ok(daemon.run(&stop)?)
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
