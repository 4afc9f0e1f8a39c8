//! The zero page (struct boot_params) and the setup data behind it.

use super::{BOOT_PARAMS, COMMAND_LINE, MemoryRange, SETUP_DATA, memory_ranges};
use crate::payload::SETUP_HEADER;

const ZERO_PAGE_BYTES: usize = 4096;
/// End of conventional memory: what is above belongs to the BIOS and the VGA on a PC.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const EXTENDED_MEMORY_START: u64 = 0x10_0000;

// Offsets in struct boot_params.
const E820_COUNT: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const LOADER_TYPE: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_START: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const SETUP_DATA_POINTER: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;

const E820_RAM: u32 = 1;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
const SETUP_RNG_SEED: u32 = 9;

/// Builds the zero page. Without a setup header (an ELF file has none) the fields that the kernel
/// reads are set as a bzImage of protocol 2.15 has them.
pub(super) fn zero_page(
    header: Option<&[u8]>,
    memory_bytes: u64,
    initrd: MemoryRange,
) -> [u8; ZERO_PAGE_BYTES] {
    let mut page = [0; ZERO_PAGE_BYTES];
    put(&mut page, BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(&mut page, HEADER_MAGIC, b"HdrS");
    put(&mut page, PROTOCOL_VERSION, &0x020fu16.to_le_bytes());
    if let Some(header) = header {
        // At most 0x202 + 255 bytes: it cannot reach the e820 table.
        put(
            &mut page,
            SETUP_HEADER,
            &header[..header.len().min(E820_TABLE - SETUP_HEADER)],
        );
    }
    page[LOADER_TYPE] = LOADER_UNDEFINED;
    page[LOAD_FLAGS] |= LOADED_HIGH;
    if initrd.len > 0 {
        put(&mut page, RAMDISK_START, &low32(initrd.start));
        put(&mut page, RAMDISK_SIZE, &low32(initrd.len));
    }
    put(&mut page, COMMAND_LINE_POINTER, &low32(COMMAND_LINE));
    put(&mut page, SETUP_DATA_POINTER, &SETUP_DATA.to_le_bytes());
    let ram = usable_ranges(memory_bytes);
    page[E820_COUNT] = u8::try_from(ram.len()).expect("three ranges at most");
    for (index, range) in ram.iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY_BYTES;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &range.len.to_le_bytes());
        put(&mut page, at + 16, &E820_RAM.to_le_bytes());
    }
    page
}

/// struct setup_data: no next one, the type, the length, the seed.
pub(super) fn rng_seed(seed: &[u8; 32]) -> Vec<u8> {
    let mut data = 0u64.to_le_bytes().to_vec();
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend(32u32.to_le_bytes());
    data.extend(seed);
    data
}

fn usable_ranges(memory_bytes: u64) -> Vec<MemoryRange> {
    let mut usable = Vec::new();
    for range in memory_ranges(memory_bytes) {
        if range.start > 0 {
            usable.push(range);
            continue;
        }
        usable.push(MemoryRange {
            start: 0,
            len: LOW_MEMORY_END,
        });
        let len = range.len - EXTENDED_MEMORY_START;
        usable.push(MemoryRange {
            start: EXTENDED_MEMORY_START,
            len,
        });
    }
    usable
}

fn low32(value: u64) -> [u8; 4] {
    u32::try_from(value)
        .expect("boot data lies below 4 GiB")
        .to_le_bytes()
}

fn put(page: &mut [u8; ZERO_PAGE_BYTES], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

const _: () = assert!(BOOT_PARAMS + ZERO_PAGE_BYTES as u64 <= SETUP_DATA);
