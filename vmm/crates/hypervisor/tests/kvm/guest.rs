//! What the tests share: skipping, and running a bare guest.

use hypervisor::bare::{BareGuest, Ring};
use hypervisor::{Exit, Stop, Vcpu};

/// RAM of a test guest.
pub(crate) const RAM_BYTES: u64 = 8 << 20;

/// Returns from the test if KVM is not there.
#[macro_export]
macro_rules! needs_kvm {
    ($test:expr) => {
        if !harness::privileges::kvm($test) {
            return;
        }
    };
}

/// A guest about to run `code`.
pub(crate) fn guest(code: &[u8], ring: Ring) -> BareGuest {
    BareGuest::new(RAM_BYTES, code, ring).unwrap()
}

/// Runs to the next exit.
pub(crate) fn next_exit(guest: &mut BareGuest) -> Exit {
    match guest.vcpu.run().unwrap() {
        Stop::Exit(exit) => exit,
        Stop::Kicked => panic!("kicked at {:#x}", guest.vcpu.regs().rip),
    }
}

/// Runs to the next exit, which must be a one-byte write to `port`.
#[track_caller]
pub(crate) fn expect_out(guest: &mut BareGuest, port: u16) {
    let exit = next_exit(guest);
    assert_eq!(
        exit,
        Exit::PortOut {
            port,
            size: 1,
            count: 1
        },
        "regs {:x?}",
        guest.vcpu.regs()
    );
}
