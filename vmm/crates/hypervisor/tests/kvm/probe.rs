//! The start-up probes on this host.

use std::time::{Duration, Instant};

use hypervisor::probe::{self, HostProfile, Instruction, Verdict};

use crate::needs_kvm;

#[test]
fn profile_is_found_quickly_and_is_the_same_again() {
    needs_kvm!("profile_is_found_quickly_and_is_the_same_again");
    let begin = Instant::now();
    let profile = probe::run().unwrap();
    let took = begin.elapsed();
    eprintln!("{took:?} {profile:#?}");
    // The aim is a second; a test machine may be busy with other things.
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(probe::run().unwrap().quirks, profile.quirks);
    let stored = postcard::to_stdvec(&profile).unwrap();
    assert_eq!(
        postcard::from_bytes::<HostProfile>(&stored).unwrap(),
        profile
    );
}

#[test]
fn what_every_kernel_needs_runs_in_ring_0() {
    needs_kvm!("what_every_kernel_needs_runs_in_ring_0");
    let quirks = probe::run().unwrap().quirks;
    for needed in [
        Instruction::Ud2,
        Instruction::Fxsave,
        Instruction::Barriers,
        Instruction::StringMove,
        Instruction::Atomics,
    ] {
        assert!(
            quirks.runs_in_ring0(needed),
            "{needed:?}: {:?}",
            quirks.instructions
        );
    }
    let endless = quirks
        .instructions
        .iter()
        .find(|(_, verdict)| *verdict == Verdict::Endless);
    assert_eq!(endless, None);
}
