//! Port and MMIO accesses, and completing them.

use hypervisor::bare::{DATA, Ring};
use hypervisor::{Error, Exit, MMIO_HOLE_START, Stop, Vcpu, Vm, guest_code};

use crate::guest::{expect_out, guest, next_exit};
use crate::needs_kvm;

guest_code! {
    fn read_ports() { "2: in al, 0x10", "out 0x11, al", "in eax, 0x12", "out 0x13, al", "jmp 2b" }
}

guest_code! {
    fn write_string() { "cld", "rep outsb", "out 0x11, al", "hlt" }
}

guest_code! {
    fn read_mmio() { "2: mov rax, [rbx]", "out 0x11, al", "mov [rbx + 8], ecx", "jmp 2b" }
}

#[test]
fn port_read_sees_the_bytes_and_settling_completes_it() {
    needs_kvm!("port_read_sees_the_bytes_and_settling_completes_it");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(read_ports(), ring);
        assert_eq!(
            next_exit(&mut guest),
            Exit::PortIn {
                port: 0x10,
                size: 1,
                count: 1
            }
        );
        assert!(matches!(guest.vcpu.save(), Err(Error::NotSettled)));
        guest.vcpu.access_data().copy_from_slice(&[0xa5]);
        assert_eq!(guest.vcpu.settle().unwrap(), Stop::Kicked);
        assert_eq!(guest.vcpu.regs().rax & 0xff, 0xa5);
        let settled_at = guest.vcpu.regs().rip;
        assert!(guest.vcpu.access_data().is_empty());
        assert_eq!(guest.vcpu.settle().unwrap(), Stop::Kicked);
        assert_eq!(guest.vcpu.regs().rip, settled_at);
        expect_out(&mut guest, 0x11);
        assert_eq!(guest.vcpu.access_data(), [0xa5]);
    }
}

#[test]
fn registers_set_during_a_port_read_are_seen() {
    needs_kvm!("registers_set_during_a_port_read_are_seen");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(read_ports(), ring);
        next_exit(&mut guest);
        expect_out(&mut guest, 0x11);
        assert_eq!(
            next_exit(&mut guest),
            Exit::PortIn {
                port: 0x12,
                size: 4,
                count: 1
            }
        );
        // As for RDTSC: EDX:EAX.
        guest
            .vcpu
            .access_data()
            .copy_from_slice(&0x1122_3344u32.to_le_bytes());
        guest.update_regs(|regs| (regs.rax, regs.rdx, regs.rbx) = (0x1122_3344, 0x55, 0x66));
        assert!(matches!(guest.vcpu.save(), Err(Error::NotSettled)));
        expect_out(&mut guest, 0x13);
        let regs = guest.vcpu.regs();
        assert_eq!(
            (regs.rax, regs.rdx, regs.rbx),
            (0x1122_3344, 0x55, 0x66),
            "{ring:?}"
        );
    }
}

#[test]
fn string_write_hands_out_every_byte() {
    needs_kvm!("string_write_hands_out_every_byte");
    let mut guest = guest(write_string(), Ring::Kernel);
    let text = b"the quick brown fox";
    guest.vm.memory().write(DATA, text).unwrap();
    guest.update_regs(|regs| {
        (regs.rsi, regs.rcx, regs.rdx) = (DATA, text.len() as u64, 0x3f8);
    });
    let mut seen = Vec::new();
    loop {
        match next_exit(&mut guest) {
            exit @ Exit::PortOut {
                port: 0x3f8,
                size: 1,
                ..
            } => {
                assert_eq!(guest.vcpu.access_data().len(), exit.access_len());
                seen.extend_from_slice(guest.vcpu.access_data());
            }
            Exit::PortOut { port: 0x11, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, text);
    assert_eq!(next_exit(&mut guest), Exit::Halt);
}

#[test]
fn mmio_is_read_and_written() {
    needs_kvm!("mmio_is_read_and_written");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(read_mmio(), ring);
        let addr = MMIO_HOLE_START + 0x1000;
        guest.update_regs(|regs| (regs.rbx, regs.rcx) = (addr, 0xaabb_ccdd));
        assert_eq!(next_exit(&mut guest), Exit::MmioRead { addr, len: 8 });
        guest
            .vcpu
            .access_data()
            .copy_from_slice(&0x0102_0304_0506_0708u64.to_le_bytes());
        expect_out(&mut guest, 0x11);
        assert_eq!(guest.vcpu.regs().rax, 0x0102_0304_0506_0708);
        assert_eq!(
            next_exit(&mut guest),
            Exit::MmioWrite {
                addr: addr + 8,
                len: 4
            }
        );
        assert_eq!(guest.vcpu.access_data(), 0xaabb_ccddu32.to_le_bytes());
    }
}
