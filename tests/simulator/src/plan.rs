//! What one seed means: the options of its world and the faults that come to it.
//!
//! Every option is drawn apart from the others ("swarm testing": Groce et al., 2012): a world with few
//! kinds of trouble goes deeper into each of them than one with all. The faults are a list that is drawn
//! before the run, so that one of them can be left out and all others stay what they are.

use std::time::Duration;

use ft::{DetectorConfig, LagLimits, Timings};

use crate::rng::Rng;

/// Most hosts of a world.
pub const MAX_HOSTS: usize = 4;
/// In a fault: whoever is primary when it comes.
pub const PRIMARY: usize = 8;
/// In a fault: the host that the primary's session is with.
pub const BACKUP: usize = 9;
/// The stream that says which worlds lose those who win with sectors in quarantine: one of its own, so
/// that all else stays what it was.
const RELAPSES: u64 = 6;
/// One millisecond, in ns.
pub const MS: u64 = 1_000_000;
/// One microsecond, in ns.
pub const US: u64 = 1_000;

/// The options of a world. Times are in us unless a name says otherwise, chances in ppm.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Named for what they are.
pub struct Options {
    pub hosts: usize,
    pub fencing: bool,
    pub drift_ppm: u64,
    pub clients: usize,
    pub think_us: u64,
    pub latency_us: u64,
    pub jitter_us: u64,
    pub beat_loss: u32,
    pub beat_twice: u32,
    pub message_loss: u32,
    pub batch_us: u64,
    pub frame_appends: usize,
    pub exit_us: (u64, u64),
    pub kick: u32,
    pub big_delta: u32,
    pub replay_percent: u64,
    pub stall: u32,
    pub stall_us: u64,
    pub io_us: u64,
    pub late_write: u32,
    pub late_us: u64,
    pub dir_us: u64,
    pub dir_error: u32,
    pub dir_done_error: u32,
    pub stale_us: u64,
    pub transfer_chunks: u64,
    pub chunk_us: u64,
    pub corruption: bool,
    pub trigger: u32,
    pub relapse: u32,
    pub trouble_ms: u64,
    pub gate_count: usize,
}

/// Something that goes wrong, or that somebody does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // Named for what they are.
pub enum FaultKind {
    /// Power is lost, and back after a while.
    CrashHost { host: usize, down_ms: u64 },
    /// The VMM is killed, and started again after a while.
    CrashVmm { host: usize, down_ms: u64 },
    /// The channel's daemon is killed.
    CrashDaemon { host: usize },
    /// The VMM stands still.
    PauseVmm { host: usize, ms: u64 },
    /// The daemon stands still.
    PauseDaemon { host: usize, ms: u64 },
    /// VMM and daemon stand still; the kernel answers.
    PauseBoth { host: usize, ms: u64 },
    /// Everything is slower.
    Starve { host: usize, factor: u64, ms: u64 },
    /// Nothing passes from one host to another, of these flows.
    Cut {
        from: usize,
        to: usize,
        flows: Flows,
        both: bool,
        ms: u64,
    },
    /// A host is alone.
    Isolate { host: usize, ms: u64 },
    /// Connections between two hosts are reset.
    Reset { a: usize, b: usize },
    /// A host does not reach the storage.
    CutStorage { host: usize, ms: u64 },
    /// Nobody reaches the storage.
    StorageDown { ms: u64 },
    /// Image or TAP of a host cannot be opened.
    WorldGone { host: usize, ms: u64 },
    /// All VMMs are killed; one host, or two, start the VM again.
    ColdRestart {
        host: usize,
        other: usize,
        hosts_too: bool,
    },
    /// A host whose VMM is restarted wants to start the VM, whatever others do.
    BootHere { host: usize },
    /// An operator's command to whoever is primary.
    Operator(Wish),
    /// A replica diverges.
    Corrupt { host: usize, bit: u64 },
}

impl FaultKind {
    /// The same with other hosts.
    #[must_use]
    pub fn with_hosts(mut self, who: impl Fn(usize) -> usize) -> Self {
        match &mut self {
            Self::CrashHost { host, .. }
            | Self::CrashVmm { host, .. }
            | Self::CrashDaemon { host }
            | Self::PauseVmm { host, .. }
            | Self::PauseDaemon { host, .. }
            | Self::PauseBoth { host, .. }
            | Self::Starve { host, .. }
            | Self::Isolate { host, .. }
            | Self::CutStorage { host, .. }
            | Self::WorldGone { host, .. }
            | Self::BootHere { host }
            | Self::Corrupt { host, .. } => *host = who(*host),
            Self::Cut {
                from: one,
                to: other,
                ..
            }
            | Self::Reset { a: one, b: other }
            | Self::ColdRestart {
                host: one, other, ..
            } => {
                *one = who(*one);
                *other = who(*other);
            }
            Self::StorageDown { .. } | Self::Operator(_) => {}
        }
        self
    }
}

/// What an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // Named for what they are.
pub enum Wish {
    SwitchOver,
    Fail,
    Unprotect,
    PowerOff,
    Mark,
}

/// Flows between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flows {
    /// All of them.
    All,
    /// Messages of the VMMs and state transfer.
    Messages,
    /// The logging channel.
    Log,
    /// Heartbeats.
    Beats,
}

/// A fault and when it comes, in us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub at_us: u64,
    /// What.
    pub kind: FaultKind,
}

/// All that a run depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// The world.
    pub options: Options,
    /// The trouble.
    pub faults: Vec<Fault>,
    /// Numbers of the faults at milestones that do not come, and the first that does not: all from there
    /// on are left out, too.
    pub muted: Vec<u64>,
    /// See `muted`.
    pub muted_from: u64,
}

impl Plan {
    /// The plan of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut options = Options::draw(&mut Rng::new(seed, 1));
        if Rng::new(seed, RELAPSES).chance(150_000) {
            options.relapse = 600_000;
        }
        let faults = draw_faults(&mut Rng::new(seed, 2), &options);
        Self {
            seed,
            options,
            faults,
            muted: Vec::new(),
            muted_from: u64::MAX,
        }
    }
}

impl Options {
    fn draw(rng: &mut Rng) -> Self {
        let often = |rng: &mut Rng| rng.chance(400_000);
        let some = |rng: &mut Rng, low, high| {
            if rng.chance(350_000) {
                rng.skewed(low, high)
            } else {
                0
            }
        };
        let exit_low = rng.skewed(1_000, 4_000);
        Self {
            hosts: rng.pick(&[2, 2, 3, 3, 3, 4]),
            fencing: rng.chance(200_000),
            drift_ppm: some(rng, 100, 50_000),
            clients: rng.range(1, 3) as usize,
            think_us: rng.skewed(2_000, 40_000),
            latency_us: rng.skewed(50, 2_000),
            jitter_us: some(rng, 50, 20_000),
            beat_loss: some(rng, 1_000, 300_000) as u32,
            beat_twice: some(rng, 1_000, 200_000) as u32,
            message_loss: some(rng, 1_000, 200_000) as u32,
            batch_us: rng.skewed(20, 3_000),
            frame_appends: rng.pick(&[1, 2, 5, 48, 48]),
            exit_us: (exit_low, exit_low * rng.range(1, 4)),
            kick: some(rng, 10_000, 500_000) as u32,
            big_delta: if often(rng) { 500_000 } else { 0 },
            replay_percent: rng.range(10, 90),
            stall: some(rng, 1_000, 100_000) as u32,
            stall_us: rng.skewed(100, 300_000),
            io_us: rng.skewed(100, 20_000),
            late_write: some(rng, 5_000, 300_000) as u32,
            late_us: rng.skewed(5_000, 1_500_000),
            dir_us: rng.skewed(50, 5_000),
            dir_error: some(rng, 5_000, 200_000) as u32,
            dir_done_error: some(rng, 5_000, 200_000) as u32,
            stale_us: some(rng, 1_000, 200_000),
            transfer_chunks: rng.range(1, 8),
            chunk_us: rng.skewed(500, 20_000),
            corruption: rng.chance(80_000),
            trigger: some(rng, 2_000, 150_000) as u32,
            trouble_ms: rng.range(700, 2_200),
            relapse: 0,
            gate_count: rng.pick(&[4, 16, 64, 4096]),
        }
    }

    /// The times of the protocol: shorter than the product's, and in the same order. None of them
    /// matters for safety.
    #[must_use]
    pub fn timings(&self) -> Timings {
        let ms = Duration::from_millis;
        Timings {
            resend: ms(40),
            join: ms(250),
            sync_stalled: ms(600),
            caught_up_appends: 24,
            standby_retry: ms(60),
            standby_retry_most: ms(500),
            progress: ms(25),
            query: ms(120),
            unnamed: ms(500),
            handover: ms(500),
            arbiter_retry: ms(8),
            arbiter_retry_most: ms(150),
            world_retry: ms(40),
        }
    }

    /// The time-outs of the failure detector.
    #[must_use]
    pub fn detector(&self) -> DetectorConfig {
        let ms = Duration::from_millis;
        DetectorConfig {
            probe_every: ms(20),
            host_silent: ms(100),
            unanswered: 4,
            vmm_still: ms(300),
            ack_overdue: ms(300),
            end_wait: ms(15),
        }
    }

    /// How far the backup may be behind.
    #[must_use]
    pub fn lag(&self) -> LagLimits {
        LagLimits {
            target: Duration::from_millis(10),
            span: Duration::from_millis(50),
            longest_hold: Duration::from_millis(2),
        }
    }
}

fn draw_faults(rng: &mut Rng, options: &Options) -> Vec<Fault> {
    // A seed prefers some kinds of trouble.
    let mut liked = [0u64; 17];
    for weight in &mut liked {
        *weight = rng.pick(&[0, 0, 1, 1, 4]);
    }
    let count = rng.range(1, 7);
    let mut faults: Vec<Fault> = Vec::with_capacity(count as usize);
    let mut at_us = 60_000;
    for _ in 0..count {
        // Failures come in groups: often while the one before is still being recovered from.
        let gap = if rng.chance(500_000) {
            rng.skewed(500, 60_000)
        } else {
            rng.skewed(20_000, 900_000)
        };
        at_us += gap;
        if at_us > options.trouble_ms * 1_000 {
            break;
        }
        let total: u64 = liked.iter().sum();
        let mut at = rng.below(total.max(1));
        let mut kind = 0;
        for (index, weight) in liked.iter().enumerate() {
            if at < *weight {
                kind = index;
                break;
            }
            at -= weight;
        }
        let kind = draw_kind(rng, kind, options);
        faults.push(Fault { at_us, kind });
    }
    faults
}

fn draw_kind(rng: &mut Rng, kind: usize, options: &Options) -> FaultKind {
    let hosts = options.hosts as u64;
    let host = match rng.below(10) {
        0..4 => PRIMARY,
        4..7 => BACKUP,
        _ => rng.below(hosts) as usize,
    };
    let other = match host {
        PRIMARY => BACKUP,
        BACKUP => PRIMARY,
        _ => ((host as u64 + rng.range(1, hosts - 1)) % hosts) as usize,
    };
    let ms = rng.skewed(20, 1_200);
    let down_ms = rng.skewed(5, 600);
    match kind {
        0 => FaultKind::CrashHost { host, down_ms },
        1 => FaultKind::CrashVmm { host, down_ms },
        2 => FaultKind::CrashDaemon { host },
        3 => FaultKind::PauseVmm { host, ms },
        4 => FaultKind::PauseDaemon { host, ms },
        5 => FaultKind::PauseBoth { host, ms },
        6 => FaultKind::Starve {
            host,
            factor: rng.skewed(2, 60),
            ms,
        },
        7 | 8 => FaultKind::Cut {
            from: host,
            to: other,
            flows: rng.pick(&[
                Flows::All,
                Flows::All,
                Flows::Messages,
                Flows::Log,
                Flows::Beats,
            ]),
            both: rng.chance(500_000),
            ms,
        },
        9 => FaultKind::Isolate { host, ms },
        10 => FaultKind::Reset { a: host, b: other },
        11 => FaultKind::CutStorage { host, ms },
        12 => FaultKind::StorageDown { ms },
        13 => FaultKind::WorldGone { host, ms },
        14 => {
            let hosts_too = rng.chance(500_000);
            if rng.chance(500_000) {
                FaultKind::ColdRestart {
                    host,
                    other,
                    hosts_too,
                }
            } else {
                FaultKind::BootHere { host }
            }
        }
        15 if options.corruption => FaultKind::Corrupt {
            host,
            bit: rng.below(64),
        },
        _ => FaultKind::Operator(rng.pick(&[
            Wish::SwitchOver,
            Wish::SwitchOver,
            Wish::Fail,
            Wish::Unprotect,
            Wish::PowerOff,
            Wish::Mark,
        ])),
    }
}
