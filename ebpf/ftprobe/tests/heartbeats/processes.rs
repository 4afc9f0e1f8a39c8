//! A stopped, a dead and a living VMM are told apart from a dead host, whoever watches.
//!
//! The VMM on the peer's host is a process of its own: this test program once more, see [`member`].

use std::process::Command;
use std::sync::atomic::Ordering;

use ebpf_events::Side;
use harness::{Process, privileges, wait_until};
use heartbeat::{Client, ClientError, Prober};
use rustix::process::Signal;

use crate::world::{SESSION, Vmm, World, beat_until};

const SOCKET: &str = "FTPROBE_TEST_SOCKET";
const ROLE: &str = "FTPROBE_TEST_ROLE";

/// Joins the session in a role and ticks until it is killed. Does nothing in an ordinary test run.
#[test]
#[ignore = "started by other tests as a process of its own"]
fn member() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let mut client = Client::connect(socket.as_ref()).unwrap();
    if std::env::var(ROLE).unwrap() == "daemon" {
        let page = client.join_daemon(SESSION, 4).unwrap();
        println!("joined");
        loop {
            page.progress.fetch_add(1, Ordering::Release);
            std::thread::yield_now();
        }
    }
    let vmm = Vmm::join(socket.as_ref(), 4, Side::Listener);
    println!("joined");
    // A second thread: the process is dead only when both have ended.
    std::thread::spawn(std::thread::park);
    loop {
        vmm.pages.vmm.progress.fetch_add(1, Ordering::Release);
        std::thread::yield_now();
    }
}

fn start_member(world: &World, role: &str) -> Process {
    let mut process = world
        .b
        .spawn(
            Command::new(std::env::current_exe().unwrap())
                .args(["processes::member", "--exact", "--ignored", "--nocapture"])
                .env(SOCKET, world.socket("b"))
                .env(ROLE, role),
        )
        .unwrap();
    process.wait_for_line("joined").unwrap();
    process
}

fn moving(prober: &mut Prober) {
    let progress = |o: &heartbeat::Observation| o.peer.map(|p| p.vmm_progress);
    let first = progress(&beat_until("a reply", prober, |o| o.peer.is_some()));
    beat_until("progress of the VMM", prober, |o| progress(o) > first);
}

fn states_are_told_apart(mode: &str) {
    let world = World::new();
    let _probes = world.both(mode);
    let vmm = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let mut prober = vmm.prober(&world.a, Side::Connector, world.link.b.v4.into());
    let mut peer_vmm = start_member(&world, "vmm");
    let mut peer_daemon = start_member(&world, "daemon");
    moving(&mut prober);

    // Stopped: the host answers on, nobody is dead, the counter stands still.
    peer_vmm.signal(Signal::STOP).unwrap();
    wait_until("the stop", || stopped(&peer_vmm)).unwrap();
    let sequence = prober.beat().peer.unwrap().request + 1;
    let after = |o: &heartbeat::Observation, s: u64| o.peer.is_some_and(|p| p.request > s);
    let still = beat_until("a reply after the stop", &mut prober, |o| {
        after(o, sequence)
    });
    let later = still.peer.unwrap().request;
    let daemon_at_stop = still.peer.unwrap().daemon_progress;
    let on = beat_until("a reply in which the daemon has moved", &mut prober, |o| {
        after(o, later) && o.peer.is_some_and(|p| p.daemon_progress != daemon_at_stop)
    });
    assert_eq!(
        on.peer.unwrap().vmm_progress,
        still.peer.unwrap().vmm_progress
    );
    assert!(!on.peer.unwrap().vmm_dead());
    peer_vmm.signal(Signal::CONT).unwrap();
    moving(&mut prober);

    // Dead: the next replies say so, of each process.
    peer_vmm.kill();
    let dead = beat_until("the VMM's death", &mut prober, |o| {
        o.peer.is_some_and(|p| p.vmm_dead())
    });
    assert!(!dead.peer.unwrap().daemon_dead());
    peer_daemon.kill();
    beat_until("the daemon's death", &mut prober, |o| {
        o.peer.is_some_and(|p| p.daemon_dead())
    });

    // A daemon comes back; a VMM cannot: what it held is lost.
    let _again = start_member(&world, "daemon");
    beat_until("the new daemon", &mut prober, |o| {
        o.peer.is_some_and(|p| !p.daemon_dead())
    });
    let refused = Client::connect(&world.socket("b"))
        .unwrap()
        .join_vmm(SESSION, 4);
    assert!(
        matches!(refused, Err(ClientError::Refused(_))),
        "{refused:?}"
    );

    // The host gone: silence.
    world.link.cut().unwrap();
    beat_until("silence", &mut prober, |o| o.silence_ns > 1_000_000);
}

fn stopped(process: &Process) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    status
        .rsplit(')')
        .next()
        .unwrap()
        .trim_start()
        .starts_with('T')
}

#[test]
fn kernel_tells_stopped_dead_and_silent_apart() {
    if privileges::root("kernel_tells_stopped_dead_and_silent_apart") {
        states_are_told_apart("native");
    }
}

#[test]
fn userspace_tells_stopped_dead_and_silent_apart() {
    if privileges::root("userspace_tells_stopped_dead_and_silent_apart") {
        states_are_told_apart("userspace");
    }
}

/// The probe daemon itself is stopped: only the program in the kernel can have marked the death.
#[test]
fn a_death_is_marked_without_the_probe_daemon() {
    if !privileges::root("a_death_is_marked_without_the_probe_daemon") {
        return;
    }
    let world = World::new();
    let (_a, b) = world.both("native");
    let vmm = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let mut prober = vmm.prober(&world.a, Side::Connector, world.link.b.v4.into());
    let mut peer_vmm = start_member(&world, "vmm");
    moving(&mut prober);
    b.signal(Signal::STOP).unwrap();
    wait_until("the stop", || stopped(&b)).unwrap();
    peer_vmm.kill();
    beat_until("the VMM's death", &mut prober, |o| {
        o.peer.is_some_and(|p| p.vmm_dead())
    });
    b.signal(Signal::CONT).unwrap();
}
