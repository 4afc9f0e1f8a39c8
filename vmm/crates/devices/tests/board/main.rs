//! The board from the guest's side: a driver that does what Linux does, and scripts of hostile and random accesses.

mod blk;
mod enumeration;
mod guest;
mod legacy;
mod net;
mod ops;
mod rng;
mod script;
mod scripts;
mod transport;
