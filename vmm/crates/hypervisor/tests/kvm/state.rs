//! Saving and restoring: the guest goes on bit for bit.

use hypervisor::bare::{BareGuest, CODE, DATA, RFLAGS_IF, Ring};
use hypervisor::kvm::KvmVm;
use hypervisor::{CpuidTable, Error, GuestRam, Stop, Vcpu, VcpuState, Vm, guest_code};

use crate::guest::{RAM_BYTES, expect_out, guest};
use crate::needs_kvm;

guest_code! {
    // A walk through memory that depends on all that came before, SSE included.
    fn walk() {
        "movabs r10, 6364136223846793005",
        "2: mov r9, 50",
        "3: imul rbx, r10", "add rbx, 12345", "mov rax, rbx", "shr rax, 30",
        "and rax, 0x1ffff8", "add [rsi + rax], rbx", "dec r9", "jnz 3b",
        "cvtsi2sd xmm0, rbx", "mulsd xmm1, xmm0", "addsd xmm1, xmm0", "movq r14, xmm1",
        "out 0x10, al", "jmp 2b",
    }
}

guest_code! {
    fn interruptible() { "add r15, 1", "iretq", ".balign 16", "2: out 0x10, al", "jmp 2b" }
}

/// Runs some exits and sums up what the guest shows at each.
fn digests(guest: &mut BareGuest, exits: usize) -> Vec<u64> {
    (0..exits)
        .map(|_| {
            expect_out(guest, 0x10);
            guest.vcpu.digest()
        })
        .collect()
}

fn copy_of(guest: &BareGuest, state: &VcpuState) -> BareGuest {
    let ram = GuestRam::new(guest.vm.memory().size_bytes()).unwrap();
    let mut page = [0; hypervisor::PAGE_SIZE];
    for gfn in guest.vm.memory().touched_pages().unwrap().iter() {
        guest.vm.memory().read_page(gfn, &mut page).unwrap();
        ram.write_page(gfn, &page).unwrap();
    }
    let vm = KvmVm::new(ram).unwrap();
    let mut vcpu = vm.create_vcpu(0, state.cpuid.clone()).unwrap();
    vcpu.restore(state).unwrap();
    BareGuest { vcpu, vm }
}

#[test]
fn restored_guest_goes_on_bit_for_bit() {
    needs_kvm!("restored_guest_goes_on_bit_for_bit");
    let mut original = guest(walk(), Ring::User);
    original.update_regs(|regs| (regs.rsi, regs.rbx) = (DATA, 42));
    digests(&mut original, 500);
    assert_eq!(original.vcpu.settle().unwrap(), Stop::Kicked);
    let state = original.vcpu.save().unwrap();
    let stored = postcard::to_stdvec(&state).unwrap();
    let loaded: VcpuState = postcard::from_bytes(&stored).unwrap();
    assert_eq!(loaded, state);
    let mut copy = copy_of(&original, &loaded);
    assert_eq!(copy.vcpu.save().unwrap(), state);
    assert_eq!(digests(&mut original, 500), digests(&mut copy, 500));
    assert_eq!(
        original.vm.memory().digest().unwrap(),
        copy.vm.memory().digest().unwrap()
    );
    original.vcpu.settle().unwrap();
    copy.vcpu.settle().unwrap();
    let (left, right) = (original.vcpu.save().unwrap(), copy.vcpu.save().unwrap());
    assert_eq!(left.fpu_digest(), right.fpu_digest());
    assert_eq!(left, right);
}

#[test]
fn injected_interrupt_that_is_not_yet_taken_is_part_of_the_state() {
    needs_kvm!("injected_interrupt_that_is_not_yet_taken_is_part_of_the_state");
    const VECTOR: u8 = 0x55;
    let mut original = guest(interruptible(), Ring::Kernel);
    original.set_handler(VECTOR, CODE).unwrap();
    original.update_regs(|regs| {
        regs.rip = CODE + 16;
        regs.rflags |= RFLAGS_IF;
    });
    expect_out(&mut original, 0x10);
    original.vcpu.settle().unwrap();
    original.vcpu.inject(VECTOR).unwrap();
    original.vcpu.set_interrupt_window(true);
    let state = original.vcpu.save().unwrap();
    let mut copy = copy_of(&original, &state);
    assert!(copy.vcpu.interrupt_window());
    assert!(!copy.vcpu.can_interrupt(), "one is on its way");
    copy.vcpu.set_interrupt_window(false);
    original.vcpu.set_interrupt_window(false);
    for guest in [&mut original, &mut copy] {
        expect_out(guest, 0x10);
        assert_eq!(guest.vcpu.regs().r15, 1);
    }
    assert_eq!(original.vcpu.digest(), copy.vcpu.digest());
}

#[test]
fn syscall_registers_and_trap_settings_are_part_of_the_state() {
    needs_kvm!("syscall_registers_and_trap_settings_are_part_of_the_state");
    const LSTAR: u32 = 0xc000_0082;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const PAT: u32 = 0x277;
    let mut original = guest(walk(), Ring::User);
    original.set_syscall_entry(0x1_2345).unwrap();
    original.vcpu.set_msr(KERNEL_GS_BASE, 0x7000).unwrap();
    original.vcpu.set_trap_tsc(true);
    let fault = original.vcpu.set_cpuid_fault(true).is_ok();
    original.vcpu.settle().unwrap();
    let state = original.vcpu.save().unwrap();
    assert_eq!(state.msr(LSTAR), Some(0x1_2345));
    assert_eq!(state.msr(KERNEL_GS_BASE), Some(0x7000));
    assert!(state.msr(PAT).is_some());
    assert_eq!(state.msr(0x140), fault.then_some(1));
    assert_eq!(state.msr(0x10), None, "the TSC follows the host's clock");
    let mut copy = copy_of(&original, &state);
    assert!(copy.vcpu.trap_tsc());
    assert_eq!(copy.vcpu.save().unwrap(), state);
}

#[test]
fn state_of_another_cpu_table_is_refused() {
    needs_kvm!("state_of_another_cpu_table_is_refused");
    let mut original = guest(walk(), Ring::User);
    original.vcpu.settle().unwrap();
    let state = original.vcpu.save().unwrap();
    let vm = KvmVm::new(GuestRam::new(RAM_BYTES).unwrap()).unwrap();
    let mut leaves = state.cpuid.leaves().to_vec();
    leaves[1].edx ^= 1 << 26;
    let mut other = vm.create_vcpu(0, CpuidTable::from_leaves(leaves)).unwrap();
    match other.restore(&state) {
        Err(Error::StateMismatch(why)) => assert!(why.contains("leaf 0x1"), "{why}"),
        result => panic!("{result:?}"),
    }
    let short = VcpuState {
        xsave: vec![0; 512],
        ..state
    };
    assert!(matches!(
        original.vcpu.restore(&short),
        Err(Error::StateMismatch(_))
    ));
}
