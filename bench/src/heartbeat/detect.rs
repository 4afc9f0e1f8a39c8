//! Times of detection by cause, and verdicts against peers that are well.

use std::path::Path;
use std::time::{Duration, Instant};

use ft::Cause;
use harness::Process;
use hdrhistogram::Histogram;
use heartbeat::clock::monotonic_ns;
use rustix::process::Signal;

use super::Options;
use super::hogs::Hogs;
use super::watch::Watch;
use super::world::{Responder, World};
use crate::Failure;
use crate::report::{Measure, Report};

/// What is done to host B, and what must be found.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// SIGKILL of the VMM.
    VmmKilled,
    /// SIGSTOP of the VMM.
    VmmStopped,
    /// The host is gone from the network.
    HostLost,
}

impl Blow {
    const ALL: [Self; 3] = [Self::VmmKilled, Self::VmmStopped, Self::HostLost];

    const fn name(self) -> &'static str {
        match self {
            Self::VmmKilled => "detect_vmm_killed",
            Self::VmmStopped => "detect_vmm_stopped",
            Self::HostLost => "detect_host_lost",
        }
    }

    const fn cause(self) -> Cause {
        match self {
            Self::VmmKilled => Cause::VmmDead,
            Self::VmmStopped => Cause::VmmStill,
            Self::HostLost => Cause::HostSilent,
        }
    }

    /// Strikes, and says when it had.
    fn strike(self, world: &World, vmm: &Process) -> Result<u64, Failure> {
        match self {
            Self::VmmKilled => vmm.signal(Signal::KILL)?,
            Self::VmmStopped => vmm.signal(Signal::STOP)?,
            Self::HostLost => world.link.b.set_up(false)?,
        }
        Ok(monotonic_ns())
    }
}

/// Replies that make a session one that runs.
const SETTLED: u64 = 5;

/// Each blow, on hosts with so many busy threads a CPU.
pub(super) fn measure(
    options: &Options,
    ftprobe: &Path,
    hogs: usize,
    report: &mut Report,
) -> Result<(), Failure> {
    let suffix = if hogs == 0 { "" } else { "_hogs" };
    let world = World::new(ftprobe)?;
    let _probes = world.probes(Responder::Tcx)?;
    let _hogs = Hogs::start(hogs, &[0, 1])?;
    let mut session = 0;
    for blow in Blow::ALL {
        let name = format!("{}{suffix}", blow.name());
        eprintln!("{name}: {} times", options.detections);
        let mut times = Histogram::new(3)?;
        for _ in 0..options.detections {
            session += 1;
            let took = world.a.run(|| {
                heartbeat::priority::raise();
                detect(&world, session, blow).map_err(|error| error.to_string())
            })?;
            times.record(took)?;
        }
        report.push(Measure::milliseconds(name, &times));
    }
    Ok(())
}

/// From the blow to the verdict, ns.
fn detect(world: &World, session: u64, blow: Blow) -> Result<u64, Failure> {
    let vmm = world.vmm_on_b(session)?;
    let mut watch = Watch::start(world, session)?;
    settle(&mut watch)?;
    let struck = blow.strike(world, &vmm)?;
    let found = loop {
        if let Some(cause) = watch.turn()? {
            break cause;
        }
    };
    let took = monotonic_ns() - struck;
    if found != blow.cause() {
        return Err(format!("{blow:?} was taken for {found:?}").into());
    }
    if matches!(blow, Blow::HostLost) {
        world.link.b.set_up(true)?;
        harness::wait_until("the link to come up", || world.link.b.is_up())?;
    }
    drop(vmm);
    watch.close()?;
    Ok(took)
}

/// Until the session runs: after a link has come up, the first requests wait for the neighbour's
/// address.
fn settle(watch: &mut Watch) -> Result<(), Failure> {
    let end = Instant::now() + harness::PATIENCE;
    while watch.replies() < SETTLED {
        if watch.turn()?.is_some() {
            watch.forgive();
        }
        if Instant::now() > end {
            return Err("host B never answers".into());
        }
    }
    Ok(())
}

/// Two pairs of healthy hosts starved alike, one answered in the kernel, one in userspace: how often
/// the same detector gives its peer up.
pub(super) fn false_failovers(
    options: &Options,
    ftprobe: &Path,
    report: &mut Report,
) -> Result<(), Failure> {
    let length = Duration::from_secs(options.watch_seconds);
    eprintln!("false_failovers: {} s", length.as_secs());
    let kernel = World::new(ftprobe)?;
    let userspace = World::new(ftprobe)?;
    let _kernel_probes = kernel.probes(Responder::Tcx)?;
    let _userspace_probes = userspace.probes(Responder::Userspace)?;
    let _vmms = [kernel.vmm_on_b(1)?, userspace.vmm_on_b(1)?];
    let _hogs = Hogs::start(options.hogs, &[0, 1])?;
    let watched = |world: &World| -> Result<u64, String> {
        world.a.run(|| {
            heartbeat::priority::raise();
            verdicts(world, length).map_err(|error| error.to_string())
        })
    };
    let (kernel, userspace) = std::thread::scope(|scope| {
        let other = scope.spawn(|| watched(&userspace));
        (watched(&kernel), other.join())
    });
    let userspace = userspace.map_err(|_| "the watch of the userspace pair panicked")??;
    let note = format!(
        "in {} s, {} busy threads a CPU",
        length.as_secs(),
        options.hogs
    );
    report.push(Measure::count("false_failovers", kernel?).noted(note.clone()));
    report.push(Measure::count("false_failovers_userspace", userspace).noted(note));
    Ok(())
}

fn verdicts(world: &World, length: Duration) -> Result<u64, Failure> {
    let mut watch = Watch::start(world, 1)?;
    settle(&mut watch)?;
    let end = Instant::now() + length;
    let mut count = 0;
    while Instant::now() < end {
        if let Some(cause) = watch.turn()? {
            count += 1;
            eprintln!("false failover: {cause:?}");
            watch.forgive();
        }
    }
    Ok(count)
}
