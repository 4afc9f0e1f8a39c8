//! How ring 3 gets into ring 0.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use serde::{Deserialize, Serialize};

use super::lab::Lab;
use crate::bare::{CODE, Ring};
use crate::{Error, guest_code};

/// What SYSCALL of ring 3 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyscallEntry {
    /// It enters ring 0 at LSTAR.
    EntersRing0,
    /// It jumps to LSTAR but stays in ring 3.
    StaysInRing3,
    /// It does something else.
    Broken,
}

guest_code! { fn syscall() { "syscall", ".balign 16", "out 0x10, al" } }
guest_code! { fn software_interrupt() { "int 0x80", ".balign 16", "out 0x10, al" } }

/// Offset of the entry in both pieces of code.
const ENTRY: u64 = CODE + 16;
const VECTOR: u8 = 0x80;

pub(super) fn probe_syscall(lab: &mut Lab) -> Result<SyscallEntry, Error> {
    lab.load(syscall(), Ring::User, 0)?;
    lab.guest.set_syscall_entry(ENTRY)?;
    let seen = lab.run();
    Ok(match (seen.wrote_to(0x10), seen.cpl) {
        (true, 0) => SyscallEntry::EntersRing0,
        (true, 3) => SyscallEntry::StaysInRing3,
        _ => SyscallEntry::Broken,
    })
}

pub(super) fn probe_software_interrupt(lab: &mut Lab) -> Result<bool, Error> {
    lab.load(software_interrupt(), Ring::User, 0)?;
    lab.guest.set_handler(VECTOR, ENTRY)?;
    let seen = lab.run();
    Ok(seen.wrote_to(0x10) && seen.cpl == 0)
}
