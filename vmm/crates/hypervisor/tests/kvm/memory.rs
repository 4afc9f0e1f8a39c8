//! Dirty log, and memory written behind KVM's back.

use hypervisor::bare::{DATA, Ring};
use hypervisor::{DirtyBitmap, Gfn, Vcpu, Vm, guest_code};

use crate::guest::{expect_out, guest};
use crate::needs_kvm;

guest_code! {
    // Writes rcx words from rbx on, rdx bytes apart.
    fn write_words() {
        "2: mov rsi, rbx", "mov rdi, rcx",
        "3: add qword ptr [rsi], 1", "add rsi, rdx", "dec rdi", "jnz 3b",
        "out 0x10, al", "jmp 2b",
    }
}

guest_code! {
    fn read_word() { "2: mov rax, [rbx]", "out 0x10, al", "jmp 2b" }
}

fn data_pages(dirty: &DirtyBitmap) -> Vec<u64> {
    dirty
        .iter()
        .filter(|gfn| gfn.addr() >= Some(DATA))
        .map(|gfn| gfn.0)
        .collect()
}

#[test]
fn dirty_log_has_what_the_guest_wrote_and_is_cleared_by_fetching() {
    needs_kvm!("dirty_log_has_what_the_guest_wrote_and_is_cleared_by_fetching");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(write_words(), ring);
        guest.update_regs(|regs| (regs.rbx, regs.rcx, regs.rdx) = (DATA, 3, 0x3000));
        expect_out(&mut guest, 0x10);
        guest.vm.set_dirty_log(true).unwrap();
        expect_out(&mut guest, 0x10);
        let first = Gfn::of(DATA).0;
        assert_eq!(
            data_pages(&guest.vm.dirty_log().unwrap()),
            [first, first + 3, first + 6]
        );
        assert!(data_pages(&guest.vm.dirty_log().unwrap()).is_empty());
        guest.update_regs(|regs| regs.rcx = 1);
        expect_out(&mut guest, 0x10);
        assert_eq!(data_pages(&guest.vm.dirty_log().unwrap()), [first]);
        guest.vm.set_dirty_log(false).unwrap();
        assert!(guest.vm.dirty_log().is_err(), "the log is off");
        expect_out(&mut guest, 0x10);
    }
}

#[test]
fn dirty_log_survives_a_flush() {
    needs_kvm!("dirty_log_survives_a_flush");
    let mut guest = guest(write_words(), Ring::User);
    guest.update_regs(|regs| (regs.rbx, regs.rcx, regs.rdx) = (DATA, 2, 0x1000));
    guest.vm.set_dirty_log(true).unwrap();
    expect_out(&mut guest, 0x10);
    guest.vm.flush_shadow().unwrap();
    guest.update_regs(|regs| regs.rbx = DATA + 0x8000);
    expect_out(&mut guest, 0x10);
    let first = Gfn::of(DATA).0;
    assert_eq!(
        data_pages(&guest.vm.dirty_log().unwrap()),
        [first, first + 1, first + 8, first + 9]
    );
    assert!(data_pages(&guest.vm.dirty_log().unwrap()).is_empty());
}

#[test]
fn vmm_writes_are_in_their_own_set_and_the_guest_sees_them() {
    needs_kvm!("vmm_writes_are_in_their_own_set_and_the_guest_sees_them");
    let mut guest = guest(write_words(), Ring::User);
    guest.update_regs(|regs| (regs.rbx, regs.rcx, regs.rdx) = (DATA, 1, 8));
    guest.vm.set_dirty_log(true).unwrap();
    expect_out(&mut guest, 0x10);
    let _ = (
        guest.vm.dirty_log().unwrap(),
        guest.vm.memory().take_vmm_dirty(),
    );
    guest.vm.memory().write(DATA, &41u64.to_le_bytes()).unwrap();
    assert!(data_pages(&guest.vm.dirty_log().unwrap()).is_empty());
    assert_eq!(
        data_pages(&guest.vm.memory().take_vmm_dirty()),
        [Gfn::of(DATA).0]
    );
    expect_out(&mut guest, 0x10);
    let mut word = [0; 8];
    guest.vm.memory().read(DATA, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 42);
}

#[test]
fn page_tables_written_behind_kvm_count_after_a_flush() {
    needs_kvm!("page_tables_written_behind_kvm_count_after_a_flush");
    /// Entry of the page directory that maps DATA: 2 MiB pages, directory of the first GiB.
    const DIRECTORY_ENTRY: u64 = 0xa000 + DATA / (2 << 20) * 8;
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(read_word(), ring);
        let other = DATA + (2 << 20);
        guest.vm.memory().write(DATA, &1u64.to_le_bytes()).unwrap();
        guest.vm.memory().write(other, &2u64.to_le_bytes()).unwrap();
        guest.update_regs(|regs| regs.rbx = DATA);
        expect_out(&mut guest, 0x10);
        assert_eq!(guest.vcpu.regs().rax, 1);
        // As a delta does: bring to rest, write memory, flush, restore.
        guest.vcpu.settle().unwrap();
        let state = guest.vcpu.save().unwrap();
        guest
            .vm
            .memory()
            .write(DIRECTORY_ENTRY, &(other | 0x87).to_le_bytes())
            .unwrap();
        guest.vm.flush_shadow().unwrap();
        guest.vcpu.restore(&state).unwrap();
        expect_out(&mut guest, 0x10);
        assert_eq!(guest.vcpu.regs().rax, 2, "{ring:?}");
    }
}
