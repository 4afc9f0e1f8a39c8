//! The guest that all probes use, one after the other, and the limit on its time.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_bindings::kvm_regs;

use super::Capabilities;
use crate::bare::{BareGuest, CODE, Ring, exception_port};
use crate::kvm::KvmVm;
use crate::{CpuidTable, Error, Exit, GuestRam, Kicker, RunError, Stop, Vcpu, VcpuState, Vm};

/// Longest time that one guest of a probe may run without an exit.
pub const PROBE_LIMIT: Duration = Duration::from_millis(30);

/// RAM of a probe's guest: its tables and a few huge pages.
const RAM_BYTES: u64 = 16 << 20;

/// Where a probe's guest has stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) outcome: Outcome,
    pub(super) regs: kvm_regs,
    /// Privilege at the stop.
    pub(super) cpl: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Exit(Exit),
    /// It ran longer than [`PROBE_LIMIT`].
    Endless,
    /// KVM could not run it.
    Refused,
}

impl Seen {
    /// Whether the guest wrote one byte to `port`.
    pub(super) fn wrote_to(&self, port: u16) -> bool {
        self.outcome
            == Outcome::Exit(Exit::PortOut {
                port,
                size: 1,
                count: 1,
            })
    }

    /// Whether the guest took an exception.
    pub(super) fn took_exception(&self, vector: u8) -> bool {
        self.wrote_to(exception_port(vector))
    }
}

/// A guest that is put back into its first state before every probe.
#[derive(Debug)]
pub(super) struct Lab {
    pub(super) guest: BareGuest,
    pristine: VcpuState,
}

impl Lab {
    pub(super) fn new() -> Result<Self, Error> {
        Self::over(|supported| supported)
    }

    /// A lab whose guest has a CPUID table made of the supported one.
    pub(super) fn over(table: impl FnOnce(CpuidTable) -> CpuidTable) -> Result<Self, Error> {
        let vm = KvmVm::new(GuestRam::new(RAM_BYTES)?)?;
        let cpuid = table(vm.supported_cpuid()?);
        let mut guest = BareGuest::with_cpuid(vm, cpuid, &[], Ring::Kernel)?;
        let pristine = guest.vcpu.save()?;
        Ok(Self { guest, pristine })
    }

    /// Puts the guest into its first state with this code, about to run it. `cr4` is added.
    pub(super) fn load(&mut self, code: &[u8], ring: Ring, cr4: u64) -> Result<(), Error> {
        if let Err(Error::Run(_)) = self.guest.start(CODE, Ring::Kernel, 0) {
            // The last probe broke the vCPU: take a new one.
            let table = self.guest.vcpu.cpuid().clone();
            *self = Self::over(|_| table)?;
        }
        self.guest.vcpu.restore(&self.pristine)?;
        self.guest.vm.memory().write(CODE, code)?;
        self.guest.start(CODE, ring, cr4)
    }

    /// Loads code and runs it to its first stop.
    pub(super) fn run_code(&mut self, code: &[u8], ring: Ring) -> Result<Seen, Error> {
        self.load(code, ring, 0)?;
        Ok(self.run())
    }

    /// Runs on to the next stop, for [`PROBE_LIMIT`] at most.
    pub(super) fn run(&mut self) -> Seen {
        self.run_for(PROBE_LIMIT)
    }

    /// Runs on to the next stop, for `limit` at most.
    pub(super) fn run_for(&mut self, limit: Duration) -> Seen {
        let vcpu = &mut self.guest.vcpu;
        let result = with_limit(vcpu.kicker(), limit, || vcpu.run());
        let outcome = match result {
            Ok(Stop::Exit(exit)) => Outcome::Exit(exit),
            Ok(Stop::Kicked) => Outcome::Endless,
            Err(_) => Outcome::Refused,
        };
        Seen {
            outcome,
            regs: *vcpu.regs(),
            cpl: vcpu.sregs().cs.dpl,
        }
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.guest.vm.capabilities()
    }
}

/// Kicks if `work` takes longer than `limit`. A kick that comes too late is used up here.
fn with_limit(
    kicker: Kicker,
    limit: Duration,
    work: impl FnOnce() -> Result<Stop, RunError>,
) -> Result<Stop, RunError> {
    let (done, wait) = mpsc::channel::<()>();
    let late = kicker.clone();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let result = work();
        drop(done);
        result
    });
    late.take();
    result
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn endless_guest_is_stopped_and_the_next_probe_is_not_disturbed() {
        if crate::kvm::open().is_err() {
            assert!(std::env::var_os("POLLUX_REQUIRE_KVM").is_none_or(|set| set != "1"));
            eprintln!("SKIPPED endless_guest_is_stopped_and_the_next_probe_is_not_disturbed");
            return;
        }
        let mut lab = Lab::new().unwrap();
        for ring in [Ring::Kernel, Ring::User] {
            let begin = Instant::now();
            let seen = lab.run_code(&[0xeb, 0xfe], ring).unwrap(); // jmp to itself
            assert_eq!(seen.outcome, Outcome::Endless);
            assert!(begin.elapsed() >= PROBE_LIMIT);
            let seen = lab.run_code(&[0xe6, 0x10], ring).unwrap(); // out 0x10, al
            assert!(seen.wrote_to(0x10), "{seen:?}");
        }
    }

    #[test]
    fn triple_fault_does_not_end_the_lab() {
        if crate::kvm::open().is_err() {
            assert!(std::env::var_os("POLLUX_REQUIRE_KVM").is_none_or(|set| set != "1"));
            eprintln!("SKIPPED triple_fault_does_not_end_the_lab");
            return;
        }
        let mut lab = Lab::new().unwrap();
        // lidt of an empty table; ud2.
        let code = [0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];
        let seen = lab.run_code(&code, Ring::Kernel).unwrap();
        assert_eq!(seen.outcome, Outcome::Exit(Exit::Shutdown));
        assert!(
            lab.run_code(&[0xe6, 0x10], Ring::User)
                .unwrap()
                .wrote_to(0x10)
        );
    }
}
