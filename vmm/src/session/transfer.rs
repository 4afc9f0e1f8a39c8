//! State transfer: a child process streams the memory as it was, while the VM runs on.
//!
//! fork() gives the child a copy-on-write image of guest memory at the exit where the log begins; the
//! VM stands still only that long. The child writes state and memory to the standby and ends.
#![allow(unsafe_code)] // fork and close_range.

use std::io::{BufWriter, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hypervisor::GuestRam;
use replay::{MachineState, SavedError, save_machine};
use rustix::process::{
    PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use transfer::Writer;

use crate::vm::{CLOCK_SCHEMA, CLOCK_TAG};

/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// Forks a child that streams `state` and `memory` to `stream`. Returns a descriptor of the process. It
/// ends with the thread that called this, and holds nothing of this process open but the stream.
///
/// # Errors
/// There is no room for another process.
pub fn start(
    state: &MachineState,
    memory: &GuestRam,
    wall_at_birth: u64,
    stream: TcpStream,
) -> std::io::Result<OwnedFd> {
    let parent = rustix::process::getpid();
    // SAFETY: the child only reads memory that stays as it is at the fork, writes to its own copy of
    // the socket, allocates (the C library makes that safe after fork), and leaves by _exit, so no
    // destructor of this process runs there. It takes no lock that another thread could hold.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let alone = keep_only(&stream, parent);
            let done = alone.and_then(|()| send(state, memory, wall_at_birth, stream));
            // SAFETY: never returns, runs nothing.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        child => {
            let pid = rustix::process::Pid::from_raw(child).expect("a child's id is not 0");
            // It is not waited for before this, so the number is its own.
            Ok(pidfd_open(pid, PidfdFlags::empty())?)
        }
    }
}

/// In the child: ends with its parent, and closes everything but standard streams and `stream`, so that
/// sockets and TAP of a parent that was killed are free at once.
fn keep_only(stream: &TcpStream, parent: rustix::process::Pid) -> Result<(), SavedError> {
    let io = |error: std::io::Error| SavedError::from(transfer::Error::from(error));
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| io(error.into()))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(io(std::io::ErrorKind::BrokenPipe.into()));
    }
    let keep = stream.as_raw_fd().unsigned_abs();
    let close = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: takes no pointers. Nothing of this process uses what is closed: the child runs `send`
        // only, and guest memory stays mapped.
        match unsafe { libc::close_range(first, last, 0) } {
            0 => Ok(()),
            _ => Err(io(std::io::Error::last_os_error())),
        }
    };
    close(3, keep - 1)?;
    close(keep + 1, u32::MAX)
}

fn send(
    state: &MachineState,
    memory: &GuestRam,
    wall_at_birth: u64,
    stream: TcpStream,
) -> Result<(), SavedError> {
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, stream))?;
    writer.section(CLOCK_TAG, CLOCK_SCHEMA, &wall_at_birth)?;
    save_machine(&mut writer, state, memory)?;
    let mut stream = writer.finish()?;
    stream.flush().map_err(transfer::Error::from)?;
    Ok(())
}

/// Waits for the child.
///
/// # Errors
/// It failed, or was killed.
pub fn wait(child: &OwnedFd) -> Result<(), String> {
    let status = loop {
        match waitid(WaitId::PidFd(child.as_fd()), WaitIdOptions::EXITED) {
            Ok(status) => break status,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("waiting for the transfer's process: {error}")),
        }
    };
    match status.and_then(|status| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err("the connection to the standby broke".to_owned()),
    }
}

/// Ends a child that nobody needs any more. One that has ended already is not mistaken for another.
pub fn kill(child: &OwnedFd) {
    let _ = pidfd_send_signal(child, Signal::KILL);
}
