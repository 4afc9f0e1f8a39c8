//! A host with a TAP, and itself on the guest's network.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Output};

use harness::{HarnessError, Host};

use crate::PATIENCE;

/// The guest's address on its network.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// See the module. Ends with the test.
#[derive(Debug)]
pub struct Site {
    host: Host,
}

impl Site {
    /// The TAP is `tap0`.
    ///
    /// # Errors
    /// No right to make it.
    pub fn new() -> Result<Self, HarnessError> {
        let host = Host::new()?;
        host.disable_ipv6()?;
        let tap = ["tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"];
        host.command("ip", &tap)?;
        host.command("ip", &["addr", "add", "10.0.0.1/24", "dev", "tap0"])?;
        host.command("ip", &["link", "set", "tap0", "up"])?;
        Ok(Self { host })
    }

    /// Starts a process on this host.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Child {
        self.host
            .run(|| command.spawn())
            .expect("the programs of the tests are installed (scripts/setup)")
    }

    /// Runs a program on this host to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn output(&self, command: &mut Command) -> Output {
        self.host
            .run(|| command.output())
            .expect("the programs of the tests are installed (scripts/setup)")
    }

    /// A connection to the guest's Redis server.
    ///
    /// # Errors
    /// It does not answer.
    pub fn redis(&self) -> std::io::Result<Redis> {
        let server = SocketAddr::from((GUEST_ADDRESS, 6379));
        let stream = self
            .host
            .run(|| TcpStream::connect_timeout(&server, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Redis {
            stream: BufReader::new(stream),
        })
    }
}

/// A connection to a Redis server.
#[derive(Debug)]
pub struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// Sends a command in the inline form and returns the first line of its answer.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn ask(&mut self, command: &str) -> std::io::Result<String> {
        self.stream
            .get_mut()
            .write_all(format!("{command}\r\n").as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Stores `value` under `key` and reads it back.
    ///
    /// # Errors
    /// The server does not answer.
    ///
    /// # Panics
    /// If it answers something else.
    pub fn set_and_get(&mut self, key: u64, value: u64) -> std::io::Result<()> {
        assert_eq!(self.ask(&format!("SET k{key} {value}"))?, "+OK");
        let mut line = String::new();
        self.ask(&format!("GET k{key}"))?;
        self.stream.read_line(&mut line)?;
        assert_eq!(line.trim_end(), value.to_string());
        Ok(())
    }
}
