//! Metrics of a running `ftprobe`, as a scraper reads them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use ebpf_events::Side;
use harness::privileges;

use crate::world::{SESSION, Vmm, World, beat_until};

fn scrape(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

fn value(text: &str, sample: &str) -> f64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {sample} in\n{text}"))
        .parse()
        .unwrap()
}

#[test]
fn metrics_tell_what_the_kernel_has_counted_and_who_does_not_answer() {
    if !privileges::root("metrics") {
        return;
    }
    let world = World::new();
    let metrics = world.socket("metrics");
    let mut process = world
        .a
        .spawn(
            Command::new(env!("CARGO_BIN_EXE_ftprobe"))
                .args([
                    "run",
                    "--mode",
                    "tcx",
                    "--interface",
                    &world.link.a.interface,
                ])
                .args(["--log-interface", &world.link.a.interface])
                .arg("--socket")
                .arg(world.socket("a"))
                .arg(format!("--metrics=unix:{}", metrics.display()))
                .arg("--channel")
                .arg(world.socket("nowhere")),
        )
        .unwrap();
    process.wait_for_line("ready").unwrap();
    let _b = world.ftprobe(&world.b, &world.link.b, "b", "tcx");
    let mut a = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let _b = Vmm::join(&world.socket("b"), 3, Side::Listener);
    let mut prober = a.prober(&world.a, Side::Connector, world.link.b.v4.into());
    beat_until("three replies", &mut prober, |o| {
        o.peer.is_some_and(|peer| peer.request >= 3)
    });

    let text = scrape(&metrics);
    let session = format!("{{session=\"{SESSION:016x}\"}}");
    let of = |name: &str| value(&text, &format!("{name}{session}"));
    let accepted = a.counter("accepted") as f64;
    assert!(accepted >= 3.0);
    assert!((of("pollux_heartbeat_accepted_total") - accepted).abs() < 0.5);
    assert!((of("pollux_heartbeat_round_trip_seconds_count") - accepted).abs() < 0.5);
    let mean = of("pollux_heartbeat_round_trip_seconds_sum") / accepted;
    assert!(mean > 0.0 && mean < 1.0, "{mean} s");
    let offset = of("pollux_peer_clock_offset_seconds");
    assert!(
        offset.abs() <= of("pollux_peer_clock_error_seconds"),
        "one clock"
    );
    assert!(value(&text, "pollux_up{part=\"ftprobe\"}") > 0.5);
    assert!(value(&text, "pollux_up{part=\"channel\"}") < 0.5);
    assert!(value(&text, "pollux_heartbeat_in_kernel") > 0.5);
    assert!(text.ends_with("# EOF\n"));

    drop(process);
    assert!(UnixStream::connect(&metrics).is_err());
}
