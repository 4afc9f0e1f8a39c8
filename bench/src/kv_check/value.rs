//! Unique values as text: in a register `0001.0000002a:` and padding that follows from it, in a log
//! `0001.0000002a;` each. What does not read back exactly was changed on the way.

use super::check::{WRITE_ID_LENGTH, WriteId};

/// The value of a register, `length` bytes long or as long as its id needs.
pub(super) fn register(id: WriteId, length: u32) -> Vec<u8> {
    let id = id.to_string();
    let length = (length as usize).max(id.len());
    id.bytes().chain(*b":").cycle().take(length).collect()
}

/// Whose value this is.
pub(super) fn parse_register(value: &[u8], length: u32) -> Option<WriteId> {
    let id = parse_id(value.get(..WRITE_ID_LENGTH)?)?;
    (register(id, length) == value).then_some(id)
}

/// One addition to a log.
pub(super) fn token(id: WriteId) -> Vec<u8> {
    format!("{id};").into_bytes()
}

/// Length of [`token`].
pub(super) const TOKEN_LENGTH: usize = WRITE_ID_LENGTH + 1;

/// What a log holds.
pub(super) fn parse_log(value: &[u8]) -> Option<Vec<WriteId>> {
    value
        .chunks(TOKEN_LENGTH)
        .map(|token| parse_id(token.strip_suffix(b";")?))
        .collect()
}

fn parse_id(text: &[u8]) -> Option<WriteId> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: WriteId = WriteId {
        connection: 3,
        sequence: 0xbeef,
    };

    #[test]
    fn values_read_back_and_spoilt_ones_do_not() {
        for length in [16, 64, 1000] {
            let value = register(ID, length);
            assert_eq!(value.len(), length as usize);
            assert_eq!(parse_register(&value, length), Some(ID));
            assert_eq!(parse_register(&value[1..], length), None);
            assert_eq!(parse_register(&value[..value.len() - 1], length), None);
            let mut spoilt = value.clone();
            *spoilt.last_mut().unwrap() ^= 1;
            assert_eq!(parse_register(&spoilt, length), None);
        }
    }

    #[test]
    fn logs_read_back_and_spoilt_ones_do_not() {
        let other = WriteId {
            connection: 4,
            ..ID
        };
        let log = [token(ID), token(other)].concat();
        assert_eq!(log.len(), 2 * TOKEN_LENGTH);
        assert_eq!(parse_log(&log), Some(vec![ID, other]));
        assert_eq!(parse_log(b""), Some(Vec::new()));
        assert_eq!(parse_log(&log[..log.len() - 1]), None);
        assert_eq!(parse_log(&log[1..]), None);
    }
}
