//! What makes a host's requests wait.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    is_cut: bool,
    hold: Duration,
    /// Writes that wait to land.
    held: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cut(&self) {
        self.lock().is_cut = true;
    }

    pub(super) fn mend(&self) {
        self.lock().is_cut = false;
        self.changed.notify_all();
    }

    pub(super) fn hold_writes(&self, time: Duration) {
        self.lock().hold = time;
    }

    pub(super) fn held(&self) -> usize {
        self.lock().held
    }

    /// Does it at once, or on a thread of its own when the storage is there again.
    pub(super) fn pass(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        self.after(Duration::ZERO, job);
    }

    /// The same for a write, which may be held.
    pub(super) fn pass_write(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        let hold = self.lock().hold;
        self.after(hold, job);
    }

    fn after(self: &Arc<Self>, hold: Duration, job: impl FnOnce() + Send + 'static) {
        if hold.is_zero() && !self.lock().is_cut {
            return job();
        }
        self.lock().held += 1;
        let gate = Arc::clone(self);
        std::thread::spawn(move || {
            gate.wait(hold);
            job();
            gate.lock().held -= 1;
        });
    }

    fn wait(&self, hold: Duration) {
        let until = Instant::now() + hold;
        let mut state = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !state.is_cut && left.is_zero() {
                return;
            }
            state = if left.is_zero() {
                self.changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let waited = self.changed.wait_timeout(state, left);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn requests_wait_while_the_storage_is_cut_off_and_are_done_then() {
        let gate = Arc::new(Gate::default());
        let (done, is_done) = mpsc::channel();
        gate.cut();
        let sender = done.clone();
        gate.pass(move || sender.send(1).unwrap());
        assert_eq!((is_done.try_recv().ok(), gate.held()), (None, 1));
        gate.mend();
        assert_eq!(is_done.recv().unwrap(), 1);
        gate.pass(move || done.send(2).unwrap());
        assert_eq!(is_done.try_recv().unwrap(), 2);
    }

    #[test]
    fn writes_that_are_held_land_later_than_those_after_them() {
        let gate = Arc::new(Gate::default());
        let (done, is_done) = mpsc::channel();
        gate.hold_writes(Duration::from_millis(20));
        let sender = done.clone();
        gate.pass_write(move || sender.send("held").unwrap());
        gate.hold_writes(Duration::ZERO);
        gate.pass_write(move || done.send("not held").unwrap());
        let order = [is_done.recv().unwrap(), is_done.recv().unwrap()];
        assert_eq!(order, ["not held", "held"]);
    }
}
