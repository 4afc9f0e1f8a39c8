//! Reading a log: frames in order, and the entries in them.

use crate::{Entry, Error, Frame, FrameFlags, Seq};

/// Where a run of frames ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// At its `END` frame: the log was closed in order.
    Closed,
    /// Cut: the bytes end without `END`, perhaps in the middle of a frame.
    Cut,
}

/// Reads the frames of a log that is in memory, in order and without gaps.
#[derive(Debug, Clone)]
pub struct FrameReader<'a> {
    rest: &'a [u8],
    len: usize,
    next: Option<Seq>,
    tail: Option<Tail>,
}

impl<'a> FrameReader<'a> {
    /// A reader of `bytes`, which begin with a frame.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            len: bytes.len(),
            next: None,
            tail: None,
        }
    }

    /// Offset of the next frame in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.len - self.rest.len()
    }

    /// How the log ends, once [`FrameReader::next_frame`] has returned `None`.
    #[must_use]
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// The next whole frame; `None` at the end, whether closed or cut (see [`FrameReader::tail`]).
    ///
    /// # Errors
    /// Damage at [`FrameReader::offset`], or a sequence number that does not follow.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'a>>, Error> {
        if self.tail.is_some() {
            return Ok(None);
        }
        let frame = match Frame::decode(&mut self.rest) {
            Ok(frame) => frame,
            Err(Error::Truncated { .. }) => {
                self.tail = Some(Tail::Cut);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let header = frame.header;
        if self.next.is_some_and(|next| next != header.first) {
            return Err(Error::Field("frame header: a gap in the sequence numbers"));
        }
        self.next = Some(header.next());
        if header.flags.contains(FrameFlags::END) {
            self.tail = Some(Tail::Closed);
            return Ok(None);
        }
        Ok(Some(frame))
    }
}

/// Reads the entries of a frame's body or of an append. Parts come as they are: see
/// [`Assembler`](crate::Assembler).
#[derive(Debug, Clone)]
pub struct EntryReader<'a> {
    rest: &'a [u8],
}

impl<'a> EntryReader<'a> {
    /// A reader of `body`.
    #[must_use]
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }
}

impl<'a> Iterator for EntryReader<'a> {
    type Item = Result<Entry<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = Entry::decode(&mut self.rest);
        if entry.is_err() {
            self.rest = &[];
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Epoch, Event, ExitNumber, FrameHeader, SessionId, encode_frame};

    fn log(frames: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let header = |first, count, flags| FrameHeader {
            flags,
            session: SessionId([1; 16]),
            epoch: Epoch(1),
            first: Seq(first),
            count,
            body_len: 0,
            stamp_ns: 0,
        };
        for index in 0..frames {
            let mut body = Vec::new();
            for exit in 0..2 {
                let event = Event::Time { ns: index };
                Entry {
                    exit: ExitNumber(index + exit),
                    event,
                }
                .encode(&mut body);
            }
            encode_frame(header(index * 2, 2, FrameFlags::NONE), &body, &mut out);
        }
        encode_frame(header(frames * 2, 0, FrameFlags::END), &[], &mut out);
        out
    }

    fn count(bytes: &[u8]) -> (usize, Option<Tail>) {
        let mut reader = FrameReader::new(bytes);
        let mut entries = 0;
        while let Some(frame) = reader.next_frame().unwrap() {
            entries += EntryReader::new(frame.body).map(Result::unwrap).count();
        }
        (entries, reader.tail().cloned())
    }

    #[test]
    fn a_closed_log_reads_whole() {
        assert_eq!(count(&log(5)), (10, Some(Tail::Closed)));
    }

    #[test]
    fn a_cut_log_reads_up_to_its_last_whole_frame() {
        let bytes = log(5);
        let frame = bytes.len() / 5;
        for len in 0..bytes.len() - 1 {
            let (entries, tail) = count(&bytes[..len]);
            assert_eq!(tail, Some(Tail::Cut));
            assert!(entries <= 2 * len / (frame - 20) && entries % 2 == 0);
        }
    }

    #[test]
    fn a_gap_is_an_error() {
        let bytes = log(2);
        let mut joined = bytes.clone();
        joined.truncate(bytes.len() - crate::HEADER_LEN - crate::TRAILER_LEN);
        joined.extend_from_slice(&bytes);
        let mut reader = FrameReader::new(&joined);
        assert!(reader.next_frame().is_ok() && reader.next_frame().is_ok());
        assert!(reader.next_frame().is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut reader = FrameReader::new(&bytes);
            while let Ok(Some(_)) = reader.next_frame() {}
            for _ in EntryReader::new(&bytes) {}
        }
    }
}
