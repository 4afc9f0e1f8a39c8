//! A VM of this process: how it is made, what it stands on, and the loop that runs it.
//!
//! The vCPU's thread owns the machine and everything that it touches; other threads reach it through
//! its [`Inbox`] only.

mod backup;
mod boot;
mod channel_log;
mod dirty_log;
mod end;
mod live;
mod outside;
mod pacing;
mod primary;
mod profile;
mod pulse;
mod runner;
mod snapshot;

pub use backup::{Backup, CLOCK_SCHEMA, CLOCK_TAG, FromBackup, Handover};
pub use boot::{Host, boot, cpuid_table, probe_host};
pub use channel_log::{ChannelLog, LogPosition};
pub use end::EndState;
pub use live::{Backends, run_live};
pub use outside::{Live, VcpuSender, inbox};
pub use primary::{FromPrimary, Primary};
pub use profile::{Sampler, Samples};
pub use pulse::{Pulse, PulseState};
pub use runner::{Command, Ended, Runner, RunnerError};
pub use snapshot::{
    META_TAG, STATE_FILE, SnapshotError, SnapshotMeta, load_snapshot, load_state, read_meta,
    restore_snapshot, write_snapshot, write_state,
};

use hypervisor::kvm::{KvmVcpu, KvmVm};

/// A machine on KVM.
pub type KvmMachine = replay::Machine<KvmVm, KvmVcpu>;

/// The host's monotonic clock in ns.
#[must_use]
pub fn host_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The host's wall clock in ns since 1970.
#[must_use]
pub fn wall_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The host's wall clock in s since 1970.
#[must_use]
pub fn wall_clock_s() -> u64 {
    wall_ns() / 1_000_000_000
}
