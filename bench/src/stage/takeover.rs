//! What becomes of the VM when something fails: who goes on, how long the client waited, and when there are
//! two of it again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::api::Part;
use super::{Client, SiteId, Stage, Status};
use crate::Failure;
use crate::monotonic::Moment;

/// How long it may take until a host goes on. Far more than any does: running out means that none will.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(60);
/// The same for the client's connections to be answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The same for the VM to be redundant again.
const PROTECTION_LIMIT: Duration = Duration::from_secs(120);

/// The moment of a fault, on the clocks of client and VMMs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) at: Moment,
    unix_ms: u64,
}

impl Fault {
    /// Now.
    pub(crate) fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            at: Moment::now(),
            unix_ms: unix.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(0)),
        }
    }
}

/// Who is primary after a fault, and what the client saw of it.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Takeover {
    /// The host that goes on.
    #[serde(serialize_with = "as_text")]
    pub(crate) to: SiteId,
    /// Longest time in which the client got no answer at all, in ms.
    pub(crate) pause_ms: f64,
    /// Longest time in which one of its connections waited for an answer, in ms: with the guest's own
    /// time for an answer, while others are asked for too.
    pub(crate) wait_ms: f64,
    /// From the fault until it was noticed, in ms by the wall clock; not known if nobody took over.
    pub(crate) noticed_ms: Option<f64>,
    /// The parts after that.
    pub(crate) timeline: Vec<Part>,
    /// Why, as the new primary has it.
    pub(crate) cause: Option<String>,
}

/// A VM that is redundant again.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Redundancy {
    /// From the fault, in ms.
    pub(crate) after_ms: f64,
    /// For how long the VM stood still for it, in ms.
    pub(crate) stop_ms: Option<f64>,
    /// How long the state was on its way, in ms.
    pub(crate) transfer_ms: Option<f64>,
    /// The host of the new backup.
    pub(crate) backup: Option<String>,
    /// Replicas that went another way than the primary, as it has seen since it was started.
    pub(crate) divergences: u64,
}

fn as_text<S: serde::Serializer>(id: &SiteId, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(id)
}

impl Takeover {
    /// Waits until a primary is as it is `wanted`, and every connection of the client has been answered
    /// after that.
    pub(crate) fn observe(
        stage: &mut Stage,
        client: &Client,
        fault: Fault,
        wanted: impl Fn(SiteId, &Status) -> bool,
    ) -> Result<Self, Failure> {
        let (to, status) = stage.wait_for_status("a primary", TAKEOVER_LIMIT, wanted)?;
        let live = Moment::now();
        let patience = stage.patience().clone();
        patience.wait_until("an answer on every connection", ANSWER_LIMIT, || {
            client.check()?;
            stage.check_processes()?;
            Ok(client.live().all_answered() > live)
        })?;
        let longest = |of: &mut dyn Iterator<Item = (Moment, Moment)>| {
            let around = of.filter(|(from, to)| *to > fault.at && *from < live);
            around.map(|(from, to)| to.since(from)).max().unwrap_or(0) as f64 / 1e6
        };
        let (silences, gaps) = (client.live().take_silences(), client.live().take_gaps());
        let mut takeover = Self {
            to,
            pause_ms: longest(&mut silences.iter().map(|s| (s.from, s.to))),
            wait_ms: longest(&mut gaps.iter().map(|g| (g.from, g.to))),
            noticed_ms: None,
            timeline: Vec::new(),
            cause: None,
        };
        takeover.add_timeline(&status, fault);
        Ok(takeover)
    }

    /// From the fault until the VM ran on the new primary, in ms; not known if nobody took over.
    pub(crate) fn live_ms(&self) -> Option<f64> {
        Some(self.noticed_ms? + self.timeline.last()?.ms)
    }

    /// Takes the parts from what the new primary says, if it says it of this fault.
    fn add_timeline(&mut self, status: &Status, fault: Fault) {
        let Some(said) = &status.last_failover else {
            return;
        };
        // Of this fault, and of none before it.
        if let Some(noticed) = said.at_unix_ms.checked_sub(fault.unix_ms) {
            self.noticed_ms = Some(noticed as f64);
            self.cause = Some(said.cause.clone());
            self.timeline.clone_from(&said.timeline);
        }
    }
}

impl Redundancy {
    /// Waits until the VM is protected, in an epoch from `epoch` on.
    pub(crate) fn observe(
        stage: &mut Stage,
        epoch: Option<u64>,
        fault: Fault,
    ) -> Result<Self, Failure> {
        let (_, status) = stage.wait_for_protection(epoch, PROTECTION_LIMIT)?;
        let transfer = status.last_transfer.as_ref();
        Ok(Self {
            after_ms: Moment::now().since(fault.at) as f64 / 1e6,
            stop_ms: transfer.map(|t| t.stop_ms),
            transfer_ms: transfer.map(|t| t.total_ms),
            backup: status.peer,
            divergences: status.divergences,
        })
    }
}
