//! Heartbeats from userspace: the prober that a VMM runs, the responder for hosts without eBPF, and
//! the client of the probe daemon `ftprobe`.
//!
//! Three things are told apart: the peer's kernel lives (it answers), its VMM lives (no mark of its
//! exit), its VMM moves (its progress counter does). And a fourth: this host's prober ran. Time in
//! which it did not run is never counted as silence of the peer.
//!
//! ```no_run
//! # use heartbeat::{Client, Prober, ProberConfig, ProberThread};
//! # use ebpf_events::{KeyGeneration, SessionKeys};
//! # fn protect(
//! #     session: u64, epoch: u64, generation: KeyGeneration, keys: SessionKeys,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let mut probes = Client::connect("/run/pollux/ftprobe.sock".as_ref())?;
//! let pages = probes.join_vmm(session, epoch)?;
//! probes.set_keys(session, generation, &keys)?;
//! let prober = Prober::new(
//!     ProberConfig::new(session, epoch, generation, keys.ours, "10.0.0.2:7879".parse()?),
//!     pages.vmm.clone(),
//!     Some(pages.seen),
//! )?;
//! let beats = ProberThread::spawn(prober, |observation| println!("{observation:?}"))?;
//! pages.vmm.progress.fetch_add(1, std::sync::atomic::Ordering::Release); // in the event loop
//! # Ok(()) }
//! ```

pub mod client;
pub mod clock;
pub mod observation;
pub mod page;
pub mod priority;
pub mod prober;
pub mod protocol;
pub mod responder;
pub mod seqpacket;
pub mod socket;
mod thread;

pub use client::{Client, ClientError, VmmPages};
pub use observation::{Observation, PeerState};
pub use page::{Page, SeenReader};
pub use prober::{Prober, ProberConfig, ProberError};
pub use responder::{Responder, ResponderError};
pub use thread::ProberThread;
