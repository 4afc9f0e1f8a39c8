//! docs/openapi.yaml says what the code does: routes, methods, and the fields of every body.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Value, json};

use super::super::limits::AckAt;
use super::super::routes::{PLAIN, READ, WITH_BODY};
use super::super::{
    ErrorBody, Event, EventLog, Failover, ForceStartBody, Heartbeats, HostGoneBody, Lag, Limits,
    LimitsChange, Output, Pacing, Part, Quantiles, Reply, Role, Severity, SnapshotBody,
    StandbyReport, StatusReport, Transfer,
};

const DOCUMENT: &str = include_str!("../../../../docs/openapi.yaml");

/// The mappings of the document by their path, and what stands behind the colon. Enough of YAML for
/// a document of block mappings; lists in brackets stay text.
fn mappings() -> BTreeMap<Vec<String>, String> {
    let mut path: Vec<(usize, String)> = Vec::new();
    let mut found = BTreeMap::new();
    let mut text_below = None;
    for line in DOCUMENT.lines() {
        let indent = line.len() - line.trim_start().len();
        if line.trim().is_empty() || text_below.is_some_and(|above| indent > above) {
            continue;
        }
        text_below = None;
        let content = line.trim_start().trim_start_matches("- ");
        let Some((key, value)) = content.split_once(':') else {
            panic!("not a mapping: {line:?}");
        };
        let (key, value) = (key.trim_matches('"'), value.trim());
        if value == "|" {
            text_below = Some(indent);
        }
        let depth = indent + (line.trim_start().len() - content.len());
        path.retain(|(at, _)| *at < depth);
        path.push((depth, key.to_owned()));
        let keys = path.iter().map(|(_, key)| key.clone()).collect();
        found.insert(keys, value.trim_matches('"').to_owned());
    }
    found
}

/// The keys right below a path.
fn keys(of: &[&str]) -> BTreeSet<String> {
    mappings()
        .into_keys()
        .filter(|path| path.len() == of.len() + 1 && path.iter().zip(of).all(|(a, b)| a == b))
        .map(|path| path[of.len()].clone())
        .collect()
}

fn at(path: &[&str]) -> String {
    let path: Vec<String> = path.iter().map(|key| (*key).to_owned()).collect();
    let found = mappings().remove(&path);
    found.unwrap_or_else(|| panic!("{path:?} is not there"))
}

/// The words of a list in brackets.
fn list(text: &str) -> BTreeSet<String> {
    let inner = text.trim_start_matches('[').trim_end_matches(']');
    inner
        .split(',')
        .map(|word| word.trim().to_owned())
        .collect()
}

#[test]
fn the_document_has_the_routes_of_the_code_with_their_methods() {
    let reads = READ.map(|route| (route, "get"));
    let plain = PLAIN.map(|(route, _)| (route, "put"));
    let bodies = WITH_BODY.map(|route| (route, "put"));
    let routes: BTreeMap<_, _> = reads.into_iter().chain(plain).chain(bodies).collect();
    let documented = keys(&["paths"]);
    assert_eq!(
        documented,
        routes.keys().map(|route| (*route).to_owned()).collect()
    );
    for (route, method) in routes {
        assert_eq!(keys(&["paths", route]), BTreeSet::from([method.to_owned()]));
        let body = keys(&["paths", route, method]).contains("requestBody");
        assert_eq!(body, WITH_BODY.contains(&route), "{route}");
    }
}

/// A value of every body, with every field there.
fn samples() -> Vec<(&'static str, Value)> {
    fn sample<T: Serialize>(name: &'static str, value: T) -> (&'static str, Value) {
        (name, serde_json::to_value(value).unwrap())
    }
    let host = "castor".parse().unwrap();
    let log = EventLog::default();
    log.record(Event::new(Severity::Info, "test", "message").with("a", 1));
    let event = log.subscribe().recent.remove(0);
    let limits = Limits::default();
    let change: LimitsChange =
        serde_json::from_value(serde_json::to_value(limits).unwrap()).unwrap();
    vec![
        sample("StatusReport", StatusReport::default()),
        sample("Lag", Lag::default()),
        sample("Heartbeats", Heartbeats::default()),
        sample("Pacing", Pacing::default()),
        sample("Output", Output::default()),
        sample("Quantiles", Quantiles { p50: 1.0, p99: 2.0 }),
        sample(
            "StandbyReport",
            StandbyReport {
                host,
                address: String::new(),
                state: String::new(),
            },
        ),
        sample(
            "Failover",
            Failover {
                cause: String::new(),
                at_unix_ms: 0,
                total_ms: 0.0,
                timeline: Vec::new(),
            },
        ),
        sample(
            "Part",
            Part {
                name: String::new(),
                ms: 0.0,
            },
        ),
        sample(
            "Transfer",
            Transfer {
                peer: None,
                bytes: 0,
                stop_ms: 0.0,
                total_ms: 0.0,
            },
        ),
        sample("Limits", limits),
        sample("LimitsChange", change),
        sample(
            "Reply",
            Reply {
                limits: Some(limits),
                ..Reply::new("")
            },
        ),
        sample(
            "ErrorBody",
            ErrorBody {
                error: String::new(),
                remedy: String::new(),
            },
        ),
        sample("EventRecord", event),
        sample("SnapshotBody", SnapshotBody { dir: "/".into() }),
        sample("HostGoneBody", HostGoneBody { host }),
        sample(
            "ForceStartBody",
            ForceStartBody {
                epoch: format::Epoch(1),
            },
        ),
    ]
}

#[test]
fn the_document_has_the_fields_of_every_body() {
    let mut schemas = keys(&["components", "schemas"]);
    for (name, value) in samples() {
        let schema = ["components", "schemas", name];
        let properties = keys(&[&schema[..], &["properties"]].concat());
        let fields: BTreeSet<_> = value.as_object().unwrap().keys().cloned().collect();
        assert_eq!(properties, fields, "{name}");
        if keys(&schema).contains("required") {
            let required = list(&at(&[&schema[..], &["required"]].concat()));
            assert!(required.is_subset(&properties), "{name}");
        }
        schemas.remove(name);
    }
    for (name, words) in [
        (
            "Role",
            json!([
                Role::Booting,
                Role::Primary,
                Role::Backup,
                Role::Leaving,
                Role::Ended
            ]),
        ),
        (
            "Severity",
            json!([Severity::Info, Severity::Warning, Severity::Error]),
        ),
        ("AckAt", json!([AckAt::Received, AckAt::Replayed])),
    ] {
        let words = words.as_array().unwrap().iter();
        let words: BTreeSet<_> = words
            .map(|word| word.as_str().unwrap().to_owned())
            .collect();
        assert_eq!(list(&at(&["components", "schemas", name, "enum"])), words);
        schemas.remove(name);
    }
    assert_eq!(schemas, BTreeSet::from(["HostName".to_owned()]));
}

#[test]
fn every_reference_leads_somewhere() {
    let mappings = mappings();
    let mut references = 0;
    for (path, value) in &mappings {
        if path.last().is_some_and(|key| key == "$ref") {
            let target = value
                .strip_prefix("#/")
                .expect("a reference within the document");
            let target: Vec<String> = target.split('/').map(str::to_owned).collect();
            assert!(mappings.contains_key(&target), "{value}");
            references += 1;
        }
    }
    assert!(references > 30, "{references}");
}
