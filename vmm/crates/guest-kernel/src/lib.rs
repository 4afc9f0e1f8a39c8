//! Loads a Linux kernel and rewrites in it what is not deterministic.
//!
//! From the bytes of a Debian `vmlinuz` or an ELF `vmlinux` to what a VMM needs to start it:
//!
//! 1. [`payload`] finds and decompresses the ELF inside a bzImage, on the host;
//! 2. [`KernelImage`] holds the ELF's segments and the symbols of its own kallsyms tables;
//! 3. [`plan()`] lists what has to be rewritten as [`Patch`] values (address, old bytes, new bytes, why);
//! 4. [`KernelImage::load`] applies a [`PatchPlan`], checking the old bytes again;
//! 5. [`boot`] writes kernel, initial RAM disk and boot parameters to guest memory and says with which
//!    register values the vCPU starts; [`CommandLine`] builds the command line;
//! 6. [`initramfs`] rewrites programs of the initial RAM disk where a host's quirk needs it.
//!
//! What always holds: nothing is patched that was not recognised; a kernel of which a part is not
//! found is refused with the list of what was missed. What the crate does not do: probe the host,
//! know a hypervisor or a memory crate, or touch guest memory other than through the caller's writer.
//! The port numbers that the rewritten code uses are in [`ports`].

mod asm;
pub mod boot;
mod bytes;
mod cmdline;
mod error;
mod image;
pub mod initramfs;
mod insn;
mod kallsyms;
mod load;
mod module;
mod patch;
pub mod payload;
mod plan;
pub mod ports;

pub use cmdline::{ClockTick, CommandLine};
pub use error::{BootError, ImageError, Missed, PlanError, SymbolError};
pub use image::{KernelImage, Section};
pub use insn::{Occurrence, SensitiveInsn};
pub use kallsyms::{Symbol, SymbolTable};
pub use load::{LoadedKernel, LoadedSegment};
pub use module::{ModuleScan, scan_module};
pub use patch::{Patch, PatchPlan, PatchSet, PlanId};
pub use plan::{FastBoot, KNOWN_SERIES, PlanOptions, PlanReport, QuirkSet, plan};
