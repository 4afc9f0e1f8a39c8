//! The routes: what a request must look like, and what is asked of the session for it.
//!
//! Every call of [`Control`] runs on a thread for blocking work, so that a slow session does not hold
//! up those who only want to look. At most [`MAX_COMMANDS`] commands are under way.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, put};
use axum::{Json, Router};
use format::Epoch;
use ft::HostId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use super::answer::{Failure, text};
use super::control::{Control, Refused, Request};
use super::stream;

/// The longest body of a request, in bytes.
pub const MAX_BODY_LEN: usize = 64 << 10;
/// The most commands under way.
pub const MAX_COMMANDS: usize = 4;

const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");

/// Routes that are read with GET.
pub(super) const READ: [&str; 4] = [
    "/v1/status",
    "/v1/events",
    "/v1/metrics",
    "/v1/openapi.yaml",
];
/// Commands without a body, with PUT.
pub(super) const PLAIN: [(&str, Request); 8] = [
    ("/v1/protect", Request::Protect),
    ("/v1/unprotect", Request::Unprotect),
    ("/v1/switch-over", Request::SwitchOver),
    ("/v1/fail", Request::Fail),
    ("/v1/pause", Request::Pause),
    ("/v1/resume", Request::Resume),
    ("/v1/power-off", Request::PowerOff),
    ("/v1/reset", Request::Reset),
];
/// Commands with a body, with PUT.
pub(super) const WITH_BODY: [&str; 4] = [
    "/v1/snapshot",
    "/v1/limits",
    "/v1/host-gone",
    "/v1/force-start",
];

/// What the handlers share.
#[derive(Clone)]
struct Api {
    control: Arc<dyn Control>,
    commands: Arc<Semaphore>,
    /// True once the server ends.
    ending: watch::Receiver<bool>,
}

/// Where to write a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotBody {
    /// An absolute path, on the VM's host.
    pub dir: PathBuf,
}

/// Which host is gone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostGoneBody {
    /// Its name.
    pub host: HostId,
}

/// Which epoch is over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForceStartBody {
    /// The epoch of the record that blocks the start.
    pub epoch: Epoch,
}

/// What a listener wants.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    /// Begin with what happened lately.
    #[serde(default = "yes")]
    recent: bool,
    /// Go on with what happens.
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// The body of a command that needs none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

type Answer = Result<Response, Failure>;
type Body = Result<Bytes, BytesRejection>;

/// All routes.
pub(super) fn router(control: Arc<dyn Control>, ending: watch::Receiver<bool>) -> Router {
    let [status_path, events_path, metrics_path, openapi_path] = READ;
    let [snapshot_path, limits_path, host_gone_path, force_start_path] = WITH_BODY;
    let mut router = Router::new()
        .route(status_path, get(status))
        .route(events_path, get(events))
        .route(metrics_path, get(metrics))
        .route(openapi_path, get(openapi))
        .route(snapshot_path, command(snapshot))
        .route(limits_path, command(|change| Ok(Request::Limits(change))))
        .route(
            host_gone_path,
            command(|body: HostGoneBody| Ok(Request::HostGone(body.host))),
        )
        .route(
            force_start_path,
            command(|body: ForceStartBody| Ok(Request::ForceStart(body.epoch))),
        );
    for (path, request) in PLAIN {
        router = router.route(path, command(move |Nothing {}| Ok(request.clone())));
    }
    router
        .fallback(no_such_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_LEN))
        .with_state(Api {
            control,
            commands: Arc::new(Semaphore::new(MAX_COMMANDS)),
            ending,
        })
}

impl Api {
    /// Calls the session where it may block.
    async fn call<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn Control) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let control = Arc::clone(&self.control);
        tokio::task::spawn_blocking(move || ask(&*control))
            .await
            .map_err(|error| {
                tracing::error!(%error, "a request broke off");
                Failure::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the request broke off: a mistake in Pollux",
                    "look into the log of this process, and report it",
                )
            })
    }

    async fn command(self, request: Request) -> Answer {
        let Ok(_permit) = self.commands.try_acquire() else {
            return Err(Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{MAX_COMMANDS} commands are under way"),
                "wait for them, then try again",
            ));
        };
        tracing::info!(?request, "command");
        let reply = self.call(move |control| control.command(request)).await??;
        Ok(Json(reply).into_response())
    }
}

async fn status(State(api): State<Api>) -> Answer {
    let status = api.call(|control| control.status()).await?;
    Ok(Json(status).into_response())
}

async fn metrics(State(api): State<Api>) -> Answer {
    let metrics = api.call(|control| control.metrics()).await?;
    Ok(text("text/plain; version=0.0.4", metrics))
}

async fn openapi() -> Response {
    text("application/yaml", OPENAPI)
}

async fn events(
    State(api): State<Api>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|rejection| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            rejection.body_text(),
            "the parameters are recent and follow, each true or false",
        )
    })?;
    let subscription = api.call(|control| control.subscribe()).await?;
    let recent = if query.recent {
        subscription.recent
    } else {
        Vec::new()
    };
    let next = query.follow.then_some((subscription.next, api.ending));
    Ok(stream::answer(recent, next))
}

/// A route that takes a command: its body becomes a request, and is asked of the session.
fn command<B: DeserializeOwned + 'static>(
    request: impl Fn(B) -> Result<Request, Refused> + Clone + Send + Sync + 'static,
) -> MethodRouter<Api> {
    put(async move |State(api): State<Api>, body: Body| -> Answer {
        let request = request(parse(body)?)?;
        api.command(request).await
    })
}

fn snapshot(body: SnapshotBody) -> Result<Request, Refused> {
    if body.dir.is_absolute() {
        return Ok(Request::Snapshot(body.dir));
    }
    Err(Refused::invalid(
        format!("{} is no absolute path", body.dir.display()),
        "the VM's process has a working directory of its own: give the whole path",
    ))
}

/// Reads a body of JSON; no body at all is an empty object.
fn parse<B: DeserializeOwned>(body: Body) -> Result<B, Failure> {
    let body = body.map_err(|rejection| {
        Failure::new(
            rejection.status(),
            rejection.body_text(),
            format!("send at most {MAX_BODY_LEN} bytes"),
        )
    })?;
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(body).map_err(|error| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not what this route takes: {error}"),
            "GET /v1/openapi.yaml says what it takes",
        )
    })
}

async fn no_such_route(uri: Uri) -> Failure {
    let plain = PLAIN.iter().map(|(path, _)| *path);
    let puts: Vec<_> = plain.chain(WITH_BODY).collect();
    Failure::new(
        StatusCode::NOT_FOUND,
        format!("there is no {}", uri.path()),
        format!("GET {}; PUT {}", READ.join(", "), puts.join(", ")),
    )
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let path = uri.path();
    let right = if READ.contains(&path) { "GET" } else { "PUT" };
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{method} is not for {path}"),
        format!("use {right} {path}"),
    )
}
