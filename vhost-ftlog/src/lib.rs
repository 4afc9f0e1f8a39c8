//! The logging channel: a vhost-user backend on io_uring, and its frontend.

pub mod config_space;
pub mod daemon;
pub mod frontend;
pub mod gone;
pub mod handshake;
pub mod notice;
