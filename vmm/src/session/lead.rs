//! The primary's side: the live VM, its log, its gate, the transfer to a standby.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use ::transfer::fork::{self, Child};
use format::{AckRecord, ControlOp, Epoch, ExitNumber, Seq, SessionId};
use ft::{Event, GateMode, HostId, Mark, Quiesce, Time};
use hypervisor::GuestRam;
use replay::MachineState;
use vhost_ftlog::config_space::{Reach, Role, SessionParams};
use vhost_ftlog::frontend::Acks;

use super::arrive::{Arriving, Cold};
use super::driver::{Session, SessionError};
use super::event::{SessionEvent, TransferBegun};
use super::{Devices, transfer, world};
use crate::api::{Lag, Limits, Output, Pacing, Quantiles, StatusReport, Transfer};
use crate::io::{Delivery, DiskIdentity};
use crate::vm::{
    ChannelLog, Command, FromPrimary, LogPosition, Primary, SnapshotMeta, VcpuSender, host_ns,
    write_snapshot,
};

/// What a primary has.
pub(super) struct Leader {
    /// A VM that waits for its first epoch.
    pub(super) cold: Option<Cold>,
    pub(super) vm: Option<Primary>,
    /// How many VMs have gone live in this process: what a VM that is gone tells concerns nobody.
    pub(super) life: u64,
    /// The epoch is won; the world could not be opened yet.
    pub(super) arriving: Option<Arriving>,
    pub(super) wall_at_birth: u64,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) announce: Vec<Instant>,
    logging: Option<Logging>,
    pub(super) guest_off: bool,
    /// The guest is off because it wants to be reset.
    reset: bool,
    limits: Limits,
}

/// How far the log of a session is, at either end.
pub(super) struct LogProgress {
    pub(super) appended: Seq,
    pub(super) received: Seq,
    pub(super) replayed: Seq,
}

/// The log of a session.
struct Logging {
    session: SessionId,
    to: Option<HostId>,
    acks: Acks,
    position: Arc<LogPosition>,
    start: Option<Mark>,
    since: Instant,
    child: Option<Arc<Child>>,
}

impl Leader {
    pub(super) fn new(cold: Option<Cold>) -> Self {
        Self {
            cold,
            vm: None,
            life: 0,
            arriving: None,
            wall_at_birth: 0,
            mac: None,
            announce: Vec::new(),
            logging: None,
            guest_off: false,
            reset: false,
            limits: Limits::default(),
        }
    }

    /// Whether the guest ended because it wants to be reset.
    pub(super) fn wants_reset(&self) -> bool {
        self.reset
    }

    pub(super) fn is_live(&self) -> bool {
        self.vm.is_some()
    }

    pub(super) fn session(&self) -> Option<SessionId> {
        self.logging.as_ref().map(|logging| logging.session)
    }

    fn command(&self, command: Command) {
        if let Some(vm) = &self.vm
            && !vm.vcpu().command(command)
        {
            tracing::warn!("the vCPU's thread takes no commands any more");
        }
    }

    pub(super) fn pause(&self, on: bool) {
        let (reply, _) = std::sync::mpsc::channel();
        self.command(if on {
            Command::Pause(reply)
        } else {
            Command::Resume(reply)
        });
    }

    pub(super) fn set_gate(&self, mode: GateMode) {
        if let Some(vm) = &self.vm {
            vm.io().set_gate(mode);
        }
    }

    pub(super) fn inject(&self, op: ControlOp, data: Vec<u8>) {
        self.command(Command::Inject(op, data));
    }

    pub(super) fn quiesce(&self, why: Quiesce) {
        self.command(Command::Quiesce(match why {
            Quiesce::SwitchOver => Some(ControlOp::SwitchOver),
            Quiesce::PowerOff => None,
        }));
    }

    pub(super) fn fold(&self) {
        if let Some(vm) = &self.vm {
            vm.io().fold();
        }
    }

    pub(super) fn unquarantine(&self) {
        if let Some(vm) = &self.vm {
            vm.io().unquarantine();
        }
    }

    pub(super) fn resume(&self) {
        self.command(Command::Unquiesce);
        self.log_limits();
    }

    /// The position behind the newest append.
    fn log_end(&self) -> Seq {
        self.logging
            .as_ref()
            .map_or(Seq(0), |logging| logging.position.next())
    }

    /// How far the log is, while there is one.
    pub(super) fn log_progress(&self) -> Option<LogProgress> {
        let logging = self.logging.as_ref()?;
        let (received, replayed) = logging.acks.progress();
        Some(LogProgress {
            appended: logging.position.next(),
            received,
            replayed,
        })
    }

    /// What the protocol wants to know of the log at every turn.
    pub(super) fn positions(&mut self) -> Vec<Event> {
        let (Some(vm), Some(logging)) = (&self.vm, &mut self.logging) else {
            return Vec::new();
        };
        let session = logging.session;
        if logging.start.is_none() {
            return Vec::new();
        }
        let (received, replayed) = logging.acks.progress();
        let mark = Mark {
            next: logging.position.next(),
            exit: ExitNumber(vm.position().exit()),
            ran: Duration::from_nanos(vm.position().virtual_ns()),
            at: Time(host_ns()),
        };
        // Of what the gate has let go, and no more: what waits on its way to the gate is not out.
        let released = vm.io().gate_stats().released_upto;
        vec![
            Event::Appended { session, mark },
            Event::Acked {
                session,
                record: AckRecord { received, replayed },
            },
            Event::Released {
                session,
                upto: released,
            },
        ]
    }

    /// How often the channel's daemon has ticked, while there is a log.
    pub(super) fn daemon_progress(&self) -> Option<u64> {
        let logging = self.logging.as_ref()?;
        Some(logging.acks.daemon_progress())
    }

    /// Announces the MAC as often as is due.
    pub(super) fn announce(&mut self) {
        let (Some(vm), Some(mac)) = (&self.vm, self.mac) else {
            return;
        };
        let now = Instant::now();
        let due = self.announce.iter().filter(|at| **at <= now).count();
        self.announce.retain(|at| *at > now);
        for _ in 0..due {
            vm.io().announce(world::announcement(mac));
        }
    }

    /// Stops the VM and lets go of everything. The gate is shut before the log ends: what the guest
    /// does in between has no place in any log, and must not leave.
    pub(super) fn drop_vm(&mut self) {
        self.set_gate(GateMode::Shut);
        self.end_log();
        self.vm = None;
        self.cold = None;
        self.arriving = None;
    }

    fn end_log(&mut self) {
        let Some(logging) = self.logging.take() else {
            return;
        };
        logging.position.abandon();
        self.command(Command::EndLog);
        if let Some(vm) = &self.vm {
            vm.io().unwatch();
        }
        if let Some(child) = logging.child {
            child.kill();
        }
    }

    pub(super) fn report(&self, report: &mut StatusReport) {
        let Some(vm) = &self.vm else { return };
        report.exits = vm.position().exit();
        report.virtual_time_s = vm.position().virtual_ns() as f64 / 1e9;
        let gate = vm.io().gate_stats();
        report.output = Output {
            held: gate.held,
            oldest_ms: gate.oldest_ns as f64 / 1e6,
            released: gate.released,
        };
        report.ack_us = gate.held_us.map(|(p50, p99)| Quantiles { p50, p99 });
        let pacing = vm.pacing();
        report.lag = Lag {
            exits: pacing.lag_exits,
            ms: pacing.lag_run.as_secs_f64() * 1e3,
            most_ms: pacing.most_lag_run.as_secs_f64() * 1e3,
        };
        report.pacing = Pacing {
            share: f64::from(pacing.share_ppm) / 1e6,
            held_ms: pacing.held.as_secs_f64() * 1e3,
        };
    }

    /// Other limits, from now on, for VMs to come, and for a backup.
    pub(super) fn set_limits(&mut self, limits: &Limits) {
        self.limits = *limits;
        self.log_limits();
        self.command(Command::SetLag(limits.lag()));
        if let Some(vm) = &self.vm {
            let (count, bytes) = limits.gate();
            vm.io().set_limits(count, bytes);
        }
    }

    /// Writes the limits into the log, so that the host that takes over has them. Where there is no log
    /// this does nothing.
    fn log_limits(&self) {
        let limits = serde_json::to_vec(&self.limits).expect("numbers become JSON");
        self.inject(ControlOp::Limits, limits);
    }

    /// Bytes of the session's log.
    pub(super) fn log_bytes(&self) -> u64 {
        self.logging
            .as_ref()
            .map_or(0, |logging| logging.position.bytes())
    }

    /// Writes a snapshot of the running VM, which stands still for a fork only.
    pub(super) fn snapshot(
        &self,
        dir: PathBuf,
        devices: &Devices,
        reply: Sender<Result<(), String>>,
    ) {
        let Some(vm) = &self.vm else {
            return drop(reply.send(Err("the VM does not run here".to_owned())));
        };
        let vcpu = vm.vcpu().clone();
        let (disk, tap) = (devices.disk.clone(), devices.tap.clone());
        let failed = reply.clone();
        // In a thread of its own: the storage may not answer, and the child takes its time.
        let begun = std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || drop(reply.send(write_running(dir, disk, tap, &vcpu))));
        if let Err(error) = begun {
            let _ = failed.send(Err(error.to_string()));
        }
    }
}

/// Has the vCPU's thread fork a child that writes the snapshot, and waits for it.
fn write_running(
    dir: PathBuf,
    disk_path: Option<PathBuf>,
    tap: Option<String>,
    vcpu: &VcpuSender<Command>,
) -> Result<(), String> {
    // Looked at before the VM stands still: a write between the two makes the disk another one, so that no
    // disk is taken for the right one that has moved on.
    let disk = disk_path.as_deref().map(DiskIdentity::of_file).transpose();
    let meta = SnapshotMeta {
        disk: disk.map_err(|error| error.to_string())?,
        disk_path,
        tap,
        ..SnapshotMeta::default()
    };
    let (forked, child) = std::sync::mpsc::channel();
    let sent = vcpu.command(Command::Save(Box::new(move |state, memory| {
        let child = fork::start(None, || {
            let written = write_snapshot(&dir, &meta, state, memory);
            written.map(|()| 0).map_err(|error| error.to_string())
        });
        let _ = forked.send(child);
    })));
    let ended = "the VM has ended".to_owned();
    if !sent {
        return Err(ended);
    }
    let child = child.recv().map_err(|_| ended)?;
    let child = child.map_err(|error| format!("fork: {error}"))?;
    child.wait().map(drop)
}

impl Drop for Leader {
    /// However the session ends: the vCPU's thread may wait for room in a log that nobody reads.
    fn drop(&mut self) {
        self.drop_vm();
    }
}

impl Session {
    /// Something from the VM that went live as the `life`-th of this process.
    pub(super) fn take_primary(
        &mut self,
        life: u64,
        event: FromPrimary,
    ) -> Result<(), SessionError> {
        if life != self.leader.life || self.leader.vm.is_none() {
            tracing::debug!(?event, "from a VM that is gone");
            return Ok(());
        }
        match event {
            FromPrimary::GuestOff(reset) => {
                self.leader.reset = reset;
                self.leader.guest_off = true;
                self.tell(Event::GuestOff)
            }
            FromPrimary::Quiesced => {
                let why = if self.leader.guest_off {
                    Quiesce::PowerOff
                } else {
                    Quiesce::SwitchOver
                };
                self.tell(Event::Quiesced {
                    why,
                    end: self.leader.log_end(),
                })
            }
            FromPrimary::Failed(why) => Err(SessionError::Fatal(why)),
            FromPrimary::Io(Delivery::GateHolds(session, at)) => {
                self.tell(Event::GateHolds { session, at })
            }
            FromPrimary::Io(Delivery::StorageLost) => {
                let message = "the disk does not answer: requests stay outstanding, and the backup is \
                               asked whether it fares better";
                self.warn("storage-lost", message);
                self.tell(Event::StorageLost)
            }
            FromPrimary::Io(Delivery::StorageBack) => {
                self.note("storage-back", "no request is late any more".to_owned());
                self.tell(Event::StorageBack)
            }
            FromPrimary::Io(Delivery::Folded) => self.tell(Event::Folded),
            FromPrimary::Io(Delivery::GateGap(gap)) => self.tell(Event::GateGap(gap)),
            FromPrimary::Io(Delivery::Quit) => {
                let _ = self.sender.send(SessionEvent::Stop);
                Ok(())
            }
            FromPrimary::Io(Delivery::Failed(why)) => Err(SessionError::Fatal(why)),
            FromPrimary::Io(Delivery::Input(_)) => Ok(()),
        }
    }

    /// Opens the session's channel, and starts the transfer on a thread: it connects first.
    pub(super) fn start_transfer(&mut self, to: HostId, session: SessionId, epoch: Epoch) {
        if let Err(why) = self.try_start_transfer(to, session, epoch) {
            let _ = self.sender.send(SessionEvent::Transfer(session, Err(why)));
        }
    }

    fn try_start_transfer(
        &mut self,
        to: HostId,
        session: SessionId,
        epoch: Epoch,
    ) -> Result<(), String> {
        let ports = self
            .settings
            .ports_of(to)
            .ok_or("this host has no address")?;
        let vm = self.leader.vm.as_ref().ok_or("no VM runs here")?;
        let reach = Reach::Dial(ports.channel());
        let params = SessionParams {
            session,
            epoch,
            role: Role::Sender,
            reach,
        };
        let parts = self
            .channel
            .open(params, Seq(0))
            .map_err(|error| error.to_string())?;
        let position = Arc::new(LogPosition::default());
        let (io, acks) = (vm.io().clone(), parts.acks.clone());
        let log = ChannelLog::new(parts.producer, parts.acks.clone(), Arc::clone(&position));
        self.leader.logging = Some(Logging {
            session,
            to: Some(to),
            acks: parts.acks,
            position,
            start: None,
            since: Instant::now(),
            child: None,
        });
        let (link, sender) = (Arc::clone(&self.link), self.sender.clone());
        let (dirty_log, vcpu) = (vm.dirty_log().clone(), vm.vcpu().clone());
        let wall_at_birth = self.leader.wall_at_birth;
        std::thread::Builder::new()
            .name("transfer".to_owned())
            .spawn(move || {
                let failed = sender.clone();
                let fail = move |why: String| {
                    let _ = failed.send(SessionEvent::Transfer(session, Err(why)));
                };
                let stream = match link.open_bulk(&to, session) {
                    Ok(stream) => stream,
                    Err(error) => return fail(format!("connect to {to}: {error}")),
                };
                let dirty_log = match dirty_log.on() {
                    Ok(user) => user,
                    Err(why) => return fail(why),
                };
                let begin = move |state: &MachineState, memory: &GuestRam, stopped: u64| {
                    let exit = state.exit();
                    // From the vCPU's thread, so that what it has put out before is of no log.
                    io.watch(session, acks);
                    let begun = transfer::start(state, memory, wall_at_birth, stream);
                    let begun = begun
                        .map_err(|error| format!("fork: {error}"))
                        .map(|child| TransferBegun {
                            stop_ns: host_ns().saturating_sub(stopped),
                            exit,
                            child: Arc::new(child),
                        });
                    let _ = sender.send(SessionEvent::Transfer(session, begun));
                };
                if !vcpu.command(Command::StartLog(log, dirty_log, Box::new(begin))) {
                    fail("the VM has ended".to_owned());
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(())
    }

    pub(super) fn transfer_begun(
        &mut self,
        session: SessionId,
        begun: Result<TransferBegun, String>,
    ) -> Result<(), SessionError> {
        let begun = match begun {
            Ok(begun) => begun,
            Err(why) => return self.tell(Event::TransferFailed { session, why }),
        };
        let sender = self.sender.clone();
        let child = Arc::clone(&begun.child);
        std::thread::Builder::new()
            .name("transfer-wait".to_owned())
            .spawn(move || {
                let _ = sender.send(SessionEvent::TransferEnded(session, child.wait()));
            })?;
        let logging = self.leader.logging.as_mut();
        let Some(logging) = logging.filter(|logging| logging.session == session) else {
            begun.child.kill();
            return Ok(());
        };
        logging.child = Some(begun.child);
        let start = Mark {
            next: Seq(0),
            exit: begun.exit,
            ran: Duration::ZERO,
            at: Time(host_ns()),
        };
        logging.start = Some(start);
        self.transfer = Some(Transfer {
            peer: logging.to,
            bytes: 0,
            stop_ms: begun.stop_ns as f64 / 1e6,
            total_ms: 0.0,
        });
        self.leader.log_limits();
        self.tell(Event::TransferStarted { session, start })
    }

    pub(super) fn transfer_ended(
        &mut self,
        session: SessionId,
        ended: Result<u64, String>,
    ) -> Result<(), SessionError> {
        let Some(logging) = &mut self.leader.logging else {
            return Ok(());
        };
        if logging.session != session {
            return Ok(());
        }
        logging.child = None;
        match ended {
            Ok(bytes) => {
                let total_ms = logging.since.elapsed().as_secs_f64() * 1e3;
                if let Some(report) = &mut self.transfer {
                    (report.total_ms, report.bytes) = (total_ms, bytes);
                }
                let message = format!("{bytes} bytes of state sent in {total_ms:.1} ms");
                self.note("transfer-sent", message);
                Ok(())
            }
            Err(why) => self.tell(Event::TransferFailed { session, why }),
        }
    }

    pub(super) fn end_session(&mut self, session: SessionId) {
        if self.leader.session() != Some(session) {
            return;
        }
        self.leader.end_log();
        if let Err(error) = self.channel.close() {
            tracing::warn!(%error, "the channel's session was not closed in order");
        }
    }
}
