//! Finding the daemon, or starting one that outlives the VMM.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Error, io_error};

/// How long a daemon may take to start, or to come back.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Pause between attempts to connect to a daemon that somebody else starts again.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Where the daemon is.
#[derive(Debug, Clone)]
pub enum Daemon {
    /// One that somebody else runs, at this socket. When it dies it is waited for.
    Running(PathBuf),
    /// One that the channel starts, and starts again when it dies.
    Spawn(SpawnConfig),
}

/// A daemon to start.
#[derive(Debug, Clone)]
pub struct SpawnConfig {
    /// The program.
    pub program: PathBuf,
    /// Its socket for this VMM.
    pub socket: PathBuf,
    /// Its other options (`--key-file` and so on); `--socket`, `--once` and `--announce` are added.
    pub args: Vec<String>,
}

/// A connection to a daemon.
pub(super) struct Connected {
    pub(super) stream: UnixStream,
    /// The address on which a daemon that was started for it listens for its peer.
    pub(super) listen: Option<SocketAddr>,
    /// Its process, if it was started for it.
    pub(super) process: Option<OwnedFd>,
}

impl Daemon {
    /// A connection to the daemon, which is started if that is our part.
    pub(super) fn connect(&self) -> Result<Connected, Error> {
        match self {
            Self::Running(path) => {
                let until = Instant::now() + START_LIMIT;
                loop {
                    match UnixStream::connect(path) {
                        Ok(stream) => {
                            return Ok(Connected {
                                stream,
                                listen: None,
                                process: None,
                            });
                        }
                        Err(error) if Instant::now() >= until => {
                            return Err(io_error("connect to the daemon")(error));
                        }
                        Err(_) => std::thread::sleep(CONNECT_PAUSE),
                    }
                }
            }
            Self::Spawn(config) => {
                let Started {
                    listen,
                    process,
                    out: _out,
                } = config.start()?;
                let stream = UnixStream::connect(&config.socket)
                    .map_err(io_error("connect to the daemon that was started"))?;
                Ok(Connected {
                    stream,
                    listen,
                    process: Some(process),
                })
            }
        }
    }
}

/// A daemon that was started.
struct Started {
    listen: Option<SocketAddr>,
    process: OwnedFd,
    /// Held until we have connected: where it closes before, the daemon knows that we are dead.
    out: BufReader<ChildStdout>,
}

impl SpawnConfig {
    /// Starts the daemon and waits until it says that it is ready. It leaves our session and process
    /// group by itself before it says so.
    fn start(&self) -> Result<Started, Error> {
        let failed = |why: String| Error::Spawn {
            program: self.program.display().to_string(),
            why,
        };
        let mut child = Command::new(&self.program)
            .arg("--socket")
            .arg(&self.socket)
            .args(["--once", "--announce"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let out = child
            .stdout
            .take()
            .ok_or_else(|| failed("no standard output".to_owned()))?;
        let mut line = String::new();
        // Ends with the daemon's readiness or with its death, which closes the pipe.
        let mut out = BufReader::new(out);
        let read = out.read_line(&mut line);
        if read.is_err() || line.is_empty() {
            let status = child.wait().map_err(|error| failed(error.to_string()))?;
            return Err(failed(format!("it ended with {status}; see its messages")));
        }
        // Before it is waited for: until then its number is nobody else's.
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .map_err(|errno| io_error("refer to the daemon's process")(errno.into()))?;
        // Somebody must wait for it when it ends, or it stays as a zombie.
        std::thread::Builder::new()
            .name("ftlog-reap".to_owned())
            .spawn(move || child.wait())
            .map_err(io_error("start a thread"))?;
        let said: serde_json::Value =
            serde_json::from_str(&line).map_err(|error| failed(error.to_string()))?;
        let listen = said["listen"].as_str().and_then(|text| text.parse().ok());
        Ok(Started {
            listen,
            process,
            out,
        })
    }
}
