//! What the data thread counts, and how long acknowledgements take by stage.
//!
//! Plain numbers of one thread; a copy is made for whoever asks. The stages of one acknowledgement,
//! measured for flushed appends: **queued** from the VMM's flush request to the hand-over to the
//! kernel, **sent** until the kernel has taken it all, **acknowledged** until the peer's record is
//! here, **seen** until the VMM has looked, by its word in the control page.

use std::collections::VecDeque;

use hdrhistogram::Histogram;
use serde::Serialize;

/// How many acknowledgements are timed at once; further ones are not measured.
const MAX_TIMED: usize = 256;
/// The longest time that a histogram holds, in ns.
const MAX_NS: u64 = 60_000_000_000;

/// Counters that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Frames sent, resent ones included.
    pub frames_out: u64,
    /// Appends sent.
    pub appends_out: u64,
    /// Bytes of bodies sent.
    pub bytes_out: u64,
    /// Frames committed.
    pub frames_in: u64,
    /// Appends committed.
    pub appends_in: u64,
    /// Bytes of bodies committed.
    pub bytes_in: u64,
    /// Acknowledgement records sent.
    pub acks_out: u64,
    /// Acknowledgement records received.
    pub acks_in: u64,
    /// Connections of sessions.
    pub connects: u64,
    /// Connections lost.
    pub losses: u64,
    /// System calls of the data thread.
    pub enters: u64,
    /// Times that the data thread slept.
    pub sleeps: u64,
    /// Times that it began to spin.
    pub spins: u64,
    /// Nanoseconds that it spun.
    pub spin_ns: u64,
    /// Kicks received.
    pub kicks: u64,
    /// Appends taken that no kick came for.
    pub kicks_suppressed: u64,
    /// Calls made to the VMM.
    pub calls: u64,
    /// Updates of the used index without a call.
    pub calls_suppressed: u64,
    /// Times that the kernel took only a part of a message.
    pub short_sends: u64,
    /// Times that the delivery ring was full.
    pub delivery_full: u64,
    /// Notices that were dropped because the VMM had no buffer for them.
    pub notices_dropped: u64,
}

/// Histograms in ns, and counts of appends for the batch size.
#[derive(Debug, Clone)]
pub struct Histograms {
    /// Flush request to hand-over to the kernel.
    pub queued: Histogram<u64>,
    /// Hand-over to completion of the send.
    pub sent: Histogram<u64>,
    /// Completion of the send to the acknowledgement.
    pub acknowledged: Histogram<u64>,
    /// The acknowledgement, told to the VMM, to its sight there.
    pub seen: Histogram<u64>,
    /// Appends in a frame.
    pub batch: Histogram<u64>,
}

impl Default for Histograms {
    fn default() -> Self {
        let of_ns = || Histogram::new_with_bounds(1, MAX_NS, 2).expect("constant bounds");
        Self {
            queued: of_ns(),
            sent: of_ns(),
            acknowledged: of_ns(),
            seen: of_ns(),
            batch: Histogram::new_with_bounds(1, 1 << 20, 2).expect("constant bounds"),
        }
    }
}

/// All that the data thread measures.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Counters.
    pub counters: Counters,
    /// Histograms.
    pub histograms: Histograms,
}

impl Stats {
    /// A frame with this many appends and bytes goes out.
    pub fn frame_out(&mut self, count: u32, len: usize) {
        self.counters.frames_out += 1;
        self.counters.appends_out += u64::from(count);
        self.counters.bytes_out += len as u64;
        self.histograms.batch.saturating_record(count.into());
    }

    /// A frame with this many appends and bytes was committed.
    pub fn frame_in(&mut self, count: u32, len: usize) {
        self.counters.frames_in += 1;
        self.counters.appends_in += u64::from(count);
        self.counters.bytes_in += len as u64;
    }
}

/// One flushed append on its way.
#[derive(Debug, Clone, Copy)]
struct Timed {
    seq: u64,
    departed: u64,
    sent: u64,
}

/// The times of acknowledgements that are outstanding.
#[derive(Debug, Default)]
pub struct AckTimes {
    outstanding: VecDeque<Timed>,
    queued_ns: VecDeque<u64>,
    /// The acknowledgement that was told last, and when, as long as the VMM has not seen it.
    told: Option<(u64, u64)>,
}

impl AckTimes {
    /// Forgets all: a new connection resends.
    pub fn clear(&mut self) {
        self.outstanding.clear();
        self.queued_ns.clear();
        self.told = None;
    }

    /// A frame with the appends `from..to` is handed to the kernel now. It is timed where the newest
    /// flush request, made at `flush_ns`, is for one of them.
    pub fn departs(&mut self, flush: u64, from: u64, to: u64, flush_ns: u64, now: u64) {
        if flush > from && flush <= to && flush_ns <= now && self.outstanding.len() < MAX_TIMED {
            self.outstanding.push_back(Timed {
                seq: to,
                departed: now,
                sent: 0,
            });
            self.queued_ns.push_back(now - flush_ns);
        }
    }

    /// The kernel has taken everything below `seq`.
    pub fn sent(&mut self, seq: u64, now: u64) {
        if let Some(last) = self.outstanding.back_mut()
            && last.seq == seq
        {
            last.sent = now;
        }
    }

    /// Everything below `seq` is acknowledged.
    pub fn acknowledged(&mut self, seq: u64, now: u64, stats: &mut Stats) {
        while let Some(first) = self.outstanding.front()
            && first.seq <= seq
        {
            let sent = if first.sent == 0 { now } else { first.sent };
            let histograms = &mut stats.histograms;
            let queued = self.queued_ns.pop_front().unwrap_or(0);
            histograms.queued.saturating_record(queued.max(1));
            histograms
                .sent
                .saturating_record((sent - first.departed).max(1));
            histograms
                .acknowledged
                .saturating_record(now.saturating_sub(sent).max(1));
            self.outstanding.pop_front();
            self.told = Some((seq, now));
        }
    }

    /// The VMM has seen that everything below `seq` is acknowledged, at `seen_ns`. Where it has not looked
    /// between two acknowledgements the first is not measured.
    pub fn seen(&mut self, seq: u64, seen_ns: u64, stats: &mut Stats) {
        if let Some((_, at)) = self.told.take_if(|(told, _)| *told == seq) {
            let seen = &mut stats.histograms.seen;
            seen.saturating_record(seen_ns.saturating_sub(at).max(1));
        }
    }
}
