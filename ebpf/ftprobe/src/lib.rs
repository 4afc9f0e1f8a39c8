//! `ftprobe`: loads the eBPF probes, hands their maps out, exports what they saw.
//!
//! The only process of Pollux that needs rights over eBPF and the network. A VMM and a channel daemon
//! reach it by [`client`]; what it does for them goes on while they are restarted.

pub mod backend;
pub mod causes;
pub mod daemon;
pub mod exits;
pub mod interface;
pub mod kernel;
pub mod listen;
pub mod metrics;
pub mod objects;
pub mod server;
pub mod state;
pub mod stations;
pub mod table;
pub mod traffic;
pub mod userspace;

pub use heartbeat::client;
