//! A host and what runs on it: kernel, VMM, daemon, and the memory that the two share.
//!
//! Domains of failure: the host takes everything with it; VMM and daemon die and pause apart from each
//! other, and the shared memory lives as long as one of them does.

use std::collections::VecDeque;

use format::SessionId;
use ft::directory::DirectoryCall;
use ft::{Actions, CallId, Event, GateLimits, HostId, OutputGate, Replica, Time};

use crate::guest::Effect;

use super::backup::Follow;
use super::channel::{Daemon, Shm};
use super::primary::{Live, Log};

/// How a VMM is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartAs {
    Standby,
    Boot,
}

/// A host.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) id: HostId,
    pub(super) up: bool,
    /// Which run of the kernel it is.
    pub(super) boot: u32,
    offset: u64,
    drift_ppm: i64,
    pub(super) vmm: Option<Box<Vmm>>,
    pub(super) daemon: Option<Daemon>,
    pub(super) shm: Option<Box<Shm>>,
    pub(super) vmm_paused: u64,
    pub(super) daemon_paused: u64,
    slow: (u64, u64),
    /// Ticks of the VMM's loop, in a page that its kernel reads.
    pub(super) progress: u64,
    /// The session whose heartbeats are answered.
    pub(super) beats: Option<SessionId>,
    /// Requests of this run of the kernel that are on their way to the storage.
    pub(super) ios: u32,
    pub(super) start_as: StartAs,
    /// The newest decision to start the VMM; older ones are void.
    pub(super) ticket: u32,
    /// A start is on its way.
    pub(super) starting: bool,
    pub(super) world_gone: u64,
    pub(super) heard_at: u64,
}

impl Host {
    pub(super) fn new(index: usize, offset: u64, drift_ppm: i64) -> Self {
        Self {
            id: host_id(index),
            up: true,
            boot: 1,
            offset,
            drift_ppm,
            vmm: None,
            daemon: None,
            shm: None,
            vmm_paused: 0,
            daemon_paused: 0,
            slow: (0, 1),
            progress: 0,
            beats: None,
            ios: 0,
            start_as: StartAs::Standby,
            ticket: 0,
            starting: false,
            world_gone: 0,
            heard_at: 0,
        }
    }

    /// The host's own monotonic clock.
    pub(super) fn clock(&self, now: u64) -> Time {
        let drift = i128::from(now) * i128::from(self.drift_ppm) / 1_000_000;
        Time((i128::from(self.offset) + i128::from(now) + drift) as u64)
    }

    /// When the host's clock shows `time`.
    pub(super) fn when(&self, time: Time) -> u64 {
        let local = i128::from(time.0) - i128::from(self.offset);
        let now = local * 1_000_000 / (1_000_000 + i128::from(self.drift_ppm));
        // Rounded up, so that the deadline has passed then.
        u64::try_from(now).unwrap_or(0) + 2
    }

    pub(super) fn starve(&mut self, until: u64, factor: u64) {
        self.slow = (until, factor);
    }

    pub(super) fn slowness(&self, now: u64) -> u64 {
        if now < self.slow.0 { self.slow.1 } else { 1 }
    }

    pub(super) fn state(&self) -> &'static str {
        match &self.vmm {
            _ if !self.up => "down",
            None => "no vmm",
            Some(vmm) => vmm.replica.status().state,
        }
    }
}

/// An effect in the gate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) effect: Effect,
    /// The position that must be acknowledged, in the log of this session.
    pub(super) needs: u64,
    pub(super) session: Option<SessionId>,
    /// It came while the gate was open: it may go out whatever the gate does later.
    pub(super) free: bool,
}

/// The VMM's process: its protocol and its threads.
#[derive(Debug)]
pub(super) struct Vmm {
    pub(super) inc: u32,
    pub(super) replica: Replica,
    pub(super) inbox: VecDeque<Event>,
    pub(super) actions: Actions,
    /// When the loop is to run next; later wake-ups are void.
    pub(super) wake_at: u64,
    pub(super) gate: OutputGate<Waiting>,
    pub(super) gate_at: u64,
    /// An effect that was let out and has not happened yet.
    pub(super) between: Option<(u64, Waiting)>,
    pub(super) released: u64,
    pub(super) live: Option<Box<Live>>,
    pub(super) log: Option<Box<Log>>,
    pub(super) follow: Option<Box<Follow>>,
    pub(super) calls: VecDeque<(CallId, DirectoryCall)>,
    /// Registration at the storage with which this VMM writes.
    pub(super) registration: u64,
    pub(super) watched: Option<(usize, SessionId)>,
    pub(super) vcpu_at: u64,
    pub(super) replay_at: u64,
}

impl Vmm {
    pub(super) fn new(inc: u32, replica: Replica, gate_count: usize) -> Self {
        let limits = GateLimits {
            count: gate_count,
            gap: std::time::Duration::from_millis(100),
            ..GateLimits::default()
        };
        Self {
            inc,
            replica,
            inbox: VecDeque::new(),
            actions: Actions::new(),
            wake_at: u64::MAX,
            gate: OutputGate::new(limits),
            gate_at: u64::MAX,
            between: None,
            released: 0,
            live: None,
            log: None,
            follow: None,
            calls: VecDeque::new(),
            registration: 0,
            watched: None,
            vcpu_at: u64::MAX,
            replay_at: u64::MAX,
        }
    }
}

/// The name of a host.
pub(super) fn host_id(index: usize) -> HostId {
    const NAMES: [&str; crate::plan::MAX_HOSTS] = ["host0", "host1", "host2", "host3"];
    NAMES[index].parse().expect("these are names of hosts")
}

/// The number of a host.
pub(super) fn host_index(id: HostId) -> usize {
    usize::from(id.as_str().as_bytes()[4] - b'0')
}
