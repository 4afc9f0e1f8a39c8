//! State transfer: a child process streams the memory as it was, while the VM runs on.
//!
//! fork() gives the child a copy-on-write image of guest memory at the exit where the log begins; the
//! VM stands still only that long. The child writes state and memory to the standby and ends.
#![allow(unsafe_code)] // fork and waitpid.

use std::io::{BufWriter, Write};
use std::net::TcpStream;

use hypervisor::GuestRam;
use replay::{MachineState, SavedError, save_machine};
use transfer::Writer;

use crate::vm::{CLOCK_SCHEMA, CLOCK_TAG};

/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// Forks a child that streams `state` and `memory` to `stream`. Returns its process id.
///
/// # Errors
/// There is no room for another process.
pub fn start(
    state: &MachineState,
    memory: &GuestRam,
    wall_at_birth: u64,
    stream: TcpStream,
) -> std::io::Result<i32> {
    // SAFETY: the child only reads memory that stays as it is at the fork, writes to its own copy of
    // the socket, allocates (the C library makes that safe after fork), and leaves by _exit, so no
    // destructor of this process runs there. It takes no lock that another thread could hold.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let done = send(state, memory, wall_at_birth, stream);
            // SAFETY: never returns, runs nothing.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        child => Ok(child),
    }
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
pub fn wait(child: i32) -> Result<(), String> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the status.
        let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
        if got == child {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(format!("waiting for the transfer's process: {error}"));
        }
    }
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        _ => Err("the connection to the standby broke".to_owned()),
    }
}

/// Ends a child that nobody needs any more.
pub fn kill(child: i32) {
    // SAFETY: takes no pointers; the child is ours and not yet waited for.
    unsafe { libc::kill(child, libc::SIGKILL) };
}
