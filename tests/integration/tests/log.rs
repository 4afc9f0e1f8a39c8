//! `pollux log` on recordings that are written here: no guest is needed to look into a log.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};

use format::{ControlOp, Entry, Event, ExitNumber};
use integration::{run, stderr};
use replay::{LogSink, RecordingId, RecordingWriter};

/// Entries by the exits at which they stand.
type Entries<'a> = [(u64, Event<'a>)];

const A_LOG: &Entries<'static> = &[
    (1, Event::Time { ns: 1_000_000_000 }),
    (2, Event::ConsoleRx(b"uptime")),
    (2, Event::NetRx(b"GET key")),
    (4, Event::Control(ControlOp::Mark, b"here")),
    (9, Event::Time { ns: 3_000_000_000 }),
    (11, Event::ConsoleRx(b"exit")),
];

struct Recordings {
    dir: tempfile::TempDir,
    made: u8,
}

impl Recordings {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, made: 0 }
    }

    fn begin(&mut self, name: &str, state: &str, entries: &Entries<'_>) -> RecordingWriter {
        self.made += 1;
        let id = RecordingId([self.made; 16]);
        let mut writer = RecordingWriter::create(&self.dir.path().join(name), id).unwrap();
        write_state(&writer.state_path(), Some(id), state);
        for (exit, event) in entries {
            let (exit, event) = (ExitNumber(*exit), *event);
            let mut bytes = Vec::new();
            Entry { exit, event }.encode(&mut bytes);
            writer.append(&bytes).unwrap();
        }
        writer
    }

    /// One that is closed in order.
    fn closed(&mut self, name: &str, state: &str, entries: &Entries<'_>) -> PathBuf {
        self.begin(name, state, entries).close().unwrap()
    }

    /// One that is not.
    fn cut(&mut self, name: &str, state: &str, entries: &Entries<'_>) -> PathBuf {
        drop(self.begin(name, state, entries));
        self.dir.path().join(format!("{name}.incomplete"))
    }
}

/// A state file of this recording, with something in the place of a machine.
fn write_state(path: &Path, id: Option<RecordingId>, machine: &str) {
    let mut writer = transfer::Writer::new(Vec::new()).unwrap();
    // Disk, its path and TAP; the recording, and how many of its entries are behind.
    let meta = (None::<u8>, None::<u8>, None::<u8>, id, 0u64);
    writer.section("snapshot", 3, &meta).unwrap();
    writer.section("machine", 2, &machine).unwrap();
    writer.page(3, &[5; transfer::PAGE_LEN]).unwrap();
    fs::write(path, writer.finish().unwrap()).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a log command, and returns its exit code with what it prints.
fn log(command: &str, recording: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut arguments = vec!["log", command, text(recording)];
    arguments.extend(more);
    let output = run(&arguments);
    let said = stderr(&output);
    assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), printed + &said)
}

fn stat(recording: &Path, more: &[&str]) -> serde_json::Value {
    let (code, said) = log("stat", recording, &[&["--json"], more].concat());
    assert_eq!(code, Some(0), "{said}");
    serde_json::from_str(&said).unwrap()
}

/// The exits of the entries that are printed, one a line.
fn exits(lines: &str) -> Vec<u64> {
    let exit = |line: &str| line.split_whitespace().nth(1).unwrap().parse().unwrap();
    lines.lines().map(exit).collect()
}

#[test]
fn dump_prints_every_entry_and_says_where_a_log_is_cut() {
    let mut recordings = Recordings::new();
    let (code, said) = log("dump", &recordings.closed("a", "m", A_LOG), &[]);
    assert_eq!((code, exits(&said)), (Some(0), vec![1, 2, 2, 4, 9, 11]));
    for (line, kind) in said.lines().zip(["Time", "ConsoleRx", "NetRx", "Control"]) {
        assert_eq!(line.split_whitespace().nth(2), Some(kind), "{said}");
    }
    let (code, said) = log("dump", &recordings.cut("b", "m", &A_LOG[..1]), &[]);
    assert_eq!(code, Some(0));
    assert_eq!(exits(said.lines().next().unwrap()), [1]);
    assert!(said.contains("the log was cut here"), "{said}");
}

#[test]
fn grep_prints_what_has_kind_exits_and_text_that_are_asked_for() {
    let mut recordings = Recordings::new();
    let recording = recordings.closed("a", "m", A_LOG);
    for (more, expected) in [
        (&["--kind", "consolerx"][..], &[2, 11][..]),
        (&["--from", "2", "--to", "4"], &[2, 2, 4]),
        (&["--from", "9"], &[9, 11]),
        (&["--text", "key"], &[2]),
        (&["--kind", "NetRx", "--text", "uptime"], &[]),
    ] {
        let (code, said) = log("grep", &recording, more);
        assert_eq!((code, &exits(&said)[..]), (Some(0), expected), "{more:?}");
    }
}

#[test]
fn stat_counts_entries_exits_and_virtual_time() {
    let mut recordings = Recordings::new();
    let closed = recordings.closed("a", "m", A_LOG);
    let all = stat(&closed, &[]);
    assert_eq!(all["complete"], true);
    assert_eq!((&all["frames"], &all["exits"]), (&1.into(), &10.into()));
    assert_eq!(all["virtual_seconds"], 2.0);
    assert_eq!(all["kinds"]["ConsoleRx"]["entries"], 2);
    let rate = all["bytes"].as_f64().unwrap() * 8.0 / 1e6 / 2.0;
    let found = all["mbit_per_virtual_second"].as_f64().unwrap();
    assert!((found - rate).abs() < 1e-9, "{all}");
    let late = stat(&closed, &["--after-s", "1"]);
    assert_eq!(late["exits"], 2);
    assert!(late["kinds"]["NetRx"].is_null(), "{late}");
    let (code, table) = log("stat", &closed, &[]);
    assert_eq!(code, Some(0));
    assert!(table.contains("10 exits in 1 frames"), "{table}");
    assert_eq!(
        stat(&recordings.cut("b", "m", A_LOG), &[])["complete"],
        false
    );
}

#[test]
fn stat_of_a_log_in_which_no_time_passes_has_no_rate() {
    let mut recordings = Recordings::new();
    let logs: [&Entries<'_>; 3] = [&[], &A_LOG[..1], &A_LOG[1..3]];
    for (name, entries) in ["none", "one", "timeless"].iter().zip(logs) {
        let recording = recordings.closed(name, "m", entries);
        // As long as can be asked for: nothing is counted.
        let most = u64::MAX.to_string();
        for more in [&[][..], &["--after-s", &most]] {
            let stat = stat(&recording, more);
            assert!(stat["mbit_per_virtual_second"].is_null(), "{name}: {stat}");
            assert_eq!(stat["virtual_seconds"], 0.0, "{name}: {stat}");
            let (code, said) = log("stat", &recording, more);
            assert_eq!(code, Some(0));
            assert!(!said.contains("NaN") && !said.contains("Mbit"), "{said}");
        }
    }
}

#[test]
fn stat_refuses_a_log_that_goes_back() {
    let mut recordings = Recordings::new();
    let exit_back = [A_LOG[5], A_LOG[1]];
    let time_back = [A_LOG[4], (12, Event::Time { ns: 7 })];
    for (name, entries, why) in [
        ("exit", exit_back, "exit 2 stands after one of exit 11"),
        (
            "time",
            time_back,
            "at exit 12 virtual time goes back from 3000000000 to 7 ns",
        ),
    ] {
        let recording = recordings.closed(name, "m", &entries);
        for more in [&[][..], &["--after-s", "1"]] {
            let (code, said) = log("stat", &recording, more);
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains(why), "{said}");
        }
    }
}

#[test]
fn diff_shows_where_entries_ends_and_states_differ() {
    let mut recordings = Recordings::new();
    let a = recordings.closed("a", "m", A_LOG);
    let diff = |other: &Path| log("diff", &a, &[text(other)]);
    let (code, said) = diff(&recordings.closed("same", "m", A_LOG));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("identical: 6 entries"), "{said}");

    let mut entries = A_LOG.to_vec();
    entries[1].1 = Event::ConsoleRx(b"uptimE");
    let (code, said) = diff(&recordings.closed("entry", "m", &entries));
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("1 entries are the same, then:\n< exit 2"),
        "{said}"
    );
    assert!(said.contains("\n> exit 2"), "{said}");

    let (code, said) = diff(&recordings.closed("short", "m", &A_LOG[..5]));
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("5 entries are the same, then:\n< exit 11"),
        "{said}"
    );

    let (code, said) = diff(&recordings.cut("cut", "m", A_LOG));
    assert_eq!(code, Some(1));
    let ends = "all 6 entries are the same\n< the log is closed in order\n> the log is cut";
    assert!(said.starts_with(ends), "{said}");

    let (code, said) = diff(&recordings.closed("state", "n", A_LOG));
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("the states at the start differ\nall 6"),
        "{said}"
    );

    let stateless = recordings.closed("stateless", "m", A_LOG);
    fs::remove_file(stateless.join("state")).unwrap();
    let (code, said) = diff(&stateless);
    assert_eq!(code, Some(1));
    assert!(said.contains(text(&stateless.join("state"))), "{said}");
}

/// Before the host is looked at: that this is refused needs no KVM.
#[test]
fn a_log_is_not_replayed_from_the_state_of_another_recording() {
    let mut recordings = Recordings::new();
    let a = recordings.closed("a", "m", A_LOG);
    let b = recordings.closed("b", "m", A_LOG);
    let plain = recordings.dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    write_state(&plain.join("state"), None, "m");
    let refused = |arguments: &[&str], parts: &[&str]| {
        let output = run(&[&["replay"], arguments].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in parts {
            assert!(said.contains(part), "{part}: {said}");
        }
    };
    let (log, ids) = (a.join("log"), ["01".repeat(16), "02".repeat(16)]);
    let remedy = "or from one that a replay of it has saved";
    let from_b = ["--from", text(&b), text(&a)];
    refused(
        &from_b,
        &[text(&log), text(&b.join("state")), &ids[0], &ids[1], remedy],
    );
    let from_plain = ["--from", text(&plain), text(&a)];
    refused(
        &from_plain,
        &[text(&log), &ids[0], "the state of no recording"],
    );
    fs::copy(b.join("state"), a.join("state")).unwrap();
    for saves in [&[][..], &["--saves", "1"]] {
        let own = [&[text(&a)], saves].concat();
        refused(
            &own,
            &[text(&log), text(&a.join("state")), &ids[0], &ids[1]],
        );
    }
    // A state of its own is refused for what is in it only.
    let said = stderr(&run(&["replay", text(&b)]));
    assert!(!said.contains("is the log of recording"), "{said}");
}
