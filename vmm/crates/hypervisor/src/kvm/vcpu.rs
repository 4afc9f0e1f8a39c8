//! The vCPU on KVM: running and stopping it.
//!
//! Two facts are tracked beside what KVM keeps: whether an access is incomplete (`settled` is
//! false then), and whether changed registers still wait in `kvm_run` for the next run.
#![allow(unsafe_code)] // KVM_INTERRUPT is missing in kvm-ioctls.

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{KVM_NR_INTERRUPTS, kvm_interrupt, kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr};

use super::run_area::{self, AccessBytes};
use super::{KvmVm, notice, saved, stats, tsc, unemulated};
use crate::kick::{self, Kicker};
use crate::vcpu::{Unemulated, Vcpu};
use crate::{CpuidTable, Error, Exit, Gfn, RunError, Stop, VcpuState};

ioctl_iow_nr!(KVM_INTERRUPT, kvm_bindings::KVMIO, 0x86, kvm_interrupt);

/// MSR_MISC_FEATURES_ENABLES; bit 0 makes CPUID fault outside ring 0.
pub(super) const MSR_MISC_FEATURES_ENABLES: u32 = 0x140;

/// A vCPU on KVM.
#[derive(Debug)]
pub struct KvmVcpu {
    pub(super) fd: VcpuFd,
    /// The part of `kvm_run` that tells about interrupts, as of the last stop.
    interrupts: InterruptFlags,
    /// Behind the descriptor: dropped after it.
    pub(super) vm: KvmVm,
    pub(super) cpuid: CpuidTable,
    /// MSRs that make up the state, ascending.
    pub(super) msr_list: Vec<u32>,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) trap_tsc: bool,
    run_size: usize,
    kicker: Kicker,
    access: Option<AccessBytes>,
    settled: bool,
    regs_changed: bool,
    injected: bool,
}

impl KvmVcpu {
    pub(super) fn new(
        fd: VcpuFd,
        run_size: usize,
        cpuid: CpuidTable,
        msr_candidates: &[u32],
        vm: KvmVm,
    ) -> Result<Self, Error> {
        kick::install_handler().map_err(|source| Error::Os {
            call: "sigaction for the kick signal",
            source,
        })?;
        fd.set_cpuid2(&cpuid.to_kvm()?)
            .map_err(Error::kvm("KVM_SET_CPUID2"))?;
        let msr_list = saved::restorable_msrs(&fd, msr_candidates);
        let mut vcpu = Self {
            fd,
            interrupts: InterruptFlags::default(),
            vm,
            cpuid,
            msr_list,
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            trap_tsc: false,
            run_size,
            kicker: Kicker::new(),
            access: None,
            settled: true,
            regs_changed: false,
            injected: false,
        };
        vcpu.fd.set_sync_valid_reg(SyncReg::Register);
        vcpu.fd.set_sync_valid_reg(SyncReg::SystemRegister);
        vcpu.regs = vcpu.fd.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
        vcpu.sregs = vcpu.fd.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        Ok(vcpu)
    }

    /// Replaces the segment and control registers of a settled vCPU: for loaders and probes.
    ///
    /// # Errors
    /// [`Error::NotSettled`], or what KVM refuses.
    pub fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.require_settled()?;
        self.fd
            .set_sregs(sregs)
            .map_err(Error::kvm("KVM_SET_SREGS"))?;
        self.sregs = self.fd.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        Ok(())
    }

    /// Sets one MSR of a settled vCPU: for loaders and probes.
    ///
    /// # Errors
    /// [`Error::NotSettled`], [`Error::MsrRefused`].
    pub fn set_msr(&mut self, index: u32, value: u64) -> Result<(), Error> {
        saved::set_msr(&self.fd, index, value)
    }

    /// How many instructions KVM has emulated for this vCPU: all of ring 0 where it runs no ring 0 natively.
    /// None where KVM does not count them.
    #[must_use]
    pub fn emulated_instructions(&self) -> Option<u64> {
        stats::counter(&self.fd, "insn_emulation")
    }

    pub(super) fn require_settled(&self) -> Result<(), Error> {
        if self.settled && !self.regs_changed {
            Ok(())
        } else {
            Err(Error::NotSettled)
        }
    }

    /// After the state was replaced by ioctls: lets KVM bring `kvm_run` up to date.
    pub(super) fn refresh(&mut self) -> Result<(), Error> {
        self.injected = false;
        self.set_immediate_exit(1);
        let result = self.fd.run().map(drop);
        self.set_immediate_exit(0);
        match result {
            Err(error) if error.errno() == libc::EINTR => {
                self.fetch_registers();
                Ok(())
            }
            Err(source) => Err(Error::Kvm {
                call: "KVM_RUN",
                source,
            }),
            Ok(()) => Err(Error::StateMismatch("an access is incomplete in it".into())),
        }
    }

    fn set_immediate_exit(&mut self, value: u8) {
        let byte = run_area::immediate_exit_byte(&mut self.fd);
        // SAFETY: the byte lies in the mapping of kvm_run, which `self.fd` owns; the only other
        // accesses are KVM's and the kick signal handler's atomic store on this thread.
        unsafe { AtomicU8::from_ptr(byte) }.store(value, Ordering::Relaxed);
    }

    fn fetch_registers(&mut self) {
        let sync = self.fd.sync_regs();
        self.regs = sync.regs;
        self.sregs = sync.sregs;
        let run = self.fd.get_kvm_run();
        self.interrupts.ready = run.ready_for_interrupt_injection != 0;
        self.interrupts.enabled = run.if_flag != 0;
    }

    /// One KVM_RUN; `None` if it was interrupted.
    fn enter_once(&mut self, settle: bool) -> Result<Option<Exit>, RunError> {
        let byte = run_area::immediate_exit_byte(&mut self.fd);
        let in_guest = self.kicker.enter(byte);
        if settle || self.kicker.is_pending() {
            // SAFETY: as in `set_immediate_exit`.
            unsafe { AtomicU8::from_ptr(byte) }.store(1, Ordering::Relaxed);
        }
        let result = {
            let _trap = self.trap_tsc.then(tsc::Trap::new);
            self.fd.run().map(Reason::of)
        };
        drop(in_guest);
        self.set_immediate_exit(0);
        self.access = None;
        self.settled = false;
        self.regs_changed = false;
        self.injected = false;
        let reason = match result {
            Ok(reason) => reason,
            Err(error) if is_interruption(error) => Reason::Interrupted,
            Err(error) => return Err(RunError::Kvm(error)),
        };
        self.fetch_registers();
        self.conclude(reason)
    }

    fn conclude(&mut self, reason: Reason) -> Result<Option<Exit>, RunError> {
        let exit = match reason {
            Reason::Interrupted => {
                self.settled = true;
                return Ok(None);
            }
            Reason::Access => {
                let (exit, bytes) = run_area::decode_access(&mut self.fd, self.run_size)
                    .ok_or(RunError::Internal(0))?;
                self.access = Some(bytes);
                return Ok(Some(exit));
            }
            Reason::Internal => {
                let suberror = run_area::internal_suberror(&mut self.fd);
                if !run_area::is_emulation_failure(suberror) {
                    return Err(RunError::Internal(suberror));
                }
                Exit::EmulationFailed
            }
            Reason::FailEntry(hardware) => return Err(RunError::FailEntry(hardware)),
            Reason::MemoryFault(gpa) => return Err(RunError::MemoryFault { gpa }),
            Reason::Plain(exit) => exit,
        };
        // Nothing is left to complete in these; of a reason that is not known, nothing is known.
        self.settled = !matches!(exit, Exit::Unknown(_));
        Ok(Some(exit))
    }
}

/// What `kvm_run` says about interrupts.
#[derive(Clone, Copy, Debug, Default)]
struct InterruptFlags {
    /// Interrupts are not blocked, and no event is on its way.
    ready: bool,
    /// RFLAGS.IF.
    enabled: bool,
    /// The interrupt window is asked for.
    window: bool,
}

/// A stop of KVM_RUN, freed from the borrow of `kvm_run`.
enum Reason {
    Interrupted,
    Access,
    Internal,
    FailEntry(u64),
    MemoryFault(u64),
    Plain(Exit),
}

impl Reason {
    fn of(exit: VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::IoIn(..)
            | VcpuExit::IoOut(..)
            | VcpuExit::MmioRead(..)
            | VcpuExit::MmioWrite(..) => Self::Access,
            VcpuExit::Intr => Self::Interrupted,
            VcpuExit::InternalError => Self::Internal,
            VcpuExit::FailEntry(hardware, _) => Self::FailEntry(hardware),
            VcpuExit::MemoryFault { gpa, .. } => Self::MemoryFault(gpa),
            VcpuExit::Hlt => Self::Plain(Exit::Halt),
            VcpuExit::IrqWindowOpen => Self::Plain(Exit::InterruptWindow),
            VcpuExit::Shutdown => Self::Plain(Exit::Shutdown),
            VcpuExit::SystemEvent(kind, _) => Self::Plain(Exit::SystemEvent(kind)),
            VcpuExit::Unsupported(reason) => Self::Plain(Exit::Unknown(reason)),
            other => Self::Plain(Exit::Unknown(reason_number(&other))),
        }
    }
}

/// Numbers of the reasons that a machine like this one could meet and that are handled nowhere.
fn reason_number(exit: &VcpuExit<'_>) -> u32 {
    match exit {
        VcpuExit::Exception => kvm_bindings::KVM_EXIT_EXCEPTION,
        VcpuExit::Hypercall(_) => kvm_bindings::KVM_EXIT_HYPERCALL,
        VcpuExit::Debug(_) => kvm_bindings::KVM_EXIT_DEBUG,
        VcpuExit::SetTpr => kvm_bindings::KVM_EXIT_SET_TPR,
        VcpuExit::TprAccess => kvm_bindings::KVM_EXIT_TPR_ACCESS,
        VcpuExit::Nmi => kvm_bindings::KVM_EXIT_NMI,
        VcpuExit::IoapicEoi(_) => kvm_bindings::KVM_EXIT_IOAPIC_EOI,
        VcpuExit::Hyperv => kvm_bindings::KVM_EXIT_HYPERV,
        VcpuExit::X86Rdmsr(_) => kvm_bindings::KVM_EXIT_X86_RDMSR,
        VcpuExit::X86Wrmsr(_) => kvm_bindings::KVM_EXIT_X86_WRMSR,
        _ => kvm_bindings::KVM_EXIT_UNKNOWN,
    }
}

pub(super) fn is_interruption(error: errno::Error) -> bool {
    matches!(error.errno(), libc::EINTR | libc::EAGAIN)
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Stop, RunError> {
        loop {
            match self.enter_once(false)? {
                Some(exit) => return Ok(Stop::Exit(exit)),
                None if self.kicker.take() => return Ok(Stop::Kicked),
                // A signal that was not for the guest: it notices nothing.
                None => {}
            }
        }
    }

    fn settle(&mut self) -> Result<Stop, RunError> {
        if self.settled && !self.regs_changed {
            return Ok(Stop::Kicked);
        }
        Ok(self.enter_once(true)?.map_or(Stop::Kicked, Stop::Exit))
    }

    fn access_data(&mut self) -> &mut [u8] {
        match self.access {
            Some(bytes) => run_area::access_bytes(&mut self.fd, bytes),
            None => &mut [],
        }
    }

    fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn set_regs(&mut self, regs: &kvm_regs) {
        self.regs = *regs;
        self.fd.sync_regs_mut().regs = *regs;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.regs_changed = true;
    }

    fn can_interrupt(&self) -> bool {
        const RFLAGS_IF: u64 = 1 << 9;
        let InterruptFlags { ready, enabled, .. } = self.interrupts;
        ready && enabled && self.regs.rflags & RFLAGS_IF != 0 && !self.injected
    }

    fn inject(&mut self, vector: u8) -> Result<(), Error> {
        if !self.can_interrupt() {
            return Err(Error::NotInterruptible { vector });
        }
        let interrupt = kvm_interrupt {
            irq: u32::from(vector),
        };
        // SAFETY: the descriptor is a vCPU, and KVM only reads the structure.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if result != 0 {
            return Err(Error::Kvm {
                call: "KVM_INTERRUPT",
                source: errno::Error::last(),
            });
        }
        self.injected = true;
        Ok(())
    }

    fn set_interrupt_window(&mut self, on: bool) {
        self.interrupts.window = on;
        self.fd.get_kvm_run().request_interrupt_window = u8::from(on);
    }

    fn interrupt_window(&self) -> bool {
        self.interrupts.window
    }

    fn skip_unemulated(&mut self) -> Result<Unemulated, Error> {
        unemulated::skip(self)
    }

    fn translate(&mut self, virtual_addr: u64) -> Result<Option<u64>, Error> {
        let found = self
            .fd
            .translate_gva(virtual_addr)
            .map_err(Error::kvm("KVM_TRANSLATE"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    fn notice_writes(&mut self, pages: &[Gfn]) -> Result<(), Error> {
        notice::notice_writes(self, pages)
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        saved::save(self)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        saved::restore(self, state)
    }

    fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    fn set_trap_tsc(&mut self, on: bool) {
        self.trap_tsc = on;
    }

    fn trap_tsc(&self) -> bool {
        self.trap_tsc
    }

    fn set_cpuid_fault(&mut self, on: bool) -> Result<(), Error> {
        saved::set_msr(&self.fd, MSR_MISC_FEATURES_ENABLES, u64::from(on))
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }
}

const _: () = assert!(KVM_NR_INTERRUPTS == 256, "a vector is one byte");

/// A vCPU and its machine may be made on one thread and run on another.
const _: fn() = || {
    fn may_move_between_threads<T: Send>() {}
    may_move_between_threads::<KvmVcpu>();
    may_move_between_threads::<super::KvmVm>();
};
