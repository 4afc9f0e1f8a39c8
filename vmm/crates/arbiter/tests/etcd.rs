//! The etcd arbiter against a real etcd server on loopback.
#![allow(clippy::unwrap_used)]

mod conformance;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arbiter::{Arbiter, EtcdArbiter, EtcdConfig};
use conformance::{claim, record};
use ft::{ArbiterReply, ArbiterRequest, CallId};
use harness::privileges;

/// A server of its own for one test; stopped with it.
struct Server {
    child: Child,
    endpoint: String,
    ports: (u16, u16),
    data: Arc<tempfile::TempDir>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts etcd for `test` and waits until it serves. `None` where it is not installed.
fn server(test: &str) -> Option<Server> {
    let installed = Command::new("etcd")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if installed.is_err() {
        privileges::skip(test, "etcd, which scripts/setup installs");
        return None;
    }
    // Another process may take a free port first: then etcd ends, and others are tried.
    let data = || Arc::new(tempfile::tempdir().unwrap());
    let started = (0..5).find_map(|_| start(data(), (free_port(), free_port())));
    Some(started.expect("etcd starts"))
}

fn start(data: Arc<tempfile::TempDir>, ports: (u16, u16)) -> Option<Server> {
    let (client, peer) = ports;
    let local = |port| format!("http://127.0.0.1:{port}");
    let mut child = Command::new("etcd")
        .args(["--name", "test", "--data-dir"])
        .arg(data.path())
        .args(["--listen-client-urls", &local(client)])
        .args(["--advertise-client-urls", &local(client)])
        .args(["--listen-peer-urls", &local(peer)])
        .args(["--initial-advertise-peer-urls", &local(peer)])
        .args(["--initial-cluster", &format!("test={}", local(peer))])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let server = Server {
        child,
        endpoint: format!("127.0.0.1:{client}"),
        ports,
        data,
    };
    let mut lines = log.lines().map_while(Result::ok);
    let serves = lines.any(|line| line.contains("ready to serve client requests"));
    // The rest of its log is read, so that it never waits for a reader.
    std::thread::spawn(move || lines.for_each(drop));
    serves.then_some(server)
}

fn config(server: &Server) -> EtcdConfig {
    EtcdConfig {
        endpoints: vec![server.endpoint.clone()],
        prefix: "/pollux/test/".to_owned(),
        user: None,
        timeout: Duration::from_secs(5),
    }
}

#[test]
fn etcd_has_one_winner_for_each_epoch() {
    let Some(server) = server("etcd_has_one_winner_for_each_epoch") else {
        return;
    };
    let mut arbiter = EtcdArbiter::new(config(&server)).unwrap();
    conformance::one_winner_for_each_epoch(&mut arbiter);
}

#[test]
fn exactly_one_of_many_wins_in_etcd() {
    let Some(server) = server("exactly_one_of_many_wins_in_etcd") else {
        return;
    };
    let config = config(&server);
    conformance::exactly_one_of_many_wins(move |_| EtcdArbiter::new(config.clone()).unwrap());
}

#[test]
fn two_vms_with_prefixes_of_their_own_do_not_see_one_another() {
    let Some(server) = server("two_vms_with_prefixes_of_their_own_do_not_see_one_another") else {
        return;
    };
    let mut arbiter = EtcdArbiter::new(config(&server)).unwrap();
    let won = arbiter.answer(CallId(1), claim(None, &record(1, 1)));
    assert_eq!(won, ArbiterReply::Won);
    let other = EtcdConfig {
        prefix: "/pollux/other/".to_owned(),
        ..config(&server)
    };
    let mut arbiter = EtcdArbiter::new(other).unwrap();
    let newest = arbiter.answer(CallId(1), ArbiterRequest::Newest);
    assert_eq!(newest, ArbiterReply::Newest(None));
}

#[test]
fn etcd_that_is_gone_is_unreachable_and_its_records_are_there_when_it_is_back() {
    let Some(mut server) =
        server("etcd_that_is_gone_is_unreachable_and_its_records_are_there_when_it_is_back")
    else {
        return;
    };
    let mut arbiter = EtcdArbiter::new(config(&server)).unwrap();
    let first = record(1, 1);
    let won = arbiter.answer(CallId(1), claim(None, &first));
    assert_eq!(won, ArbiterReply::Won);
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let lost = arbiter.answer(CallId(2), claim(Some(&first), &record(2, 2)));
    assert!(matches!(lost, ArbiterReply::Unreachable(_)), "{lost:?}");
    let _back = start(Arc::clone(&server.data), server.ports).expect("etcd starts again");
    let newest = arbiter.answer(CallId(3), ArbiterRequest::Newest);
    assert_eq!(newest, ArbiterReply::Newest(Some(first.clone())));
    let won = arbiter.answer(CallId(4), claim(Some(&first), &record(2, 2)));
    assert_eq!(won, ArbiterReply::Won);
}
