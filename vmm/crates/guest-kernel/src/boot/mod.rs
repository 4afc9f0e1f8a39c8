//! Lays out the guest's memory for the 64-bit Linux boot protocol and gives the vCPU's first state.
//!
//! Source: Documentation/arch/x86/boot.rst ("64-bit BOOT PROTOCOL") and zero-page.rst. Low memory:
//!
//! ```text
//! 0x00500  GDT (4 entries)              0x09000  page tables: 1 GiB mapped one to one
//! 0x06ff0  first stack, downwards       0x20000  command line
//! 0x07000  boot parameters              16 MiB   kernel
//! 0x08000  setup data: random seed      at the top of memory below 2 GiB: initial RAM disk
//! ```
//!
//! What always holds: nothing is written outside the guest's memory, and nothing overlaps. Memory
//! that is not written is taken to be zero (a new VM's is).

mod params;
mod registers;

pub use registers::{EntryRegisters, SegmentRegister};

use crate::error::BootError;
use crate::load::LoadedKernel;

/// Guest memory between this address and 4 GiB is left free for PCI.
pub const PCI_HOLE_START: u64 = 0xc000_0000;
/// Where memory goes on that does not fit below [`PCI_HOLE_START`].
pub const HIGH_MEMORY_START: u64 = 1 << 32;
/// Most memory of a guest, in bytes: what four-level paging and a 40-bit physical address carry.
pub const MAX_MEMORY_BYTES: u64 = 512 << 30;
/// Longest command line, in bytes, without the final zero (`COMMAND_LINE_SIZE` is 2048).
pub const MAX_COMMAND_LINE_BYTES: usize = 2047;

/// What a kernel needs at least to start besides its image and the initial RAM disk, in bytes.
const WORKING_MEMORY_BYTES: u64 = 32 << 20;
const PAGE_BYTES: u64 = 4096;
/// The kernel takes an initial RAM disk that ends at or below this (`initrd_addr_max`).
const INITRD_END_MAX: u64 = 0x8000_0000;

const GDT: u64 = 0x500;
const STACK_TOP: u64 = 0x6ff0;
const BOOT_PARAMS: u64 = 0x7000;
const SETUP_DATA: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x20000;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest-physical address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Where `memory_bytes` of guest memory lie: from 0, and from 4 GiB on what is left over.
pub fn memory_ranges(memory_bytes: u64) -> Vec<MemoryRange> {
    let low = memory_bytes.min(PCI_HOLE_START);
    let mut ranges = vec![MemoryRange { start: 0, len: low }];
    if memory_bytes > low {
        ranges.push(MemoryRange {
            start: HIGH_MEMORY_START,
            len: memory_bytes - low,
        });
    }
    ranges
}

/// What the guest is started with.
#[derive(Debug, Clone, Copy)]
pub struct BootConfig<'a> {
    /// Size of guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// The initial RAM disk; may be empty.
    pub initrd: &'a [u8],
    /// Seed of the kernel's random numbers (setup data type 9). It is an input of the VM like any
    /// other: the caller logs it.
    pub rng_seed: [u8; 32],
}

/// Writes bytes to guest-physical memory.
pub type Writer<'w> =
    &'w mut dyn FnMut(u64, &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Writes kernel, initial RAM disk, boot parameters, page tables and GDT, and returns the registers
/// to start the vCPU with.
///
/// # Errors
/// [`BootError`] if memory is too small or of an odd size, if the command line does not fit, or if
/// `write` fails.
pub fn write_boot(
    kernel: &LoadedKernel,
    config: &BootConfig<'_>,
    write: Writer<'_>,
) -> Result<EntryRegisters, BootError> {
    check_memory_size(config.memory_bytes)?;
    check_command_line(config.command_line)?;
    let initrd = place_initrd(kernel.end(), config)?;
    let mut put = |what: &'static str, gpa: u64, bytes: &[u8]| {
        write(gpa, bytes).map_err(|source| BootError::Write {
            what,
            gpa,
            length: bytes.len(),
            source,
        })
    };
    for segment in &kernel.segments {
        put("kernel", segment.gpa, &segment.bytes)?;
    }
    put("initial RAM disk", initrd.start, config.initrd)?;
    let mut command_line = config.command_line.as_bytes().to_vec();
    command_line.push(0);
    put("command line", COMMAND_LINE, &command_line)?;
    put(
        "setup data",
        SETUP_DATA,
        &params::rng_seed(&config.rng_seed),
    )?;
    let zero_page = params::zero_page(kernel.setup_header.as_deref(), config.memory_bytes, initrd);
    put("boot parameters", BOOT_PARAMS, &zero_page)?;
    put("page tables", PAGE_TABLES, &registers::page_tables())?;
    put("GDT", GDT, &registers::gdt())?;
    Ok(registers::at_entry(kernel.entry))
}

fn check_memory_size(bytes: u64) -> Result<(), BootError> {
    if bytes.is_multiple_of(PAGE_BYTES) && bytes <= MAX_MEMORY_BYTES {
        Ok(())
    } else {
        Err(BootError::BadMemorySize {
            bytes,
            limit: MAX_MEMORY_BYTES,
        })
    }
}

fn check_command_line(text: &str) -> Result<(), BootError> {
    if text.len() > MAX_COMMAND_LINE_BYTES {
        return Err(BootError::CommandLineTooLong {
            length: text.len(),
            limit: MAX_COMMAND_LINE_BYTES,
        });
    }
    match text.bytes().position(|byte| byte.is_ascii_control()) {
        Some(at) => Err(BootError::CommandLineControl { at }),
        None => Ok(()),
    }
}

/// At the top of low memory, on a page of its own.
fn place_initrd(kernel_end: u64, config: &BootConfig<'_>) -> Result<MemoryRange, BootError> {
    let len = config.initrd.len() as u64;
    let room = len.next_multiple_of(PAGE_BYTES);
    let need = kernel_end
        .saturating_add(room)
        .saturating_add(WORKING_MEMORY_BYTES);
    let top = config.memory_bytes.min(INITRD_END_MAX);
    if need > top {
        return Err(BootError::TooLittleMemory {
            have: config.memory_bytes >> 20,
            need: need.div_ceil(1 << 20),
        });
    }
    Ok(MemoryRange {
        start: top - room,
        len,
    })
}

#[cfg(test)]
mod tests;
