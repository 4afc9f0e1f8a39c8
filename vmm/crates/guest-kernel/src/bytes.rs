//! Little-endian reads and writes at an offset of a byte slice, with bounds checks.
//!
//! A read outside the slice is `None`: the input is a file that somebody handed us.

/// The two bytes at `offset`.
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_le_bytes)
}

/// The four bytes at `offset`.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_le_bytes)
}

/// The four bytes at `offset` as a signed number.
pub(crate) fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    array_at(bytes, offset).map(i32::from_le_bytes)
}

/// The eight bytes at `offset`.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// `base` moved by a signed 32-bit distance, wrapping as addresses do.
pub(crate) fn offset_by(base: u64, distance: i32) -> u64 {
    base.wrapping_add_signed(i64::from(distance))
}

/// The low half of an address in the top 2 GiB, or of a distance within it: an instruction extends it by its sign.
pub(crate) fn low_half(addr: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = addr.to_le_bytes();
    [a, b, c, d]
}
