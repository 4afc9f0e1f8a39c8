//! The functions that an unwind table describes.
//!
//! Every function of a compiler has an entry there, and most assembler functions, and stripping does
//! not remove it. Format: Linux Standard Base Core 5.0, 10.6 "Exception Frames"; System V ABI for
//! AMD64, 4.2.4. Entries in encodings that assemblers for x86-64 do not write are left out, and reading
//! ends at the first damaged record.

use std::ops::Range;

use crate::bytes::{i32_at, u32_at, u64_at};

/// How the addresses of an entry are written (`DW_EH_PE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// Four signed bytes, from their own place (0x1b).
    Relative32,
    /// Four bytes (0x03, 0x0b).
    Absolute32,
    /// Eight bytes (0x00, 0x04, 0x0c).
    Absolute64,
}

/// Address ranges of all functions in the table, which lies at address `base`.
pub(super) fn functions(table: &[u8], base: u64) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(length) = u32_at(table, at) {
        let body = at + 4;
        let next = body.saturating_add(length as usize);
        // Zero ends a table; the linker may have put another one behind. All ones is a 64-bit length.
        if length == u32::MAX || next > table.len() {
            break;
        }
        if length >= 4 {
            let id = u32_at(table, body).unwrap_or(0);
            if id != 0 {
                let cie = body.checked_sub(id as usize);
                let encoding = cie.and_then(|cie| encoding_of(table, cie));
                let range = encoding.and_then(|e| range_at(&table[..next], body + 4, base, e));
                found.extend(range.filter(|range| !range.is_empty()));
            }
        }
        at = next;
    }
    found
}

fn range_at(record: &[u8], at: usize, base: u64, encoding: Encoding) -> Option<Range<u64>> {
    let (start, len) = match encoding {
        Encoding::Relative32 => {
            let distance = i64::from(i32_at(record, at)?);
            let place = base.wrapping_add(at as u64);
            let len = u64::from(u32_at(record, at + 4)?);
            (place.wrapping_add_signed(distance), len)
        }
        Encoding::Absolute32 => (
            u64::from(u32_at(record, at)?),
            u64::from(u32_at(record, at + 4)?),
        ),
        Encoding::Absolute64 => (u64_at(record, at)?, u64_at(record, at + 8)?),
    };
    Some(start..start.checked_add(len)?)
}

/// The encoding that the common entry (CIE) at `at` prescribes; `None` if it is not known.
fn encoding_of(table: &[u8], at: usize) -> Option<Encoding> {
    let length = u32_at(table, at)?;
    let end = at.checked_add(4)?.checked_add(length as usize)?;
    let entry = table.get(at + 4..end)?;
    if u32_at(entry, 0)? != 0 {
        return None;
    }
    let version = *entry.get(4)?;
    let text = entry.get(5..)?;
    let text_len = text.iter().position(|byte| *byte == 0)?;
    let augmentation = &text[..text_len];
    let mut rest = &text[text_len + 1..];
    skip_leb128(&mut rest)?; // code alignment
    skip_leb128(&mut rest)?; // data alignment
    match version {
        1 => rest = rest.get(1..)?, // return address register
        3 => skip_leb128(&mut rest)?,
        _ => return None,
    }
    let Some(letters) = augmentation.strip_prefix(b"z") else {
        return augmentation.is_empty().then_some(Encoding::Absolute64);
    };
    skip_leb128(&mut rest)?; // length of the augmentation data
    for letter in letters {
        match letter {
            b'R' => return known_encoding(*rest.first()?),
            b'L' => rest = rest.get(1..)?,
            b'P' => rest = rest.get(1 + pointer_bytes(*rest.first()?)?..)?,
            b'S' | b'B' => {}
            _ => return None,
        }
    }
    Some(Encoding::Absolute64)
}

fn known_encoding(encoding: u8) -> Option<Encoding> {
    match encoding {
        0x1b => Some(Encoding::Relative32),
        0x03 | 0x0b => Some(Encoding::Absolute32),
        0x00 | 0x04 | 0x0c => Some(Encoding::Absolute64),
        _ => None,
    }
}

fn pointer_bytes(encoding: u8) -> Option<usize> {
    match encoding & 0x0f {
        0x00 | 0x04 | 0x0c => Some(8),
        0x02 | 0x0a => Some(2),
        0x03 | 0x0b => Some(4),
        _ => None,
    }
}

fn skip_leb128(bytes: &mut &[u8]) -> Option<()> {
    let last = bytes.iter().position(|byte| byte & 0x80 == 0)?;
    *bytes = &bytes[last + 1..];
    Some(())
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]
mod tests {
    use super::*;

    /// A table with one common entry, whose augmentation ends with `R encoding`, and one function.
    fn table(augmentation: &[u8], data: &[u8], place: &[u8]) -> Vec<u8> {
        let mut common = vec![0, 0, 0, 0, 1];
        common.extend(augmentation);
        common.extend([0, 1, 0x78, 16, u8::try_from(data.len()).unwrap()]);
        common.extend(data);
        let mut table = u32::try_from(common.len()).unwrap().to_le_bytes().to_vec();
        table.extend(&common);
        let to_common = u32::try_from(table.len() + 4).unwrap();
        let function = [&to_common.to_le_bytes(), place].concat();
        table.extend(u32::try_from(function.len()).unwrap().to_le_bytes());
        table.extend(function);
        table.extend([0; 4]);
        table
    }

    #[test]
    fn relative_place_counts_from_itself() {
        let table = table(
            b"zR",
            &[0x1b],
            &[&(-0x100i32).to_le_bytes()[..], &[0x20, 0, 0, 0]].concat(),
        );
        let at = 0x5000 + table.len() as u64 - 4 - 8;
        assert_eq!(functions(&table, 0x5000), [at - 0x100..at - 0xe0]);
    }

    #[test]
    fn personality_and_language_data_are_stepped_over() {
        let place = [&0x40_1000u32.to_le_bytes()[..], &[0x10, 0, 0, 0]].concat();
        let table = table(b"zPLR", &[0x9b, 1, 2, 3, 4, 0x1b, 0x03], &place);
        assert_eq!(functions(&table, 0), [0x40_1000..0x40_1010]);
    }

    #[test]
    fn unknown_encoding_and_cut_off_records_give_nothing() {
        let place = [0; 8];
        assert_eq!(functions(&table(b"zR", &[0x31], &place), 0), []);
        assert_eq!(functions(&table(b"zX", &[0x1b], &place), 0), []);
        let whole = table(b"zR", &[0x03], &[0, 0x10, 0, 0, 4, 0, 0, 0]);
        for len in 0..whole.len() - 4 {
            assert_eq!(functions(&whole[..len], 0), [], "{len} bytes");
        }
        assert_eq!(functions(&whole, 0).len(), 1);
    }
}
