//! The daemon's side of vhost-user against a hostile frontend: messages of any kind, order, size and content, with
//! files that are not what they should be, and shared memory that nobody prepared. A real data thread on io_uring
//! carries out what passes. Nothing panics, the data thread goes on, and a well-behaved frontend is served afterwards.

#![no_main]

use std::io::{IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, mpsc};

use ring::{Arena, ArenaConfig, ArenaLayout, CONTROL_MAGIC, CONTROL_VERSION, Mapping};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::{BackendReqHandler, Error};
use vhost_ftlog::config_space::{COMMAND_AT, Reach, Role, SessionParams, TUNING_AT, Tuning, self};
use vhost_ftlog::daemon::bulk::BulkStreams;
use vhost_ftlog::daemon::control::{Control, FEATURES, protocol_features};
use vhost_ftlog::daemon::engine::uring::{Uring, UringOptions};
use vhost_ftlog::daemon::engine::{Engine, EngineConfig, EngineHandle};
use vhost_ftlog::daemon::life::monotonic_ns;
use vhost_ftlog::daemon::peer::Peers;
use vhost_ftlog::daemon::tcp::SocketOptions;
use vhost_ftlog::handshake::Key;

/// What lives as long as the process: a data thread, an arena, files of several kinds.
struct World {
    engine: EngineHandle,
    layout: ArenaLayout,
    arena: Arena,
    vmm: Mapping,
    loose: OwnedFd,
    blocking: OwnedFd,
    nonblocking: OwnedFd,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let (engine, inbox, doorbell) = EngineHandle::new().expect("an eventfd");
        let (reports, _) = mpsc::channel();
        let config = EngineConfig { linger_ns: 10_000_000, yield_in_spin: true, yield_to_called: true, clock: monotonic_ns };
        std::thread::spawn(move || {
            let ring = Uring::new(UringOptions::default()).expect("this host has io_uring");
            let engine = Engine::new(ring, config, inbox, doorbell, reports);
            let ended = engine.and_then(|mut engine| engine.run());
            // A data thread that ends is a finding, like one that panics.
            eprintln!("the data thread ended: {ended:?}");
            std::process::abort();
        });
        let config = ArenaConfig { log_ring: 8, log_bytes: 128 << 10, delivery_bytes: 2 << 20 };
        let layout = ArenaLayout::new(config).expect("legal sizes");
        let arena = Arena::create(layout.len).expect("a memfd");
        let vmm = Mapping::of_file(&arena, 0, layout.len as usize).expect("a mapping");
        World {
            engine,
            layout,
            arena,
            vmm,
            loose: memfd_create("loose", MemfdFlags::CLOEXEC).expect("a memfd"),
            blocking: eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
            nonblocking: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
        }
    })
}

/// Bytes of the input, zeros where there are no more.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// One of what would be right, or anything.
    fn one_of(&mut self, right: &[u64]) -> u64 {
        let choice = usize::from(self.byte());
        right.get(choice % (right.len() + 1)).copied().unwrap_or_else(|| self.number())
    }
}

/// Numbers of the requests, from the vhost-user specification.
mod request {
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const GET_CONFIG: u32 = 24;
    pub(super) const SET_CONFIG: u32 = 25;
}

struct Message<'w> {
    request: u32,
    body: Vec<u8>,
    file: Option<BorrowedFd<'w>>,
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn pair(index: u64, value: u64) -> Vec<u8> {
    words(&[(index & 0xffff_ffff) | value << 32])
}

fn config(at: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [at, body.len() as u32, 1] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

fn message<'w>(world: &'w World, input: &mut Input<'_>) -> Message<'w> {
    let kind = input.byte() % 16;
    let index = input.one_of(&[0, 1, 2]);
    let rings = [world.layout.log_ring, world.layout.delivery_ring, world.layout.event_ring];
    let ring = rings[index as usize % 3];
    let (request, body) = match kind {
        0 => (request::SET_OWNER, Vec::new()),
        1 => (request::SET_FEATURES, words(&[input.one_of(&[FEATURES])])),
        2 => (request::SET_PROTOCOL_FEATURES, words(&[input.one_of(&[protocol_features().bits()])])),
        3 => {
            let len = input.one_of(&[world.layout.len]);
            let (guest, user, offset) = (input.one_of(&[0]), input.one_of(&[0]), input.one_of(&[0]));
            (request::SET_MEM_TABLE, words(&[input.one_of(&[1]), guest, len, user, offset]))
        }
        4 => (request::SET_VRING_NUM, pair(index, input.one_of(&[u64::from(ring.size)]))),
        5 => {
            let used = input.one_of(&[ring.used]);
            let avail = input.one_of(&[ring.avail]);
            (request::SET_VRING_ADDR, words(&[index & 0xffff_ffff, input.one_of(&[ring.desc]), used, avail, 0]))
        }
        6 => (request::SET_VRING_BASE, pair(index, input.one_of(&[0]))),
        7 => (request::GET_VRING_BASE, pair(index, 0)),
        8 => (request::SET_VRING_KICK, words(&[index & 0x1ff])),
        9 => (request::SET_VRING_CALL, words(&[index & 0x1ff])),
        10 => (request::SET_VRING_ENABLE, pair(index, input.one_of(&[1, 0]))),
        11 => {
            let mut command = command(input).encode().to_vec();
            command[usize::from(input.byte()) % 128] ^= input.byte() & 1;
            (request::SET_CONFIG, config(COMMAND_AT, &command))
        }
        12 => {
            let mut tuning = Tuning::default().encode().to_vec();
            tuning[usize::from(input.byte()) % 20] ^= input.byte();
            (request::SET_CONFIG, config(TUNING_AT, &tuning))
        }
        13 => {
            let len = usize::from(input.byte());
            (request::GET_CONFIG, config(input.one_of(&[0, 64, 256]) as u32, &vec![0; len]))
        }
        // The arena is written while the queues run.
        14 => {
            let span = world.layout.log;
            world.vmm.write(input.number() % (span - 8), &input.number().to_le_bytes());
            (request::GET_VRING_BASE, pair(index, 0))
        }
        _ => (u32::from(input.byte()), (0..input.byte()).map(|_| input.byte()).collect()),
    };
    let file = match input.byte() % 6 {
        0 => Some(world.arena.as_fd()),
        1 => Some(world.loose.as_fd()),
        2 => Some(world.blocking.as_fd()),
        3 => Some(world.nonblocking.as_fd()),
        4 => None,
        _ => match request {
            request::SET_MEM_TABLE => Some(world.arena.as_fd()),
            request::SET_VRING_KICK => Some(world.blocking.as_fd()),
            request::SET_VRING_CALL => Some(world.nonblocking.as_fd()),
            _ => None,
        },
    };
    Message { request, body, file }
}

fn command(input: &mut Input<'_>) -> config_space::Command {
    let role = if input.byte() & 1 == 0 { Role::Sender } else { Role::Receiver };
    match input.byte() % 3 {
        0 => config_space::Command::Close,
        1 => config_space::Command::Bulk(config_space::BulkId([1; 16])),
        _ => config_space::Command::Open(SessionParams {
            session: format::SessionId([7; 16]),
            epoch: format::Epoch(1),
            role,
            reach: Reach::Listen,
        }),
    }
}

fn send(socket: &UnixStream, message: &Message<'_>) {
    let mut bytes = Vec::new();
    // Version 1, and an answer wanted.
    for word in [message.request, 1 | 8, message.body.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&message.body);
    let files: Vec<_> = message.file.into_iter().collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
    }
    // A socket whose buffer is full has lost nothing that matters.
    let _ = sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Serves all that was sent on one connection, as the daemon's control thread does.
fn serve(world: &World, socket: UnixStream) {
    let bulk = Arc::new(BulkStreams::default());
    let key = Key::new(vec![9; 32]).expect("long enough");
    let peers = Peers::new(world.engine.clone(), key, SocketOptions::default(), true, Arc::clone(&bulk));
    let control = Control::new(world.engine.clone(), peers, bulk);
    let mut handler = BackendReqHandler::from_stream(socket, Arc::new(Mutex::new(control)));
    loop {
        match handler.handle_request() {
            Ok(()) | Err(Error::ReqHandlerError(_)) => {}
            Err(Error::BackendInternalError) => panic!("the data thread does not answer"),
            Err(_) => return,
        }
    }
}

fn connection(world: &World, messages: &[Message<'_>]) -> usize {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    for message in messages {
        send(&ours, message);
    }
    let _ = (&ours).flush();
    let _ = ours.shutdown(Shutdown::Write);
    serve(world, theirs);
    let mut answers = [0; 4096];
    ours.set_nonblocking(true).expect("a socket");
    rustix::net::recv(&ours, &mut answers, rustix::net::RecvFlags::DONTWAIT).map_or(0, |(len, _)| len)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let world = world();
    world.vmm.write(0, &vec![0; world.layout.log as usize]);
    world.vmm.write(0, &CONTROL_MAGIC.to_le_bytes());
    world.vmm.write(8, &CONTROL_VERSION.to_le_bytes());
    let mut input = Input(data);
    let mut messages = Vec::new();
    while !input.0.is_empty() && messages.len() < 48 {
        messages.push(message(world, &mut input));
    }
    connection(world, &messages);
    // Whatever that was, the next frontend gets the features of the device.
    let hello = Message { request: 1, body: Vec::new(), file: None };
    assert!(connection(world, &[hello]) > 0, "the daemon does not answer");
});
