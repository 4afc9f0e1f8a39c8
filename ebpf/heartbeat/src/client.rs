//! The probe daemon's client, for a VMM or a channel daemon.
//!
//! Calls block for [`CALL_TIMEOUT`] at most. The connection becoming readable between calls means that
//! the daemon has gone: poll [`Client::as_fd`] and fall back to a userspace
//! [`Responder`](crate::Responder), or connect again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebpf_events::maps::{DaemonPage, VmmPage};
use ebpf_events::{KeyGeneration, SessionKeys};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

use crate::page::{Page, SeenReader};
use crate::protocol::{Abilities, Answer, Call, Refusal, Role, Status, VERSION};
use crate::seqpacket::{self, Message};

/// How long a call waits for the daemon. To take a session in, the kernel waits until all its CPUs have
/// been through the scheduler, three times: a second and more on a loaded host. After a call that was
/// given up the connection is of no use any more: its answer may still come.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("probe daemon at {}: {source}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection failed, or the daemon did not answer in time.
    #[error("probe daemon: {0}")]
    Io(#[from] io::Error),
    /// The daemon has closed the connection.
    #[error("probe daemon: connection closed")]
    Closed,
    /// The daemon refused.
    #[error("probe daemon: {}", .0.message)]
    Refused(Refusal),
    /// An answer that this version does not understand.
    #[error("probe daemon: unexpected answer: {0}")]
    Unexpected(String),
}

/// The pages of a VMM's session.
#[derive(Debug, Clone)]
pub struct VmmPages {
    /// To tick, and for the prober's requests.
    pub vmm: Page<VmmPage>,
    /// What the kernel sees of the peer.
    pub seen: SeenReader,
}

/// A connection to the probe daemon.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    abilities: Abilities,
}

impl Client {
    /// Connects and says hello.
    ///
    /// # Errors
    /// [`ClientError`]: not there, another version, no answer.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = open(path).map_err(|e| ClientError::Connect {
            path: path.to_owned(),
            source: e.into(),
        })?;
        match call(&socket, &Call::Hello { version: VERSION })? {
            (Answer::Hello(abilities), _) => Ok(Self { socket, abilities }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// What the daemon can do on this host.
    pub const fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    /// Joins a session as its VMM: this process is watched from now on.
    ///
    /// # Errors
    /// [`ClientError::Refused`]: another VMM lives or has died in the session, or no place is left.
    pub fn join_vmm(&mut self, session: u64, epoch: u64) -> Result<VmmPages, ClientError> {
        match &self.join(session, epoch, Role::Vmm)?[..] {
            [vmm, seen] => Ok(VmmPages {
                vmm: Page::map(vmm)?,
                seen: SeenReader::new(Page::map(seen)?),
            }),
            other => Err(ClientError::Unexpected(format!(
                "{} descriptors",
                other.len()
            ))),
        }
    }

    /// Joins a session as its channel daemon: this process is watched from now on.
    ///
    /// # Errors
    /// [`ClientError::Refused`]: another daemon lives in the session, or no place is left.
    pub fn join_daemon(
        &mut self,
        session: u64,
        epoch: u64,
    ) -> Result<Page<DaemonPage>, ClientError> {
        match &self.join(session, epoch, Role::Daemon)?[..] {
            [page] => Ok(Page::map(page)?),
            other => Err(ClientError::Unexpected(format!(
                "{} descriptors",
                other.len()
            ))),
        }
    }

    fn join(&self, session: u64, epoch: u64, role: Role) -> Result<Vec<OwnedFd>, ClientError> {
        match call(
            &self.socket,
            &Call::Join {
                session,
                epoch,
                role,
            },
        )? {
            (Answer::Joined, descriptors) => Ok(descriptors),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Installs keys. The last two generations are accepted; the newest should be used.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_keys(
        &mut self,
        session: u64,
        generation: KeyGeneration,
        keys: &SessionKeys,
    ) -> Result<(), ClientError> {
        self.done(&Call::keys(session, generation, keys))
    }

    /// Changes the epoch that replies carry.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_epoch(&mut self, session: u64, epoch: u64) -> Result<(), ClientError> {
        self.done(&Call::Epoch { session, epoch })
    }

    /// Ends a session: its heartbeats are answered no more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn close(&mut self, session: u64) -> Result<(), ClientError> {
        self.done(&Call::Close { session })
    }

    /// What is going on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        match call(&self.socket, &Call::Status)? {
            (Answer::Status(status), _) => Ok(status),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn done(&self, what: &Call) -> Result<(), ClientError> {
        match call(&self.socket, what)? {
            (Answer::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Recv, Some(CALL_TIMEOUT))?;
    set_socket_timeout(&socket, Timeout::Send, Some(CALL_TIMEOUT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn call(socket: &OwnedFd, what: &Call) -> Result<(Answer, Vec<OwnedFd>), ClientError> {
    let text = serde_json::to_vec(what).expect("a call is plain data");
    seqpacket::send(socket, &text, &[])?;
    let Message { bytes, descriptors } = seqpacket::receive(socket)?.ok_or(ClientError::Closed)?;
    match serde_json::from_slice(&bytes) {
        Ok(Answer::Error(refusal)) => Err(ClientError::Refused(refusal)),
        Ok(answer) => Ok((answer, descriptors)),
        Err(error) => Err(ClientError::Unexpected(error.to_string())),
    }
}

fn unexpected(answer: &Answer) -> ClientError {
    ClientError::Unexpected(format!("{answer:?}"))
}
