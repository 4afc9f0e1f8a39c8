//! The stub as a listing, and at work in a guest of a few instructions.

use hypervisor::bare::{BareGuest, Ring};
use hypervisor::{Exit, Stop, Vcpu, Vm};

use super::*;
use crate::asm::listing;

#[test]
fn stub_decodes_to_its_listing() {
    const STUB: u64 = 0xffff_ffff_8101_0000;
    let original = Original {
        error_code: ErrorCode::None,
        error_entry: 0xffff_ffff_8180_0000,
        rest: 0xffff_ffff_8170_000b,
    };
    let code = invalid_op(STUB, original);
    assert_eq!(
        listing(&code, STUB),
        "cmp qword ptr [rsp+8],33h\n\
         jne short 0FFFFFFFF8101002Fh\n\
         push rax\n\
         mov rax,[rsp+8]\n\
         shr rax,2Fh\n\
         jne short 0FFFFFFFF8101002Eh\n\
         mov rax,[rsp+8]\n\
         cmp byte ptr [rax],0Fh\n\
         jne short 0FFFFFFFF8101002Eh\n\
         cmp byte ptr [rax+1],4\n\
         jne short 0FFFFFFFF8101002Eh\n\
         pop rax\n\
         add qword ptr [rsp],2\n\
         in eax,0E9h\n\
         iretq\n\
         pop rax\n\
         cld\n\
         push 0FFFFFFFFFFFFFFFFh\n\
         call 0FFFFFFFF81800000h\n\
         jmp 0FFFFFFFF8170000Bh\n"
    );
}

/// Where the stub lies in the test's guest.
const STUB: u64 = 0x3_0000;
/// What stands for the kernel's `error_entry`: it writes to [`ORIGINAL_PORT`].
const ERROR_ENTRY: u64 = 0x3_1000;
const ORIGINAL_PORT: u16 = 0x42;
const INVALID_OPCODE: u8 = 6;

/// A guest that is about to run `code`, with the stub as its #UD handler. `None` without KVM.
fn guest(test: &str, code: &[u8], ring: Ring) -> Option<BareGuest> {
    if !harness::privileges::kvm(test) {
        return None;
    }
    let guest = BareGuest::new(8 << 20, code, ring).unwrap();
    let original = Original {
        error_code: ErrorCode::None,
        error_entry: ERROR_ENTRY,
        rest: ERROR_ENTRY,
    };
    let memory = guest.vm.memory();
    memory.write(STUB, &invalid_op(STUB, original)).unwrap();
    memory.write(ERROR_ENTRY, &[0xe6, 0x42, 0xf4]).unwrap(); // out 0x42, al; hlt
    guest.set_handler(INVALID_OPCODE, STUB).unwrap();
    Some(guest)
}

#[track_caller]
fn expect(guest: &mut BareGuest, exit: Exit) {
    let stop = guest.vcpu.run().unwrap();
    assert_eq!(stop, Stop::Exit(exit), "{:x?}", guest.vcpu.regs());
}

const fn out(port: u16) -> Exit {
    Exit::PortOut {
        port,
        size: 1,
        count: 1,
    }
}

#[test]
fn program_gets_the_answer_of_the_port_and_goes_on_behind_the_stand_in() {
    // mov eax, 0x80000001; mov ecx, 7; stc; the stand-in; out 0x10, al
    let code = [
        &[0xb8, 1, 0, 0, 0x80, 0xb9, 7, 0, 0, 0, 0xf9][..],
        &CPUID_STAND_IN,
        &[0xe6, 0x10],
    ]
    .concat();
    let name = "program_gets_the_answer_of_the_port_and_goes_on_behind_the_stand_in";
    let Some(mut guest) = guest(name, &code, Ring::User) else {
        return;
    };
    let before = *guest.vcpu.regs();
    let read = Exit::PortIn {
        port: ports::CPUID,
        size: 4,
        count: 1,
    };
    expect(&mut guest, read);
    let asked = *guest.vcpu.regs();
    assert_eq!((asked.rax, asked.rcx), (0x8000_0001, 7), "leaf and subleaf");
    guest
        .vcpu
        .access_data()
        .copy_from_slice(&11u32.to_le_bytes());
    guest.update_regs(|regs| (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (11, 12, 13, 14));
    expect(&mut guest, out(0x10));
    let after = *guest.vcpu.regs();
    assert_eq!(
        (after.rax, after.rbx, after.rcx, after.rdx),
        (11, 12, 13, 14)
    );
    assert_eq!(guest.vcpu.sregs().cs.selector, u16::from(USER_CS));
    assert_eq!(after.rsp, before.rsp);
    assert_eq!(after.rflags & 1, 1, "the carry flag is kept");
}

#[test]
fn every_other_invalid_opcode_takes_the_kernels_path() {
    let name = "every_other_invalid_opcode_takes_the_kernels_path";
    let cases: [(&[u8], Ring); 4] = [
        (&[0x0f, 0x0b], Ring::User),       // ud2
        (&[0x0f, 0x0b], Ring::Kernel),     // BUG() of a kernel
        (&[0x0f, 0xb9, 0xc0], Ring::User), // ud1
        (&[0x06, 0x04], Ring::User),       // only the second byte of the stand-in
    ];
    for (code, ring) in cases {
        let Some(mut guest) = guest(name, code, ring) else {
            return;
        };
        guest.update_regs(|regs| regs.rax = 0x1234_5678);
        let rip = guest.vcpu.regs().rip;
        expect(&mut guest, out(ORIGINAL_PORT));
        let regs = *guest.vcpu.regs();
        assert_eq!(regs.rax, 0x1234_5678, "{code:02x?}: RAX is kept");
        // The return address of the call, the stand-in for an error code, RIP.
        let word = |at: u64| {
            let mut bytes = [0; 8];
            guest.vm.memory().read(regs.rsp + at, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!((word(8), word(16)), (u64::MAX, rip), "{code:02x?} {ring:?}");
    }
}
