//! Events as a body that does not end: one JSON object a line (NDJSON), as they happen.
//!
//! A listener that reads too slowly misses events; a line of kind `missed` says how many, and the
//! numbers of the events show which. The stream ends when the server does.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::events::{Event, EventRecord, Severity, unix_ms};

/// Lines on their way to one listener.
const LINES: usize = 16;

type Next = (broadcast::Receiver<EventRecord>, watch::Receiver<bool>);

/// The answer: `recent`, then what `next` brings.
pub(super) fn answer(recent: Vec<EventRecord>, next: Option<Next>) -> Response {
    let (lines, body) = mpsc::channel(LINES);
    tokio::spawn(write(recent, next, lines));
    let body = ReceiverStream::new(body).map(Ok::<_, Infallible>);
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(body),
    )
        .into_response()
}

/// Writes lines until the listener, the events or the server end.
async fn write(recent: Vec<EventRecord>, next: Option<Next>, lines: mpsc::Sender<Bytes>) {
    let mut number = 0;
    for event in &recent {
        number = event.number;
        if lines.send(line(event)).await.is_err() {
            return;
        }
    }
    let Some((mut events, mut ending)) = next else {
        return;
    };
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = ending.wait_for(|ending| *ending) => return,
            () = lines.closed() => return,
        };
        let event = match event {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => missed(number, count),
            Err(RecvError::Closed) => return,
        };
        number = event.number;
        if lines.send(line(&event)).await.is_err() {
            return;
        }
    }
}

fn line(event: &EventRecord) -> Bytes {
    let mut line = serde_json::to_vec(event).expect("an event has only strings for keys");
    line.push(b'\n');
    line.into()
}

/// What stands in the place of `count` events after number `after`.
fn missed(after: u64, count: u64) -> EventRecord {
    let message = format!("{count} events were missed: this listener is too slow");
    let event = Event::new(Severity::Warning, "missed", message).with("count", count);
    EventRecord {
        number: after + count,
        at_unix_ms: unix_ms(),
        severity: event.severity,
        kind: event.kind.to_owned(),
        message: event.message,
        details: event.details,
    }
}
