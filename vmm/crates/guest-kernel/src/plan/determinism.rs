//! RDTSC and CPUID in the kernel's own code become port reads that the VMM answers.
//!
//! KVM does not let a VMM trap RDTSC, and some KVMs cannot hide features in CPUID. A port read of
//! the same length is an exit everywhere. Rewritten in all executable sections, and in the
//! replacements of alternatives. Others (RDTSCP, RDRAND ...) depend on features that the CPUID table
//! hides, so they never run; where they are is reported.

use super::alternatives;
use super::planner::{Planner, Reason};
use crate::error::PlanError;
use crate::insn::{Occurrence, SensitiveInsn, scan};
use crate::patch::PatchSet;
use crate::ports;

const RDTSC: [u8; 2] = [0x0f, 0x31];
const CPUID: [u8; 2] = [0x0f, 0xa2];

/// Under which names sites are counted.
#[derive(Clone, Copy)]
struct Kinds {
    rdtsc: &'static str,
    cpuid: &'static str,
}

const IN_CODE: Kinds = Kinds {
    rdtsc: "RDTSC in code",
    cpuid: "CPUID in code",
};
const IN_ALTERNATIVES: Kinds = Kinds {
    rdtsc: "RDTSC in alternatives",
    cpuid: "CPUID in alternatives",
};

/// `in eax, port`.
const fn port_read(port: u16) -> [u8; 2] {
    assert!(port < 0x100);
    [0xe5, port.to_le_bytes()[0]]
}

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    for found in in_text(planner) {
        rewrite(planner, found, IN_CODE, found.0)?;
    }
    for alternative in alternatives::entries(planner) {
        let code = planner
            .image
            .read(alternative.addr, alternative.len)
            .unwrap_or_default();
        for found in scan(code, alternative.addr) {
            rewrite(planner, found, IN_ALTERNATIVES, alternative.code)?;
        }
    }
    Ok(())
}

/// Decodes every executable section from symbol to symbol.
fn in_text(planner: &mut Planner) -> Vec<(u64, SensitiveInsn)> {
    let mut found = Vec::new();
    for name in [".text", ".init.text", ".exit.text"] {
        let Some(section) = planner.section(name) else {
            continue;
        };
        let Some(code) = planner.bytes(name, section.addr, section.end()) else {
            continue;
        };
        let symbols = planner.image.symbols().all();
        let from = symbols.partition_point(|symbol| symbol.addr <= section.addr);
        let until = symbols.partition_point(|symbol| symbol.addr < section.end());
        let mut starts = vec![section.addr];
        starts.extend(symbols[from..until].iter().map(|symbol| symbol.addr));
        starts.push(section.end());
        starts.dedup();
        for range in starts.windows(2) {
            let offset =
                |addr: u64| usize::try_from(addr - section.addr).expect("within the section");
            found.extend(scan(&code[offset(range[0])..offset(range[1])], range[0]));
        }
    }
    found
}

/// `belongs_to` is the place in the code whose function is named in the report.
fn rewrite(
    planner: &mut Planner,
    (addr, insn): (u64, SensitiveInsn),
    kinds: Kinds,
    belongs_to: u64,
) -> Result<(), PlanError> {
    let reason = |why| Reason {
        set: PatchSet::Determinism,
        why,
    };
    match insn {
        SensitiveInsn::Rdtsc => planner.replace_site(
            kinds.rdtsc,
            addr,
            &RDTSC,
            &port_read(ports::RDTSC),
            reason("RDTSC reads the host's counter: ask the VMM for virtual time"),
        ),
        SensitiveInsn::Cpuid => planner.replace_site(
            kinds.cpuid,
            addr,
            &CPUID,
            &port_read(ports::CPUID),
            reason("CPUID may show the host's processor: ask the VMM for its table"),
        ),
        _ => {
            let symbol = planner.image.symbols().describe(belongs_to);
            planner
                .report
                .hidden
                .push(Occurrence { addr, insn, symbol });
            Ok(())
        }
    }
}
