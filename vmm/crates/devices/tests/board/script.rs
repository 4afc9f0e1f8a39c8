//! Scripts of accesses and inputs, made from bytes: a guest that starts drivers and uses them, and does everything else
//! that comes to its mind. Used by the property tests and by the fuzz target.
//!
//! A script runs on two machines: one goes through, the other is made from the first one's saved state now and then.
//! All that can be seen of them must be the same. Whatever the guest does, nothing may panic.

use devices::{
    Board, BoardCounters, BoardState, DeviceFault, DiskStatus, Effect, Input, NetOffloads,
    Rejected, RequestId, VirtualTime,
};

use crate::guest::{Buffer, DISK, Driver, Machine, NET, Ring, config, readable, writable};
use crate::ops::{BUFFERS, Op, RAM_BYTES, decode};

/// All that can be seen of a machine after a step.
#[derive(Debug, PartialEq)]
pub(crate) struct Seen {
    data: Vec<u8>,
    used: Vec<(u32, u32)>,
    result: Option<Result<(), Rejected>>,
    effects: Vec<Effect>,
    faults: Vec<DeviceFault>,
    vector: Option<u8>,
    pending: bool,
    timer: Option<VirtualTime>,
    room: bool,
    console_room: usize,
    outstanding: Vec<Effect>,
    offloads: NetOffloads,
    counters: BoardCounters,
}

/// A machine with the drivers that its guest has started.
struct Player {
    machine: Machine,
    drivers: [Option<Driver>; 4],
    disk_requests: u64,
}

impl Player {
    fn new() -> Player {
        let mut machine = Machine::with_ram(&config(), RAM_BYTES);
        machine.init_pics();
        Player {
            machine,
            drivers: [const { None }; 4],
            disk_requests: 0,
        }
    }

    /// A second machine from this one's saved state, by way of its bytes.
    fn fork(&self) -> Player {
        let state = self.machine.board.save();
        let bytes = postcard::to_stdvec(&state).expect("plain data");
        let read: BoardState = postcard::from_bytes(&bytes).expect("what was written");
        assert_eq!(read, state);
        let mut machine = Machine::with_ram(&config(), RAM_BYTES);
        machine.board = Board::restore(read).expect("a state that a board has had");
        assert_eq!(machine.board.save(), state);
        machine.write(0, &self.ram());
        Player {
            machine,
            drivers: self.drivers.clone(),
            disk_requests: self.disk_requests,
        }
    }

    fn ram(&self) -> Vec<u8> {
        self.machine.read(0, RAM_BYTES)
    }

    fn play(&mut self, op: &Op) -> Seen {
        let mut data = Vec::new();
        let mut used = Vec::new();
        let mut result = None;
        let mut vector = None;
        let machine = &mut self.machine;
        match op {
            Op::PortIn { port, len } => {
                data.resize(*len, 0);
                machine.port_in(*port, &mut data);
            }
            Op::PortOut { port, data } => machine.port_out(*port, data),
            Op::Load { addr, len } => {
                data.resize(*len, 0);
                machine.load(*addr, &mut data);
            }
            Op::Store { addr, data } => machine.store(*addr, data),
            Op::ConfigRead {
                device,
                offset,
                len,
            } => {
                data.resize(*len, 0);
                machine.config_read(*device, *offset, &mut data);
            }
            Op::ConfigWrite {
                device,
                offset,
                data,
            } => machine.config_write(*device, *offset, data),
            Op::Start {
                device,
                features,
                size,
            } => {
                let driver = Driver::start(machine, *device, *features, *size);
                self.drivers[*device as usize] = Some(driver);
            }
            Op::Acknowledge => vector = Some(machine.board.ack_interrupt()),
            Op::Poke { addr, data } => {
                machine.write(*addr, data);
            }
            Op::Time { ns } => {
                let to = VirtualTime(machine.board.now().0.saturating_add(*ns));
                result = Some(machine.apply(Input::Time(to)));
            }
            Op::NetRx { frame } => result = Some(machine.apply(Input::NetRx(frame.clone()))),
            Op::ConsoleRx { bytes } => {
                result = Some(machine.apply(Input::ConsoleRx(bytes.clone())));
            }
            Op::Answer {
                which,
                fail,
                wrong_by,
            } => {
                result = self.answer(*which, *fail, *wrong_by);
            }
            Op::DiskRequest { kind, sector, len } => self.disk_request(*kind, *sector, *len),
            Op::Transmit { frame } => self.transmit(frame),
            Op::Post { buffers } => self.post(*buffers),
            Op::Fork => {}
            _ => used = self.drive(op, &mut data),
        }
        self.see(data, used, result, vector)
    }

    /// The steps that need a driver; without one nothing happens.
    fn drive(&mut self, op: &Op, data: &mut Vec<u8>) -> Vec<(u32, u32)> {
        let (Op::Reset { device }
        | Op::Chain { device, .. }
        | Op::Descriptor { device, .. }
        | Op::Kick { device, .. }
        | Op::TakeUsed { device, .. }
        | Op::Interrupts { device, .. }
        | Op::Isr { device }) = op
        else {
            unreachable!("the other steps need no driver")
        };
        let machine = &mut self.machine;
        let Some(driver) = &mut self.drivers[*device as usize] else {
            return Vec::new();
        };
        if let Op::Reset { .. } = op {
            driver.reset(machine);
            return Vec::new();
        }
        if let Op::Isr { .. } = op {
            data.push(driver.isr(machine));
            return Vec::new();
        }
        let (Op::Chain { queue, .. }
        | Op::Descriptor { queue, .. }
        | Op::Kick { queue, .. }
        | Op::TakeUsed { queue, .. }
        | Op::Interrupts { queue, .. }) = op
        else {
            unreachable!("the other steps need no queue")
        };
        let queues = driver.queues.len();
        let Some(ring) = driver.queues.get_mut(queue % queues.max(1)) else {
            return Vec::new();
        };
        match op {
            Op::Chain {
                buffers,
                table: Some(table),
                ..
            } => {
                ring.add_indirect(machine, *table, buffers);
            }
            Op::Chain { buffers, .. } => {
                ring.add(machine, buffers);
            }
            Op::Descriptor { parts, .. } => {
                ring.add_raw(machine, *parts);
            }
            Op::Kick { always: true, .. } => ring.notify(machine),
            Op::Kick { .. } => data.push(ring.kick(machine).into()),
            Op::TakeUsed { .. } => return ring.take_used(machine),
            Op::Interrupts { wanted: true, .. } => ring.enable_interrupts(machine),
            _ => ring.disable_interrupts(machine),
        }
        Vec::new()
    }

    /// Queue `index` of a device whose driver has been started, with the machine.
    fn ring(&mut self, device: u32, index: usize) -> Option<(&mut Machine, &mut Ring)> {
        let driver = self.drivers[device as usize].as_mut()?;
        Some((&mut self.machine, driver.queues.get_mut(index)?))
    }

    fn disk_request(&mut self, kind: u32, sector: u64, len: u32) {
        let at = BUFFERS + 0x40 * (self.disk_requests % 64);
        self.disk_requests += 1;
        let Some((machine, ring)) = self.ring(DISK, 0) else {
            return;
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        machine.write(at, &header);
        let data = Buffer {
            addr: BUFFERS + 0x2000,
            len,
            write: kind != 1,
        };
        ring.add(machine, &[readable(at, 16), data, writable(at + 16, 1)]);
        ring.kick(machine);
    }

    fn transmit(&mut self, frame: &[u8]) {
        let Some((machine, ring)) = self.ring(NET, 1) else {
            return;
        };
        machine.write(BUFFERS + 0x4000, frame);
        let middle = frame.len() as u32 / 2;
        let first = readable(BUFFERS + 0x4000, middle);
        let second = readable(
            BUFFERS + 0x4000 + u64::from(middle),
            frame.len() as u32 - middle,
        );
        ring.add(machine, &[first, second]);
        ring.kick(machine);
    }

    fn post(&mut self, buffers: u64) {
        let Some((machine, ring)) = self.ring(NET, 0) else {
            return;
        };
        for n in 0..buffers {
            ring.add(machine, &[writable(BUFFERS + 0x1_0000 + n * 0x600, 1530)]);
        }
        ring.kick(machine);
    }

    /// Answers an outstanding request, right or wrong; one that does not exist when there is none.
    fn answer(
        &mut self,
        which: usize,
        fail: bool,
        wrong_by: usize,
    ) -> Option<Result<(), Rejected>> {
        let outstanding = self.machine.board.outstanding();
        let status = if fail {
            DiskStatus::MediumError
        } else {
            DiskStatus::Ok
        };
        let bytes = |len: usize| (0..len + wrong_by).map(|i| (i * 7) as u8).collect();
        let input = match outstanding.get(which % outstanding.len().max(1)) {
            Some(Effect::EntropyWanted { id, len }) => {
                let len = if fail { 1 } else { *len as usize };
                Input::Entropy {
                    id: *id,
                    data: bytes(len),
                }
            }
            Some(Effect::DiskRead { id, len, .. }) if !fail => Input::DiskDone {
                id: *id,
                status,
                data: bytes(*len as usize),
            },
            Some(effect) => {
                let id = effect.request().expect("outstanding effects are requests");
                Input::DiskDone {
                    id,
                    status,
                    data: bytes(0),
                }
            }
            None => Input::DiskDone {
                id: RequestId(which as u64),
                status,
                data: bytes(0),
            },
        };
        Some(self.machine.apply(input))
    }

    fn see(
        &mut self,
        data: Vec<u8>,
        used: Vec<(u32, u32)>,
        result: Option<Result<(), Rejected>>,
        vector: Option<u8>,
    ) -> Seen {
        let board = &mut self.machine.board;
        Seen {
            faults: board.take_faults(),
            data,
            used,
            result,
            vector,
            pending: board.pending_interrupt(),
            timer: board.next_timer(),
            room: board.net_rx_room(&self.machine.ram),
            console_room: board.console_rx_room(),
            outstanding: board.outstanding(),
            offloads: board.net_offloads(),
            counters: board.counters(),
            effects: self.machine.take_effects(),
        }
    }
}

/// How much of the machine a script has used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reach {
    pub(crate) frames_sent: usize,
    pub(crate) frames_received: usize,
    pub(crate) requests_answered: usize,
    pub(crate) faults: usize,
    pub(crate) forks: usize,
    pub(crate) vectors: usize,
}

impl Reach {
    fn count(&mut self, op: &Op, seen: &Seen) {
        let sent = seen
            .effects
            .iter()
            .filter(|effect| matches!(effect, Effect::NetTx(_)));
        let ok = usize::from(seen.result == Some(Ok(())));
        self.frames_sent += sent.count();
        self.faults += seen.faults.len();
        match op {
            Op::NetRx { .. } => self.frames_received += ok,
            Op::Answer { .. } => self.requests_answered += ok,
            Op::Fork => self.forks += 1,
            Op::Acknowledge => self.vectors += usize::from(seen.vector.is_some()),
            _ => {}
        }
    }
}

#[allow(dead_code, reason = "the fuzz target does not look")]
impl Reach {
    pub(crate) fn add(&mut self, other: Reach) {
        self.frames_sent += other.frames_sent;
        self.frames_received += other.frames_received;
        self.requests_answered += other.requests_answered;
        self.faults += other.faults;
        self.forks += other.forks;
        self.vectors += other.vectors;
    }

    pub(crate) fn counts(&self) -> [(&'static str, usize); 6] {
        [
            ("frames sent", self.frames_sent),
            ("frames received", self.frames_received),
            ("requests answered", self.requests_answered),
            ("faults", self.faults),
            ("forks", self.forks),
            ("vectors", self.vectors),
        ]
    }
}

/// Runs a script on both machines. Panics where they differ, or where a device does.
pub(crate) fn run(ops: &[Op]) -> Reach {
    let mut first = Player::new();
    let mut second = first.fork();
    let mut reach = Reach::default();
    for (n, op) in ops.iter().enumerate() {
        if let Op::Fork = op {
            second = first.fork();
        }
        let seen = first.play(op);
        let again = second.play(op);
        assert_eq!(seen, again, "step {n}: {op:?}");
        reach.count(op, &seen);
    }
    assert_eq!(first.machine.board.save(), second.machine.board.save());
    assert!(first.ram() == second.ram(), "guest memory differs");
    reach
}

/// Runs a script on the machine that bytes make when they are taken for a saved state with `changes` (where, what)
/// made to it; false when no board has such a state. Panics where a device does.
#[allow(dead_code, reason = "the fuzz target starts from power-on")]
pub(crate) fn run_from_changed_state(first: &[Op], changes: &[(u16, u8)], then: &[Op]) -> bool {
    let mut player = Player::new();
    for op in first {
        player.play(op);
    }
    let mut bytes = postcard::to_stdvec(&player.machine.board.save()).expect("plain data");
    for (at, value) in changes {
        let at = usize::from(*at) % bytes.len();
        bytes[at] = *value;
    }
    let Ok(state) = postcard::from_bytes::<BoardState>(&bytes) else {
        return false;
    };
    let Ok(board) = Board::restore(state) else {
        return false;
    };
    player.machine.board = board;
    for op in then {
        player.play(op);
    }
    true
}

/// What the fuzz target runs: any bytes are a script.
#[allow(
    dead_code,
    reason = "the tests decode by themselves, to print the steps"
)]
pub(crate) fn fuzz_entry(data: &[u8]) {
    run(&decode(data));
}
