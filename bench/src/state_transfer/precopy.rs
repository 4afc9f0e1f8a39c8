//! Transfer round after round: what was written to in one is sent again in the next, the last one while the
//! guest stands.

use std::io::BufWriter;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use hypervisor::kvm::KvmVm;
use hypervisor::{DirtyBitmap, VcpuState, Vm};
use transfer::Writer;

use super::guest::Guest;
use super::pages::{CHUNK, finish, send};
use super::sink::Sink;
use super::{Arrived, Transferred};
use crate::Failure;

/// A round with so few pages is the last.
const FEW_PAGES: u64 = 64;
/// Rounds at most, if there never are so few.
const MAX_ROUNDS: u64 = 30;

/// A round after the first.
struct Order {
    pages: DirtyBitmap,
    /// With the last round.
    state: Option<VcpuState>,
}

/// What the rounds came to for the guest.
struct Stood {
    rounds: u64,
    /// The longest time for which it stood between two rounds.
    longest: Duration,
    /// Since when it stands.
    since: Instant,
}

/// Does it.
pub(super) fn transfer(guest: &mut Guest, sink: Sink) -> Result<Transferred, Failure> {
    let (start, before) = (Instant::now(), guest.begin());
    let machine = guest.machine();
    let (order, orders) = channel();
    let (tell, told) = channel();
    let (sent, stood) = std::thread::scope(|scope| {
        let stream = sink.stream();
        let sender = scope.spawn(move || {
            send_rounds(stream, &machine, &orders, &tell).map_err(|error| error.to_string())
        });
        let stood = run_rounds(guest, &order, &told);
        drop(order);
        let sent = sender.join().map_err(|_| "the sender panicked")??;
        sink.wait()?;
        Ok::<_, Failure>((sent, stood?))
    })?;
    let stop = stood.since.elapsed().max(stood.longest);
    let (complete, gap) = (start.elapsed(), guest.longest_gap().max(stop));
    guest.set_dirty_log(false)?;
    Ok(Transferred {
        stop,
        gap,
        complete,
        written: guest.written() - before,
        sent,
        rounds: stood.rounds,
        arrived: Arrived {
            expected: guest.memory().digest()?,
            found: sink.digest()?,
        },
    })
}

/// Runs the guest until the last round is ordered.
fn run_rounds(
    guest: &mut Guest,
    order: &Sender<Order>,
    told: &Receiver<()>,
) -> Result<Stood, Failure> {
    let mut stood = Stood {
        rounds: 1,
        longest: Duration::ZERO,
        since: Instant::now(),
    };
    loop {
        guest.run()?;
        match told.try_recv() {
            Ok(()) => {}
            Err(TryRecvError::Empty) => continue,
            // Its thread says why.
            Err(TryRecvError::Disconnected) => return Ok(stood),
        }
        stood.since = Instant::now();
        let pages = guest.dirty_log()?;
        stood.rounds += 1;
        let is_last = pages.count() <= FEW_PAGES || stood.rounds == MAX_ROUNDS;
        let state = if is_last { Some(guest.save()?) } else { None };
        // Its thread says why it is gone.
        let _ = order.send(Order { pages, state });
        if is_last {
            return Ok(stood);
        }
        stood.longest = stood.longest.max(stood.since.elapsed());
    }
}

/// Sends all memory, then what is ordered, and tells of each round that is sent: how many pages in all.
fn send_rounds(
    stream: &TcpStream,
    machine: &KvmVm,
    orders: &Receiver<Order>,
    tell: &Sender<()>,
) -> Result<u64, Failure> {
    let memory = machine.memory();
    // In this order, and beside the running guest: what is written to from here on is sent again.
    machine.set_dirty_log(true)?;
    let all = memory.touched_pages()?;
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, stream))?;
    let mut sent = send(&mut writer, memory, &all)?;
    loop {
        writer.flush()?;
        // Nobody listens: then there is no further order.
        let _ = tell.send(());
        let Order { pages, state } = orders.recv().map_err(|_| "no last round was ordered")?;
        sent += send(&mut writer, memory, &pages)?;
        if let Some(state) = state {
            finish(writer, &state)?;
            return Ok(sent);
        }
    }
}
