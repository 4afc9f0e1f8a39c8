//! The table of alternatives (`.altinstructions`): code that the kernel replaces when it starts,
//! depending on the processor's features.
//!
//! What is rewritten at the place of an alternative may be overwritten by its replacement, so the
//! replacements have to be looked at too. Layout of an entry in 6.1 (struct alt_instr): 32-bit
//! distances to the code and to the replacement, each from its own place, a 16-bit feature, and the
//! two lengths, one byte each.

use super::planner::Planner;
use crate::bytes::{i32_at, offset_by};

const ENTRY_BYTES: usize = 12;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Alternative {
    /// The code that the kernel is built with.
    pub(super) code: u64,
    pub(super) code_len: usize,
    /// The replacement.
    pub(super) addr: u64,
    pub(super) len: usize,
}

/// All entries, each once; empty (and a miss written down) if the table has another form.
pub(super) fn entries(planner: &mut Planner) -> Vec<Alternative> {
    const NAME: &str = ".altinstructions";
    let table = planner.table(NAME, "__alt_instructions", "__alt_instructions_end");
    let room = planner.section(".altinstr_replacement");
    let (Some((start, end)), Some(room)) = (table, room) else {
        return Vec::new();
    };
    let Some(bytes) = planner.bytes(NAME, start, end) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (index, entry) in bytes.chunks(ENTRY_BYTES).enumerate() {
        let at = start + (index * ENTRY_BYTES) as u64;
        let parsed = i32_at(entry, 0)
            .zip(i32_at(entry, 4))
            .zip(entry.get(10..12));
        let fits = parsed.and_then(|((code, replacement), lengths)| {
            let code = offset_by(at, code);
            let addr = offset_by(at + 4, replacement);
            let len = usize::from(lengths[1]);
            let within = addr >= room.addr && addr + len as u64 <= room.end();
            let in_code =
                planner.image.sections().iter().any(|section| {
                    section.executable && code >= section.addr && code < section.end()
                });
            (lengths[1] <= lengths[0] && in_code && (within || len == 0)).then_some(Alternative {
                code,
                code_len: usize::from(lengths[0]),
                addr,
                len,
            })
        });
        let Some(alternative) = fits else {
            planner.miss_table(
                NAME,
                format!("entry {index} is not of the 6.1 form: {entry:02x?}"),
            );
            return Vec::new();
        };
        found.push(alternative);
    }
    found.sort_unstable();
    found.dedup();
    found
}
