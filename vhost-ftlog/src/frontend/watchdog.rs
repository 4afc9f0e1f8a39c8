//! Ends a daemon that does not answer. Whoever asks it something would otherwise wait for ever, and the
//! session could not be closed.
//!
//! One thread, asleep unless somebody waits for an answer. A daemon that the channel has started is killed:
//! dead, it acknowledges nothing. Of one that somebody else runs only the connection is ended, which proves
//! nothing about it.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use super::{Error, io_error};

/// How long a daemon may take to answer. Shorter than the time in which a VMM that stands still is taken
/// for lost: who asks stands still meanwhile.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// How long one that was killed may take to be gone.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// A daemon at the other end of a connection.
#[derive(Debug)]
pub(super) struct Watched {
    /// The process, if the channel has started it.
    process: Option<OwnedFd>,
    socket: UnixStream,
    given_up: AtomicBool,
}

impl Watched {
    pub(super) fn new(process: Option<OwnedFd>, socket: UnixStream) -> Self {
        Self {
            process,
            socket,
            given_up: AtomicBool::new(false),
        }
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        match &self.process {
            Some(process) => {
                tracing::warn!("the channel's daemon does not answer: it is killed");
                // It may have ended meanwhile: as good.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            None => tracing::warn!("the channel's daemon does not answer: disconnecting from it"),
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Whether it is proven that the process is gone. One that was killed is waited for.
    pub(super) fn is_gone(&self) -> bool {
        match &self.process {
            Some(process) => {
                // Its socket is closed a little before it is gone.
                let closing = is_ready(self.socket.as_fd(), PollFlags::HUP, Duration::ZERO);
                let limit = if closing { DEATH_LIMIT } else { Duration::ZERO };
                is_ready(process.as_fd(), PollFlags::IN, limit)
            }
            None if self.given_up.load(Ordering::SeqCst) => false,
            None => is_ready(self.socket.as_fd(), PollFlags::HUP, Duration::ZERO),
        }
    }
}

fn is_ready(fd: std::os::fd::BorrowedFd<'_>, flags: PollFlags, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(1) => return fds[0].revents().intersects(flags | PollFlags::ERR),
            _ => return false,
        }
    }
}

#[derive(Default)]
struct State {
    watched: Option<(Instant, Arc<Watched>)>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a single store.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stop {
            let left = state.watched.as_ref().map(|(until, watched)| {
                let left = until.saturating_duration_since(Instant::now());
                (left, Arc::clone(watched))
            });
            state = match left {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some((left, watched)) if left.is_zero() => {
                    watched.give_up();
                    state.watched = None;
                    state
                }
                Some((left, _)) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// See the module.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// An answer is waited for as long as this lives.
pub(super) struct Watching<'a>(&'a Shared);

impl Watchdog {
    pub(super) fn start() -> Result<Self, Error> {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ftlog-watchdog".to_owned())
            .spawn(move || theirs.run())
            .map_err(io_error("start the watchdog"))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The daemon has this long to answer. One at a time: the later takes the place of the one before.
    pub(super) fn watch(&self, watched: &Arc<Watched>, limit: Duration) -> Watching<'_> {
        let until = Instant::now() + limit;
        let watched = Arc::clone(watched);
        self.shared
            .set(|state| state.watched = Some((until, watched)));
        Watching(&self.shared)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.set(|state| state.watched = None);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.set(|state| state.stop = true);
        if let Some(thread) = self.thread.take() {
            // It panics only where this process is broken anyway.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn a_started_daemon_that_is_stopped_is_killed_and_proven_gone() {
        let (ours, theirs) = pair();
        let mut command = Command::new("sleep");
        command
            .arg("1000")
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        let mut child = command.arg0("daemon").spawn().unwrap();
        drop(command);
        let pid = rustix::process::Pid::from_child(&child);
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        let mut socket = ours.try_clone().unwrap();
        let watched = Arc::new(Watched::new(Some(process.unwrap()), ours));
        assert!(!watched.is_gone());
        let dog = Watchdog::start().unwrap();
        {
            let _watching = dog.watch(&watched, Duration::from_millis(10));
            // Ends with the connection only.
            assert_eq!(socket.read(&mut [0]).unwrap(), 0);
        }
        assert!(watched.is_gone());
        child.wait().unwrap();
    }

    #[test]
    fn of_a_foreign_daemon_only_the_connection_is_ended_and_nothing_proven() {
        let (ours, mut theirs) = pair();
        let mut socket = ours.try_clone().unwrap();
        let watched = Arc::new(Watched::new(None, ours));
        let dog = Watchdog::start().unwrap();
        let _watching = dog.watch(&watched, Duration::from_millis(10));
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert!(!watched.is_gone());
    }

    #[test]
    fn who_answers_in_time_is_left_alone() {
        let (ours, theirs) = pair();
        let watched = Arc::new(Watched::new(None, ours));
        let dog = Watchdog::start().unwrap();
        drop(dog.watch(&watched, Duration::from_secs(3600)));
        drop(dog);
        assert!(!watched.given_up.load(Ordering::SeqCst) && !watched.is_gone());
        drop(theirs);
        assert!(watched.is_gone());
    }
}
