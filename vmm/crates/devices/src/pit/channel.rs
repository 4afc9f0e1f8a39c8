//! One channel of the 8254: six modes, latches, gate.

use super::state::{AccessState, ChannelState, CountingState};
use crate::StateError;
use crate::time::VirtualTime;

/// Which bytes of the count an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counting {
    Halted { elapsed: u64 },
    Since { start: VirtualTime, elapsed: u64 },
}

#[derive(Debug)]
pub(super) struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count to start from: 1 to 65536.
    initial: u32,
    loaded: bool,
    counting: Counting,
    low_written: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Channel {
        Channel {
            mode: 3,
            bcd: false,
            access: Access::LowThenHigh,
            gate,
            initial: 0x1_0000,
            loaded: false,
            counting: Counting::Halted { elapsed: 0 },
            low_written: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// When counting began, if it counts and was never halted since it was loaded.
    pub(super) fn started(&self) -> Option<VirtualTime> {
        match self.counting {
            Counting::Since { start, elapsed: 0 } => Some(start),
            _ => None,
        }
    }

    /// Ticks counted since the count was loaded.
    pub(super) fn elapsed(&self, now: VirtualTime) -> u64 {
        match self.counting {
            Counting::Halted { elapsed } => elapsed,
            Counting::Since { start, elapsed } => {
                elapsed.saturating_add(now.pit_ticks_since(start))
            }
        }
    }

    /// Ticks of one period, in the periodic modes.
    pub(super) fn period(&self) -> Option<u64> {
        matches!(self.mode, 2 | 3).then_some(u64::from(self.initial))
    }

    /// Ticks after which the output rises once, in the modes that a written count starts.
    pub(super) fn terminal_count(&self) -> Option<u64> {
        matches!(self.mode, 0 | 4).then_some(u64::from(self.initial))
    }

    /// A control word other than a latch command or a read-back.
    pub(super) fn set_mode(&mut self, control: u8) {
        *self = Channel {
            // Modes 6 and 7 are 2 and 3.
            mode: match control >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            bcd: control & 1 != 0,
            access: match control >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::LowThenHigh,
            },
            initial: self.initial,
            ..Channel::new(self.gate)
        };
    }

    /// Writes a byte of the count; true when this completes it.
    pub(super) fn write(&mut self, value: u8, now: VirtualTime) -> bool {
        let count = match (self.access, self.low_written.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::LowThenHigh, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::LowThenHigh, None) => {
                self.low_written = Some(value);
                return false;
            }
        };
        self.initial = match (count, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (count, false) => u32::from(count),
            (count, true) => from_bcd(count),
        };
        self.loaded = true;
        // Modes 1 and 5 wait for the gate to rise.
        self.counting = if self.gate && !matches!(self.mode, 1 | 5) {
            Counting::Since {
                start: now,
                elapsed: 0,
            }
        } else {
            Counting::Halted { elapsed: 0 }
        };
        true
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: VirtualTime) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        let elapsed = self.elapsed(now);
        if rising && self.loaded {
            let elapsed = if matches!(self.mode, 0 | 4) {
                elapsed
            } else {
                0
            };
            self.counting = Counting::Since {
                start: now,
                elapsed,
            };
        } else if falling && !matches!(self.mode, 1 | 5) {
            self.counting = Counting::Halted { elapsed };
        }
    }

    /// The output pin.
    pub(super) fn output(&self, now: VirtualTime) -> bool {
        if !self.loaded {
            return self.mode != 0;
        }
        let initial = u64::from(self.initial);
        let elapsed = self.elapsed(now);
        let triggered = matches!(self.counting, Counting::Since { .. });
        match self.mode {
            0 => elapsed >= initial,
            1 => !triggered || elapsed >= initial,
            2 => !triggered || elapsed % initial != initial - 1,
            3 => !triggered || elapsed % initial < initial.div_ceil(2),
            _ => elapsed != initial,
        }
    }

    fn count(&self, now: VirtualTime) -> u16 {
        let initial = u64::from(self.initial);
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let elapsed = self.elapsed(now);
        let left = match self.mode {
            2 => initial - elapsed % initial,
            3 => initial - elapsed % initial * 2 % initial,
            // Past zero the count goes on from the top.
            _ => initial + modulus - elapsed % modulus,
        };
        let count = u16::try_from(left % modulus).expect("the modulus is at most 65536");
        if self.bcd { to_bcd(count) } else { count }
    }

    /// Holds the count for reading, unless one is held already.
    pub(super) fn latch_count(&mut self, now: VirtualTime) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
            self.read_high_next = false;
        }
    }

    /// Holds the status for reading, unless one is held already.
    pub(super) fn latch_status(&mut self, now: VirtualTime) {
        if self.latched_status.is_some() {
            return;
        }
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        let status = u8::from(self.output(now)) << 7
            | u8::from(!self.loaded) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status = Some(status);
    }

    pub(super) fn read(&mut self, now: VirtualTime) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.count(now))
            .to_le_bytes();
        let take_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::LowThenHigh => {
                self.read_high_next = !self.read_high_next;
                !self.read_high_next
            }
        };
        if !self.read_high_next {
            self.latched_count = None;
        }
        if take_high { high } else { low }
    }

    pub(super) fn save(&self) -> ChannelState {
        ChannelState {
            mode: self.mode,
            bcd: self.bcd,
            access: match self.access {
                Access::Low => AccessState::Low,
                Access::High => AccessState::High,
                Access::LowThenHigh => AccessState::LowThenHigh,
            },
            gate: self.gate,
            initial: self.initial,
            loaded: self.loaded,
            counting: match self.counting {
                Counting::Halted { elapsed } => CountingState::Halted { elapsed },
                Counting::Since { start, elapsed } => CountingState::Since { start, elapsed },
            },
            low_written: self.low_written,
            read_high_next: self.read_high_next,
            latched_count: self.latched_count,
            latched_status: self.latched_status,
        }
    }

    pub(super) fn restore(state: &ChannelState) -> Result<Channel, StateError> {
        if state.mode > 5 || !(1..=0x1_0000).contains(&state.initial) {
            return Err(StateError::Invalid {
                device: "pit",
                field: "mode or initial",
            });
        }
        Ok(Channel {
            mode: state.mode,
            bcd: state.bcd,
            access: match state.access {
                AccessState::Low => Access::Low,
                AccessState::High => Access::High,
                AccessState::LowThenHigh => Access::LowThenHigh,
            },
            gate: state.gate,
            initial: state.initial,
            loaded: state.loaded,
            counting: match state.counting {
                CountingState::Halted { elapsed } => Counting::Halted { elapsed },
                CountingState::Since { start, elapsed } => Counting::Since { start, elapsed },
            },
            low_written: state.low_written,
            read_high_next: state.read_high_next,
            latched_count: state.latched_count,
            latched_status: state.latched_status,
        })
    }
}

/// The value of four decimal digits; digits above 9 count as they stand.
fn from_bcd(digits: u16) -> u32 {
    let [low, high] = digits.to_le_bytes().map(u32::from);
    (high >> 4) * 1000 + (high & 15) * 100 + (low >> 4) * 10 + (low & 15)
}

fn to_bcd(value: u16) -> u16 {
    [1000, 100, 10, 1]
        .into_iter()
        .fold(0, |digits, unit| (digits << 4) | (value / unit % 10))
}
