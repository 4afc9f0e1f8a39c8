//! What the guest's frames on the client's network tell of who acts in its name.
//!
//! ```text
//! socket: every frame at the switch's ports, with time and port ──> frame: what it is
//!    ──> judge: one sender at a time, and one content ──> stream: of each TCP connection
//! ```
//! Checked: (1) when one host has begun to send in the guest's name, the one before it sends nothing new:
//! a late frame of it repeats a frame that was seen, or its TCP bytes are those that the stream has at that
//! place, or that the new sender leaves out because it takes them for sent; (2) no two frames, whoever sent
//! them, put different bytes at one place of a TCP stream.
//!
//! Not covered: what an old primary sends that the switch does not get, as when its cable is pulled; what the
//! disk sees; TCP options and the order of frames within the stream.

mod frame;
mod judge;
mod socket;
mod stream;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

pub(crate) use judge::{Handover, Judge, Verdict};

use crate::Failure;
use crate::stage::{SITES, SiteId, Stage};

/// A thread that watches the switch. Ended when it goes out of scope.
pub(crate) struct Watch {
    judge: Arc<Mutex<Judge>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64, String>>>,
}

impl Watch {
    /// Begins to watch the network between the client and the hosts.
    pub(crate) fn start(stage: &Stage) -> Result<Self, Failure> {
        let switch = stage.lan().host();
        let ports = SITES.map(|id| (stage.site(id).lan().at_switch().to_owned(), id));
        let (socket, ports) = switch.run(move || -> std::io::Result<_> {
            let socket = socket::PacketSocket::open()?;
            let indices = ports.map(|(name, id)| Ok((socket::index_of(&name)?, id)));
            let ports: BTreeMap<u32, SiteId> = indices
                .into_iter()
                .collect::<std::io::Result<BTreeMap<_, _>>>()?;
            Ok((socket, ports))
        })?;
        let judge = Arc::new(Mutex::new(Judge::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, stopped) = (Arc::clone(&judge), Arc::clone(&stop));
        let thread = std::thread::spawn(move || watch(socket, &ports, &seen, &stopped));
        Ok(Self {
            judge,
            stop,
            thread: Some(thread),
        })
    }

    /// A host may send in the guest's name again: its VMM holds none of the old state any more.
    pub(crate) fn readmit(&self, id: SiteId) {
        self.with(|judge| judge.readmit(id));
    }

    /// The changes of sender so far.
    pub(crate) fn handovers(&self) -> Vec<Handover> {
        self.with(|judge| judge.handovers().to_vec())
    }

    /// How many frames in the guest's name were seen so far.
    pub(crate) fn frames(&self) -> u64 {
        self.with(|judge| judge.verdict().frames)
    }

    /// Ends it; the verdict on all that was seen.
    ///
    /// # Errors
    /// Not everything was seen.
    pub(crate) fn finish(mut self) -> Result<Verdict, Failure> {
        let missed = self.end()?;
        if missed > 0 {
            return Err(format!(
                "{missed} frames passed unseen: the verdict would be worth nothing"
            )
            .into());
        }
        Ok(self.with(|judge| judge.verdict()))
    }

    fn with<T>(&self, job: impl FnOnce(&mut Judge) -> T) -> T {
        job(&mut self.judge.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) -> Result<u64, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(missed)) => Ok(missed?),
            Some(Err(_)) => Err("the thread that watches the wire has panicked".into()),
            None => Ok(0),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // An end that is not asked for has no use for the verdict.
        let _ = self.end();
    }
}

/// Until it is stopped; how many frames passed unseen.
fn watch(
    mut socket: socket::PacketSocket,
    ports: &BTreeMap<u32, SiteId>,
    judge: &Mutex<Judge>,
    stop: &AtomicBool,
) -> Result<u64, String> {
    loop {
        // Looked at before: what had come when it was stopped is still taken.
        let stopped = stop.load(Ordering::Relaxed);
        match socket
            .receive()
            .map_err(|e| format!("watching the wire: {e}"))?
        {
            Some(packet) => {
                if let Some(id) = ports.get(&packet.interface) {
                    let mut judge = judge.lock().unwrap_or_else(PoisonError::into_inner);
                    judge.frame(*id, packet.at, packet.bytes);
                }
            }
            None if stopped => return socket.missed().map_err(|e| e.to_string()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::Interrupt;
    use harness::privileges;
    use std::net::UdpSocket;

    #[test]
    fn frames_are_seen_with_the_host_that_they_come_from() {
        if !privileges::root("frames_are_seen_with_the_host_that_they_come_from") {
            return;
        }
        let stage = Stage::empty(&Interrupt::default()).unwrap();
        let watch = Watch::start(&stage).unwrap();
        for (id, count) in [(SITES[0], 1), (SITES[2], 2)] {
            let host = stage.site(id).host();
            let set = ["link", "set", "br0", "address", "02:50:4c:58:00:01"];
            host.command("ip", &set).unwrap();
            host.command("ip", &["addr", "add", "10.77.0.2/24", "dev", "br0"])
                .unwrap();
            let socket = host.run(|| UdpSocket::bind("10.77.0.2:7")).unwrap();
            harness::wait_until("a frame of this host", || {
                // May be refused at first, as long as nobody has answered for the address.
                let _ = socket.send_to(b"hello", "10.77.0.1:7");
                watch.handovers().len() == count
            })
            .unwrap();
            let last = *watch.handovers().last().unwrap();
            assert_eq!(last.to, id);
            let age = crate::monotonic::Moment::now().since(last.first);
            assert!(age < 30_000_000_000, "{age} ns old");
        }
        let verdict = watch.finish().unwrap();
        assert!(verdict.frames >= 2, "{verdict:?}");
    }
}
