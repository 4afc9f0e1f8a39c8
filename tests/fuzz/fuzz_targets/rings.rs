//! The data thread against a VMM that writes what it likes, whenever it likes, into descriptors, rings and control
//! page, and against a peer that sends what it likes. A simulated kernel carries the operations out, so nothing waits.
//! Nothing panics; the thread comes to rest after every change.

#![no_main]

use std::cell::Cell;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};

use format::{AckRecord, Epoch, FrameFlags, FrameHeader, Seq, SessionId, encode_frame};
use ring::{Arena, ArenaConfig, ArenaLayout, CONTROL_MAGIC, CONTROL_VERSION, Mapping, VringLayout};
use vhost_ftlog::config_space::{AckMode, QUEUE_DELIVERY, QUEUE_EVENT, QUEUE_LOG, Reach, Role, SessionParams, Tuning};
use vhost_ftlog::daemon::engine::ring_io::Slot;
use vhost_ftlog::daemon::engine::simulated::Simulated;
use vhost_ftlog::daemon::engine::{Command, Engine, EngineConfig, EngineHandle, QueueSetup, Reply, SessionParamsOf};
use vhost_ftlog::daemon::memory::{DeviceMemory, Region};

thread_local!(static NOW: Cell<u64> = const { Cell::new(1_000_000_000) });

const ARENA: ArenaConfig = ArenaConfig { log_ring: 8, log_bytes: 128 << 10, delivery_bytes: 2 << 20 };
const SESSION: SessionId = SessionId([7; 16]);

struct World {
    engine: Engine<Simulated>,
    kernel: Simulated,
    handle: EngineHandle,
    layout: ArenaLayout,
    vmm: Mapping,
    memory: Arc<DeviceMemory>,
    params: SessionParams,
}

impl World {
    fn new(role: Role, provides: bool) -> Self {
        let layout = ArenaLayout::new(ARENA).expect("legal sizes");
        let arena = Arena::create(layout.len).expect("a memfd");
        let vmm = Mapping::of_file(&arena, 0, layout.len as usize).expect("a mapping");
        vmm.write(0, &CONTROL_MAGIC.to_le_bytes());
        vmm.write(8, &CONTROL_VERSION.to_le_bytes());
        // One writable descriptor in each of delivery and event queue, all of the log data in the log queue.
        descriptor(&vmm, &layout.delivery_ring, 0, layout.delivery, layout.delivery_len as u32, 2);
        available(&vmm, &layout.delivery_ring, 1);
        descriptor(&vmm, &layout.event_ring, 0, layout.events, 64, 2);
        available(&vmm, &layout.event_ring, 1);
        for index in 0..8 {
            descriptor(&vmm, &layout.log_ring, index, layout.log + 4096 * u64::from(index), 100, 0);
            vmm.write(layout.log_ring.avail + 4 + 2 * u64::from(index), &index.to_le_bytes());
        }
        let region = Region { guest: 0, len: layout.len, user: 0, offset: 0 };
        let file = arena.as_fd().try_clone_to_owned().expect("a descriptor");
        let memory = Arc::new(DeviceMemory::new(region, file.into()).expect("an arena"));
        let kernel = Simulated::new(provides);
        let (handle, inbox, doorbell) = EngineHandle::new().expect("an eventfd");
        let (reports, _) = mpsc::channel();
        let config = EngineConfig { linger_ns: 1_000_000_000, yield_in_spin: false, yield_to_called: false, clock: || NOW.get() };
        let engine = Engine::new(kernel.clone(), config, inbox, doorbell, reports).expect("a simulated kernel");
        let params = SessionParams { session: SESSION, epoch: Epoch(1), role, reach: Reach::Listen };
        let mut this = Self { engine, kernel, handle, layout, vmm, memory, params };
        this.attach();
        this.connect();
        this
    }

    fn ask<T>(&mut self, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.tell(command(reply));
        answer.try_recv().ok()
    }

    fn tell(&mut self, command: Command) {
        self.handle.tell(command).expect("the data thread is here");
        self.kernel.kick(Slot::Doorbell);
        self.settle();
    }

    fn settle(&mut self) {
        let (_, slept) = self.kernel.entered();
        for _ in 0..10_000 {
            self.engine.turn().expect("the simulated kernel refuses nothing");
            if self.kernel.entered().1 > slept {
                return;
            }
        }
        panic!("the data thread does not come to rest");
    }

    fn attach(&mut self) {
        let memory = Arc::clone(&self.memory);
        let _ = self.ask(|reply| Command::SetMemory(memory, reply));
        let rings =
            [(QUEUE_LOG, self.layout.log_ring), (QUEUE_DELIVERY, self.layout.delivery_ring), (QUEUE_EVENT, self.layout.event_ring)];
        for (index, layout) in rings {
            let memory = Arc::clone(&self.memory);
            let setup = QueueSetup { index, memory, layout, base: 0, in_order: true, kick: event(), call: event() };
            let _ = self.ask(|reply| Command::StartQueue(Box::new(setup), reply));
        }
        let params = self.params;
        let _ = self.ask(|reply| Command::Open(params, reply));
    }

    fn connect(&mut self) {
        let of = SessionParamsOf::from(&self.params);
        let Some(Ok(prepared)) = self.ask(|reply| Command::Prepare(None, of, reply)) else { return };
        let (socket, _) = UnixStream::pair().expect("a socket");
        let socket = TcpStream::from(OwnedFd::from(socket));
        self.tell(Command::Adopt(prepared.generation, socket, Seq(0)));
    }

    /// One thing that a hostile VMM or peer does.
    fn step(&mut self, kind: u8, at: u16, value: u64) {
        let ring = [self.layout.log_ring, self.layout.delivery_ring, self.layout.event_ring][usize::from(at) % 3];
        match kind % 12 {
            0 => self.vmm.write(u64::from(at) % 4096, &value.to_le_bytes()),
            1 => available(&self.vmm, &ring, value as u16),
            2 => {
                let index = (value >> 32) as u16 % ring.size;
                self.vmm.write(ring.desc + 16 * u64::from(index) + u64::from(at % 9), &value.to_le_bytes());
            }
            3 => self.vmm.write(ring.avail + 4 + 2 * (value % u64::from(ring.size)), &at.to_le_bytes()),
            4 => {
                let span = self.layout.events - self.layout.log_ring.desc;
                self.vmm.write(self.layout.log_ring.desc + u64::from(at) % span, &value.to_le_bytes());
            }
            5 => self.kernel.arrive(&value.to_le_bytes()[..1 + usize::from(at % 8)]),
            6 => self.frame(at, value),
            7 => {
                let record = AckRecord { received: Seq(value & 0xffff), replayed: Seq(u64::from(at)) };
                self.kernel.arrive(&record.encode(SESSION));
            }
            8 => {
                let mode = if value & 1 == 0 { AckMode::Received } else { AckMode::Replayed };
                self.tell(Command::Tune(Tuning { ack_mode: mode, batch_bytes: 1 + u32::from(at), ..Tuning::default() }));
            }
            9 => NOW.set(NOW.get() + u64::from(at) * 10_000),
            10 => {
                let slot = [Slot::LogKick, Slot::DeliveryKick, Slot::EventKick][usize::from(at) % 3];
                self.kernel.kick(slot);
            }
            _ => match at % 6 {
                0 => self.connect(),
                1 => {
                    let _ = self.ask(|reply| Command::StopQueue((value % 4) as usize, reply));
                }
                2 => self.attach(),
                3 => {
                    let _ = self.ask(Command::Close);
                }
                4 => self.kernel.close(),
                _ => self.kernel.limit_sends(value as usize % 300 + 1),
            },
        }
        self.settle();
        let _ = self.ask(Command::Snapshot);
    }

    /// A whole frame, right in all that a checksum can tell.
    fn frame(&mut self, at: u16, value: u64) {
        let end = value & 1 == 1;
        let body = vec![at as u8; if end { 0 } else { 1 + usize::from(at) * 3 }];
        let header = FrameHeader {
            flags: if end { FrameFlags::END } else { FrameFlags::NONE },
            session: SESSION,
            epoch: Epoch(1),
            first: Seq(value >> 8 & 0xff),
            count: u32::from(!end),
            body_len: 0,
            stamp_ns: 0,
        };
        let mut frame = Vec::new();
        encode_frame(header, &body, &mut frame);
        self.kernel.arrive(&frame);
    }
}

fn event() -> Option<OwnedFd> {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).ok()
}

fn descriptor(vmm: &Mapping, ring: &VringLayout, index: u16, addr: u64, len: u32, flags: u16) {
    let at = ring.desc + 16 * u64::from(index);
    vmm.write(at, &addr.to_le_bytes());
    vmm.write(at + 8, &len.to_le_bytes());
    vmm.write(at + 12, &flags.to_le_bytes());
}

fn available(vmm: &Mapping, ring: &VringLayout, index: u16) {
    vmm.write(ring.avail + 2, &index.to_le_bytes());
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((how, steps)) = data.split_first() else { return };
    let role = if how & 1 == 0 { Role::Sender } else { Role::Receiver };
    let mut world = World::new(role, how & 2 == 0);
    for step in steps.chunks_exact(11).take(64) {
        let at = u16::from_le_bytes([step[1], step[2]]);
        let value = u64::from_le_bytes(*step[3..].first_chunk().expect("11 bytes"));
        world.step(step[0], at, value);
    }
});
