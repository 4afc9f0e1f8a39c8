//! The probes of the logging channel against connections that carry real frames and records.

#![allow(clippy::unwrap_used)] // a test fails by panicking
#![allow(unsafe_code)] // TCP_INFO

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use format::{AckRecord, Epoch, FrameFlags, FrameHeader, Seq, SessionId};
use harness::{End, Host, Link, Process, privileges, wait_for, wait_until};
use heartbeat::Client;
use heartbeat::protocol::FlowStatus;

const SESSION: SessionId = SessionId(*b"0123456789abcdef");
const LOG_PORT: u16 = 7000;

struct World {
    a: Host,
    b: Host,
    link: Link,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let (a, b) = (Host::new().unwrap(), Host::new().unwrap());
        let link = Link::between(&a, &b).unwrap();
        Self {
            a,
            b,
            link,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn ftprobe(&self, host: &Host, end: &End, name: &str) -> Process {
        let mut process = host
            .spawn(
                Command::new(env!("CARGO_BIN_EXE_ftprobe"))
                    .args(["run", "--interface", &end.interface])
                    .args(["--log-interface", &end.interface, "--socket"])
                    .arg(self.socket(name)),
            )
            .unwrap();
        process.wait_for_line("ready").unwrap();
        process
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A connection from A to B, as the channel makes it.
    fn connect(&self, to: IpAddr) -> (TcpStream, TcpStream) {
        let address = SocketAddr::new(to, LOG_PORT);
        let listener = self.b.run(|| TcpListener::bind(address).unwrap());
        let sender = self.a.run(|| TcpStream::connect(address).unwrap());
        let (receiver, _) = listener.accept().unwrap();
        for stream in [&sender, &receiver] {
            stream.set_nodelay(true).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
        }
        (sender, receiver)
    }

    /// The only flow that a host's probe knows.
    fn flow(&self, name: &str) -> Option<FlowStatus> {
        let mut flows = Client::connect(&self.socket(name))
            .unwrap()
            .status()
            .unwrap()
            .flows;
        assert!(flows.len() <= 1, "{flows:?}");
        flows.pop()
    }

    /// Waits until a host's probe has seen an acknowledgement up to a position.
    fn received(&self, name: &str, position: u64) -> FlowStatus {
        let what = format!("an acknowledgement of {position} on {name}");
        wait_for(&what, || self.flow(name).filter(|f| f.received == position)).unwrap()
    }
}

/// A frame of `count` appends with a body of this size. The probes read the header only.
fn frame(first: u64, count: u32, body: usize) -> Vec<u8> {
    let header = FrameHeader {
        flags: FrameFlags::NONE,
        session: SESSION,
        epoch: Epoch(1),
        first: Seq(first),
        count,
        body_len: body.try_into().unwrap(),
        stamp_ns: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.resize(bytes.len() + body + format::TRAILER_LEN, 0x5a);
    bytes
}

fn ack(received: u64, replayed: u64) -> [u8; 32] {
    AckRecord {
        received: Seq(received),
        replayed: Seq(replayed),
    }
    .encode(SESSION)
}

fn pass(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    let mut got = vec![0; bytes.len()];
    to.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes, "the probes change nothing");
}

/// What TCP has put on the wire, as the kernel counts it: what it had to send again is in it, for a
/// busy machine's tail-loss probes go out although nothing was lost.
struct Sent {
    bytes: u64,
    segments: u64,
    again: u64,
}

impl Sent {
    fn of(stream: &TcpStream) -> Self {
        // SAFETY: all zeros is a value of this plain structure of numbers.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&info).try_into().unwrap();
        // SAFETY: `info` is writable and `len` bytes large, and the descriptor is open.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut len,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        Self {
            bytes: info.tcpi_bytes_sent,
            segments: info.tcpi_data_segs_out.into(),
            again: info.tcpi_total_retrans.into(),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            segments: self.segments - before.segments,
            again: self.again - before.again,
        }
    }
}

fn frames_and_acknowledgements_are_seen(to_v6: bool) {
    let world = World::new();
    let _probes = [
        world.ftprobe(&world.a, &world.link.a, "a"),
        world.ftprobe(&world.b, &world.link.b, "b"),
    ];
    let to = if to_v6 {
        IpAddr::from(world.link.b.v6)
    } else {
        world.link.b.v4.into()
    };
    let (mut primary, mut backup) = world.connect(to);
    // What passes before the first frame is nobody's.
    pass(&mut primary, &mut backup, b"handshake");
    assert_eq!(world.flow("a"), None);
    let (frames_before, acks_before) = (Sent::of(&primary), Sent::of(&backup));

    const ROUNDS: u64 = 50;
    const BODY: usize = 1_000;
    for round in 0..ROUNDS {
        pass(&mut primary, &mut backup, &frame(10 * round, 10, BODY));
        pass(
            &mut backup,
            &mut primary,
            &ack(10 * (round + 1), 10 * round),
        );
    }
    let a = world.received("a", 10 * ROUNDS);
    let b = world.received("b", 10 * ROUNDS);
    let frames = Sent::of(&primary).since(&frames_before);
    let acks = Sent::of(&backup).since(&acks_before);
    assert!(frames.bytes >= ROUNDS * (64 + BODY as u64 + 4));
    assert!(acks.bytes >= 32 * ROUNDS);
    assert_eq!((a.bytes_out, a.bytes_in), (frames.bytes, acks.bytes));
    assert_eq!((b.bytes_in, b.bytes_out), (frames.bytes, acks.bytes));
    assert_eq!(
        (a.packets_out, b.packets_in),
        (frames.segments, frames.segments)
    );
    assert_eq!(a.remote, SocketAddr::new(to, LOG_PORT));
    assert_eq!((a.local, a.remote), (b.remote, b.local));
    for (side, sent) in [(&a, &frames), (&b, &acks)] {
        assert_eq!(
            side.session,
            u64::from_le_bytes(SESSION.0[..8].try_into().unwrap())
        );
        assert_eq!(
            (side.acks_timed, side.replayed),
            (ROUNDS, 10 * (ROUNDS - 1))
        );
        assert!(
            side.ack_p50_ns > 0 && side.ack_p50_ns <= side.ack_p99_ns,
            "{side:?}"
        );
        assert!(side.rtt_us > 0, "TCP's round trip is known: {side:?}");
        assert!(side.retransmits <= sent.again, "{side:?}");
    }
    assert!(
        a.ack_p50_ns >= b.ack_p50_ns,
        "the sender waits for the wire too: {a:?} {b:?}"
    );
}

#[test]
fn frames_and_acknowledgements_are_seen_over_ipv4() {
    if privileges::root("frames_and_acknowledgements_are_seen_over_ipv4") {
        frames_and_acknowledgements_are_seen(false);
    }
}

#[test]
fn frames_and_acknowledgements_are_seen_over_ipv6() {
    if privileges::root("frames_and_acknowledgements_are_seen_over_ipv6") {
        frames_and_acknowledgements_are_seen(true);
    }
}

#[test]
fn records_are_found_wherever_segments_cut_them() {
    if !privileges::root("records_are_found_wherever_segments_cut_them") {
        return;
    }
    let world = World::new();
    let _probe = world.ftprobe(&world.a, &world.link.a, "a");
    let (mut primary, mut backup) = world.connect(world.link.b.v4.into());
    pass(&mut primary, &mut backup, &frame(0, 100, 10));
    // Alone, so that the probe learns where records begin.
    pass(&mut backup, &mut primary, &ack(1, 0));
    world.received("a", 1);
    let records = [ack(2, 0), ack(3, 0), ack(4, 0), ack(5, 0)].concat();
    // A record that is cut itself cannot be read; the next one says more anyway.
    for (from, to, received) in [(0, 20, 1), (20, 90, 3), (90, 96, 3), (96, 128, 5)] {
        pass(&mut backup, &mut primary, &records[from..to]);
        let flow = world.flow("a").unwrap();
        let passed = Sent::of(&backup).bytes;
        assert!(passed >= 32 + to as u64);
        assert_eq!((flow.received, flow.bytes_in), (received, passed));
    }
}

#[test]
fn large_segments_count_as_the_packets_they_become() {
    if !privileges::root("large_segments_count_as_the_packets_they_become") {
        return;
    }
    let world = World::new();
    let _probe = world.ftprobe(&world.a, &world.link.a, "a");
    let (mut primary, mut backup) = world.connect(world.link.b.v4.into());
    pass(&mut primary, &mut backup, &frame(0, 1, 10));
    let before = wait_for("the flow", || world.flow("a")).unwrap();
    let sent_before = Sent::of(&primary);
    const LARGE: usize = 1 << 20;
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; LARGE];
        backup.read_exact(&mut got).unwrap();
        backup
    });
    primary.write_all(&frame(1, 1, LARGE - 68)).unwrap();
    let _backup = reader.join().unwrap();
    let after = world.flow("a").unwrap();
    let sent = Sent::of(&primary).since(&sent_before);
    assert!(sent.bytes >= LARGE as u64);
    assert_eq!(after.bytes_out - before.bytes_out, sent.bytes);
    let packets = after.packets_out - before.packets_out;
    // 1,448 bytes fit into a packet with an MTU of 1,500 and time stamps.
    let least = sent.bytes.div_ceil(1_448);
    assert!(
        (least..least + least / 10).contains(&packets),
        "{packets}, at least {least}"
    );
}

#[test]
fn look_alikes_of_other_traffic_are_no_flows() {
    if !privileges::root("look_alikes_of_other_traffic_are_no_flows") {
        return;
    }
    let world = World::new();
    let _probe = world.ftprobe(&world.a, &world.link.a, "a");
    let (mut a, mut b) = world.connect(world.link.b.v4.into());
    let mut wrong_version = frame(0, 1, 10);
    wrong_version[4] = 99;
    let mut torn = ack(1, 0);
    torn[0] = b'X';
    for bytes in [
        b"x".to_vec(),
        vec![0; 5_000],
        wrong_version,
        frame(0, 1, 10)[..63].to_vec(),
    ] {
        pass(&mut a, &mut b, &bytes);
        pass(&mut b, &mut a, &torn);
    }
    assert_eq!(world.flow("a"), None);
    pass(&mut a, &mut b, &frame(0, 1, 10));
    wait_until("the flow", || world.flow("a").is_some()).unwrap();
}
