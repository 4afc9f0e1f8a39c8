//! The whole client against servers that are right, and against servers that lie.

mod server;

use std::sync::Arc;

use super::{Live, Options, Outcome, check_server, keyspace};
use server::{Fault, Server};

const CONNECTIONS: u16 = 8;

struct Run {
    outcome: Outcome,
    live: Arc<Live>,
    keys_held: usize,
}

fn run_with(fault: Fault, commands: u64, change: impl FnOnce(&mut Options)) -> Run {
    let live = Arc::new(Live::new(CONNECTIONS));
    let server = Server::start(fault, CONNECTIONS, commands, &live);
    let mut options = Options {
        connections: CONNECTIONS,
        seconds: 600.0,
        seed: Some(7),
        ..Options::new(server.addr)
    };
    change(&mut options);
    let outcome = check_server(&options, &live).unwrap();
    Run {
        outcome,
        live,
        keys_held: server.keys_held(),
    }
}

fn run(fault: Fault) -> Outcome {
    run_with(fault, 4_000, |_| {}).outcome
}

/// What an honest server gives, and a lying one must not.
fn assert_clean(outcome: &Outcome) {
    let details: Vec<String> = outcome.details_of_faults().collect();
    assert_eq!(outcome.faults(), Vec::<String>::new(), "{details:#?}");
}

#[test]
fn right_answers_pass() {
    let run = run_with(Fault::Nothing, 4_000, |_| {});
    assert_clean(&run.outcome);
    assert!(run.outcome.answers >= 4_000, "{}", run.outcome.answers);
    assert_eq!(
        (run.live.answers(), run.live.findings()),
        (run.outcome.answers, (0, 0))
    );
    assert_eq!((run.outcome.unanswered, run.live.broken()), (0, 0));
    let all_answered = run.live.all_answered();
    assert!(run.outcome.started < all_answered && all_answered < crate::monotonic::Moment::now());
    assert_eq!(run.outcome.longest_gaps.len(), usize::from(CONNECTIONS));
    for gap in &run.outcome.longest_gaps {
        assert!(gap.nanoseconds() > 0 && gap.from < gap.to, "{gap:?}");
    }
}

#[test]
fn right_answers_pass_when_many_are_on_their_way() {
    let outcome = run_with(Fault::Nothing, 20_000, |o| o.pipeline = 16).outcome;
    assert_clean(&outcome);
}

#[test]
fn keys_are_given_up_and_the_server_does_not_fill() {
    let run = run_with(Fault::Nothing, 320_000, |o| o.pipeline = 32);
    assert_clean(&run.outcome);
    let most = keyspace::RETIRED_KEPT + usize::from(CONNECTIONS) * 3 + 6;
    assert!(run.outcome.keys > most as u64, "{} keys", run.outcome.keys);
    assert!(run.keys_held <= most + 64, "{} keys held", run.keys_held);
}

#[test]
fn lost_writes_are_found() {
    let outcome = run(Fault::LosesWrites);
    assert!(outcome.verdict.lost > 0, "{:?}", outcome.verdict);
}

#[test]
fn a_server_that_goes_back_has_lost_writes() {
    let outcome = run(Fault::GoesBack);
    assert!(outcome.verdict.lost > 0, "{:?}", outcome.verdict);
}

#[test]
fn stale_answers_are_found() {
    let outcome = run(Fault::AnswersStale);
    assert!(outcome.verdict.contradictory > 0, "{:?}", outcome.verdict);
}

#[test]
fn late_writes_are_found() {
    let outcome = run(Fault::WritesLate);
    assert!(!outcome.verdict.is_clean(), "{:?}", outcome.verdict);
}

#[test]
fn swapped_answers_are_found() {
    let outcome = run_with(Fault::SwapsAnswers, 4_000, |o| o.pipeline = 4).outcome;
    assert!(outcome.verdict.contradictory > 0, "{:?}", outcome.verdict);
}

#[test]
fn writes_done_twice_are_found() {
    let outcome = run(Fault::WritesTwice);
    assert!(outcome.verdict.contradictory > 0, "{:?}", outcome.verdict);
}

#[test]
fn garbled_values_are_found() {
    let outcome = run(Fault::Garbles);
    assert!(outcome.verdict.contradictory > 0, "{:?}", outcome.verdict);
}

#[test]
fn values_of_other_keys_are_found() {
    let outcome = run(Fault::MixesKeys);
    assert!(!outcome.verdict.is_clean(), "{:?}", outcome.verdict);
}

#[test]
fn errors_are_counted_and_are_no_contradictions() {
    let outcome = run(Fault::Refuses);
    assert!(outcome.refused > 20, "{}", outcome.refused);
    assert!(outcome.verdict.is_clean(), "{:?}", outcome.verdict);
    assert_eq!(outcome.refusals[0], "LOADING not now");
}

fn breaks_one(fault: Fault, why: &str) {
    let outcome = run_with(fault, 4_000, |o| o.patience = 1.0).outcome;
    assert!(outcome.verdict.is_clean(), "{:?}", outcome.verdict);
    let [broken] = outcome.broken.as_slice() else {
        panic!("not one connection is broken: {:?}", outcome.broken);
    };
    assert!(broken.why.contains(why), "{broken:?}");
    assert_eq!(outcome.unanswered, 1);
    assert_eq!(outcome.faults(), ["1 connections broke"]);
}

#[test]
fn a_closed_connection_is_counted_and_not_opened_again() {
    breaks_one(Fault::HangsUp, "closed by the server");
}

#[test]
fn what_is_no_answer_breaks_the_connection() {
    breaks_one(Fault::Babbles, "begins with byte 0x3f");
}

#[test]
fn a_connection_that_is_not_answered_counts_as_broken_in_the_end() {
    breaks_one(Fault::FallsSilent, "patience");
}

#[test]
fn an_answer_too_many_is_found() {
    let outcome = run(Fault::Volunteers);
    assert!(!outcome.faults().is_empty());
}

#[test]
fn no_server_is_an_error_and_no_outcome() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = free.local_addr().unwrap();
    drop(free);
    let error = check_server(&Options::new(addr), &Live::new(16)).unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
}

#[test]
fn the_history_holds_every_request() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("history");
    let outcome = run_with(Fault::HangsUp, 1_000, |o| o.history = Some(file.clone())).outcome;
    let text = std::fs::read_to_string(file).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len() as u64, outcome.answers + outcome.unanswered);
    let (answered, not): (Vec<_>, Vec<_>) = lines.iter().partition(|l| l.get("answer").is_some());
    assert_eq!(not.len() as u64, outcome.unanswered);
    for line in answered {
        assert!(line["call"].as_u64() < line["answer"].as_u64(), "{line}");
        assert!(line["got"].is_string() && line["do"].is_string(), "{line}");
    }
}

#[test]
fn a_real_redis_server_passes() {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    // Debian's redis-tools holds the server too: what it is, it sees by the name that it is called by.
    let redis = ["redis-server", "redis-check-rdb"]
        .into_iter()
        .find(|name| {
            let mut version = Command::new(name);
            let output = version.arg0("redis-server").arg("--version").output();
            output.is_ok_and(|o| o.status.success())
        });
    let Some(redis) = redis else {
        harness::privileges::skip("a_real_redis_server_passes", "redis-server or redis-tools");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let any = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = any.local_addr().unwrap();
    drop(any);
    let mut command = Command::new(redis);
    let port = addr.port().to_string();
    command.arg0("redis-server").current_dir(directory.path());
    command.args(["--port", &port, "--bind", "127.0.0.1", "--save", ""]);
    let mut server = harness::Process::spawn(&mut command).unwrap();
    server.wait_for_line("Ready to accept connections").unwrap();
    let options = Options {
        seconds: 2.0,
        pipeline: 4,
        ..Options::new(addr)
    };
    assert_clean(&check_server(&options, &Live::new(16)).unwrap());
}
