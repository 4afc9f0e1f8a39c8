//! A process beside this one that sees memory as it is now: copy-on-write, for what takes long while the VM
//! runs on.
#![allow(unsafe_code)] // fork and close_range.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{
    PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

/// The longest reason that a child gives.
const MAX_REASON: u64 = 4096;

/// A child that was forked.
#[derive(Debug)]
pub struct Child {
    process: OwnedFd,
    /// Where it says how it ended.
    said: OwnedFd,
}

/// Forks a child that does `job`, which says how many bytes it wrote, or why it could not. It ends with the
/// thread that called this, and holds nothing of this process open but standard streams and `keep`. `job` must
/// take no lock that another thread could hold: there it is held for ever.
///
/// # Errors
/// There is no room for another process.
pub fn start(
    keep: Option<BorrowedFd<'_>>,
    job: impl FnOnce() -> Result<u64, String>,
) -> std::io::Result<Child> {
    let parent = rustix::process::getpid();
    let (said, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the child only reads memory that stays as it is at the fork, does what `job` does with its own
    // copies, allocates (the C library makes that safe after fork), and leaves by _exit, also after a panic, so
    // no destructor of this process runs there.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let all = AssertUnwindSafe(|| {
                keep_only(keep, say.as_fd(), parent).map_err(|error| error.to_string())?;
                job()
            });
            let done = catch_unwind(all).unwrap_or_else(|_| Err("it panicked".to_owned()));
            tell(say, &done);
            // SAFETY: never returns, runs nothing.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        child => {
            let pid = rustix::process::Pid::from_raw(child).expect("a child's id is not 0");
            // It is not waited for before this, so the number is its own.
            let process = pidfd_open(pid, PidfdFlags::empty())?;
            Ok(Child { process, said })
        }
    }
}

/// In the child: says how it ended.
fn tell(say: OwnedFd, done: &Result<u64, String>) {
    let text = match done {
        Ok(bytes) => bytes.to_string(),
        Err(why) => why.chars().take(MAX_REASON as usize / 4).collect(),
    };
    // Nobody listens any more: then nobody is told.
    let _ = File::from(say).write_all(text.as_bytes());
}

/// In the child: ends with its parent, and closes everything but standard streams, `keep` and `say`, so that
/// sockets and TAP of a parent that was killed are free at once.
fn keep_only(
    keep: Option<BorrowedFd<'_>>,
    say: BorrowedFd<'_>,
    parent: rustix::process::Pid,
) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(std::io::ErrorKind::BrokenPipe.into());
    }
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
    let mut kept: Vec<u32> = keep.into_iter().chain([say]).map(number).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().filter(|fd| *fd >= 3) {
        close(first, fd - 1)?;
        first = fd + 1;
    }
    close(first, u32::MAX)
}

fn close(first: u32, last: u32) -> std::io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes no pointers. Nothing of this process uses what is closed: the child does its job only,
    // and mapped memory stays mapped.
    match unsafe { libc::close_range(first, last, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

impl Child {
    /// Waits for its end: how many bytes it wrote.
    ///
    /// # Errors
    /// Why it failed; it may have been killed.
    pub fn wait(&self) -> Result<u64, String> {
        let mut said = String::new();
        // It closes its end by ending.
        let heard = self.said.try_clone().and_then(|said_by| {
            File::from(said_by)
                .take(MAX_REASON)
                .read_to_string(&mut said)
        });
        let status = loop {
            match waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED) {
                Ok(status) => break status,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(format!("waiting for a process of this one: {error}")),
            }
        };
        match status.and_then(|status| status.exit_status()) {
            Some(0) => heard
                .ok()
                .and_then(|_| said.parse().ok())
                .ok_or_else(|| "it did not say what it wrote".to_owned()),
            Some(_) if !said.is_empty() => Err(said),
            _ => Err("the process was killed".to_owned()),
        }
    }

    /// Ends one that nobody needs any more. One that has ended already is not mistaken for another.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_sees_memory_as_it_was_and_says_what_it_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut memory = vec![1_u8; 10_000];
        let child = start(None, || {
            std::fs::write(&path, &memory).map_err(|error| error.to_string())?;
            Ok(memory.len() as u64)
        })
        .unwrap();
        memory.fill(2);
        assert_eq!(child.wait(), Ok(10_000));
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 10_000]);
    }

    #[test]
    fn a_child_that_fails_or_is_killed_says_why() {
        let failed = start(None, || Err("no room".to_owned())).unwrap();
        assert_eq!(failed.wait(), Err("no room".to_owned()));
        let panics = start(None, || panic!("on purpose")).unwrap();
        assert_eq!(panics.wait(), Err("it panicked".to_owned()));
        let (kept, other) = rustix::pipe::pipe().unwrap();
        let waits = start(Some(kept.as_fd()), || {
            let mut byte = [0];
            rustix::io::read(&kept, &mut byte).map_err(|error| error.to_string())?;
            Ok(0)
        })
        .unwrap();
        waits.kill();
        assert_eq!(waits.wait(), Err("the process was killed".to_owned()));
        drop(other);
    }
}
