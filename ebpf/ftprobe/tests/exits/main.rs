//! Exits of a small virtual machine of this process, as the tracepoints of KVM tell them.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use ftprobe::exits::Exits;
use harness::privileges;
use hypervisor::bare::{BareGuest, Ring};
use hypervisor::{Exit, Stop, Vcpu, guest_code};

const RAM_BYTES: u64 = 8 << 20;
const PORT: u16 = 0x10;
const EXITS: u64 = 100;

guest_code! {
    fn write_to_a_port() { "2: out 0x10, al", "jmp 2b" }
}

#[test]
fn exits_are_counted_by_reason_and_accesses_by_port() {
    let name = "exits_are_counted_by_reason_and_accesses_by_port";
    if !privileges::root(name) || !privileges::kvm(name) {
        return;
    }
    let exits = Exits::start().unwrap();
    let mut guest = BareGuest::new(RAM_BYTES, write_to_a_port(), Ring::User).unwrap();
    for _ in 0..EXITS {
        let out = Stop::Exit(Exit::PortOut {
            port: PORT,
            size: 1,
            count: 1,
        });
        assert_eq!(guest.vcpu.run().unwrap(), out);
    }
    let own = std::process::id();
    let counted = exits.exits();
    let io = counted
        .iter()
        .find(|(key, _)| key.process == own && key.reason_name() == "io");
    assert_eq!(io.map(|(_, count)| *count), Some(EXITS), "{counted:?}");
    let ports = exits.ports();
    let written = ports
        .iter()
        .find(|(key, _)| key.process == own && key.port == PORT && key.out);
    assert_eq!(written.map(|(_, count)| *count), Some(EXITS), "{ports:?}");
}
