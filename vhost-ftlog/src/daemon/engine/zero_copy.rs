//! Sends that leave from the sender's own pages (SENDMSG_ZC).
//!
//! The kernel answers such a send twice: with its result, and when it reads the memory no more. The data
//! thread hears of it once, with the second answer, as of any other send. One that it cancels it hears of
//! at once: its connection is over, and what that may still send from changed memory nobody takes.
#![allow(unsafe_code)] // Looks at the message that it is to send.

use io_uring::types::Fixed;
use io_uring::{cqueue, opcode, squeue};

use super::ring_io::{Completion, Slot};

/// Shorter messages cost less to copy than to pin.
const LEAST_BYTES: usize = 32 << 10;
/// Below this bit is the token, above it a number of the send.
const SERIAL_SHIFT: u32 = 8;

/// The send that is under way, and one that is to be answered.
#[derive(Debug, Default)]
pub(super) struct ZeroCopy {
    serial: u64,
    /// The mark of the send that is under way; 0: none.
    mark: u64,
    result: i32,
    has_result: bool,
    is_cancelled: bool,
    answer: Option<Completion>,
}

/// How many bytes a message has.
///
/// # Safety
/// The message and its buffers' lengths are valid.
pub(super) unsafe fn message_len(message: *const libc::msghdr) -> usize {
    // SAFETY: the caller's promise.
    let buffers = unsafe {
        let message = &*message;
        std::slice::from_raw_parts(message.msg_iov, message.msg_iovlen)
    };
    buffers.iter().map(|buffer| buffer.iov_len).sum()
}

/// Whose a completion is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// Of a send like this: it has been taken.
    Ours,
    /// Of another operation.
    Other,
}

impl ZeroCopy {
    /// Whether a message is long enough.
    ///
    /// # Safety
    /// The message and its buffers' lengths are valid.
    pub(super) unsafe fn pays(message: *const libc::msghdr) -> bool {
        // SAFETY: the caller's promise.
        unsafe { message_len(message) >= LEAST_BYTES }
    }

    /// The operation that sends it.
    pub(super) fn entry(message: *const libc::msghdr) -> squeue::Entry {
        opcode::SendMsgZc::new(Fixed(Slot::Socket as u32), message)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build()
    }

    /// Begins a send; what marks its completions.
    pub(super) fn begin(&mut self, token: u64) -> u64 {
        self.serial += 1;
        self.mark = self.serial << SERIAL_SHIFT | token;
        self.has_result = false;
        self.is_cancelled = false;
        self.mark
    }

    /// What to cancel where the operation of `token` is to be cancelled. A send that has its result
    /// already is answered at once.
    pub(super) fn cancel(&mut self, token: u64) -> u64 {
        if self.mark == 0 || token_of(self.mark) != token {
            return token;
        }
        let mark = self.mark;
        self.is_cancelled = true;
        if self.has_result {
            self.finish();
        }
        mark
    }

    fn finish(&mut self) {
        self.answer = Some(Completion {
            token: token_of(self.mark),
            result: self.result,
            more: false,
        });
        self.mark = 0;
    }

    /// Takes a completion, if it is of a send like this.
    pub(super) fn answered(&mut self, entry: &cqueue::Entry) -> Answered {
        self.take(entry.user_data(), entry.result(), entry.flags())
    }

    fn take(&mut self, mark: u64, result: i32, flags: u32) -> Answered {
        if mark >> SERIAL_SHIFT == 0 {
            return Answered::Other;
        }
        // Else it is the second answer to one that was cancelled.
        if mark == self.mark {
            if !cqueue::notif(flags) {
                self.result = result;
                self.has_result = true;
            }
            if self.is_cancelled || !cqueue::more(flags) {
                self.finish();
            }
        }
        Answered::Ours
    }

    /// Whether there is an answer.
    pub(super) fn has_answer(&self) -> bool {
        self.answer.is_some()
    }

    /// The answer for the data thread.
    pub(super) fn take_answer(&mut self) -> Option<Completion> {
        self.answer.take()
    }
}

const fn token_of(mark: u64) -> u64 {
    mark & ((1 << SERIAL_SHIFT) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MORE: u32 = 2; // IORING_CQE_F_MORE
    const NOTIF: u32 = 8; // IORING_CQE_F_NOTIF

    fn answer(result: i32) -> Option<Completion> {
        Some(Completion {
            token: 6,
            result,
            more: false,
        })
    }

    #[test]
    fn a_send_is_answered_once_its_memory_is_free() {
        let mut sends = ZeroCopy::default();
        let mark = sends.begin(6);
        assert_eq!(sends.take(6, 0, 0), Answered::Other);
        assert_eq!(sends.take(mark, 100, MORE), Answered::Ours);
        assert_eq!(sends.take_answer(), None);
        assert_eq!(sends.take(mark, 0, NOTIF), Answered::Ours);
        assert_eq!(sends.take_answer(), answer(100));
        // One that failed has no second answer.
        let mark = sends.begin(6);
        sends.take(mark, -32, 0);
        assert_eq!(sends.take_answer(), answer(-32));
    }

    #[test]
    fn one_that_is_cancelled_is_answered_at_once_and_its_late_answer_is_nobody_s() {
        let mut sends = ZeroCopy::default();
        let first = sends.begin(6);
        sends.take(first, 100, MORE);
        assert_eq!(sends.cancel(7), 7);
        assert_eq!(sends.cancel(6), first);
        assert_eq!(sends.take_answer(), answer(100));
        let second = sends.begin(6);
        assert_eq!(sends.take(first, 0, NOTIF), Answered::Ours);
        assert_eq!(sends.take_answer(), None);
        sends.take(second, 200, MORE);
        sends.take(second, 0, NOTIF);
        assert_eq!(sends.take_answer(), answer(200));
    }
}
