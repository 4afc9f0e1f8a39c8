//! Rewrites the initial RAM disk that `scripts/guest-image` makes: busybox, redis and the C library of
//! Debian. Without it each test here is skipped by name, or fails under `POLLUX_REQUIRE_KVM=1`.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::Path;

use guest_kernel::initramfs::{self, CPUID_STAND_IN, Report};
use guest_kernel::{QuirkSet, SensitiveInsn};
use harness::privileges;

fn archive(test: &str) -> Option<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../.cache/guest/initramfs.cpio");
    let archive = std::fs::read(path).ok();
    if archive.is_none() {
        privileges::skip(test, "a guest image (scripts/guest-image)");
    }
    archive
}

fn prepare(archive: Vec<u8>) -> (Vec<u8>, Report) {
    let quirks = QuirkSet {
        cpuid_visible_in_ring3: true,
        ..QuirkSet::default()
    };
    initramfs::prepare(archive, &quirks).unwrap()
}

fn rewritten(report: &Report, name: &str) -> usize {
    let mut named = report
        .programs
        .iter()
        .filter(|program| program.file.ends_with(name));
    let program = named.next().unwrap_or_else(|| panic!("no {name}"));
    program.rewritten
}

#[test]
fn cpuid_is_rewritten_wherever_debian_programs_have_it() {
    let Some(archive) = archive("cpuid_is_rewritten_wherever_debian_programs_have_it") else {
        return;
    };
    let (out, report) = prepare(archive.clone());
    println!("{report}");
    for program in &report.programs {
        let (file, count, sites) = (&program.file, program.rewritten, &program.sites);
        println!("{file}: {count} rewritten, others {sites:?}");
    }
    // The dynamic loader and the static C library choose their routines by it.
    for name in [
        "bin/busybox",
        "ld-linux-x86-64.so.2",
        "libcrypto.so.3",
        "bin/probe",
    ] {
        assert!(rewritten(&report, name) > 0, "{name}");
    }
    // Tables of points of elliptic curves lie among the code of libcrypto.
    let has_tables = |file: &str| file.ends_with("libcrypto.so.3");
    let programs = &mut report.programs.iter();
    assert!(programs.all(|program| program.among_data.is_empty() || has_tables(&program.file)));
    assert_eq!(report.obstacles(), [""; 0]);
    assert!(report.modules.len() >= 5, "{}", report.modules.len());
    assert!(report.count(SensitiveInsn::Rdrand) > 0, "the probe has one");
    let changed = archive.iter().zip(&out).filter(|(a, b)| a != b).count();
    assert_eq!(archive.len(), out.len());
    assert_eq!(changed, report.patches.len(), "one byte of each CPUID");
}

#[test]
fn rewritten_archive_has_nothing_left_to_rewrite() {
    let Some(archive) = archive("rewritten_archive_has_nothing_left_to_rewrite") else {
        return;
    };
    let holds = |bytes: &[u8], pair: [u8; 2]| bytes.windows(2).filter(|two| *two == pair).count();
    let before = holds(&archive, CPUID_STAND_IN);
    let (out, first) = prepare(archive);
    let (again, second) = prepare(out.clone());
    assert_eq!(second.patches, []);
    assert_eq!(second.programs.len(), first.programs.len());
    assert!(again == out);
    assert_eq!(holds(&out, CPUID_STAND_IN), before + first.patches.len());
}
