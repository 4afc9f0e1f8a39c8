//! Injecting interrupts, the interrupt window, and instructions that KVM does not emulate.

use hypervisor::bare::{CODE, RFLAGS_IF, Ring, exception_port};
use hypervisor::{Error, Exit, Unemulated, Vcpu, Vm, guest_code};

use crate::guest::{expect_out, guest, next_exit};
use crate::needs_kvm;

const VECTOR: u8 = 0x41;

guest_code! {
    // The handler comes first: port 0x30 with the number of interrupts so far.
    fn interruptible() {
        "add r15, 1", "out 0x30, al", "iretq",
        ".balign 16",
        "2: out 0x10, al", "sti", "out 0x11, al", "nop", "out 0x12, al", "cli", "jmp 2b",
    }
}

guest_code! {
    // Interrupts are off in ring 0 and on in ring 3, which it enters by IRET.
    fn enter_ring3() {
        "add r15, 1", "out 0x30, al", "iretq",
        ".balign 16",
        "out 0x10, al", "mov rax, rsp", "push 0x2b", "push rax", "push 0x3202", "push 0x33",
        "lea rax, [rip + 2f]", "push rax", "iretq",
        "2: out 0x11, al", "jmp 2b",
    }
}
const INTERRUPTIBLE_ENTRY: u64 = CODE + 16;

guest_code! {
    fn halting() { "add r15, 1", "iretq", ".balign 16", "2: sti", "hlt", "cli", "out 0x10, al", "jmp 2b" }
}

guest_code! {
    fn breakpoint() { "int3", "out 0x10, al", "hlt" }
}

guest_code! {
    fn unemulated() { "mov eax, 0xf0f", "popcnt rcx, rax", "fwait", "popcnt r8d, ecx", "out 0x10, al" }
}

#[test]
fn instructions_that_kvm_lacks_are_carried_out() {
    needs_kvm!("instructions_that_kvm_lacks_are_carried_out");
    let mut guest = guest(unemulated(), Ring::Kernel);
    loop {
        match next_exit(&mut guest) {
            Exit::EmulationFailed => match guest.vcpu.skip_unemulated().unwrap() {
                Unemulated::Done(name) => assert!(["popcnt", "fwait"].contains(&name), "{name}"),
                Unemulated::NotKnown(code) => panic!("{code:02x?}"),
            },
            exit => {
                assert_eq!(
                    exit,
                    Exit::PortOut {
                        port: 0x10,
                        size: 1,
                        count: 1
                    }
                );
                break;
            }
        }
    }
    assert_eq!((guest.vcpu.regs().rcx, guest.vcpu.regs().r8), (8, 1));
}

#[test]
fn interrupt_is_taken_where_allowed_and_refused_elsewhere() {
    needs_kvm!("interrupt_is_taken_where_allowed_and_refused_elsewhere");
    let mut guest = guest(interruptible(), Ring::Kernel);
    guest.set_handler(VECTOR, CODE).unwrap();
    guest.update_regs(|regs| regs.rip = INTERRUPTIBLE_ENTRY);
    expect_out(&mut guest, 0x10);
    assert!(!guest.vcpu.can_interrupt(), "interrupts are off");
    let refused = guest.vcpu.inject(VECTOR);
    assert!(matches!(
        refused,
        Err(Error::NotInterruptible { vector: VECTOR })
    ));
    expect_out(&mut guest, 0x11);
    expect_out(&mut guest, 0x12);
    assert!(guest.vcpu.can_interrupt());
    guest.vcpu.inject(VECTOR).unwrap();
    assert!(!guest.vcpu.can_interrupt(), "one at a time");
    expect_out(&mut guest, 0x30);
    assert_eq!(guest.vcpu.regs().r15, 1);
    assert!(!guest.vcpu.can_interrupt(), "the gate turns interrupts off");
    expect_out(&mut guest, 0x10);
    assert_eq!(guest.vcpu.regs().rflags & RFLAGS_IF, 0);
}

#[test]
fn interrupt_wakes_a_halted_guest() {
    needs_kvm!("interrupt_wakes_a_halted_guest");
    let mut guest = guest(halting(), Ring::Kernel);
    guest.set_handler(VECTOR, CODE).unwrap();
    guest.update_regs(|regs| regs.rip = CODE + 16);
    for count in 1..=100 {
        assert_eq!(next_exit(&mut guest), Exit::Halt);
        assert!(guest.vcpu.can_interrupt());
        guest.vcpu.inject(VECTOR).unwrap();
        expect_out(&mut guest, 0x10);
        assert_eq!(guest.vcpu.regs().r15, count);
    }
}

#[test]
fn window_opens_where_the_guest_enters_ring_3_with_interrupts_on() {
    needs_kvm!("window_opens_where_the_guest_enters_ring_3_with_interrupts_on");
    let mut guest = guest(enter_ring3(), Ring::Kernel);
    guest.set_handler(VECTOR, CODE).unwrap();
    guest.update_regs(|regs| regs.rip = INTERRUPTIBLE_ENTRY);
    expect_out(&mut guest, 0x10);
    assert!(!guest.vcpu.can_interrupt());
    guest.vcpu.set_interrupt_window(true);
    assert!(guest.vcpu.interrupt_window());
    assert_eq!(next_exit(&mut guest), Exit::InterruptWindow);
    assert_eq!(
        guest.vcpu.sregs().cs.dpl,
        3,
        "before ring 3 has executed anything"
    );
    assert!(guest.vcpu.can_interrupt());
    guest.vcpu.set_interrupt_window(false);
    guest.vcpu.inject(VECTOR).unwrap();
    expect_out(&mut guest, 0x30);
    expect_out(&mut guest, 0x11);
    assert_eq!(guest.vcpu.regs().r15, 1);
}

#[test]
fn breakpoint_reaches_its_handler_whether_or_not_kvm_emulates_it() {
    needs_kvm!("breakpoint_reaches_its_handler_whether_or_not_kvm_emulates_it");
    let mut guest = guest(breakpoint(), Ring::Kernel);
    let mut exit = next_exit(&mut guest);
    if exit == Exit::EmulationFailed {
        assert_eq!(
            guest.vcpu.skip_unemulated().unwrap(),
            Unemulated::Done("int3")
        );
        exit = next_exit(&mut guest);
    }
    assert_eq!(
        exit,
        Exit::PortOut {
            port: exception_port(3),
            size: 1,
            count: 1
        }
    );
    let mut saved_rip = [0; 8];
    guest
        .vm
        .memory()
        .read(guest.vcpu.regs().rsp, &mut saved_rip)
        .unwrap();
    assert_eq!(u64::from_le_bytes(saved_rip), CODE + 1);
}
