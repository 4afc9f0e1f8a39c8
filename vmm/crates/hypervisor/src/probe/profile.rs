//! What the probes have found, and what follows from it.

use serde::{Deserialize, Serialize};

use super::{HiddenInstruction, Instruction, SyscallEntry, TscTrap, Verdict, WindowPrecision};
use crate::CpuidPolicy;

/// Below this, ring 0 is run by an instruction emulator: emulators reach some millions of
/// instructions a second, processors thousands of millions.
const EMULATED_BELOW_MINSTR_PER_S: f64 = 100.0;

/// Everything that was found out about this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostProfile {
    /// Extensions of KVM.
    pub capabilities: Capabilities,
    /// How guests behave. Two hosts of a pair must have the same.
    pub quirks: Quirks,
    /// Measured, so never the same twice.
    pub speeds: Speeds,
    /// Whether guest RAM gets huge pages.
    pub huge_pages: bool,
}

/// Extensions of KVM that make a difference and that not every host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Version of KVM's interface.
    pub api_version: i32,
    /// MSRs that show the host's clock can be hidden (`KVM_CAP_X86_MSR_FILTER`).
    pub msr_filter: bool,
    /// Bytes of the XSAVE image (`KVM_CAP_XSAVE2`), 0 if KVM does not tell.
    pub xsave_bytes: i32,
    /// Memory slots.
    pub memory_slots: usize,
}

/// Where guests on this host behave differently from a processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quirks {
    /// Instructions in ring 0, each with what happened.
    pub instructions: Vec<(Instruction, Verdict)>,
    /// SYSCALL of ring 3.
    pub syscall: SyscallEntry,
    /// INT n of ring 3 reaches its gate.
    pub software_interrupts_work: bool,
    /// RDTSC of ring 3.
    pub tsc: TscTrap,
    /// CPUID of ring 0 shows the given table and nothing else.
    pub cpuid_hides_in_ring0: bool,
    /// CPUID of ring 3 shows the given table and nothing else.
    pub cpuid_hides_in_ring3: bool,
    /// CPUID of ring 3 can be made to fault (MSR 140h).
    pub cpuid_faults: bool,
    /// Instructions that the CPUID table hides and that ring 3 can execute all the same.
    pub hidden_but_usable: Vec<HiddenInstruction>,
    /// The interrupt window in ring 0.
    pub window_in_ring0: WindowPrecision,
    /// The interrupt window where ring 3 is entered with interrupts on.
    pub window_at_ring3_entry: WindowPrecision,
    /// Page tables of the guest may hold pages of a gigabyte, in both rings.
    pub gigabyte_pages: bool,
    /// The dirty log has all pages that ring 0 and ring 3 wrote, and fetching clears it.
    pub dirty_log_exact: bool,
}

/// What things cost here. Single short measurements: to tell orders of magnitude apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speeds {
    /// Millions of simple instructions a second in ring 0.
    pub ring0_minstr_per_s: f64,
    /// The same in ring 3.
    pub ring3_minstr_per_s: f64,
    /// Microseconds of an exit from ring 0 and back.
    pub ring0_exit_us: f64,
    /// Microseconds of an exit from ring 3 and back.
    pub ring3_exit_us: f64,
}

impl HostProfile {
    /// Whether ring 0 is run by an instruction emulator.
    #[must_use]
    pub fn is_ring0_emulated(&self) -> bool {
        self.speeds.ring0_minstr_per_s < EMULATED_BELOW_MINSTR_PER_S
    }

    /// The CPUID policy for this host.
    #[must_use]
    pub fn cpuid_policy(&self) -> CpuidPolicy {
        CpuidPolicy {
            tsc: self.quirks.tsc != TscTrap::Impossible,
            popcnt: self.quirks.runs_in_ring0(Instruction::Popcnt),
            gigabyte_pages: self.is_ring0_emulated() && self.quirks.gigabyte_pages,
        }
    }
}

impl Quirks {
    /// Whether ring 0 can execute an instruction without help.
    #[must_use]
    pub fn runs_in_ring0(&self, instruction: Instruction) -> bool {
        self.instructions.contains(&(instruction, Verdict::Runs))
    }

    /// Instructions of ring 0 that KVM's emulator refuses.
    pub fn not_emulated(&self) -> impl Iterator<Item = Instruction> + '_ {
        self.instructions
            .iter()
            .filter(|(_, verdict)| *verdict == Verdict::NotEmulated)
            .map(|(instruction, _)| *instruction)
    }

    /// Whether the guest kernel needs the stub that finishes SYSCALL's change to ring 0.
    #[must_use]
    pub fn needs_syscall_stub(&self) -> bool {
        self.syscall == SyscallEntry::StaysInRing3
    }

    /// Whether [`crate::Vcpu::set_trap_tsc`] is needed to make RDTSC of ring 3 fault.
    #[must_use]
    pub fn needs_host_tsc_trap(&self) -> bool {
        self.tsc == TscTrap::ByHost
    }

    /// Whether CPUID of ring 3 must be made to fault, because it shows what the table hides.
    #[must_use]
    pub fn needs_cpuid_fault(&self) -> bool {
        !self.cpuid_hides_in_ring3
    }

    /// Whether programs see the real processor: neither the table nor a fault can prevent it.
    /// Then CPUID has to be rewritten in them, which is done for those of the initial RAM disk. Others
    /// are deterministic only as long as the vCPU stays on one CPU, and both hosts of a pair offer the
    /// same processor.
    #[must_use]
    pub fn shows_real_cpuid(&self) -> bool {
        self.needs_cpuid_fault() && !self.cpuid_faults
    }

    /// Why a guest cannot be made deterministic here; empty if it can. What depends on its programs is
    /// no obstacle: see [`Self::shows_real_cpuid`] and [`Self::hidden_but_usable`].
    #[must_use]
    pub fn obstacles(&self) -> Vec<&'static str> {
        let found = [
            (
                self.syscall == SyscallEntry::Broken,
                "SYSCALL does not reach its entry",
            ),
            (
                self.tsc == TscTrap::Impossible,
                "RDTSC of programs cannot be made to fault",
            ),
            (!self.dirty_log_exact, "the dirty log misses pages"),
        ];
        found
            .into_iter()
            .filter_map(|(holds, why)| holds.then_some(why))
            .collect()
    }
}
