//! Sorts at load the two tables that the kernel sorts at each start: jump labels and static calls.
//!
//! Their entries hold distances from their own place, so moving one changes its bytes. The calls of
//! `sort` at the start are taken out. A module's static-call sites stay unsorted then: the kernel
//! treats each run of one key by itself, which is slower and right.

use super::planner::{Planner, Reason};
use crate::bytes::{i32_at, low_half, offset_by, u64_at};
use crate::error::PlanError;

const REASON: Reason = Reason::fast_boot("sorted at load");
/// Low bits of a key's address that are flags.
const KEY_FLAGS: u64 = 3;

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    jump_labels(planner)?;
    static_calls(planner)?;
    planner.take_out_calls("jump_label_init", "sort", REASON)?;
    planner.take_out_calls("__static_call_init", "sort", REASON)
}

/// struct jump_entry: 32-bit distances to code and target, a 64-bit one to the key with flags.
/// Order: by key, then by code.
fn jump_labels(planner: &mut Planner) -> Result<(), PlanError> {
    const ENTRY: usize = 16;
    let name = "__jump_table";
    let table = planner.table(name, "__start___jump_table", "__stop___jump_table");
    let Some((start, end)) = table else {
        return Ok(());
    };
    let Some(bytes) = planner.bytes(name, start, end) else {
        return Ok(());
    };
    let mut entries: Vec<(u64, u64, u64)> = bytes
        .chunks_exact(ENTRY)
        .zip((start..).step_by(ENTRY))
        .map(|(entry, at)| {
            let key = (at + 8).wrapping_add(u64_at(entry, 8).unwrap_or(0));
            let code = offset_by(at, i32_at(entry, 0).unwrap_or(0));
            (key, code, offset_by(at + 4, i32_at(entry, 4).unwrap_or(0)))
        })
        .collect();
    if let Some((_, code, _)) = entries
        .iter()
        .find(|(_, code, _)| planner.covered(*code, 2))
    {
        planner.miss_table(name, format!("the code at {code:#x} is patched already"));
        return Ok(());
    }
    entries.sort_by_key(|(key, code, _)| (key & !KEY_FLAGS, *code));
    let mut sorted = Vec::with_capacity(bytes.len());
    for ((key, code, target), at) in entries.into_iter().zip((start..).step_by(ENTRY)) {
        sorted.extend(distance(at, code));
        sorted.extend(distance(at + 4, target));
        sorted.extend(key.wrapping_sub(at + 8).to_le_bytes());
    }
    whole_table(planner, name, start, bytes, &sorted)
}

/// struct static_call_site: 32-bit distances to the code and to the key with flags. Order: by key.
fn static_calls(planner: &mut Planner) -> Result<(), PlanError> {
    const ENTRY: usize = 8;
    let name = ".static_call_sites";
    let table = planner.table(
        name,
        "__start_static_call_sites",
        "__stop_static_call_sites",
    );
    let Some((start, end)) = table else {
        return Ok(());
    };
    let Some(bytes) = planner.bytes(name, start, end) else {
        return Ok(());
    };
    let mut entries: Vec<(u64, u64)> = bytes
        .chunks_exact(ENTRY)
        .zip((start..).step_by(ENTRY))
        .map(|(entry, at)| {
            let code = offset_by(at, i32_at(entry, 0).unwrap_or(0));
            (offset_by(at + 4, i32_at(entry, 4).unwrap_or(0)), code)
        })
        .collect();
    entries.sort_by_key(|(key, _)| key & !KEY_FLAGS);
    let mut sorted = Vec::with_capacity(bytes.len());
    for ((key, code), at) in entries.into_iter().zip((start..).step_by(ENTRY)) {
        sorted.extend(distance(at, code));
        sorted.extend(distance(at + 4, key));
    }
    whole_table(planner, name, start, bytes, &sorted)
}

fn whole_table(
    planner: &mut Planner,
    name: &str,
    start: u64,
    old: &[u8],
    new: &[u8],
) -> Result<(), PlanError> {
    if old.len() != new.len() {
        planner.miss_table(name, format!("{} bytes are no whole entries", old.len()));
        return Ok(());
    }
    planner.replace(start, old, new, REASON)
}

/// All code and data of the kernel lies within 2 GiB, so the low half of the distance is enough.
fn distance(from: u64, to: u64) -> [u8; 4] {
    low_half(to.wrapping_sub(from))
}
