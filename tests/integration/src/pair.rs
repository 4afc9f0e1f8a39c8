//! Two hosts for a protected VM, as an operator sees them: programs, sockets and a shared directory.
//!
//! ```text
//!   client 10.0.0.1 ══ lan ══ a: br0 ── tap0      b: br0 ── tap0      the guest is 10.0.0.2
//!                              a: 10.80.0.1 ══ wire ══ b: 10.80.0.2
//! ```

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use harness::{Host, Port, Process, Switch};

use crate::{GUEST_ADDRESS, Guest, pollux};

/// The guest's Redis server.
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(GUEST_ADDRESS), 6379);
/// How long an answer may take: longer than any failover.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// 10.80.0.1.
    A,
    /// 10.80.0.2.
    B,
}

impl Name {
    /// As the programs call it.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 80, 0, if self == Self::A { 1 } else { 2 })
    }

    fn listen(self) -> String {
        format!("{}:7000", self.address())
    }
}

struct Site {
    // Dropped in this order.
    vmm: Option<Process>,
    host: Host,
    _ports: [Port; 2],
}

/// See the module. All of it goes with this value.
pub struct Pair {
    sites: [Site; 2],
    client: Host,
    _client_port: Port,
    _switches: [Switch; 2],
    dir: tempfile::TempDir,
    guest: &'static Guest,
}

impl Pair {
    /// Two hosts without a VM, and the guest's disk as it was when the snapshot was taken.
    ///
    /// # Panics
    /// Something cannot be made.
    #[must_use]
    pub fn new(guest: &'static Guest) -> Self {
        let switches = [Switch::new(), Switch::new()].map(|switch| switch.expect("a switch"));
        let [lan, wire] = &switches;
        let client = Host::new().expect("a host");
        let client_port = lan.plug(&client, "lan0").expect("a port");
        client_port
            .assign(Ipv4Addr::new(10, 0, 0, 1))
            .expect("an address");
        let site = |name: Name| {
            let host = Host::new().expect("a host");
            host.add_bridge("br0").expect("a bridge");
            host.add_tap("tap0", "br0").expect("a TAP");
            let up = lan.plug(&host, "up0").expect("a port");
            host.attach("up0", "br0").expect("a port of the bridge");
            let log = wire.plug(&host, "log0").expect("a port");
            log.enable_gro().expect("offload");
            log.assign(name.address()).expect("an address");
            Site {
                vmm: None,
                host,
                _ports: [up, log],
            }
        };
        let pair = Self {
            sites: [Name::A, Name::B].map(site),
            client,
            _client_port: client_port,
            dir: tempfile::tempdir().expect("a directory"),
            guest,
            _switches: switches,
        };
        fs::write(pair.path("key"), [7; 32]).expect("a key");
        fs::create_dir(pair.path("shared")).expect("a directory");
        pair.restore_disk();
        let init = Command::new(pollux())
            .args(["init", "--shared"])
            .arg(pair.path("shared"))
            .status();
        assert!(init.expect("pollux is built").success());
        pair
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts the disk back that belongs to the snapshot, with its times, which are part of its identity.
    ///
    /// # Panics
    /// It cannot be copied.
    pub fn restore_disk(&self) {
        self.guest.place_disk(&self.disk());
    }

    /// The VM's disk image.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path("shared/disk.img")
    }

    /// When the disk was written to for the last time.
    ///
    /// # Panics
    /// It is gone.
    #[must_use]
    pub fn disk_changed(&self) -> SystemTime {
        let disk = fs::metadata(self.disk()).expect("the disk is there");
        disk.modified().expect("files have times")
    }

    fn command(&self, name: Name) -> Command {
        let mut command = Command::new(pollux());
        let other = name.other();
        command
            .env("TMPDIR", self.dir.path())
            .args(["--log", "info"])
            .args([
                "--host",
                name.text(),
                "--listen",
                &name.listen(),
                "--tap",
                "tap0",
            ])
            .args(["--standby", &format!("{}={}", other.text(), other.listen())]);
        for (flag, file) in [
            ("--disk", "shared/disk.img".to_owned()),
            ("--shared", "shared".to_owned()),
            ("--key", "key".to_owned()),
            ("--api", format!("{}.sock", name.text())),
        ] {
            command.arg(flag).arg(self.path(&file));
        }
        command
    }

    fn start(&mut self, name: Name, command: &mut Command) {
        let site = &mut self.sites[name as usize];
        site.vmm = None;
        site.vmm = Some(site.host.spawn(command).expect("pollux is built"));
    }

    /// Starts an empty standby.
    pub fn standby(&mut self, name: Name) {
        let mut command = verb(&self.command(name), "standby");
        self.start(name, &mut command);
    }

    /// Starts the VM from its snapshot, protected, with this keyboard at its console.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn primary(&mut self, name: Name) -> File {
        let keyboard = self.path("keyboard");
        let _ = fs::remove_file(&keyboard);
        let made = Command::new("mkfifo").arg(&keyboard).status();
        assert!(made.expect("mkfifo is part of Debian").success());
        // For both: opening it does not wait for a reader then.
        let ours = File::options()
            .read(true)
            .write(true)
            .open(&keyboard)
            .expect("it is ours");
        let mut command = verb(&self.command(name), "run");
        command
            .arg("--protect")
            .arg("--from-snapshot")
            .arg(self.guest.snapshot());
        let mut shell = Command::new("sh");
        shell
            .args(["-c", r#"exec "$0" "$@" < "$KEYBOARD""#])
            .env("KEYBOARD", &keyboard)
            .env("TMPDIR", self.dir.path())
            .arg(command.get_program())
            .args(command.get_args());
        self.start(name, &mut shell);
        ours
    }

    /// The VMM of a host.
    ///
    /// # Panics
    /// None was started.
    pub fn vmm(&mut self, name: Name) -> &mut Process {
        let vmm = self.sites[name as usize].vmm.as_mut();
        vmm.expect("a VMM was started")
    }

    /// Kills everything on a host.
    ///
    /// # Panics
    /// It cannot be killed.
    pub fn kill(&mut self, name: Name) {
        let killed = self.sites[name as usize].host.kill_all();
        killed.expect("root kills");
    }

    /// `pollux ctl`: what it prints, if it is obeyed.
    ///
    /// # Errors
    /// What it says else.
    pub fn ctl(&self, name: Name, words: &[&str]) -> Result<String, String> {
        let output = Command::new(pollux())
            .arg("ctl")
            .arg(self.path(&format!("{}.sock", name.text())))
            .args(words)
            .output()
            .expect("pollux is built");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Waits until the status of a host is `wanted`.
    ///
    /// # Panics
    /// It never is.
    pub fn wait_for(
        &mut self,
        name: Name,
        what: &str,
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let mut last = String::new();
        let found = harness::wait_for(what, || {
            last = self.ctl(name, &["status", "--json"]).unwrap_or_else(|e| e);
            let status: serde_json::Value = serde_json::from_str(&last).ok()?;
            wanted(&status).then_some(status)
        });
        found.unwrap_or_else(|error| {
            let said = self.vmm(name).printed(harness::Stream::Error);
            panic!("host {}: {error}\n{last}\n{said}", name.text())
        })
    }

    /// Waits until the VM on this host is protected.
    pub fn wait_for_protection(&mut self, name: Name) -> serde_json::Value {
        self.wait_for(name, "protection", |status| {
            status["role"] == "primary" && status["protected"] == true
        })
    }

    /// Connects to the guest's server.
    ///
    /// # Panics
    /// It does not answer.
    #[must_use]
    pub fn connect(&self) -> Counter {
        let stream = harness::wait_for("the guest's server", || {
            let tried = self
                .client
                .run(|| TcpStream::connect_timeout(&SERVER, Duration::from_secs(1)));
            tried.ok()
        });
        let stream = stream.expect("the guest answers");
        stream
            .set_read_timeout(Some(ANSWER_LIMIT))
            .expect("a socket has time-outs");
        Counter {
            stream: BufReader::new(stream),
            last: 0,
        }
    }
}

/// The command with its verb before all options but the global ones.
fn verb(command: &Command, verb: &str) -> Command {
    let mut with = Command::new(command.get_program());
    let mut arguments = command.get_args();
    with.args(arguments.by_ref().take(2))
        .arg(verb)
        .args(arguments);
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            with.env(name, value);
        }
    }
    with
}

/// A connection over which a counter in the guest is counted up: each answer must follow the one before.
#[derive(Debug)]
pub struct Counter {
    stream: BufReader<TcpStream>,
    last: u64,
}

impl Counter {
    /// Counts so many times.
    ///
    /// # Panics
    /// An answer was lost, came twice, or not at all.
    pub fn count(&mut self, times: u64) {
        for _ in 0..times {
            self.stream
                .get_mut()
                .write_all(b"INCR counter\r\n")
                .expect("the connection holds");
            let mut line = String::new();
            self.stream.read_line(&mut line).expect("an answer comes");
            self.last += 1;
            assert_eq!(line.trim_end(), format!(":{}", self.last));
        }
    }
}
