//! Round trips: open loop, every reply counted, the arrival stamped by the prober's kernel.
//!
//! The time of a request is read just before it is handed to the kernel, by a thread with real-time
//! priority, as the prober of a VMM has it; requests go out on a fixed grid whether or not the last one
//! has been answered, so that a long wait is counted in all the requests that it delays.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use ebpf_events::packet::{DEFAULT_PORT, HEARTBEAT_BYTES};
use ebpf_events::{Reply, Request, Side};
use hdrhistogram::Histogram;
use heartbeat::clock::monotonic_ns;
use heartbeat::socket::HeartbeatSocket;
use rustix::thread::{ClockId, clock_nanosleep_absolute};

use super::Options;
use super::hogs::Hogs;
use super::world::{EPOCH, GENERATION, Responder, World, keys};
use crate::Failure;
use crate::report::Measure;

const SESSION: u64 = 1;
const EVERY: Duration = Duration::from_micros(250);
const EVERY_USERSPACE: Duration = Duration::from_millis(2);
/// How long replies to the last requests are waited for.
const LINGER: Duration = Duration::from_secs(2);

struct Case {
    responder: Responder,
    probes: u64,
    every: Duration,
    hogs: usize,
}

pub(super) fn measure(options: &Options, ftprobe: &Path) -> Result<Vec<Measure>, Failure> {
    let kernel = |responder, hogs| Case {
        responder,
        probes: options.probes,
        every: EVERY,
        hogs,
    };
    let userspace = |responder, hogs| Case {
        responder,
        probes: options.userspace_probes,
        every: EVERY_USERSPACE,
        hogs,
    };
    let mut lost_in_all = 0;
    let mut run = |name: &str, case: Case| -> Result<Measure, Failure> {
        eprintln!("{name}: {} probes, {} hogs a CPU", case.probes, case.hogs);
        let (histogram, lost) = round_trips(&case, ftprobe)?;
        lost_in_all += lost;
        let measure = Measure::microseconds(name, &histogram);
        Ok(if lost == 0 {
            measure
        } else {
            measure.noted(format!("{lost} without a reply"))
        })
    };
    let hogs = options.hogs;
    let baseline = run("rtt_hogs_userspace", userspace(Responder::Userspace, hogs))?;
    let raised = run(
        "rtt_hogs_userspace_fifo",
        userspace(Responder::UserspaceRaised, hogs),
    )?;
    let mut results = vec![
        run("rtt_idle", kernel(Responder::Native, 0))?,
        run("rtt_idle_tcx", kernel(Responder::Tcx, 0))?,
        run("rtt_idle_userspace", userspace(Responder::Userspace, 0))?,
        run("rtt_hogs", kernel(Responder::Native, hogs))?.against("rtt_hogs_userspace", &baseline),
        run("rtt_hogs_tcx", kernel(Responder::Tcx, hogs))?.against("rtt_hogs_userspace", &baseline),
        baseline,
        raised,
    ];
    results.push(Measure::value("rtt_lost", "1", lost_in_all as f64));
    Ok(results)
}

/// Round trips in ns, and how many requests were never answered.
fn round_trips(case: &Case, ftprobe: &Path) -> Result<(Histogram<u64>, u64), Failure> {
    let world = World::new(ftprobe)?;
    let _probes = world.probes(case.responder)?;
    let _vmm = world.vmm_on_b(SESSION)?;
    let peer = SocketAddr::new(world.link.b.v4.into(), DEFAULT_PORT);
    let socket = world
        .a
        .run(|| HeartbeatSocket::bind((world.link.a.v4, 0).into(), None))?;
    socket.socket().set_nonblocking(true)?;
    socket.socket().connect(peer)?;
    let _hogs = Hogs::start(case.hogs, &[0, 1])?;
    // A thread of host A: on its CPU, above the hogs.
    let (histogram, lost) = world.a.run(|| {
        heartbeat::priority::raise();
        exchange(&socket, case).map_err(|error| error.to_string())
    })?;
    Ok((histogram, lost))
}

fn exchange(socket: &HeartbeatSocket, case: &Case) -> Result<(Histogram<u64>, u64), Failure> {
    let mut histogram = Histogram::new(3)?;
    let key = keys(SESSION, Side::Connector).ours;
    let first = monotonic_ns();
    let every = u64::try_from(case.every.as_nanos())?;
    for number in 1..=case.probes {
        let due = first + number * every;
        sleep_until(due);
        let request = Request {
            session: SESSION,
            generation: GENERATION,
            epoch: EPOCH,
            sequence: first + number,
            nonce: number,
            time_ns: monotonic_ns(),
        };
        socket.socket().send(&request.encode(&key))?;
        receive(socket, &mut histogram)?;
    }
    let end = monotonic_ns() + u64::try_from(LINGER.as_nanos())?;
    while histogram.len() < case.probes && monotonic_ns() < end {
        sleep_until(monotonic_ns() + every);
        receive(socket, &mut histogram)?;
    }
    let lost = case.probes - histogram.len();
    Ok((histogram, lost))
}

fn sleep_until(ns: u64) {
    // An early return makes one request early, which changes nothing.
    let _ = clock_nanosleep_absolute(ClockId::Monotonic, &heartbeat::clock::timespec(ns));
}

fn receive(socket: &HeartbeatSocket, histogram: &mut Histogram<u64>) -> Result<(), Failure> {
    let key = keys(SESSION, Side::Connector).ours;
    let mut buffer = [0; HEARTBEAT_BYTES + 1];
    while let Some(arrival) = socket.receive(&mut buffer)? {
        let reply = Reply::decode(&buffer[..arrival.bytes], &key)?;
        histogram.record(arrival.arrived_ns.saturating_sub(reply.echo_time_ns).max(1))?;
    }
    Ok(())
}
