//! A thread for an arbiter, so that storage that hangs hangs nothing else.
//!
//! Questions are answered in their order. The thread is never waited for: it ends when the handle is
//! gone and the storage lets it.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use ft::{ArbiterReply, ArbiterRequest, CallId};
use thiserror::Error;

use crate::Arbiter;

/// The most questions that wait. The protocol has at most two on their way.
pub const MAX_QUESTIONS: usize = 8;

/// Too many questions wait, or the thread is gone: the answer is
/// [`ArbiterReply::Unreachable`].
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("the arbiter's thread does not take questions")]
pub struct Busy;

/// Asks an arbiter on a thread of its own.
#[derive(Debug)]
pub struct ArbiterThread {
    questions: SyncSender<(CallId, ArbiterRequest)>,
}

impl ArbiterThread {
    /// Starts the thread; `reply` is called on it with each answer.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn start(
        arbiter: impl Arbiter + 'static,
        reply: impl FnMut(CallId, ArbiterReply) + Send + 'static,
    ) -> io::Result<Self> {
        let (questions, inbox) = sync_channel(MAX_QUESTIONS);
        thread::Builder::new()
            .name("arbiter".to_owned())
            .spawn(move || serve(arbiter, &inbox, reply))?;
        Ok(Self { questions })
    }

    /// Asks; never blocks.
    ///
    /// # Errors
    /// [`Busy`]: the question was not taken, and no answer will come.
    pub fn ask(&self, call: CallId, request: ArbiterRequest) -> Result<(), Busy> {
        self.questions
            .try_send((call, request))
            .map_err(|error| match error {
                TrySendError::Full(_) | TrySendError::Disconnected(_) => Busy,
            })
    }
}

fn serve(
    mut arbiter: impl Arbiter,
    inbox: &Receiver<(CallId, ArbiterRequest)>,
    mut reply: impl FnMut(CallId, ArbiterReply),
) {
    for (call, request) in inbox {
        reply(call, arbiter.answer(call, request));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Storage that hangs until it is let go.
    struct Hanging(Receiver<()>);

    impl Arbiter for Hanging {
        fn answer(&mut self, _: CallId, _: ArbiterRequest) -> ArbiterReply {
            let _ = self.0.recv();
            ArbiterReply::Newest(None)
        }
    }

    #[test]
    fn a_hung_arbiter_hangs_nobody_and_answers_when_it_is_let_go() {
        let (release, hang) = mpsc::channel();
        let (sent, answers) = mpsc::channel();
        let thread = ArbiterThread::start(Hanging(hang), move |call, reply| {
            let _ = sent.send((call, reply));
        })
        .unwrap();
        let mut asked = 0;
        while thread.ask(CallId(asked), ArbiterRequest::Newest).is_ok() {
            asked += 1;
            assert!(asked <= MAX_QUESTIONS as u64 + 1, "questions are bounded");
        }
        assert!(answers.try_recv().is_err());
        drop(release);
        for call in 0..asked {
            let answer = answers.recv().unwrap();
            assert_eq!(answer, (CallId(call), ArbiterReply::Newest(None)));
        }
    }
}
