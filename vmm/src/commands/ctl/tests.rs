//! The client against a served fake: what it asks, shows and says.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use clap::Parser;

use super::{Client, ClientError, CtlOptions, act};
use crate::api::tests::fake::{Served, serve};
use crate::api::{Event, Limits, LimitsChange, Refused, Reply, Request, Severity};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: CtlOptions,
}

/// Runs `pollux ctl PATH WORDS`, and returns what it prints.
fn ctl(path: &Path, words: &[&str]) -> Result<String, ClientError> {
    let path = path.to_str().unwrap();
    let line = ["ctl", path].into_iter().chain(words.iter().copied());
    let options = Line::try_parse_from(line)
        .map_err(|e| e.to_string())
        .unwrap()
        .options;
    let client = Client::new(&options.socket, options.limit()).unwrap();
    let mut out = Vec::new();
    act(&client, options.action, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

fn asked(api: &Served) -> Request {
    api.fake.asked.lock().unwrap().pop().unwrap()
}

#[test]
fn every_action_is_its_request() {
    let api = serve();
    let change = LimitsChange {
        lag_ms: Some(50),
        batch_us: Some(0),
        ..LimitsChange::default()
    };
    let here = std::env::current_dir().unwrap();
    for (words, request) in [
        (&["protect"][..], Request::Protect),
        (&["unprotect"], Request::Unprotect),
        (&["switch-over"], Request::SwitchOver),
        (&["fail"], Request::Fail),
        (&["pause"], Request::Pause),
        (&["resume"], Request::Resume),
        (&["power-off"], Request::PowerOff),
        (&["reset"], Request::Reset),
        (&["snapshot", "/srv/s"], Request::Snapshot("/srv/s".into())),
        (&["snapshot", "s"], Request::Snapshot(here.join("s"))),
        (
            &["host-gone", "castor"],
            Request::HostGone("castor".parse().unwrap()),
        ),
        (&["force-start", "7"], Request::ForceStart(format::Epoch(7))),
    ] {
        let said = ctl(&api.path, words).unwrap();
        assert_eq!(asked(&api), request);
        assert_eq!(said, format!("{request:?}\n"));
    }
    let reply = Reply {
        limits: Some(Limits::default()),
        ..Reply::new("changed")
    };
    api.fake.answers.lock().unwrap().push(Ok(reply));
    let said = ctl(&api.path, &["limits", "--lag-ms=50", "--batch-us=0"]).unwrap();
    assert_eq!(asked(&api), Request::Limits(change));
    assert!(said.contains("--held-outputs"), "{said}");
}

#[test]
fn status_is_a_table_or_json() {
    let api = serve();
    api.fake.report.lock().unwrap().epoch = Some(7);
    assert!(
        ctl(&api.path, &["status"])
            .unwrap()
            .contains("epoch         7\n")
    );
    let json = ctl(&api.path, &["status", "--json"]).unwrap();
    let report = serde_json::from_str(&json).unwrap();
    assert_eq!(*api.fake.report.lock().unwrap(), report);
    assert!(
        ctl(&api.path, &["metrics"])
            .unwrap()
            .contains("pollux_epoch 7")
    );
}

#[test]
fn events_are_lines_for_people_or_json() {
    let api = serve();
    let long = "x".repeat(100_000);
    api.fake
        .log
        .record(Event::new(Severity::Warning, "alone", "no backup"));
    api.fake
        .log
        .record(Event::new(Severity::Info, "long", long.as_str()));
    let shown = ctl(&api.path, &["events", "--recent"]).unwrap();
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].contains("WARNING alone") && lines[0].ends_with("no backup"));
    assert!(lines[1].ends_with(&long));
    let json = ctl(&api.path, &["events", "--recent", "--json"]).unwrap();
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(first["kind"], "alone");
}

#[test]
fn events_are_told_as_they_happen_until_the_process_ends() {
    let api = serve();
    let client = Client::new(&api.path, Duration::from_secs(30)).unwrap();
    api.fake
        .log
        .record(Event::new(Severity::Info, "first", "before"));
    let (fake, mut server) = (api.fake, Some(api.server));
    let mut kinds = Vec::new();
    let result = client.lines("/v1/events", |line| {
        let event: serde_json::Value = serde_json::from_slice(line)?;
        kinds.push(event["kind"].as_str().unwrap().to_owned());
        match kinds.len() {
            1 => fake
                .log
                .record(Event::new(Severity::Info, "second", "after")),
            _ => drop(server.take()),
        }
        Ok(true)
    });
    result.unwrap();
    assert_eq!(kinds, ["first", "second"]);
}

#[test]
fn a_refusal_is_an_error_with_its_remedy() {
    let api = serve();
    let refused = Refused::conflict("there is no backup to switch to", "protect the VM first");
    api.fake.answers.lock().unwrap().push(Err(refused));
    let error = ctl(&api.path, &["switch-over"]).unwrap_err().to_string();
    assert!(
        error.contains("no backup") && error.contains("protect the VM first"),
        "{error}"
    );
}

#[test]
fn a_socket_that_is_not_there_or_dead_or_strange_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let error = ctl(&path, &["status"]).unwrap_err();
    assert!(matches!(error, ClientError::NoSocket(_)), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let strange = std::thread::spawn(move || {
        for answer in [
            "SSH-2.0-x\r\n",
            "HTTP/1.1 418 X\r\ncontent-length: 2\r\n\r\nhi",
        ] {
            let (mut stream, _) = listener.accept().unwrap();
            io::Write::write_all(&mut stream, answer.as_bytes()).unwrap();
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    });
    for _ in 0..2 {
        let error = ctl(&path, &["status"]).unwrap_err();
        assert!(matches!(error, ClientError::Strange { .. }), "{error}");
    }
    strange.join().unwrap();
    let error = ctl(&path, &["status"]).unwrap_err();
    assert!(matches!(error, ClientError::Dead(_)), "{error}");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    assert!(ctl(&path, &["status"]).is_err());
}

#[test]
fn a_process_that_does_not_answer_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let _listener = UnixListener::bind(&path).unwrap();
    let error = ctl(&path, &["--timeout=1", "status"]).unwrap_err();
    assert!(error.to_string().contains("in 1 s"), "{error}");
}
