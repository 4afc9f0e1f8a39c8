//! The daemon in the sessions of `ftprobe`: heartbeats tell whether it moves and whether it lives.
#![allow(clippy::unwrap_used)]

mod rig;

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use ebpf_events::{KeyGeneration, SessionKeys, Side};
use format::Seq;
use ftprobe::daemon::{Config, Daemon as Ftprobe, Mode};
use ftprobe::metrics::Sources;
use harness::{wait_for, wait_until};
use heartbeat::protocol::ResponderKind;
use heartbeat::{Client, PeerState, Prober, ProberConfig, VmmPages};
use rig::{Host, Rig};
use rustix::process::{Pid, Signal, kill_process};
use vhost_ftlog::config_space::{Reach, Role};
use vhost_ftlog::frontend::{Channel, Daemon};

const GENERATION: KeyGeneration = KeyGeneration(1);

/// `ftprobe` in a thread of this process, answering in userspace.
struct Running {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(socket: &Path) -> Self {
        let (stop, stopped) = UnixStream::pair().unwrap();
        let daemon = Ftprobe::start(&Config {
            interface: "lo".to_owned(),
            log_interface: None,
            port: 0,
            address: Some([127, 0, 0, 1].into()),
            mode: Mode::Only(ResponderKind::Userspace),
            socket: socket.to_owned(),
            metrics: None,
            sources: Sources::default(),
        })
        .unwrap();
        Self {
            stop,
            thread: Some(std::thread::spawn(move || daemon.run(&stopped).unwrap())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn keys(session: u64, side: Side) -> SessionKeys {
    SessionKeys::derive(b"a secret of the handshake", session, GENERATION, side)
}

/// The VMM of this host joins, and its peer begins to probe.
fn probed(socket: &Path, session: u64) -> (Client, VmmPages, Prober) {
    let mut client = Client::connect(socket).unwrap();
    let pages = client.join_vmm(session, 1).unwrap();
    let own = keys(session, Side::Listener);
    client.set_keys(session, GENERATION, &own).unwrap();
    let peer = SocketAddr::new([127, 0, 0, 1].into(), client.abilities().port);
    let key = keys(session, Side::Connector).ours;
    let config = ProberConfig::new(session, 1, GENERATION, key, peer);
    let page = heartbeat::Page::private().unwrap();
    (client, pages, Prober::new(config, page, None).unwrap())
}

fn told(prober: &mut Prober, what: &str, wanted: impl Fn(&PeerState) -> bool) -> PeerState {
    wait_for(what, || prober.beat().peer.filter(&wanted)).unwrap()
}

#[test]
fn heartbeats_tell_of_the_channels_daemon_also_after_ftprobe_was_started_again() {
    let rig = Rig::new("probes");
    let socket = rig.path("probe");
    let session = rig.session.number();
    let mut running = Running::start(&socket);

    let mut config = rig.config("backup", true);
    let Daemon::Spawn(spawn) = &mut config.daemon else {
        panic!("the rig starts daemons");
    };
    spawn
        .args
        .extend(["--probes".to_owned(), socket.display().to_string()]);
    let (channel, events) = Channel::start(config).unwrap();
    let params = rig.params(Role::Receiver, Reach::Listen);
    let host = Host::open(channel, events, params, Seq(0));
    let daemon = host.channel.daemon_pid().unwrap();

    for _ in 0..2 {
        let (mut client, _pages, mut prober) = probed(&socket, session);
        wait_until("the daemon to join", || {
            client.status().unwrap().sessions[0].daemon == Some(daemon)
        })
        .unwrap();
        let first = told(&mut prober, "progress", |peer| peer.daemon_progress > 0);
        told(&mut prober, "more progress", |peer| {
            peer.daemon_progress > first.daemon_progress && !peer.daemon_dead()
        });
        drop(running);
        running = Running::start(&socket);
    }

    let (mut client, _pages, mut prober) = probed(&socket, session);
    wait_until("the daemon to join", || {
        client.status().unwrap().sessions[0].daemon == Some(daemon)
    })
    .unwrap();
    let pid = Pid::from_raw(i32::try_from(daemon).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    // Its frontend starts another, which joins in its turn.
    let next = told(&mut prober, "the next daemon", |peer| !peer.daemon_dead());
    assert!(!next.vmm_dead());
    wait_until("the next daemon to join", || {
        client.status().unwrap().sessions[0].daemon != Some(daemon)
    })
    .unwrap();
    drop(running);
}
