//! What the tests share: skipping, and running a bare guest.

use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::bare::{BareGuest, Ring};
use hypervisor::{Exit, Stop, Vcpu};

/// RAM of a test guest.
pub(crate) const RAM_BYTES: u64 = 8 << 20;

/// Whether KVM is there. Counts and names what is skipped; panics if KVM is required.
pub(crate) fn have_kvm(test: &str) -> bool {
    static SKIPPED: AtomicU32 = AtomicU32::new(0);
    match hypervisor::kvm::open() {
        Ok(_) => true,
        Err(error) if std::env::var_os("POLLUX_REQUIRE_KVM").is_some_and(|set| set == "1") => {
            panic!("{test}: KVM is required: {error}")
        }
        Err(error) => {
            let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
            eprintln!("SKIPPED {test} (skipped so far: {count}): {error}");
            false
        }
    }
}

/// Returns from the test if KVM is not there.
#[macro_export]
macro_rules! needs_kvm {
    ($test:expr) => {
        if !$crate::guest::have_kvm($test) {
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
