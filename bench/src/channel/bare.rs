//! Bare TCP between the two hosts: what the channel is compared with. The sockets are made as the
//! channel makes its own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use hdrhistogram::Histogram;
use vhost_ftlog::daemon::life;
use vhost_ftlog::daemon::options::Priority;
use vhost_ftlog::daemon::tcp::{Class, SocketOptions};

use super::series::{histogram, record};
use super::world::{PATIENCE, World};
use super::{Failure, Times};
use crate::monotonic::Moment;

/// Bytes of a ping and of a pong.
const PING: usize = 64;

/// How an end waits for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// In the kernel.
    Blocking,
    /// By asking the kernel again and again.
    Spinning,
}

/// Connected sockets of host A and host B.
fn connect(world: &World) -> Result<(TcpStream, TcpStream), Failure> {
    let options = SocketOptions::default();
    let listener = world.b.run(|| options.listen(world.address_b(0)))?;
    let to = listener.local_addr()?;
    let dialed = world.a.run(|| options.connect(to, Class::Log, PATIENCE))?;
    let (accepted, _) = listener.accept()?;
    Ok((dialed, accepted))
}

/// Round trips of 64 bytes.
pub(super) fn ping_pong(
    world: &World,
    times: Times,
    waiting: Waiting,
    priority: Priority,
) -> Result<Histogram<u64>, Failure> {
    let (mut a, mut b) = connect(world)?;
    let spinning = waiting == Waiting::Spinning;
    a.set_nonblocking(spinning)?;
    b.set_nonblocking(spinning)?;
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            world.b.run(|| {
                life::schedule(priority);
                let mut ping = [0; PING];
                while receive(&mut b, &mut ping)? {
                    b.write_all(&ping)?;
                }
                Ok::<_, Failure>(())
            })
        });
        let pinged = world.a.run(|| {
            life::schedule(priority);
            let pinged = ping(&mut a, times);
            a.shutdown(Shutdown::Both)?;
            pinged
        });
        let echoed = echo.join().map_err(|_| "the echo panicked")?;
        pinged.and_then(|pinged| echoed.map(|()| pinged))
    })
}

fn ping(socket: &mut TcpStream, times: Times) -> Result<Histogram<u64>, Failure> {
    let mut round_trips = histogram();
    let mut bytes = [0; PING];
    let start = Instant::now();
    loop {
        let passed = start.elapsed();
        if passed >= times.warm_up + times.case {
            return Ok(round_trips);
        }
        let sent = Moment::now();
        socket.write_all(&bytes)?;
        if !receive(socket, &mut bytes)? {
            return Err("the echo is gone".into());
        }
        if passed >= times.warm_up {
            record(&mut round_trips, Moment::now().since(sent));
        }
    }
}

/// Fills the buffer; false where the other end has closed.
fn receive(socket: &mut TcpStream, bytes: &mut [u8]) -> std::io::Result<bool> {
    let mut have = 0;
    while have < bytes.len() {
        match socket.read(&mut bytes[have..]) {
            Ok(0) => return Ok(false),
            Ok(len) => have += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// What a bare stream does with its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream {
    /// Bytes that are filled at once.
    pub(super) entry: usize,
    /// Bytes of one write().
    pub(super) write: usize,
    /// Bytes of memory that the sender walks through, and the receiver.
    pub(super) walks: (usize, usize),
    /// Whether entries are filled, and checksums made at both ends.
    pub(super) works: bool,
}

/// The most bytes of one read().
const READ: usize = 256 << 10;

impl Stream {
    /// One hot buffer at both ends, and nothing done with it.
    pub(super) const fn hot(write: usize) -> Self {
        Self {
            entry: write,
            write,
            walks: (write, write),
            works: false,
        }
    }

    /// The rate in MB/s, as the receiver sees it.
    pub(super) fn run(self, world: &World, times: Times) -> Result<f64, Failure> {
        let (a, b) = connect(world)?;
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| world.b.run(|| self.receive(b, times)));
            let sent = world.a.run(|| self.send(a, times));
            let rate = receiver.join().map_err(|_| "the receiver panicked")?;
            sent.and(rate)
        })
    }

    fn send(self, mut socket: TcpStream, times: Times) -> Result<f64, Failure> {
        let mut memory = vec![1u8; self.walks.0 - self.walks.0 % self.write];
        let start = Instant::now();
        let mut entries = 0u64;
        while start.elapsed() < times.warm_up + times.case {
            for stretch in memory.chunks_exact_mut(self.write) {
                if self.works {
                    for entry in stretch.chunks_mut(self.entry) {
                        entry.fill(entries as u8);
                        entries += 1;
                    }
                    std::hint::black_box(format::crc32c(stretch));
                }
                socket.write_all(stretch)?;
            }
        }
        Ok(0.0)
    }

    fn receive(self, mut socket: TcpStream, times: Times) -> Result<f64, Failure> {
        let mut memory = vec![0u8; self.walks.1];
        let (mut at, mut bytes, mut crc) = (0, 0u64, 0);
        let mut start = None;
        let mut counted_from = None;
        loop {
            let end = memory.len().min(at + READ);
            let len = socket.read(&mut memory[at..end])?;
            if len == 0 {
                break;
            }
            if self.works {
                crc = format::crc32c_append(crc, &memory[at..at + len]);
            }
            at = (at + len) % memory.len();
            bytes += len as u64;
            let passed = start.get_or_insert_with(Instant::now).elapsed();
            if counted_from.is_none() && passed >= times.warm_up {
                counted_from = Some((Instant::now(), bytes));
            }
        }
        std::hint::black_box(crc);
        let (since, before) = counted_from.ok_or("nothing came")?;
        Ok((bytes - before) as f64 / since.elapsed().as_secs_f64() / 1e6)
    }
}
