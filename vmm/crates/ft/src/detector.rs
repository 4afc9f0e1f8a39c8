//! Decides that the peer is lost (R12). It is allowed to be wrong: safety never depends on it, only
//! the length of a pause and needless failovers do.
//!
//! Owner: the machine of the session. Five ways to be lost, each with its own time-out:
//! - the **host** is silent: no reply to probes, no traffic, for `host_silent`. Replies are made in
//!   the peer's kernel, so a starved host is not a dead one. Only time during which this prober ran
//!   itself counts, and several probes must have gone unanswered.
//! - the host answers, but the **VMM's progress** counter stands still over `vmm_still`. Both ends of
//!   that span are times of replies as the kernel received them: a prober that reads late measures
//!   right.
//! - the peer's kernel or its daemon says that the **VMM is dead**.
//! - an **acknowledgement** that is owed makes no progress for `ack_overdue`;
//! - **replay** that is behind makes no progress for twice as long: the replica may have much to run for one
//!   entry.
//!
//! Both count only while this side runs: what came while it did not may not have been looked at yet.
//!
//! It reads no clock and sends nothing: [`FailureDetector::due_probe`] says when a probe is to be
//! sent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::Time;

/// The time-outs of a detector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorConfig {
    /// Distance between probes.
    pub probe_every: Duration,
    /// T_host: silence after which a host is lost.
    pub host_silent: Duration,
    /// Probes in a row without an answer that it takes as well.
    pub unanswered: u32,
    /// T_vmm: how long the VMM's progress counter may stand still.
    pub vmm_still: Duration,
    /// T_ack: how long an owed acknowledgement may make no progress.
    pub ack_overdue: Duration,
    /// How long to wait for the daemon's `End` once the kernel says that the VMM is dead.
    pub end_wait: Duration,
}

impl Default for DetectorConfig {
    fn default() -> Self {
        Self {
            probe_every: Duration::from_millis(20),
            host_silent: Duration::from_millis(200),
            unanswered: 4,
            vmm_still: Duration::from_secs(1),
            ack_overdue: Duration::from_secs(1),
            end_wait: Duration::from_millis(20),
        }
    }
}

/// What a reply says about the VMM on the peer's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmSign {
    /// It runs; its event loop has ticked this often.
    Progress(u64),
    /// Its process is gone.
    Dead,
}

/// An answer to a probe, as the local kernel received it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeartbeatReply {
    /// The probe that it answers.
    pub probe: u64,
    /// When the local kernel received it.
    pub received_at: Time,
    /// The VMM on that host.
    pub vmm: VmmSign,
    /// How often the channel daemon on that host has ticked, where it says so.
    pub daemon: Option<u64>,
}

/// Why a peer is taken for lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Nothing from its host.
    HostSilent,
    /// Its host answers, its VMM does not move.
    VmmStill,
    /// Its VMM died.
    VmmDead,
    /// An acknowledgement is overdue.
    AckOverdue,
    /// It has the log, and does not replay it.
    ReplayOverdue,
    /// It diverged.
    Diverged,
    /// It gave the session up itself.
    GaveUp,
    /// It asked to be relieved: an orderly switch-over, or its storage is gone.
    Relieved,
    /// This side did not run for so long that the peer may have given it up.
    OwnPause,
    /// An operator ended it.
    Operator,
}

/// What a peer owes, and since when it has made no progress with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owed {
    /// An acknowledgement.
    pub ack: Option<Time>,
    /// Replay of what it has, or has on its way.
    pub replay: Option<Time>,
}

/// Watches one peer of one session.
#[derive(Debug)]
pub struct FailureDetector {
    config: DetectorConfig,
    ticked_at: Time,
    /// Since when this side has run without a pause.
    ran_since: Time,
    silent: Duration,
    unanswered: u32,
    sent: u64,
    probe_at: Time,
    still: Option<Still>,
    dead_at: Option<Time>,
    ended: bool,
    daemon: Option<u64>,
}

/// A run of replies with the same progress.
#[derive(Debug, Clone, Copy)]
struct Still {
    progress: u64,
    probe: u64,
    first_at: Time,
    last_at: Time,
    replies: u32,
}

impl FailureDetector {
    /// Starts to watch: the peer has just been heard.
    #[must_use]
    pub fn new(config: DetectorConfig, now: Time) -> Self {
        Self {
            config,
            ticked_at: now,
            ran_since: now,
            silent: Duration::ZERO,
            unanswered: 0,
            sent: 0,
            probe_at: now,
            still: None,
            dead_at: None,
            ended: false,
            daemon: None,
        }
    }

    /// Time went on. A span longer than two probe distances means that this side did not run, and
    /// counts as two.
    pub fn tick(&mut self, now: Time) {
        let (span, most) = (now.since(self.ticked_at), 2 * self.config.probe_every);
        if span > most {
            self.ran_since = now;
        }
        let span = span.min(most);
        self.ticked_at = self.ticked_at.max(now);
        self.silent += span;
    }

    /// The number of the probe that is to be sent now, if one is.
    pub fn due_probe(&mut self, now: Time) -> Option<u64> {
        if now < self.probe_at {
            return None;
        }
        self.probe_at = now.after(self.config.probe_every);
        self.sent += 1;
        self.unanswered = self.unanswered.saturating_add(1);
        Some(self.sent)
    }

    /// A reply came. One to a probe that was never sent changes nothing.
    pub fn replied(&mut self, reply: HeartbeatReply) {
        if reply.probe == 0 || reply.probe > self.sent {
            return;
        }
        self.heard();
        self.daemon = reply.daemon.or(self.daemon);
        match reply.vmm {
            VmmSign::Dead => {
                self.dead_at.get_or_insert(reply.received_at);
            }
            VmmSign::Progress(progress) => self.progressed(progress, reply),
        }
    }

    fn progressed(&mut self, progress: u64, reply: HeartbeatReply) {
        match &mut self.still {
            // Overtaken on the way: it tells nothing about now.
            Some(still) if reply.probe <= still.probe => {}
            Some(still) if still.progress == progress => {
                still.probe = reply.probe;
                still.last_at = still.last_at.max(reply.received_at);
                still.replies = still.replies.saturating_add(1);
            }
            _ => {
                self.still = Some(Still {
                    progress,
                    probe: reply.probe,
                    first_at: reply.received_at,
                    last_at: reply.received_at,
                    replies: 1,
                });
            }
        }
    }

    /// Something else came from the peer's host.
    pub fn heard(&mut self) {
        self.silent = Duration::ZERO;
        self.unanswered = 0;
    }

    /// The peer's daemon says that its VMM is dead, and everything it had is delivered.
    pub fn ended(&mut self) {
        self.ended = true;
    }

    /// Why the peer is lost, if it is. Only who waits for acknowledgements is owed anything.
    #[must_use]
    pub fn verdict(&self, now: Time, owed: Owed) -> Option<Cause> {
        let config = &self.config;
        let died = self
            .dead_at
            .is_some_and(|at| now.since(at) >= config.end_wait);
        if self.ended || died {
            return Some(Cause::VmmDead);
        }
        if self.silent >= config.host_silent && self.unanswered >= config.unanswered {
            return Some(Cause::HostSilent);
        }
        let still = |still: Still| {
            still.replies >= config.unanswered
                && still.last_at.since(still.first_at) >= config.vmm_still
        };
        if self.still.is_some_and(still) {
            return Some(Cause::VmmStill);
        }
        let overdue = |since: Option<Time>, limit: Duration| {
            since.is_some_and(|since| now.since(since.max(self.ran_since)) >= limit)
        };
        if overdue(owed.ack, config.ack_overdue) {
            return Some(Cause::AckOverdue);
        }
        overdue(owed.replay, 2 * config.ack_overdue).then_some(Cause::ReplayOverdue)
    }

    /// When to call [`FailureDetector::tick`] and [`FailureDetector::due_probe`] at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Time {
        match self.dead_at {
            Some(at) => self.probe_at.min(at.after(self.config.end_wait)),
            None => self.probe_at,
        }
    }

    /// How long nothing has been heard, as far as this side ran.
    #[must_use]
    pub fn silent(&self) -> Duration {
        self.silent
    }

    /// The channel daemon's progress on the peer's host, as it was last told.
    #[must_use]
    pub fn daemon_progress(&self) -> Option<u64> {
        self.daemon
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn an_acknowledgement_is_not_overdue_for_the_time_that_this_side_did_not_run() {
        let config = DetectorConfig::default();
        let overdue = config.ack_overdue.as_nanos() as u64;
        let mut detector = FailureDetector::new(config, Time(0));
        detector.heard();
        detector.tick(Time(MS));
        let owed = Owed {
            ack: Some(Time(MS)),
            replay: None,
        };
        let woken = 2 * overdue;
        detector.tick(Time(woken));
        assert_eq!(detector.verdict(Time(woken), owed), None);
        let mut now = woken;
        while now < woken + overdue {
            now += MS;
            detector.tick(Time(now));
            detector.heard();
        }
        assert_eq!(
            detector.verdict(Time(now), owed),
            Some(Cause::AckOverdue),
            "from then on it counts"
        );
    }

    struct Run {
        detector: FailureDetector,
        now: u64,
    }

    impl Run {
        fn new() -> Self {
            Self {
                detector: FailureDetector::new(DetectorConfig::default(), Time(0)),
                now: 0,
            }
        }

        /// Moves on to `until_ms` in steps of `step_ms`; each probe is answered by `reply`.
        fn run(
            &mut self,
            step_ms: u64,
            until_ms: u64,
            mut reply: impl FnMut(u64) -> Option<VmmSign>,
        ) -> Option<(u64, Cause)> {
            while self.now < until_ms * MS {
                self.now += step_ms * MS;
                self.detector.tick(Time(self.now));
                if let Some(probe) = self.detector.due_probe(Time(self.now))
                    && let Some(vmm) = reply(self.now / MS)
                {
                    self.detector.replied(HeartbeatReply {
                        probe,
                        received_at: Time(self.now),
                        vmm,
                        daemon: None,
                    });
                }
                if let Some(cause) = self.detector.verdict(Time(self.now), Owed::default()) {
                    return Some((self.now / MS, cause));
                }
            }
            None
        }
    }

    #[test]
    fn silence_of_the_host_counts_from_the_last_sign() {
        let mut run = Run::new();
        assert_eq!(run.run(5, 1000, |ms| Some(VmmSign::Progress(ms))), None);
        let (at, cause) = run.run(5, 3000, |_| None).unwrap();
        assert_eq!(cause, Cause::HostSilent);
        assert!((1180..=1220).contains(&at), "{at}");
    }

    #[test]
    fn traffic_is_a_sign_of_life_too() {
        let mut run = Run::new();
        for until in (100..3000).step_by(100) {
            assert_eq!(run.run(10, until, |_| None), None);
            run.detector.heard();
        }
    }

    #[test]
    fn a_prober_that_did_not_run_counts_no_silence() {
        let mut run = Run::new();
        run.run(10, 100, |ms| Some(VmmSign::Progress(ms)));
        // Wakes once a second only: 40 ms of silence count each time, so does one probe.
        assert_eq!(run.run(1000, 4100, |_| None), None);
        assert!(run.run(1000, 9000, |_| None).is_some());
    }

    #[test]
    fn a_starved_peer_that_its_kernel_answers_for_is_not_lost() {
        // The VMM's loop gets on the CPU every 700 ms only.
        let mut run = Run::new();
        let verdict = run.run(10, 60_000, |ms| Some(VmmSign::Progress(ms / 700)));
        assert_eq!(verdict, None);
    }

    #[test]
    fn a_stopped_vmm_is_told_from_a_dead_host() {
        let mut run = Run::new();
        run.run(10, 500, |ms| Some(VmmSign::Progress(ms)));
        let (at, cause) = run.run(10, 5000, |_| Some(VmmSign::Progress(7))).unwrap();
        assert_eq!(cause, Cause::VmmStill);
        assert!((1500..=1540).contains(&at), "{at}");
    }

    #[test]
    fn a_late_reader_measures_stillness_by_the_times_of_the_kernel() {
        let mut detector = FailureDetector::new(DetectorConfig::default(), Time(0));
        for ms in (0..100).step_by(20) {
            let probe = detector.due_probe(Time(ms * MS)).unwrap();
            detector.replied(HeartbeatReply {
                probe,
                received_at: Time(ms * MS),
                vmm: VmmSign::Progress(1),
                daemon: None,
            });
        }
        detector.tick(Time(5000 * MS));
        assert_eq!(detector.verdict(Time(5000 * MS), Owed::default()), None);
    }

    #[test]
    fn a_dead_vmm_is_given_time_for_its_end_and_an_end_is_acted_on_at_once() {
        let mut run = Run::new();
        run.run(5, 100, |ms| Some(VmmSign::Progress(ms)));
        let (at, cause) = run.run(5, 500, |_| Some(VmmSign::Dead)).unwrap();
        assert_eq!(cause, Cause::VmmDead);
        assert!((120..=145).contains(&at), "{at}");
        let mut run = Run::new();
        run.detector.ended();
        assert_eq!(
            run.detector.verdict(Time(0), Owed::default()),
            Some(Cause::VmmDead)
        );
    }

    #[test]
    fn an_overdue_acknowledgement_counts_on_the_side_that_is_owed_one() {
        let detector = FailureDetector::new(DetectorConfig::default(), Time(0));
        let ack = Owed {
            ack: Some(Time(0)),
            replay: None,
        };
        assert_eq!(detector.verdict(Time(999 * MS), ack), None);
        assert_eq!(
            detector.verdict(Time(1000 * MS), ack),
            Some(Cause::AckOverdue)
        );
    }

    #[test]
    fn replay_that_does_not_move_has_twice_as_long() {
        let detector = FailureDetector::new(DetectorConfig::default(), Time(0));
        let replay = Owed {
            ack: None,
            replay: Some(Time(0)),
        };
        assert_eq!(detector.verdict(Time(1999 * MS), replay), None);
        assert_eq!(
            detector.verdict(Time(2000 * MS), replay),
            Some(Cause::ReplayOverdue)
        );
    }

    #[test]
    fn a_reply_to_a_probe_never_sent_changes_nothing() {
        let mut run = Run::new();
        run.run(10, 190, |_| None);
        run.detector.replied(HeartbeatReply {
            probe: 99,
            received_at: Time(run.now),
            vmm: VmmSign::Progress(1),
            daemon: None,
        });
        assert!(run.run(10, 400, |_| None).is_some());
    }
}
