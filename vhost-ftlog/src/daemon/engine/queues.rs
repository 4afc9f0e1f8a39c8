//! Commands of the other threads: queues, sessions, the life and death of the VMM.
#![allow(unsafe_code)] // Waits on a word of the shared control page.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ring::{Desc, Device, MappedVring, Owner};

use super::command::{Command, QueueSetup, Refused, Report, SessionParamsOf, Snapshot};
use super::io::Token;
use super::receiver::Receiver;
use super::ring_io::{Ring, Slot};
use super::sender::Sender;
use super::{Engine, Notices};
use crate::config_space::{QUEUE_DELIVERY, QUEUE_EVENT, QUEUE_LOG, Role, SessionParams, Tuning};
use crate::daemon::memory::DeviceMemory;
use crate::notice::{LostReason, Notice};

impl<R: Ring> Engine<R> {
    pub(super) fn run_commands(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.run_command(command);
        }
    }

    fn run_command(&mut self, command: Command) {
        // A reply that nobody waits for any more is no fault of ours.
        match command {
            Command::StartQueue(setup, reply) => {
                let _ = reply.send(self.start_queue(*setup));
            }
            Command::StopQueue(index, reply) => {
                let _ = reply.send(self.stop_queue(index));
            }
            Command::SetMemory(memory, reply) => {
                let _ = reply.send(self.set_memory(memory));
            }
            Command::Forget(reply) => {
                let _ = reply.send(self.forget_last_vmm());
            }
            Command::FrontendGone => {
                self.has_frontend = false;
                if self.memory.is_none() {
                    self.report(Report::Finished);
                }
            }
            Command::Open(params, reply) => {
                let _ = reply.send(self.open(params));
            }
            Command::Close(reply) => {
                self.close();
                let _ = reply.send(());
            }
            Command::Tune(tuning) => self.tune(tuning),
            Command::Prepare(purpose, of, reply) => {
                let _ = reply.send(self.prepare(purpose, of));
            }
            Command::Adopt(generation, socket, next) => self.adopt(generation, socket, next),
            Command::BulkReady(id) => self.notify(Notice::BulkReady(id)),
            Command::PeerVmmDead(of) => {
                if self
                    .params
                    .is_some_and(|params| SessionParamsOf::from(&params) == of)
                {
                    self.peer_vmm_died();
                }
            }
            Command::Snapshot(reply) => {
                let _ = reply.send(Box::new(self.snapshot()));
            }
            Command::Status(reply) => {
                let _ = reply.send((self.status(), self.tuning));
            }
            Command::Beat(page) => self.beat = Some(page),
            Command::Drain => self.drain(),
        }
    }

    /// Goes over to the memory of this VMM: when this returns nothing of the memory before is read or
    /// written any more, its owner word in particular. A session goes on with the queues started next.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>) -> Result<(), Refused> {
        if self.delivers_for_a_dead_vmm() {
            return Err(Refused::State("still delivering the log of a dead VMM"));
        }
        self.let_go_of_memory();
        self.memory = Some(memory);
        self.has_frontend = true;
        self.told_gone = false;
        Ok(())
    }

    fn delivers_for_a_dead_vmm(&self) -> bool {
        self.vmm_dead && self.role() == Some(Role::Sender)
    }

    fn let_go_of_memory(&mut self) {
        for index in [QUEUE_LOG, QUEUE_DELIVERY, QUEUE_EVENT] {
            self.stop_queue(index);
        }
        self.io
            .quiesce(&[Token::Owner, Token::Tick])
            .expect("a ring that worked cancels its operations");
        self.memory = None;
        self.vmm_dead = false;
        if !self.draining {
            self.give_up_at = None;
        }
    }

    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), Refused> {
        let current = self.memory.as_ref();
        if !current.is_some_and(|memory| Arc::ptr_eq(memory, &setup.memory)) {
            return Err(Refused::State("a queue of memory that was taken back"));
        }
        self.stop_queue(setup.index);
        let (kick, call) = slots(setup.index).ok_or(Refused::State("no such queue"))?;
        let vring = MappedVring::new(setup.memory.mapping().clone(), setup.layout)?;
        let mut queue = Device::new(vring, setup.base.into(), setup.in_order);
        match setup.index {
            QUEUE_LOG => {
                queue.available()?;
                let mut sender = Sender::new(queue, setup.memory.clone());
                if let Some(params) = self.params {
                    sender.open(params.session, params.epoch);
                }
                self.sender = Some(sender);
            }
            QUEUE_DELIVERY => {
                if queue.available()? == queue.used() {
                    return Err(Refused::State("no descriptor of the delivery ring"));
                }
                let desc = queue.desc(queue.used())?;
                if desc.flags & Desc::WRITE == 0 {
                    return Err(Refused::State("the delivery ring is not writable"));
                }
                let ring = setup.memory.map_twice(desc.addr, desc.len)?;
                let mut receiver = Receiver::new(ring, setup.memory.clone())?;
                if let Some(params) = self.params {
                    receiver.open(params.session, params.epoch);
                }
                self.receiver = Some(receiver);
            }
            QUEUE_EVENT => self.notices.start(queue, setup.memory.clone()),
            _ => return Err(Refused::State("no such queue")),
        }
        self.io.set_file(kick, setup.kick)?;
        self.io.set_file(call, setup.call)?;
        Ok(())
    }

    /// Lets go of a queue: afterwards nothing of it is read or written. Never waits for the peer.
    fn stop_queue(&mut self, index: usize) -> u16 {
        let uses_link = match index {
            QUEUE_LOG => self.sender.is_some() && self.role() == Some(Role::Sender),
            QUEUE_DELIVERY => self.receiver.is_some() && self.role() == Some(Role::Receiver),
            _ => false,
        };
        if uses_link {
            self.lose(LostReason::Closed);
        }
        let base = match index {
            QUEUE_LOG => self.sender.take().map(|sender| sender.base()),
            QUEUE_DELIVERY => self.receiver.take().map(|_| 0),
            QUEUE_EVENT => self.notices.stop(),
            _ => None,
        };
        if let Some((kick, call)) = slots(index) {
            let token = match index {
                QUEUE_LOG => Token::LogKick,
                QUEUE_DELIVERY => Token::DeliveryKick,
                _ => Token::EventKick,
            };
            self.io
                .quiesce(&[token])
                .and_then(|()| self.io.set_file(kick, None))
                .and_then(|()| self.io.set_file(call, None))
                .expect("a ring that worked cancels its operations and updates its own tables");
        }
        base.unwrap_or(0)
    }

    fn forget_last_vmm(&mut self) -> Result<(), Refused> {
        if self.delivers_for_a_dead_vmm() {
            return Err(Refused::State("still delivering the log of a dead VMM"));
        }
        self.close();
        self.forget();
        Ok(())
    }

    /// A closed vhost-user connection says little (R10): only a VMM that gave up its owner word has
    /// ended in order; a living one comes back, a dead one is noticed by the word.
    pub(super) fn release_if_abandoned(&mut self) {
        if self.has_frontend {
            return;
        }
        let released = self.memory.as_ref().is_some_and(|memory| {
            memory.control().owner.word.load(Ordering::Acquire) & (Owner::TID | Owner::DIED) == 0
        });
        if released {
            self.close();
            self.forget();
            self.report(Report::Finished);
        }
    }

    fn forget(&mut self) {
        self.let_go_of_memory();
        self.notices = Notices::default();
    }

    pub(super) fn role(&self) -> Option<Role> {
        self.params.map(|params| params.role)
    }

    /// New limits. What another mode counts as acknowledged already is told at once.
    fn tune(&mut self, tuning: Tuning) {
        self.tuning = tuning;
        if self.is_sending()
            && let Some(sender) = &mut self.sender
        {
            let acked = sender.give_back(tuning.ack_mode, self.now, &mut self.stats);
            self.tell_vmm(acked);
        }
    }

    fn open(&mut self, params: SessionParams) -> Result<(), Refused> {
        if self.draining {
            return Err(Refused::State("the daemon is about to end"));
        }
        self.drop_link(LostReason::Replaced);
        match (params.role, &mut self.sender, &mut self.receiver) {
            (Role::Sender, Some(sender), _) => sender.open(params.session, params.epoch),
            (Role::Receiver, _, Some(receiver)) => receiver.open(params.session, params.epoch),
            _ => return Err(Refused::State("the queue of this role is not started")),
        }
        self.generation += 1;
        self.params = Some(params);
        let (session, epoch) = (params.session, params.epoch.0);
        self.span = tracing::info_span!("session", %session, epoch, role = ?params.role);
        self.peer_vmm_dead = false;
        self.report(Report::Opened(params));
        Ok(())
    }

    /// R13: when this returns nothing is acknowledged any more, and no connection will be.
    pub(super) fn close(&mut self) {
        self.drop_link(LostReason::Closed);
        if self.params.take().is_some() {
            self.generation += 1;
            self.report(Report::Closed);
        }
    }

    /// The VMM broke the rules: its session ends, its memory is not looked at any more.
    pub(super) fn broken(&mut self) {
        self.close();
        self.sender = None;
        self.receiver = None;
        self.notify(Notice::Broken);
        match self.notices.flush() {
            Ok(true) => self.io.call(Slot::EventCall),
            Ok(false) => {}
            // It is the event queue that is broken: nothing can be told any more.
            Err(_) => drop(self.notices.stop()),
        }
    }

    fn snapshot(&mut self) -> Snapshot {
        self.stats.counters.enters = self.io.enters();
        if let Some(sender) = &mut self.sender {
            sender.look_at_sight(&mut self.stats);
        }
        Snapshot {
            stats: self.stats.clone(),
            status: self.status(),
            queue_depth: self.sender.as_ref().map_or(0, Sender::depth),
            delivery_backlog: self.receiver.as_ref().map_or(0, Receiver::backlog),
            tuning: self.tuning,
        }
    }

    /// Waits for the owner word to change: the kernel changes and wakes it when the VMM dies.
    pub(super) fn watch_owner(&mut self) {
        let Some(memory) = &self.memory else {
            return;
        };
        if self.vmm_dead || self.io.is_under_way(Token::Owner) || !self.io.ring().can_wait_word() {
            return;
        }
        let word = &memory.control().owner.word;
        // The kernel wakes waiters only where the bit says that there are some.
        let value = word.fetch_or(Owner::WAITERS, Ordering::AcqRel) | Owner::WAITERS;
        if value & Owner::DIED != 0 || value & Owner::TID == 0 {
            return; // dead, or closed in order: `tick` and the control thread see to it
        }
        // SAFETY: the word is in the mapping, which goes only after this operation is quiesced.
        unsafe { self.io.watch_word(word.as_ptr(), value) };
    }

    pub(super) fn owner_changed(&mut self, _result: i32) {
        let dead = self
            .memory
            .as_ref()
            .is_some_and(|memory| memory.control().owner.is_dead());
        if dead && !self.vmm_dead {
            self.vmm_died();
        }
    }

    /// R10: what the VMM published goes out, then `END`; or, on the backup, acknowledging stops first
    /// of all and the primary is told.
    pub(super) fn vmm_died(&mut self) {
        tracing::warn!("the VMM is dead");
        self.vmm_dead = true;
        self.give_up_at = Some(self.now + self.config.linger_ns);
        match self.role() {
            Some(Role::Sender) => {
                if let Some(sender) = &mut self.sender {
                    sender.finish();
                }
            }
            Some(Role::Receiver) => self.say_gone(),
            None => {}
        }
    }

    fn drain(&mut self) {
        self.draining = true;
        self.give_up_at = Some(self.now + self.config.linger_ns);
    }

    /// Whether the end of a drain, or of the delivery for a dead VMM, has come.
    pub(super) fn check_finished(&mut self) {
        if !(self.vmm_dead || self.draining) || self.finished {
            return;
        }
        let late = self.give_up_at.is_some_and(|at| self.now >= at);
        let done = match (self.role(), &mut self.sender, &self.receiver) {
            (Some(Role::Sender), Some(sender), _) => {
                sender.is_drained() && (!self.vmm_dead || sender.is_finished())
            }
            (Some(Role::Receiver), _, Some(receiver)) => {
                if self.vmm_dead {
                    self.told_gone
                } else {
                    self.link.is_none() || !receiver.owes_acknowledgement()
                }
            }
            _ => true,
        };
        if !(done || late) {
            return;
        }
        if late && !done {
            tracing::warn!("gave up: not all that was published is acknowledged");
        }
        if self.draining {
            if done {
                self.notify(Notice::Drained);
            }
            if self.notices.flush().is_ok_and(|call| call) {
                self.io.call(Slot::EventCall);
            }
            self.finished = true;
        } else {
            self.end_link_in_order();
            self.params = None;
            self.generation += 1;
            self.report(Report::Closed);
            self.forget();
        }
        self.report(Report::Finished);
    }
}

fn slots(index: usize) -> Option<(Slot, Slot)> {
    match index {
        QUEUE_LOG => Some((Slot::LogKick, Slot::LogCall)),
        QUEUE_DELIVERY => Some((Slot::DeliveryKick, Slot::DeliveryCall)),
        QUEUE_EVENT => Some((Slot::EventKick, Slot::EventCall)),
        _ => None,
    }
}
