//! Streams of events.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::super::connections::MAX_CONNECTIONS;
use super::super::events::RECENT_EVENTS;
use super::super::{Event, EventRecord, Severity};
use super::fake::serve;
use super::http::{connect, get};

/// A listener that reads the lines of its stream.
struct Listener(BufReader<UnixStream>);

impl Listener {
    fn new(path: &Path, query: &str) -> Self {
        let mut stream = connect(path);
        let head = format!("GET /v1/events{query} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut listener = Self(BufReader::new(stream));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(listener.0.read_line(&mut head).unwrap(), 0, "{head}");
        }
        assert!(
            head.contains("200 OK") && head.contains("application/x-ndjson"),
            "{head}"
        );
        listener
    }

    /// The next event; none at the end. Lines of the chunked coding are passed over.
    fn next(&mut self) -> Option<EventRecord> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if line.starts_with('{') {
                return Some(serde_json::from_str(&line).unwrap());
            }
            if line.trim() == "0" {
                return None;
            }
        }
    }
}

fn event(n: u64) -> Event {
    Event::new(Severity::Info, "test", format!("event {n}"))
}

#[test]
fn a_listener_gets_what_happened_and_what_happens() {
    let api = serve();
    api.fake.log.record(event(1));
    let mut all = Listener::new(&api.path, "");
    let mut new = Listener::new(&api.path, "?recent=false");
    assert_eq!(all.next().unwrap().message, "event 1");
    api.fake.log.record(event(2).with("answer", 42));
    for listener in [&mut all, &mut new] {
        let event = listener.next().unwrap();
        assert_eq!(
            (event.number, event.details["answer"].as_u64()),
            (2, Some(42))
        );
    }
    let mut recent = Listener::new(&api.path, "?follow=false");
    assert_eq!(recent.next().unwrap().number, 1);
    assert_eq!(recent.next().unwrap().number, 2);
    assert_eq!(recent.next(), None);
}

#[test]
fn streams_end_with_the_server() {
    let api = serve();
    let mut listener = Listener::new(&api.path, "");
    drop(api.server);
    assert_eq!(listener.next(), None);
}

#[test]
fn a_listener_that_does_not_read_holds_nobody_up_and_is_told_what_it_missed() {
    let api = serve();
    let mut slow = Listener::new(&api.path, "");
    let mut good = Listener::new(&api.path, "");
    // More than the socket's buffers and the queue of events hold together.
    let filler = "x".repeat(64 << 10);
    let last = 4 * RECENT_EVENTS as u64;
    for n in 1..=last {
        api.fake
            .log
            .record(event(n).with("filler", filler.as_str()));
        assert_eq!(good.next().unwrap().number, n);
    }
    let (mut after, mut missed) = (0, 0);
    while after < last {
        let event = slow.next().unwrap();
        if event.kind == "missed" {
            let count = event.details["count"].as_u64().unwrap();
            assert_eq!(event.number, after + count);
            missed += count;
        } else {
            assert_eq!(event.number, after + 1);
        }
        after = event.number;
    }
    assert!(missed > 0);
}

#[test]
fn listeners_that_hang_up_make_room() {
    let api = serve();
    for _ in 0..2 {
        let listeners: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| Listener::new(&api.path, ""))
            .collect();
        drop(listeners);
    }
    assert_eq!(get(&api.path, "/v1/status").status, 200);
}
