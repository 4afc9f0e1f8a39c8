//! Latency at a given rate: entries come by the clock, whether or not the ones before are acknowledged,
//! and each is timed from the moment at which it was due. Nothing is omitted while the channel stands.
//!
//! The rates are shares of what the same loop gets through the channel for as long when every entry is due
//! at once: what a loop gets that does less for each entry is more than this one can keep up. That is
//! measured right before each load: the machine's speed moves by more than the tenth that 90 % leave.

use std::time::Duration;

use format::Seq;
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_ftlog::config_space::Tuning;
use vhost_ftlog::daemon::options::Priority;
use vhost_ftlog::frontend::{Acks, Session};

use super::closed::with_consumer;
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

/// Latency at 10, 50 and 90 % of what the channel takes with batching, at the lowest of these rates also without; and
/// at such shares of what it takes without.
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
    for (setup, suffix) in [(batched, ""), (unbatched, "_unbatched")] {
        for percent in [10, 50, 90] {
            let most = load(world, times, setup, None)?.rate();
            series
                .value(&format!("open_loop_capacity{suffix}"), "1/s", most)
                .noted("entries of 1500 bytes, each due at once");
            let rate = most * f64::from(percent) / 100.0;
            let name = format!("ack_open_loop_{percent}{suffix}");
            load(world, times, setup, Some(rate))?.tell(&name, series);
            // More than a tenth is far more than it takes without.
            if suffix.is_empty() && percent == 10 {
                let name = format!("{name}_batching_off");
                load(world, times, unbatched, Some(rate))?.tell(&name, series);
            }
        }
    }
    Ok(())
}

fn load(world: &World, times: Times, setup: Setup, rate: Option<f64>) -> Result<Load, Failure> {
    let Pair {
        mut primary,
        backup,
    } = world.pair(setup)?;
    let session = &mut primary.session;
    let (load, ..) = with_consumer(world, backup, Priority::None, || {
        world.a.run(|| {
            // A timer is then late by what it takes to wake, not by the default slack of 50 us.
            rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
            Load::new(rate, times).run(session)
        })
    })?;
    Ok(load)
}

/// Entries that come by the clock.
struct Load {
    start: Moment,
    /// Between two entries; none where all are due at once.
    period_ns: f64,
    warm: Moment,
    end: Moment,
    added: u64,
    acked: u64,
    /// What was acknowledged when the warm-up was over, and when that was seen.
    acked_warm: Option<(u64, Moment)>,
    acked_end: (u64, Moment),
    latencies: Histogram<u64>,
}

impl Load {
    fn new(rate: Option<f64>, times: Times) -> Self {
        let start = Moment::now();
        let after = |time: Duration| Moment(start.0 + time.as_nanos() as u64);
        Self {
            start,
            period_ns: rate.map_or(0.0, |rate| 1e9 / rate),
            warm: after(times.warm_up),
            end: after(times.warm_up + times.case),
            added: 0,
            acked: 0,
            acked_warm: None,
            acked_end: (0, start),
            latencies: histogram(),
        }
    }

    fn tell(self, name: &str, series: &mut Series) {
        series.value(&format!("{name}_rate"), "1/s", self.rate());
        series.times(name, self.latencies);
    }

    /// Entries a second that were acknowledged in the time after the warm-up.
    fn rate(&self) -> f64 {
        let (acked, at) = self.acked_end;
        let (before, since) = self.acked_warm.unwrap_or((0, self.start));
        (acked - before) as f64 * 1e9 / at.since(since).max(1) as f64
    }

    fn due(&self, entry: u64) -> Moment {
        Moment(self.start.0 + (entry as f64 * self.period_ns) as u64)
    }

    /// How many entries are due now.
    fn count_due(&self, now: Moment) -> u64 {
        if self.period_ns == 0.0 {
            return if now < self.end { u64::MAX } else { self.added };
        }
        (now.min(self.end).since(self.start) as f64 / self.period_ns) as u64 + 1
    }

    fn run(mut self, session: &mut Session) -> Result<Self, Failure> {
        let entry = [7; ENTRY];
        let mut last_progress = Moment::now();
        loop {
            let now = Moment::now();
            let due = self.count_due(now);
            let upto = due.min(self.added + BURST);
            while self.added < upto && session.producer.append(&entry)?.is_some() {
                self.added += 1;
            }
            let is_full = self.added < upto;
            let is_last = now >= self.end && self.added == due;
            if is_last {
                session.producer.flush(Seq(self.added));
            }
            let seen = session.acks.acked()?.0;
            let now = Moment::now();
            if seen > self.acked {
                last_progress = now;
                self.take(seen, now);
            } else if now.since(last_progress) > PATIENCE.as_nanos() as u64 {
                return Err("acknowledgements have stopped".into());
            }
            if is_last && self.acked == self.added {
                return Ok(self);
            }
            self.rest(&session.acks, is_full || is_last, due, now)?;
        }
    }

    /// Entries below this are seen to be acknowledged.
    fn take(&mut self, seen: u64, now: Moment) {
        for entry in self.acked..seen {
            let due = self.due(entry);
            if due >= self.warm || self.period_ns == 0.0 {
                record(&mut self.latencies, now.since(due));
            }
        }
        self.acked = seen;
        if now >= self.warm && self.acked_warm.is_none() {
            self.acked_warm = Some((seen, now));
        }
        if now <= self.end {
            self.acked_end = (seen, now);
        }
    }

    /// Waits for what comes next, if that is worth it.
    fn rest(&self, acks: &Acks, blocked: bool, due: u64, now: Moment) -> Result<(), Failure> {
        let next = self.due(self.added).since(now);
        if blocked || (self.added == due && next > SHORT_NS) {
            let limit = if blocked { 1_000_000 } else { next };
            let oldest = (self.acked < self.added).then_some(Seq(self.acked + 1));
            wait(acks, oldest, limit)?;
        } else if self.added == due {
            std::thread::yield_now();
        }
        Ok(())
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
