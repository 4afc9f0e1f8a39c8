//! Machines without KVM, for tests of what runs on top of [`crate::Vm`] and [`crate::Vcpu`].
//!
//! - [`ScriptedVcpu`] stops where a script says and records what was done to it.
//! - [`ToyVcpu`] executes a tiny instruction set ([`Op`]) out of guest RAM. It is deterministic
//!   between synchronous exits, takes interrupts, writes memory with a dirty log, and can be
//!   kicked between any two instructions: all that record and replay are about.
//!
//! Both follow the rules of [`crate::Vcpu`] strictly: what KVM would forgive now and then (saving
//! with an incomplete access, injecting with interrupts off) is an error here.

mod scripted;
mod toy;
mod toy_vcpu;
mod vm;

pub use scripted::{Done, ScriptedVcpu, Step};
pub use toy::{Op, Reg, assemble};
pub use toy_vcpu::{ToyVcpu, VECTOR_TABLE};
pub use vm::FakeVm;
