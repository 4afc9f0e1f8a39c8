//! Who may send in the guest's name, and whether what is sent fits together.
//!
//! The first host that sends is the sender. When another one begins, it becomes the sender, and the one
//! before is superseded until it is readmitted: what it still sends is late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::frame::{Content, Flow, Segment, content, source};
use super::stream::{Misfit, Stream};
use crate::monotonic::Moment;
use crate::report::{Measure, Report};
use crate::stage::SiteId;

/// The guest's address, as `pollux` gives it by default.
const GUEST_MAC: [u8; 6] = [0x02, 0x50, 0x4c, 0x58, 0, 1];
/// Frames that a late one may repeat.
const REMEMBERED: usize = 1 << 16;
/// Streams kept; more connections than any test has.
const STREAMS_KEPT: usize = 1 << 14;
/// Findings in words.
const DESCRIBED: usize = 8;

/// A change of sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handover {
    /// The sender from now on.
    pub(crate) to: SiteId,
    /// The last frame of the one before, and the first of this.
    pub(crate) last: Option<Moment>,
    pub(crate) first: Moment,
}

impl Handover {
    /// How long the guest sent nothing, in ms; unknown for the first sender of all.
    pub(crate) fn silence_ms(&self) -> Option<f64> {
        self.last.map(|last| self.first.since(last) as f64 / 1e6)
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Frames in the guest's name.
    pub(crate) frames: u64,
    /// Frames of superseded senders.
    pub(crate) late: u64,
    /// Late frames that do not fit to what the new sender sends: two were primary.
    pub(crate) double_primary: u64,
    /// Frames of the sender that contradict what the stream held before.
    pub(crate) contradictory: u64,
    /// The first findings in words.
    pub(crate) described: Vec<String>,
}

impl Verdict {
    /// Adds it to a report.
    pub(crate) fn report(&self, report: &mut Report) {
        report.push(Measure::count("double_primary", self.double_primary).noted(NOT_COVERED));
        report.push(Measure::count("late_frames", self.late));
        if self.double_primary > 0 {
            report.fail(format!(
                "{} frames of a second primary",
                self.double_primary
            ));
        }
        if self.contradictory > 0 {
            let count = self.contradictory;
            report.fail(format!("{count} frames contradict what was sent before"));
        }
        if self.frames == 0 {
            report.fail("no frame of the guest was seen");
        }
        for line in &self.described {
            eprintln!("wire: {line}");
        }
    }
}

/// What a reader must know of `double_primary`.
const NOT_COVERED: &str = "seen on the client's wire; the disk is not watched";

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    sender: Option<SiteId>,
    superseded: BTreeSet<SiteId>,
    last_frame: Option<Moment>,
    handovers: Vec<Handover>,
    streams: BTreeMap<Flow, Stream>,
    remembered: VecDeque<u64>,
    found: Verdict,
}

impl Judge {
    /// A frame came from this host.
    pub(super) fn frame(&mut self, from: SiteId, at: Moment, bytes: &[u8]) {
        if source(bytes) != Some(GUEST_MAC) {
            return;
        }
        self.found.frames += 1;
        let is_late = self.superseded.contains(&from);
        if !is_late {
            self.hand_over(from, at);
            self.last_frame = Some(at);
        }
        let fits = match content(bytes) {
            Content::Tcp(segment) => self.segment(&segment, is_late),
            Content::Other => self.other(bytes, is_late),
        };
        if is_late {
            self.found.late += 1;
        }
        if let Err(why) = fits {
            if is_late {
                self.found.double_primary += 1;
            } else {
                self.found.contradictory += 1;
            }
            self.describe(format!("a frame of host {from} {why}"));
        }
    }

    /// This host's VMM holds nothing of the old state any more.
    pub(super) fn readmit(&mut self, id: SiteId) {
        self.superseded.remove(&id);
    }

    /// The changes of sender so far; the first is the beginning.
    pub(super) fn handovers(&self) -> &[Handover] {
        &self.handovers
    }

    /// On all that was seen. What late frames claim and the new sender never came to is found now.
    pub(super) fn verdict(&mut self) -> Verdict {
        let mut verdict = self.found.clone();
        let open: u64 = self.streams.values().map(Stream::open_claims).sum();
        verdict.double_primary += open;
        if open > 0 {
            verdict.described.push(format!(
                "{open} late segments hold what the new sender never came to"
            ));
        }
        verdict
    }

    fn hand_over(&mut self, from: SiteId, at: Moment) {
        if self.sender == Some(from) {
            return;
        }
        self.superseded.extend(self.sender);
        self.sender = Some(from);
        self.handovers.push(Handover {
            to: from,
            last: self.last_frame,
            first: at,
        });
    }

    fn segment(&mut self, segment: &Segment<'_>, is_late: bool) -> Result<(), &'static str> {
        if self.streams.len() == STREAMS_KEPT && !self.streams.contains_key(&segment.flow) {
            self.streams.pop_first();
        }
        let stream = self.streams.entry(segment.flow).or_default();
        if segment.is_start && !is_late {
            stream.restart();
        }
        let put = if is_late {
            segment
                .acknowledged
                .into_iter()
                .for_each(|to| stream.acknowledge_late(to));
            stream.put_late(segment.sequence, segment.payload)
        } else {
            segment
                .acknowledged
                .into_iter()
                .for_each(|to| stream.acknowledge(to));
            stream.put(segment.sequence, segment.payload)
        };
        put.map_err(|misfit| match misfit {
            Misfit::Differs => "holds other bytes than were seen at their place in the stream",
            Misfit::TooMany => "is one late frame too many with bytes that nobody else sent",
        })
    }

    fn other(&mut self, bytes: &[u8], is_late: bool) -> Result<(), &'static str> {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let hash = hasher.finish();
        if is_late {
            let known = self.remembered.contains(&hash);
            return known
                .then_some(())
                .ok_or("is late, and nobody sent one like it before");
        }
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back(hash);
        Ok(())
    }

    fn describe(&mut self, what: String) {
        if self.found.described.len() < DESCRIBED {
            self.found.described.push(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::made;
    use super::*;
    use crate::stage::SITES;

    const PORT: u16 = 40_000;

    struct Scene(Judge, u64);

    impl Scene {
        fn new() -> Self {
            Self(Judge::default(), 0)
        }

        fn sends(&mut self, site: usize, frame: &[u8]) -> &mut Self {
            self.1 += 1;
            self.0.frame(SITES[site], Moment(self.1), frame);
            self
        }

        fn tcp(&mut self, site: usize, place: u32, payload: &[u8]) -> &mut Self {
            self.sends(site, &made::tcp(PORT, place, 1, payload))
        }

        fn counts(&mut self) -> (u64, u64, u64) {
            let verdict = self.0.verdict();
            (verdict.late, verdict.double_primary, verdict.contradictory)
        }
    }

    #[test]
    fn a_clean_takeover_is_clean() {
        let mut scene = Scene::new();
        scene.tcp(0, 100, b"abc").tcp(0, 103, b"def");
        // The new primary repeats what it cannot know to have been sent, and goes on.
        scene.tcp(1, 103, b"def").tcp(1, 106, b"ghi");
        assert_eq!(scene.counts(), (0, 0, 0));
        let [begin, over] = scene.0.handovers() else {
            panic!("not two handovers");
        };
        assert_eq!(
            (begin.to, begin.last, begin.first),
            (SITES[0], None, Moment(1))
        );
        assert_eq!(
            (over.to, over.last, over.first),
            (SITES[1], Some(Moment(2)), Moment(3))
        );
    }

    #[test]
    fn a_late_frame_that_the_new_sender_has_replayed_passes() {
        let mut scene = Scene::new();
        scene
            .tcp(0, 100, b"abc")
            .tcp(1, 103, b"def")
            .tcp(0, 103, b"def");
        assert_eq!(scene.counts(), (1, 0, 0));
        // Sent by the old one only; the new one knows it as sent.
        let mut scene = Scene::new();
        scene
            .tcp(0, 100, b"abc")
            .sends(1, &made::other(b"here"))
            .tcp(0, 103, b"def");
        assert_eq!(scene.counts(), (1, 1, 0), "open until the new one goes on");
        scene.tcp(1, 106, b"ghi");
        assert_eq!(scene.counts(), (1, 0, 0));
    }

    #[test]
    fn an_old_primary_that_goes_on_is_found() {
        let mut scene = Scene::new();
        scene
            .tcp(0, 100, b"abc")
            .tcp(1, 103, b"def")
            .tcp(0, 103, b"xyz");
        assert_eq!(scene.counts(), (1, 1, 0));
        let mut scene = Scene::new();
        scene
            .tcp(0, 100, b"abc")
            .tcp(1, 103, b"def")
            .tcp(0, 106, b"more")
            .tcp(1, 106, b"else");
        assert_eq!(scene.counts(), (1, 0, 1));
        let mut scene = Scene::new();
        scene
            .tcp(0, 100, b"abc")
            .tcp(1, 103, b"def")
            .tcp(0, 106, b"more");
        assert_eq!(scene.counts(), (1, 1, 0));
    }

    #[test]
    fn an_old_primary_that_acknowledges_what_the_new_one_never_got_is_found() {
        let mut scene = Scene::new();
        scene.tcp(0, 100, b"abc").tcp(1, 103, b"def");
        scene.sends(0, &made::tcp(PORT, 103, 50, b""));
        assert_eq!(scene.counts(), (1, 1, 0));
        scene.sends(1, &made::tcp(PORT, 106, 50, b""));
        assert_eq!(scene.counts(), (1, 0, 0));
    }

    #[test]
    fn a_new_primary_that_contradicts_the_old_is_found() {
        let mut scene = Scene::new();
        scene.tcp(0, 100, b"abc").tcp(1, 100, b"abX");
        assert_eq!(scene.counts(), (0, 0, 1));
    }

    #[test]
    fn other_late_frames_must_repeat_one_that_was_seen() {
        let mut scene = Scene::new();
        scene
            .sends(0, &made::other(b"is at"))
            .sends(1, &made::other(b"here"));
        scene.sends(0, &made::other(b"is at"));
        assert_eq!(scene.counts(), (1, 0, 0));
        scene.sends(0, &made::other(b"who has"));
        assert_eq!(scene.counts(), (2, 1, 0));
    }

    #[test]
    fn a_host_that_is_readmitted_may_be_the_sender_again() {
        let mut scene = Scene::new();
        scene.tcp(0, 100, b"abc").tcp(1, 103, b"def");
        scene.0.readmit(SITES[0]);
        scene.tcp(0, 106, b"ghi").tcp(1, 109, b"jkl");
        assert_eq!(scene.counts(), (1, 1, 0), "now the other one is late");
    }

    #[test]
    fn a_new_connection_between_the_same_ports_is_another_stream() {
        let mut scene = Scene::new();
        scene.tcp(0, 100, b"abc");
        let mut start = made::tcp(PORT, 99, 0, b"");
        start[14 + 20 + 13] = 0x12; // SYN, ACK
        scene.sends(0, &start).tcp(0, 100, b"xyz");
        assert_eq!(scene.counts(), (0, 0, 0));
    }

    #[test]
    fn frames_of_others_do_not_count() {
        let mut scene = Scene::new();
        let mut frame = made::tcp(PORT, 100, 1, b"abc");
        frame[6] = 0x04;
        scene.sends(0, &frame).sends(1, &frame);
        assert_eq!(scene.0.verdict(), Verdict::default());
    }
}
