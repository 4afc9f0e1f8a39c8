//! Dirty log, and memory written behind KVM's back.

use hypervisor::bare::{BareGuest, DATA, Ring};
use hypervisor::{DirtyBitmap, Error, Gfn, GuestRam, PAGE_SIZE, Stop, Vcpu, Vm, guest_code};

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

/// Tables of the bare guest, from its root to the directory that maps DATA; pages of 2 MiB.
const TABLES: [u64; 3] = [0x8000, 0x9000, 0xa000];

/// Puts new tables below that of `level`, in which DATA is `to`, and has it lead to them, as a kernel would. Returns
/// the page that it has written to in the tables that were in use.
fn remap(ram: &GuestRam, level: usize, to: u64) -> Gfn {
    let spare = |level: usize| DATA + 0x10_0000 + level as u64 * 0x1000;
    let last = TABLES.len() - 1;
    for (below, old) in TABLES.iter().enumerate().skip(level + 1) {
        let mut table = [0; PAGE_SIZE];
        ram.read(*old, &mut table).unwrap();
        ram.write(spare(below), &table).unwrap();
    }
    let put = |level: usize, table: u64| {
        let (index, entry) = if level == last {
            (DATA / (2 << 20), to | 0x87)
        } else {
            (0, spare(level + 1) | 7)
        };
        ram.write(table + index * 8, &entry.to_le_bytes()).unwrap();
    };
    put(level, TABLES[level]);
    (level + 1..=last).for_each(|below| put(below, spare(below)));
    Gfn::of(TABLES[level])
}

/// Brings to rest, writes memory, has the pages noticed that `write` names, and restores.
fn write_as_a_delta(guest: &mut BareGuest, write: impl FnOnce() -> Vec<Gfn>) {
    guest.vcpu.settle().unwrap();
    let state = guest.vcpu.save().unwrap();
    guest.vcpu.notice_writes(&write()).unwrap();
    guest.vcpu.restore(&state).unwrap();
}

#[test]
fn page_tables_written_behind_kvm_count_once_they_are_noticed() {
    needs_kvm!("page_tables_written_behind_kvm_count_once_they_are_noticed");
    for ring in [Ring::Kernel, Ring::User] {
        for level in 0..TABLES.len() {
            let mut guest = guest(read_word(), ring);
            let other = DATA + (2 << 20);
            let ram = guest.vm.memory().clone();
            ram.write(DATA, &1u64.to_le_bytes()).unwrap();
            ram.write(other, &2u64.to_le_bytes()).unwrap();
            guest.update_regs(|regs| regs.rbx = DATA);
            expect_out(&mut guest, 0x10);
            assert_eq!(guest.vcpu.regs().rax, 1);
            write_as_a_delta(&mut guest, || vec![remap(&ram, level, other)]);
            expect_out(&mut guest, 0x10);
            assert_eq!(guest.vcpu.regs().rax, 2, "{ring:?}, level {level}");
        }
    }
}

#[test]
fn last_level_tables_written_behind_kvm_count_once_they_are_noticed() {
    needs_kvm!("last_level_tables_written_behind_kvm_count_once_they_are_noticed");
    const TABLE: u64 = DATA + 0x10_0000;
    let page = |index: u64| DATA + index * PAGE_SIZE as u64;
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(read_word(), ring);
        let ram = guest.vm.memory().clone();
        let entry = |index: u64, to: u64| {
            let word = (page(to) | 7).to_le_bytes();
            ram.write(TABLE + index * 8, &word).unwrap();
        };
        for index in 0..512 {
            entry(index, index);
        }
        ram.write(TABLES[2] + 8, &(TABLE | 7).to_le_bytes())
            .unwrap();
        for (index, content) in [(5, 1_u64), (9, 2)] {
            ram.write(page(index), &content.to_le_bytes()).unwrap();
        }
        guest.update_regs(|regs| regs.rbx = page(5));
        expect_out(&mut guest, 0x10);
        assert_eq!(guest.vcpu.regs().rax, 1);
        // More than one page at a time: a page that is written to often, KVM forgets for that alone.
        write_as_a_delta(&mut guest, || {
            entry(5, 9);
            let others = (0..15).map(|n| Gfn::of(page(n)));
            others.chain([Gfn::of(TABLE)]).collect()
        });
        expect_out(&mut guest, 0x10);
        assert_eq!(guest.vcpu.regs().rax, 2, "{ring:?}");
    }
}

#[test]
fn noticing_changes_no_memory_and_refuses_what_is_none() {
    needs_kvm!("noticing_changes_no_memory_and_refuses_what_is_none");
    let mut guest = guest(read_word(), Ring::User);
    guest.update_regs(|regs| regs.rbx = DATA);
    expect_out(&mut guest, 0x10);
    guest.vcpu.settle().unwrap();
    let state = guest.vcpu.save().unwrap();
    let ram = guest.vm.memory().clone();
    let content = |ram: &GuestRam| -> Vec<u8> {
        let mut bytes = vec![0; ram.size_bytes() as usize];
        ram.read(0, &mut bytes).unwrap();
        bytes
    };
    let before = content(&ram);
    let all: Vec<Gfn> = ram.pages().collect();
    guest.vcpu.kicker().kick();
    guest.vcpu.notice_writes(&all).unwrap();
    assert!(before == content(&ram), "memory has changed");
    let outside = Gfn::of(ram.size_bytes());
    assert!(matches!(
        guest.vcpu.notice_writes(&[outside]),
        Err(Error::Ram(_))
    ));
    guest.vcpu.restore(&state).unwrap();
    assert_eq!(guest.vcpu.run().unwrap(), Stop::Kicked, "the kick is kept");
    expect_out(&mut guest, 0x10);
}
