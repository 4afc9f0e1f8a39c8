//! One failure under load, from a protected VM to a protected VM.

use std::time::Duration;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::cause::{Cause, Effect};
use super::strike::{Pair, heal, pass, stop_for, strike, undo};
use crate::Failure;
use crate::stage::takeover::{Redundancy, Takeover};
use crate::stage::{Client, SITES, SiteId, Stage, Status};
use crate::wire::{Handover, Watch};

/// How long the VM may take to be protected before a run, and the client to get its answers.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// For how long the client's usual silences are looked at before a failure.
const USUAL_OVER: Duration = Duration::from_secs(1);
/// Events of each host that are told when a run has failed.
const EVENTS_TOLD: usize = 20;

/// What a run is like.
#[derive(Debug, serde::Serialize)]
pub(super) struct Run {
    pub(super) number: usize,
    #[serde(serialize_with = "name")]
    pub(super) cause: Cause,
    /// The primary before.
    primary: String,
    /// At what moment it failed, where that can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Answers of the client so far, when it failed.
    answers_before: u64,
    /// How far the backup was behind then, in ms and in exits.
    lag_ms: f64,
    lag_exits: u64,
    /// Longest time in which the client got no answer at all in the second before, in ms.
    pub(super) usual_ms: f64,
    pub(super) takeover: Takeover,
    /// From the fault until the VM ran on another host, in ms.
    live_ms: Option<f64>,
    /// From the last frame of the old primary to the first of the new, in ms; none if nobody took over.
    silence_ms: Option<f64>,
    pub(super) redundancy: Redundancy,
}

fn name<S: serde::Serializer>(cause: &Cause, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(cause.name())
}

/// Everything that takes part.
pub(super) struct Scene<'a> {
    pub(super) stage: &'a mut Stage,
    pub(super) client: &'a Client,
    pub(super) watch: &'a Watch,
}

impl Scene<'_> {
    /// Waits for a random moment, lets it fail, and sees what becomes of it.
    pub(super) fn run(
        &mut self,
        number: usize,
        cause: Cause,
        rng: &mut ChaCha8Rng,
    ) -> Result<Run, Failure> {
        let pair = self.wait_for_pair()?;
        let answers = rng.random_range(5..40);
        let patience = self.stage.patience().clone();
        self.client
            .wait_for_answers(answers, &patience, READY_LIMIT)?;
        self.client.live().take_silences();
        pass(self.stage, USUAL_OVER)?;
        pass(self.stage, Duration::from_millis(rng.random_range(0..300)))?;
        let usual = self.client.live().take_silences().into_iter();
        let usual_ns = usual.map(|s| s.nanoseconds()).max().unwrap_or(0);
        self.client.live().take_gaps();
        // The epoch, too, of now: it grows when a quarantine ends.
        let Status { lag, epoch, .. } =
            patience.wait_for("the primary's status", READY_LIMIT, || {
                Ok(self.stage.status(pair.primary))
            })?;
        let answers_before = self.client.live().answers();
        let handovers = self.watch.handovers().len();
        let (fault, detail) = strike(self.stage, pair, cause, rng)?;
        if cause == Cause::StandbyKilledInTransfer {
            // Nobody is left to go on with until they are there again.
            heal(self.stage, self.watch, pair.primary)?;
        }
        let goes_on = |id: SiteId, status: &Status| match cause.effect() {
            Effect::Moves => id != pair.primary && status.epoch > epoch,
            Effect::Stays => id == pair.primary && status.epoch > epoch,
            Effect::Either => status.epoch > epoch,
            Effect::Mends => status.epoch >= epoch,
        };
        let takeover = Takeover::observe(self.stage, self.client, fault, goes_on)?;
        if cause.splits_the_pair() {
            self.wait_for_one_primary(takeover.to)?;
        }
        pass(self.stage, stop_for(rng))?;
        undo(self.stage, pair, cause)?;
        heal(self.stage, self.watch, takeover.to)?;
        let least = match cause.effect() {
            Effect::Mends => epoch,
            _ => epoch.map(|epoch| epoch + 1),
        };
        let redundancy = Redundancy::observe(self.stage, least, fault)?;
        self.check_client()?;
        let changes = self.watch.handovers();
        let silence_ms = changes.get(handovers).and_then(Handover::silence_ms);
        Ok(Run {
            number,
            cause,
            primary: pair.primary.to_string(),
            detail,
            answers_before,
            lag_ms: lag.ms,
            lag_exits: lag.exits,
            usual_ms: usual_ns as f64 / 1e6,
            live_ms: takeover.live_ms(),
            takeover,
            silence_ms,
            redundancy,
        })
    }

    fn wait_for_pair(&mut self) -> Result<Pair, Failure> {
        let (primary, status) = self.stage.wait_for_protection(None, READY_LIMIT)?;
        let backup = status.peer.as_deref().and_then(SiteId::named);
        let backup = backup.ok_or("a protected primary names no backup")?;
        let pair = Pair { primary, backup };
        // All three are of use: none is still giving up something older.
        heal(self.stage, self.watch, primary)?;
        Ok(pair)
    }

    /// The other host of a pair that is split has to give up by itself: nobody can tell it to.
    fn wait_for_one_primary(&mut self, one: SiteId) -> Result<(), Failure> {
        let patience = self.stage.patience().clone();
        patience.wait_until("the other host to give up", READY_LIMIT, || {
            self.stage.check_processes()?;
            let mut others = SITES.into_iter().filter(|id| *id != one);
            Ok(others.all(|id| {
                let status = self.stage.status(id);
                status.is_some_and(|status| status.role != "primary")
            }))
        })
    }

    fn check_client(&self) -> Result<(), Failure> {
        self.client.check()?;
        let live = self.client.live();
        if live.broken() > 0 || live.findings() != (0, 0) {
            return Err(format!("the client has found faults: {live}").into());
        }
        Ok(())
    }
}

/// What every host says, for a run that has failed.
pub(super) fn describe(stage: &Stage) -> String {
    let lines = SITES.map(|id| match stage.status(id) {
        Some(status) => {
            let events = stage.events(id).unwrap_or_default();
            let last: Vec<&str> = events.lines().rev().take(EVENTS_TOLD).collect();
            let last: String = last.into_iter().rev().map(|e| format!("  {e}\n")).collect();
            format!("host {id}: {status:?}\n{last}")
        }
        None => format!("host {id}: no answer\n"),
    });
    lines.concat()
}
