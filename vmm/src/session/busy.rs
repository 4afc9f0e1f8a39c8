//! Notes when the session's thread was held up: heartbeats and all else wait for it meanwhile.

use std::time::{Duration, Instant};

use ft::Action;

/// What takes the session's thread longer than this is worth a warning.
const SLOW: Duration = Duration::from_millis(100);

/// What the session's thread did for longer than [`SLOW`] kept heartbeats and all else waiting.
pub(super) fn warn_if_slow(what: &'static str, began: Instant) {
    let took = began.elapsed();
    if took >= SLOW {
        tracing::warn!(what, ms = took.as_millis() as u64, "the session was busy");
    }
}

/// An action, for people.
pub(super) fn kind(action: &Action) -> &'static str {
    match action {
        Action::Watch { .. } => "watch the peer",
        Action::Unwatch => "unwatch the peer",
        Action::StartTransfer { .. } => "start a state transfer",
        Action::EndSession(_) => "end a session",
        Action::LoadState { .. } => "take a state",
        Action::CloseSession(_) => "close a session",
        Action::ProbeWorld => "look at disk and TAP",
        Action::GoLive(_) => "go live",
        Action::Discard(_) => "discard",
        Action::Send { .. } => "send a message",
        _ => "an action",
    }
}
