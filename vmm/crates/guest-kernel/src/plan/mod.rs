//! Decides what is rewritten in a kernel.
//!
//! [`plan`] looks for everything it needs before it gives up, so that one run on a new kernel names
//! all that is missing. Order matters only where patches may meet: stubs and skipped functions come
//! first, bulk patches leave out what is already covered.

mod accounting;
mod alternatives;
mod before_init;
mod crypto;
mod determinism;
mod fast_boot;
mod free_memory;
mod gigabyte;
mod initrd;
mod memory_map;
mod planner;
mod prelink;
mod quirks;
mod skips;
mod startup;
mod stubs;
mod tables;
mod timer;
mod user_cpuid;

use std::collections::BTreeMap;

use crate::error::PlanError;
use crate::image::KernelImage;
use crate::insn::Occurrence;
use crate::patch::PatchPlan;
use planner::Planner;

/// The kernel series that have been checked: the start of the release.
pub const KNOWN_SERIES: &[&str] = &["6.1."];

/// Defects of the host's KVM that need a change in the guest. The VMM sets them from its probes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QuirkSet {
    /// `SYSCALL` in ring 3 jumps to the kernel's entry but stays at privilege level 3.
    pub syscall_keeps_cpl3: bool,
    /// `INT3` in ring 0 is not emulated, or its #BP does not arrive well. Needs `rodata=off`.
    pub int3_not_emulated: bool,
    /// x87 instructions (`FNCLEX`, `EMMS`, `FILD`, `FWAIT`) in ring 0 are not emulated.
    pub x87_not_emulated: bool,
    /// `CPUID` in ring 3 shows the real processor, and cannot be made to fault. Needs a change in the
    /// programs too: [`crate::initramfs::prepare`].
    pub cpuid_visible_in_ring3: bool,
}

impl QuirkSet {
    /// The names of those that are there.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let Self {
            syscall_keeps_cpl3,
            int3_not_emulated,
            x87_not_emulated,
            cpuid_visible_in_ring3,
        } = self;
        let all = [
            (syscall_keeps_cpl3, "syscall_keeps_cpl3"),
            (int3_not_emulated, "int3_not_emulated"),
            (x87_not_emulated, "x87_not_emulated"),
            (cpuid_visible_in_ring3, "cpuid_visible_in_ring3"),
        ];
        all.into_iter()
            .filter_map(|(there, name)| there.then_some(name))
    }
}

/// How far to shorten the start on a host that emulates ring 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastBoot {
    /// Let the timer interrupt come every 27 ms at most, and every 54 ms while something runs, not every
    /// 4 ms. Needs `nohz=on`.
    pub slow_timer: bool,
    /// Map the kernel and all memory by pages of a gigabyte, which an emulator walks faster. The CPUID table
    /// must offer them.
    pub gigabyte_pages: bool,
}

/// What to plan for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Defects to go round.
    pub quirks: QuirkSet,
    /// `None` where ring 0 runs natively.
    pub fast_boot: Option<FastBoot>,
    /// Try a series that nobody has checked, as long as nothing is missed.
    pub allow_unknown_series: bool,
}

/// How many entries of a table, or places of one kind, were patched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SiteCount {
    /// Patched.
    pub patched: usize,
    /// Lies in code that another patch replaces.
    pub covered: usize,
    /// Left as it is, because the kernel's own code handles it too, only more slowly.
    pub left: usize,
}

/// What planning found, for a person and for tests.
#[derive(Debug, Clone, Default)]
pub struct PlanReport {
    /// Places by kind.
    pub sites: BTreeMap<&'static str, SiteCount>,
    /// Instructions that cannot be rewritten in place and never run while the CPUID table hides
    /// their feature: the VMM must not offer RDTSCP, RDRAND, RDSEED, RDPID, RTM and WAITPKG, and must
    /// leave CR4.PCE to the guest's kernel (no PMU).
    pub hidden: Vec<Occurrence>,
}

impl PlanReport {
    /// The count of that kind; zero if there was none.
    pub fn count(&self, kind: &str) -> SiteCount {
        self.sites.get(kind).copied().unwrap_or_default()
    }
}

/// Lists the patches for `image`.
///
/// # Errors
/// [`PlanError::UnknownKernel`] with everything that is missing; [`PlanError::OldBytes`] where code
/// has another form than the one that is known.
pub fn plan(image: &KernelImage, options: &PlanOptions) -> Result<PatchPlan, PlanError> {
    let mut planner = Planner::new(image);
    stubs::trap_user_instructions(&mut planner)?;
    quirks::plan(&mut planner, &options.quirks)?;
    if let Some(fast) = options.fast_boot {
        fast_boot::plan(&mut planner, fast)?;
    }
    determinism::plan(&mut planner)?;
    planner.finish(options.allow_unknown_series)
}
