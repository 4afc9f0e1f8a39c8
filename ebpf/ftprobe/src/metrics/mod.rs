//! Metrics in the text format of OpenMetrics, which Prometheus reads: of the probes, of the logging channel
//! and of the VMM together, over HTTP on a Unix socket or a loopback port.
//!
//! Everything is read when it is asked for. Where the channel's daemon or the VMM does not answer, its
//! metrics are left out and `pollux_up` says so.

mod channel;
mod collect;
mod http;
mod vmm;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::state::State;
use collect::{ChannelMetrics, ProbeMetrics, Up};

pub use http::{Endpoint, Server};

/// Where the metrics of the others are asked for.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Operator's socket of the channel's daemon (`vhost-ftlog --admin`).
    pub channel: Option<PathBuf>,
    /// API socket of the VMM.
    pub vmm: Option<PathBuf>,
}

/// Serves metrics until it is dropped.
///
/// # Errors
/// The endpoint cannot be listened at.
pub fn serve(endpoint: &Endpoint, state: Arc<State>, sources: Sources) -> io::Result<Server> {
    Server::start(endpoint, move || text(&state, &sources))
}

/// All metrics as they are now.
pub fn text(state: &State, sources: &Sources) -> String {
    let channel = sources.channel.as_deref().map(channel::ask);
    let vmm = sources.vmm.as_deref().map(vmm::ask);
    let mut registry = Registry::default();
    let mut up = vec![("ftprobe", true)];
    registry.register_collector(Box::new(ProbeMetrics::of(state)));
    if let Some(answer) = channel {
        up.push(("channel", answer.is_ok()));
        match answer {
            Ok(answer) => registry.register_collector(Box::new(ChannelMetrics(answer))),
            Err(error) => tracing::debug!(%error, "no metrics of the channel"),
        }
    }
    let mut others = String::new();
    if let Some(answer) = vmm {
        up.push(("vmm", answer.is_ok()));
        match answer {
            Ok(answer) => others = answer,
            Err(error) => tracing::debug!(%error, "no metrics of the VMM"),
        }
    }
    registry.register_collector(Box::new(Up(up)));
    let mut own = String::new();
    encode(&mut own, &registry).expect("a string takes everything");
    joined(&own, &others)
}

/// Two expositions as one: the end mark comes once, at the end.
fn joined(own: &str, others: &str) -> String {
    const END: &str = "# EOF\n";
    let own = own.strip_suffix(END).unwrap_or(own);
    format!("{own}{others}{END}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_mark_comes_once_and_last() {
        assert_eq!(joined("a 1\n# EOF\n", "b 2\n"), "a 1\nb 2\n# EOF\n");
        assert_eq!(joined("", ""), "# EOF\n");
    }
}
