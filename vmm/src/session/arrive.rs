//! Going live: from the epoch that is won to the VM that runs.

use std::time::{Duration, Instant};

use devices::Effect;
use format::Seq;
use ft::{EpochRecord, Event, GoLive, Origin};

use super::driver::{Session, SessionError};
use super::event::SessionEvent;
use super::{clock, world};
use crate::api::{Event as Told, Severity};
use crate::io::DiskIdentity;
use crate::vm::{Backends, KvmMachine, Primary};

/// When the MAC is announced after going live.
const ANNOUNCE_MS: [u64; 6] = [0, 50, 200, 500, 1_000, 2_000];
/// How often a world that cannot be opened is tried again.
const WORLD_RETRY: Duration = Duration::from_millis(200);

/// A VM that waits for its first epoch.
pub struct Cold {
    /// The VM.
    pub machine: KvmMachine,
    /// The disk that its memory belongs to, if it begins from a snapshot: with any other, or with this one
    /// at another moment of its life, it would destroy its file systems.
    pub disk: Option<DiskIdentity>,
}

/// A VM that is to go live.
pub(super) struct Arriving {
    record: EpochRecord,
    machine: KvmMachine,
    disk: Option<DiskIdentity>,
    pending: Vec<Effect>,
    /// The wall clock at virtual time 0, in ns since 1970, of a VM that has lived before.
    wall_at_birth: Option<u64>,
    /// When to try again.
    at: Instant,
}

impl Session {
    /// Acts on the world from here on.
    pub(super) fn go_live(&mut self, live: GoLive) -> Result<(), SessionError> {
        let (machine, disk, pending, wall_at_birth) = match live.origin {
            Origin::Cold => {
                let cold = self.leader.cold.take();
                let Cold { machine, disk } =
                    cold.ok_or_else(|| SessionError::Fatal("there is no VM to start".into()))?;
                (machine, disk, Vec::new(), None)
            }
            Origin::TakeOver { released, .. } => {
                let (machine, pending, wall_at_birth) = self.take_over(released)?;
                (machine, None, pending, Some(wall_at_birth))
            }
        };
        self.leader.mac = machine.board().config().net.as_ref().map(|net| net.mac);
        self.leader.guest_off = machine.has_ended();
        self.leader.arriving = Some(Arriving {
            record: live.record,
            machine,
            disk,
            pending,
            wall_at_birth,
            at: Instant::now(),
        });
        self.arrive()
    }

    /// Opens the world and lets the VM run. The epoch is won, so this host alone may: where image or TAP
    /// cannot be opened it tries again, the VM's state being here only.
    pub(super) fn arrive(&mut self) -> Result<(), SessionError> {
        let now = Instant::now();
        let Some(mut arriving) = self.leader.arriving.take_if(|arriving| arriving.at <= now) else {
            return Ok(());
        };
        let gap = self.settings.ft.detector.host_silent;
        let backends = match world::open(&self.devices, &arriving.record.quarantine, gap) {
            Ok(backends) => backends,
            Err(why) => {
                let message =
                    format!("{why}; it is tried again, and the VM stands still meanwhile");
                self.log
                    .record(Told::new(Severity::Error, "world-lost", message));
                arriving.at = now + WORLD_RETRY;
                self.leader.arriving = Some(arriving);
                return Ok(());
            }
        };
        check_disk(&backends, arriving.disk.as_ref())?;
        let Arriving {
            record,
            machine,
            pending,
            wall_at_birth,
            ..
        } = arriving;
        // Only now: for as long as the world could not be opened the VM stood still.
        let now = machine.board().now();
        let wall_at_birth = wall_at_birth.unwrap_or_else(|| clock::wall_at_birth(now));
        let behind_ns = clock::behind(now, wall_at_birth);
        self.leader.wall_at_birth = wall_at_birth;
        self.leader.life += 1;
        let (sender, life) = (self.sender.clone(), self.leader.life);
        let tell = move |event| {
            let _ = sender.send(SessionEvent::Primary(life, event));
        };
        let vm = Primary::start(machine, backends, behind_ns, pending, tell)
            .map_err(|error| SessionError::Fatal(error.to_string()))?;
        self.leader.vm = Some(vm);
        self.leader.set_limits(&self.limits());
        let now = Instant::now();
        self.leader.announce = ANNOUNCE_MS
            .iter()
            .map(|ms| now + Duration::from_millis(*ms))
            .collect();
        self.mark("VM runs");
        self.note("live", format!("epoch {}", record.epoch));
        self.tell(Event::Live)
    }

    fn take_over(&mut self, released: Seq) -> Result<(KvmMachine, Vec<Effect>, u64), SessionError> {
        let handover = self.follower.hand_over();
        let handover = handover.ok_or_else(|| SessionError::Fatal("the replica is gone".into()))?;
        let unsent = handover
            .recent
            .into_iter()
            .filter(|(next, _)| *next > released);
        let pending = unsent
            .map(|(_, effect)| effect)
            .chain(handover.unconfirmed)
            .collect();
        Ok((handover.machine, pending, handover.epoch_wall_ns))
    }
}

/// Between its start and its epoch, which may be days, another host may have run the VM on this disk.
fn check_disk(backends: &Backends, expected: Option<&DiskIdentity>) -> Result<(), SessionError> {
    match (&backends.disk, expected) {
        (Some(disk), Some(expected)) => disk
            .check_identity(expected)
            .map_err(|error| SessionError::Fatal(error.to_string())),
        _ => Ok(()),
    }
}
