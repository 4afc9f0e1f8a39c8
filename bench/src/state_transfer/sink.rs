//! The other host: a process that loads what comes.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use harness::Host;
use hypervisor::{Gfn, GuestRam, PAGE_SIZE};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::thread::{CpuSet, sched_setaffinity};
use transfer::fork::{self, Child};
use transfer::{Item, Reader};

use super::pages::CHUNK;
use crate::Failure;

/// Where it runs.
const CPU: usize = 1;

/// See the module.
pub(super) struct Sink {
    stream: TcpStream,
    loader: Child,
}

impl Sink {
    /// On `host`, at its address, with `memory` MiB. The calling thread's host connects to it, and it ends with
    /// the calling thread.
    pub(super) fn on(host: &Host, address: Ipv4Addr, memory: u16) -> Result<Self, Failure> {
        let listener = host.run(|| TcpListener::bind((address, 0)))?;
        let to = listener.local_addr()?;
        let loader = fork::start(Some(listener.as_fd()), || {
            load(&listener, memory).map_err(|error| error.to_string())
        })?;
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, loader })
    }

    /// What goes to it.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Waits until it has all.
    pub(super) fn wait(&self) -> Result<(), Failure> {
        let read = (&self.stream).read_exact(&mut [0]);
        read.map_err(|error| format!("the other host did not load the state: {error}").into())
    }

    /// Whether it has all by now.
    pub(super) fn has_all(&self) -> Result<bool, Failure> {
        // Not by a flag of the socket: a child that writes to it has that, too.
        match recv(&self.stream, &mut [0_u8; 1][..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err("the other host did not load the state".into()),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The digest of the memory that it has loaded.
    pub(super) fn digest(self) -> Result<u64, Failure> {
        drop(self.stream);
        Ok(self.loader.wait()?)
    }
}

fn load(listener: &TcpListener, memory: u16) -> Result<u64, Failure> {
    let mut cpus = CpuSet::new();
    cpus.set(CPU);
    sched_setaffinity(None, &cpus)?;
    let (stream, _) = listener.accept()?;
    let ram = GuestRam::new(u64::from(memory) << 20)?;
    let mut reader = Reader::new(BufReader::with_capacity(CHUNK, &stream))?;
    while let Some(item) = reader.next_item()? {
        let Item::Pages { first, bytes } = item else {
            continue;
        };
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        for (gfn, page) in (first..).zip(pages) {
            ram.write_page(Gfn(gfn), page)?;
        }
    }
    (&stream).write_all(&[1])?;
    Ok(ram.digest()?)
}
