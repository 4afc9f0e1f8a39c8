//! Entries larger than an append: cut by the producer, put together by the consumer.
//!
//! A large entry takes effect whole with its last part; an incomplete one is discarded. The staging
//! buffer is the consumer's own, so the channel's buffers do not limit the size of an entry.

use crate::{Entry, Error, Event, ExitNumber, MAX_APPEND_LEN, PartHeader};

/// Data bytes in one part: leaves room for the part's own header in an append.
const PART_DATA_LEN: usize = MAX_APPEND_LEN - 64;

/// Calls `append` with the bytes of one append for each piece of `entry`: the entry itself where it
/// fits into one, its parts otherwise. `scratch` is reused between calls.
///
/// # Errors
/// The first error of `append`; the parts before it are out, and the consumer discards them.
pub fn split<E>(
    entry: &Entry<'_>,
    scratch: &mut Vec<u8>,
    append: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    scratch.clear();
    entry.encode(scratch);
    split_encoded(entry.exit, scratch, append)
}

/// [`split`] for the bytes of one entry of `exit`, encoded already.
///
/// # Errors
/// As [`split`].
pub fn split_encoded<E>(
    exit: ExitNumber,
    encoded: &[u8],
    mut append: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    if encoded.len() <= MAX_APPEND_LEN {
        return append(encoded);
    }
    let total = encoded.len() as u64;
    let mut piece = Vec::with_capacity(MAX_APPEND_LEN);
    for (index, data) in encoded.chunks(PART_DATA_LEN).enumerate() {
        let header = PartHeader {
            total: if index == 0 { total } else { 0 },
            offset: (index * PART_DATA_LEN) as u64,
        };
        piece.clear();
        Entry {
            exit,
            event: Event::Part(header, data),
        }
        .encode(&mut piece);
        append(&piece)?;
    }
    Ok(())
}

/// Puts parts together.
#[derive(Debug)]
pub struct Assembler {
    staged: Vec<u8>,
    total: u64,
    exit: ExitNumber,
    limit: u64,
}

impl Assembler {
    /// An assembler for entries of up to `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            staged: Vec::new(),
            total: 0,
            exit: ExitNumber(0),
            limit,
        }
    }

    /// Takes the next part in order; true when the entry is whole: see [`Assembler::whole`].
    ///
    /// # Errors
    /// A part that does not continue what is staged, or an entry over the limit.
    pub fn push(&mut self, exit: ExitNumber, part: PartHeader, data: &[u8]) -> Result<bool, Error> {
        if part.offset == 0 {
            if part.total > self.limit {
                return Err(Error::Limit {
                    what: "length of an entry in parts",
                    value: part.total,
                    limit: self.limit,
                });
            }
            self.staged.clear();
            self.total = part.total;
            self.exit = exit;
        } else if part.offset != self.staged.len() as u64 || self.total == 0 {
            return Err(Error::Part("it does not follow the part before it"));
        } else if exit != self.exit {
            return Err(Error::Part("its exit differs from the first part's"));
        }
        if data.is_empty() || self.staged.len() as u64 + data.len() as u64 > self.total {
            return Err(Error::Part("its length does not fit the whole"));
        }
        self.staged.extend_from_slice(data);
        Ok(self.staged.len() as u64 == self.total)
    }

    /// The whole entry, after [`Assembler::push`] returned true.
    ///
    /// # Errors
    /// The assembled bytes are not an entry.
    pub fn whole(&self) -> Result<Entry<'_>, Error> {
        let mut bytes = self.staged.as_slice();
        let entry = Entry::decode_bounded(&mut bytes, self.limit)?;
        match (bytes.is_empty(), entry.event) {
            (_, Event::Part(..)) => Err(Error::Part("a part within a part")),
            (false, _) => Err(Error::Part("bytes after the whole entry")),
            (true, _) => Ok(entry),
        }
    }

    /// Whether parts of an incomplete entry are staged.
    #[must_use]
    pub fn is_staging(&self) -> bool {
        (self.staged.len() as u64) < self.total
    }

    /// Discards what is staged.
    pub fn clear(&mut self) {
        self.staged.clear();
        self.total = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts_of(entry: &Entry<'_>) -> Vec<Vec<u8>> {
        let mut parts = Vec::new();
        let result: Result<(), ()> = split(entry, &mut Vec::new(), |bytes| {
            parts.push(bytes.to_vec());
            Ok(())
        });
        assert_eq!(result, Ok(()));
        parts
    }

    #[test]
    fn a_small_entry_is_one_append_as_it_is() {
        let entry = Entry {
            exit: ExitNumber(4),
            event: Event::Delta(b"abc"),
        };
        let parts = parts_of(&entry);
        assert_eq!(parts.len(), 1);
        assert_eq!(Entry::decode(&mut parts[0].as_slice()), Ok(entry));
    }

    #[test]
    fn a_large_entry_takes_effect_with_its_last_part_only() {
        let data: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let entry = Entry {
            exit: ExitNumber(77),
            event: Event::Delta(&data),
        };
        let parts = parts_of(&entry);
        assert!(parts.len() > 4);
        let mut assembler = Assembler::new(1 << 20);
        for (index, bytes) in parts.iter().enumerate() {
            assert!(bytes.len() <= MAX_APPEND_LEN);
            let part = Entry::decode(&mut bytes.as_slice()).unwrap();
            let Event::Part(header, data) = part.event else {
                panic!("not a part")
            };
            let whole = assembler.push(part.exit, header, data).unwrap();
            assert_eq!(whole, index + 1 == parts.len());
            assert_eq!(assembler.is_staging(), !whole);
        }
        assert_eq!(assembler.whole(), Ok(entry));
    }

    #[test]
    fn parts_out_of_order_or_over_the_limit_are_refused() {
        let mut assembler = Assembler::new(1000);
        let push = |assembler: &mut Assembler, total, offset, len| {
            assembler.push(ExitNumber(1), PartHeader { total, offset }, &vec![0; len])
        };
        assert!(push(&mut assembler, 0, 10, 10).is_err());
        assert!(push(&mut assembler, 1001, 0, 10).is_err());
        assert_eq!(push(&mut assembler, 100, 0, 60), Ok(false));
        assert!(push(&mut assembler, 0, 50, 10).is_err());
        assert!(push(&mut assembler, 0, 60, 41).is_err());
        assert_eq!(push(&mut assembler, 0, 60, 40), Ok(true));
    }
}
