//! The port ABI between the rewritten guest kernel and the VMM.
//!
//! All of these are byte-sized immediates (`in eax, imm8`, `out imm8, al`), because `RDTSC`, `CPUID`
//! and their replacement are both two bytes long. Every access is a synchronous exit, so a numbered
//! execution point. The kernel accesses them at CPL 0 only, except [`POWER_OFF`], which the guest's
//! init may use after `ioperm(2)`.
//!
//! None of the numbers belongs to a device of the PC platform that the VMM emulates.

/// `in eax, 0xE8` stands for `RDTSC`.
///
/// The VMM answers with the virtual time stamp counter: `RAX` = low 32 bits and `RDX` = high 32 bits,
/// the upper halves of both cleared. It changes no other register. The counter runs at
/// [`TSC_KHZ`], so it is virtual time in nanoseconds.
pub const RDTSC: u16 = 0xE8;

/// `in eax, 0xE9` stands for `CPUID`.
///
/// `EAX` holds the leaf and `ECX` the subleaf *before* the access. The VMM answers with all of `RAX`,
/// `RBX`, `RCX` and `RDX`, upper halves cleared.
pub const CPUID: u16 = 0xE9;

/// `out 0xF4, al` powers the machine off; `AL` is a status for the VMM's log.
///
/// Besides, a vCPU that executes `HLT` with interrupts disabled is off as well: that is what Linux
/// does at power-off and halt when it has no ACPI.
pub const POWER_OFF: u16 = 0xF4;

/// Frequency of the counter that [`RDTSC`] reads, in kHz: one tick is one nanosecond.
pub const TSC_KHZ: u32 = 1_000_000;
