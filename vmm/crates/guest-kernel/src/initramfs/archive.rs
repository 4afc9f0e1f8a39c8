//! cpio archives of the "newc" format, as Linux unpacks them (Documentation/driver-api/early-userspace/
//! buffer-format.rst): headers of 110 bytes in ASCII, everything padded to four bytes, several archives
//! one after the other with zeros between them.
//!
//! What always holds: the data of every entry lies within the archive; there are at most
//! [`MAX_ENTRIES`].

use std::ops::Range;

use super::error::Error;

/// Most entries that are accepted. A Debian initial RAM disk with all modules has some thousands.
const MAX_ENTRIES: usize = 1 << 20;
/// Longest name with its zero byte: Linux refuses longer ones.
const MAX_NAME_BYTES: usize = 4096;
const HEADER_BYTES: usize = 110;
/// The last field of the header: the sum of all data bytes, in archives of magic 070702.
const CHECKSUM: Range<usize> = 102..110;
const TRAILER: &[u8] = b"TRAILER!!!";

const FILE_TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;

/// One file, directory or other node.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    mode: u32,
    header: usize,
    has_checksum: bool,
    /// Where its data lies in the archive.
    pub(super) data: Range<usize>,
}

impl Entry {
    /// A regular file with data. Of hard links only one entry has any.
    pub(super) fn is_file(&self) -> bool {
        self.mode & FILE_TYPE == REGULAR && !self.data.is_empty()
    }
}

/// Whether an archive starts here.
pub(super) fn starts(bytes: &[u8]) -> bool {
    bytes.starts_with(b"070701") || bytes.starts_with(b"070702")
}

/// All entries of one or several archives, without the trailers.
pub(super) fn entries(bytes: &[u8]) -> Result<Vec<Entry>, Error> {
    let mut found = Vec::new();
    let mut at = skip_zeros(bytes, 0);
    while at < bytes.len() {
        let (entry, next) = entry_at(bytes, at)?;
        if let Some(entry) = entry {
            found.push(entry);
        }
        if found.len() > MAX_ENTRIES {
            return Err(Error::TooManyEntries { limit: MAX_ENTRIES });
        }
        at = skip_zeros(bytes, next);
    }
    Ok(found)
}

/// End of the archive that starts at `at`: behind its trailer, or where no header follows.
pub(super) fn end(bytes: &[u8], mut at: usize) -> Result<usize, Error> {
    while bytes.get(at..).is_some_and(starts) {
        let (entry, next) = entry_at(bytes, at)?;
        at = next;
        if entry.is_none() {
            break;
        }
    }
    Ok(at.min(bytes.len()))
}

/// Offset of the first byte from `at` on that is not zero.
pub(super) fn skip_zeros(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|byte| **byte == 0).count()
}

/// Adds `difference` to the sum of the data, if the archive holds one.
pub(super) fn adjust_checksum(bytes: &mut [u8], entry: &Entry, difference: u32) {
    if !entry.has_checksum {
        return;
    }
    let field = entry.header + CHECKSUM.start..entry.header + CHECKSUM.end;
    if let Some(old) = hex(&bytes[field.clone()]) {
        let new = format!("{:08X}", old.wrapping_add(difference));
        bytes[field].copy_from_slice(new.as_bytes());
    }
}

/// The entry at `at` (`None` for a trailer) and where the next one starts.
fn entry_at(bytes: &[u8], at: usize) -> Result<(Option<Entry>, usize), Error> {
    let bad = |what| Error::BadEntry { at, what };
    if !bytes[at..]
        .first_chunk::<6>()
        .is_some_and(|magic| starts(magic))
    {
        return Err(bad("no header starts here"));
    }
    if !at.is_multiple_of(4) {
        return Err(bad("its header does not start at a multiple of four"));
    }
    let header = bytes
        .get(at..at + HEADER_BYTES)
        .ok_or_else(|| bad("the header is cut off"))?;
    let field = |index: usize| {
        let start = 6 + index * 8;
        hex(&header[start..start + 8]).ok_or_else(|| bad("a field of the header is no number"))
    };
    let (mode, data_len, name_len) = (field(1)?, field(6)? as usize, field(11)? as usize);
    if name_len == 0 || name_len > MAX_NAME_BYTES {
        return Err(bad("its name is empty or too long"));
    }
    let name_at = at + HEADER_BYTES;
    let name = bytes
        .get(name_at..name_at + name_len)
        .ok_or_else(|| bad("the name is cut off"))?;
    if !name.ends_with(b"\0") {
        return Err(bad("its name does not end with zero"));
    }
    // More zeros behind a name let its data start at the beginning of a page.
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let data_at = (name_at + name_len).next_multiple_of(4);
    let data = data_at..data_at + data_len;
    if data.end > bytes.len() && data_len > 0 {
        return Err(bad("the data are cut off"));
    }
    let next = data.end.next_multiple_of(4);
    if name == TRAILER {
        return Ok((None, next));
    }
    let entry = Entry {
        name: String::from_utf8_lossy(name).into_owned(),
        mode,
        header: at,
        has_checksum: header.starts_with(b"070702"),
        data,
    };
    Ok((Some(entry), next))
}

/// Eight hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |number, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(number << 4 | digit)
    })
}
