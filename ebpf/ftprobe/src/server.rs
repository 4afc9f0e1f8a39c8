//! The Unix socket that VMMs and channel daemons reach this daemon by; see `heartbeat::protocol`.
//!
//! One thread: waits for connections, messages and exits, and never blocks on a client. A client that
//! breaks the protocol is told so and cut off; what it has joined stays.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ebpf_events::{KeyGeneration, SessionKeys};
use heartbeat::protocol::{Answer, Call, Refusal, RefusalCode, VERSION};
use heartbeat::seqpacket;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::state::State;
use crate::table::Table;

/// Connections at a time; more are closed at once.
pub const MAX_CLIENTS: usize = 64;
const BACKLOG: i32 = 16;
/// Who may connect: owner and group.
const SOCKET_MODE: u32 = 0o660;

/// The listening socket; its file is removed with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, replacing a socket that nobody listens on any more.
    ///
    /// # Errors
    /// `AddrInUse` if another daemon listens there, else what the system says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        if path.exists() {
            match connect(seqpacket_socket()?, &address) {
                Err(rustix::io::Errno::CONNREFUSED) => std::fs::remove_file(path)?,
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        let socket = seqpacket_socket()?;
        bind(&socket, &address)?;
        let listener = Self {
            socket,
            path: path.to_owned(),
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
        listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn seqpacket_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

struct Connection {
    socket: OwnedFd,
    pid: Pid,
    greeted: bool,
}

/// Serves until `stop` becomes readable.
///
/// # Errors
/// If waiting itself fails; errors of one client only end that client.
pub fn serve(listener: &Listener, state: &State, stop: impl AsFd) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let ready = wait(listener, &connections, state, stop.as_fd())?;
        if ready.stop {
            return Ok(());
        }
        if ready.exits {
            state.table().reap();
        }
        let mut spoken = ready.spoken.iter();
        connections.retain_mut(|connection| match spoken.next() {
            Some(true) => attend(connection, state),
            _ => true,
        });
        if ready.arrivals {
            welcome(listener, &mut connections);
        }
    }
}

struct Ready {
    stop: bool,
    arrivals: bool,
    exits: bool,
    spoken: Vec<bool>,
}

fn wait(
    listener: &Listener,
    connections: &[Connection],
    state: &State,
    stop: BorrowedFd<'_>,
) -> io::Result<Ready> {
    // Copies, so that the table is not locked while this waits: a pidfd outlives its session here.
    let pidfds = state
        .table()
        .pidfds()
        .map(|fd| fd.try_clone_to_owned())
        .collect::<io::Result<Vec<_>>>()?;
    let mut waiting = vec![
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
        PollFd::new(&listener.socket, PollFlags::IN),
    ];
    waiting.extend(pidfds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
    waiting.extend(
        connections
            .iter()
            .map(|c| PollFd::new(&c.socket, PollFlags::IN)),
    );
    match poll(&mut waiting, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
    let (exits, spoken) = ready[2..].split_at(pidfds.len());
    Ok(Ready {
        stop: ready[0],
        arrivals: ready[1],
        exits: exits.contains(&true),
        spoken: spoken.to_vec(),
    })
}

fn welcome(listener: &Listener, connections: &mut Vec<Connection>) {
    let accepted = accept_with(
        &listener.socket,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
    );
    let socket = match accepted {
        Ok(socket) => socket,
        Err(error) => return tracing::debug!(%error, "connection not accepted"),
    };
    match socket_peercred(&socket) {
        Ok(peer) if connections.len() < MAX_CLIENTS => {
            connections.push(Connection {
                socket,
                pid: peer.pid,
                greeted: false,
            });
        }
        Ok(peer) => tracing::warn!(pid = %peer.pid, "too many connections"),
        Err(error) => tracing::warn!(%error, "connection without credentials"),
    }
}

/// Answers what a client has sent; false if the connection is over.
fn attend(connection: &mut Connection, state: &State) -> bool {
    let message = match seqpacket::receive(&connection.socket) {
        Ok(Some(message)) => message,
        Ok(None) => return false,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Err(error) => {
            tracing::debug!(pid = %connection.pid, %error, "connection failed");
            return false;
        }
    };
    let mut table = state.table();
    let (answer, descriptors, go_on) = match serde_json::from_slice(&message.bytes) {
        Ok(call) => match handle(connection, state, &mut table, call) {
            Ok((answer, descriptors)) => (answer, descriptors, true),
            Err(refusal) => {
                let fatal = matches!(refusal.code, RefusalCode::Version | RefusalCode::NoHello);
                (Answer::Error(refusal), Vec::new(), !fatal)
            }
        },
        Err(error) => {
            let refusal = Refusal {
                code: RefusalCode::Malformed,
                message: error.to_string(),
            };
            (Answer::Error(refusal), Vec::new(), false)
        }
    };
    let text = serde_json::to_vec(&answer).expect("an answer is plain data");
    if let Err(error) = seqpacket::send(&connection.socket, &text, &descriptors) {
        tracing::debug!(pid = %connection.pid, %error, "client does not take its answer");
        return false;
    }
    go_on
}

type Answered<'a> = Result<(Answer, Vec<BorrowedFd<'a>>), Refusal>;

fn handle<'a>(
    connection: &mut Connection,
    state: &State,
    table: &'a mut Table,
    call: Call,
) -> Answered<'a> {
    if let Call::Hello { version } = call {
        return greet(connection, table, version);
    }
    if !connection.greeted {
        let message = "the first call must be hello".to_owned();
        return Err(Refusal {
            code: RefusalCode::NoHello,
            message,
        });
    }
    let done = |result: Result<(), Refusal>| result.map(|()| (Answer::Done, Vec::new()));
    match call {
        Call::Hello { .. } => unreachable!("handled above"),
        Call::Join {
            session,
            epoch,
            role,
        } => {
            let pidfd = pidfd_open(connection.pid, PidfdFlags::empty()).map_err(|error| {
                let message = format!("process {}: {error}", connection.pid);
                Refusal {
                    code: RefusalCode::System,
                    message,
                }
            })?;
            let pid = connection.pid.as_raw_nonzero().get().cast_unsigned();
            Ok((
                Answer::Joined,
                table.join(session, epoch, role, pid, pidfd)?,
            ))
        }
        Call::Keys {
            session,
            generation,
            ours,
            theirs,
        } => {
            let keys = SessionKeys {
                ours: ours.0,
                theirs: theirs.0,
            };
            done(table.set_keys(session, KeyGeneration(generation), keys))
        }
        Call::Epoch { session, epoch } => done(table.set_epoch(session, epoch)),
        Call::Close { session } => done(table.close(session)),
        Call::Status => Ok((Answer::Status(state.status_of(table)), Vec::new())),
    }
}

fn greet<'a>(connection: &mut Connection, table: &Table, version: u32) -> Answered<'a> {
    if version != VERSION {
        let message = format!("this daemon speaks version {VERSION}, not {version}");
        return Err(Refusal {
            code: RefusalCode::Version,
            message,
        });
    }
    connection.greeted = true;
    Ok((Answer::Hello(table.abilities().clone()), Vec::new()))
}
