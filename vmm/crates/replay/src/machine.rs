//! The guest with its board: what moves, and only at execution points.
//!
//! One owner: the thread that holds the [`Machine`] runs the vCPU and touches guest memory and the
//! devices; nobody else does. The [`Stage`] says what may happen next (diagram in the crate's docs).

use std::ops::Range;

use devices::{Board, BusAddress, Effect, Input, Rejected};
use format::ExitNumber;
use hypervisor::{Exit, GuestRam, RunError, Stop, Unemulated, Vcpu, Vm};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Digest;
use crate::effects::fold_request;

/// What the machine has to know of the patched guest kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// The ports that patched instructions go to.
    pub ports: TrapPorts,
    /// Where an interrupt window may be asked for: at a time-stamp read with RIP in this range. None:
    /// at every exit (hosts on which the window opens at an exact instruction in ring 0 too).
    pub window_at: Option<Range<u64>>,
    /// What was patched.
    pub patches: Patches,
}

/// The patches in the guest's kernel and programs. They are in its memory, so they go where it goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patches {
    /// SHA-256 of kernel and programs with all their patches.
    pub id: [u8; 32],
    /// The defects of its first host that they go round, by name.
    pub quirks: Vec<String>,
}

/// Ports that stand for instructions rewritten in the guest kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrapPorts {
    /// 4-byte reads answer RDTSC: EDX:EAX is virtual time in ns.
    pub tsc: u16,
    /// 4-byte reads answer CPUID for leaf EAX, subleaf ECX.
    pub cpuid: u16,
}

/// Why a machine cannot go on.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The vCPU does not run.
    #[error("exit {exit}: the vCPU stopped for good: {source}")]
    Run {
        /// The last exit.
        exit: ExitNumber,
        /// Why.
        source: RunError,
    },
    /// The hypervisor refuses something.
    #[error("exit {exit}: {source}")]
    Hypervisor {
        /// The last exit.
        exit: ExitNumber,
        /// Why.
        source: hypervisor::Error,
    },
    /// The host's KVM cannot execute an instruction of the guest and neither can we.
    #[error(
        "exit {exit}: this host's KVM does not emulate the guest instruction {bytes:02x?} at {rip:#x}"
    )]
    Unemulated {
        /// The exit.
        exit: ExitNumber,
        /// Address of the instruction.
        rip: u64,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// An exit that the machine has no use for.
    #[error("exit {exit}: unexpected {what:?} at {rip:#x}")]
    Unexpected {
        /// The exit.
        exit: ExitNumber,
        /// What it was.
        what: Exit,
        /// Where the guest was.
        rip: u64,
    },
    /// The board does not take an input.
    #[error("exit {exit}: {source}")]
    Rejected {
        /// The exit.
        exit: ExitNumber,
        /// Why.
        source: Rejected,
    },
}

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    /// The guest may run on.
    Left,
    /// At an exit whose access waits to be told the time.
    Access(Exit),
    /// At an exit; its access is done and inputs may be applied.
    Open(Exit),
    /// At a point without a number; inputs may be applied.
    Between,
}

/// What [`Machine::run`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    /// A numbered exit.
    Exit,
    /// The vCPU was kicked at a point without a number.
    Kicked,
}

/// The guest: vCPU, memory and board, and how far they are.
#[derive(Debug)]
pub struct Machine<V, C> {
    pub(crate) vm: V,
    pub(crate) vcpu: C,
    pub(crate) board: Board,
    pub(crate) config: MachineConfig,
    pub(crate) exit: ExitNumber,
    pub(crate) digest: Digest,
    pub(crate) stage: Stage,
    /// What devices and vCPU have made happen and nobody has taken yet, in order.
    effects: Vec<Effect>,
    pub(crate) ended: bool,
}

impl<V: Vm, C: Vcpu> Machine<V, C> {
    /// A machine at its first instruction.
    pub fn new(vm: V, vcpu: C, board: Board, config: MachineConfig) -> Self {
        Self {
            vm,
            vcpu,
            board,
            config,
            exit: ExitNumber(0),
            digest: Digest::default(),
            stage: Stage::Left,
            effects: Vec::new(),
            ended: false,
        }
    }

    /// The last numbered exit.
    pub fn exit(&self) -> ExitNumber {
        self.exit
    }

    /// The digest of all registers at all exits, and of all requests, so far.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The devices.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The virtual machine.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestRam {
        self.vm.memory()
    }

    /// The vCPU.
    pub fn vcpu(&self) -> &C {
        &self.vcpu
    }

    /// The vCPU, for settings that are not the guest's state.
    pub fn vcpu_mut(&mut self) -> &mut C {
        &mut self.vcpu
    }

    /// Switches the hypervisor's dirty log.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn set_dirty_log(&mut self, on: bool) -> Result<(), MachineError> {
        let exit = self.exit;
        let _ = self.vm.memory().take_vmm_dirty();
        self.vm
            .set_dirty_log(on)
            .map_err(|source| MachineError::Hypervisor { exit, source })
    }

    /// Whether the guest waits in HLT for an interrupt.
    pub fn is_halted(&self) -> bool {
        self.stage == Stage::Open(Exit::Halt)
    }

    /// Whether the present exit cannot be completed before the time is known.
    pub fn wants_time(&self) -> bool {
        matches!(self.stage, Stage::Access(_))
    }

    /// Whether inputs may be applied here.
    pub fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_) | Stage::Between)
    }

    /// Whether the guest has powered itself off or asked for a reset: it does not run on.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether [`Machine::leave`] is allowed: not while an access waits, and not out of HLT without an
    /// interrupt to deliver.
    pub fn can_leave(&self) -> bool {
        match self.stage {
            Stage::Access(_) => false,
            Stage::Open(Exit::Halt) => self.board.pending_interrupt() && self.vcpu.can_interrupt(),
            Stage::Left | Stage::Open(_) | Stage::Between => true,
        }
    }

    /// Runs the guest to its next stop. At an exit the access is made at once unless it wants the
    /// time first.
    ///
    /// # Errors
    /// The machine cannot go on.
    pub fn run(&mut self) -> Result<Ran, MachineError> {
        assert_eq!(
            self.stage,
            Stage::Left,
            "the guest runs only after its exit was left"
        );
        let stop = self.vcpu.run().map_err(|source| self.run_error(source))?;
        match stop {
            Stop::Kicked => Ok(Ran::Kicked),
            Stop::Exit(exit) => self.arrive(exit).map(|()| Ran::Exit),
        }
    }

    fn run_error(&self, source: RunError) -> MachineError {
        MachineError::Run {
            exit: self.exit,
            source,
        }
    }

    fn arrive(&mut self, exit: Exit) -> Result<(), MachineError> {
        self.exit = self.exit.next();
        self.digest.fold(self.exit.0);
        self.digest.fold(self.vcpu.digest());
        self.stage = Stage::Access(exit);
        if self.access_needs_time(exit) {
            Ok(())
        } else {
            self.access()
        }
    }

    fn access_needs_time(&self, exit: Exit) -> bool {
        match exit {
            Exit::PortIn { port, .. } => {
                port == self.config.ports.tsc || Board::reads_time(BusAddress::Port(port), true)
            }
            Exit::PortOut { port, .. } => Board::reads_time(BusAddress::Port(port), false),
            Exit::MmioRead { addr, .. } => Board::reads_time(BusAddress::Memory(addr), true),
            Exit::MmioWrite { addr, .. } => Board::reads_time(BusAddress::Memory(addr), false),
            _ => false,
        }
    }

    /// Makes the access of the present exit.
    fn access(&mut self) -> Result<(), MachineError> {
        let Stage::Access(exit) = self.stage else {
            unreachable!("called at an access only")
        };
        self.stage = Stage::Open(exit);
        self.access_at(exit)?;
        self.collect_effects();
        Ok(())
    }

    /// Takes what the board has put out. Requests that are no output go into the digest, so that it
    /// covers all that the guest asks of the world.
    fn collect_effects(&mut self) {
        if !self.board.has_effects() {
            return;
        }
        let effects = self.board.take_effects();
        for effect in &effects {
            fold_request(&mut self.digest, effect);
        }
        self.effects.extend(effects);
    }

    fn access_at(&mut self, exit: Exit) -> Result<(), MachineError> {
        match exit {
            Exit::PortIn {
                port,
                size: 4,
                count: 1,
            } if port == self.config.ports.tsc => {
                self.answer_tsc();
            }
            Exit::PortIn {
                port,
                size: 4,
                count: 1,
            } if port == self.config.ports.cpuid => {
                self.answer_cpuid();
            }
            Exit::PortIn { port, size, .. } => {
                let ram = self.vm.memory().memory();
                for item in self.vcpu.access_data().chunks_exact_mut(size.into()) {
                    self.board.port_read(ram, port, item);
                }
            }
            Exit::PortOut { port, size, .. } => {
                let ram = self.vm.memory().memory();
                for item in self.vcpu.access_data().chunks_exact(size.into()) {
                    self.board.port_write(ram, port, item);
                }
            }
            Exit::MmioRead { addr, .. } => {
                self.board
                    .mmio_read(self.vm.memory().memory(), addr, self.vcpu.access_data());
            }
            Exit::MmioWrite { addr, .. } => {
                self.board
                    .mmio_write(self.vm.memory().memory(), addr, self.vcpu.access_data());
            }
            // Linux without ACPI halts with interrupts off when it powers off.
            Exit::Halt if self.vcpu.regs().rflags & INTERRUPT_FLAG == 0 => {
                self.effects.push(Effect::PowerOff);
            }
            Exit::Halt | Exit::InterruptWindow => {}
            Exit::Shutdown => self.effects.push(Effect::Reset),
            Exit::EmulationFailed => self.skip_unemulated()?,
            Exit::SystemEvent(_) | Exit::Unknown(_) => {
                let rip = self.vcpu.regs().rip;
                return Err(MachineError::Unexpected {
                    exit: self.exit,
                    what: exit,
                    rip,
                });
            }
        }
        Ok(())
    }

    fn answer_tsc(&mut self) {
        let now = self.board.now().0;
        let mut regs = *self.vcpu.regs();
        regs.rax = now & 0xffff_ffff;
        regs.rdx = now >> 32;
        self.vcpu
            .access_data()
            .copy_from_slice(&(now as u32).to_le_bytes());
        self.vcpu.set_regs(&regs);
    }

    fn answer_cpuid(&mut self) {
        let mut regs = *self.vcpu.regs();
        let leaf = self.vcpu.cpuid().lookup(regs.rax as u32, regs.rcx as u32);
        regs.rax = leaf.eax.into();
        regs.rbx = leaf.ebx.into();
        regs.rcx = leaf.ecx.into();
        regs.rdx = leaf.edx.into();
        self.vcpu
            .access_data()
            .copy_from_slice(&leaf.eax.to_le_bytes());
        self.vcpu.set_regs(&regs);
    }

    fn skip_unemulated(&mut self) -> Result<(), MachineError> {
        let exit = self.exit;
        let rip = self.vcpu.regs().rip;
        match self.vcpu.skip_unemulated() {
            Ok(Unemulated::Done(_)) => Ok(()),
            Ok(Unemulated::NotKnown(bytes)) => Err(MachineError::Unemulated { exit, rip, bytes }),
            Err(source) => Err(MachineError::Hypervisor { exit, source }),
        }
    }

    /// Applies one logged input here. Where the exit's access waits for the time, the input must be
    /// the time, and the access is then made.
    ///
    /// # Errors
    /// The board does not take the input, or not here.
    pub fn apply(&mut self, input: Input) -> Result<(), MachineError> {
        let allowed = self.is_open() || (self.wants_time() && matches!(input, Input::Time(_)));
        assert!(allowed, "inputs are applied at an execution point");
        let exit = self.exit;
        self.board
            .apply(self.vm.memory().memory(), input)
            .map_err(|source| MachineError::Rejected { exit, source })?;
        self.collect_effects();
        if self.wants_time() {
            self.access()
        } else {
            Ok(())
        }
    }

    /// Ends the machine here, as if it had switched itself off.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Takes what the machine has put out since the last call, in order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        let effects = std::mem::take(&mut self.effects);
        let ended = |effect: &Effect| matches!(effect, Effect::PowerOff | Effect::Reset);
        self.ended |= effects.iter().any(ended);
        effects
    }

    /// Leaves the execution point: decides on the interrupt that goes in here, if any.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn leave(&mut self) -> Result<(), MachineError> {
        assert!(
            self.can_leave(),
            "an exit is left with its access done and HLT with an interrupt"
        );
        let exit = self.exit;
        let pending = self.board.pending_interrupt();
        let window = if pending && self.vcpu.can_interrupt() {
            let vector = self.board.ack_interrupt();
            self.vcpu
                .inject(vector)
                .map_err(|source| MachineError::Hypervisor { exit, source })?;
            false
        } else {
            pending && self.may_ask_for_window()
        };
        self.vcpu.set_interrupt_window(window);
        self.stage = Stage::Left;
        Ok(())
    }

    fn may_ask_for_window(&self) -> bool {
        match (&self.config.window_at, self.stage) {
            (None, _) => true,
            (Some(range), Stage::Open(Exit::PortIn { port, .. })) => {
                port == self.config.ports.tsc && range.contains(&self.vcpu.regs().rip)
            }
            (Some(_), _) => false,
        }
    }

    /// Leaves the present point if it can be left, and completes its access, so that the vCPU's state
    /// can be saved. True when it is at rest; false when that led to another numbered exit, which now
    /// has to be handled.
    ///
    /// # Errors
    /// The machine cannot go on.
    pub fn come_to_rest(&mut self) -> Result<bool, MachineError> {
        if self.is_open() && self.can_leave() && !self.ended {
            self.leave()?;
        }
        self.settle()
    }

    /// Completes the access of an exit without running the guest further.
    pub(crate) fn settle(&mut self) -> Result<bool, MachineError> {
        assert!(
            !self.wants_time(),
            "an access that waits for the time cannot be completed"
        );
        match self
            .vcpu
            .settle()
            .map_err(|source| self.run_error(source))?
        {
            Stop::Kicked => Ok(true),
            Stop::Exit(exit) => self.arrive(exit).map(|()| false),
        }
    }
}

impl<V, C> Machine<V, C> {
    /// Whether the machine stands between exits and the guest may run on.
    pub fn is_left(&self) -> bool {
        self.stage == Stage::Left
    }

    /// Whether the machine stands at a numbered exit, not at a delta.
    pub fn is_at_exit(&self) -> bool {
        matches!(self.stage, Stage::Open(_))
    }
}
