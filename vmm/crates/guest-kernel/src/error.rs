//! The errors of this crate, one type for each step.
//!
//! All of them are about the input (a file, a kernel that is not known, a machine that is too small);
//! none is about the host.

use std::fmt;

use crate::patch::PatchSet;

/// Why a file is not a kernel that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is neither a bzImage nor an ELF file.
    #[error("not a Linux kernel for x86-64: {hint}")]
    NotAKernel {
        /// What the file looks like instead.
        hint: String,
    },
    /// The file is a kernel for another processor.
    #[error("a kernel for {machine}, not for x86-64")]
    WrongMachine {
        /// The processor that the file was built for.
        machine: String,
    },
    /// The file ends before what its header announces.
    #[error("truncated kernel: {what} needs {need} bytes, the file has {have}")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// End of that part, in bytes from the start of the file.
        need: u64,
        /// Length of the file in bytes.
        have: u64,
    },
    /// The boot protocol is older than version 2.08 (no payload fields).
    #[error("boot protocol {major}.{minor:02} is too old: 2.08 or newer is needed")]
    OldBootProtocol {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// The payload starts with no magic number that is known.
    #[error(
        "unknown compression: the payload starts with {magic:02x?} (known: gzip, bzip2, lzma, xz, lz4, zstd, ELF)"
    )]
    UnknownCompression {
        /// The first bytes of the payload.
        magic: Vec<u8>,
    },
    /// The payload does not decompress.
    #[error("cannot decompress the {format} payload")]
    Decompress {
        /// Compression format.
        format: &'static str,
        /// What the decompressor said.
        #[source]
        source: std::io::Error,
    },
    /// The payload is larger than any kernel.
    #[error("decompressed kernel is larger than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The ELF file is damaged.
    #[error("damaged ELF file: {what}")]
    BadElf {
        /// What is wrong with it.
        what: String,
    },
    /// The kernel's symbol table could not be read.
    #[error(transparent)]
    Symbols(#[from] SymbolError),
}

/// Why the kallsyms tables could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// The token table and its index were not found.
    #[error(
        "no kallsyms token table in the image (built without CONFIG_KALLSYMS, or an unknown layout)"
    )]
    NoTokenTable,
    /// The names were not found, or do not agree with the markers.
    #[error("no kallsyms names and markers in front of the token table at {token_table:#x}")]
    NoNames {
        /// Virtual address of the token table.
        token_table: u64,
    },
    /// The addresses were not found, neither in the 6.1 nor in the 6.4 layout.
    #[error("no kallsyms offsets for {symbols} symbols: `_text` would not be at {text:#x}")]
    NoOffsets {
        /// Number of symbols.
        symbols: usize,
        /// Start of the text section.
        text: u64,
    },
}

/// Something that a plan needs and that the kernel does not have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missed {
    /// A symbol that kallsyms does not list.
    Symbol(String),
    /// A section without a header, and no symbols that delimit it.
    Section(String),
    /// A table whose entries do not have the form that is known.
    Table {
        /// The table's name.
        name: String,
        /// What does not fit.
        why: String,
    },
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missed::Symbol(name) => write!(f, "symbol {name}"),
            Missed::Section(name) => write!(f, "section {name}"),
            Missed::Table { name, why } => write!(f, "table {name} ({why})"),
        }
    }
}

/// Why a kernel cannot be patched.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The kernel is of a series that nobody has checked, or lacks what the plan needs.
    #[error(
        "kernel {release} is not known: {}known series: {}",
        describe_missed(missed),
        known.join(", ")
    )]
    UnknownKernel {
        /// The kernel's release, `6.1.0-56-cloud-amd64`.
        release: String,
        /// Everything that was looked for and not found.
        missed: Vec<Missed>,
        /// The series that this build knows.
        known: Vec<&'static str>,
    },
    /// The bytes at a place are not what the patch replaces.
    #[error(
        "{set:?} patch at {symbol} ({addr:#x}): expected {expected:02x?}, found {found:02x?} ({why})"
    )]
    OldBytes {
        /// The set that the patch belongs to.
        set: PatchSet,
        /// Symbol and offset of the place.
        symbol: String,
        /// Virtual address of the place.
        addr: u64,
        /// The bytes that the patch replaces.
        expected: Vec<u8>,
        /// The bytes that are there.
        found: Vec<u8>,
        /// What the patch is for.
        why: &'static str,
    },
    /// Two patches want the same bytes.
    #[error("patches overlap at {symbol} ({addr:#x}): {first}; {second}")]
    Overlap {
        /// Symbol and offset of the later patch.
        symbol: String,
        /// Virtual address of the later patch.
        addr: u64,
        /// What the first patch is for.
        first: &'static str,
        /// What the second patch is for.
        second: &'static str,
    },
    /// The functions that give their room to stubs are too small.
    #[error("no room for a stub of {need} bytes in {place}: {left} bytes are left")]
    NoRoom {
        /// Size of the stub in bytes.
        need: usize,
        /// The function that gives its room.
        place: &'static str,
        /// Bytes that are left there.
        left: u64,
    },
    /// A plan was made for another image.
    #[error("the plan was made for another kernel image")]
    OtherImage,
}

fn describe_missed(missed: &[Missed]) -> String {
    if missed.is_empty() {
        return String::from("its series was never checked; ");
    }
    let list: Vec<String> = missed.iter().map(ToString::to_string).collect();
    format!("missed {}; ", list.join(", "))
}

/// Why a kernel cannot be laid out in the guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The guest's memory is too small.
    #[error("too little guest memory: {have} MiB, kernel and initial RAM disk need {need} MiB")]
    TooLittleMemory {
        /// Memory of the guest, in MiB.
        have: u64,
        /// What is needed at least, in MiB.
        need: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("command line of {length} bytes: the kernel takes {limit}")]
    CommandLineTooLong {
        /// Length in bytes.
        length: usize,
        /// The kernel's limit in bytes.
        limit: usize,
    },
    /// The command line holds a byte that ends it or breaks the line.
    #[error("command line holds a control character at byte {at}")]
    CommandLineControl {
        /// Offset of the first such byte.
        at: usize,
    },
    /// The guest's memory is not a multiple of 4096 bytes, or above what can be described.
    #[error("guest memory of {bytes} bytes: must be a multiple of 4096 and at most {limit}")]
    BadMemorySize {
        /// Size in bytes.
        bytes: u64,
        /// Largest size in bytes.
        limit: u64,
    },
    /// The caller could not write guest memory.
    #[error("cannot write {length} bytes of {what} at guest address {gpa:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        length: usize,
        /// The caller's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
