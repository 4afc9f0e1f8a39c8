//! Requests are answered and replies taken in the kernel, in every way of attaching the programs.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use ebpf_events::Side;
use harness::privileges;
use heartbeat::protocol::{ExitWatch, ResponderKind};
use heartbeat::{Client, Page, Prober};

use crate::world::{Vmm, World, beat_until, prober_config};

fn kernel_answers_and_takes_replies(mode: &str, kind: ResponderKind) {
    let world = World::new();
    let _probes = world.both(mode);
    answers_and_takes_replies(&world, kind);
}

fn answers_and_takes_replies(world: &World, kind: ResponderKind) {
    let mut vmm_a = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let mut vmm_b = Vmm::join(&world.socket("b"), 4, Side::Listener);
    assert_eq!(vmm_b.client.abilities().responder, kind);
    assert_eq!(vmm_b.client.abilities().exit_watch, ExitWatch::Kernel);

    for peer in [IpAddr::from(world.link.b.v4), world.link.b.v6.into()] {
        let mut prober = vmm_a.prober(&world.a, Side::Connector, peer);
        vmm_b.pages.vmm.progress.fetch_add(1, Ordering::Release);
        let progress = vmm_b.pages.vmm.progress.load(Ordering::Acquire);
        let seen = beat_until("a reply that shows progress", &mut prober, |o| {
            o.peer.is_some_and(|p| p.vmm_progress == progress)
        });
        let peer = seen.peer.unwrap();
        assert_eq!(peer.epoch, 4);
        assert!(!peer.from_userspace() && !peer.vmm_dead(), "{peer:?}");
        assert!(
            vmm_a.pages.seen.reply().unwrap().departed_ns > 0,
            "departure is stamped"
        );
        // Both hosts are this machine: their clocks are the same within the error bound.
        let (offset, bound) = peer.clock_offset_ns();
        assert!(offset.unsigned_abs() <= bound, "{offset} {bound}");
    }
    assert!(vmm_b.pages.seen.heard_ns().is_some());
    assert!(vmm_b.counter("answered") >= 2);
    assert!(vmm_a.counter("accepted") >= 2);
    assert_eq!(vmm_a.counter("departed"), vmm_b.counter("answered"));
    for bad in [
        "malformed",
        "forged",
        "replayed",
        "unknown_key",
        "unmatched",
        "contended",
    ] {
        assert_eq!((bad, vmm_a.counter(bad), vmm_b.counter(bad)), (bad, 0, 0));
    }
}

#[test]
fn native_xdp_answers_and_takes_replies() {
    if privileges::root("native_xdp_answers_and_takes_replies") {
        kernel_answers_and_takes_replies("native", ResponderKind::XdpNative);
    }
}

#[test]
fn generic_xdp_answers_and_takes_replies() {
    if privileges::root("generic_xdp_answers_and_takes_replies") {
        kernel_answers_and_takes_replies("generic", ResponderKind::XdpGeneric);
    }
}

#[test]
fn tcx_answers_and_takes_replies() {
    if privileges::root("tcx_answers_and_takes_replies") {
        kernel_answers_and_takes_replies("tcx", ResponderKind::Tcx);
    }
}

#[test]
fn beside_the_log_one_program_stands_on_each_hook_and_heartbeats_pass_behind_it() {
    if !privileges::root(
        "beside_the_log_one_program_stands_on_each_hook_and_heartbeats_pass_behind_it",
    ) {
        return;
    }
    let world = World::new();
    let _probes = world.both_beside_the_log();
    for (host, end) in [(&world.a, &world.link.a), (&world.b, &world.link.b)] {
        for (hook, expected) in [
            (TcAttachType::Ingress, "log_ingress"),
            (TcAttachType::Egress, "log_egress"),
        ] {
            let (_, programs) = host
                .run(|| SchedClassifier::query_tcx(&end.interface, hook))
                .unwrap();
            let names: Vec<_> = programs.iter().map(|p| p.name_as_str().unwrap()).collect();
            assert_eq!(names, [expected]);
        }
    }
    answers_and_takes_replies(&world, ResponderKind::Tcx);
}

/// The prober's host knows nothing of the session: its network stack checks the reply's checksum and
/// hands it to the socket. The request left with its checksum to be filled in by the (pretended)
/// hardware.
fn replies_pass_the_network_stack(mode: &str) {
    let world = World::new();
    let _b = world.ftprobe(&world.b, &world.link.b, "b", mode);
    // A veth takes what XDP_TX sends only if it has an XDP program too; this one lets all pass.
    let _a = (mode == "native").then(|| world.ftprobe(&world.a, &world.link.a, "a", mode));
    let vmm_b = Vmm::join(&world.socket("b"), 4, Side::Listener);
    vmm_b.pages.vmm.progress.store(17, Ordering::Release);
    for peer in [IpAddr::from(world.link.b.v4), world.link.b.v6.into()] {
        let config = prober_config(Side::Connector, peer);
        let page = Page::private().unwrap();
        let mut prober = world.a.run(|| Prober::new(config, page, None).unwrap());
        let seen = beat_until("a reply by the socket", &mut prober, |o| o.peer.is_some());
        let peer = seen.peer.unwrap();
        assert_eq!(peer.vmm_progress, 17);
        assert_eq!(peer.from_userspace(), mode == "userspace");
    }
    let show = world
        .a
        .command("cat", &["/proc/net/snmp", "/proc/net/snmp6"])
        .unwrap();
    let wrong = udp_checksum_errors(&show);
    assert_eq!(wrong, [0, 0], "{show}");
}

/// `InCsumErrors` of IPv4 and of IPv6.
fn udp_checksum_errors(snmp: &str) -> [u64; 2] {
    let mut udp = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (udp.next().unwrap(), udp.next().unwrap());
    let at = names
        .split(' ')
        .position(|name| name == "InCsumErrors")
        .unwrap();
    let v4 = values.split(' ').nth(at).unwrap();
    let v6 = snmp
        .lines()
        .find_map(|line| line.strip_prefix("Udp6InCsumErrors"))
        .unwrap();
    [v4, v6].map(|n| n.trim().parse().unwrap())
}

#[test]
fn native_replies_arrive_on_veth_with_checksum_offload() {
    if privileges::root("native_replies_arrive_on_veth_with_checksum_offload") {
        replies_pass_the_network_stack("native");
    }
}

#[test]
fn generic_replies_arrive_on_veth_with_checksum_offload() {
    if privileges::root("generic_replies_arrive_on_veth_with_checksum_offload") {
        replies_pass_the_network_stack("generic");
    }
}

#[test]
fn tcx_replies_arrive_on_veth_with_checksum_offload() {
    if privileges::root("tcx_replies_arrive_on_veth_with_checksum_offload") {
        replies_pass_the_network_stack("tcx");
    }
}

#[test]
fn userspace_replies_carry_the_same_and_say_so() {
    if privileges::root("userspace_replies_carry_the_same_and_say_so") {
        replies_pass_the_network_stack("userspace");
    }
}

#[test]
fn xdp_is_left_out_by_itself_on_veth() {
    if !privileges::root("xdp_is_left_out_by_itself_on_veth") {
        return;
    }
    let world = World::new();
    let _probe = world.ftprobe(&world.a, &world.link.a, "a", "auto");
    let client = Client::connect(&world.socket("a")).unwrap();
    let abilities = client.abilities();
    assert_eq!(abilities.responder, ResponderKind::Tcx);
    assert!(abilities.responder_reason.contains("veth"), "{abilities:?}");
}
