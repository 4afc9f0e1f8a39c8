//! `pollux-bench demo`: a VM that outlives its host, twice, while a client checks every answer.
//!
//! The guest's Redis server is written to and read over TCP connections that are opened once. The host of the
//! primary is lost (its cables pulled, every process on it killed), the VM goes on on the backup's host and
//! becomes redundant again on the third; the first host comes back empty, and then the second is lost too.
//! `scripts/demo` prepares what this needs.

mod page;
mod summary;

use std::time::Duration;

use crate::Failure;
use crate::kv_check;
use crate::report::Report;
use crate::stage::takeover::{Fault, Redundancy, Takeover};
use crate::stage::{
    Client, GUEST_REDIS, Interrupt, Patience, SITES, SiteId, Stage, StageOptions, Start,
};
use crate::wire::{Handover, Watch};

use summary::{Loss, Summary};

/// How long the VM may take to be protected for the first time, its boot included.
const FIRST_LIMIT: Duration = Duration::from_secs(300);
/// The same for the Redis server in it.
const SERVER_LIMIT: Duration = Duration::from_secs(120);
/// And for a number of answers.
const ANSWERS_LIMIT: Duration = Duration::from_secs(120);

/// What to show.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// Connections of the client.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    /// Answers to wait for before and after each loss.
    #[arg(long, default_value_t = 400)]
    answers: u64,
}

/// Shows it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let mut show = Show::open(options, &interrupt)?;
    let client = show.connect()?;
    let losses = vec![show.lose_primary(&client)?, show.lose_primary(&client)?];
    say("the client stops; all answers are checked");
    let outcome = client.finish()?;
    let wire = show.watch.finish()?;
    let summary = Summary {
        outcome,
        wire,
        losses,
    };
    summary.report(report);
    Ok(())
}

/// The first epoch after this one.
fn next(epoch: Option<u64>) -> Option<u64> {
    epoch.map(|epoch| epoch + 1)
}

fn say(what: &str) {
    eprintln!("demo: {what}");
}

struct Show<'a> {
    options: &'a Options,
    // Before the stage, so that it is dropped before what it watches.
    watch: Watch,
    stage: Stage,
    patience: Patience,
}

impl<'a> Show<'a> {
    /// Three hosts, a protected VM on the first of them.
    fn open(options: &'a Options, interrupt: &Interrupt) -> Result<Self, Failure> {
        say("three hosts (a, b, c), a client, a network for it and one for the log");
        let mut stage = Stage::new(&options.stage, interrupt)?;
        let watch = Watch::start(&stage)?;
        let patience = stage.patience().clone();
        let start = Start::prepare(&options.stage, &patience)?;
        let [a, b, c] = SITES;
        stage.start_standby(b)?;
        stage.start_standby(c)?;
        say(match start.snapshot() {
            Some(_) => "host a: the guest goes on from its snapshot, protected",
            None => "host a: the guest boots, protected",
        });
        stage.start_primary(a, &start)?;
        let (_, status) = stage.wait_for_protection(None, FIRST_LIMIT)?;
        let backup = status.peer.unwrap_or_default();
        say(&format!("protected: primary on a, backup on {backup}"));
        Ok(Self {
            options,
            watch,
            stage,
            patience,
        })
    }

    /// A client at work.
    fn connect(&mut self) -> Result<Client, Failure> {
        let host = self.stage.client();
        Client::wait_for_server(host, &self.patience, SERVER_LIMIT)?;
        let connections = self.options.connections;
        say(&format!(
            "the client opens {connections} connections to redis at {GUEST_REDIS} and checks every answer"
        ));
        let options = kv_check::Options {
            connections,
            seconds: 24.0 * 3600.0,
            ..kv_check::Options::new(GUEST_REDIS)
        };
        let client = Client::start(host, options);
        self.wait_for_answers(&client)?;
        Ok(client)
    }

    fn wait_for_answers(&mut self, client: &Client) -> Result<(), Failure> {
        client.wait_for_answers(self.options.answers, &self.patience, ANSWERS_LIMIT)?;
        self.stage.check_processes()?;
        say(&page::standing(client.live()));
        Ok(())
    }

    /// The host of the primary is lost; later it is there again, as an empty standby.
    fn lose_primary(&mut self, client: &Client) -> Result<Loss, Failure> {
        let (old, status) = self.stage.wait_for_protection(None, ANSWERS_LIMIT)?;
        let backup = status.peer.as_deref().unwrap_or("?");
        say(&format!(
            "HOST {old} IS LOST (primary; backup on {backup}): cables pulled, all processes killed"
        ));
        client.live().take_gaps();
        let fault = Fault::now();
        self.stage.crash(old)?;
        let takeover = Takeover::observe(&mut self.stage, client, fault, |id, now| {
            id != old && now.epoch > status.epoch
        })?;
        say(&format!(
            "the VM goes on on {}; the client got no answer for {:.0} ms, and goes on on the same connections",
            takeover.to, takeover.pause_ms
        ));
        let silence_ms = self.watch.handovers().last().and_then(Handover::silence_ms);
        let redundancy = Redundancy::observe(&mut self.stage, next(status.epoch), fault)?;
        let on = redundancy.backup.as_deref().unwrap_or("?");
        say(&format!(
            "redundant again, with {on}, {:.1} s after the loss",
            redundancy.after_ms / 1e3
        ));
        self.wait_for_answers(client)?;
        self.revive(old)?;
        Ok(Loss {
            of: old,
            takeover,
            silence_ms,
            redundancy,
        })
    }

    fn revive(&mut self, id: SiteId) -> Result<(), Failure> {
        self.stage.repair(id)?;
        self.watch.readmit(id);
        self.stage.start_standby(id)?;
        say(&format!("host {id} is there again, as an empty standby"));
        Ok(())
    }
}
