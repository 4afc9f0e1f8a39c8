//! How `ftprobe` starts, ends and what it refuses.

use std::os::unix::process::CommandExt;
use std::process::Command;

use ebpf_events::Side;
use harness::{Host, Link, privileges};
use heartbeat::protocol::{ExitWatch, ResponderKind};
use heartbeat::{Client, ClientError};
use rustix::process::Signal;

use crate::world::{SESSION, Vmm, World, beat_until};

fn attached(host: &Host, link: &Link) -> String {
    host.command("ip", &["-d", "link", "show", &link.b.interface])
        .unwrap()
}

#[test]
fn nothing_is_left_after_sigterm_or_sigkill() {
    if !privileges::root("nothing_is_left_after_sigterm_or_sigkill") {
        return;
    }
    let world = World::new();
    for signal in [Signal::TERM, Signal::INT, Signal::KILL] {
        let mut probe = world.ftprobe(&world.b, &world.link.b, "b", "native");
        assert!(attached(&world.b, &world.link).contains("xdp"));
        let vmm = Vmm::join(&world.socket("b"), 1, Side::Listener);
        probe.signal(signal).unwrap();
        assert_eq!(probe.wait().unwrap().success(), signal != Signal::KILL);
        assert!(
            !attached(&world.b, &world.link).contains("xdp"),
            "{signal:?}"
        );
        // A killed daemon cannot remove its socket; the next one replaces it.
        assert_eq!(world.socket("b").exists(), signal == Signal::KILL);
        // The pages stay mapped and harmless.
        vmm.pages
            .vmm
            .progress
            .fetch_add(1, std::sync::atomic::Ordering::Release);
    }
}

#[test]
fn a_client_notices_the_end_and_joins_the_next_daemon() {
    if !privileges::root("a_client_notices_the_end_and_joins_the_next_daemon") {
        return;
    }
    let world = World::new();
    let (_a, b) = world.both("native");
    let vmm_a = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let mut prober = vmm_a.prober(&world.a, Side::Connector, world.link.b.v4.into());
    let mut old = Vmm::join(&world.socket("b"), 4, Side::Listener);
    beat_until("a reply", &mut prober, |o| o.peer.is_some());
    drop(b);
    assert!(old.client.status().is_err());
    assert!(matches!(
        Client::connect(&world.socket("b")),
        Err(ClientError::Connect { .. })
    ));

    let _b = world.ftprobe(&world.b, &world.link.b, "b", "native");
    let before = prober.beat().peer.unwrap().request + 1;
    let _new = Vmm::join(&world.socket("b"), 4, Side::Listener);
    beat_until("a reply", &mut prober, |o| {
        o.peer.is_some_and(|p| p.request > before)
    });
}

#[test]
fn two_daemons_do_not_share_a_socket() {
    if !privileges::root("two_daemons_do_not_share_a_socket") {
        return;
    }
    let world = World::new();
    let _first = world.ftprobe(&world.b, &world.link.b, "b", "tcx");
    let run = |arguments: &[&str]| {
        let output = world.b.run(|| {
            Command::new(env!("CARGO_BIN_EXE_ftprobe"))
                .args(["run", "--socket"])
                .arg(world.socket("b"))
                .args(arguments)
                .output()
                .unwrap()
        });
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = run(&["--interface", &world.link.b.interface]);
    assert!(
        said.contains("already in use") || said.contains("in use"),
        "{said}"
    );
    let said = run(&["--interface", "nowhere0"]);
    assert!(said.contains("no network interface nowhere0"), "{said}");
    assert!(
        Client::connect(&world.socket("b")).is_ok(),
        "the first one serves on"
    );
}

/// Runs `ftprobe` as a user with some capabilities only, and says how it answers then, and whether it
/// watches the logging channel.
fn with_capabilities(capabilities: &str, mode: &str) -> (ResponderKind, ExitWatch, bool) {
    let world = World::new();
    let socket = world.socket("probe");
    let directory = socket.parent().unwrap();
    std::os::unix::fs::chown(directory, Some(NOBODY), Some(NOBODY)).unwrap();
    // The build tree may be closed to other users.
    let program = directory.join("ftprobe");
    std::fs::copy(env!("CARGO_BIN_EXE_ftprobe"), &program).unwrap();
    let mut command = Command::new("setpriv");
    let nobody = NOBODY.to_string();
    command
        .args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"])
        .args([format!("--inh-caps=-all,{capabilities}")])
        .args([format!("--ambient-caps=-all,{capabilities}")])
        .args([format!("--bounding-set=-all,{capabilities}")])
        .arg(program)
        .args([
            "run",
            "--mode",
            mode,
            "--interface",
            &world.link.b.interface,
            "--log-interface",
            &world.link.b.interface,
            "--socket",
        ])
        .arg(&socket)
        .process_group(0);
    let mut probe = world.b.spawn(&mut command).unwrap();
    probe.wait_for_line("ready").unwrap();
    let mut vmm = Vmm::join(&socket, 4, Side::Listener);
    vmm.client.close(SESSION).unwrap();
    let watched = vmm.client.status().unwrap().traffic_watched;
    let abilities = vmm.client.abilities();
    (abilities.responder, abilities.exit_watch, watched)
}

const NOBODY: u32 = 65_534;

#[test]
fn cap_bpf_and_cap_net_admin_answer_in_the_kernel() {
    if !privileges::root("cap_bpf_and_cap_net_admin_answer_in_the_kernel") {
        return;
    }
    for (mode, kind) in [
        ("native", ResponderKind::XdpNative),
        ("generic", ResponderKind::XdpGeneric),
        ("auto", ResponderKind::Tcx),
    ] {
        assert_eq!(
            with_capabilities("+bpf,+net_admin", mode),
            (kind, ExitWatch::Pidfd, true)
        );
    }
}

#[test]
fn cap_perfmon_adds_the_watch_for_exits() {
    if privileges::root("cap_perfmon_adds_the_watch_for_exits") {
        assert_eq!(
            with_capabilities("+bpf,+net_admin,+perfmon", "native"),
            (ResponderKind::XdpNative, ExitWatch::Kernel, true)
        );
    }
}

#[test]
fn without_rights_it_answers_in_userspace() {
    if privileges::root("without_rights_it_answers_in_userspace") {
        assert_eq!(
            with_capabilities("+net_bind_service", "auto"),
            (ResponderKind::Userspace, ExitWatch::Pidfd, false)
        );
    }
}
