//! Latency at a given rate: entries come by the clock, whether or not the ones before are acknowledged,
//! and each is timed from the moment at which it was due. Nothing is omitted while the channel stands.

use std::time::Duration;

use format::Seq;
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_ftlog::config_space::Tuning;
use vhost_ftlog::daemon::options::Priority;
use vhost_ftlog::frontend::{Acks, Session};

use super::closed::{capacity, with_consumer};
use super::series::{Series, histogram, record};
use super::world::{PATIENCE, Pair, Setup, World};
use super::{Failure, Times};
use crate::monotonic::Moment;

/// Bytes of an entry.
const ENTRY: usize = 1500;
/// Waits that are shorter are not worth a sleep.
const SHORT_NS: u64 = 10_000;
/// The most entries that are added between two looks at the acknowledgements.
const BURST: u64 = 64;

/// Latency at 10, 50 and 90 % of what the channel takes, with batching and without.
pub(super) fn latency(world: &World, times: Times, series: &mut Series) -> Result<(), Failure> {
    let batched = Setup::default();
    let unbatched = Setup {
        tuning: Tuning {
            batch_bytes: 1,
            batch_us: 0,
            ..Tuning::default()
        },
        ..batched
    };
    let most = capacity(world, batched, ENTRY)?;
    series
        .value("open_loop_capacity", "1/s", most)
        .noted("entries of 1500 bytes, as fast as the channel takes them with batching");
    for percent in [10, 50, 90] {
        let rate = most * f64::from(percent) / 100.0;
        for (setup, suffix) in [(batched, ""), (unbatched, "_unbatched")] {
            let name = format!("ack_open_loop_{percent}{suffix}");
            series.times(&name, at_rate(world, times, setup, rate)?);
        }
    }
    Ok(())
}

fn at_rate(
    world: &World,
    times: Times,
    setup: Setup,
    rate: f64,
) -> Result<Histogram<u64>, Failure> {
    let Pair {
        mut primary,
        backup,
    } = world.pair(setup)?;
    let session = &mut primary.session;
    let (latencies, ..) = with_consumer(world, backup, Priority::None, || {
        world.a.run(|| {
            // A timer is then late by what it takes to wake, not by the default slack of 50 us.
            rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
            Schedule::new(rate, times).run(session)
        })
    })?;
    Ok(latencies)
}

/// When entries are due.
struct Schedule {
    start: Moment,
    period_ns: f64,
    /// Entries that come before the timed ones, and all.
    warm_up: u64,
    all: u64,
    latencies: Histogram<u64>,
}

impl Schedule {
    fn new(rate: f64, times: Times) -> Self {
        let entries = |time: Duration| (rate * time.as_secs_f64()) as u64;
        Self {
            start: Moment::now(),
            period_ns: 1e9 / rate,
            warm_up: entries(times.warm_up),
            all: entries(times.warm_up + times.case),
            latencies: histogram(),
        }
    }

    fn due(&self, entry: u64) -> Moment {
        Moment(self.start.0 + (entry as f64 * self.period_ns) as u64)
    }

    fn run(mut self, session: &mut Session) -> Result<Histogram<u64>, Failure> {
        let entry = [7; ENTRY];
        let (mut added, mut acked) = (0, 0);
        let mut last_progress = Moment::now();
        while acked < self.all {
            let now = Moment::now();
            let due = ((now.since(self.start) as f64 / self.period_ns) as u64 + 1).min(self.all);
            let upto = due.min(added + BURST);
            while added < upto && session.producer.append(&entry)?.is_some() {
                added += 1;
            }
            let is_full = added < upto;
            if added == self.all && upto == due {
                session.producer.flush(Seq(added));
            }
            let seen = session.acks.acked()?.0;
            let now = Moment::now();
            if seen > acked {
                last_progress = now;
            } else if now.since(last_progress) > PATIENCE.as_nanos() as u64 {
                return Err("acknowledgements have stopped".into());
            }
            for entry in acked.max(self.warm_up)..seen {
                let late = now.since(self.due(entry));
                record(&mut self.latencies, late);
            }
            acked = acked.max(seen);
            let next = self.due(added).since(now);
            if is_full || (added == due && next > SHORT_NS) || added == self.all {
                let limit = if is_full || added == self.all {
                    1_000_000
                } else {
                    next
                };
                wait(
                    &session.acks,
                    (acked < added).then_some(Seq(acked + 1)),
                    limit,
                )?;
            } else if added == due {
                std::thread::yield_now();
            }
        }
        Ok(self.latencies)
    }
}

/// Sleeps until this is acknowledged or the time is over.
fn wait(acks: &Acks, upto: Option<Seq>, limit_ns: u64) -> Result<(), Failure> {
    if let Some(upto) = upto
        && acks.arm(upto)?
    {
        return Ok(());
    }
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: limit_ns.min(999_999_999) as i64,
    };
    let mut signal = [PollFd::new(acks, PollFlags::IN)];
    if poll(&mut signal, Some(&limit))? > 0 {
        acks.clear()?;
    }
    Ok(())
}
