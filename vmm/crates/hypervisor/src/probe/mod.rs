//! Start-up probes: what this host's KVM can do and where it differs from a processor.
//!
//! Tiny guests find it out by running; nothing is concluded from the name of a hypervisor, a
//! processor or a module. All that the project knows about quirks of KVM hosts is here: other
//! code asks the [`HostProfile`].
//!
//! Every guest is stopped after [`PROBE_LIMIT`] of processor time, so that the whole takes bounded
//! time even on a host where a guest loops for ever, and finds the same on a busy host.

mod cpuid;
mod hidden;
mod instructions;
mod interrupts;
mod lab;
mod memory;
mod profile;
mod speed;
mod syscall;
mod tsc;

pub use hidden::HiddenInstruction;
pub use instructions::{Instruction, Verdict};
pub use interrupts::WindowPrecision;
pub use lab::PROBE_LIMIT;
pub use profile::{Capabilities, HostProfile, Quirks, Speeds};
pub use syscall::SyscallEntry;
pub use tsc::TscTrap;

use crate::Error;

/// Probes this host.
///
/// # Errors
/// If KVM cannot be opened, lacks what every machine here needs, or refuses to set up a guest.
pub fn run() -> Result<HostProfile, Error> {
    let mut lab = lab::Lab::new()?;
    let quirks = Quirks {
        instructions: instructions::probe(&mut lab)?,
        syscall: syscall::probe_syscall(&mut lab)?,
        software_interrupts_work: syscall::probe_software_interrupt(&mut lab)?,
        tsc: tsc::probe(&mut lab)?,
        cpuid_hides_in_ring0: cpuid::probe_hiding(crate::bare::Ring::Kernel)?,
        cpuid_hides_in_ring3: cpuid::probe_hiding(crate::bare::Ring::User)?,
        hidden_but_usable: hidden::probe()?,
        cpuid_faults: cpuid::probe_faulting(&mut lab)?,
        window_in_ring0: interrupts::probe_ring0(&mut lab)?,
        window_at_ring3_entry: interrupts::probe_ring3_entry(&mut lab)?,
        gigabyte_pages: memory::probe_gigabyte_pages()?,
        dirty_log_exact: memory::probe_dirty_log(&mut lab)?,
    };
    let speeds = speed::probe(&mut lab)?;
    Ok(HostProfile {
        capabilities: lab.capabilities(),
        quirks,
        speeds,
        huge_pages: memory::probe_huge_pages(&mut lab)?,
    })
}
