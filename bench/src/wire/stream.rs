//! One direction of a TCP connection, as put together from what was seen of it: its last bytes, and those
//! that a superseded sender claims beyond them.

use std::collections::VecDeque;

/// Bytes kept of a stream.
const KEPT: usize = 64 << 10;
/// Claims of late frames kept of a stream.
const CLAIMS_KEPT: usize = 1024;

/// See the module. Places are sequence numbers of TCP and wrap.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Place behind the last byte seen.
    end: Option<u32>,
    bytes: VecDeque<u8>,
    acknowledged: Option<u32>,
    /// Bytes beyond the end in late frames: first place, and what should be there.
    claims: Vec<(u32, Vec<u8>)>,
    late_acknowledged: Option<u32>,
}

/// What does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misfit {
    /// Other bytes than these were seen at their place.
    Differs,
    /// More claims than can be kept.
    TooMany,
}

/// `a` is before `b`.
fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

impl Stream {
    /// A new connection between the same ports.
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }

    /// The sender acknowledges this of the other direction.
    pub(super) fn acknowledge(&mut self, to: u32) {
        if self.acknowledged.is_none_or(|old| before(old, to)) {
            self.acknowledged = Some(to);
        }
    }

    /// A superseded sender acknowledges this: the new one must come to it too.
    pub(super) fn acknowledge_late(&mut self, to: u32) {
        if self.late_acknowledged.is_none_or(|old| before(old, to)) {
            self.late_acknowledged = Some(to);
        }
    }

    /// Bytes from the sender whose turn it is.
    pub(super) fn put(&mut self, place: u32, payload: &[u8]) -> Result<(), Misfit> {
        if payload.is_empty() {
            return Ok(());
        }
        let fits = self
            .compare(place, payload)
            .and(self.settle(place, payload));
        let Some(end) = self.end else {
            self.begin(place, payload);
            return fits;
        };
        let stop = place.wrapping_add(payload.len() as u32);
        if before(end, place) {
            // Left out: what the one before had sent already, or what was not seen.
            self.begin(place, payload);
        } else if before(end, stop) {
            let new = end.wrapping_sub(place) as usize;
            self.bytes.extend(&payload[new..]);
            self.end = Some(stop);
        }
        let surplus = self.bytes.len().saturating_sub(KEPT);
        self.bytes.drain(..surplus);
        fits
    }

    fn begin(&mut self, place: u32, payload: &[u8]) {
        self.bytes.clear();
        self.bytes.extend(payload);
        self.end = Some(place.wrapping_add(payload.len() as u32));
    }

    /// Bytes from a superseded sender: those at places that were seen must be the same; those beyond are
    /// kept until the new sender has come to them.
    pub(super) fn put_late(&mut self, place: u32, payload: &[u8]) -> Result<(), Misfit> {
        if payload.is_empty() {
            return Ok(());
        }
        self.compare(place, payload)?;
        let stop = place.wrapping_add(payload.len() as u32);
        let end = self.end.unwrap_or(place);
        if before(end, stop) {
            if self.claims.len() == CLAIMS_KEPT {
                return Err(Misfit::TooMany);
            }
            let known = if before(place, end) {
                end.wrapping_sub(place) as usize
            } else {
                0
            };
            let from = place.wrapping_add(known as u32);
            self.claims.push((from, payload[known..].to_vec()));
        }
        Ok(())
    }

    /// Compares with what is kept, where both are.
    fn compare(&self, place: u32, payload: &[u8]) -> Result<(), Misfit> {
        let Some(end) = self.end else {
            return Ok(());
        };
        let start = end.wrapping_sub(self.bytes.len() as u32);
        let same = payload.iter().zip(0_u32..).all(|(byte, n)| {
            let at = place.wrapping_add(n);
            if before(at, start) || !before(at, end) {
                return true;
            }
            self.bytes.get(at.wrapping_sub(start) as usize) == Some(byte)
        });
        if same { Ok(()) } else { Err(Misfit::Differs) }
    }

    /// Claims that the new sender has come to, or has passed, are settled.
    fn settle(&mut self, place: u32, payload: &[u8]) -> Result<(), Misfit> {
        let stop = place.wrapping_add(payload.len() as u32);
        let mut fits = Ok(());
        self.claims.retain(|(from, bytes)| {
            let differs = bytes.iter().zip(0_u32..).any(|(byte, n)| {
                let at = from.wrapping_add(n);
                let theirs = payload.get(at.wrapping_sub(place) as usize);
                !before(at, place) && theirs.is_some_and(|b| b != byte)
            });
            if differs {
                fits = Err(Misfit::Differs);
            }
            let claimed = from.wrapping_add(bytes.len() as u32);
            before(stop, claimed) && !differs
        });
        fits
    }

    /// How many claims of superseded senders the new sender never came to.
    pub(super) fn open_claims(&self) -> u64 {
        let ahead = match (self.late_acknowledged, self.acknowledged) {
            (Some(late), Some(now)) => before(now, late),
            (Some(_), None) => true,
            (None, _) => false,
        };
        self.claims.len() as u64 + u64::from(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_bytes_must_be_the_same() {
        let mut stream = Stream::default();
        // Across the end of the numbers.
        let place = u32::MAX - 2;
        assert_eq!(stream.put(place, b"abcdef"), Ok(()));
        assert_eq!(stream.put(place.wrapping_add(4), b"efgh"), Ok(()));
        assert_eq!(stream.put(place, b"abcdefgh"), Ok(()));
        assert_eq!(
            stream.put(place.wrapping_add(2), b"cdXf"),
            Err(Misfit::Differs)
        );
        assert_eq!(
            stream.put(place.wrapping_sub(5), b"what?ab"),
            Ok(()),
            "older than is kept"
        );
    }

    #[test]
    fn late_bytes_must_be_those_of_the_stream() {
        let mut stream = Stream::default();
        stream.put(100, b"abcdef").unwrap();
        assert_eq!(stream.put_late(102, b"cde"), Ok(()));
        assert_eq!(stream.put_late(102, b"cdX"), Err(Misfit::Differs));
        assert_eq!(stream.open_claims(), 0);
    }

    #[test]
    fn late_bytes_beyond_the_end_stay_open_until_the_new_sender_has_come_to_them() {
        let claimed = || {
            let mut stream = Stream::default();
            stream.put(100, b"abc").unwrap();
            stream.put_late(102, b"cdef").unwrap();
            assert_eq!(stream.open_claims(), 1);
            stream
        };
        let mut same = claimed();
        assert_eq!(same.put(103, b"d"), Ok(()));
        assert_eq!(same.open_claims(), 1, "not yet all of it");
        assert_eq!((same.put(104, b"efgh"), same.open_claims()), (Ok(()), 0));
        let mut passed = claimed();
        assert_eq!((passed.put(106, b"ghi"), passed.open_claims()), (Ok(()), 0));
        let mut other = claimed();
        assert_eq!(other.put(103, b"dX"), Err(Misfit::Differs));
    }

    #[test]
    fn a_late_acknowledgement_stays_open_until_the_new_sender_gives_it_too() {
        let mut stream = Stream::default();
        stream.acknowledge(u32::MAX);
        stream.acknowledge_late(5);
        assert_eq!(stream.open_claims(), 1);
        stream.acknowledge(4);
        assert_eq!(stream.open_claims(), 1);
        stream.acknowledge(5);
        assert_eq!(stream.open_claims(), 0);
    }
}
