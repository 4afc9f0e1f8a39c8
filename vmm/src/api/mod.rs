//! The API: HTTP over a Unix socket, for operators and their tools. docs/openapi.yaml describes it,
//! and is served with it.
//!
//! ```text
//!  client ── Unix socket (0600) ──► thread "api": HTTP, JSON ── Control ──► the session
//!                                        ▲ NDJSON ── EventLog ◄── events ──────┘
//! ```
//! What always holds: whoever may connect may do everything, and only the socket's owner may connect;
//! the API's thread never waits for the session, nor the session for a client; everything that comes
//! in has a limit, and every answer that is not a success says what is wrong and what to do.
//!
//! It does not serve TCP: who wants that puts a proxy with authentication before it.

mod answer;
mod connections;
mod control;
mod events;
mod limits;
mod notice;
mod routes;
mod socket;
mod status;
mod stream;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;

pub use answer::ErrorBody;
pub use control::{Control, Refused, Reply, Request, Subscription};
pub use events::{Event, EventLog, EventRecord, Severity, unix_ms};
pub use limits::{Limits, LimitsChange};
pub use notice::{cause as cause_text, event as notice_event};
pub use routes::{ForceStartBody, HostGoneBody, MAX_COMMANDS, SnapshotBody};
pub use socket::SocketError;
#[cfg(test)]
pub use status::Role;
pub use status::{
    Failover, Heartbeats, Lag, Output, Pacing, Part, Quantiles, StandbyReport, StatusReport,
    Transfer,
};

use connections::Connections;
use socket::Socket;

/// How long requests under way are waited for when the server ends.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Threads for calls of the session: commands, and as many that only look.
const BLOCKING_THREADS: usize = 2 * MAX_COMMANDS;

/// Why there is no API.
#[derive(Debug, Error)]
pub enum ApiError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The thread or its event loop.
    #[error("cannot start the API's thread: {0}")]
    Thread(#[from] io::Error),
}

/// A running API. Dropping it ends streams of events, waits at most [`END_LIMIT`] for requests under
/// way, and removes the socket.
#[derive(Debug)]
pub struct Server {
    ending: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    /// Dropped last.
    _socket: Socket,
}

impl Server {
    /// Serves `control` at the Unix socket `path`.
    ///
    /// # Errors
    /// The socket is not to be had, or the thread.
    pub fn start(path: &Path, control: Arc<dyn Control>) -> Result<Self, ApiError> {
        let (socket, listener) = Socket::bind(path)?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("api-call")
            .build()?;
        let listener = {
            let _entered = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (ending, ends) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                let router = routes::router(control, ends.clone());
                runtime.block_on(serve(Connections::new(listener), router, ends));
                runtime.shutdown_background();
            })?;
        Ok(Self {
            ending,
            thread: Some(thread),
            _socket: socket,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(connections: Connections, router: axum::Router, ends: watch::Receiver<bool>) {
    let end = |mut ends: watch::Receiver<bool>| async move {
        let _ = ends.wait_for(|ending| *ending).await;
    };
    let served = axum::serve(connections, router).with_graceful_shutdown(end(ends.clone()));
    let limit = async {
        end(ends).await;
        tokio::time::sleep(END_LIMIT).await;
    };
    tokio::select! {
        result = served => if let Err(error) = result {
            tracing::error!(%error, "the API ended");
        },
        () = limit => tracing::warn!("requests were under way when the API ended"),
    }
}
