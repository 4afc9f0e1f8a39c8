//! The client of the API: one request to a connection, over the Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::api::ErrorBody;

/// The longest answer that is read, in bytes.
const MAX_ANSWER_LEN: usize = 16 << 20;
/// The longest line of a stream of events, in bytes.
const MAX_LINE_LEN: usize = 1 << 20;

/// Why there is no answer, or a bad one.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No such file.
    #[error(
        "there is no socket {0}: is the VM running, and was it started with --api {0}? Its process \
         removes the socket when it ends"
    )]
    NoSocket(PathBuf),
    /// A file, but nobody behind it.
    #[error("nobody serves {0}: the process that made the socket is gone; start it again")]
    Dead(PathBuf),
    /// Somebody else's.
    #[error("{0} belongs to another user: run this as the user that runs the VM")]
    Forbidden(PathBuf),
    /// Any other trouble with it.
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No answer in time.
    #[error("no answer from {path} in {seconds} s: its process may be stopped or overloaded")]
    TimedOut {
        /// From where.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// Whatever serves the socket.
    #[error("{path} does not talk like Pollux: {why}")]
    Strange {
        /// Where.
        path: PathBuf,
        /// What it does.
        why: String,
    },
    /// The answer is no.
    #[error("{error}\n  what to do: {remedy}")]
    Refused {
        /// Why.
        error: String,
        /// What to do about it.
        remedy: String,
    },
    /// What came cannot be passed on.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

/// A client of one API.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    limit: Duration,
    runtime: Runtime,
}

impl Client {
    /// A client of the API at `path`, which waits for answers as long as `limit`.
    ///
    /// # Errors
    /// The event loop cannot be had.
    pub fn new(path: &Path, limit: Duration) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            limit,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
        })
    }

    /// Sends a request and returns the body of its answer.
    ///
    /// # Errors
    /// There is none, or it is a refusal.
    pub fn call(&self, method: Method, route: &str, body: Vec<u8>) -> Result<Bytes, ClientError> {
        self.runtime.block_on(async {
            let response = self.send(method, route, body).await?;
            self.in_time(self.body(response)).await
        })
    }

    /// Gets `route` and hands each line of the answer to `each`, until there are no more or `each` has
    /// had enough.
    ///
    /// # Errors
    /// There is no answer, it is a refusal, or `each` fails.
    pub fn lines(
        &self,
        route: &str,
        mut each: impl FnMut(&[u8]) -> io::Result<bool>,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let mut body = self.send(Method::GET, route, Vec::new()).await?.into_body();
            let mut pending = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| self.strange(error))?;
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                pending.extend_from_slice(&data);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    if !each(&pending[..end])? {
                        return Ok(());
                    }
                    pending.drain(..=end);
                }
                if pending.len() > MAX_LINE_LEN {
                    return Err(self.strange(format!("a line of more than {MAX_LINE_LEN} bytes")));
                }
            }
            Ok(())
        })
    }

    /// Sends a request; an answer that is no success becomes an error.
    async fn send(
        &self,
        method: Method,
        route: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let response = self.in_time(self.exchange(method, route, body)).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.in_time(self.body(response)).await?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error, remedy }) => Err(ClientError::Refused { error, remedy }),
            Err(_) => Err(self.strange(unreadable(status, &body))),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        route: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| self.unconnected(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.strange(error))?;
        // It ends with its connection; what goes wrong there shows in the answer.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(route)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("routes and headers are well-formed");
        sender
            .send_request(request)
            .await
            .map_err(|error| self.strange(error))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), MAX_ANSWER_LEN);
        let body = body.collect().await.map_err(|error| self.strange(error))?;
        Ok(body.to_bytes())
    }

    async fn in_time<T>(
        &self,
        what: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::time::timeout(self.limit, what)
            .await
            .unwrap_or_else(|_| {
                Err(ClientError::TimedOut {
                    path: self.path.clone(),
                    seconds: self.limit.as_secs(),
                })
            })
    }

    fn unconnected(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path),
            io::ErrorKind::ConnectionRefused => ClientError::Dead(path),
            io::ErrorKind::PermissionDenied => ClientError::Forbidden(path),
            _ => ClientError::Connect { path, source },
        }
    }

    /// Whatever serves the socket does not do what an API does.
    pub(super) fn strange(&self, why: impl ToString) -> ClientError {
        ClientError::Strange {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
}

fn unreadable(status: StatusCode, body: &[u8]) -> String {
    let start: String = String::from_utf8_lossy(body).chars().take(80).collect();
    format!("it answers {status} {start:?}")
}
