//! The toy guest: a small deterministic machine whose every output depends on all its inputs.
//!
//! It serves a key-value store from a disk of [`KEYS`] sectors: writes are answered when they are on the
//! disk, reads from memory or by reading the disk. Between two exits it takes a few steps which mix
//! registers and memory, so that an input which comes late, twice, in another order or not at all changes
//! everything after it.
//!
//! Always true: what it does is a function of its state and of the events that [`Guest::apply`] is given.

#[cfg(test)]
mod tests;
mod words;

use format::{ControlOp, Event};

pub use self::words::{Effect, Io, Packet, Request, Sector, encode_effects};
use crate::rng::{mix, mix2};

/// Keys of the store, and sectors of the disk.
pub const KEYS: usize = 8;
/// Clients that the guest remembers.
pub const CLIENTS: usize = 4;
/// Pages of memory.
pub const PAGES: usize = 8;
/// Words of a page.
pub const WORDS: usize = 4;
/// Requests that wait; more are dropped, as a full network card does.
const MAX_WAITING: usize = 8;
/// Disk requests outstanding at most.
const MAX_IO: usize = 4;
/// The page whose words flip back and forth.
const TOGGLE: usize = PAGES - 2;
/// The page that data to be written is taken from, and which is scribbled over afterwards.
const BUFFER: usize = PAGES - 1;

/// The machine. All of it is its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Exits taken: the clock of execution points.
    pub exit: u64,
    /// Steps since the last exit.
    pub micro: u32,
    regs: [u64; 4],
    mem: [[u64; WORDS]; PAGES],
    /// Virtual time in ns.
    pub vtime: u64,
    /// Running digest of the registers at all exits.
    pub digest: u64,
    /// Powered off.
    pub off: bool,
    /// Which life of the VM.
    pub life: u64,
    packets: u64,
    ios: u64,
    version: u64,
    /// What the guest believes its disk to hold, where no write is outstanding.
    pub disk: [Sector; KEYS],
    /// Sectors read since the start; all of them before it serves.
    loaded: u8,
    /// Outstanding disk requests.
    pub io: Vec<Io>,
    waiting: Vec<Request>,
    ready: Vec<(Option<(u8, u32)>, Sector)>,
    answered: [(u32, Sector); CLIENTS],
    /// Random bytes are wanted.
    pub wants_entropy: bool,
    /// A read that returned something else than what was written.
    pub misread: Option<(u8, Sector, Sector)>,
}

impl Guest {
    /// A machine that starts: knows nothing but which life it is.
    #[must_use]
    pub fn new(life: u64) -> Self {
        Self {
            exit: 0,
            micro: 0,
            regs: [mix(life), 1, 2, 3],
            mem: [[0; WORDS]; PAGES],
            vtime: 0,
            digest: mix(life),
            off: false,
            life,
            packets: 0,
            ios: 0,
            version: life << 32,
            disk: [Sector::default(); KEYS],
            loaded: 0,
            io: Vec::with_capacity(MAX_IO),
            waiting: Vec::with_capacity(MAX_WAITING),
            ready: Vec::with_capacity(MAX_WAITING),
            answered: [(0, Sector::default()); CLIENTS],
            wants_entropy: false,
            misread: None,
        }
    }

    /// Whether it still reads its disk after its start.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        usize::from(self.loaded) < KEYS
    }

    /// Steps from exit to exit.
    fn steps(&self) -> u32 {
        3 + (self.digest % 5) as u32
    }

    fn step(&mut self) {
        let at = self.regs[0] >> 9;
        let (page, word) = ((at % (BUFFER as u64)) as usize, (at >> 8) as usize % WORDS);
        self.regs[0] = mix2(self.regs[0] ^ self.mem[page][word], self.regs[1]);
        if page != TOGGLE {
            self.mem[page][word] = self.mem[page][word].wrapping_add(self.regs[0] | 1);
        }
        self.mem[TOGGLE][0] ^= 1;
        // Who gave a buffer to the disk is free to use it again: the data was captured.
        self.mem[BUFFER][word] = self.regs[0];
        self.micro += 1;
    }

    /// Runs at most `steps` steps, but never to the next exit.
    pub fn run_part(&mut self, steps: u32) {
        for _ in 0..steps {
            if self.micro + 1 >= self.steps() {
                break;
            }
            self.step();
        }
    }

    /// Runs to the next exit, and does what it does there; what leaves is put into `out`.
    pub fn run_to_exit(&mut self, out: &mut Vec<Effect>) {
        while self.micro < self.steps() {
            self.step();
        }
        self.regs[0] = mix2(self.regs[0], self.mem[TOGGLE][0]);
        self.exit += 1;
        self.micro = 0;
        let regs = mix2(
            mix2(self.regs[0], self.regs[1]),
            mix2(self.regs[2], self.regs[3]),
        );
        self.digest = mix2(self.digest, mix2(regs, self.vtime));
        self.wants_entropy = self.digest % 16 == 3;
        self.answer(out);
        if usize::from(self.loaded) < KEYS {
            self.load(out);
        } else {
            self.serve(out);
        }
        if self.digest % 8 == 1 {
            self.send(out, None, Sector::default());
        }
    }

    fn answer(&mut self, out: &mut Vec<Effect>) {
        for (answers, sector) in std::mem::take(&mut self.ready) {
            if let Some((client, number)) = answers {
                self.answered[usize::from(client) % CLIENTS] = (number, sector);
                self.send(out, answers, sector);
            }
        }
    }

    fn load(&mut self, out: &mut Vec<Effect>) {
        while self.io.len() < MAX_IO {
            let next = self.loaded as usize + self.io.len();
            if next >= KEYS {
                break;
            }
            self.submit(out, next as u8, None, None);
        }
    }

    fn serve(&mut self, out: &mut Vec<Effect>) {
        let Some(request) = self.waiting.first().copied() else {
            return;
        };
        let key = request.key % KEYS as u8;
        let last = self.answered[usize::from(request.client) % CLIENTS];
        let answers = Some((request.client, request.number));
        if request.number <= last.0 {
            // Asked again: the answer was lost.
            self.waiting.remove(0);
            if request.number == last.0 {
                self.send(out, answers, last.1);
            }
            return;
        }
        let at_work = self.io.iter().any(|io| io.answers == answers);
        let busy = self.io.len() >= MAX_IO || self.io.iter().any(|io| io.key == key);
        if at_work {
            self.waiting.remove(0);
            return;
        }
        if busy {
            return;
        }
        self.waiting.remove(0);
        match request.put {
            Some(value) => {
                self.version += 1;
                let version = self.version;
                self.submit(out, key, Some(Sector { version, value }), answers);
            }
            None if self.digest.is_multiple_of(2) => self.submit(out, key, None, answers),
            None => {
                let sector = self.disk[usize::from(key)];
                self.answered[usize::from(request.client) % CLIENTS] = (request.number, sector);
                self.send(out, answers, sector);
            }
        }
    }

    fn submit(
        &mut self,
        out: &mut Vec<Effect>,
        key: u8,
        write: Option<Sector>,
        answers: Option<(u8, u32)>,
    ) {
        self.ios += 1;
        let slot = (self.ios % WORDS as u64) as u8;
        if let Some(sector) = write {
            self.mem[BUFFER][usize::from(slot)] = sector.value;
        }
        let io = Io {
            id: self.ios,
            key,
            write,
            answers,
            slot,
        };
        self.io.push(io);
        out.push(Effect::Disk(io));
    }

    fn send(&mut self, out: &mut Vec<Effect>, answers: Option<(u8, u32)>, sector: Sector) {
        self.packets += 1;
        out.push(Effect::Net(Packet {
            life: self.life,
            index: self.packets,
            answers,
            sector,
            digest: self.digest,
        }));
    }

    /// What `io` would write if its data were read from memory now: not what was submitted.
    #[must_use]
    pub fn reread(&self, io: &Io) -> Option<Sector> {
        io.write.map(|sector| Sector {
            value: self.mem[BUFFER][usize::from(io.slot)],
            ..sector
        })
    }

    /// An event of the log takes effect at the present point. Those that come from outside are mixed into
    /// the registers, each with the order in which it came. False where it cannot be: the log is not this
    /// machine's.
    pub fn apply(&mut self, event: &Event<'_>) -> bool {
        match event {
            Event::Time { ns } => {
                if *ns < self.vtime {
                    return false;
                }
                self.vtime = *ns;
                self.feel(1, *ns);
            }
            Event::Entropy { request, data } => {
                self.wants_entropy = false;
                self.feel(2 + request, bytes_digest(data));
            }
            Event::NetRx(bytes) => {
                self.feel(3, bytes_digest(bytes));
                if let Some(request) = Request::decode(bytes)
                    && self.waiting.len() < MAX_WAITING
                {
                    self.waiting.push(request);
                }
            }
            Event::ConsoleRx(bytes) => self.feel(4, bytes_digest(bytes)),
            Event::DiskDone { request, data, .. } => return self.disk_done(*request, data),
            Event::Control(op, data) => {
                self.feel(6 + *op as u64, bytes_digest(data));
                if *op == ControlOp::PowerOff {
                    self.off = true;
                }
            }
            _ => return false,
        }
        true
    }

    fn feel(&mut self, what: u64, data: u64) {
        self.regs[1] = mix2(self.regs[1], mix2(what, data));
        self.regs[3] = self.regs[3].wrapping_add(1);
    }

    fn disk_done(&mut self, request: u64, data: &[u8]) -> bool {
        let Some(at) = self.io.iter().position(|io| io.id == request) else {
            return false;
        };
        let io = self.io.remove(at);
        let key = usize::from(io.key);
        self.feel(5, mix2(request, bytes_digest(data)));
        let sector = match io.write {
            Some(written) => written,
            None => Sector::decode(data),
        };
        if io.write.is_none() && usize::from(self.loaded) < KEYS {
            self.loaded += 1;
        } else if io.write.is_none() && sector != self.disk[key] && self.misread.is_none() {
            self.misread = Some((io.key, self.disk[key], sector));
        }
        self.disk[key] = sector;
        self.ready.push((io.answers, sector));
        true
    }

    /// Everything, in one number.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut hash = mix2(self.exit, u64::from(self.micro));
        for word in self.regs.iter().chain(self.mem.iter().flatten()) {
            hash = mix2(hash, *word);
        }
        for sector in &self.disk {
            hash = mix2(hash, sector.version ^ sector.value.rotate_left(9));
        }
        for io in &self.io {
            hash = mix2(hash, io.id ^ (u64::from(io.key) << 40));
        }
        for request in &self.waiting {
            hash = mix2(
                hash,
                u64::from(request.number) ^ (u64::from(request.client) << 40),
            );
        }
        for (answers, sector) in &self.ready {
            hash = mix2(hash, sector.version ^ u64::from(answers.map_or(0, |a| a.1)));
        }
        let flags =
            u64::from(self.off) | u64::from(self.loaded) << 1 | u64::from(self.wants_entropy) << 9;
        mix2(
            mix2(hash, self.digest ^ self.vtime),
            mix2(self.packets ^ self.ios, flags),
        )
    }

    /// The pages of memory: what a delta is made of.
    #[must_use]
    pub fn pages(&self) -> &[[u64; WORDS]; PAGES] {
        &self.mem
    }

    /// Appends registers and the pages in `mask`.
    pub fn save_point(&self, mask: u16, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.micro.to_le_bytes());
        out.extend_from_slice(&mask.to_le_bytes());
        for reg in &self.regs {
            out.extend_from_slice(&reg.to_le_bytes());
        }
        for (index, page) in self.mem.iter().enumerate() {
            if mask & (1 << index) != 0 {
                for word in page {
                    out.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
    }

    /// Goes to the point that was saved; false where the bytes are not one.
    pub fn load_point(&mut self, bytes: &[u8]) -> bool {
        let Some((micro, rest)) = bytes.split_first_chunk::<4>() else {
            return false;
        };
        let Some((mask, mut rest)) = rest.split_first_chunk::<2>() else {
            return false;
        };
        self.micro = u32::from_le_bytes(*micro);
        let mask = u16::from_le_bytes(*mask);
        let mut word = || {
            let (word, after) = rest.split_first_chunk::<8>()?;
            rest = after;
            Some(u64::from_le_bytes(*word))
        };
        for reg in &mut self.regs {
            let Some(value) = word() else { return false };
            *reg = value;
        }
        for (index, page) in self.mem.iter_mut().enumerate() {
            if mask & (1 << index) == 0 {
                continue;
            }
            for slot in page {
                let Some(value) = word() else { return false };
                *slot = value;
            }
        }
        true
    }

    /// A bit flips, as no deterministic machine does: the replica is no replica any more.
    pub fn corrupt(&mut self, bit: u64) {
        self.regs[2] ^= 1 << (bit % 64);
    }
}

fn bytes_digest(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = mix2(hash, u64::from_le_bytes(word));
    }
    hash
}
