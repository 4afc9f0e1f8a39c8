//! Talking vhost-user to the daemon: negotiation, handing over an arena, registers.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use uuid::Uuid;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserSharedMsg};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use ring::VringLayout;

use super::session::{QueueEvents, SessionMemory};
use super::{Error, io_error};
use crate::config_space::{
    BulkId, COMMAND_AT, Command, IDENTITY_AT, IDENTITY_LEN, Identity, QUEUE_DELIVERY, QUEUE_EVENT,
    QUEUE_LOG, QUEUES, STATUS_AT, STATUS_LEN, Status, TUNING_AT, Tuning,
};
use crate::daemon::control::{FEATURES, protocol_features};

/// A negotiated vhost-user connection.
pub(super) struct Wire {
    frontend: Frontend,
    socket: UnixStream,
    /// A session's queues were handed over and not taken back.
    queues_run: bool,
}

fn vhost(what: &'static str) -> impl FnOnce(vhost::Error) -> Error {
    move |source| Error::Vhost { what, source }
}

/// Connects to the daemon at `path` and checks that it is one of this version.
///
/// # Errors
/// See [`Error`].
pub fn check_daemon(path: &Path) -> Result<Identity, Error> {
    let socket = UnixStream::connect(path).map_err(io_error("connect to the daemon"))?;
    Wire::negotiate(socket)?.identity()
}

impl Wire {
    /// Negotiates features over a fresh connection and takes ownership.
    pub(super) fn negotiate(socket: UnixStream) -> Result<Self, Error> {
        let kept = socket
            .try_clone()
            .map_err(io_error("duplicate the daemon's socket"))?;
        let mut frontend = Frontend::from_stream(socket, QUEUES as u64);
        let offered = frontend.get_features().map_err(vhost("GET_FEATURES"))?;
        if offered & FEATURES != FEATURES {
            return Err(Error::Feature(
                "VERSION_1, EVENT_IDX, IN_ORDER or PROTOCOL_FEATURES",
            ));
        }
        let protocol = frontend
            .get_protocol_features()
            .map_err(vhost("GET_PROTOCOL_FEATURES"))?;
        if !protocol.contains(protocol_features()) {
            return Err(Error::Feature("MQ, REPLY_ACK, CONFIG or SHARED_OBJECT"));
        }
        frontend
            .set_protocol_features(protocol_features())
            .map_err(vhost("SET_PROTOCOL_FEATURES"))?;
        // From here on every request is answered.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        debug_assert!(protocol_features().contains(VhostUserProtocolFeatures::REPLY_ACK));
        frontend.set_owner().map_err(vhost("SET_OWNER"))?;
        frontend
            .set_features(FEATURES)
            .map_err(vhost("SET_FEATURES"))?;
        let mut this = Self {
            frontend,
            socket: kept,
            queues_run: false,
        };
        this.identity()?;
        Ok(this)
    }

    /// The socket, to notice its end.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    fn read(&mut self, at: u32, len: usize) -> Result<Vec<u8>, Error> {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self
            .frontend
            .get_config(at, len as u32, flags, &vec![0; len])
            .map_err(vhost("GET_CONFIG"))?;
        Ok(bytes)
    }

    fn write(&mut self, at: u32, bytes: &[u8], what: &'static str) -> Result<(), Error> {
        self.frontend
            .set_config(at, VhostUserConfigFlags::WRITABLE, bytes)
            .map_err(vhost(what))
    }

    pub(super) fn identity(&mut self) -> Result<Identity, Error> {
        Ok(Identity::decode(&self.read(IDENTITY_AT, IDENTITY_LEN)?)?)
    }

    pub(super) fn status(&mut self) -> Result<Status, Error> {
        Ok(Status::decode(&self.read(STATUS_AT, STATUS_LEN)?)?)
    }

    pub(super) fn tune(&mut self, tuning: &Tuning) -> Result<(), Error> {
        tuning.validate()?;
        self.write(TUNING_AT, &tuning.encode(), "change limits")
    }

    pub(super) fn command(&mut self, command: &Command) -> Result<(), Error> {
        let what = match command {
            Command::Open(_) => "open a session",
            Command::Close => "close the session",
            Command::Bulk(_) => "open a bulk stream",
        };
        self.write(COMMAND_AT, &command.encode(), what)
    }

    /// Fetches the socket of a bulk stream.
    pub(super) fn fetch_bulk(&mut self, id: BulkId) -> Result<TcpStream, Error> {
        let message = VhostUserSharedMsg {
            uuid: Uuid::from_bytes(id.0),
        };
        let file: File = self
            .frontend
            .get_shared_object(&message)
            .map_err(vhost("GET_SHARED_OBJECT"))?;
        Ok(TcpStream::from(OwnedFd::from(file)))
    }

    /// Takes the queues of the last session back, if they still run: a session that was closed leaves
    /// them to the daemon.
    pub(super) fn stop_queues(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.queues_run) {
            return Ok(());
        }
        for index in 0..QUEUES {
            self.frontend
                .get_vring_base(index)
                .map_err(vhost("GET_VRING_BASE"))?;
        }
        Ok(())
    }

    /// Hands over the arena and its queues; the daemon goes on where the rings say.
    pub(super) fn hand_over(
        &mut self,
        memory: &SessionMemory,
        event_queue: &QueueEvents,
    ) -> Result<(), Error> {
        self.queues_run = true;
        let base = memory.mapping.as_ptr() as u64;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.layout.len,
            userspace_addr: base,
            mmap_offset: 0,
            mmap_handle: std::os::fd::AsFd::as_fd(&memory.arena).as_raw_fd(),
        };
        self.frontend
            .set_mem_table(&[region])
            .map_err(vhost("SET_MEM_TABLE"))?;
        let layout = &memory.layout;
        let [log, delivery, event] = memory.bases()?;
        let (logs, deliveries) = (&memory.log_events, &memory.delivery_events);
        self.start(QUEUE_LOG, &layout.log_ring, base, log, logs)?;
        self.start(
            QUEUE_DELIVERY,
            &layout.delivery_ring,
            base,
            delivery,
            deliveries,
        )?;
        self.start(QUEUE_EVENT, &layout.event_ring, base, event, event_queue)
    }

    fn start(
        &mut self,
        index: usize,
        ring: &VringLayout,
        user: u64,
        base: u16,
        events: &QueueEvents,
    ) -> Result<(), Error> {
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: user + ring.desc,
            used_ring_addr: user + ring.used,
            avail_ring_addr: user + ring.avail,
            log_addr: None,
        };
        let (kick, call) = (events.kick.for_vhost()?, events.call.for_vhost()?);
        let frontend = &mut self.frontend;
        frontend
            .set_vring_num(index, ring.size)
            .and_then(|()| frontend.set_vring_base(index, base))
            .and_then(|()| frontend.set_vring_addr(index, &config))
            .and_then(|()| frontend.set_vring_call(index, &call))
            .and_then(|()| frontend.set_vring_kick(index, &kick))
            .and_then(|()| frontend.set_vring_enable(index, true))
            .map_err(vhost("start a queue"))
    }
}
