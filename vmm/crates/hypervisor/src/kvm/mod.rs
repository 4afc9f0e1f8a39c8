//! The machine on KVM: no in-kernel interrupt controller or timer, registers through
//! `KVM_SYNC_REGS`, memory in plain slots.

mod notice;
mod run_area;
mod saved;
mod stats;
mod tsc;
mod unemulated;
mod vcpu;
mod vm;

pub use vcpu::KvmVcpu;
pub use vm::{KvmVm, WeakKvmVm, open, supported_cpuid};
