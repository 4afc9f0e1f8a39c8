//! The vCPU as running, recording and replaying need it.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::{CpuidTable, Error, Gfn, Kicker, RunError, Stop, VcpuState};

/// What [`Vcpu::skip_unemulated`] did about an instruction that KVM does not emulate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unemulated {
    /// The instruction was carried out; its name.
    Done(&'static str),
    /// The instruction is not known here; its bytes, as far as they could be read.
    NotKnown(Vec<u8>),
}

/// A vCPU.
///
/// It is owned by one thread at a time; [`Vcpu::kicker`] is the only way to reach it from others.
/// Its life is a sequence of stops. A [`Stop::Exit`] with an access leaves the access
/// *incomplete*: the bytes are in [`Vcpu::access_data`], the instruction completes with the next
/// [`Vcpu::run`] or [`Vcpu::settle`]. After [`Stop::Kicked`] the vCPU is *settled*: nothing is
/// incomplete and its state can be saved or replaced.
pub trait Vcpu {
    /// Runs the guest until its next stop.
    ///
    /// # Errors
    /// [`RunError`] if the guest cannot run on; the vCPU must then not be run again.
    fn run(&mut self) -> Result<Stop, RunError>;

    /// Completes an incomplete access without running the guest any further.
    ///
    /// Returns [`Stop::Kicked`] when the vCPU is settled, or (rarely: an access that KVM hands
    /// out in several parts) one more exit, which is to be handled like any other before trying
    /// again. Does not use up a kick.
    ///
    /// # Errors
    /// As for [`Vcpu::run`].
    fn settle(&mut self) -> Result<Stop, RunError>;

    /// The bytes of the incomplete port or MMIO access ([`crate::Exit::access_len`]); to be filled
    /// for a read, empty when no access is incomplete.
    fn access_data(&mut self) -> &mut [u8];

    /// General registers at the last stop, with later changes by [`Vcpu::set_regs`].
    fn regs(&self) -> &kvm_regs;

    /// Segment and control registers at the last stop.
    fn sregs(&self) -> &kvm_sregs;

    /// Replaces the general registers with the next run.
    ///
    /// During an incomplete port read the caller must put the bytes read into RAX as well as into
    /// [`Vcpu::access_data`], and must leave RIP alone: which of the two the guest sees differs
    /// between KVM's paths.
    fn set_regs(&mut self, regs: &kvm_regs);

    /// Whether the guest can take an interrupt at this stop: interrupts on, no shadow of STI or
    /// MOV SS, no other event on its way.
    fn can_interrupt(&self) -> bool;

    /// Delivers an interrupt with the next run.
    ///
    /// # Errors
    /// [`Error::NotInterruptible`] unless [`Vcpu::can_interrupt`]; KVM itself would deliver it
    /// even into code that has interrupts off.
    fn inject(&mut self, vector: u8) -> Result<(), Error>;

    /// Asks for [`crate::Exit::InterruptWindow`] as soon as the guest can take an interrupt.
    fn set_interrupt_window(&mut self, on: bool);

    /// Whether the interrupt window is asked for.
    fn interrupt_window(&self) -> bool;

    /// Carries out the instruction that led to [`crate::Exit::EmulationFailed`], if it is one of
    /// those known to be missing in KVM's emulator (INT3, FWAIT, POPCNT of registers).
    ///
    /// # Errors
    /// If KVM refuses to read or set state.
    fn skip_unemulated(&mut self) -> Result<Unemulated, Error>;

    /// Guest physical address behind a guest virtual address, by the guest's own page tables.
    ///
    /// # Errors
    /// If KVM refuses.
    fn translate(&mut self, virtual_addr: u64) -> Result<Option<u64>, Error>;

    /// Makes the hypervisor forget what it has derived from these pages of RAM (shadow page tables), which
    /// were written behind its back. Uses the settled vCPU for it, whose state is lost: to be followed by
    /// [`Vcpu::restore`] before anything else.
    ///
    /// # Errors
    /// [`Error::NotSettled`], [`Error::Ram`] of a page outside RAM, [`Error::Notice`], or what KVM
    /// refuses; the guest must not run again then.
    fn notice_writes(&mut self, pages: &[Gfn]) -> Result<(), Error>;

    /// Reads the complete state of a settled vCPU.
    ///
    /// # Errors
    /// [`Error::NotSettled`], or what KVM refuses.
    fn save(&mut self) -> Result<VcpuState, Error>;

    /// Replaces the complete state of a settled vCPU.
    ///
    /// # Errors
    /// [`Error::NotSettled`], [`Error::StateMismatch`], or what KVM refuses; after an error the
    /// vCPU must not be run.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;

    /// A handle that stops this vCPU from other threads.
    fn kicker(&self) -> Kicker;

    /// Makes RDTSC of the guest's ring 3 fault on hosts where the guest's own CR4.TSD has no
    /// effect there. It takes both: without the guest's CR4.TSD, RDTSC goes on working.
    fn set_trap_tsc(&mut self, on: bool);

    /// Whether [`Vcpu::set_trap_tsc`] is on.
    fn trap_tsc(&self) -> bool;

    /// Makes CPUID of the guest's ring 3 fault (CPUID faulting, MSR 140h).
    ///
    /// # Errors
    /// [`Error::MsrRefused`] where KVM does not offer CPUID faulting.
    fn set_cpuid_fault(&mut self, on: bool) -> Result<(), Error>;

    /// The table that the guest's CPUID is answered from.
    fn cpuid(&self) -> &CpuidTable;

    /// Digest of [`Vcpu::regs`] and [`Vcpu::sregs`]: the one that both sides compare.
    fn digest(&self) -> u64 {
        crate::digest::registers(self.regs(), self.sregs())
    }
}
