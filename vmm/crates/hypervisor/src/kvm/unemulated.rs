//! Instructions of ring 0 that KVM's emulator refuses although it may have to run them.
//!
//! Each is carried out here as the processor would: registers and, for INT3, the exception. KVM
//! has queued #UD when it reports the failure; setting registers takes that back.

use kvm_bindings::kvm_regs;

use super::KvmVcpu;
use crate::dirty::PAGE_SIZE;
use crate::vcpu::{Unemulated, Vcpu};
use crate::{Error, Vm, kvm_sregs};

/// Longest instruction (Intel SDM volume 2, 2.3.11).
const MAX_INSTRUCTION_BYTES: usize = 15;
const BREAKPOINT_VECTOR: u8 = 3;
/// CF, PF, AF, ZF, SF, OF: what POPCNT writes.
const ARITHMETIC_FLAGS: u64 = 0x8d5;
const RFLAGS_ZF: u64 = 1 << 6;

/// What an instruction does.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    Breakpoint,
    Wait,
    Popcnt {
        to: usize,
        from: usize,
        bits: u32,
        len: u64,
    },
}

pub(super) fn skip(vcpu: &mut KvmVcpu) -> Result<Unemulated, Error> {
    let code = fetch(vcpu)?;
    let Some(effect) = decode(&code, is_long_mode(&vcpu.sregs)) else {
        return Ok(Unemulated::NotKnown(code));
    };
    let mut regs = vcpu.regs;
    let name = match effect {
        Effect::Breakpoint => {
            regs.rip = regs.rip.wrapping_add(1);
            "int3"
        }
        Effect::Wait => {
            regs.rip = regs.rip.wrapping_add(1);
            "fwait"
        }
        Effect::Popcnt {
            to,
            from,
            bits,
            len,
        } => {
            popcnt(&mut regs, to, from, bits);
            regs.rip = regs.rip.wrapping_add(len);
            "popcnt"
        }
    };
    vcpu.fd
        .set_regs(&regs)
        .map_err(Error::kvm("KVM_SET_REGS"))?;
    vcpu.regs = regs;
    if effect == Effect::Breakpoint {
        raise_breakpoint(vcpu)?;
    }
    Ok(Unemulated::Done(name))
}

/// INT3 is a trap: RIP is already behind it.
fn raise_breakpoint(vcpu: &mut KvmVcpu) -> Result<(), Error> {
    let mut events = vcpu
        .fd
        .get_vcpu_events()
        .map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT_VECTOR;
    events.exception.has_error_code = 0;
    events.exception.error_code = 0;
    vcpu.fd
        .set_vcpu_events(&events)
        .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))
}

/// The bytes at RIP, as many as the guest has mapped.
fn fetch(vcpu: &mut KvmVcpu) -> Result<Vec<u8>, Error> {
    let start = vcpu.sregs.cs.base.wrapping_add(vcpu.regs.rip);
    let mut code = Vec::with_capacity(MAX_INSTRUCTION_BYTES);
    while code.len() < MAX_INSTRUCTION_BYTES {
        let at = start.wrapping_add(code.len() as u64);
        let Some(physical) = vcpu.translate(at)? else {
            break;
        };
        let left_in_page = PAGE_SIZE - physical as usize % PAGE_SIZE;
        let mut bytes = [0; MAX_INSTRUCTION_BYTES];
        let part = &mut bytes[..left_in_page.min(MAX_INSTRUCTION_BYTES - code.len())];
        if vcpu.vm.memory().read(physical, part).is_err() {
            break;
        }
        code.extend_from_slice(part);
    }
    Ok(code)
}

fn is_long_mode(sregs: &kvm_sregs) -> bool {
    const EFER_LMA: u64 = 1 << 10;
    sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0
}

fn decode(code: &[u8], long_mode: bool) -> Option<Effect> {
    match code {
        [0xcc, ..] => Some(Effect::Breakpoint),
        [0x9b, ..] => Some(Effect::Wait),
        [0xf3, rest @ ..] if long_mode => decode_popcnt(rest),
        _ => None,
    }
}

/// POPCNT between registers: F3 [REX] 0F B8 /r with mod 3 (Intel SDM volume 2).
fn decode_popcnt(after_prefix: &[u8]) -> Option<Effect> {
    let (rex, rest) = match after_prefix {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        rest => (0, rest),
    };
    let [0x0f, 0xb8, modrm @ 0xc0..=0xff, ..] = rest else {
        return None;
    };
    Some(Effect::Popcnt {
        to: usize::from(modrm >> 3 & 7 | (rex >> 2 & 1) << 3),
        from: usize::from(modrm & 7 | (rex & 1) << 3),
        bits: if rex & 8 != 0 { 64 } else { 32 },
        len: if rex == 0 { 4 } else { 5 },
    })
}

fn popcnt(regs: &mut kvm_regs, to: usize, from: usize, bits: u32) {
    let value = *register(regs, from);
    let value = if bits == 64 {
        value
    } else {
        value & 0xffff_ffff
    };
    *register(regs, to) = u64::from(value.count_ones());
    regs.rflags &= !ARITHMETIC_FLAGS;
    if value == 0 {
        regs.rflags |= RFLAGS_ZF;
    }
}

/// A register by its number in instructions.
fn register(regs: &mut kvm_regs, number: usize) -> &mut u64 {
    match number {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn popcnt_forms_decode_to_their_registers() {
        let forms: [(&[u8], Effect); 3] = [
            // popcnt eax, ecx
            (
                &[0xf3, 0x0f, 0xb8, 0xc1],
                Effect::Popcnt {
                    to: 0,
                    from: 1,
                    bits: 32,
                    len: 4,
                },
            ),
            // popcnt rdi, rdx
            (
                &[0xf3, 0x48, 0x0f, 0xb8, 0xfa],
                Effect::Popcnt {
                    to: 7,
                    from: 2,
                    bits: 64,
                    len: 5,
                },
            ),
            // popcnt r8, r15
            (
                &[0xf3, 0x4d, 0x0f, 0xb8, 0xc7],
                Effect::Popcnt {
                    to: 8,
                    from: 15,
                    bits: 64,
                    len: 5,
                },
            ),
        ];
        for (code, effect) in forms {
            assert_eq!(decode(code, true), Some(effect), "{code:02x?}");
            assert_eq!(decode(code, false), None);
        }
    }

    #[test]
    fn other_instructions_are_not_taken_for_known_ones() {
        // popcnt eax, [rcx]; rep movsb; ud2; nothing.
        for code in [
            &[0xf3, 0x0f, 0xb8, 0x01][..],
            &[0xf3, 0xa4],
            &[0x0f, 0x0b],
            &[],
        ] {
            assert_eq!(decode(code, true), None, "{code:02x?}");
        }
    }

    #[test]
    fn popcnt_counts_zero_extends_and_sets_only_zf() {
        let mut regs = kvm_regs {
            rcx: 0xffff_0000_0000_0003,
            rflags: 0x202 | ARITHMETIC_FLAGS,
            ..kvm_regs::default()
        };
        regs.rax = u64::MAX;
        popcnt(&mut regs, 0, 1, 32);
        assert_eq!((regs.rax, regs.rflags), (2, 0x202));
        popcnt(&mut regs, 0, 1, 64);
        assert_eq!(regs.rax, 18);
        regs.rcx = 0;
        popcnt(&mut regs, 0, 1, 64);
        assert_eq!((regs.rax, regs.rflags), (0, 0x202 | RFLAGS_ZF));
    }
}
