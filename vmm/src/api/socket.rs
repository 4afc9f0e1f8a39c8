//! The API's socket: for its owner only, one live server to a path, no leavings of dead ones.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use thiserror::Error;

const BACKLOG: i32 = 64;
/// Only the owner may connect.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// A living process has it.
    #[error("{0} is in use: another process serves its API there; choose another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: choose another path")]
    NotASocket(PathBuf),
    /// A path that no socket can have.
    #[error("{0} is no path for a socket: 1 to 107 bytes are")]
    Path(PathBuf),
    /// The system says no.
    #[error("API socket {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The file of a listening socket. Dropped after the listener, it removes the file.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`. The file of a process that is dead is replaced.
    pub(super) fn bind(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let failed = |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        let address = SocketAddrUnix::new(path).map_err(|_| SocketError::Path(path.to_owned()))?;
        let _alone = alone(path).map_err(failed)?;
        remove_dead(path)?;
        let listener = bound(&address).map_err(failed)?;
        let socket = Self {
            path: path.to_owned(),
        };
        Ok((socket, listener))
    }
}

/// Until what it returns is dropped, nobody else binds or removes a socket in this directory: two that
/// start at the same time must not take each other's socket for a dead one's.
fn alone(path: &Path) -> io::Result<File> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let dir = File::open(parent)?;
    flock(&dir, FlockOperation::LockExclusive)?;
    Ok(dir)
}

fn bound(address: &SocketAddrUnix) -> io::Result<UnixListener> {
    let socket: OwnedFd = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // bind() gives the file the socket's own mode: there is no moment with a wider one.
    fchmod(&socket, MODE)?;
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let failed = |source: io::Error| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!(path = %path.display(), "removing a socket that nobody serves");
            std::fs::remove_file(path).map_err(failed)
        }
        // A full backlog is a sign of life as well.
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse(path.to_owned()))
        }
        Err(error) => Err(failed(error)),
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nobody listens any more, unless somebody else took the path meanwhile: then it is theirs.
        if let Ok(_alone) = alone(&self.path) {
            let _ = remove_dead(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_only_and_goes_with_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (socket, listener) = Socket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_socket, listener) = Socket::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse(_))));
        listener.accept().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            Socket::bind(&path),
            Err(SocketError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        let long = dir.path().join("x".repeat(108));
        assert!(matches!(Socket::bind(&long), Err(SocketError::Path(_))));
        let nowhere = dir.path().join("none/api");
        assert!(matches!(
            Socket::bind(&nowhere),
            Err(SocketError::Io { .. })
        ));
    }

    #[test]
    fn a_successors_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (first, listener) = Socket::bind(&path).unwrap();
        drop(listener);
        let (_second, _listener) = Socket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
