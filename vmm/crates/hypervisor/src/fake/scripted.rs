//! A vCPU that stops where a script says, and records what is done to it.

use std::collections::VecDeque;

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::kick::Kicker;
use crate::state::{VcpuState, XSAVE_BYTES};
use crate::vcpu::{Unemulated, Vcpu};
use crate::{CpuidTable, Error, Exit, Gfn, RunError, Stop};

/// One stop of the script.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// The exit, or a kick.
    pub exit: Option<Exit>,
    /// Registers at the stop.
    pub regs: kvm_regs,
    /// Bytes of the access; zeros for a read. Filled up or cut to the exit's length.
    pub data: Vec<u8>,
    /// Whether the guest can take an interrupt here.
    pub can_interrupt: bool,
}

impl Step {
    /// A stop at this exit.
    #[must_use]
    pub fn exit(exit: Exit) -> Self {
        Self {
            exit: Some(exit),
            ..Self::default()
        }
    }

    /// A stop without a number.
    #[must_use]
    pub fn kicked() -> Self {
        Self::default()
    }

    /// With these registers.
    #[must_use]
    pub fn with_regs(self, regs: kvm_regs) -> Self {
        Self { regs, ..self }
    }

    /// With these bytes written.
    #[must_use]
    pub fn with_data(self, data: &[u8]) -> Self {
        Self {
            data: data.to_vec(),
            ..self
        }
    }

    /// Where the guest can take an interrupt.
    #[must_use]
    pub fn interruptible(self) -> Self {
        Self {
            can_interrupt: true,
            ..self
        }
    }
}

/// Something that was done to the vCPU, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// Left the stop with this index; the bytes with which its access was completed.
    Left {
        /// Index of the step in the script.
        step: usize,
        /// The access's bytes.
        data: Vec<u8>,
    },
    /// Injected a vector.
    Injected(u8),
    /// Asked for the interrupt window, or took that back.
    Window(bool),
    /// Replaced the general registers.
    SetRegs(Box<kvm_regs>),
    /// Restored a state with this digest.
    Restored(u64),
}

/// A vCPU that follows a script.
#[derive(Debug)]
pub struct ScriptedVcpu {
    script: VecDeque<Step>,
    at: Option<(usize, Step)>,
    next: usize,
    /// Everything that was done, in order.
    pub done: Vec<Done>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    settled: bool,
    injected: bool,
    window: bool,
    trap_tsc: bool,
    cpuid: CpuidTable,
    kicker: Kicker,
}

impl ScriptedVcpu {
    /// A vCPU that will make these stops, and then fail with [`RunError::ScriptEnd`].
    #[must_use]
    pub fn new(script: impl IntoIterator<Item = Step>) -> Self {
        Self {
            script: script.into_iter().collect(),
            at: None,
            next: 0,
            done: Vec::new(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            settled: true,
            injected: false,
            window: false,
            trap_tsc: false,
            cpuid: CpuidTable::default(),
            kicker: Kicker::new(),
        }
    }

    /// Vectors injected so far.
    pub fn injected(&self) -> impl Iterator<Item = u8> + '_ {
        self.done.iter().filter_map(|done| match done {
            Done::Injected(vector) => Some(*vector),
            _ => None,
        })
    }

    fn leave(&mut self) {
        if let Some((step, left)) = self.at.take() {
            self.done.push(Done::Left {
                step,
                data: left.data,
            });
        }
        self.settled = true;
    }

    fn require_settled(&self) -> Result<(), Error> {
        if self.settled {
            Ok(())
        } else {
            Err(Error::NotSettled)
        }
    }
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self) -> Result<Stop, RunError> {
        self.leave();
        if self.kicker.take() {
            return Ok(Stop::Kicked);
        }
        let mut step = self.script.pop_front().ok_or(RunError::ScriptEnd)?;
        let exit = step.exit;
        let len = exit.map_or(0, Exit::access_len);
        step.data.resize(len, 0);
        self.regs = step.regs;
        self.settled = len == 0;
        self.injected = false;
        self.at = Some((self.next, step));
        self.next += 1;
        Ok(exit.map_or(Stop::Kicked, Stop::Exit))
    }

    fn settle(&mut self) -> Result<Stop, RunError> {
        self.leave();
        Ok(Stop::Kicked)
    }

    fn access_data(&mut self) -> &mut [u8] {
        self.at
            .as_mut()
            .map_or(&mut [], |(_, step)| step.data.as_mut_slice())
    }

    fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn set_regs(&mut self, regs: &kvm_regs) {
        self.regs = *regs;
        self.done.push(Done::SetRegs(Box::new(*regs)));
    }

    fn can_interrupt(&self) -> bool {
        !self.injected && self.at.as_ref().is_some_and(|(_, step)| step.can_interrupt)
    }

    fn inject(&mut self, vector: u8) -> Result<(), Error> {
        if !self.can_interrupt() {
            return Err(Error::NotInterruptible { vector });
        }
        self.injected = true;
        self.done.push(Done::Injected(vector));
        Ok(())
    }

    fn set_interrupt_window(&mut self, on: bool) {
        if on != self.window {
            self.done.push(Done::Window(on));
        }
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
        Ok(VcpuState {
            regs: self.regs,
            sregs: self.sregs,
            xsave: vec![0; XSAVE_BYTES],
            xcrs: kvm_bindings::kvm_xcrs::default(),
            msrs: Vec::new(),
            events: kvm_bindings::kvm_vcpu_events::default(),
            debugregs: kvm_bindings::kvm_debugregs::default(),
            mp_state: None,
            interrupt_window: self.window,
            trap_tsc: self.trap_tsc,
            cpuid: self.cpuid.clone(),
        })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.require_settled()?;
        self.regs = state.regs;
        self.sregs = state.sregs;
        self.window = state.interrupt_window;
        self.trap_tsc = state.trap_tsc;
        self.done.push(Done::Restored(state.digest()));
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

    fn set_cpuid_fault(&mut self, _on: bool) -> Result<(), Error> {
        Ok(())
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_is_followed_and_what_was_done_is_recorded() {
        let input = Exit::PortIn {
            port: 0x60,
            size: 1,
            count: 1,
        };
        let output = Exit::PortOut {
            port: 0x3f8,
            size: 1,
            count: 1,
        };
        let regs = kvm_regs {
            rip: 7,
            ..Default::default()
        };
        let mut vcpu = ScriptedVcpu::new([
            Step::exit(input).with_regs(regs),
            Step::exit(output).with_data(b"x").interruptible(),
            Step::kicked(),
        ]);
        assert_eq!(vcpu.run().unwrap(), Stop::Exit(input));
        assert_eq!(vcpu.regs().rip, 7);
        vcpu.access_data()[0] = 0x1c;
        assert!(matches!(vcpu.save(), Err(Error::NotSettled)));
        assert!(matches!(
            vcpu.inject(9),
            Err(Error::NotInterruptible { vector: 9 })
        ));
        assert_eq!(vcpu.run().unwrap(), Stop::Exit(output));
        assert_eq!(vcpu.access_data(), b"x");
        vcpu.inject(9).unwrap();
        assert!(!vcpu.can_interrupt());
        vcpu.kicker().kick();
        assert_eq!(vcpu.run().unwrap(), Stop::Kicked);
        assert_eq!(vcpu.run().unwrap(), Stop::Kicked);
        assert!(matches!(vcpu.run(), Err(RunError::ScriptEnd)));
        assert_eq!(vcpu.injected().collect::<Vec<_>>(), [9]);
        assert_eq!(
            vcpu.done[0],
            Done::Left {
                step: 0,
                data: vec![0x1c]
            }
        );
    }
}
