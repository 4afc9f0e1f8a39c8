//! What the world sees: packets and answers.

use crate::guest::{CLIENTS, KEYS, Packet, Request, Sector};

use super::Checker;

/// What clients know of a key.
#[derive(Debug, Default)]
pub(crate) struct Key {
    /// The newest version that an answer has told.
    told: u64,
    /// Versions that were told, and their values.
    values: Vec<(u64, u64)>,
    /// Values that clients have asked to write.
    asked: Vec<u64>,
}

impl Checker {
    /// It is decided that a packet leaves the VM: only the machine that is on may do that.
    pub(crate) fn decides(&mut self, now: u64, host: usize, packet: &Packet) {
        let current = self.life;
        if packet.life != current {
            let what = format_args!(
                "host{host} sends a packet of life {} while life {current} is on",
                packet.life
            );
            self.violated("two machines", now, what);
        }
    }

    /// A packet leaves the VM. Duplicates are allowed, gaps too (a network loses packets); another packet
    /// in the same place is not, nor an earlier one after a later one from the same process. What a machine
    /// before this one had decided to send may still come: its process stood between decision and deed, as
    /// a network could have held the packet for as long.
    pub(crate) fn packet(&mut self, now: u64, host: usize, inc: u32, packet: &Packet) {
        if packet.life < self.life {
            return;
        }
        let last = self.released.iter_mut().find(|(other, _)| *other == inc);
        match last {
            Some((_, last)) if packet.index <= *last => {
                let what = format_args!("host{host} sends packet {} after {last}", packet.index);
                let what = what.to_string();
                return self.violated("order", now, format_args!("{what}"));
            }
            Some((_, last)) => *last = packet.index,
            None => self.released.push((inc, packet.index)),
        }
        match self
            .packets
            .binary_search_by_key(&packet.index, |known| known.index)
        {
            Ok(at) if self.packets[at] != *packet => {
                let known = self.packets[at];
                let what =
                    format_args!("host{host} sends {packet:?}, the world has seen {known:?}");
                self.violated("contradiction", now, what);
            }
            Ok(_) => {}
            Err(at) => self.packets.insert(at, *packet),
        }
    }

    /// A cold start: another machine, with the same disk.
    pub(crate) fn cold(&mut self, now: u64, inc: u32, life: u64) {
        let last = self.life;
        if life <= last {
            let what = format_args!("VMM {inc} starts life {life} after {last}");
            self.violated("two machines", now, what);
        }
        self.life = life;
        self.packets.clear();
        self.released.clear();
    }

    /// A machine that is started anew finds this on its disk: what clients were told is there, or newer.
    pub(crate) fn finds(&mut self, now: u64, host: usize, key: u8, sector: &Sector) {
        let told = self.answers[usize::from(key) % KEYS].told;
        if sector.version < told {
            let what = format_args!(
                "host{host} starts the VM with key {key} at {sector:?}, clients were told {told:#x}"
            );
            self.violated("disk", now, what);
        }
    }

    /// A client asks.
    pub(crate) fn asks(&mut self, request: &Request) {
        let key = &mut self.answers[usize::from(request.key) % KEYS];
        self.floors[usize::from(request.client) % CLIENTS] = key.told;
        if let Some(value) = request.put {
            key.asked.push(value);
        }
    }

    /// A client is answered: by something that one machine could have said.
    pub(crate) fn answered(&mut self, now: u64, request: &Request, packet: &Packet) {
        let floor = self.floors[usize::from(request.client) % CLIENTS];
        let key = &mut self.answers[usize::from(request.key) % KEYS];
        let sector = packet.sector;
        let known = key
            .values
            .iter()
            .find(|(version, _)| *version == sector.version);
        let fits = known.is_none_or(|(_, value)| *value == sector.value);
        let asked = sector.version == 0 || key.asked.contains(&sector.value);
        let own = request.put.is_none_or(|value| value == sector.value);
        let told = key.told;
        if known.is_none() {
            key.values.push((sector.version, sector.value));
        }
        key.told = told.max(sector.version);
        if sector.version < floor {
            let what = format_args!(
                "{request:?} was answered {sector:?}, older than {floor:#x} told before it was asked"
            );
            self.violated("stale answer", now, what);
        } else if !fits || !asked || !own {
            let what = format_args!("{request:?} was answered {sector:?}");
            self.violated("wrong answer", now, what);
        }
    }
}
