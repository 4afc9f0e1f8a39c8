//! The guest that all probes use, one after the other, and the limit on its time.
//!
//! Time is processor time of this thread, so that a busy host does not make a guest look endless
//! or slow; wall-clock time is bounded as well.
#![allow(unsafe_code)] // The clock of a thread's processor time.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;

use super::Capabilities;
use crate::bare::{BareGuest, CODE, Ring, exception_port};
use crate::kvm::KvmVm;
use crate::{CpuidTable, Error, Exit, GuestRam, Kicker, RunError, Stop, Vcpu, VcpuState, Vm};

/// Longest processor time that one guest of a probe may run without an exit.
pub const PROBE_LIMIT: Duration = Duration::from_millis(30);

/// Longest time by the clock on the wall, however little of the processor the guest gets.
const WALL_LIMIT: Duration = Duration::from_secs(2);

/// A guest is kicked this often at least before it counts as endless. Where this host is itself a guest,
/// a pause of the whole machine may count as processor time: it uses up one turn's share of the limit only.
const TURNS: u32 = 4;

/// RAM of a probe's guest: its tables and a few huge pages.
const RAM_BYTES: u64 = 16 << 20;

/// Where a probe's guest has stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) outcome: Outcome,
    pub(super) regs: kvm_regs,
    /// Privilege at the stop.
    pub(super) cpl: u8,
    /// Processor time that it took.
    pub(super) took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Exit(Exit),
    /// It ran longer than [`PROBE_LIMIT`], and did not stop in [`TURNS`] turns.
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

    /// Runs on to the next stop, for about `limit` of processor time at most.
    pub(super) fn run_for(&mut self, limit: Duration) -> Seen {
        let (wall, begin) = (Instant::now(), thread_time());
        let share = limit / TURNS;
        let vcpu = &mut self.guest.vcpu;
        // A guest that stops in time is not kicked, unless the host is busy.
        let (mut turn, mut turns, mut used) = (limit, 0, Duration::ZERO);
        let outcome = loop {
            let before = thread_time();
            match with_limit(vcpu.kicker(), turn, || vcpu.run()) {
                Ok(Stop::Exit(exit)) => break Outcome::Exit(exit),
                Err(_) => break Outcome::Refused,
                Ok(Stop::Kicked) => turns += 1,
            }
            used += (thread_time() - before).min(share);
            if used >= limit || (turns >= TURNS && wall.elapsed() > WALL_LIMIT) {
                break Outcome::Endless;
            }
            turn = share;
        };
        let took = thread_time() - begin;
        Seen {
            outcome,
            regs: *vcpu.regs(),
            cpl: vcpu.sregs().cs.dpl,
            took,
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

/// Processor time of this thread so far, that of its guests included.
pub(super) fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes one timespec.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "every thread has a clock of its processor time");
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_guest_is_stopped_and_the_next_probe_is_not_disturbed() {
        if !harness::privileges::kvm("endless_guest_is_stopped_and_the_next_probe_is_not_disturbed")
        {
            return;
        }
        let mut lab = Lab::new().unwrap();
        for ring in [Ring::Kernel, Ring::User] {
            let seen = lab.run_code(&[0xeb, 0xfe], ring).unwrap(); // jmp to itself
            assert_eq!(seen.outcome, Outcome::Endless);
            assert!(seen.took >= PROBE_LIMIT, "{seen:?}");
            let seen = lab.run_code(&[0xe6, 0x10], ring).unwrap(); // out 0x10, al
            assert!(seen.wrote_to(0x10), "{seen:?}");
        }
    }

    #[test]
    fn triple_fault_does_not_end_the_lab() {
        if !harness::privileges::kvm("triple_fault_does_not_end_the_lab") {
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
