//! Small traits for a virtual machine and its vCPU, KVM behind them, and a scripted fake.
//!
//! What always holds: a vCPU stops either at a numbered synchronous [`Exit`] or, forced by its
//! [`Kicker`], at a point without a number ([`Stop::Kicked`]); nothing else is visible of how
//! KVM runs it. Interrupt controllers, timers and every other device live outside.
//!
//! What this crate does not do: it counts no exits, knows no log and no device, and names no
//! hypervisor: what a host can and cannot do is found out by probes.

pub mod bare;
pub mod cpuid;
pub mod digest;
mod dirty;
mod error;
mod exit;
pub mod fake;
mod kick;
pub mod kvm;
pub mod probe;
mod ram;
mod state;
mod vcpu;
mod vm;

pub use cpuid::{CpuidLeaf, CpuidPolicy, CpuidTable};
pub use dirty::{DirtyBitmap, Gfn, PAGE_SIZE};
pub use error::{Error, RunError};
pub use exit::{Exit, Stop};
pub use kick::Kicker;
pub use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
pub use ram::{
    GuestRam, HIGH_RAM_START, MAX_RAM_BYTES, MIN_RAM_BYTES, MMIO_HOLE_START, Page, RamError,
    RamMemory, RamRegion,
};
pub use state::{Msr, VcpuState, XSAVE_BYTES};
pub use vcpu::{Unemulated, Vcpu};
pub use vm::Vm;
