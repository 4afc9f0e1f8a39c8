//! `pollux ctl`: an operator's hand on a running VM.
//!
//! Every action is one request to the API. The exit code is 0 only where it was done.

mod client;
mod options;
mod show;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::process::ExitCode;

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use client::{Client, ClientError};
pub use options::{CtlAction, CtlOptions, EventsOptions};

use super::Outcome;
use crate::api::{
    EventRecord, ForceStartBody, HostGoneBody, Reply, SnapshotBody, StatusReport, unix_ms,
};

/// Does one action.
///
/// # Errors
/// It was not done; the message says why.
pub fn ctl(options: CtlOptions) -> Outcome {
    let client = Client::new(&options.socket, options.limit())?;
    let out = &mut io::stdout().lock();
    match act(&client, options.action, out) {
        // Whoever read the output has had enough of it.
        Err(ClientError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    Ok(ExitCode::SUCCESS)
}

fn act(client: &Client, action: CtlAction, out: &mut impl Write) -> Result<(), ClientError> {
    let plain = |route: &str| command(client, route, &serde_json::Map::new());
    let reply = match action {
        CtlAction::Status { json } => return status(client, json, out),
        CtlAction::Events(options) => return events(client, &options, out),
        CtlAction::Metrics => {
            let metrics = client.call(Method::GET, "/v1/metrics", Vec::new())?;
            return Ok(out.write_all(&metrics)?);
        }
        CtlAction::Limits { change, json } => {
            let reply = command(client, "/v1/limits", &change)?;
            let limits = reply
                .limits
                .ok_or_else(|| client.strange("it does not tell its limits"))?;
            if json {
                return Ok(writeln!(out, "{}", client.json(&limits)?)?);
            }
            return Ok(out.write_all(show::limits(&limits).as_bytes())?);
        }
        CtlAction::Protect => plain("/v1/protect"),
        CtlAction::Unprotect => plain("/v1/unprotect"),
        CtlAction::SwitchOver => plain("/v1/switch-over"),
        CtlAction::Fail => plain("/v1/fail"),
        CtlAction::Pause => plain("/v1/pause"),
        CtlAction::Resume => plain("/v1/resume"),
        CtlAction::PowerOff => plain("/v1/power-off"),
        CtlAction::Reset => plain("/v1/reset"),
        CtlAction::Snapshot { dir } => {
            // The VM's process has a working directory of its own.
            let dir = std::path::absolute(dir)?;
            command(client, "/v1/snapshot", &SnapshotBody { dir })
        }
        CtlAction::HostGone { host } => command(client, "/v1/host-gone", &HostGoneBody { host }),
        CtlAction::ForceStart { epoch } => {
            let epoch = format::Epoch(epoch);
            command(client, "/v1/force-start", &ForceStartBody { epoch })
        }
    };
    Ok(writeln!(out, "{}", reply?.message)?)
}

/// Sends a command, and reads what was done.
fn command(client: &Client, route: &str, body: &impl Serialize) -> Result<Reply, ClientError> {
    let body = client.json(body)?.into_bytes();
    client.read(&client.call(Method::PUT, route, body)?)
}

fn status(client: &Client, json: bool, out: &mut impl Write) -> Result<(), ClientError> {
    let body = client.call(Method::GET, "/v1/status", Vec::new())?;
    if json {
        out.write_all(&body)?;
        return Ok(writeln!(out)?);
    }
    let report: StatusReport = client.read(&body)?;
    Ok(out.write_all(show::status(&report, unix_ms()).as_bytes())?)
}

fn events(
    client: &Client,
    options: &EventsOptions,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let route = format!(
        "/v1/events?recent={}&follow={}",
        !options.new, !options.recent
    );
    client.lines(&route, |line| {
        if options.json {
            out.write_all(line)?;
            writeln!(out)?;
        } else {
            let event: EventRecord = serde_json::from_slice(line)?;
            writeln!(out, "{}", show::event(&event))?;
        }
        out.flush()?;
        Ok(true)
    })
}

impl Client {
    fn read<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.strange(error))
    }

    fn json(&self, value: &impl Serialize) -> Result<String, ClientError> {
        // A path that is not UTF-8 cannot be said in JSON.
        serde_json::to_string(value).map_err(|error| ClientError::Output(error.into()))
    }
}
