//! The restricted CPUID table that a deterministic guest sees.
//!
//! The policy is an allow list over what KVM supports. Not offered, because it is a source of
//! nondeterminism that cannot be trapped everywhere: RDTSCP, RDPID, RDRAND, RDSEED, TSC deadline
//! timer, kvmclock and every other paravirtual leaf. Not offered, because KVM's emulator or ring 3
//! of some hosts does not follow it: XSAVE, AVX, CX16, POPCNT (unless a probe allows it). Not
//! offered, because the machine has none: local APIC, MTRR, machine check.
//!
//! A table alone hides nothing where ring 3 runs the real CPUID instruction: there CPUID faulting
//! leads to the same table.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What the caller may decide about the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidPolicy {
    /// Offer the TSC. Right when the kernel's RDTSC is rewritten and ring 3's is trapped.
    pub tsc: bool,
    /// Offer POPCNT. Right where ring 0 can execute it.
    pub popcnt: bool,
    /// Offer pages of a gigabyte. Right where the guest's page tables can hold them.
    pub gigabyte_pages: bool,
}

impl Default for CpuidPolicy {
    fn default() -> Self {
        Self {
            tsc: true,
            popcnt: false,
            gigabyte_pages: false,
        }
    }
}

/// One leaf of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX in.
    pub function: u32,
    /// ECX in; counts only if `indexed`.
    pub index: u32,
    /// Whether ECX selects a subleaf.
    pub indexed: bool,
    /// EAX out.
    pub eax: u32,
    /// EBX out.
    pub ebx: u32,
    /// ECX out.
    pub ecx: u32,
    /// EDX out.
    pub edx: u32,
}

/// The table that the guest's CPUID is answered from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    leaves: Vec<CpuidLeaf>,
}

/// Leaf 1 ECX: SSE3, SSSE3, SSE4.1, SSE4.2.
const LEAF1_ECX: u32 = 1 << 0 | 1 << 9 | 1 << 19 | 1 << 20;
const LEAF1_ECX_POPCNT: u32 = 1 << 23;
/// Leaf 1 EDX: FPU, PSE, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, CLFSH, MMX, FXSR, SSE, SSE2.
const LEAF1_EDX: u32 = 1 << 0
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 11
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
const LEAF1_EDX_TSC: u32 = 1 << 4;
/// Leaf 1 EBX: CLFLUSH of 64 bytes, APIC id 0.
const LEAF1_EBX: u32 = 8 << 8;
/// Leaf 80000001h ECX: LAHF in 64-bit mode.
const EXT1_ECX: u32 = 1 << 0;
/// Leaf 80000001h EDX: SYSCALL, NX, LM.
const EXT1_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
const EXT1_EDX_GIGABYTE_PAGES: u32 = 1 << 26;
/// Highest basic leaf: without 2 and 4 the guest's C library falls back to its own cache sizes.
const MAX_BASIC: u32 = 1;
/// Highest extended leaf: the one with the address widths.
const MAX_EXTENDED: u32 = 0x8000_0008;

impl CpuidTable {
    /// The table for a host that supports `supported`.
    #[must_use]
    pub fn restricted(supported: &CpuidTable, policy: CpuidPolicy) -> Self {
        let leaves = supported
            .leaves
            .iter()
            .filter_map(|leaf| restrict(*leaf, policy))
            .collect();
        Self { leaves }
    }

    /// A table of exactly these leaves.
    #[must_use]
    pub fn from_leaves(leaves: Vec<CpuidLeaf>) -> Self {
        Self { leaves }
    }

    /// The leaves.
    #[must_use]
    pub fn leaves(&self) -> &[CpuidLeaf] {
        &self.leaves
    }

    /// What CPUID answers for EAX = `function`, ECX = `index`; zeros for a leaf that is not there.
    #[must_use]
    pub fn lookup(&self, function: u32, index: u32) -> CpuidLeaf {
        self.leaves
            .iter()
            .find(|leaf| leaf.function == function && (!leaf.indexed || leaf.index == index))
            .copied()
            .unwrap_or(CpuidLeaf {
                function,
                index,
                ..CpuidLeaf::default()
            })
    }

    pub(crate) fn from_kvm(table: &CpuId) -> Self {
        let leaves = table.as_slice().iter().map(|entry| CpuidLeaf {
            function: entry.function,
            index: entry.index,
            indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        });
        Self {
            leaves: leaves.collect(),
        }
    }

    pub(crate) fn to_kvm(&self) -> Result<CpuId, Error> {
        let entries: Vec<kvm_cpuid_entry2> = self
            .leaves
            .iter()
            .map(|leaf| kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: if leaf.indexed {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: leaf.eax,
                ebx: leaf.ebx,
                ecx: leaf.ecx,
                edx: leaf.edx,
                padding: [0; 3],
            })
            .collect();
        CpuId::from_entries(&entries)
            .map_err(|_| Error::StateMismatch(format!("{} CPUID leaves", entries.len())))
    }
}

fn restrict(leaf: CpuidLeaf, policy: CpuidPolicy) -> Option<CpuidLeaf> {
    let option = |on: bool, bit: u32| if on { bit } else { 0 };
    let leaf = match leaf.function {
        0 => CpuidLeaf {
            eax: MAX_BASIC,
            ..leaf
        },
        1 => CpuidLeaf {
            ebx: LEAF1_EBX,
            ecx: leaf.ecx & (LEAF1_ECX | option(policy.popcnt, LEAF1_ECX_POPCNT)),
            edx: leaf.edx & (LEAF1_EDX | option(policy.tsc, LEAF1_EDX_TSC)),
            ..leaf
        },
        0x8000_0000 => CpuidLeaf {
            eax: MAX_EXTENDED,
            ..leaf
        },
        0x8000_0001 => CpuidLeaf {
            ebx: 0,
            ecx: leaf.ecx & EXT1_ECX,
            edx: leaf.edx & (EXT1_EDX | option(policy.gigabyte_pages, EXT1_EDX_GIGABYTE_PAGES)),
            ..leaf
        },
        0x8000_0002..=0x8000_0006 => leaf,
        0x8000_0007 => CpuidLeaf {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
            ..leaf
        },
        0x8000_0008 => CpuidLeaf {
            ebx: 0,
            ecx: 0,
            edx: 0,
            ..leaf
        },
        _ => return None,
    };
    Some(leaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> CpuidTable {
        let functions = [0, 1, 2, 4, 7, 0xd, 0x4000_0000, 0x4000_0001];
        let extended = 0x8000_0000..=0x8000_0021u32;
        let leaves = functions
            .into_iter()
            .chain(extended)
            .map(|function| CpuidLeaf {
                function,
                eax: !0,
                ebx: !0,
                ecx: !0,
                edx: !0,
                ..CpuidLeaf::default()
            });
        CpuidTable::from_leaves(leaves.collect())
    }

    #[test]
    fn nondeterministic_features_are_hidden_whatever_the_host_supports() {
        let table = CpuidTable::restricted(&everything(), CpuidPolicy::default());
        let leaf1 = table.lookup(1, 0);
        for (bit, name) in [
            (13, "CX16"),
            (21, "x2APIC"),
            (23, "POPCNT"),
            (24, "TSC deadline"),
            (26, "XSAVE"),
            (27, "OSXSAVE"),
            (28, "AVX"),
            (30, "RDRAND"),
            (31, "hypervisor"),
        ] {
            assert_eq!(leaf1.ecx & 1 << bit, 0, "{name}");
        }
        for (bit, name) in [
            (7, "MCE"),
            (9, "APIC"),
            (12, "MTRR"),
            (14, "MCA"),
            (28, "HTT"),
        ] {
            assert_eq!(leaf1.edx & 1 << bit, 0, "{name}");
        }
        assert_eq!(table.lookup(0x8000_0001, 0).edx & 1 << 27, 0, "RDTSCP");
        for function in [7, 0xd, 0x4000_0000, 0x4000_0001, 0x8000_0007, 0x8000_0021] {
            let leaf = table.lookup(function, 0);
            assert_eq!(
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx),
                (0, 0, 0, 0),
                "{function:#x}"
            );
        }
    }

    #[test]
    fn policy_decides_about_tsc_popcnt_and_gigabyte_pages() {
        for bits in 0..8 {
            let policy = CpuidPolicy {
                tsc: bits & 1 != 0,
                popcnt: bits & 2 != 0,
                gigabyte_pages: bits & 4 != 0,
            };
            let table = CpuidTable::restricted(&everything(), policy);
            assert_eq!(table.lookup(1, 0).edx & 1 << 4 != 0, policy.tsc);
            assert_eq!(table.lookup(1, 0).ecx & 1 << 23 != 0, policy.popcnt);
            let extended = table.lookup(0x8000_0001, 0).edx;
            assert_eq!(extended & 1 << 26 != 0, policy.gigabyte_pages);
        }
    }

    #[test]
    fn features_that_the_host_lacks_are_not_invented() {
        let bare = CpuidTable::from_leaves(vec![
            CpuidLeaf {
                function: 1,
                edx: 1,
                ..CpuidLeaf::default()
            },
            CpuidLeaf {
                function: 0x8000_0001,
                edx: 1 << 29,
                ..CpuidLeaf::default()
            },
        ]);
        let table = CpuidTable::restricted(
            &bare,
            CpuidPolicy {
                tsc: true,
                popcnt: true,
                gigabyte_pages: true,
            },
        );
        assert_eq!(table.lookup(1, 0).edx, 1);
        assert_eq!(table.lookup(1, 0).ecx, 0);
        assert_eq!(table.lookup(0x8000_0001, 0).edx, 1 << 29);
    }

    #[test]
    fn index_counts_only_where_it_is_significant() {
        let table = CpuidTable::from_leaves(vec![
            CpuidLeaf {
                function: 4,
                index: 1,
                indexed: true,
                eax: 7,
                ..CpuidLeaf::default()
            },
            CpuidLeaf {
                function: 5,
                eax: 9,
                ..CpuidLeaf::default()
            },
        ]);
        assert_eq!(table.lookup(4, 1).eax, 7);
        assert_eq!(table.lookup(4, 0).eax, 0);
        assert_eq!(table.lookup(5, 77).eax, 9);
    }

    #[test]
    fn table_survives_the_way_through_kvm_structures() {
        let table = CpuidTable::restricted(&everything(), CpuidPolicy::default());
        assert_eq!(CpuidTable::from_kvm(&table.to_kvm().unwrap()), table);
    }
}
