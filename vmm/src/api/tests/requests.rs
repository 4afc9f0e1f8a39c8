//! What is asked, and what is answered.

use std::sync::Arc;

use super::super::routes::{MAX_BODY_LEN, PLAIN, READ, WITH_BODY};
use super::super::{Limits, LimitsChange, MAX_COMMANDS, Refused, Reply, Request, Server};
use super::fake::serve;
use super::http::{connect, get, put, raw, request};

#[test]
fn the_status_is_what_the_session_says() {
    let api = serve();
    api.fake.report.lock().unwrap().epoch = Some(7);
    let answer = get(&api.path, "/v1/status");
    assert_eq!(answer.status, 200);
    let told = serde_json::from_value(answer.json()).unwrap();
    assert_eq!(*api.fake.report.lock().unwrap(), told);
}

#[test]
fn metrics_and_the_description_have_their_media_types() {
    let api = serve();
    let metrics = get(&api.path, "/v1/metrics");
    assert!(metrics.head.contains("text/plain; version=0.0.4"));
    assert!(metrics.body.contains("pollux_epoch 7"));
    let openapi = get(&api.path, "/v1/openapi.yaml");
    assert!(openapi.head.contains("application/yaml"));
    assert!(openapi.body.starts_with("openapi: 3.1"));
}

#[test]
fn every_command_reaches_the_session_as_it_was_said() {
    let api = serve();
    for (route, request) in PLAIN {
        for body in ["", "{}"] {
            let answer = put(&api.path, route, body);
            assert_eq!(answer.status, 200, "{}", answer.body);
            assert_eq!(answer.json()["message"], format!("{request:?}"));
            assert_eq!(api.fake.asked.lock().unwrap().pop(), Some(request.clone()));
        }
    }
    let change = LimitsChange {
        lag_ms: Some(50),
        ..LimitsChange::default()
    };
    for (route, body, request) in [
        (
            "/v1/snapshot",
            "{\"dir\": \"/srv/snap\"}",
            Request::Snapshot("/srv/snap".into()),
        ),
        ("/v1/limits", "{\"lag_ms\": 50}", Request::Limits(change)),
        ("/v1/limits", "", Request::Limits(LimitsChange::default())),
        (
            "/v1/host-gone",
            "{\"host\": \"castor\"}",
            Request::HostGone("castor".parse().unwrap()),
        ),
        (
            "/v1/force-start",
            "{\"epoch\": 7}",
            Request::ForceStart(format::Epoch(7)),
        ),
    ] {
        let answer = put(&api.path, route, body);
        assert_eq!(answer.status, 200, "{route}: {}", answer.body);
        assert_eq!(api.fake.asked.lock().unwrap().pop(), Some(request));
    }
}

#[test]
fn the_limits_in_force_come_back() {
    let api = serve();
    let reply = Reply {
        limits: Some(Limits::default()),
        ..Reply::new("unchanged")
    };
    api.fake.answers.lock().unwrap().push(Ok(reply));
    let answer = put(&api.path, "/v1/limits", "{}").json();
    assert_eq!(answer["limits"]["lag_ms"], Limits::default().lag_ms);
    assert_eq!(answer["limits"]["ack_at"], "received");
}

#[test]
fn a_refusal_says_why_and_what_to_do() {
    let api = serve();
    for (refused, status) in [
        (Refused::invalid("a", "b"), 400),
        (Refused::conflict("a", "b"), 409),
        (Refused::failed("a", "b"), 500),
        (Refused::busy("a", "b"), 503),
    ] {
        api.fake.answers.lock().unwrap().push(Err(refused));
        let answer = put(&api.path, "/v1/protect", "");
        assert_eq!(answer.status, status);
        let body = answer.json();
        assert_eq!(
            (&body["error"], &body["remedy"]),
            (&"a".into(), &"b".into())
        );
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_the_session_hears_of_it() {
    let api = serve();
    let long = format!("{{\"dir\": \"/{}\"}}", "x".repeat(MAX_BODY_LEN));
    for (method, route, body, status, says) in [
        ("GET", "/v2/status", "", 404, "/v1/protect"),
        ("GET", "/", "", 404, "/v1/status"),
        ("PUT", "/v1/status/", "", 404, "/v1/status"),
        ("GET", "/v1/protect", "", 405, "use PUT /v1/protect"),
        ("POST", "/v1/fail", "", 405, "use PUT /v1/fail"),
        ("PUT", "/v1/status", "", 405, "use GET /v1/status"),
        ("DELETE", "/v1/limits", "", 405, "use PUT /v1/limits"),
        ("PUT", "/v1/protect", "{", 400, "EOF"),
        ("PUT", "/v1/protect", "{\"now\": true}", 400, "now"),
        ("PUT", "/v1/protect", "\u{0}\u{1}", 400, "expected value"),
        ("PUT", "/v1/snapshot", "", 400, "dir"),
        (
            "PUT",
            "/v1/snapshot",
            "{\"dir\": \"snap\"}",
            400,
            "absolute",
        ),
        (
            "PUT",
            "/v1/snapshot",
            "{\"dir\": 7}",
            400,
            "line 1 column 9",
        ),
        ("PUT", "/v1/snapshot", &long, 413, "65536"),
        ("PUT", "/v1/limits", "{\"lag\": 1}", 400, "lag_ms"),
        ("PUT", "/v1/limits", "{\"lag_ms\": -1}", 400, "-1"),
        ("PUT", "/v1/limits", "[]x", 400, "body"),
        (
            "PUT",
            "/v1/host-gone",
            "{\"host\": \"a b\"}",
            400,
            "no host name",
        ),
        (
            "PUT",
            "/v1/force-start",
            "{\"epoch\": \"7\"}",
            400,
            "string",
        ),
        ("GET", "/v1/events?follow=maybe", "", 400, "true or false"),
        ("GET", "/v1/events?folow=true", "", 400, "folow"),
    ] {
        let answer = request(&api.path, method, route, body);
        assert_eq!(answer.status, status, "{method} {route}: {}", answer.body);
        let answer = answer.json();
        assert!(answer["error"].is_string() && answer["remedy"].is_string());
        assert!(
            answer.to_string().contains(says),
            "{method} {route}: {answer}"
        );
    }
    assert!(api.fake.asked.lock().unwrap().is_empty());
}

#[test]
fn a_wrong_method_is_answered_with_the_right_one() {
    let api = serve();
    for (route, right) in READ
        .map(|route| (route, "get"))
        .into_iter()
        .chain(WITH_BODY.map(|route| (route, "put")))
    {
        let answer = request(&api.path, "PATCH", route, "");
        assert_eq!(answer.status, 405);
        let allow = answer.head.lines().find(|line| line.starts_with("allow:"));
        assert!(allow.unwrap().contains(right), "{route}: {allow:?}");
    }
}

#[test]
fn what_is_no_http_is_hung_up_on() {
    let api = serve();
    let answer = raw(&api.path, b"PLXP\x01\0\0\0\r\n\r\n");
    assert_eq!(answer.status, 400);
    let many: String = (0..2000).map(|n| format!("x-{n}: y\r\n")).collect();
    let answer = raw(
        &api.path,
        format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes(),
    );
    assert_eq!(answer.status, 431);
    assert_eq!(get(&api.path, "/v1/status").status, 200);
}

#[test]
fn who_only_looks_is_not_held_up_by_commands_and_those_are_limited() {
    let api = serve();
    api.fake.shut(true);
    std::thread::scope(|scope| {
        for _ in 0..MAX_COMMANDS {
            scope.spawn(|| assert_eq!(put(&api.path, "/v1/protect", "").status, 200));
        }
        api.fake.wait_for(MAX_COMMANDS);
        assert_eq!(get(&api.path, "/v1/status").status, 200);
        let busy = put(&api.path, "/v1/protect", "");
        assert_eq!(busy.status, 503);
        assert!(busy.json()["error"].as_str().unwrap().contains("under way"));
        api.fake.shut(false);
    });
    assert_eq!(put(&api.path, "/v1/protect", "").status, 200);
}

#[test]
fn a_mistake_in_the_session_is_an_answer_and_not_the_end() {
    let api = serve();
    let answer = put(&api.path, "/v1/host-gone", "{\"host\": \"panic\"}");
    assert_eq!(answer.status, 500);
    assert!(answer.json()["remedy"].as_str().unwrap().contains("report"));
    assert_eq!(get(&api.path, "/v1/status").status, 200);
}

#[test]
fn the_command_that_ends_the_process_is_answered() {
    let api = serve();
    let fake = Arc::clone(&api.fake);
    fake.shut(true);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| put(&api.path, "/v1/power-off", "").status);
        fake.wait_for(1);
        let server: Server = api.server;
        let ending = scope.spawn(move || drop(server));
        fake.shut(false);
        assert_eq!(asking.join().unwrap(), 200);
        ending.join().unwrap();
    });
    assert!(!api.path.exists());
}

#[test]
fn who_connects_and_says_nothing_does_not_hold_the_end_up_for_ever() {
    let api = serve();
    let _mute = connect(&api.path);
    assert_eq!(get(&api.path, "/v1/status").status, 200);
    drop(api.server);
    assert!(!api.path.exists());
}
