//! Transfer by a child with a copy-on-write image of memory. The dirty log is switched on before, as Pollux does
//! beside the running vCPU, since it logs from there on.

use std::io::BufWriter;
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Instant;

use transfer::Writer;

use super::guest::Guest;
use super::pages::{CHUNK, finish, send};
use super::sink::Sink;
use super::{Arrived, Transferred};
use crate::Failure;

/// Does it.
pub(super) fn transfer(guest: &mut Guest, sink: Sink) -> Result<Transferred, Failure> {
    guest.set_dirty_log(true)?;
    let expected = guest.memory().digest()?;
    let (start, before) = (Instant::now(), guest.begin());
    let state = guest.save()?;
    guest.dirty_log()?;
    let memory = guest.memory();
    let child = transfer::fork::start(Some(sink.stream().as_fd()), || {
        let job = || -> Result<u64, Failure> {
            let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, sink.stream()))?;
            let sent = send(&mut writer, memory, &memory.touched_pages()?)?;
            finish(writer, &state)?;
            Ok(sent)
        };
        job().map_err(|error| error.to_string())
    })?;
    let stop = start.elapsed();
    let mut child = Sending(Some(std::thread::spawn(move || child.wait())), 0);
    while !sink.has_all()? {
        guest.run()?;
        child.look(false)?;
    }
    let (complete, gap) = (start.elapsed(), guest.longest_gap());
    let sent = child.look(true)?;
    let written = guest.written() - before;
    guest.set_dirty_log(false)?;
    Ok(Transferred {
        stop,
        gap,
        complete,
        written,
        sent,
        rounds: 1,
        arrived: Arrived {
            expected,
            found: sink.digest()?,
        },
    })
}

/// The child's end: without a look at it, one that cannot send would be waited for for ever.
struct Sending(Option<JoinHandle<Result<u64, String>>>, u64);

impl Sending {
    /// How many pages it has sent, if it has ended; waits for that or not.
    fn look(&mut self, wait: bool) -> Result<u64, Failure> {
        if let Some(thread) = self.0.take_if(|thread| wait || thread.is_finished()) {
            self.1 = thread
                .join()
                .map_err(|_| "waiting for the child panicked")??;
        }
        Ok(self.1)
    }
}
