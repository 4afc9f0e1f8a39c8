//! The daemon: threads around the data thread.
//!
//! [`run`](run::run) puts it together. The data thread ([`engine`]) owns rings, connection and shared
//! memory; everything slow or hostile (vhost-user messages, handshakes, operators) is handled on other
//! threads and reaches it as commands.

pub mod admin;
pub mod bulk;
pub mod control;
pub mod engine;
pub mod life;
pub mod memory;
pub mod options;
pub mod peer;
pub mod probes;
pub mod run;
pub mod tcp;
