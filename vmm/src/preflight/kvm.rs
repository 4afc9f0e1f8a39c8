//! KVM: whether it can be used, and what the start-up probes have found.

use hypervisor::Error;
use hypervisor::probe::{
    self, HiddenInstruction, HostProfile, Instruction, Quirks, SyscallEntry, TscTrap,
    WindowPrecision,
};

use super::report::Finding;

const AREA: &str = "KVM";
const NATIVE_HOST: &str = "use a host with VMX or SVM, or one whose own hypervisor offers it";

pub(super) fn check() -> (Vec<Finding>, Option<HostProfile>) {
    match probe::run() {
        Ok(profile) => (profile_findings(&profile), Some(profile)),
        Err(error) => (vec![unusable(&error)], None),
    }
}

fn unusable(error: &Error) -> Finding {
    let remedy = match error {
        Error::NoKvm(_) => {
            "load kvm_intel or kvm_amd; switch virtualisation on in the firmware, or nested \
             virtualisation on in the hypervisor below"
        }
        Error::NoPermission(_) => {
            "run as root, or add the user to the group of /dev/kvm (usermod -aG kvm USER)"
        }
        _ => "use a kernel with a complete KVM",
    };
    let mut finding = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        finding.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    Finding::missing(
        AREA,
        "/dev/kvm",
        finding,
        "no virtual machine can run here",
        remedy,
    )
}

fn profile_findings(profile: &HostProfile) -> Vec<Finding> {
    let quirks = &profile.quirks;
    vec![
        device(profile),
        ring0(profile),
        exits(profile),
        instructions(quirks),
        syscall(quirks),
        software_interrupts(quirks),
        rdtsc(quirks),
        cpuid(quirks),
        hidden_instructions(quirks),
        avx(quirks),
        interrupt_window(quirks),
        dirty_log(quirks),
        huge_pages(profile),
        clock_msrs(profile),
    ]
}

fn device(profile: &HostProfile) -> Finding {
    let finding = format!(
        "usable, API version {}, XSAVE image of {} bytes",
        profile.capabilities.api_version, profile.capabilities.xsave_bytes
    );
    Finding::ok(AREA, "/dev/kvm", finding, "virtual machines can run here")
}

fn ring0(profile: &HostProfile) -> Finding {
    const NAME: &str = "guest kernel speed";
    let speed = format!(
        "{:.0} million instructions/s in the guest's kernel, {:.0} in its programs",
        profile.speeds.ring0_minstr_per_s, profile.speeds.ring3_minstr_per_s
    );
    if profile.is_ring0_emulated() {
        Finding::warn(
            AREA,
            NAME,
            format!("emulated: {speed}"),
            "kernels boot in tens of seconds and system calls are slow; the fast-boot patches are \
             applied",
            "boot once and restore a snapshot; for speed, use a host with VMX or SVM",
        )
    } else {
        Finding::ok(
            AREA,
            NAME,
            format!("native: {speed}"),
            "kernels boot without fast-boot patches",
        )
    }
}

fn exits(profile: &HostProfile) -> Finding {
    let finding = format!(
        "{:.1} us from the kernel, {:.1} us from programs",
        profile.speeds.ring0_exit_us, profile.speeds.ring3_exit_us
    );
    Finding::ok(
        AREA,
        "cost of an exit",
        finding,
        "bounds how much I/O a guest can do a second",
    )
}

fn instructions(quirks: &Quirks) -> Finding {
    const NAME: &str = "kernel instructions";
    /// What guest kernels cannot avoid by CPUID and the VMM does not carry out.
    const VITAL: [Instruction; 5] = [
        Instruction::Ud2,
        Instruction::Fxsave,
        Instruction::Barriers,
        Instruction::StringMove,
        Instruction::Atomics,
    ];
    let broken: Vec<_> = VITAL
        .into_iter()
        .filter(|instruction| !quirks.runs_in_ring0(*instruction))
        .collect();
    if !broken.is_empty() {
        let finding = format!("the guest's kernel cannot execute {broken:?}");
        return Finding::missing(
            AREA,
            NAME,
            finding,
            "no kernel runs without them",
            NATIVE_HOST,
        );
    }
    let lacking: Vec<_> = quirks.not_emulated().collect();
    if lacking.is_empty() {
        return Finding::ok(AREA, NAME, "all execute", "kernels run as they are");
    }
    Finding::ok(
        AREA,
        NAME,
        format!("KVM does not emulate {lacking:?}"),
        "the VMM carries out INT3 and FWAIT; the others are hidden from the guest's kernel",
    )
}

fn syscall(quirks: &Quirks) -> Finding {
    const NAME: &str = "SYSCALL";
    match quirks.syscall {
        SyscallEntry::EntersRing0 => Finding::ok(
            AREA,
            NAME,
            "enters the kernel",
            "guest kernels need no stub for it",
        ),
        SyscallEntry::StaysInRing3 => Finding::ok(
            AREA,
            NAME,
            "reaches the kernel's entry without its privilege",
            "a stub in the guest's page-fault entry finishes the change; only kernels that \
             Pollux can patch run here",
        ),
        SyscallEntry::Broken => Finding::missing(
            AREA,
            NAME,
            "does not reach the kernel's entry",
            "programs cannot call the guest's kernel",
            NATIVE_HOST,
        ),
    }
}

fn software_interrupts(quirks: &Quirks) -> Finding {
    const NAME: &str = "INT n in programs";
    if quirks.software_interrupts_work {
        return Finding::ok(AREA, NAME, "reaches its gate", "32-bit system calls work");
    }
    Finding::warn(
        AREA,
        NAME,
        "leads to an invalid-opcode fault",
        "programs that make system calls by INT 80h (32-bit ones) do not run",
        "use 64-bit programs",
    )
}

fn rdtsc(quirks: &Quirks) -> Finding {
    const NAME: &str = "RDTSC in programs";
    match quirks.tsc {
        TscTrap::ByGuest => Finding::ok(
            AREA,
            NAME,
            "faults by the guest's CR4.TSD",
            "its value is replayed",
        ),
        TscTrap::ByHost => Finding::ok(
            AREA,
            NAME,
            "faults with the guest's CR4.TSD and PR_SET_TSC on the vCPU's thread",
            "its value is replayed, at the cost of two system calls for each exit",
        ),
        TscTrap::Impossible => Finding::missing(
            AREA,
            NAME,
            "cannot be made to fault",
            "programs that read the TSC could not be replayed, and nearly all do",
            NATIVE_HOST,
        ),
    }
}

fn cpuid(quirks: &Quirks) -> Finding {
    const NAME: &str = "CPUID in programs";
    if quirks.shows_real_cpuid() {
        return Finding::warn(
            AREA,
            NAME,
            "shows the real processor, and cannot be made to fault",
            "Pollux rewrites it in the programs of the initial RAM disk; others, from a disk or the \
             network, see features that the guest's kernel does not support, and which CPU they run \
             on: a replica on another CPU diverges where they keep that, and the comparison of digests \
             finds it",
            "put the programs into the initial RAM disk, or keep the vCPU on one CPU of the same \
             number on both hosts, with the same processor in both",
        );
    }
    if quirks.needs_cpuid_fault() {
        return Finding::ok(
            AREA,
            NAME,
            "shows the real processor, but can be made to fault",
            "the guest's table is shown by way of the fault, some 100 us each",
        );
    }
    Finding::ok(
        AREA,
        NAME,
        "shows the guest's table",
        "programs see what Pollux offers",
    )
}

fn hidden_instructions(quirks: &Quirks) -> Finding {
    const NAME: &str = "hidden instructions";
    let usable: Vec<_> = quirks
        .hidden_but_usable
        .iter()
        .filter(|instruction| **instruction != HiddenInstruction::Avx)
        .collect();
    if usable.is_empty() {
        return Finding::ok(
            AREA,
            NAME,
            "all refused",
            "programs cannot use them unasked",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        format!("programs can execute {usable:?} although they are not offered"),
        "a program that does so diverges from its replica, which the comparison of digests finds",
        "run programs that ask CPUID first",
    )
}

fn avx(quirks: &Quirks) -> Finding {
    const NAME: &str = "AVX in programs";
    if !quirks.hidden_but_usable.contains(&HiddenInstruction::Avx) {
        return Finding::ok(AREA, NAME, "refused", "programs use the SSE registers");
    }
    if quirks.shows_real_cpuid() {
        return Finding::warn(
            AREA,
            NAME,
            "can be executed, and CPUID shows it to programs that are not in the initial RAM disk",
            "the guest's kernel does not switch the AVX registers, so those programs spoil each \
             other's if they use them",
            "put the programs and their C library into the initial RAM disk",
        );
    }
    Finding::ok(
        AREA,
        NAME,
        "can be executed, but is not offered",
        "programs that ask CPUID first do not use it; the guest's kernel would not switch its \
         registers",
    )
}

fn interrupt_window(quirks: &Quirks) -> Finding {
    const NAME: &str = "interrupt window";
    let finding = format!(
        "{:?} in the guest's kernel, {:?} where it enters a program",
        quirks.window_in_ring0, quirks.window_at_ring3_entry
    )
    .to_lowercase();
    if quirks.window_at_ring3_entry == WindowPrecision::Exact {
        return Finding::ok(
            AREA,
            NAME,
            finding,
            "interrupts are taken at the same point in replay",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        finding,
        "interrupts are taken at exits only, so they come later",
        NATIVE_HOST,
    )
}

fn dirty_log(quirks: &Quirks) -> Finding {
    const NAME: &str = "dirty log";
    if quirks.dirty_log_exact {
        return Finding::ok(AREA, NAME, "exact", "deltas and checkpoints are complete");
    }
    Finding::missing(
        AREA,
        NAME,
        "misses pages, or does not forget them",
        "deltas would be wrong or large: guests cannot be replicated",
        "use another kernel: its KVM has a defect",
    )
}

fn huge_pages(profile: &HostProfile) -> Finding {
    const NAME: &str = "huge pages for guests";
    if profile.huge_pages {
        return Finding::ok(
            AREA,
            NAME,
            "in use",
            "first touches and page walks of guests are cheap",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        "not in use",
        "guests run slower, above all while they touch memory for the first time",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )
}

fn clock_msrs(profile: &HostProfile) -> Finding {
    const NAME: &str = "clock MSRs";
    if profile.capabilities.msr_filter {
        return Finding::ok(
            AREA,
            NAME,
            "hidden",
            "the guest's kernel cannot read the host's clock",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        "cannot be hidden (no KVM_CAP_X86_MSR_FILTER)",
        "a guest kernel that reads the TSC by RDMSR diverges; Debian's does not",
        "use a kernel of 5.10 or newer",
    )
}

#[cfg(test)]
mod tests {
    use hypervisor::probe::{Capabilities, Speeds, Verdict};

    use super::super::report::Status;
    use super::*;

    /// A processor with VMX or SVM.
    fn native() -> HostProfile {
        let all = [
            Instruction::Int3,
            Instruction::Ud2,
            Instruction::Popcnt,
            Instruction::Fwait,
            Instruction::Fxsave,
            Instruction::Barriers,
            Instruction::StringMove,
            Instruction::Atomics,
        ];
        HostProfile {
            capabilities: Capabilities {
                api_version: 12,
                msr_filter: true,
                xsave_bytes: 4096,
                memory_slots: 32764,
            },
            quirks: Quirks {
                instructions: all.map(|instruction| (instruction, Verdict::Runs)).to_vec(),
                syscall: SyscallEntry::EntersRing0,
                software_interrupts_work: true,
                tsc: TscTrap::ByGuest,
                cpuid_hides_in_ring0: true,
                cpuid_hides_in_ring3: true,
                cpuid_faults: true,
                hidden_but_usable: Vec::new(),
                window_in_ring0: WindowPrecision::Exact,
                window_at_ring3_entry: WindowPrecision::Exact,
                gigabyte_pages: true,
                dirty_log_exact: true,
            },
            speeds: Speeds {
                ring0_minstr_per_s: 3000.0,
                ring3_minstr_per_s: 3000.0,
                ring0_exit_us: 1.5,
                ring3_exit_us: 1.5,
            },
            huge_pages: true,
        }
    }

    fn not_ok(profile: &HostProfile) -> Vec<(&'static str, Status)> {
        profile_findings(profile)
            .into_iter()
            .filter(|finding| finding.status != Status::Ok)
            .map(|finding| (finding.name, finding.status))
            .collect()
    }

    /// What is not as on a processor after this change.
    fn with(change: impl FnOnce(&mut HostProfile)) -> Vec<(&'static str, Status)> {
        let mut profile = native();
        change(&mut profile);
        not_ok(&profile)
    }

    #[test]
    fn native_host_has_nothing_to_complain_about() {
        assert_eq!(not_ok(&native()), []);
    }

    #[test]
    fn what_pollux_works_around_is_ok_and_what_costs_is_a_warning() {
        assert_eq!(with(|p| p.quirks.syscall = SyscallEntry::StaysInRing3), []);
        assert_eq!(with(|p| p.quirks.tsc = TscTrap::ByHost), []);
        assert_eq!(with(|p| p.quirks.cpuid_hides_in_ring3 = false), []);
        assert_eq!(
            with(|p| p.quirks.instructions[0].1 = Verdict::NotEmulated),
            []
        );
        let warned = |name| vec![(name, Status::Warn)];
        assert_eq!(
            with(|p| p.speeds.ring0_minstr_per_s = 3.0),
            warned("guest kernel speed")
        );
        assert_eq!(
            with(|p| p.huge_pages = false),
            warned("huge pages for guests")
        );
        assert_eq!(
            with(|p| p.quirks.hidden_but_usable = vec![HiddenInstruction::Rdpid]),
            warned("hidden instructions")
        );
        assert_eq!(
            with(|p| {
                p.quirks.cpuid_hides_in_ring3 = false;
                p.quirks.cpuid_faults = false;
            }),
            warned("CPUID in programs")
        );
    }

    #[test]
    fn avx_is_harmful_only_where_programs_are_shown_it() {
        let usable =
            |p: &mut HostProfile| p.quirks.hidden_but_usable = vec![HiddenInstruction::Avx];
        assert_eq!(with(usable), []);
        let found = with(|p| {
            usable(p);
            p.quirks.cpuid_hides_in_ring3 = false;
            p.quirks.cpuid_faults = false;
        });
        let names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["CPUID in programs", "AVX in programs"]);
    }

    #[test]
    fn what_makes_replay_impossible_is_missing_and_is_an_obstacle() {
        let broken: [fn(&mut HostProfile); 3] = [
            |p| p.quirks.syscall = SyscallEntry::Broken,
            |p| p.quirks.tsc = TscTrap::Impossible,
            |p| p.quirks.dirty_log_exact = false,
        ];
        for change in broken {
            let mut profile = native();
            change(&mut profile);
            let found = not_ok(&profile);
            assert!(matches!(found[..], [(_, Status::Missing)]), "{found:?}");
            assert_eq!(profile.quirks.obstacles().len(), 1);
        }
        let found = with(|p| p.quirks.instructions[1].1 = Verdict::Faults(13));
        assert_eq!(found, [("kernel instructions", Status::Missing)]);
    }
}
