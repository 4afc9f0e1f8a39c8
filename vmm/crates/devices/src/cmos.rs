//! The MC146818 clock and CMOS memory at ports 0x70 and 0x71 (Motorola MC146818A data sheet).
//!
//! The clock shows a base, fixed when the VM is made, plus virtual time, plus what the guest has set it by. Updates take
//! no time, so the update-in-progress bit is never set. Alarm, periodic and update interrupts are not offered (IRQ 8
//! stays low): their enable bits are kept and do nothing.

mod calendar;
mod state;

use calendar::DateTime;
pub use state::{CmosState, DateTimeState};

use crate::StateError;
use crate::time::{NS_PER_S, VirtualTime};

/// Bytes of CMOS memory, clock registers included.
pub(crate) const CMOS_BYTES: usize = 128;

const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Time base 32,768 Hz, rate 1,024 Hz: what firmware sets.
const REG_A_DEFAULT: u8 = 0x26;
const REG_A_UPDATE_IN_PROGRESS: u8 = 0x80;
const REG_B_SET: u8 = 0x80;
const REG_B_BINARY: u8 = 0x04;
const REG_B_24_HOURS: u8 = 0x02;
/// The battery is good.
const REG_D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;

/// Latest second that the clock can show: 9999-12-31 23:59:59.
pub(crate) const LAST_SECOND: u64 = 253_402_300_799;

/// Clock and memory.
#[derive(Debug)]
pub(crate) struct Cmos {
    /// Unix time at virtual time 0, plus what the guest set, seconds.
    base_s: i64,
    index: u8,
    /// The clock stands while register B says SET: the time that its registers show.
    stopped: Option<DateTime>,
    memory: [u8; CMOS_BYTES],
}

impl Cmos {
    /// `base_s`: Unix time at the VM's birth.
    pub(crate) fn new(base_s: u64) -> Cmos {
        let mut memory = [0; CMOS_BYTES];
        memory[usize::from(REG_A)] = REG_A_DEFAULT;
        memory[usize::from(REG_B)] = REG_B_24_HOURS;
        Cmos {
            base_s: base_s.min(LAST_SECOND).cast_signed(),
            index: 0,
            stopped: None,
            memory,
        }
    }

    fn reg_b(&self) -> u8 {
        self.memory[usize::from(REG_B)]
    }

    fn clock(&self, now: VirtualTime) -> DateTime {
        self.stopped
            .unwrap_or_else(|| DateTime::from_unix(self.running_seconds(now)))
    }

    fn running_seconds(&self, now: VirtualTime) -> i64 {
        self.base_s.saturating_add((now.0 / NS_PER_S).cast_signed())
    }

    fn set_clock(&mut self, clock: DateTime, now: VirtualTime) {
        let wanted = clock.to_unix();
        self.base_s = wanted - (now.0 / NS_PER_S).cast_signed();
    }

    /// Reads port 0x71 (the index port cannot be read).
    pub(crate) fn read_data(&self, now: VirtualTime) -> u8 {
        let clock = self.clock(now);
        let number = match self.index {
            0x00 => clock.second,
            0x02 => clock.minute,
            0x04 => return self.hour_register(clock.hour),
            0x06 => clock.weekday(),
            0x07 => clock.day,
            0x08 => clock.month,
            0x09 => (clock.year % 100) as u8,
            CENTURY => (clock.year / 100) as u8,
            REG_C => return 0,
            REG_D => return REG_D_VALID,
            index => return self.memory[usize::from(index)],
        };
        self.encode(number)
    }

    /// Writes the index port 0x70; bit 7 masks NMIs, of which there are none.
    pub(crate) fn write_index(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Writes port 0x71.
    pub(crate) fn write_data(&mut self, value: u8, now: VirtualTime) {
        match self.index {
            0x00 | 0x02 | 0x04 | 0x07 | 0x08 | 0x09 | CENTURY => self.write_clock(value, now),
            // The weekday follows from the date.
            0x06 | REG_C | REG_D => {}
            REG_A => self.memory[usize::from(REG_A)] = value & !REG_A_UPDATE_IN_PROGRESS,
            REG_B => self.write_reg_b(value, now),
            index => self.memory[usize::from(index)] = value,
        }
    }

    fn write_clock(&mut self, value: u8, now: VirtualTime) {
        let mut clock = self.clock(now);
        let number = self.decode(value);
        match self.index {
            0x00 => clock.second = number,
            0x02 => clock.minute = number,
            0x04 => clock.hour = self.hour_from_register(value),
            0x07 => clock.day = number,
            0x08 => clock.month = number,
            0x09 => clock.year = clock.year / 100 * 100 + u16::from(number % 100),
            _ => clock.year = u16::from(number % 100) * 100 + clock.year % 100,
        }
        if self.stopped.is_some() {
            self.stopped = Some(clock);
        } else {
            self.set_clock(clock, now);
        }
    }

    fn write_reg_b(&mut self, value: u8, now: VirtualTime) {
        match (self.stopped, value & REG_B_SET != 0) {
            (None, true) => self.stopped = Some(self.clock(now)),
            (Some(clock), false) => {
                self.stopped = None;
                self.set_clock(clock, now);
            }
            _ => {}
        }
        self.memory[usize::from(REG_B)] = value;
    }

    fn hour_register(&self, hour: u8) -> u8 {
        if self.reg_b() & REG_B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour % 24 >= 12 { HOUR_PM } else { 0 };
        self.encode((hour % 24 + 11) % 12 + 1) | pm
    }

    fn hour_from_register(&self, value: u8) -> u8 {
        if self.reg_b() & REG_B_24_HOURS != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & !HOUR_PM) % 12;
        if value & HOUR_PM != 0 {
            hour + 12
        } else {
            hour
        }
    }

    fn encode(&self, number: u8) -> u8 {
        if self.reg_b() & REG_B_BINARY != 0 {
            number
        } else {
            ((number / 10 % 10) << 4) | (number % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.reg_b() & REG_B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    }

    pub(crate) fn save(&self) -> CmosState {
        CmosState {
            base_s: self.base_s,
            index: self.index,
            stopped: self.stopped.map(DateTime::save),
            memory: self.memory.to_vec(),
        }
    }

    pub(crate) fn restore(state: &CmosState) -> Result<Cmos, StateError> {
        let invalid = |field| StateError::Invalid {
            device: "cmos",
            field,
        };
        let memory: [u8; CMOS_BYTES] = state
            .memory
            .as_slice()
            .try_into()
            .map_err(|_| invalid("memory"))?;
        // What the guest can set is at most a few months beyond year 9999, or virtual time's end before year 0.
        let limit = 2 * LAST_SECOND.cast_signed();
        if state.index >= 0x80 || !(-limit..=limit).contains(&state.base_s) {
            return Err(invalid("index or base_s"));
        }
        let stopped = state.stopped.map(DateTime::restore).transpose()?;
        if stopped.is_some() != (memory[usize::from(REG_B)] & REG_B_SET != 0) {
            return Err(invalid("stopped"));
        }
        Ok(Cmos {
            base_s: state.base_s,
            index: state.index,
            stopped,
            memory,
        })
    }
}

#[cfg(test)]
mod tests;
