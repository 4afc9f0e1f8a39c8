//! Pacing (R17): measures how far the backup's execution is behind, and what that costs the guest.
//!
//! Owner: the vCPU's thread. Lag is run time of the vCPU, not wall time: what a halted guest sleeps
//! the backup need not replay. The channel says how far the backup has replayed; the control of the
//! protocol says how long to hold. Three ways of standing: nobody follows or the standby still loads
//! (no hold), the standby catches up with what was logged meanwhile (the guest runs at half its speed
//! at the least: a transfer is no stop), and the backup follows (the control's limits are kept).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use format::{AckRecord, ExitNumber, Seq};
use ft::{AckTracker, LagControl, LagLimits, Mark, Pace, Time};
use vhost_ftlog::frontend::Acks;

use super::channel_log::LogPosition;

/// How often a guest that stands still is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// What pacing has found and done, for those who watch.
#[derive(Debug, Default)]
pub struct PacingState {
    lag_run_ns: AtomicU64,
    lag_exits: AtomicU64,
    lag_appends: AtomicU64,
    held_ns: AtomicU64,
    /// What the guest may run of its time, in parts per million, less a million.
    withheld_ppm: AtomicU64,
    most_run_ns: AtomicU64,
}

/// A look at [`PacingState`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PacingView {
    /// vCPU time that the backup has yet to run.
    pub lag_run: Duration,
    /// The most of it since the backup caught up.
    pub most_lag_run: Duration,
    /// Exits that it has yet to pass.
    pub lag_exits: u64,
    /// Appends that it has yet to replay.
    pub lag_appends: u64,
    /// Share of time that the guest may run, in parts per million.
    pub share_ppm: u32,
    /// How long the guest was held for it, all in all.
    pub held: Duration,
}

impl PacingState {
    /// How it stands.
    #[must_use]
    pub fn view(&self) -> PacingView {
        let ns = |word: &AtomicU64| Duration::from_nanos(word.load(Ordering::Relaxed));
        let withheld = self.withheld_ppm.load(Ordering::Relaxed).min(1_000_000) as u32;
        PacingView {
            lag_run: ns(&self.lag_run_ns),
            most_lag_run: ns(&self.most_run_ns),
            lag_exits: self.lag_exits.load(Ordering::Relaxed),
            lag_appends: self.lag_appends.load(Ordering::Relaxed),
            share_ppm: 1_000_000 - withheld,
            held: ns(&self.held_ns),
        }
    }

    pub(super) fn add_held(&self, time: Duration) {
        let held = self.held_ns.load(Ordering::Relaxed) + time.as_nanos() as u64;
        self.held_ns.store(held, Ordering::Relaxed);
    }

    fn clear(&self) {
        for word in [
            &self.lag_run_ns,
            &self.lag_exits,
            &self.lag_appends,
            &self.withheld_ppm,
            &self.most_run_ns,
        ] {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// Tells how far the replica of a session is: what it has received, and what it has replayed.
pub trait Replicated: Send {
    /// As last heard.
    fn progress(&self) -> AckRecord;
}

impl Replicated for Acks {
    fn progress(&self) -> AckRecord {
        let (received, replayed) = Acks::progress(self);
        AckRecord { received, replayed }
    }
}

/// A session that is followed.
struct Followed {
    replica: Box<dyn Replicated>,
    position: Arc<LogPosition>,
    acks: AckTracker,
    /// The replica has been close behind once.
    caught_up: bool,
}

/// The vCPU thread's side.
pub struct Pacer {
    control: LagControl,
    limits: LagLimits,
    followed: Option<Followed>,
    ran: Duration,
    state: Arc<PacingState>,
}

impl Pacer {
    /// A pacer that follows nobody.
    pub fn new(limits: LagLimits) -> Self {
        Self {
            control: LagControl::new(limits),
            limits,
            followed: None,
            ran: Duration::ZERO,
            state: Arc::default(),
        }
    }

    /// What others may look at.
    pub fn state(&self) -> Arc<PacingState> {
        Arc::clone(&self.state)
    }

    /// Other limits, from now on.
    pub fn set_limits(&mut self, limits: LagLimits) {
        self.limits = limits;
        self.control.set_limits(limits);
    }

    /// A log begins here, at `exit`.
    pub fn follow(&mut self, replica: Box<dyn Replicated>, position: Arc<LogPosition>, exit: u64) {
        let start = self.mark(Seq(0), exit, 0);
        self.followed = Some(Followed {
            replica,
            position,
            acks: AckTracker::new(start),
            caught_up: false,
        });
    }

    /// Nobody follows any more.
    pub fn unfollow(&mut self) {
        self.followed = None;
        self.control = LagControl::new(self.limits);
        self.state.clear();
    }

    /// Whether anybody follows.
    pub fn follows(&self) -> bool {
        self.followed.is_some()
    }

    /// Guest code that has run this long without an exit is to be kicked, so that it can be held.
    pub fn kick_after(&self) -> Option<Duration> {
        let held_back = self.follows() && self.control.share_ppm() < 1_000_000;
        held_back.then(|| self.control.kick_after())
    }

    fn mark(&self, next: Seq, exit: u64, now_ns: u64) -> Mark {
        Mark {
            next,
            exit: ExitNumber(exit),
            ran: self.ran,
            at: Time(now_ns),
        }
    }

    /// What to do at `exit`, before which the vCPU ran for `ran`.
    pub fn at_exit(&mut self, ran: Duration, exit: u64, now_ns: u64) -> Pace {
        self.ran += ran;
        let Some(position) = self
            .followed
            .as_ref()
            .map(|followed| followed.position.next())
        else {
            return Pace::Run;
        };
        let mark = self.mark(position, exit, now_ns);
        if let Some(followed) = &mut self.followed {
            followed.acks.appended(mark);
        }
        self.measure(now_ns);
        self.control.at_exit(ran)
    }

    /// Whether a guest that stands still may run again.
    pub fn may_run(&mut self, now_ns: u64) -> bool {
        self.measure(now_ns);
        self.control.share_ppm() > 0
    }

    fn measure(&mut self, now_ns: u64) {
        let Some(followed) = &mut self.followed else {
            return;
        };
        followed
            .acks
            .acked(Time(now_ns), followed.replica.progress());
        let lag = followed.acks.lag();
        let slow = self.limits.target + self.limits.span / 2;
        let loaded = followed.acks.record().replayed > Seq(0);
        followed.caught_up |= loaded && lag.run <= slow;
        self.control.measured(match (loaded, followed.caught_up) {
            (false, _) => Duration::ZERO,
            (true, false) => lag.run.min(slow),
            (true, true) => lag.run,
        });
        let run_ns = lag.run.as_nanos() as u64;
        let set = |word: &AtomicU64, value: u64| word.store(value, Ordering::Relaxed);
        set(&self.state.lag_run_ns, run_ns);
        set(&self.state.lag_exits, lag.exits);
        set(&self.state.lag_appends, lag.appends);
        set(
            &self.state.withheld_ppm,
            u64::from(1_000_000 - self.control.share_ppm()),
        );
        if followed.caught_up && run_ns > self.state.most_run_ns.load(Ordering::Relaxed) {
            set(&self.state.most_run_ns, run_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Replica(Arc<Mutex<AckRecord>>);

    impl Replica {
        fn at(&self, replayed: u64) {
            let at = Seq(replayed);
            *self.0.lock().unwrap() = AckRecord {
                received: at,
                replayed: at,
            };
        }
    }

    impl Replicated for Replica {
        fn progress(&self) -> AckRecord {
            *self.0.lock().unwrap()
        }
    }

    const MS: Duration = Duration::from_millis(1);

    /// A pacer that follows, its replica, and its log's position.
    fn following() -> (Pacer, Replica, Arc<LogPosition>) {
        let mut pacer = Pacer::new(LagLimits::default());
        let (replica, position) = (Replica::default(), Arc::<LogPosition>::default());
        pacer.follow(Box::new(replica.clone()), Arc::clone(&position), 0);
        (pacer, replica, position)
    }

    /// Runs `count` exits of 1 ms with one append each; gives the last pace.
    fn run(pacer: &mut Pacer, position: &LogPosition, count: u64) -> Pace {
        let mut pace = Pace::Run;
        for _ in 0..count {
            position.appended();
            pace = pacer.at_exit(MS, position.next().0, position.next().0);
        }
        pace
    }

    #[test]
    fn a_standby_that_loads_holds_nobody() {
        let (mut pacer, _, position) = following();
        assert_eq!(run(&mut pacer, &position, 5_000), Pace::Run);
        assert_eq!(pacer.kick_after(), None);
    }

    #[test]
    fn a_standby_that_catches_up_slows_the_guest_and_never_stops_it() {
        let (mut pacer, replica, position) = following();
        run(&mut pacer, &position, 2_000);
        replica.at(10);
        assert!(matches!(run(&mut pacer, &position, 10), Pace::Hold(_)));
        assert_eq!(pacer.state().view().share_ppm, 500_000);
        assert!(pacer.kick_after().is_some());
    }

    #[test]
    fn a_backup_that_stalls_stops_the_guest_until_it_moves() {
        let (mut pacer, replica, position) = following();
        run(&mut pacer, &position, 10);
        replica.at(10);
        assert_eq!(run(&mut pacer, &position, 20), Pace::Run);
        assert_eq!(run(&mut pacer, &position, 200), Pace::Stop);
        assert!(!pacer.may_run(0));
        assert!(pacer.state().view().lag_run >= 100 * MS);
        replica.at(position.next().0);
        assert!(pacer.may_run(0));
        assert_eq!(pacer.state().view().lag_run, Duration::ZERO);
    }

    #[test]
    fn an_end_of_the_session_lets_the_guest_run() {
        let (mut pacer, replica, position) = following();
        run(&mut pacer, &position, 10);
        replica.at(10);
        assert_eq!(run(&mut pacer, &position, 300), Pace::Stop);
        pacer.unfollow();
        assert!(pacer.may_run(0));
        assert_eq!(run(&mut pacer, &position, 10), Pace::Run);
        assert_eq!(pacer.state().view().lag_appends, 0);
    }
}
