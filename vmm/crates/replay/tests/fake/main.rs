//! The recorder and the replayer on a guest without KVM: what is recorded replays alike, and what does not
//! replay alike is reported.

mod deltas;
mod divergence;
mod machine;
mod record;
mod rig;
mod saved;
