//! A guest of a few instructions, the world around it, and its log in memory.
//!
//! Time passes only as the world is asked for it, so two recordings of one plan are the same.

use std::collections::VecDeque;

use devices::{Board, BoardConfig, BoardState, Effect, Input, VirtualTime};
use format::{Entry, EntryReader, Event, ExitNumber, Seq};
use hypervisor::fake::{FakeVm, Op, Reg, ToyVcpu, VECTOR_TABLE, assemble};
use hypervisor::{CpuidTable, GuestRam, Vcpu, Vm};
use replay::{
    Divergence, LogError, LogSink, Machine, MachineConfig, Outside, Patches, Recorder,
    RecorderStats, ReplayError, Replayer, Step, TrapPorts,
};

pub type Guest = Machine<FakeVm, ToyVcpu>;
pub type Live = Recorder<FakeVm, ToyVcpu, World, MemoryLog>;
pub type Replica = Replayer<FakeVm, ToyVcpu>;

const RAM_BYTES: u64 = 1 << 20;
/// Where programs lie.
pub const BASE: u32 = 0x4000;
const STACK: u32 = 0x7000;
/// Where programs write: the page with this number times 4096.
pub const DATA: u32 = 0x8000;
/// The port that stands for RDTSC.
pub const TSC: u16 = 0x500;
/// A port where no device is.
pub const NOWHERE: u16 = 0x80;
/// The port that switches off.
pub const POWER_OFF: u16 = 0xf4;
const COM1: u16 = 0x3f8;

/// Steps that a recording may take at the most.
const MAX_STEPS: u32 = 100_000;
/// Virtual time between two looks at the clock, in ns.
const TICK_NS: u64 = 1_000;

/// The clerk's exits: see [`clerk`].
pub mod exits {
    /// The first read of the time.
    pub const TSC: u64 = 8;
    /// The first output, a dot.
    pub const DOT: u64 = 9;
    /// The first HLT, which the timer ends.
    pub const HALT: u64 = 10;
    /// The second read of the time.
    pub const SECOND_TSC: u64 = 12;
    /// The second dot.
    pub const SECOND_DOT: u64 = 13;
}

/// Indices into the clerk's program that tests change.
pub mod at {
    pub const ROUNDS: usize = 17;
    pub const STORE: usize = 23;
    pub const DOT: usize = 26;
    pub const HALT: usize = 27;
}

/// A program that sets interrupt controller, UART and timer up, and then in each round reads the time, computes,
/// prints a dot and halts until the timer ticks. It echoes what is typed. After four rounds it switches off.
pub fn clerk() -> Vec<Op> {
    use Reg::{A, B, C, D};
    vec![
        Op::Set(B, STACK),
        Op::SetStack(B),
        Op::Set(A, 0x2011), // ICW1, and in the next port ICW2: vectors from 0x20
        Op::Out(0x20),
        Op::Set(A, 0x04),
        Op::Out(0x21),
        Op::Set(A, 0x01),
        Op::Out(0x21),
        Op::Set(A, 0xee), // all but timer and UART masked
        Op::Out(0x21),
        Op::Set(A, 0x0101), // received bytes interrupt, FIFO on
        Op::Out(COM1 + 1),
        Op::Set(A, 0x24), // channel 0 counts 0x1000 ticks again and again
        Op::Out(0x43),
        Op::Set(A, 0x10),
        Op::Out(0x40),
        Op::Set(B, DATA),
        Op::Set(C, 4), // 17: rounds
        Op::Sti,
        Op::In(TSC), // 19: a round
        Op::Store(A, B, 0),
        Op::Set(D, 50),
        Op::Mix(A),         // 22: computes
        Op::Store(A, B, 8), // 23
        Op::Loop(D, 22),
        Op::Set(A, 0x0001_0100 | u32::from(b'.')),
        Op::Out(COM1), // 26
        Op::Halt,      // 27
        Op::Loop(C, 19),
        Op::Out(POWER_OFF),
        Op::Halt,
        Op::Set(A, 0xee20), // 31, the timer's handler: end of interrupt, mask
        Op::Out(0x20),
        Op::Iret,
        Op::In(COM1), // 34, the UART's handler
        Op::Store(A, B, 16),
        Op::Out(COM1),
        Op::Set(A, 0xee20),
        Op::Out(0x20),
        Op::Iret,
    ]
}

/// Vectors and the indices of their handlers in the clerk's program.
const HANDLERS: [(u64, u32); 2] = [(0x20, 31), (0x24, 34)];

pub fn config() -> MachineConfig {
    MachineConfig {
        ports: TrapPorts {
            tsc: TSC,
            cpuid: 0x504,
        },
        window_at: None,
        patches: Patches::default(),
    }
}

pub fn board() -> Board {
    Board::new(&BoardConfig {
        wall_clock_base_s: 1_800_000_000,
        net: None,
        disk: None,
        entropy: false,
    })
    .expect("a board without virtio devices is always possible")
}

/// A machine at the first instruction of `program`, in ring 0.
pub fn kernel(program: &[Op]) -> Guest {
    machine(program, 0)
}

/// The same in ring 3, where an input that is due does not wait.
pub fn user(program: &[Op]) -> Guest {
    machine(program, 3)
}

fn machine(program: &[Op], ring: u8) -> Guest {
    let ram = GuestRam::new(RAM_BYTES).expect("memory for a megabyte");
    ram.write(BASE.into(), &assemble(BASE, program))
        .expect("the program fits");
    for (vector, index) in HANDLERS {
        let handler = u64::from(BASE + index * 8);
        ram.write(VECTOR_TABLE + vector * 8, &handler.to_le_bytes())
            .expect("the table fits");
    }
    let vm = FakeVm::new(ram);
    let mut vcpu = vm.create_toy(BASE.into(), CpuidTable::default());
    let mut state = vcpu.save().expect("a new vCPU is at rest");
    state.sregs.cs.dpl = ring;
    vcpu.restore(&state).expect("its own state fits");
    Machine::new(vm, vcpu, board(), config())
}

/// The world: a clock, what comes, and what went out.
#[derive(Debug)]
pub struct World {
    pub now: VirtualTime,
    pub tick_ns: u64,
    pub inputs: VecDeque<Input>,
    /// With the append that each waits for.
    pub emitted: Vec<(Effect, Option<Seq>)>,
}

impl World {
    pub fn new() -> Self {
        Self {
            now: VirtualTime(0),
            tick_ns: TICK_NS,
            inputs: VecDeque::new(),
            emitted: Vec::new(),
        }
    }

    fn is_ready(&self, board: &Board) -> bool {
        match self.inputs.front() {
            Some(Input::ConsoleRx(bytes)) => bytes.len() <= board.console_rx_room(),
            other => other.is_some(),
        }
    }
}

impl Outside for World {
    fn now(&mut self) -> VirtualTime {
        self.now.0 += self.tick_ns;
        self.now
    }

    fn poll(&mut self, board: &Board, _: &GuestRam) -> Option<Input> {
        if self.is_ready(board) {
            self.inputs.pop_front()
        } else {
            None
        }
    }

    fn emit(&mut self, effect: Effect, after: Option<Seq>) {
        self.emitted.push((effect, after));
    }

    fn wait(&mut self, until: Option<VirtualTime>) {
        if let (Some(until), true) = (until, self.inputs.is_empty()) {
            self.now = self.now.max(until);
        }
    }

    fn overdue(&mut self, board: &Board, _: &GuestRam) -> bool {
        let now = self.now;
        board.next_timer().is_some_and(|due| due <= now) || self.is_ready(board)
    }

    fn running(&mut self, _: Option<VirtualTime>) {}
}

/// A log in memory, append by append.
#[derive(Debug, Default)]
pub struct MemoryLog(pub Vec<Vec<u8>>);

impl LogSink for MemoryLog {
    fn append(&mut self, bytes: &[u8]) -> Result<Seq, LogError> {
        assert!(bytes.len() <= format::MAX_APPEND_LEN);
        self.0.push(bytes.to_vec());
        Ok(Seq(self.0.len() as u64 - 1))
    }

    fn urgent(&mut self) {}

    fn is_on(&self) -> bool {
        true
    }
}

/// Something that happens once the guest has left an exit.
#[derive(Debug, Clone)]
pub enum Act {
    /// This comes.
    Come(Input),
    /// The vCPU is kicked after so many more instructions.
    Kick(u64),
}

pub fn typed(text: &str) -> Input {
    Input::ConsoleRx(text.as_bytes().to_vec())
}

/// What makes the clerk's log hold every kind of entry that the fake can make: a key that comes while it halts,
/// and one that comes while it computes.
pub fn busy_day() -> Vec<(u64, Act)> {
    vec![
        (exits::TSC, Act::Kick(40)),
        (exits::TSC, Act::Come(typed("x"))),
        (exits::SECOND_DOT, Act::Come(typed("y"))),
    ]
}

/// A recorder of `machine`, with the dirty log on.
pub fn live(mut machine: Guest) -> Live {
    machine.set_dirty_log(true).expect("the fake has one");
    Recorder::new(machine, World::new(), MemoryLog::default())
}

/// Takes the guest on to the step `until`, with what the plan has for the exits on the way.
pub fn drive(live: &mut Live, plan: &mut VecDeque<(u64, Act)>, until: Step) {
    for _ in 0..MAX_STEPS {
        let exit = live.machine().exit().0;
        while let Some((_, act)) = plan.pop_front_if(|(at, _)| *at <= exit) {
            match act {
                Act::Come(input) => live.outside_mut().inputs.push_back(input),
                Act::Kick(after) => live.machine_mut().vcpu_mut().kick_after(after),
            }
        }
        let step = live.step().expect("the fake does not fail");
        if step == until {
            return;
        }
        assert_ne!(step, Step::Ended, "the guest has ended before {until:?}");
    }
    panic!("no {until:?} after {MAX_STEPS} steps");
}

/// A whole recording.
pub struct Recorded {
    /// Append by append.
    pub log: Vec<Vec<u8>>,
    pub emitted: Vec<(Effect, Option<Seq>)>,
    pub stats: RecorderStats,
    pub end: End,
}

/// Records a guest until it switches off.
pub fn record(machine: Guest, plan: Vec<(u64, Act)>) -> Recorded {
    let mut live = live(machine);
    drive(&mut live, &mut plan.into(), Step::Ended);
    finish(live)
}

pub fn finish(live: Live) -> Recorded {
    let stats = live.stats();
    let (machine, world, log) = live.into_parts();
    Recorded {
        log: log.0,
        emitted: world.emitted,
        stats,
        end: End::of(&machine),
    }
}

impl Recorded {
    /// Its entries, each encoded; parts as they are.
    pub fn entries(&self) -> Vec<Vec<u8>> {
        let entries = self.log.iter().flat_map(|bytes| EntryReader::new(bytes));
        entries
            .map(|entry| encode(&entry.expect("the recorder writes whole entries")))
            .collect()
    }

    /// Exit and kind of each entry.
    pub fn outline(&self) -> Vec<(u64, &'static str)> {
        let entries = self.entries();
        let outline = entries.iter().map(|bytes| {
            let entry = decode(bytes);
            (entry.exit.0, entry.event.kind().name())
        });
        outline.collect()
    }

    /// What was printed.
    pub fn console(&self) -> String {
        let bytes = self.emitted.iter().filter_map(|(effect, _)| match effect {
            Effect::ConsoleTx(byte) => Some(char::from(*byte)),
            _ => None,
        });
        bytes.collect()
    }
}

pub fn entry(exit: u64, event: Event<'_>) -> Vec<u8> {
    let exit = ExitNumber(exit);
    encode(&Entry { exit, event })
}

pub fn encode(entry: &Entry<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry.encode(&mut bytes);
    bytes
}

pub fn decode(bytes: &[u8]) -> Entry<'_> {
    let mut entries = EntryReader::new(bytes);
    let entry = entries.next().expect("there is one");
    assert!(entries.next().is_none(), "there is one only");
    entry.expect("it decodes")
}

/// All by which two machines that have come to the same point are compared.
#[derive(Debug, PartialEq)]
pub struct End {
    pub exit: ExitNumber,
    pub digest: u64,
    pub registers: u64,
    pub memory: u64,
    pub board: BoardState,
    pub ended: bool,
}

impl End {
    pub fn of(machine: &Guest) -> Self {
        Self {
            exit: machine.exit(),
            digest: machine.digest().0,
            registers: machine.vcpu().digest(),
            memory: machine.memory().digest().expect("memory can be read"),
            board: machine.board().save(),
            ended: machine.has_ended(),
        }
    }
}

/// Gives the replica the entries in `log`, none of which stops it.
pub fn feed<V: Vm, C: Vcpu>(
    replica: &mut Replayer<V, C>,
    log: &[Vec<u8>],
) -> Result<(), ReplayError> {
    for bytes in log {
        for entry in EntryReader::new(bytes) {
            replica.entry(&entry?, &|| false)?;
        }
    }
    Ok(())
}

/// Replays `log` on `machine`.
pub fn replay(machine: Guest, log: &[Vec<u8>]) -> Result<Replica, ReplayError> {
    let mut replica = Replayer::new(machine);
    feed(&mut replica, log)?;
    Ok(replica)
}

/// The report of a replay that has found a divergence.
pub fn report<T>(result: Result<T, ReplayError>) -> Divergence {
    match result {
        Err(ReplayError::Divergence(report)) => *report,
        Err(other) => panic!("no divergence, but {other}"),
        Ok(_) => panic!("it was taken for right"),
    }
}
