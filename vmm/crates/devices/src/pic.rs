//! The two 8259A interrupt controllers of a PC and their ELCR (Intel 8259A data sheet; PIIX data sheet for the ELCR).
//!
//! Lines are levels that the devices derive from their own state; a rising edge is latched for inputs in edge mode, a
//! level input requests for as long as its line is high. The cascade (the slave's output at the master's IR2) is
//! recomputed after every change, so it can be neither lost nor stale, and no spurious vector comes of it.
//! LTIM (ICW1) is ignored, as in every PC with an ELCR, and so are buffered and MCS-80 mode.

mod chip;
mod state;

use chip::Chip;
pub use state::{ChipState, InitStepState, PicState};

use crate::StateError;

/// Inputs that may be made level-triggered, master then slave: not 0, 1, 2, 8 and 13.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
/// The master's input that carries the slave.
const CASCADE: u8 = 2;

/// Both controllers, wired as in a PC.
#[derive(Debug)]
pub(crate) struct Pics {
    master: Chip,
    slave: Chip,
}

impl Pics {
    /// Controllers at power-on with the given IRQs (bit n = IRQ n) already level-triggered, as firmware leaves them.
    pub(crate) fn new(level_triggered: u16) -> Pics {
        let [master, slave] = level_triggered.to_le_bytes();
        Pics {
            master: Chip::new(master & ELCR_WRITABLE[0], 1 << CASCADE),
            slave: Chip::new(slave & ELCR_WRITABLE[1], 0),
        }
    }

    /// Sets the level of IRQ `irq` (0 to 15, not 2).
    pub(crate) fn set_line(&mut self, irq: u8, high: bool) {
        debug_assert!(irq < 16 && irq != CASCADE);
        let chip = if irq < 8 {
            &mut self.master
        } else {
            &mut self.slave
        };
        if chip.set_line(irq & 7, high) {
            self.cascade();
        }
    }

    /// A low pulse with its rising edge on `irq`: the 8254's output at the end of a period.
    pub(crate) fn pulse(&mut self, irq: u8) {
        self.set_line(irq, false);
        self.set_line(irq, true);
    }

    /// INT of the master: the CPU has an interrupt to take.
    pub(crate) fn pending(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The INTA cycle: accepts the interrupt of the highest priority and returns its vector. Without any, it is the
    /// master's spurious vector (input 7), as on the real chip.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.acknowledge() {
            Some(CASCADE) => {
                let input = self.slave.acknowledge();
                self.slave.vector(input.unwrap_or(7))
            }
            input => self.master.vector(input.unwrap_or(7)),
        };
        self.cascade();
        vector
    }

    /// Reads one of the ports 0x20, 0x21, 0xa0, 0xa1, 0x4d0 and 0x4d1.
    pub(crate) fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0),
            0xa0 | 0xa1 => self.slave.read(port & 1 != 0),
            0x4d0 => self.master.level_inputs(),
            _ => self.slave.level_inputs(),
        };
        self.cascade();
        value
    }

    /// Writes one of the ports of [`Pics::read`].
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0x21 => self.master.write(port & 1 != 0, value),
            0xa0 | 0xa1 => self.slave.write(port & 1 != 0, value),
            0x4d0 => self.master.set_level_inputs(value & ELCR_WRITABLE[0]),
            _ => self.slave.set_level_inputs(value & ELCR_WRITABLE[1]),
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        self.master
            .set_line(CASCADE, self.slave.pending().is_some());
    }

    pub(crate) fn save(&self) -> PicState {
        PicState {
            master: self.master.save(),
            slave: self.slave.save(),
        }
    }

    pub(crate) fn restore(state: &PicState) -> Result<Pics, StateError> {
        Ok(Pics {
            master: Chip::restore(&state.master, 1 << CASCADE)?,
            slave: Chip::restore(&state.slave, 0)?,
        })
    }
}

#[cfg(test)]
mod tests;
