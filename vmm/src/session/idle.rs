//! Whether the VM runs anywhere, as an idle standby knows it.
//!
//! A standby starts nothing. When both hosts of a pair were lost together somebody has to start the VM, and
//! whoever looks at a standby must be told so. So one without work reads the newest epoch's record now and then;
//! if that is not closed it asks the hosts that it names, and when none has said for a while that it holds the
//! VM, the status says what to do. This is for people only: nothing else depends on it.
//!
//! ```text
//! every LOOK_EVERY: record ── closed, or none ──> nothing to say
//!                     └─ open ──> hosts asked ── one holds the VM ──> nothing to say
//!                                             └─ none, twice in a row ──> advice
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arbiter::{Arbiter, ArbiterThread};
use ft::{
    ArbiterReply, ArbiterRequest, CallId, EpochRecord, HostId, Nonce, PeerMessage, RoleName, Tenure,
};

use super::driver::{Session, random};

/// Between two looks: no answer within this time is none.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// After so many looks in a row at which nobody had it, the VM is said to run nowhere.
const LOOKS: u32 = 2;

/// See the module.
pub struct Idle {
    arbiter: ArbiterThread,
    next: Instant,
    round: Option<Round>,
    /// Looks in a row at which nobody had the VM.
    absent: u32,
    advice: Option<String>,
}

/// A look: the record, and what its hosts say.
struct Round {
    record: EpochRecord,
    nonce: Nonce,
    /// Whether it holds the VM, of those that have answered.
    said: BTreeMap<HostId, Option<bool>>,
}

impl Idle {
    /// Asks this arbiter; `reply` is called on another thread with each answer.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn new(
        arbiter: impl Arbiter + 'static,
        mut reply: impl FnMut(ArbiterReply) + Send + 'static,
    ) -> std::io::Result<Self> {
        Ok(Self {
            arbiter: ArbiterThread::start(arbiter, move |_, answer| reply(answer))?,
            next: Instant::now() + LOOK_EVERY,
            round: None,
            absent: 0,
            advice: None,
        })
    }

    /// This host has work, or had a moment ago.
    pub fn is_busy(&mut self) {
        self.next = Instant::now() + LOOK_EVERY;
        (self.round, self.absent, self.advice) = (None, 0, None);
    }

    /// This host has no work: looks, if it is time to.
    pub fn turn(&mut self) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + LOOK_EVERY;
        if let Some(round) = self.round.take() {
            self.absent = if round.is_held() { 0 } else { self.absent + 1 };
            self.advice = (self.absent >= LOOKS).then(|| round.advice());
        }
        // One that hangs is asked once.
        let _ = self.arbiter.ask(CallId(0), ArbiterRequest::Newest);
    }

    /// The newest record; whom to ask, and how the question is named.
    pub fn record(&mut self, me: HostId, reply: ArbiterReply) -> Option<(Nonce, Vec<HostId>)> {
        let ArbiterReply::Newest(Some(record)) = reply else {
            return None;
        };
        let hosts = match record.tenure {
            Tenure::Closed => {
                (self.round, self.absent, self.advice) = (None, 0, None);
                return None;
            }
            Tenure::Alone => vec![record.owner],
            Tenure::Pair { backup, .. } => vec![record.owner, backup],
        };
        let nonce = Nonce(random().to_le_bytes());
        let said = hosts
            .iter()
            .map(|host| (*host, (*host == me).then_some(false)));
        self.round = Some(Round {
            record,
            nonce,
            said: said.collect(),
        });
        Some((
            nonce,
            hosts.into_iter().filter(|host| *host != me).collect(),
        ))
    }

    /// A host's answer. False if it is none to a question of this.
    pub fn answered(&mut self, from: HostId, nonce: Nonce, holds: bool) -> bool {
        match &mut self.round {
            Some(round) if round.nonce == nonce => {
                round.said.insert(from, Some(holds));
                true
            }
            _ => false,
        }
    }

    /// What an operator should do.
    pub fn advice(&self) -> Option<String> {
        self.advice.clone()
    }
}

impl Round {
    fn is_held(&self) -> bool {
        self.said.values().any(|said| *said == Some(true))
    }

    fn advice(&self) -> String {
        let said: Vec<String> = self
            .said
            .iter()
            .map(|(host, said)| match said {
                Some(_) => format!("{host} holds nothing of it"),
                None => format!("{host} does not answer"),
            })
            .collect();
        let hosts: Vec<&str> = self.said.keys().map(HostId::as_str).collect();
        format!(
            "the VM was not switched off in order in epoch {}, and nobody is known to run it: {}. A \
             standby starts nothing by itself. If it runs nowhere, start it with `pollux run --protect` \
             on {}: it boots from its disk, and what was in its memory is lost",
            self.record.epoch,
            said.join(", "),
            hosts.join(" or ")
        )
    }
}

impl Session {
    /// An empty standby looks whether the VM runs anywhere.
    pub(super) fn look_after_idle(&mut self) {
        let status = self.replica.status();
        if status.role == RoleName::Backup && status.peer.is_none() {
            self.idle.turn();
        } else {
            self.idle.is_busy();
        }
    }

    /// Asks the hosts of the newest record whether they hold the VM.
    pub(super) fn ask_holders(&mut self, reply: ArbiterReply) {
        let asked = self.idle.record(self.settings.ft.me, reply);
        for (nonce, host) in asked
            .into_iter()
            .flat_map(|(nonce, hosts)| hosts.into_iter().map(move |host| (nonce, host)))
        {
            let epoch = None;
            self.link
                .send(&host, &PeerMessage::StateQuery { nonce, epoch });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ft::Quarantine;

    struct NoArbiter;

    impl Arbiter for NoArbiter {
        fn answer(&mut self, _: CallId, _: ArbiterRequest) -> ArbiterReply {
            ArbiterReply::Newest(None)
        }
    }

    fn host(name: &str) -> HostId {
        name.parse().unwrap()
    }

    fn newest(tenure: Tenure) -> ArbiterReply {
        ArbiterReply::Newest(Some(EpochRecord {
            epoch: format::Epoch(7),
            nonce: Nonce::default(),
            owner: host("castor"),
            tenure,
            quarantine: Quarantine::default(),
        }))
    }

    /// A look after which `holds` is what castor says, if anything; pollux is this host.
    fn look(idle: &mut Idle, tenure: Tenure, holds: Option<bool>) {
        idle.next = Instant::now();
        idle.turn();
        if let Some((nonce, hosts)) = idle.record(host("pollux"), newest(tenure)) {
            assert_eq!(hosts, [host("castor")]);
            if let Some(holds) = holds {
                assert!(idle.answered(host("castor"), nonce, holds));
            }
            assert!(!idle.answered(host("castor"), Nonce([9; 16]), true));
        }
    }

    fn pair() -> Tenure {
        Tenure::Pair {
            backup: host("pollux"),
            session: format::SessionId::default(),
        }
    }

    #[test]
    fn a_vm_that_nobody_has_been_known_to_run_for_a_while_is_told_of() {
        let mut idle = Idle::new(NoArbiter, drop).unwrap();
        for holds in [Some(false), None, None] {
            assert_eq!(idle.advice(), None);
            look(&mut idle, pair(), holds);
        }
        let advice = idle.advice().unwrap();
        for part in [
            "epoch 7",
            "castor does not answer",
            "pollux run",
            "castor or pollux",
        ] {
            assert!(advice.contains(part), "{advice}");
        }
        idle.is_busy();
        assert_eq!(idle.advice(), None);
    }

    #[test]
    fn a_vm_that_runs_or_was_switched_off_is_not_told_of() {
        let mut idle = Idle::new(NoArbiter, drop).unwrap();
        for tenure in [pair(), Tenure::Alone] {
            for _ in 0..4 {
                look(&mut idle, tenure, Some(true));
                assert_eq!(idle.advice(), None);
            }
        }
        for _ in 0..4 {
            look(&mut idle, Tenure::Closed, None);
            assert_eq!(idle.advice(), None);
        }
    }
}
