//! The 8254 programmable interval timer: channel 0 (IRQ 0), channel 2 (speaker) and port 0x61 (Intel 8254 data sheet).
//!
//! Counts are functions of virtual time; nothing runs. Ticks of channel 0 that fall due together are one interrupt and
//! the rest are counted as lost. Differences from the chip, all as other virtual machines have them: a new count takes
//! effect at once in every mode, writing the first byte of a count does not stop the old one, and the odd counts of
//! mode 3 are not told apart. Channel 1 (DRAM refresh) answers like the others and drives nothing.

mod channel;
mod state;

use channel::Channel;
pub use state::{AccessState, ChannelState, CountingState, PitState};

use crate::StateError;
use crate::time::VirtualTime;

/// Periods of channel 0 shorter than this many ticks (100 us) interrupt only every so many periods: a guest cannot
/// make the host wake up more often.
const MIN_PERIOD_TICKS: u64 = 120;
/// Half a period of the refresh signal in port 0x61, bit 4.
const REFRESH_TOGGLE_NS: u64 = 15_085;

const PORT61_GATE2: u8 = 0x01;
const PORT61_REFRESH: u8 = 0x10;
const PORT61_OUT2: u8 = 0x20;

/// The three channels and port 0x61.
#[derive(Debug)]
pub(crate) struct Pit {
    channels: [Channel; 3],
    /// Bits 0 to 3 of port 0x61 as written.
    port61: u8,
    /// Channel 0 raises IRQ 0 when it has counted this many ticks; `None`: not any more.
    next_edge: Option<u64>,
    ticks: u64,
    lost_ticks: u64,
}

impl Pit {
    pub(crate) fn new() -> Pit {
        Pit {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            port61: 0,
            next_edge: None,
            ticks: 0,
            lost_ticks: 0,
        }
    }

    /// Interrupts raised, and those of them that were dropped because they fell due together with another.
    pub(crate) fn ticks(&self) -> (u64, u64) {
        (self.ticks, self.lost_ticks)
    }

    /// When IRQ 0 is raised next.
    pub(crate) fn next_tick(&self) -> Option<VirtualTime> {
        Some(self.channels[0].started()?.after_pit_ticks(self.next_edge?))
    }

    /// True when IRQ 0 has risen by `now`.
    pub(crate) fn advance(&mut self, now: VirtualTime) -> bool {
        let Some(edge) = self.next_edge else {
            return false;
        };
        let elapsed = self.channels[0].elapsed(now);
        if elapsed < edge {
            return false;
        }
        self.ticks = self.ticks.saturating_add(1);
        self.next_edge = self.edge_interval().map(|interval| {
            let due = (elapsed - edge) / interval + 1;
            self.lost_ticks = self.lost_ticks.saturating_add(due - 1);
            edge + due * interval
        });
        true
    }

    /// Ticks between two interrupts of channel 0, where its mode is periodic.
    fn edge_interval(&self) -> Option<u64> {
        let period = self.channels[0].period()?;
        Some(period * MIN_PERIOD_TICKS.div_ceil(period))
    }

    /// Reads one of the ports 0x40 to 0x43 and 0x61.
    pub(crate) fn read(&mut self, port: u16, now: VirtualTime) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now),
            0x61 => self.read_port61(now),
            // The control register cannot be read.
            _ => 0xff,
        }
    }

    fn read_port61(&self, now: VirtualTime) -> u8 {
        let refresh = if now.0 / REFRESH_TOGGLE_NS % 2 == 1 {
            PORT61_REFRESH
        } else {
            0
        };
        let out2 = if self.channels[2].output(now) {
            PORT61_OUT2
        } else {
            0
        };
        self.port61 | refresh | out2
    }

    /// Writes one of the ports of [`Pit::read`].
    pub(crate) fn write(&mut self, port: u16, value: u8, now: VirtualTime) {
        match port {
            0x40 => {
                if self.channels[0].write(value, now) {
                    self.arm();
                }
            }
            0x41 | 0x42 => {
                self.channels[usize::from(port - 0x40)].write(value, now);
            }
            0x43 => self.write_control(value, now),
            _ => {
                self.port61 = value & 0x0f;
                self.channels[2].set_gate(value & PORT61_GATE2 != 0, now);
            }
        }
    }

    /// A count was written to channel 0: when does its output rise?
    fn arm(&mut self) {
        self.next_edge = self
            .edge_interval()
            .or_else(|| self.channels[0].terminal_count());
    }

    fn write_control(&mut self, value: u8, now: VirtualTime) {
        match value >> 6 {
            3 => self.read_back(value, now),
            channel => {
                let selected = usize::from(channel);
                if value & 0x30 == 0 {
                    self.channels[selected].latch_count(now);
                    return;
                }
                self.channels[selected].set_mode(value);
                if selected == 0 {
                    self.next_edge = None;
                }
            }
        }
    }

    fn read_back(&mut self, value: u8, now: VirtualTime) {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value & (2 << index) == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count(now);
            }
            if value & 0x10 == 0 {
                channel.latch_status(now);
            }
        }
    }

    pub(crate) fn save(&self) -> PitState {
        PitState {
            channels: [
                self.channels[0].save(),
                self.channels[1].save(),
                self.channels[2].save(),
            ],
            port61: self.port61,
            next_edge: self.next_edge,
            ticks: self.ticks,
            lost_ticks: self.lost_ticks,
        }
    }

    pub(crate) fn restore(state: &PitState) -> Result<Pit, StateError> {
        let pit = Pit {
            channels: [
                Channel::restore(&state.channels[0])?,
                Channel::restore(&state.channels[1])?,
                Channel::restore(&state.channels[2])?,
            ],
            port61: state.port61,
            next_edge: state.next_edge,
            ticks: state.ticks,
            lost_ticks: state.lost_ticks,
        };
        if pit.port61 > 0x0f || (pit.next_edge.is_some() && pit.channels[0].started().is_none()) {
            return Err(StateError::Invalid {
                device: "pit",
                field: "port61 or next_edge",
            });
        }
        Ok(pit)
    }
}

#[cfg(test)]
mod tests;
