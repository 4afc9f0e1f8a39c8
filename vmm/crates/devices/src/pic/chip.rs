//! One 8259A: requests, priorities, the initialisation words (ICW) and operation words (OCW).

use super::state::{ChipState, InitStepState};
use crate::StateError;

/// The initialisation word that the chip expects at its odd port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InitStep {
    /// None: the odd port is the interrupt mask.
    Ready,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Debug)]
pub(super) struct Chip {
    /// Rising edges not yet acknowledged.
    edges: u8,
    /// The inputs' levels.
    lines: u8,
    in_service: u8,
    mask: u8,
    vector_base: u8,
    /// Inputs made level-triggered by the ELCR.
    elcr: u8,
    /// Inputs that follow their line whatever the ELCR says: the cascade.
    cascade: u8,
    init_step: InitStep,
    /// ICW1: an ICW4 follows.
    wants_icw4: bool,
    /// ICW1: no ICW3 follows.
    single: bool,
    /// The input with the lowest priority; the one after it has the highest.
    lowest_priority: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// The next read is a poll.
    poll: bool,
    /// The even port reads the in-service register instead of the requests.
    read_in_service: bool,
}

impl Chip {
    pub(super) fn new(elcr: u8, cascade: u8) -> Chip {
        Chip {
            edges: 0,
            lines: 0,
            in_service: 0,
            // Nothing gets through before the guest has initialised the chip.
            mask: 0xff,
            vector_base: 0,
            elcr,
            cascade,
            init_step: InitStep::Ready,
            wants_icw4: false,
            single: false,
            lowest_priority: 7,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            read_in_service: false,
        }
    }

    /// Sets the level of an input; whether it has changed.
    pub(super) fn set_line(&mut self, input: u8, high: bool) -> bool {
        let bit = 1 << input;
        if (self.lines & bit != 0) == high {
            return false;
        }
        self.lines ^= bit;
        if high {
            self.edges |= bit & !self.follows_line();
        }
        true
    }

    pub(super) fn level_inputs(&self) -> u8 {
        self.elcr
    }

    pub(super) fn set_level_inputs(&mut self, elcr: u8) {
        self.elcr = elcr;
        self.edges &= !self.follows_line();
    }

    fn follows_line(&self) -> u8 {
        self.elcr | self.cascade
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        self.edges | (self.lines & self.follows_line())
    }

    /// Rank of an input: 0 is the highest.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest_priority).wrapping_sub(1) & 7
    }

    fn highest(&self, set: u8) -> Option<u8> {
        (0..8)
            .filter(|input| set & (1 << input) != 0)
            .min_by_key(|input| self.rank(*input))
    }

    /// The input that would be acknowledged now.
    pub(super) fn pending(&self) -> Option<u8> {
        let candidate = self.highest(self.requests() & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested {
            blocking &= !self.cascade;
        }
        match self.highest(blocking) {
            Some(served) if self.rank(served) <= self.rank(candidate) => None,
            _ => Some(candidate),
        }
    }

    /// Accepts the pending input: its edge is gone and, without automatic EOI, it is in service.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let input = self.pending()?;
        let bit = 1 << input;
        self.edges &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest_priority = input;
        }
        Some(input)
    }

    pub(super) fn vector(&self, input: u8) -> u8 {
        self.vector_base | input
    }

    pub(super) fn read(&mut self, odd_port: bool) -> u8 {
        if self.poll {
            self.poll = false;
            return self.acknowledge().map_or(0, |input| 0x80 | input);
        }
        match (odd_port, self.read_in_service) {
            (true, _) => self.mask,
            (false, true) => self.in_service,
            (false, false) => self.requests(),
        }
    }

    pub(super) fn write(&mut self, odd_port: bool, value: u8) {
        match (odd_port, value) {
            (true, _) => self.write_odd(value),
            (false, value) if value & 0x10 != 0 => self.write_icw1(value),
            (false, value) if value & 0x08 != 0 => self.write_ocw3(value),
            (false, value) => self.write_ocw2(value),
        }
    }

    /// ICW1 resets the edge sense, the mask, priorities and modes. Lines stay as they are: an input that is high
    /// needs a new rising edge.
    fn write_icw1(&mut self, value: u8) {
        *self = Chip {
            lines: self.lines,
            mask: 0,
            vector_base: self.vector_base,
            init_step: InitStep::Icw2,
            wants_icw4: value & 0x01 != 0,
            single: value & 0x02 != 0,
            ..Chip::new(self.elcr, self.cascade)
        };
    }

    fn write_odd(&mut self, value: u8) {
        let after_icw3 = if self.wants_icw4 {
            InitStep::Icw4
        } else {
            InitStep::Ready
        };
        match self.init_step {
            InitStep::Ready => self.mask = value,
            InitStep::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init_step = if self.single {
                    after_icw3
                } else {
                    InitStep::Icw3
                };
            }
            // The wiring of the cascade is fixed, whatever ICW3 says.
            InitStep::Icw3 => self.init_step = after_icw3,
            InitStep::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.init_step = InitStep::Ready;
            }
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            1 => self.end_highest(false),
            3 => self.in_service &= !(1 << level),
            4 => self.rotate_on_auto_eoi = true,
            5 => self.end_highest(true),
            6 => self.lowest_priority = level,
            7 => {
                self.in_service &= !(1 << level);
                self.lowest_priority = level;
            }
            _ => {}
        }
    }

    /// Non-specific EOI.
    fn end_highest(&mut self, rotate: bool) {
        if let Some(input) = self.highest(self.in_service) {
            self.in_service &= !(1 << input);
            if rotate {
                self.lowest_priority = input;
            }
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        self.poll = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
    }

    pub(super) fn save(&self) -> ChipState {
        ChipState {
            edges: self.edges,
            lines: self.lines,
            in_service: self.in_service,
            mask: self.mask,
            vector_base: self.vector_base,
            elcr: self.elcr,
            init_step: match self.init_step {
                InitStep::Ready => InitStepState::Ready,
                InitStep::Icw2 => InitStepState::Icw2,
                InitStep::Icw3 => InitStepState::Icw3,
                InitStep::Icw4 => InitStepState::Icw4,
            },
            wants_icw4: self.wants_icw4,
            single: self.single,
            lowest_priority: self.lowest_priority,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            special_mask: self.special_mask,
            special_fully_nested: self.special_fully_nested,
            poll: self.poll,
            read_in_service: self.read_in_service,
        }
    }

    pub(super) fn restore(state: &ChipState, cascade: u8) -> Result<Chip, StateError> {
        if state.lowest_priority > 7 || state.vector_base & 7 != 0 {
            return Err(StateError::Invalid {
                device: "pic",
                field: "lowest_priority or vector_base",
            });
        }
        Ok(Chip {
            edges: state.edges,
            lines: state.lines,
            in_service: state.in_service,
            mask: state.mask,
            vector_base: state.vector_base,
            elcr: state.elcr,
            cascade,
            init_step: match state.init_step {
                InitStepState::Ready => InitStep::Ready,
                InitStepState::Icw2 => InitStep::Icw2,
                InitStepState::Icw3 => InitStep::Icw3,
                InitStepState::Icw4 => InitStep::Icw4,
            },
            wants_icw4: state.wants_icw4,
            single: state.single,
            lowest_priority: state.lowest_priority,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_mask: state.special_mask,
            special_fully_nested: state.special_fully_nested,
            poll: state.poll,
            read_in_service: state.read_in_service,
        })
    }
}
