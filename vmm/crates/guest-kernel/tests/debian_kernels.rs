//! Reads, plans and loads every Debian kernel in the cache; `scripts/guest-image --kernels-for-test`
//! fetches them. Where fewer than three builds are there each test here is skipped by name, or fails under
//! `POLLUX_REQUIRE_KVM=1`.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::{Path, PathBuf};

use guest_kernel::{
    FastBoot, ImageError, KernelImage, Missed, PatchPlan, PatchSet, PlanError, PlanOptions,
    QuirkSet, SensitiveInsn, payload, plan, scan_module,
};
use harness::privileges;

/// All quirks, all of fast boot.
const EVERYTHING: PlanOptions = PlanOptions {
    quirks: QuirkSet {
        syscall_keeps_cpl3: true,
        int3_not_emulated: true,
        x87_not_emulated: true,
        cpuid_visible_in_ring3: true,
    },
    fast_boot: Some(FastBoot {
        slow_timer: true,
        gigabyte_pages: true,
    }),
    allow_unknown_series: false,
};

/// So many builds show that the patches are not made for one alone.
const BUILDS: usize = 3;

/// The kernels in the cache. None where there are too few: `test` is then skipped.
fn kernels(test: &str) -> Vec<PathBuf> {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../.cache/kernels");
    let entries = std::fs::read_dir(&cache).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-"))
        })
        .collect();
    found.sort();
    let wanted =
        "three builds of Debian's kernel (scripts/guest-image --kernels-for-test fetches them)";
    if found.len() < BUILDS && !privileges::skip(test, wanted) {
        return Vec::new();
    }
    found
}

fn image(path: &Path) -> KernelImage {
    let file = std::fs::read(path).unwrap();
    KernelImage::parse(&file).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn plan_of(image: &KernelImage, options: &PlanOptions) -> PatchPlan {
    plan(image, options).unwrap_or_else(|e| panic!("{}: {e}", image.release()))
}

#[test]
fn every_kernel_is_planned_and_loaded() {
    for path in kernels("every_kernel_is_planned_and_loaded") {
        let image = image(&path);
        let plan = plan_of(&image, &EVERYTHING);
        println!(
            "{}: {} patches, plan {}",
            image.release(),
            plan.patches().len(),
            plan.id()
        );
        let report = plan.report();
        for (kind, least) in [
            ("RDTSC in code", 80),
            ("RDTSC in alternatives", 15),
            ("CPUID in code", 20),
            ("ftrace sites", 30_000),
            ("return sites", 40_000),
            ("retpoline sites", 7_000),
            ("LOCK prefixes", 8_000),
            ("tests of ciphers", 1),
            ("events of devices", 1),
            ("lengths of names of parameters", 1),
        ] {
            let count = report.count(kind);
            assert!(
                count.patched >= least,
                "{}: {kind}: {count:?}",
                image.release()
            );
            assert_eq!(count.left, 0, "{}: {kind}", image.release());
        }
        let free_pages = report.count("pages that are free at start");
        assert_eq!(free_pages.left, 0, "{}", image.release());
        let kernel = image.load(&plan).unwrap();
        assert_eq!(kernel.entry, 0x100_0000);
        assert_eq!(kernel.plan, plan.id());
        assert!(kernel.setup_header.is_some());
    }
}

#[test]
fn loaded_kernel_differs_from_its_image_only_where_patched() {
    for path in kernels("loaded_kernel_differs_from_its_image_only_where_patched")
        .iter()
        .take(1)
    {
        let image = image(path);
        let plan = plan_of(&image, &EVERYTHING);
        let plain = image
            .load(&plan_of(&image, &PlanOptions::default()))
            .unwrap();
        let patched = image.load(&plan).unwrap();
        for patch in plan.patches() {
            assert_eq!(
                image.read(patch.addr, patch.old.len()),
                Some(&*patch.old),
                "{:#x}",
                patch.addr
            );
        }
        let bytes = |kernel: &guest_kernel::LoadedKernel| -> usize {
            kernel
                .segments
                .iter()
                .map(|segment| segment.bytes.len())
                .sum()
        };
        assert_eq!(bytes(&plain), bytes(&patched));
        let changed: usize = plain
            .segments
            .iter()
            .zip(&patched.segments)
            .map(|(a, b)| a.bytes.iter().zip(&b.bytes).filter(|(a, b)| a != b).count())
            .sum();
        let most: usize = plan.patches().iter().map(|patch| patch.new.len()).sum();
        assert!(
            changed > 100_000 && changed <= most,
            "{changed} of at most {most}"
        );
    }
}

#[test]
fn without_options_only_determinism_is_patched() {
    for path in kernels("without_options_only_determinism_is_patched") {
        let plan = plan_of(&image(&path), &PlanOptions::default());
        assert!(
            plan.patches()
                .iter()
                .all(|patch| patch.set == PatchSet::Determinism)
        );
        assert!(plan.patches().len() < 200);
    }
}

#[test]
fn plan_id_follows_kernel_and_patches() {
    let mut ids = Vec::new();
    for path in kernels("plan_id_follows_kernel_and_patches") {
        let image = image(&path);
        let id = plan_of(&image, &EVERYTHING).id();
        assert_eq!(id, plan_of(&image, &EVERYTHING).id(), "the same twice");
        ids.extend([id, plan_of(&image, &PlanOptions::default()).id()]);
    }
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(
        ids.len(),
        count,
        "each kernel and each set of patches has its own id"
    );
}

#[test]
fn plan_for_another_kernel_is_refused() {
    let paths = kernels("plan_for_another_kernel_is_refused");
    if let [first, second, ..] = &paths[..] {
        let plan = plan_of(&image(first), &EVERYTHING);
        let error = image(second).load(&plan).unwrap_err();
        assert!(matches!(error, PlanError::OtherImage), "{error}");
    }
}

/// The ELF file in a bzImage with every `old` replaced by `new`, which is as long.
fn rewritten(path: &Path, old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut elf = payload::unpack(&std::fs::read(path).unwrap())
        .unwrap()
        .vmlinux;
    let places: Vec<usize> = (0..elf.len() - old.len())
        .filter(|at| elf[*at..].starts_with(old))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        elf[at..at + new.len()].copy_from_slice(new);
    }
    elf
}

#[test]
fn unknown_series_is_refused_unless_allowed() {
    for path in kernels("unknown_series_is_refused_unless_allowed")
        .iter()
        .take(1)
    {
        let elf = rewritten(path, b"Linux version 6.1.", b"Linux version 5.9.");
        let image = KernelImage::parse(&elf).unwrap();
        let error = plan(&image, &EVERYTHING).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("kernel 5.9.0-") && text.ends_with("known series: 6.1."),
            "{text}"
        );
        let options = PlanOptions {
            allow_unknown_series: true,
            ..EVERYTHING
        };
        assert!(plan(&image, &options).is_ok());
    }
}

#[test]
fn missing_section_is_named() {
    for path in kernels("missing_section_is_named").iter().take(1) {
        let elf = rewritten(path, b"\0.exit.text\0", b"\0.exit.nope\0");
        let image = KernelImage::parse(&elf).unwrap();
        match plan(&image, &EVERYTHING).unwrap_err() {
            PlanError::UnknownKernel { missed, .. } => {
                assert_eq!(missed, [Missed::Section(String::from(".exit.text"))]);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn changed_code_is_refused_with_place_and_bytes() {
    for path in kernels("changed_code_is_refused_with_place_and_bytes")
        .iter()
        .take(1)
    {
        let good = image(path);
        let entry = good.symbols().unique("asm_exc_page_fault").unwrap();
        let code = good.read(entry, 9).unwrap().to_vec();
        let mut elf = payload::unpack(&std::fs::read(path).unwrap())
            .unwrap()
            .vmlinux;
        // The file offset of .text differs from its address by a constant.
        let text = good.section(".text").unwrap().addr;
        let start = good.read(text, 64).unwrap();
        let text_at = elf.windows(64).position(|window| window == start).unwrap();
        let at = text_at + usize::try_from(entry - text).unwrap();
        assert_eq!(elf[at..at + 9], code);
        elf[at + 3] = 0x90;
        let error = plan(&KernelImage::parse(&elf).unwrap(), &EVERYTHING).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("HostQuirks patch at asm_exc_page_fault"),
            "{text}"
        );
        assert!(text.contains("expected [90, 90, 90, fc, e8"), "{text}");
        assert!(text.contains("found [90, 90, 90, 90, e8"), "{text}");
    }
}

#[test]
fn modules_of_the_guest_image_have_no_sensitive_instruction() {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../.cache/guest/modules");
    let entries = std::fs::read_dir(modules).into_iter().flatten();
    let mut scanned = 0;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|extension| extension == "ko") {
            let scan = scan_module(&std::fs::read(&path).unwrap()).unwrap();
            assert!(
                scan.code_bytes > 500,
                "{}: {} bytes",
                path.display(),
                scan.code_bytes
            );
            assert_eq!(scan.found, [], "{}", path.display());
            scanned += 1;
        }
    }
    if scanned == 0 {
        let test = "modules_of_the_guest_image_have_no_sensitive_instruction";
        privileges::skip(test, "a guest image (scripts/guest-image)");
    }
}

/// A kernel is not a module, but it is an ELF file with the instructions that are looked for.
#[test]
fn scan_finds_what_is_there() {
    for path in kernels("scan_finds_what_is_there").iter().take(1) {
        let elf = payload::unpack(&std::fs::read(path).unwrap())
            .unwrap()
            .vmlinux;
        let scan = scan_module(&elf).unwrap();
        let count = |insn| scan.found.iter().filter(|found| found.insn == insn).count();
        assert!(count(SensitiveInsn::Rdrand) > 0 && count(SensitiveInsn::Rdtsc) > 20);
    }
}

#[test]
fn arm64_elf_is_named() {
    let mut elf = vec![0; 64];
    elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf[18..20].copy_from_slice(&183u16.to_le_bytes());
    let error = KernelImage::parse(&elf).unwrap_err();
    assert!(matches!(error, ImageError::WrongMachine { .. }), "{error}");
    assert_eq!(error.to_string(), "a kernel for arm64, not for x86-64");
}
