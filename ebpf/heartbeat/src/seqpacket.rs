//! Messages and descriptors over a SOCK_SEQPACKET Unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::protocol::{MESSAGE_BYTES, MESSAGE_DESCRIPTORS};

/// One packet.
#[derive(Debug)]
pub struct Message {
    /// The JSON text.
    pub bytes: Vec<u8>,
    /// What travelled beside it.
    pub descriptors: Vec<OwnedFd>,
}

/// Sends one message whole.
///
/// # Errors
/// Whatever the socket says: closed, or full if it does not block.
///
/// # Panics
/// With more than [`MESSAGE_DESCRIPTORS`] descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(
            fits,
            "no message carries more than {MESSAGE_DESCRIPTORS} descriptors"
        );
    }
    let sent = retry_on_intr(|| {
        sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Takes one message; `None` when the other end has closed.
///
/// # Errors
/// Whatever the socket says; `InvalidData` for a message longer than [`MESSAGE_BYTES`] or with more
/// than [`MESSAGE_DESCRIPTORS`] descriptors, none of which is kept open.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = retry_on_intr(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message too long",
        ));
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    Ok(Some(Message { bytes, descriptors }))
}
