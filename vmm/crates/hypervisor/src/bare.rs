//! A guest without an operating system: a few instructions in ring 0 or ring 3 over identity-mapped
//! memory. Probes and tests find out with it how a host behaves.
//!
//! ```text
//! 0x1000 GDT    0x2000 TSS    0x3000 IDT    0x4000 one stub for each vector
//! 0x8000 page tables: the first GiB and the last below 4 GiB, 2 MiB pages, all rings
//! 0x10000 code, 0x60000 stack of ring 0 (from TSS), 0x70000 first stack, 0x200000 data
//! ```
//! An exception writes to the port of its vector ([`exception_port`]) and halts. Other vectors
//! return at once, unless [`BareGuest::set_handler`] says otherwise. Ring 3 may use ports (IOPL 3).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};

use crate::kvm::{KvmVcpu, KvmVm};
use crate::{CpuidTable, Error, Gfn, GuestRam, RamError, Stop, Vcpu, Vm};

/// Address of the first byte of code.
pub const CODE: u64 = 0x10000;
/// Address from which memory is free for data.
pub const DATA: u64 = 0x20_0000;
/// Bytes of code at most.
pub const MAX_CODE_BYTES: usize = 0x40000;

const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const TSS_LIMIT: u32 = 0x67;
const IDT: u64 = 0x3000;
const STUBS: u64 = 0x4000;
const STUB_BYTES: u64 = 16;
const PML4: u64 = 0x8000;
const PDPT: u64 = 0x9000;
const PD_LOW: u64 = 0xa000;
const PD_MMIO: u64 = 0xb000;
/// Flags of an entry of a page table.
const PRESENT_WRITE_USER: u64 = 7;
/// The entry is a large page, not a table.
const LARGE: u64 = 1 << 7;
const KERNEL_STACK: u64 = 0x60000;
const FIRST_STACK: u64 = 0x70000;

const KERNEL_CS: u16 = 0x10;
const KERNEL_SS: u16 = 0x18;
const USER_SS: u16 = 0x28 | 3;
const USER_CS: u16 = 0x30 | 3;
const TSS_SELECTOR: u16 = 0x38;
/// Null twice, kernel code and data, 32-bit user code, user data, 64-bit user code.
const GDT_ENTRIES: [u64; 7] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SYSCALL_MASK: u32 = 0xc000_0084;
/// TF, IF, DF, IOPL, NT, AC are cleared on SYSCALL, as Linux has it.
const SYSCALL_MASK: u64 = 0x0004_7700;
/// SYSRET takes CS and SS from 0x20, SYSCALL from 0x10.
const STAR: u64 = 0x20 << 48 | 0x10 << 32;

/// PE, MP, ET, NE, WP, AM, PG.
pub(crate) const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
pub(crate) const CR4: u64 = 0x620;
/// SCE, LME, LMA.
pub(crate) const EFER: u64 = 0x501;

/// CR4.TSD: RDTSC faults outside ring 0.
pub const CR4_TSD: u64 = 1 << 2;
/// RFLAGS.IF: interrupts are on.
pub const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_IOPL3: u64 = 3 << 12;

/// Privilege of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// As a kernel.
    Kernel,
    /// As a program.
    User,
}

/// The port to which exception `vector` (below 32) writes.
#[must_use]
pub fn exception_port(vector: u8) -> u16 {
    0x80 | u16::from(vector & 31)
}

/// A machine with one vCPU that is about to run code at [`CODE`].
#[derive(Debug)]
pub struct BareGuest {
    /// The vCPU.
    pub vcpu: KvmVcpu,
    /// The machine.
    pub vm: KvmVm,
}

impl BareGuest {
    /// Makes a machine of `ram_bytes` (at least 4 MiB) with the host's own CPUID table and `code`
    /// in it, about to run it in `ring`.
    ///
    /// # Errors
    /// What KVM refuses; [`Error::Ram`] if code or memory do not fit.
    pub fn new(ram_bytes: u64, code: &[u8], ring: Ring) -> Result<Self, Error> {
        let vm = KvmVm::new(GuestRam::new(ram_bytes)?)?;
        let cpuid = vm.supported_cpuid()?;
        Self::with_cpuid(vm, cpuid, code, ring)
    }

    /// As [`BareGuest::new`], with a given machine and CPUID table.
    ///
    /// # Errors
    /// As for [`BareGuest::new`].
    pub fn with_cpuid(
        vm: KvmVm,
        cpuid: CpuidTable,
        code: &[u8],
        ring: Ring,
    ) -> Result<Self, Error> {
        if code.len() > MAX_CODE_BYTES {
            return Err(RamError::NoRam {
                addr: CODE + code.len() as u64,
            }
            .into());
        }
        let vcpu = vm.create_vcpu(0, cpuid)?;
        write_tables(vm.memory())?;
        vm.memory().write(CODE, code)?;
        let mut guest = Self { vcpu, vm };
        guest.set_syscall_entry(CODE)?;
        guest.vcpu.set_msr(MSR_STAR, STAR)?;
        guest.vcpu.set_msr(MSR_SYSCALL_MASK, SYSCALL_MASK)?;
        guest.start(CODE, ring, 0)?;
        Ok(guest)
    }

    /// Completes what the vCPU was doing and lets it go on at `rip` in `ring`, with zeroed
    /// registers and `cr4` added to the usual bits of CR4. The interrupt flag is off.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn start(&mut self, rip: u64, ring: Ring, cr4: u64) -> Result<(), Error> {
        self.settle()?;
        let mut sregs = *self.vcpu.sregs();
        let (cs, ss, dpl) = match ring {
            Ring::Kernel => (KERNEL_CS, KERNEL_SS, 0),
            Ring::User => (USER_CS, USER_SS, 3),
        };
        sregs.cs = code_segment(cs, dpl);
        let data = data_segment(ss, dpl);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task_segment();
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: 0x4f,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: IDT,
            limit: 0xfff,
            ..Default::default()
        };
        sregs.cr3 = PML4;
        sregs.cr0 = CR0;
        sregs.cr4 = CR4 | cr4;
        sregs.efer = EFER;
        self.vcpu.set_sregs(&sregs)?;
        let iopl = if ring == Ring::User { RFLAGS_IOPL3 } else { 0 };
        self.vcpu.set_regs(&kvm_regs {
            rip,
            rsp: FIRST_STACK,
            rflags: RFLAGS_FIXED | iopl,
            ..Default::default()
        });
        self.settle()
    }

    fn settle(&mut self) -> Result<(), Error> {
        /// Parts of one access at most: a string instruction of a page, byte by byte.
        const MAX_PARTS: usize = 4096;
        for _ in 0..MAX_PARTS {
            if self.vcpu.settle()? == Stop::Kicked {
                return Ok(());
            }
        }
        Err(Error::NotSettled)
    }

    /// Changes the registers with which the vCPU runs on.
    pub fn update_regs(&mut self, change: impl FnOnce(&mut kvm_regs)) {
        let mut regs = *self.vcpu.regs();
        change(&mut regs);
        self.vcpu.set_regs(&regs);
    }

    /// Maps the first gigabyte by one page, and starts anew in `ring`.
    ///
    /// # Errors
    /// [`Error::Ram`] never, since the table lies in RAM; what KVM refuses.
    pub fn map_gigabyte(&mut self, ring: Ring) -> Result<(), Error> {
        self.settle()?;
        write_word(self.vm.memory(), PDPT, LARGE | PRESENT_WRITE_USER)?;
        self.vcpu.notice_writes(&[Gfn::of(PDPT)])?;
        self.start(CODE, ring, 0)
    }

    /// Sets where SYSCALL goes.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn set_syscall_entry(&mut self, addr: u64) -> Result<(), Error> {
        self.vcpu.set_msr(MSR_LSTAR, addr)
    }

    /// Sets where a vector goes: an interrupt gate that any ring may call.
    ///
    /// # Errors
    /// [`Error::Ram`] never, since the table lies in RAM.
    pub fn set_handler(&self, vector: u8, addr: u64) -> Result<(), Error> {
        write_gate(self.vm.memory(), vector, addr)
    }
}

fn write_tables(ram: &GuestRam) -> Result<(), Error> {
    const GIB: u64 = 1 << 30;
    for (index, entry) in GDT_ENTRIES.iter().enumerate() {
        write_word(ram, GDT + index as u64 * 8, *entry)?;
    }
    let tss = 0x0000_8900_0000_0000 | TSS << 16 | u64::from(TSS_LIMIT);
    write_word(ram, GDT + u64::from(TSS_SELECTOR), tss)?;
    write_word(ram, TSS + 4, KERNEL_STACK)?;
    write_word(ram, PML4, PDPT | PRESENT_WRITE_USER)?;
    for (gib, directory) in [(0, PD_LOW), (3, PD_MMIO)] {
        write_word(ram, PDPT + gib * 8, directory | PRESENT_WRITE_USER)?;
        for page in 0..512 {
            let entry = (gib * GIB + page * (2 << 20)) | LARGE | PRESENT_WRITE_USER;
            write_word(ram, directory + page * 8, entry)?;
        }
    }
    for vector in 0..=255u8 {
        let stub = STUBS + u64::from(vector) * STUB_BYTES;
        if vector < 32 {
            // out %al, $port; hlt; jmp to the hlt.
            ram.write(
                stub,
                &[0xe6, exception_port(vector) as u8, 0xf4, 0xeb, 0xfd],
            )?;
        } else {
            ram.write(stub, &[0x48, 0xcf])?; // iretq
        }
        write_gate(ram, vector, stub)?;
    }
    Ok(())
}

fn write_gate(ram: &GuestRam, vector: u8, addr: u64) -> Result<(), Error> {
    /// Present, ring 3 may call it, 64-bit interrupt gate.
    const TYPE: u64 = 0xee;
    let gate = IDT + u64::from(vector) * 16;
    let low = addr & 0xffff | u64::from(KERNEL_CS) << 16 | TYPE << 40 | (addr >> 16 & 0xffff) << 48;
    write_word(ram, gate, low)?;
    write_word(ram, gate + 8, addr >> 32)
}

fn write_word(ram: &GuestRam, addr: u64, word: u64) -> Result<(), Error> {
    Ok(ram.write(addr, &word.to_le_bytes())?)
}

pub(crate) fn code_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        type_: 11,
        l: 1,
        db: 0,
        ..data_segment(selector, dpl)
    }
}

pub(crate) fn data_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: 3,
        present: 1,
        dpl,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

pub(crate) fn task_segment() -> kvm_segment {
    kvm_segment {
        base: TSS,
        limit: TSS_LIMIT,
        selector: TSS_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

/// Defines `fn NAME() -> &'static [u8]`: the machine code of the given assembler lines (Intel
/// syntax, 64 bit). Labels are local numbers; the code must run at any address, and may use
/// `NAME_start` and differences to it.
#[macro_export]
macro_rules! guest_code {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident() { $($line:expr),+ $(,)? }) => {
        ::std::arch::global_asm!(
            ".pushsection .rodata",
            ".balign 16",
            concat!(stringify!($name), "_start:"),
            $($line,)+
            concat!(stringify!($name), "_end:"),
            ".popsection",
        );

        $(#[$meta])*
        $visibility fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!(stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: the two symbols enclose the bytes that the assembler has put between them
            // into one read-only section.
            unsafe {
                let start = &raw const START;
                let len = (&raw const END).offset_from_unsigned(start);
                ::std::slice::from_raw_parts(start, len)
            }
        }
    };
}
