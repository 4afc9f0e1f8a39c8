//! What was found in an initial RAM disk, and what was changed.

use std::collections::BTreeMap;
use std::fmt;

use sha2::{Digest, Sha256};

use super::archive::Entry;
use crate::insn::{Occurrence, SensitiveInsn};
use crate::patch::{PatchSet, PlanId};

/// One replacement of bytes in a file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePatch {
    /// The file's name in the archive.
    pub file: String,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// What was there.
    pub old: Box<[u8]>,
    /// What is there now; as long as `old`.
    pub new: Box<[u8]>,
    /// The set it belongs to.
    pub set: PatchSet,
    /// The reason, for a person.
    pub why: &'static str,
}

/// What one executable or shared object holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramReport {
    /// The file's name in the archive.
    pub file: String,
    /// Bytes of code.
    pub code_bytes: u64,
    /// CPUID instructions that were rewritten.
    pub rewritten: usize,
    /// Addresses of what may be CPUID, but no leaf is loaded for it. Left as it is.
    pub doubtful: Vec<u64>,
    /// Addresses of bytes that would be CPUID, among others that are no program's instructions: tables
    /// within code. Left as they are.
    pub among_data: Vec<u64>,
    /// Other instructions whose result is not a function of the guest's state, by kind. RDTSC faults
    /// by itself. The others depend on features that the CPUID table hides: a program that uses them
    /// unasked diverges from its replica.
    pub sites: BTreeMap<SensitiveInsn, usize>,
}

impl ProgramReport {
    pub(super) fn new(file: &str, code_bytes: u64) -> Self {
        ProgramReport {
            file: String::from(file),
            code_bytes,
            rewritten: 0,
            doubtful: Vec::new(),
            among_data: Vec::new(),
            sites: BTreeMap::new(),
        }
    }
}

/// What one kernel module holds. Modules run in ring 0 and are not rewritten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleReport {
    /// The file's name in the archive.
    pub file: String,
    /// Instructions whose result is not a function of the guest's state.
    pub found: Vec<Occurrence>,
}

/// A program or module that could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unexamined {
    /// The file's name in the archive.
    pub file: String,
    /// Why not.
    pub why: String,
}

/// Identifies an initial RAM disk with its patches (SHA-256). See [`PlanId::with_initramfs`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InitramfsId(pub [u8; 32]);

impl fmt::Display for InitramfsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for InitramfsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InitramfsId({self})")
    }
}

impl PlanId {
    /// The id of this kernel with its patches together with an initial RAM disk and its patches: what
    /// belongs into the fingerprint of a VM.
    #[must_use]
    pub fn with_initramfs(self, initramfs: &InitramfsId) -> PlanId {
        let mut hash = Sha256::new();
        hash.update(b"pollux kernel and initramfs 1\0");
        hash.update(self.0);
        hash.update(initramfs.0);
        PlanId(hash.finalize().into())
    }
}

/// What was found in an initial RAM disk, and what was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Identifies the archive and its patches.
    pub id: InitramfsId,
    /// Whether the archive was looked at; if not, everything below is empty.
    pub examined: bool,
    /// Executables and shared objects, in the archive's order.
    pub programs: Vec<ProgramReport>,
    /// Kernel modules, in the archive's order.
    pub modules: Vec<ModuleReport>,
    /// What could not be looked at.
    pub unexamined: Vec<Unexamined>,
    /// All patches, in the archive's order.
    pub patches: Vec<FilePatch>,
}

impl Report {
    pub(super) fn empty() -> Self {
        Report {
            id: InitramfsId([0; 32]),
            examined: true,
            programs: Vec::new(),
            modules: Vec::new(),
            unexamined: Vec::new(),
            patches: Vec::new(),
        }
    }

    pub(super) fn not_examined(file: &[u8]) -> Self {
        Report {
            id: id(&Sha256::digest(file).into(), &[]),
            examined: false,
            ..Report::empty()
        }
    }

    pub(super) fn unexamined(&mut self, entry: &Entry, why: &str) {
        self.unexamined.push(Unexamined {
            file: entry.name.clone(),
            why: String::from(why),
        });
    }

    /// What may make a replay differ, one sentence each, for warnings: RDTSC or CPUID in modules,
    /// doubtful CPUIDs, and programs that were not looked at.
    #[must_use]
    pub fn obstacles(&self) -> Vec<String> {
        let mut found = Vec::new();
        for module in &self.modules {
            let runs = |insn| matches!(insn, SensitiveInsn::Cpuid | SensitiveInsn::Rdtsc);
            for occurrence in module.found.iter().filter(|found| runs(found.insn)) {
                let Occurrence { insn, symbol, addr } = occurrence;
                let file = &module.file;
                found.push(format!("module {file} has {insn} at {symbol} ({addr:#x})"));
            }
        }
        for program in &self.programs {
            for addr in &program.doubtful {
                let file = &program.file;
                found.push(format!(
                    "{file} may have CPUID at {addr:#x}, which was left"
                ));
            }
        }
        for Unexamined { file, why } in &self.unexamined {
            found.push(format!("{file} was not looked at: {why}"));
        }
        found
    }

    /// How many instructions of that kind the programs have and keep.
    #[must_use]
    pub fn count(&self, insn: SensitiveInsn) -> usize {
        self.programs
            .iter()
            .filter_map(|program| program.sites.get(&insn))
            .sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.examined {
            return f.write_str("initial RAM disk taken as it is");
        }
        let with = self.programs.iter().filter(|program| program.rewritten > 0);
        write!(
            f,
            "{} CPUID rewritten in {} of {} programs",
            self.patches.len(),
            with.count(),
            self.programs.len()
        )
    }
}

pub(super) fn id(archive_hash: &[u8; 32], patches: &[FilePatch]) -> InitramfsId {
    let mut hash = Sha256::new();
    hash.update(b"pollux initramfs 1\0");
    hash.update(archive_hash);
    for patch in patches {
        hash.update((patch.file.len() as u64).to_le_bytes());
        hash.update(&patch.file);
        hash.update(patch.offset.to_le_bytes());
        hash.update((patch.old.len() as u64).to_le_bytes());
        hash.update(&patch.old);
        hash.update(&patch.new);
    }
    InitramfsId(hash.finalize().into())
}
