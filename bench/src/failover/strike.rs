//! Makes things fail, and makes them whole again.

use std::time::Duration;

use rand::RngExt;
use rustix::process::Signal;

use super::cause::Cause;
use crate::Failure;
use crate::monotonic::Moment;
use crate::stage::takeover::Fault;
use crate::stage::{SITES, SiteId, Stage};
use crate::storage::Storage;
use crate::wire::Watch;

/// File name of the channel's daemon.
const CHANNEL: &str = "vhost-ftlog";
/// How long a VMM may take to begin a transfer of state.
const TRANSFER_LIMIT: Duration = Duration::from_secs(60);
/// After so long a daemon that was killed is gone.
const CHANNEL_GONE: Duration = Duration::from_millis(200);
/// How long writes are held, in ms: longer than it takes to go on elsewhere.
const HELD_MS: std::ops::Range<u64> = 1500..4000;
/// How long the storage is out of reach, in ms.
const UNREACHABLE_MS: std::ops::Range<u64> = 2000..5000;
/// How long a guest under load may take to write something.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// How long the channel's daemon may take to be replaced.
const CHANNEL_LIMIT: Duration = Duration::from_secs(30);
/// Within so many ms from its beginning a transfer is disturbed: it takes about as long.
const TRANSFER_TAKES_MS: u64 = 250;
/// How long a VMM that has lost may take to give up.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(60);

/// Who does what before the failure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) primary: SiteId,
    pub(super) backup: SiteId,
}

impl Pair {
    fn third(self) -> SiteId {
        let rest = SITES
            .into_iter()
            .find(|id| *id != self.primary && *id != self.backup);
        rest.expect("three hosts, of which two are the pair")
    }
}

/// Lets it fail. The moment is that before the (first) failure; with it, in words, when that was.
pub(super) fn strike(
    stage: &mut Stage,
    pair: Pair,
    cause: Cause,
    rng: &mut impl rand::Rng,
) -> Result<(Fault, Option<String>), Failure> {
    let Pair { primary, backup } = pair;
    let mut detail = None;
    if matches!(cause, Cause::VmmKilledWriting | Cause::VmmStoppedWriting) {
        let (held, time) = hold_writes(stage, primary, rng)?;
        detail = Some(format!("{held} writes held for {} ms", time.as_millis()));
    }
    let fault = Fault::now();
    match cause {
        Cause::VmmKilled => kill_vmm(stage, primary)?,
        Cause::ChannelKilled => {
            channel(stage, primary, Signal::KILL)?;
            wait_for_channel(stage, primary)?;
        }
        Cause::VmmAndChannelKilled => {
            kill_vmm(stage, primary)?;
            channel(stage, primary, Signal::KILL)?;
        }
        Cause::VmmAndBackupChannelKilled => {
            kill_vmm(stage, primary)?;
            channel(stage, backup, Signal::KILL)?;
        }
        Cause::BackupKilled => kill_vmm(stage, backup)?,
        Cause::StandbyKilledInTransfer => {
            kill_vmm(stage, backup)?;
            wait_for_transfer(stage, pair)?;
            std::thread::sleep(Duration::from_millis(
                rng.random_range(0..TRANSFER_TAKES_MS),
            ));
            detail = stage.status(primary).map(|status| status.state);
            kill_vmm(stage, pair.third())?;
        }
        Cause::LinkCut => stage.site(primary).wire().cut()?,
        Cause::HostLost => stage.crash(primary)?,
        Cause::VmmKilledWriting => {
            kill_vmm(stage, primary)?;
            storage(stage)?.hold_writes(primary, Duration::ZERO);
        }
        Cause::VmmStoppedWriting => {
            vmm(stage, primary, Signal::STOP)?;
            storage(stage)?.hold_writes(primary, Duration::ZERO);
        }
        Cause::StorageUnreachable => detail = Some(without_storage(stage, &SITES, rng)?),
        Cause::BackupStorageLost => detail = Some(without_storage(stage, &[backup], rng)?),
        Cause::PrimaryStorageLost => storage(stage)?.cut(primary),
        Cause::StorageUnreachableAndVmmKilled => {
            for id in SITES {
                storage(stage)?.cut(id);
            }
            pass(stage, Duration::from_millis(rng.random_range(0..1000)))?;
            kill_vmm(stage, primary)?;
            detail = Some(without_storage(stage, &SITES, rng)?);
        }
        Cause::Partition => {
            for id in [primary, backup] {
                stage.site(id).wire().set_apart(true)?;
            }
        }
        Cause::VmmStopped => vmm(stage, primary, Signal::STOP)?,
        Cause::ChannelStopped => channel(stage, primary, Signal::STOP)?,
        Cause::BackupChannelStopped => channel(stage, backup, Signal::STOP)?,
    }
    Ok((fault, detail))
}

/// Keeps the storage from these hosts for a while, in which nobody may become primary.
fn without_storage(
    stage: &mut Stage,
    hosts: &[SiteId],
    rng: &mut impl rand::Rng,
) -> Result<String, Failure> {
    let time = Duration::from_millis(rng.random_range(UNREACHABLE_MS));
    let before = stage.primary().map(|(id, status)| (id, status.epoch));
    for id in hosts {
        storage(stage)?.cut(*id);
    }
    pass(stage, time)?;
    stage.check_processes()?;
    let after = stage.primary().map(|(id, status)| (id, status.epoch));
    for id in hosts {
        storage(stage)?.mend(*id);
    }
    if hosts.len() == SITES.len() && after.is_some() && after != before {
        return Err(format!("a primary without storage: {before:?}, then {after:?}").into());
    }
    Ok(format!("without storage for {} ms", time.as_millis()))
}

fn storage(stage: &Stage) -> Result<&Storage, Failure> {
    Ok(stage.storage().ok_or("the storage is not watched")?)
}

/// Has the storage hold what this host writes, until some writes are on their way; how many, and how long
/// they are held.
fn hold_writes(
    stage: &Stage,
    id: SiteId,
    rng: &mut impl rand::Rng,
) -> Result<(usize, Duration), Failure> {
    let time = Duration::from_millis(rng.random_range(HELD_MS));
    let storage = storage(stage)?;
    storage.hold_writes(id, time);
    let patience = stage.patience();
    patience.wait_until("a write of the guest", WRITE_LIMIT, || {
        Ok(storage.held(id) > 0)
    })?;
    Ok((storage.held(id), time))
}

/// Until a daemon that was killed is replaced.
fn wait_for_channel(stage: &Stage, id: SiteId) -> Result<(), Failure> {
    // Until the old one is gone, it counts as well.
    pass(stage, CHANNEL_GONE)?;
    let host = stage.site(id).host();
    let patience = stage.patience();
    patience.wait_until("the channel's daemon to be replaced", CHANNEL_LIMIT, || {
        Ok(host.signal_program(CHANNEL, Signal::CONT)? > 0)
    })
}

fn kill_vmm(stage: &mut Stage, id: SiteId) -> Result<(), Failure> {
    stage.expect_end(id);
    vmm(stage, id, Signal::KILL)
}

fn vmm(stage: &mut Stage, id: SiteId, signal: Signal) -> Result<(), Failure> {
    let vmm = stage
        .vmm(id)
        .ok_or_else(|| format!("no VMM on host {id}"))?;
    Ok(vmm.process().signal(signal)?)
}

fn channel(stage: &Stage, id: SiteId, signal: Signal) -> Result<(), Failure> {
    match stage.site(id).host().signal_program(CHANNEL, signal)? {
        0 => Err(format!("no {CHANNEL} on host {id}").into()),
        _ => Ok(()),
    }
}

/// Until the state is on its way to the third host.
fn wait_for_transfer(stage: &mut Stage, pair: Pair) -> Result<(), Failure> {
    let third = pair.third();
    let name = third.to_string();
    let patience = stage.patience().clone();
    patience.wait_until("a transfer to the next standby", TRANSFER_LIMIT, || {
        let status = stage.status(pair.primary);
        Ok(status.is_some_and(|s| s.peer.as_ref() == Some(&name)))
    })
}

/// Undoes what can be undone at once: what was stopped goes on, what was pulled is plugged in.
pub(super) fn undo(stage: &mut Stage, pair: Pair, cause: Cause) -> Result<(), Failure> {
    match cause {
        Cause::LinkCut => Ok(stage.site(pair.primary).wire().mend()?),
        Cause::Partition => {
            for id in [pair.primary, pair.backup] {
                stage.site(id).wire().set_apart(false)?;
            }
            Ok(())
        }
        Cause::PrimaryStorageLost => {
            storage(stage)?.mend(pair.primary);
            Ok(())
        }
        Cause::HostLost => stage.repair(pair.primary),
        Cause::VmmStopped | Cause::VmmStoppedWriting => vmm(stage, pair.primary, Signal::CONT),
        Cause::ChannelStopped => resume_channel(stage, pair.primary),
        Cause::BackupChannelStopped => resume_channel(stage, pair.backup),
        _ => Ok(()),
    }
}

/// The VMM may have killed and replaced a daemon that did not answer.
fn resume_channel(stage: &Stage, id: SiteId) -> Result<(), Failure> {
    stage
        .site(id)
        .host()
        .signal_program(CHANNEL, Signal::CONT)?;
    Ok(())
}

/// Makes every host useful again: a VMM that is gone is started as an empty standby, one that has lost is
/// waited for until it has given up.
pub(super) fn heal(stage: &mut Stage, watch: &Watch, primary: SiteId) -> Result<(), Failure> {
    for id in SITES.into_iter().filter(|id| *id != primary) {
        let patience = stage.patience().clone();
        patience.wait_until("a standby to be ready for work", GIVE_UP_LIMIT, || {
            // One that was killed is gone a while later only.
            let is_gone = stage
                .vmm(id)
                .is_none_or(|vmm| vmm.process().try_wait().is_some());
            if is_gone {
                stage.check_processes()?;
                stage.start_standby(id)?;
            }
            stage.check_processes()?;
            Ok(stage
                .status(id)
                .is_some_and(|status| status.role == "backup"))
        })?;
        watch.readmit(id);
    }
    Ok(())
}

/// How long after the takeover a stopped process goes on: sometimes at once, sometimes when all is over.
pub(super) fn stop_for(rng: &mut impl rand::Rng) -> Duration {
    Duration::from_millis(rng.random_range(0..2000))
}

/// Waits for so long, unless interrupted.
pub(super) fn pass(stage: &Stage, time: Duration) -> Result<(), Failure> {
    let until = Moment::now().plus(time);
    let patience = stage.patience();
    patience.wait_until("time to pass", time.saturating_mul(100), || {
        Ok(Moment::now() >= until)
    })
}
