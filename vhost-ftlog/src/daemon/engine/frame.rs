//! A frame on its way out: header and trailer in memory of the daemon, the body in the arena where
//! the VMM wrote it.
//!
//! Nothing of the body is copied; it is read once, for the checksum, just before the kernel takes it.
//! Appends that are adjacent in the arena become one buffer, and are summed as one. The structure must
//! not move while it is being sent: it lives in a box.
#![allow(unsafe_code)] // Builds the message that the kernel reads, and reads shared memory.

use std::ptr::{self, NonNull};

use format::{FrameHeader, HEADER_LEN, MAX_COUNT, TRAILER_LEN};

/// The most buffers of a message: `IOV_MAX`.
const MAX_BUFFERS: usize = 1024;
/// A body is not filled beyond this many bytes, so that its checksum is made and checked while it is
/// in the cache, and the peer can commit it early.
pub(super) const FRAME_BYTES: usize = 256 << 10;

/// A frame that is gathered, then sent.
pub(super) struct OutFrame {
    header: [u8; HEADER_LEN],
    trailer: [u8; TRAILER_LEN],
    buffers: Vec<libc::iovec>,
    message: libc::msghdr,
    count: u32,
    len: usize,
    left: usize,
}

// SAFETY: the pointers are into memory that the owner of the frame keeps mapped.
unsafe impl Send for OutFrame {}

impl OutFrame {
    /// An empty frame.
    pub(super) fn new() -> Box<Self> {
        // SAFETY: a message of null pointers and zero lengths is a valid empty one.
        let message = unsafe { std::mem::zeroed() };
        let mut buffers = Vec::with_capacity(MAX_BUFFERS);
        buffers.push(empty());
        Box::new(Self {
            header: [0; HEADER_LEN],
            trailer: [0; TRAILER_LEN],
            buffers,
            message,
            count: 0,
            len: 0,
            left: 0,
        })
    }

    /// Empties it.
    pub(super) fn clear(&mut self) {
        self.buffers.truncate(1);
        self.count = 0;
        self.len = 0;
        self.left = 0;
    }

    /// Appends in it.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of its body.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether an append of `len` bytes at `at` still fits.
    #[inline]
    pub(super) fn fits(&self, at: NonNull<u8>, len: usize) -> bool {
        (self.len == 0 || self.len + len <= FRAME_BYTES)
            && self.count < MAX_COUNT
            && (self.buffers.len() + 1 < MAX_BUFFERS || self.continues(at))
    }

    #[inline]
    fn continues(&self, at: NonNull<u8>) -> bool {
        let last = self
            .buffers
            .last()
            .expect("the header's buffer is always there");
        self.buffers.len() > 1 && last.iov_base as usize + last.iov_len == at.as_ptr() as usize
    }

    /// Adds an append.
    ///
    /// # Safety
    /// The `len` bytes at `at` stay mapped until the frame is sent or cleared. The VMM does not
    /// change what it has published; one that does harms only its own log, whose checksum then fails.
    #[inline]
    pub(super) unsafe fn push(&mut self, at: NonNull<u8>, len: usize) {
        if self.continues(at) {
            let last = self
                .buffers
                .last_mut()
                .expect("the header's buffer is always there");
            last.iov_len += len;
        } else {
            self.buffers.push(libc::iovec {
                iov_base: at.as_ptr().cast(),
                iov_len: len,
            });
        }
        self.len += len;
        self.count += 1;
    }

    /// The checksum of the body.
    fn checksum(&self) -> u32 {
        self.buffers[1..].iter().fold(0, |crc, buffer| {
            // SAFETY: mapped, as the caller of `push` has promised; not written while a correct VMM waits
            // for its use.
            let bytes =
                unsafe { std::slice::from_raw_parts(buffer.iov_base.cast::<u8>(), buffer.iov_len) };
            format::crc32c_append(crc, bytes)
        })
    }

    /// Puts header and trailer around the body and returns the message to send. `header`'s count and
    /// length are set here.
    pub(super) fn seal(&mut self, mut header: FrameHeader) -> *const libc::msghdr {
        header.count = self.count;
        header.body_len = self.len as u32;
        self.header = header.encode();
        self.trailer = self.checksum().to_le_bytes();
        self.buffers[0] = libc::iovec {
            iov_base: self.header.as_mut_ptr().cast(),
            iov_len: HEADER_LEN,
        };
        self.buffers.push(libc::iovec {
            iov_base: self.trailer.as_mut_ptr().cast(),
            iov_len: TRAILER_LEN,
        });
        self.left = HEADER_LEN + self.len + TRAILER_LEN;
        self.message.msg_iov = self.buffers.as_mut_ptr();
        self.message.msg_iovlen = self.buffers.len();
        &raw const self.message
    }

    /// Notes that `sent` more bytes are gone: the message of the rest, or `None` at the end.
    pub(super) fn advance(&mut self, mut sent: usize) -> Option<*const libc::msghdr> {
        assert!(
            sent <= self.left,
            "the kernel sends no more than it was given"
        );
        self.left -= sent;
        if self.left == 0 {
            return None;
        }
        let skipped = self.buffers.len() - self.message.msg_iovlen;
        let mut first = skipped;
        while sent >= self.buffers[first].iov_len {
            sent -= self.buffers[first].iov_len;
            first += 1;
        }
        let buffer = &mut self.buffers[first];
        // SAFETY: sent is less than the buffer's length, so the address stays inside of it.
        buffer.iov_base = unsafe { buffer.iov_base.cast::<u8>().add(sent).cast() };
        buffer.iov_len -= sent;
        self.message.msg_iov = ptr::from_mut(&mut self.buffers[first]);
        self.message.msg_iovlen = self.buffers.len() - first;
        Some(&raw const self.message)
    }
}

fn empty() -> libc::iovec {
    libc::iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }
}

#[cfg(test)]
mod tests {
    use format::{Epoch, Frame, FrameFlags, Seq, SessionId};

    use super::*;

    fn header() -> FrameHeader {
        FrameHeader {
            flags: FrameFlags::NONE,
            session: SessionId([1; 16]),
            epoch: Epoch(1),
            first: Seq(10),
            count: 0,
            body_len: 0,
            stamp_ns: 0,
        }
    }

    /// What a kernel would send of the message, at most `limit` bytes.
    fn take(message: *const libc::msghdr, limit: usize) -> Vec<u8> {
        let mut out = Vec::new();
        // SAFETY: the message and its buffers live in the frame of the test.
        unsafe {
            let message = &*message;
            for i in 0..message.msg_iovlen {
                let buffer = &*message.msg_iov.add(i);
                out.extend_from_slice(std::slice::from_raw_parts(
                    buffer.iov_base.cast::<u8>(),
                    buffer.iov_len,
                ));
            }
        }
        out.truncate(limit);
        out
    }

    #[test]
    fn a_frame_sent_in_pieces_of_any_size_is_the_format_s() {
        let data: Vec<u8> = (0..200).collect();
        for piece in 1..300 {
            let mut frame = OutFrame::new();
            for (from, to) in [(0, 50), (50, 60), (100, 150), (70, 71)] {
                let part = &data[from..to];
                let at = NonNull::from(&part[0]);
                assert!(frame.fits(at, part.len()));
                // SAFETY: data outlives the frame and does not change.
                unsafe { frame.push(at, part.len()) };
            }
            assert_eq!(frame.buffers.len(), 4, "adjacent appends are one buffer");
            let mut message = Some(frame.seal(header()));
            let mut wire = Vec::new();
            while let Some(now) = message {
                let sent = take(now, piece);
                wire.extend_from_slice(&sent);
                message = frame.advance(sent.len());
            }
            let mut rest = wire.as_slice();
            let decoded = Frame::decode(&mut rest).unwrap();
            assert!(rest.is_empty());
            assert_eq!((decoded.header.count, decoded.header.first), (4, Seq(10)));
            let expected = [&data[0..60], &data[100..150], &data[70..71]].concat();
            assert_eq!(decoded.body, expected);
        }
    }
}
