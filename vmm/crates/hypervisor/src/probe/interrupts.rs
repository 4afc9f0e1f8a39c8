//! Where the interrupt window opens.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use serde::{Deserialize, Serialize};

use super::lab::{Lab, Outcome};
use crate::bare::Ring;
use crate::{Error, Exit, Vcpu, guest_code};

/// How exactly the interrupt window opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowPrecision {
    /// At the first instruction that can be interrupted.
    Exact,
    /// Some instructions later.
    Late,
    /// Not before the next exit.
    Missed,
}

guest_code! {
    // The shadow of STI covers the NOP; R12 counts what runs after it.
    fn ring0() {
        "out 0x10, al", "sti", "nop",
        "mov rcx, 5000", "2: inc r12", "dec rcx", "jnz 2b",
        "out 0x11, al",
    }
}

guest_code! {
    fn ring3_entry() {
        "out 0x10, al", "mov rax, rsp", "push 0x2b", "push rax", "push 0x3202", "push 0x33",
        "lea rax, [rip + 3f]", "push rax", "iretq",
        "3: mov rcx, 5000", "2: inc r12", "dec rcx", "jnz 2b",
        "out 0x11, al",
    }
}

pub(super) fn probe_ring0(lab: &mut Lab) -> Result<WindowPrecision, Error> {
    precision(lab, ring0())
}

pub(super) fn probe_ring3_entry(lab: &mut Lab) -> Result<WindowPrecision, Error> {
    precision(lab, ring3_entry())
}

fn precision(lab: &mut Lab, code: &[u8]) -> Result<WindowPrecision, Error> {
    let ready = lab.run_code(code, Ring::Kernel)?.wrote_to(0x10);
    lab.guest.vcpu.set_interrupt_window(true);
    let seen = lab.run();
    lab.guest.vcpu.set_interrupt_window(false);
    let opened = seen.outcome == Outcome::Exit(Exit::InterruptWindow);
    Ok(match (ready && opened, seen.regs.r12) {
        (true, 0) => WindowPrecision::Exact,
        (true, _) => WindowPrecision::Late,
        (false, _) => WindowPrecision::Missed,
    })
}
