//! `ftprobe record`, `latency` and `trace` over two hosts, whose programs are this test's own processes.

#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../heartbeats/world.rs"]
#[allow(dead_code)]
mod world;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ebpf_events::Side;
use harness::{Host, Process, privileges};
use rustix::process::Signal;
use serde_json::Value;
use world::{SESSION, Vmm, World, beat_until};

/// Appends that pass.
const APPENDS: u64 = 20;

/// A program with trace points: passes the stations that it is told to.
struct Program {
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Program {
    fn start(host: &Host) -> Self {
        let mut child = host.run(|| {
            Command::new(std::env::current_exe().unwrap())
                .args(["program", "--exact", "--ignored", "--nocapture"])
                .env(usdt::DISTANCE_VARIABLE, "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        });
        let say = child.stdin.take().unwrap();
        let hear = BufReader::new(child.stdout.take().unwrap());
        Self { child, say, hear }
    }

    /// Passes stations with one append, and says when it has.
    fn pass(&mut self, stations: &str, position: u64) {
        writeln!(self.say, "{stations} {position}").unwrap();
        self.say.flush().unwrap();
        let mut line = String::new();
        while !line.contains("passed") {
            line.clear();
            assert_ne!(self.hear.read_line(&mut line).unwrap(), 0, "it has ended");
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "a process of the other test"]
fn program() {
    usdt::sample_as_environment_says();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (stations, position) = line.split_once(' ').unwrap();
        let position: u64 = position.parse().unwrap();
        for station in stations.split(',') {
            let pass = match station {
                "appended" => usdt::appended,
                "kicked" => usdt::kicked,
                "sent" => usdt::sent,
                "received" => usdt::received,
                "committed" => usdt::committed,
                "acknowledged" => usdt::acknowledged,
                "seen" => usdt::seen,
                "released" => usdt::released,
                other => panic!("{other}"),
            };
            pass(SESSION, position, position + 1);
        }
        println!("passed");
    }
}

fn ftprobe() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ftprobe"));
    command.env(usdt::DISTANCE_VARIABLE, "1");
    command
}

fn record(host: &Host, program: &Program, socket: &Path, out: &Path) -> Process {
    let mut process = host
        .spawn(
            ftprobe()
                .args(["record", "--pid", &program.child.id().to_string()])
                .arg("--socket")
                .arg(socket)
                .arg("--out")
                .arg(out),
        )
        .unwrap();
    process.wait_for_line("listening").unwrap();
    process
}

fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn recordings_of_two_hosts_become_one_table_and_one_trace_on_one_clock() {
    if !privileges::root("recordings of two hosts") {
        return;
    }
    let world = World::new();
    let _probes = world.both("tcx");
    let vmm_a = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let _vmm_b = Vmm::join(&world.socket("b"), 3, Side::Listener);
    let mut prober = vmm_a.prober(&world.a, Side::Connector, world.link.b.v4.into());
    beat_until("a reply", &mut prober, |o| o.peer.is_some());

    let (mut a, mut b) = (Program::start(&world.a), Program::start(&world.b));
    a.pass("appended", 1_000);
    b.pass("received", 1_000);
    let files: [PathBuf; 2] = ["a", "b"].map(|name| world.socket(&format!("{name}.stations")));
    let mut recorders = [
        record(&world.a, &a, &world.socket("a"), &files[0]),
        record(&world.b, &b, &world.socket("b"), &files[1]),
    ];
    for position in 0..APPENDS {
        a.pass("appended,kicked,sent", position);
        b.pass("received,committed", position);
        a.pass("acknowledged,seen,released", position);
        let asked = prober.ask();
        beat_until("a reply", &mut prober, |o| {
            o.peer.is_some_and(|p| p.request >= asked)
        });
    }
    a.pass("appended", APPENDS);
    for recorder in &mut recorders {
        recorder.signal(Signal::TERM).unwrap();
        assert!(recorder.wait().unwrap().success());
    }

    let latency = |extra: &[&str]| -> Value {
        let text = printed(
            ftprobe()
                .args(["latency", "--json"])
                .args(extra)
                .args(&files),
        );
        serde_json::from_str(&text).unwrap()
    };
    let one_clock = latency(&[]);
    assert_eq!(one_clock["joined"], APPENDS);
    assert_eq!(
        one_clock["incomplete"], 1,
        "what passed before is not there"
    );
    assert_eq!(one_clock["clock_error_us"], 0.0);
    let whole = |table: &Value| table["stages"][6]["mean_us"].as_f64().unwrap();
    let measured = latency(&["--measured-clocks"]);
    let error = measured["clock_error_us"].as_f64().unwrap();
    assert!(error > 0.0, "{measured}");
    // Both ends of the whole are the primary's, so the measurement of the clocks cannot move it.
    assert!((whole(&measured) - whole(&one_clock)).abs() < 1e-6);
    for stage in 0..6 {
        let mean = |table: &Value| table["stages"][stage]["mean_us"].as_f64().unwrap();
        let moved = (mean(&measured) - mean(&one_clock)).abs();
        assert!(
            moved <= 2.0 * error,
            "stage {stage}: {moved} us, bound {error} us"
        );
    }
    let table = printed(ftprobe().arg("latency").args(&files));
    assert!(table.contains("received to committed"), "{table}");

    let out = world.socket("trace.json");
    printed(
        ftprobe()
            .args(["trace", "--measured-clocks", "--out"])
            .arg(&out)
            .args(&files),
    );
    let trace: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert!(trace["otherData"]["clock_error_us"].as_f64().unwrap() > 0.0);
    let events = trace["traceEvents"].as_array().unwrap();
    let on = |process: u64, name: &str| {
        let is = |e: &&Value| e["ph"] == "b" && e["pid"] == process && e["name"] == name;
        events.iter().filter(is).count() as u64
    };
    assert_eq!(on(1, "appended to kicked"), APPENDS);
    assert_eq!(on(2, "received to committed"), APPENDS);
    assert_eq!(on(1, "committed to acknowledged"), APPENDS);
    assert_eq!(on(1, "seen to released"), APPENDS);
}
