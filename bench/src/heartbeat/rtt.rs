//! Round trips, answered by TCX as `ftprobe` chooses on a veth, and by XDP: open loop, every reply counted,
//! the arrival stamped by the prober's kernel.
//!
//! The time of a request is read just before it is handed to the kernel, by a thread with real-time
//! priority, as the prober of a VMM has it; requests go out on a fixed grid whether or not the last one
//! has been answered, so that a long wait is counted in all the requests that it delays.
//!
//! On a veth the sender's CPU receives for the other host too. In the cases `apart` each host's packets are
//! received on its own CPU (receive packet steering), so that the responder's CPU must be interrupted.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use ebpf_events::packet::{DEFAULT_PORT, HEARTBEAT_BYTES};
use ebpf_events::{Reply, Request, Side};
use hdrhistogram::Histogram;
use heartbeat::clock::monotonic_ns;
use heartbeat::socket::HeartbeatSocket;
use rustix::thread::{ClockId, clock_nanosleep_absolute};
use serde_json::json;

use super::Options;
use super::hogs::Hogs;
use super::scheduling::RaisedSoftirqs;
use super::world::{EPOCH, GENERATION, Responder, World, keys};
use crate::Failure;
use crate::report::{Measure, Report};

const SESSION: u64 = 1;
const EVERY: Duration = Duration::from_micros(250);
const EVERY_USERSPACE: Duration = Duration::from_millis(2);
/// How long replies to the last requests are waited for.
const LINGER: Duration = Duration::from_secs(2);

/// What the CPUs do besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Nothing: they sleep between heartbeats.
    Idle,
    /// Nothing, but they do not sleep.
    Awake,
    /// So many busy threads on each.
    Hogs(usize),
    /// The same, and each host's packets are received on its own CPU, as between machines.
    HogsApart(usize),
    /// Nothing, and each host's packets are received on its own CPU.
    IdleApart,
    /// Busy threads, with the kernel's threads for deferred network work raised above them.
    HogsSoftirqsRaised(usize),
}

struct Case {
    name: &'static str,
    responder: Responder,
    load: Load,
}

/// What one case gave.
struct Outcome {
    whole: Histogram<u64>,
    /// The slowest, from the worst on.
    slowest: Vec<Trip>,
    lost: u64,
}

/// One round trip, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Trip {
    whole: u64,
    /// Until the responder's program ran; the two hosts here have one clock.
    there: u64,
    number: u64,
}

/// How many of the slowest round trips are shown with their legs.
const SLOWEST: usize = 8;

pub(super) fn measure(
    options: &Options,
    ftprobe: &Path,
    report: &mut Report,
) -> Result<(), Failure> {
    let hogs = options.hogs;
    let case = |name, responder, load| Case {
        name,
        responder,
        load,
    };
    let cases = [
        case("rtt_hogs_userspace", Responder::Userspace, Load::Hogs(hogs)),
        case(
            "rtt_hogs_userspace_fifo",
            Responder::UserspaceRaised,
            Load::Hogs(hogs),
        ),
        case("rtt_idle_userspace", Responder::Userspace, Load::Idle),
        case("rtt_hogs", Responder::Tcx, Load::Hogs(hogs)),
        case("rtt_hogs_xdp", Responder::Native, Load::Hogs(hogs)),
        case(
            "rtt_hogs_xdp_raised",
            Responder::Native,
            Load::HogsSoftirqsRaised(hogs),
        ),
        case("rtt_hogs_apart", Responder::Tcx, Load::HogsApart(hogs)),
        case("rtt_idle_apart", Responder::Tcx, Load::IdleApart),
        case("rtt_idle", Responder::Tcx, Load::Idle),
        case("rtt_idle_xdp", Responder::Native, Load::Idle),
        case("rtt_awake", Responder::Tcx, Load::Awake),
        case("rtt_awake_xdp", Responder::Native, Load::Awake),
    ];
    let mut baseline = None;
    let mut lost = 0;
    let mut slowest = serde_json::Map::new();
    let wanted = |name: &str| {
        options.rtt_cases.is_empty() || options.rtt_cases.iter().any(|case| case == name)
    };
    for case in cases.into_iter().filter(|case| wanted(case.name)) {
        let probes = case.probes(options);
        eprintln!("{}: {probes} probes, {:?}", case.name, case.load);
        let outcome = round_trips(&case, probes, ftprobe)?;
        lost += outcome.lost;
        let mut measure = Measure::microseconds(case.name, &outcome.whole);
        if outcome.lost > 0 {
            measure = measure.noted(format!("{} without a reply", outcome.lost));
        }
        if case.name == BASELINE {
            baseline = Some(measure.clone());
        } else if let (
            Some(baseline),
            Load::Hogs(_) | Load::HogsApart(_) | Load::HogsSoftirqsRaised(_),
        ) = (&baseline, case.load)
        {
            measure = measure.against(BASELINE, baseline);
        }
        report.push(measure);
        slowest.insert(case.name.to_owned(), legs(&outcome.slowest));
    }
    report.push(Measure::count("rtt_lost", lost));
    report.detail("slowest", slowest.into());
    Ok(())
}

const BASELINE: &str = "rtt_hogs_userspace";

fn legs(trips: &[Trip]) -> serde_json::Value {
    let us = |ns: u64| ns as f64 / 1e3;
    let trips = trips.iter().map(|trip| {
        json!({
            "probe": trip.number, "us": us(trip.whole), "there_us": us(trip.there),
            "back_us": us(trip.whole.saturating_sub(trip.there)),
        })
    });
    trips.collect()
}

impl Case {
    fn is_userspace(&self) -> bool {
        matches!(
            self.responder,
            Responder::Userspace | Responder::UserspaceRaised
        )
    }

    fn probes(&self, options: &Options) -> u64 {
        if self.is_userspace() {
            options.userspace_probes
        } else {
            options.probes
        }
    }

    fn every(&self) -> Duration {
        if self.is_userspace() {
            EVERY_USERSPACE
        } else {
            EVERY
        }
    }
}

fn round_trips(case: &Case, probes: u64, ftprobe: &Path) -> Result<Outcome, Failure> {
    let world = World::new(ftprobe)?;
    if matches!(case.load, Load::HogsApart(_) | Load::IdleApart) {
        world.receive_apart()?;
    }
    let _probes = world.probes(case.responder)?;
    let _vmm = world.vmm_on_b(SESSION)?;
    let peer = SocketAddr::new(world.link.b.v4.into(), DEFAULT_PORT);
    let socket = world
        .a
        .run(|| HeartbeatSocket::bind((world.link.a.v4, 0).into(), None))?;
    socket.socket().set_nonblocking(true)?;
    socket.socket().connect(peer)?;
    let _hogs = match case.load {
        Load::Idle | Load::IdleApart => None,
        Load::Awake => Some(Hogs::awake(&[0, 1])?),
        Load::Hogs(hogs) | Load::HogsApart(hogs) | Load::HogsSoftirqsRaised(hogs) => {
            Some(Hogs::start(hogs, &[0, 1])?)
        }
    };
    let _raised = match case.load {
        Load::HogsSoftirqsRaised(_) => Some(RaisedSoftirqs::raise()?),
        _ => None,
    };
    // A thread of host A: on its CPU, above the hogs.
    let outcome = world.a.run(|| {
        heartbeat::priority::raise();
        exchange(&socket, probes, case.every()).map_err(|error| error.to_string())
    })?;
    Ok(outcome)
}

fn exchange(socket: &HeartbeatSocket, probes: u64, every: Duration) -> Result<Outcome, Failure> {
    let mut outcome = Outcome {
        whole: Histogram::new(3)?,
        slowest: Vec::new(),
        lost: 0,
    };
    let key = keys(SESSION, Side::Connector).ours;
    let first = monotonic_ns();
    let every = u64::try_from(every.as_nanos())?;
    for number in 1..=probes {
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
        outcome.receive(socket)?;
    }
    let end = monotonic_ns() + u64::try_from(LINGER.as_nanos())?;
    while outcome.whole.len() < probes && monotonic_ns() < end {
        sleep_until(monotonic_ns() + every);
        outcome.receive(socket)?;
    }
    outcome.lost = probes - outcome.whole.len();
    outcome.keep_slowest();
    Ok(outcome)
}

fn sleep_until(ns: u64) {
    // An early return makes one request early, which changes nothing.
    let _ = clock_nanosleep_absolute(ClockId::Monotonic, &heartbeat::clock::timespec(ns));
}

impl Outcome {
    fn receive(&mut self, socket: &HeartbeatSocket) -> Result<(), Failure> {
        let key = keys(SESSION, Side::Connector).ours;
        let mut buffer = [0; HEARTBEAT_BYTES + 1];
        while let Some(arrival) = socket.receive(&mut buffer)? {
            let reply = Reply::decode(&buffer[..arrival.bytes], &key)?;
            let whole = arrival.arrived_ns.saturating_sub(reply.echo_time_ns).max(1);
            self.whole.record(whole)?;
            self.slowest.push(Trip {
                whole,
                there: reply.time_ns.saturating_sub(reply.echo_time_ns),
                number: reply.nonce,
            });
            if self.slowest.len() > 64 * SLOWEST {
                self.keep_slowest();
            }
        }
        Ok(())
    }

    fn keep_slowest(&mut self) {
        self.slowest.sort_unstable_by(|a, b| b.cmp(a));
        self.slowest.truncate(SLOWEST);
    }
}
