//! A vCPU that executes the toy instruction set.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::toy::{OP_BYTES, Op, Reg, decode};
use super::vm::SharedLog;
use crate::kick::Kicker;
use crate::state::{VcpuState, XSAVE_BYTES};
use crate::vcpu::{Unemulated, Vcpu};
use crate::{CpuidTable, Error, Exit, Gfn, GuestRam, RunError, Stop};

/// Where the addresses of the interrupt handlers lie: 8 bytes for each vector.
pub const VECTOR_TABLE: u64 = 0x1000;

/// Instructions that one run executes at most: a program that loops for ever is an error.
const MAX_RUN_INSTRUCTIONS: u64 = 100_000_000;
const RFLAGS_IF: u64 = 1 << 9;
/// Bytes of an interrupt's frame: RIP and RFLAGS.
const FRAME_BYTES: u64 = 16;

/// A deterministic vCPU without KVM.
#[derive(Debug)]
pub struct ToyVcpu {
    ram: GuestRam,
    log: SharedLog,
    cpuid: CpuidTable,
    kicker: Kicker,
    regs: kvm_regs,
    sregs: kvm_sregs,
    pending: Option<Pending>,
    regs_changed: bool,
    injected: Option<u8>,
    window: bool,
    trap_tsc: bool,
    cpuid_fault: bool,
    instructions: u64,
    kick_at: Option<u64>,
}

/// An access that completes with the next run.
#[derive(Debug)]
struct Pending {
    /// Where the bytes of a read go.
    to: Option<Reg>,
    data: Vec<u8>,
}

impl ToyVcpu {
    pub(super) fn new(ram: GuestRam, log: SharedLog, entry: u64, cpuid: CpuidTable) -> Self {
        Self {
            ram,
            log,
            cpuid,
            kicker: Kicker::new(),
            regs: kvm_regs {
                rip: entry,
                rflags: 2,
                ..Default::default()
            },
            sregs: kvm_sregs::default(),
            pending: None,
            regs_changed: false,
            injected: None,
            window: false,
            trap_tsc: false,
            cpuid_fault: false,
            instructions: 0,
            kick_at: None,
        }
    }

    /// Instructions executed so far.
    #[must_use]
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// Kicks the vCPU once exactly `count` further instructions are executed.
    pub fn kick_after(&mut self, count: u64) {
        self.kick_at = Some(self.instructions + count);
    }

    fn reg(&mut self, reg: Reg) -> &mut u64 {
        match reg {
            Reg::A => &mut self.regs.rax,
            Reg::B => &mut self.regs.rbx,
            Reg::C => &mut self.regs.rcx,
            Reg::D => &mut self.regs.rdx,
        }
    }

    /// Completes the access of the last exit. Changed registers win over the bytes read, as in
    /// KVM's emulator.
    fn complete(&mut self) {
        let Some(pending) = self.pending.take() else {
            self.regs_changed = false;
            return;
        };
        self.regs.rip += OP_BYTES;
        self.instructions += 1;
        if let Some(to) = pending.to.filter(|_| !self.regs_changed) {
            let mut word = [0; 8];
            word[..pending.data.len()].copy_from_slice(&pending.data);
            *self.reg(to) = u64::from_le_bytes(word);
        }
        self.regs_changed = false;
    }

    fn take_interrupt(&mut self) -> Result<(), RunError> {
        let Some(vector) = self.injected.take() else {
            return Ok(());
        };
        self.regs.rsp = self.regs.rsp.wrapping_sub(FRAME_BYTES);
        self.write(self.regs.rsp, &self.regs.rip.to_le_bytes())?;
        self.write(
            self.regs.rsp.wrapping_add(8),
            &self.regs.rflags.to_le_bytes(),
        )?;
        self.regs.rflags &= !RFLAGS_IF;
        self.regs.rip = self.read(VECTOR_TABLE + u64::from(vector) * 8)?;
        Ok(())
    }

    fn read(&self, addr: u64) -> Result<u64, RunError> {
        let mut word = [0; 8];
        self.ram
            .read(addr, &mut word)
            .map_err(|_| RunError::MemoryFault { gpa: addr })?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), RunError> {
        self.ram
            .write_as_guest(addr, bytes)
            .map_err(|_| RunError::MemoryFault { gpa: addr })?;
        self.log.note(addr, bytes.len());
        Ok(())
    }

    fn kick_is_due(&mut self) -> bool {
        let due = self.kick_at.is_some_and(|at| self.instructions >= at);
        if due {
            self.kick_at = None;
        }
        self.kicker.take() | due
    }

    /// Executes one instruction; an exit leaves RIP at it, except HLT.
    fn step(&mut self) -> Result<Option<Exit>, RunError> {
        let bytes = self.read(self.regs.rip)?.to_le_bytes();
        let Some(op) = decode(bytes) else {
            return Ok(Some(Exit::EmulationFailed));
        };
        if let Some(exit) = self.access(op) {
            return Ok(Some(exit));
        }
        self.regs.rip += OP_BYTES;
        self.instructions += 1;
        match op {
            Op::Halt => return Ok(Some(Exit::Halt)),
            Op::Set(reg, value) => *self.reg(reg) = u64::from(value),
            Op::Add(to, from) => {
                let value = *self.reg(from);
                *self.reg(to) = self.reg(to).wrapping_add(value);
            }
            Op::AddImm(reg, value) => *self.reg(reg) = self.reg(reg).wrapping_add(value.into()),
            Op::Mix(reg) => {
                let mixed = self.reg(reg).wrapping_mul(6_364_136_223_846_793_005);
                *self.reg(reg) = mixed.wrapping_add(1_442_695_040_888_963_407);
            }
            Op::Load(to, base, offset) => {
                let addr = self.reg(base).wrapping_add(offset.into());
                *self.reg(to) = self.read(addr)?;
            }
            Op::Store(from, base, offset) => {
                let addr = self.reg(base).wrapping_add(offset.into());
                let value = *self.reg(from);
                self.write(addr, &value.to_le_bytes())?;
            }
            Op::Jump(target) => self.regs.rip = target.into(),
            Op::Loop(reg, target) => {
                *self.reg(reg) = self.reg(reg).wrapping_sub(1);
                if *self.reg(reg) != 0 {
                    self.regs.rip = target.into();
                }
            }
            Op::Sti => self.regs.rflags |= RFLAGS_IF,
            Op::Cli => self.regs.rflags &= !RFLAGS_IF,
            Op::Iret => {
                self.regs.rip = self.read(self.regs.rsp)?;
                self.regs.rflags = self.read(self.regs.rsp.wrapping_add(8))?;
                self.regs.rsp = self.regs.rsp.wrapping_add(FRAME_BYTES);
            }
            Op::SetStack(reg) => self.regs.rsp = *self.reg(reg),
            Op::In(_) | Op::Out(_) => unreachable!("accesses were handled before"),
        }
        Ok(None)
    }

    /// The exit of an instruction that leaves the machine.
    fn access(&mut self, op: Op) -> Option<Exit> {
        let (exit, to, data) = match op {
            Op::In(port) => (
                Exit::PortIn {
                    port,
                    size: 4,
                    count: 1,
                },
                Some(Reg::A),
                vec![0; 4],
            ),
            Op::Out(port) => {
                let data = (self.regs.rax as u32).to_le_bytes().to_vec();
                (
                    Exit::PortOut {
                        port,
                        size: 4,
                        count: 1,
                    },
                    None,
                    data,
                )
            }
            Op::Load(to, base, offset) => {
                let addr = self.reg(base).wrapping_add(offset.into());
                if self.ram.read(addr, &mut [0; 8]).is_ok() {
                    return None;
                }
                (Exit::MmioRead { addr, len: 8 }, Some(to), vec![0; 8])
            }
            Op::Store(from, base, offset) => {
                let addr = self.reg(base).wrapping_add(offset.into());
                if self.ram.read(addr, &mut [0; 8]).is_ok() {
                    return None;
                }
                (
                    Exit::MmioWrite { addr, len: 8 },
                    None,
                    self.reg(from).to_le_bytes().to_vec(),
                )
            }
            _ => return None,
        };
        self.pending = Some(Pending { to, data });
        Some(exit)
    }

    fn require_settled(&self) -> Result<(), Error> {
        if self.pending.is_none() && !self.regs_changed {
            Ok(())
        } else {
            Err(Error::NotSettled)
        }
    }
}

impl Vcpu for ToyVcpu {
    fn run(&mut self) -> Result<Stop, RunError> {
        self.complete();
        for _ in 0..MAX_RUN_INSTRUCTIONS {
            if self.kick_is_due() {
                return Ok(Stop::Kicked);
            }
            self.take_interrupt()?;
            if self.window && self.can_interrupt() {
                return Ok(Stop::Exit(Exit::InterruptWindow));
            }
            if let Some(exit) = self.step()? {
                return Ok(Stop::Exit(exit));
            }
        }
        Err(RunError::ScriptEnd)
    }

    fn settle(&mut self) -> Result<Stop, RunError> {
        self.complete();
        Ok(Stop::Kicked)
    }

    fn access_data(&mut self) -> &mut [u8] {
        self.pending
            .as_mut()
            .map_or(&mut [], |pending| pending.data.as_mut_slice())
    }

    fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn set_regs(&mut self, regs: &kvm_regs) {
        self.regs = *regs;
        self.regs_changed = true;
    }

    fn can_interrupt(&self) -> bool {
        self.regs.rflags & RFLAGS_IF != 0 && self.injected.is_none()
    }

    fn inject(&mut self, vector: u8) -> Result<(), Error> {
        if !self.can_interrupt() {
            return Err(Error::NotInterruptible { vector });
        }
        self.injected = Some(vector);
        Ok(())
    }

    fn set_interrupt_window(&mut self, on: bool) {
        self.window = on;
    }

    fn interrupt_window(&self) -> bool {
        self.window
    }

    fn skip_unemulated(&mut self) -> Result<Unemulated, Error> {
        Ok(Unemulated::NotKnown(Vec::new()))
    }

    fn translate(&mut self, virtual_addr: u64) -> Result<Option<u64>, Error> {
        Ok(Some(virtual_addr))
    }

    fn notice_writes(&mut self, _pages: &[Gfn]) -> Result<(), Error> {
        self.require_settled()
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        self.require_settled()?;
        let mut events = kvm_bindings::kvm_vcpu_events::default();
        if let Some(vector) = self.injected {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        Ok(VcpuState {
            regs: self.regs,
            sregs: self.sregs,
            xsave: vec![0; XSAVE_BYTES],
            xcrs: kvm_bindings::kvm_xcrs::default(),
            msrs: vec![crate::Msr {
                index: 0x140,
                value: self.cpuid_fault.into(),
            }],
            events,
            debugregs: kvm_bindings::kvm_debugregs::default(),
            mp_state: None,
            interrupt_window: self.window,
            trap_tsc: self.trap_tsc,
            cpuid: self.cpuid.clone(),
        })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.require_settled()?;
        if state.cpuid != self.cpuid {
            return Err(Error::StateMismatch("CPUID table".into()));
        }
        self.regs = state.regs;
        self.sregs = state.sregs;
        self.injected = (state.events.interrupt.injected != 0).then_some(state.events.interrupt.nr);
        self.window = state.interrupt_window;
        self.trap_tsc = state.trap_tsc;
        self.cpuid_fault = state.msr(0x140) == Some(1);
        Ok(())
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
        self.cpuid_fault = on;
        Ok(())
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FakeVm, assemble};
    use super::*;
    use crate::{Gfn, Vm};

    const BASE: u64 = 0x4000;
    const DATA: u32 = 0x8000;
    const STACK: u32 = 0x7000;

    fn machine(program: &[Op]) -> (FakeVm, ToyVcpu) {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.write(BASE, &assemble(BASE as u32, program)).unwrap();
        let vm = FakeVm::new(ram);
        let vcpu = vm.create_toy(BASE, CpuidTable::default());
        (vm, vcpu)
    }

    /// Walks through memory, tells on port 0x10 every 10 steps, and counts interrupts (vector 5).
    fn walker() -> (FakeVm, ToyVcpu) {
        let handler = 12;
        let (vm, vcpu) = machine(&[
            Op::Set(Reg::B, STACK),
            Op::SetStack(Reg::B),
            Op::Set(Reg::B, DATA),
            Op::Sti,
            Op::Set(Reg::C, 10), // 4
            Op::Mix(Reg::A),     // 5
            Op::Store(Reg::A, Reg::B, 0),
            Op::Load(Reg::D, Reg::B, 0),
            Op::AddImm(Reg::B, 8),
            Op::Loop(Reg::C, 5),
            Op::Out(0x10),
            Op::Jump(4),
            Op::AddImm(Reg::D, 1), // 12, the handler
            Op::Iret,
        ]);
        let entry = BASE + handler * 8;
        vm.memory()
            .write(VECTOR_TABLE + 5 * 8, &entry.to_le_bytes())
            .unwrap();
        (vm, vcpu)
    }

    #[test]
    fn accesses_complete_with_the_next_run() {
        let (_vm, mut vcpu) = machine(&[
            Op::In(0x40),
            Op::Set(Reg::B, 0xc000_0000),
            Op::Store(Reg::A, Reg::B, 4),
            Op::Load(Reg::C, Reg::B, 8),
            Op::Halt,
        ]);
        let exit = |stop| match stop {
            Stop::Exit(exit) => exit,
            Stop::Kicked => panic!("kicked"),
        };
        assert_eq!(
            exit(vcpu.run().unwrap()),
            Exit::PortIn {
                port: 0x40,
                size: 4,
                count: 1
            }
        );
        assert!(matches!(vcpu.save(), Err(Error::NotSettled)));
        vcpu.access_data().copy_from_slice(&[1, 2, 0, 0]);
        assert_eq!(
            exit(vcpu.run().unwrap()),
            Exit::MmioWrite {
                addr: 0xc000_0004,
                len: 8
            }
        );
        assert_eq!(vcpu.access_data(), 0x201u64.to_le_bytes());
        assert_eq!(
            exit(vcpu.run().unwrap()),
            Exit::MmioRead {
                addr: 0xc000_0008,
                len: 8
            }
        );
        vcpu.access_data()[0] = 9;
        assert_eq!(exit(vcpu.run().unwrap()), Exit::Halt);
        assert_eq!((vcpu.regs().rax, vcpu.regs().rcx), (0x201, 9));
    }

    #[test]
    fn kick_between_two_instructions_changes_nothing_for_the_guest() {
        let run = |kick: Option<u64>| {
            let (vm, mut vcpu) = walker();
            if let Some(count) = kick {
                vcpu.kick_after(count);
                assert_eq!(vcpu.run().unwrap(), Stop::Kicked);
                assert_eq!(vcpu.instructions(), count);
            }
            assert!(matches!(
                vcpu.run().unwrap(),
                Stop::Exit(Exit::PortOut { .. })
            ));
            (vcpu.digest(), vm.memory().digest().unwrap())
        };
        let undisturbed = run(None);
        for count in 1..50 {
            assert_eq!(run(Some(count)), undisturbed, "kick after {count}");
        }
    }

    #[test]
    fn saved_state_goes_on_in_another_vcpu_with_its_injected_interrupt() {
        let (vm, mut vcpu) = walker();
        vcpu.run().unwrap();
        assert_eq!(vcpu.settle().unwrap(), Stop::Kicked);
        vcpu.inject(5).unwrap();
        assert!(matches!(
            vcpu.inject(5),
            Err(Error::NotInterruptible { vector: 5 })
        ));
        let state = vcpu.save().unwrap();
        let (other_vm, mut other) = walker();
        for gfn in vm.memory().pages() {
            let mut page = [0; crate::PAGE_SIZE];
            vm.memory().read_page(gfn, &mut page).unwrap();
            other_vm.memory().write_page(gfn, &page).unwrap();
        }
        other.restore(&state).unwrap();
        for _ in 0..5 {
            assert_eq!(vcpu.run().unwrap(), other.run().unwrap());
            assert_eq!(vcpu.digest(), other.digest());
        }
        assert_eq!(
            vm.memory().digest().unwrap(),
            other_vm.memory().digest().unwrap()
        );
    }

    #[test]
    fn dirty_log_has_guest_writes_only() {
        let (mut vm, mut vcpu) = walker();
        assert!(vm.dirty_log().is_err());
        vm.set_dirty_log(true).unwrap();
        let _ = vm.memory().take_vmm_dirty();
        vcpu.run().unwrap();
        assert_eq!(vm.dirty_log().unwrap().iter().collect::<Vec<_>>(), [Gfn(8)]);
        assert!(vm.dirty_log().unwrap().is_empty());
        assert!(vm.memory().take_vmm_dirty().is_empty());
    }

    #[test]
    fn window_opens_when_interrupts_go_on() {
        let (_vm, mut vcpu) = walker();
        vcpu.set_interrupt_window(true);
        assert_eq!(vcpu.run().unwrap(), Stop::Exit(Exit::InterruptWindow));
        assert_eq!(vcpu.instructions(), 4);
    }
}
