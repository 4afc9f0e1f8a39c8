//! The recorder: entries into the log, real bytes in the format of the channel.

use format::{Entry, Event as LogEvent, ExitNumber, PartHeader, Seq};
use ft::Mark;

use crate::guest::PAGES;
use crate::plan::US;

use super::{Ev, Sim};

/// Bytes of a part of a large delta: small, so that deltas of many appends are cheap here.
const PART_LEN: usize = 80;

impl Sim {
    /// One entry at the guest's present point becomes one append.
    pub(super) fn append(&mut self, host: usize, event: LogEvent<'_>) {
        let Some(vmm) = self.hosts[host].vmm.as_ref() else {
            return;
        };
        let (Some(_), Some(live)) = (&vmm.log, &vmm.live) else {
            return;
        };
        let exit = ExitNumber(live.guest.exit);
        let (hash, ran) = (live.guest.hash(), live.ran);
        let entry = Entry { exit, event };
        let mut bytes = Vec::with_capacity(entry.encoded_len());
        entry.encode(&mut bytes);
        self.publish(host, bytes, hash, ran);
    }

    fn publish(&mut self, host: usize, bytes: Vec<u8>, hash: u64, ran: u64) {
        let clock = self.clock(host);
        let batch = self.plan.options.batch_us;
        let place = &mut self.hosts[host];
        let (Some(vmm), Some(shm)) = (place.vmm.as_mut(), place.shm.as_mut()) else {
            return;
        };
        let (Some(log), Some(live)) = (vmm.log.as_mut(), vmm.live.as_ref()) else {
            return;
        };
        if shm.session != log.session {
            return;
        }
        shm.appends.push_back(bytes);
        log.next += 1;
        log.tracker.appended(Mark {
            next: Seq(log.next),
            exit: ExitNumber(live.guest.exit),
            ran: std::time::Duration::from_nanos(ran),
            at: clock,
        });
        self.check.append(log.session, hash, ran);
        let daemon = place.daemon.as_mut();
        if let Some(daemon) = daemon.filter(|daemon| !daemon.flushing) {
            daemon.flushing = true;
            let inc = daemon.inc;
            self.after(batch * US, Ev::Flush(host, inc));
        }
    }

    /// The point has no number: registers and the pages that the replica does not have.
    pub(super) fn record_delta(&mut self, host: usize) {
        let many = self.rng.chance(self.plan.options.big_delta);
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let (Some(log), Some(live)) = (vmm.log.as_mut(), vmm.live.as_ref()) else {
            return;
        };
        let guest = &live.guest;
        let mut mask = 0;
        for index in 0..PAGES {
            if guest.pages()[index] != log.pages[index] {
                mask |= 1 << index;
                if !ft::canary::on(ft::canary::Canary::AbaPage) {
                    log.pages[index] = guest.pages()[index];
                }
            }
        }
        if many {
            mask = (1 << PAGES) - 1;
        }
        let before = self.check.last_hash(log.session);
        let mut data = Vec::new();
        guest.save_point(mask, &mut data);
        let (hash, ran, exit) = (guest.hash(), live.ran, ExitNumber(guest.exit));
        let mut encoded = Vec::new();
        let event = LogEvent::Delta(&data);
        Entry { exit, event }.encode(&mut encoded);
        self.seen.deltas += 1;
        if !many {
            return self.publish(host, encoded, hash, ran);
        }
        let total = encoded.len() as u64;
        let parts = encoded.len().div_ceil(PART_LEN);
        for (index, piece) in encoded.chunks(PART_LEN).enumerate() {
            let header = PartHeader {
                total: if index == 0 { total } else { 0 },
                offset: (index * PART_LEN) as u64,
            };
            let event = LogEvent::Part(header, piece);
            let mut bytes = Vec::with_capacity(piece.len() + 24);
            Entry { exit, event }.encode(&mut bytes);
            let whole = index + 1 == parts;
            // Until its last part has come a delta is as good as not there.
            self.publish(host, bytes, if whole { hash } else { before }, ran);
        }
    }
}
