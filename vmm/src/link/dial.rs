//! Making connections to a host that may have several addresses.

use std::io;
use std::net::{SocketAddr, TcpStream};

use super::handshake::{self, Hello, Secured};
use super::shared::Shared;
use super::sockets::{self, Class};
use super::until;

/// A connection that this side made.
pub(super) struct Dialed {
    pub(super) stream: TcpStream,
    pub(super) secured: Secured,
    pub(super) address: SocketAddr,
}

/// Connects to the first of `addresses` that answers as the host that `hello` names.
pub(super) fn any(
    shared: &Shared,
    addresses: &[SocketAddr],
    class: Class,
    hello: &Hello,
) -> io::Result<Dialed> {
    let unknown = || {
        let why = format!("no address of host {} is known", hello.to);
        io::Error::new(io::ErrorKind::NotFound, why)
    };
    let mut last = None;
    for address in addresses {
        match one(shared, *address, class, hello) {
            Ok(dialed) => return Ok(dialed),
            Err(error) => {
                let why = format!("{} at {address}: {error}", hello.to);
                last = Some(io::Error::new(error.kind(), why));
            }
        }
    }
    Err(last.unwrap_or_else(unknown))
}

fn one(shared: &Shared, address: SocketAddr, class: Class, hello: &Hello) -> io::Result<Dialed> {
    let stream = sockets::connect(address, class, &shared.times)?;
    let limit = until(shared.times.handshake);
    match handshake::dial(&stream, &shared.key, hello, limit) {
        Ok(secured) => Ok(Dialed {
            stream,
            secured,
            address,
        }),
        Err(handshake::HandshakeError::Io(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}
