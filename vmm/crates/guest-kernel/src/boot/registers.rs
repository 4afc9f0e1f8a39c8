//! The vCPU's state at the 64-bit entry point: long mode, identity mapping, flat segments.

use super::{BOOT_PARAMS, GDT, PAGE_BYTES, PAGE_TABLES, STACK_TOP};

/// A segment register, field by field, as hypervisor interfaces want it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRegister {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Type field of the descriptor (4 bits).
    pub kind: u8,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Code or data (not a system segment).
    pub code_or_data: bool,
    /// Present.
    pub present: bool,
    /// 64-bit code.
    pub long: bool,
    /// 32-bit default operand size.
    pub default_big: bool,
    /// Limit counts in pages.
    pub granularity: bool,
}

/// The registers that the vCPU starts with; all others keep their reset values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRegisters {
    /// Entry point.
    pub rip: u64,
    /// Guest-physical address of the boot parameters.
    pub rsi: u64,
    /// A small stack.
    pub rsp: u64,
    /// Interrupts off.
    pub rflags: u64,
    /// Protected mode, paging.
    pub cr0: u64,
    /// Top-level page table.
    pub cr3: u64,
    /// PAE.
    pub cr4: u64,
    /// Long mode enabled and active.
    pub efer: u64,
    /// CS.
    pub code: SegmentRegister,
    /// DS, ES, FS, GS, SS.
    pub data: SegmentRegister,
    /// Address of the GDT.
    pub gdt_base: u64,
    /// Its limit.
    pub gdt_limit: u16,
    /// Address of the IDT: there is none.
    pub idt_base: u64,
    /// Its limit.
    pub idt_limit: u16,
}

/// Entries 0 and 1 are empty; `__BOOT_CS` is 0x10, `__BOOT_DS` 0x18.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const CODE_EXECUTE_READ_ACCESSED: u8 = 11;
const DATA_READ_WRITE_ACCESSED: u8 = 3;

const RFLAGS_RESERVED: u64 = 1 << 1;
/// PE, MP, ET, NE, WP, AM, PG: as the kernel itself sets it.
const CR0: u64 = 0x8005_0033;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT_WRITABLE: u64 = 3;
const PTE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

pub(super) fn at_entry(entry: u64) -> EntryRegisters {
    let code = SegmentRegister {
        selector: BOOT_CS,
        base: 0,
        limit: u32::MAX,
        kind: CODE_EXECUTE_READ_ACCESSED,
        dpl: 0,
        code_or_data: true,
        present: true,
        long: true,
        default_big: false,
        granularity: true,
    };
    EntryRegisters {
        rip: entry,
        rsi: BOOT_PARAMS,
        rsp: STACK_TOP,
        rflags: RFLAGS_RESERVED,
        cr0: CR0,
        cr3: PAGE_TABLES,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        code,
        data: SegmentRegister {
            selector: BOOT_DS,
            kind: DATA_READ_WRITE_ACCESSED,
            long: false,
            default_big: true,
            ..code
        },
        gdt_base: GDT,
        gdt_limit: 8 * 4 - 1,
        idt_base: 0,
        idt_limit: 0,
    }
}

pub(super) fn gdt() -> Vec<u8> {
    GDT_ENTRIES
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

/// Three pages: PML4, one PDPT, one page directory of 512 pages of 2 MiB.
pub(super) fn page_tables() -> Vec<u8> {
    let page = |first: u64| {
        let mut entries = [0u64; 512];
        entries[0] = first;
        entries
    };
    let pml4 = page((PAGE_TABLES + PAGE_BYTES) | PTE_PRESENT_WRITABLE);
    let pdpt = page((PAGE_TABLES + 2 * PAGE_BYTES) | PTE_PRESENT_WRITABLE);
    let directory =
        (0u64..512).map(|index| (index * LARGE_PAGE_BYTES) | PTE_LARGE | PTE_PRESENT_WRITABLE);
    pml4.into_iter()
        .chain(pdpt)
        .chain(directory)
        .flat_map(u64::to_le_bytes)
        .collect()
}
