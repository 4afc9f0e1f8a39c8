//! Functions that return at once.

use super::planner::{Planner, Reason};
use crate::error::PlanError;

/// What a skipped function returns.
#[derive(Debug, Clone, Copy)]
pub(super) enum Skip {
    /// Nothing.
    Return,
    /// Zero, no error, or a null pointer.
    Zero,
    /// One, or true.
    One,
}

impl Skip {
    fn code(self) -> &'static [u8] {
        match self {
            Skip::Return => &[0xc3],                // ret
            Skip::Zero => &[0x31, 0xc0, 0xc3],      // xor eax, eax; ret
            Skip::One => &[0xb8, 1, 0, 0, 0, 0xc3], // mov eax, 1; ret
        }
    }
}

/// Makes `function` return at once. Its first bytes are replaced whatever they are: that they belong
/// to it is told by its symbol being code, and by its length.
pub(super) fn skip(
    planner: &mut Planner,
    function: &'static str,
    how: Skip,
    reason: Reason,
) -> Result<(), PlanError> {
    let Some(addr) = planner.symbol(function) else {
        return Ok(());
    };
    let code = how.code();
    let symbols = planner.image.symbols();
    let is_code = symbols
        .named(function)
        .all(|symbol| matches!(symbol.kind, b't' | b'T' | b'W'));
    let room = symbols.room_at(addr).unwrap_or(0);
    if !is_code || room < code.len() as u64 {
        planner.miss_table(
            function,
            format!("no function of {} bytes or more", code.len()),
        );
        return Ok(());
    }
    let old = planner
        .image
        .read(addr, code.len())
        .unwrap_or_default()
        .to_vec();
    planner.replace(addr, &old, code, reason)
}
