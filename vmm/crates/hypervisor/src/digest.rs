//! Fast digests of registers and memory, to compare a replica with its original.
//!
//! They find accidents, not forgeries: 64 bits, no secret, not cryptographic. The values are part
//! of what two sides compare, so the functions may only change together with the log format.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Folds one word into a running digest by a 64x64→128 bit multiplication.
#[inline]
#[must_use]
pub fn fold(digest: u64, word: u64) -> u64 {
    let product = u128::from(digest ^ word ^ 0xa076_1d64_78bd_642f)
        * u128::from(MULTIPLIER ^ word.rotate_left(32));
    (product as u64) ^ ((product >> 64) as u64) ^ digest.rotate_left(23)
}

/// Digest of bytes; the length is part of it.
#[must_use]
pub fn bytes(data: &[u8]) -> u64 {
    let mut lanes = [MULTIPLIER, !MULTIPLIER, MULTIPLIER << 1, data.len() as u64];
    let mut chunks = data.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("chunks of eight bytes"));
            *lane = (*lane ^ word).wrapping_mul(MULTIPLIER).rotate_left(29);
        }
    }
    let mut digest = lanes.into_iter().fold(0, fold);
    for byte in chunks.remainder() {
        digest = fold(digest, u64::from(*byte));
    }
    digest
}

/// Digest of the architectural register state of a vCPU.
///
/// Left out: the pending-interrupt bitmap and the APIC base of `sregs`, which describe KVM's
/// bookkeeping and not what the guest can see.
#[must_use]
pub fn registers(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    let general = [
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rsp,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags,
    ];
    let control = [
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer,
    ];
    let segments = [
        &sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss, &sregs.tr, &sregs.ldt,
    ];
    let mut digest = general.into_iter().chain(control).fold(0, fold);
    for segment in segments {
        digest = fold_segment(digest, segment);
    }
    [&sregs.gdt, &sregs.idt]
        .into_iter()
        .fold(digest, fold_table)
}

fn fold_segment(digest: u64, segment: &kvm_segment) -> u64 {
    let flags = [
        segment.present,
        segment.dpl,
        segment.db,
        segment.s,
        segment.l,
        segment.g,
        segment.avl,
        segment.unusable,
    ];
    let attributes = flags
        .into_iter()
        .fold(0, |word, flag| word << 2 | u64::from(flag & 3));
    let digest = fold(digest, segment.base);
    let digest = fold(
        digest,
        u64::from(segment.limit) << 16 | u64::from(segment.selector),
    );
    fold(digest, attributes << 8 | u64::from(segment.type_))
}

fn fold_table(digest: u64, table: &kvm_dtable) -> u64 {
    fold(fold(digest, table.base), u64::from(table.limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_bit_of_a_page_changes_its_digest() {
        let mut page = vec![0u8; 4096];
        let zero = bytes(&page);
        for bit in (0..4096 * 8).step_by(37) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(bytes(&page), zero, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(bytes(&page), zero);
    }

    #[test]
    fn length_and_order_are_part_of_the_digest() {
        assert_ne!(bytes(&[0; 32]), bytes(&[0; 64]));
        assert_ne!(bytes(&[0; 3]), bytes(&[0; 4]));
        assert_ne!(fold(fold(0, 1), 2), fold(fold(0, 2), 1));
    }

    #[test]
    fn registers_differ_by_any_field_that_the_guest_sees() {
        let regs = kvm_regs::default();
        let sregs = kvm_sregs::default();
        let base = registers(&regs, &sregs);
        assert_ne!(base, registers(&kvm_regs { r15: 1, ..regs }, &sregs));
        assert_ne!(base, registers(&kvm_regs { rax: 1, ..regs }, &sregs));
        assert_ne!(base, registers(&regs, &kvm_sregs { cr2: 4096, ..sregs }));
        let mut user = sregs;
        user.cs.dpl = 3;
        assert_ne!(base, registers(&regs, &user));
        let mut moved = sregs;
        moved.idt.limit = 1;
        assert_ne!(base, registers(&regs, &moved));
        let pending = kvm_sregs {
            interrupt_bitmap: [1; 4],
            apic_base: 9,
            ..sregs
        };
        assert_eq!(base, registers(&regs, &pending));
    }
}
