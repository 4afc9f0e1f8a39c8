//! A thread that beats: calls a prober at its interval and hands on each observation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use ebpf_events::{Key, KeyGeneration};
use rustix::thread::{ClockId, clock_nanosleep_absolute};

use crate::clock::{monotonic_ns, timespec};
use crate::observation::Observation;
use crate::prober::{Prober, ProberError};

enum Order {
    Key(KeyGeneration, Key),
    Epoch(u64),
}

/// A running prober; dropping it stops and joins the thread, within an interval.
#[derive(Debug)]
pub struct ProberThread {
    orders: Sender<Order>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ProberThread {
    /// Starts the thread. `sink` is called on it after every beat and must not block.
    ///
    /// The thread asks for SCHED_FIFO priority 1, then nice -20, and runs on as it is where neither
    /// is permitted: a prober that is starved concludes nothing, so this costs speed of detection,
    /// never correctness.
    ///
    /// # Errors
    /// [`ProberError::Thread`].
    pub fn spawn(
        prober: Prober,
        sink: impl FnMut(Observation) + Send + 'static,
    ) -> Result<Self, ProberError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (orders, taken) = channel();
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                crate::priority::raise();
                run(prober, &taken, &flag, sink);
            })
            .map_err(ProberError::Thread)?;
        Ok(Self {
            orders,
            stop,
            thread: Some(thread),
        })
    }

    /// Signs with a new key from the next beat on.
    pub fn set_key(&self, generation: KeyGeneration, key: Key) {
        self.order(Order::Key(generation, key));
    }

    /// Sends another epoch from the next beat on.
    pub fn set_epoch(&self, epoch: u64) {
        self.order(Order::Epoch(epoch));
    }

    fn order(&self, order: Order) {
        // The thread only ends when this is dropped, or by a panic in `sink`, which join reports.
        let _ = self.orders.send(order);
    }
}

impl Drop for ProberThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the heartbeat thread panicked");
        }
    }
}

fn run(
    mut prober: Prober,
    orders: &Receiver<Order>,
    stop: &AtomicBool,
    mut sink: impl FnMut(Observation),
) {
    let interval = u64::try_from(prober.interval().as_nanos()).unwrap_or(u64::MAX);
    let mut due = monotonic_ns();
    while !stop.load(Ordering::Acquire) {
        for order in orders.try_iter() {
            match order {
                Order::Key(generation, key) => prober.set_key(generation, key),
                Order::Epoch(epoch) => prober.set_epoch(epoch),
            }
        }
        sink(prober.beat());
        // Beats that were missed are not made up for: a burst would tell nothing new.
        due = next_beat(due, interval, monotonic_ns());
        // An early return by a signal makes one beat early.
        let _ = clock_nanosleep_absolute(ClockId::Monotonic, &timespec(due));
    }
}

/// The next beat after one that was due at `due`: on the same grid, unless that has passed.
fn next_beat(due: u64, interval: u64, now: u64) -> u64 {
    let next = due.saturating_add(interval);
    if next > now {
        next
    } else {
        now.saturating_add(interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_beat_is_followed_by_a_whole_interval_not_by_a_burst() {
        assert_eq!(next_beat(100, 10, 103), 110);
        assert_eq!(next_beat(100, 10, 110), 120);
        assert_eq!(next_beat(100, 10, 500), 510);
    }
}
