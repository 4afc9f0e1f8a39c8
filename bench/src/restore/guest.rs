//! A host with a TAP on which a snapshot is restored, and the questions that the guest is asked.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use harness::{Host, Stream};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
use rustix::process::Signal;

use super::Restored;
use crate::Failure;
use crate::stage::{GUEST_ADDRESS, GUEST_REDIS, Patience, Programs, StageOptions, Start};

/// How long a VM may take to end, and an answer at the most.
const LIMIT: Duration = Duration::from_secs(60);
/// The MAC address that a guest has unless it is given another.
const GUEST_MAC: &str = "02:50:4c:58:00:01";
/// The host's own address on the guest's network.
const HOST_ADDRESS: &str = "10.77.0.1/24";
/// What `pollux` logs when all is loaded.
const RUNS: &str = "the vCPU runs";

/// What a guest is asked.
#[derive(Debug, Clone, Copy)]
pub(super) enum Question {
    /// An ICMP echo request.
    Echo,
    /// PING, of its Redis server.
    Ping,
}

/// See the module.
pub(super) struct Stand {
    host: Host,
    start: Start,
    snapshot: PathBuf,
    programs: Programs,
    patience: Patience,
}

impl Stand {
    pub(super) fn new(options: &StageOptions, patience: Patience) -> Result<Self, Failure> {
        let start = Start::prepare(options, &patience)?;
        let snapshot = start.needed_snapshot()?.to_owned();
        let host = Host::new()?;
        host.disable_ipv6()?;
        let tap = ["tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"];
        host.command("ip", &tap)?;
        host.command("ip", &["addr", "add", HOST_ADDRESS, "dev", "tap0"])?;
        host.command("ip", &["link", "set", "tap0", "up"])?;
        // Known: whether the guest's address is still in the neighbours' tables is no matter of the VMM's.
        let guest = GUEST_ADDRESS.to_string();
        let neighbour = ["neigh", "add", &guest, "lladdr", GUEST_MAC, "dev", "tap0"];
        host.command("ip", &neighbour)?;
        Ok(Self {
            snapshot,
            start,
            host,
            programs: Programs::find(options.programs.as_deref())?,
            patience,
        })
    }

    /// Restores the snapshot, asks, and ends the VM.
    pub(super) fn restore(&self, question: Question) -> Result<Restored, Failure> {
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk.img");
        self.start.place_disk(&disk)?;
        let mut command = self.programs.pollux();
        command.arg("restore").arg(&self.snapshot);
        command.args(["--tap", "tap0", "--disk"]).arg(&disk);
        let since = Instant::now();
        let mut vmm = self.host.spawn(&mut command)?;
        vmm.wait_for_line(RUNS)?;
        let vcpu_runs = since.elapsed();
        let answer = self.host.run(|| match question {
            Question::Echo => echo(),
            Question::Ping => ping(),
        });
        let answered = since.elapsed();
        answer.map_err(|error| format!("{question:?}: {error}: {}", vmm.printed(Stream::Error)))?;
        vmm.signal(Signal::TERM)?;
        let end = || Ok(vmm.try_wait());
        let status = self.patience.wait_for("the VM to end", LIMIT, end)?;
        if !status.success() {
            return Err(format!("pollux: {status}: {}", vmm.printed(Stream::Error)).into());
        }
        Ok(Restored {
            vcpu_runs,
            answered,
        })
    }
}

/// Has the guest's Redis server answer a PING.
fn ping() -> std::io::Result<()> {
    let mut server = TcpStream::connect_timeout(&GUEST_REDIS, LIMIT)?;
    server.set_read_timeout(Some(LIMIT))?;
    server.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    server.read_exact(&mut answer)?;
    if answer == *b"+PONG\r\n" {
        return Ok(());
    }
    Err(std::io::Error::other(format!("it answers {answer:?}")))
}

/// Has the guest's kernel answer an echo request: type 8, code 0, checksum, identifier, sequence number.
fn echo() -> std::io::Result<()> {
    const REQUEST: [u8; 8] = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    const REPLY: [u8; 8] = [0, 0, 0xff, 0xfd, 0, 1, 0, 1];
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT))?;
    let guest = SocketAddr::from((GUEST_ADDRESS, 0));
    rustix::net::sendto(&socket, &REQUEST, SendFlags::empty(), &guest)?;
    let mut packet = [0; 128];
    loop {
        let (len, _) = rustix::net::recv(&socket, &mut packet, RecvFlags::empty())?;
        let header = usize::from(packet[0] & 0xf) * 4;
        if packet[..len].get(header..) == Some(&REPLY[..]) && source(&packet) == GUEST_ADDRESS {
            return Ok(());
        }
    }
}

/// Source address of an IPv4 packet.
fn source(packet: &[u8; 128]) -> Ipv4Addr {
    let [.., a, b, c, d] = *packet
        .first_chunk::<16>()
        .expect("the packet's buffer is longer");
    Ipv4Addr::new(a, b, c, d)
}
