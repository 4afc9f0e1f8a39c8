//! The control thread's side of vhost-user: messages of the VMM become commands for the data thread.
//!
//! Nothing of the VMM is trusted: indices, addresses, sizes and files are checked here or where they
//! are used. Before GET_VRING_BASE or SET_MEM_TABLE is answered the data thread has let go of what is
//! taken away. A refused request is answered with an error and changes nothing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};

use super::bulk::BulkStreams;
use super::engine::{Command, EngineHandle, QueueSetup, Refused};
use super::memory::{DeviceMemory, Region};
use super::peer::Peers;
use crate::config_space::{
    self, BulkId, COMMAND_AT, IDENTITY_AT, Identity, QUEUES, SPACE_LEN, STATUS_AT, TUNING_AT,
    Tuning,
};
use ring::{MAX_RING_SIZE, VringLayout};

/// `VIRTIO_RING_F_EVENT_IDX` (virtio 1.2, 6).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_IN_ORDER`.
pub const F_IN_ORDER: u64 = 1 << 35;

/// The features of the device. All but in-order use are mandatory.
pub const FEATURES: u64 =
    F_EVENT_IDX | F_VERSION_1 | F_IN_ORDER | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The protocol features of the device.
#[must_use]
pub fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::SHARED_OBJECT
}

#[derive(Default)]
struct Vring {
    size: u16,
    /// Addresses in the VMM: descriptors, used, available.
    at: Option<(u64, u64, u64)>,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    started: bool,
}

/// What one VMM has told.
pub struct Control {
    engine: EngineHandle,
    peers: Peers,
    bulk: Arc<BulkStreams>,
    features: u64,
    memory: Option<Arc<DeviceMemory>>,
    vrings: [Vring; QUEUES],
}

impl Control {
    /// The state of a VMM that has told nothing yet.
    pub fn new(engine: EngineHandle, peers: Peers, bulk: Arc<BulkStreams>) -> Self {
        Self {
            engine,
            peers,
            bulk,
            features: 0,
            memory: None,
            vrings: Default::default(),
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts a queue of which all is known and which is enabled.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let vring = &mut self.vrings[index];
        let Some((desc, used, avail)) = vring.at.filter(|_| vring.enabled && !vring.started) else {
            return Ok(());
        };
        let Some(kick) = &vring.kick else {
            return Ok(());
        };
        let mandatory = F_VERSION_1 | F_EVENT_IDX;
        if self.features & mandatory != mandatory {
            return Err(Error::FeatureMismatch);
        }
        let offset = |address| memory.of_user(address).ok_or(Error::InvalidParam);
        let setup = QueueSetup {
            index,
            memory: Arc::clone(memory),
            layout: VringLayout {
                size: vring.size,
                desc: offset(desc)?,
                avail: offset(avail)?,
                used: offset(used)?,
            },
            base: vring.base,
            in_order: self.features & F_IN_ORDER != 0,
            kick: Some(duplicate(kick)?),
            call: vring.call.as_ref().map(duplicate).transpose()?,
        };
        let started = self
            .engine
            .ask(|reply| Command::StartQueue(Box::new(setup), reply));
        settle(started.and_then(|result| result))?;
        self.vrings[index].started = true;
        Ok(())
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        let vring = &mut self.vrings[index];
        if vring.started {
            let base = self.engine.ask(|reply| Command::StopQueue(index, reply));
            vring.base = settle(base)?;
            vring.started = false;
        }
        Ok(())
    }

    fn restart(&mut self, index: usize) -> Result<()> {
        if self.vrings[index].started {
            self.stop(index)?;
        }
        self.start_if_ready(index)
    }

    fn forget(&mut self) -> Result<()> {
        let forgotten = self.engine.ask(Command::Forget);
        settle(forgotten.and_then(|result| result))?;
        self.memory = None;
        self.vrings = Default::default();
        Ok(())
    }

    fn command(&mut self, bytes: &[u8]) -> Result<()> {
        match config_space::Command::decode(bytes).map_err(invalid)? {
            config_space::Command::Open(params) => {
                self.peers.check(&params).map_err(invalid)?;
                let opened = self.engine.ask(|reply| Command::Open(params, reply));
                settle(opened.and_then(|result| result))
            }
            config_space::Command::Close => {
                self.bulk.clear();
                settle(self.engine.ask(Command::Close))
            }
            config_space::Command::Bulk(id) => self.peers.bulk(id).map_err(invalid),
        }
    }
}

fn duplicate(file: &File) -> Result<OwnedFd> {
    Ok(OwnedFd::from(
        file.try_clone().map_err(Error::ReqHandlerError)?,
    ))
}

fn settle<T>(result: std::result::Result<T, Refused>) -> Result<T> {
    result.map_err(|error| match error {
        // Without the data thread there is nothing to serve: the VMM's connection ends.
        Refused::Gone => Error::BackendInternalError,
        refused => invalid(refused),
    })
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    tracing::warn!(error = &error as &dyn std::error::Error, "request refused");
    Error::ReqHandlerError(io::Error::other(error))
}

impl VhostUserBackendReqHandlerMut for Control {
    fn set_owner(&mut self) -> Result<()> {
        self.forget()
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.forget()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.forget()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let ([region], Ok([file])) = (regions, <[File; 1]>::try_from(files)) else {
            return Err(Error::InvalidParam);
        };
        let region = Region {
            guest: region.guest_phys_addr,
            len: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        };
        let memory = DeviceMemory::new(region, file).map_err(invalid)?;
        let running: Vec<usize> = (0..QUEUES).filter(|i| self.vrings[*i].started).collect();
        for index in &running {
            self.stop(*index)?;
        }
        let memory = Arc::new(memory);
        let ours = Arc::clone(&memory);
        let taken = self.engine.ask(|reply| Command::SetMemory(ours, reply));
        settle(taken.and_then(|result| result))?;
        self.memory = Some(memory);
        for index in running {
            self.start_if_ready(index)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= MAX_RING_SIZE)
            .ok_or(Error::InvalidParam)?;
        let vring = self.vring(index)?;
        if vring.started {
            return Err(Error::InvalidOperation("the queue runs"));
        }
        vring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.started {
            return Err(Error::InvalidOperation("the queue runs"));
        }
        vring.at = Some((descriptor, used, available));
        self.start_if_ready(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let vring = self.vring(index)?;
        if vring.started {
            return Err(Error::InvalidOperation("the queue runs"));
        }
        vring.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize)?;
        let vring = self.vring(index)?;
        vring.kick = None;
        vring.call = None;
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?.kick = fd;
        self.restart(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        if let Some(file) = &fd {
            let flags = rustix::fs::fcntl_getfl(file).map_err(|_| Error::InvalidParam)?;
            if !flags.contains(OFlags::NONBLOCK) {
                return Err(Error::InvalidOperation(
                    "a call eventfd must be a non-blocking one",
                ));
            }
        }
        self.vring(index.into())?.call = fd;
        self.restart(index.into())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !protocol_features().bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.start_if_ready(index as usize)
        } else {
            self.stop(index as usize)
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut space = [0; SPACE_LEN];
        let mut put = |at: u32, bytes: &[u8]| {
            space[at as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        let (status, tuning) = settle(self.engine.ask(Command::Status))?;
        put(IDENTITY_AT, &Identity::default().encode());
        put(TUNING_AT, &tuning.encode());
        put(STATUS_AT, &status.encode());
        let start = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let end = start
            .checked_add(size as usize)
            .ok_or(Error::InvalidParam)?;
        space
            .get(start..end)
            .map(<[u8]>::to_vec)
            .ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        match offset {
            TUNING_AT => {
                let tuning = Tuning::decode(bytes).map_err(invalid)?;
                settle(self.engine.tell(Command::Tune(tuning)))
            }
            COMMAND_AT => self.command(bytes),
            _ => Err(Error::InvalidParam),
        }
    }

    fn get_shared_object(&mut self, uuid: VhostUserSharedMsg) -> Result<File> {
        let id = BulkId(*uuid.uuid.as_bytes());
        let socket = self.bulk.take(id).ok_or(Error::InvalidParam)?;
        Ok(File::from(OwnedFd::from(socket)))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no display"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation(
            "the rings themselves say what is in flight",
        ))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation(
            "the rings themselves say what is in flight",
        ))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidOperation("the arena is one region"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("the arena is one region"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation(
            "the device has no state beyond the arena",
        ))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation(
            "the device has no state beyond the arena",
        ))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory of the device"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}
