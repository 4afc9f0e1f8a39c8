//! State transfer: a child process streams the memory as it was, while the VM runs on.
//!
//! fork() gives the child a copy-on-write image of guest memory at the exit where the log begins; the
//! VM stands still only that long. The child writes state and memory to the standby and ends.

use std::io::{BufWriter, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use hypervisor::GuestRam;
use replay::{MachineState, SavedError, save_machine};
use transfer::Writer;

use crate::vm::{CLOCK_SCHEMA, CLOCK_TAG};
use transfer::fork::{self, Child};

/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// Forks a child that streams `state` and `memory` to `stream`.
///
/// # Errors
/// There is no room for another process.
pub fn start(
    state: &MachineState,
    memory: &GuestRam,
    wall_at_birth: u64,
    stream: TcpStream,
) -> std::io::Result<Child> {
    fork::start(Some(stream.as_fd()), || {
        send(state, memory, wall_at_birth, &stream)
            .map_err(|error| format!("the connection to the standby broke: {error}"))
    })
}

/// How many bytes were sent.
fn send(
    state: &MachineState,
    memory: &GuestRam,
    wall_at_birth: u64,
    stream: &TcpStream,
) -> Result<u64, SavedError> {
    let counted = Counted { stream, bytes: 0 };
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, counted))?;
    writer.section(CLOCK_TAG, CLOCK_SCHEMA, &wall_at_birth)?;
    save_machine(&mut writer, state, memory)?;
    let mut stream = writer.finish()?;
    stream.flush().map_err(transfer::Error::from)?;
    Ok(stream.get_ref().bytes)
}

/// A stream that counts what is written to it.
struct Counted<'a> {
    stream: &'a TcpStream,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let len = self.stream.write(data)?;
        self.bytes += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}
