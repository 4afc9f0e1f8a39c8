//! Unsigned LEB128, at most ten bytes, canonical: a longer spelling of a number is refused.

use crate::Error;

/// Appends `value` to `out`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the front of `bytes`.
pub(crate) fn take(bytes: &mut &[u8]) -> Result<u64, Error> {
    let mut value = 0u64;
    for (index, &byte) in bytes.iter().take(10).enumerate() {
        let bits = u64::from(byte & 0x7f);
        if index == 9 && bits > 1 {
            return Err(Error::Field("number: over 64 bits"));
        }
        value |= bits << (7 * index);
        if byte < 0x80 {
            if byte == 0 && index > 0 {
                return Err(Error::Field("number: not in its shortest form"));
            }
            *bytes = &bytes[index + 1..];
            return Ok(value);
        }
    }
    if bytes.len() >= 10 {
        return Err(Error::Field("number: over 64 bits"));
    }
    Err(Error::Truncated {
        needed: bytes.len() + 1,
        got: bytes.len(),
    })
}

/// How many bytes `value` takes.
pub(crate) const fn len(value: u64) -> usize {
    match value {
        0 => 1,
        _ => (64 - value.leading_zeros() as usize).div_ceil(7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_power_of_two_round_trips_in_its_shortest_form() {
        for shift in 0..64 {
            for value in [
                1u64 << shift,
                (1u64 << shift) - 1,
                u64::MAX - (1u64 << shift),
            ] {
                let mut bytes = Vec::new();
                put(&mut bytes, value);
                assert_eq!(bytes.len(), len(value));
                let mut rest = bytes.as_slice();
                assert_eq!(take(&mut rest), Ok(value));
                assert!(rest.is_empty());
            }
        }
    }

    #[test]
    fn longer_spellings_and_overflow_are_refused() {
        assert!(take(&mut &[0x80, 0x00][..]).is_err());
        assert!(take(&mut &[0xff; 10][..]).is_err());
        assert!(matches!(
            take(&mut &[0x80][..]),
            Err(Error::Truncated { .. })
        ));
    }
}
