//! What a replica is told when it is made.

use std::time::Duration;

use crate::detector::DetectorConfig;
use crate::fingerprint::Fingerprint;
use crate::names::HostId;

/// The configuration of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This host.
    pub me: HostId,
    /// The hosts that may be its backup, in the order of preference.
    pub standbys: Vec<HostId>,
    /// What a standby must match.
    pub fingerprint: Fingerprint,
    /// Whether a primary looks for a backup by itself.
    pub protect: bool,
    /// Whether the storage can cut a host off for good: then late writes are fenced, not quarantined.
    pub fencing: bool,
    /// When a peer is lost.
    pub detector: DetectorConfig,
    /// All other times.
    pub timings: Timings,
}

/// Times of the protocol; none of them matters for safety.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Messages that were not answered are sent again after this.
    pub resend: Duration,
    /// How long a standby may take to answer `Join`.
    pub join: Duration,
    /// How long a standby may make no progress before it is complete.
    pub sync_stalled: Duration,
    /// A standby behind by fewer appends than this is asked to confirm.
    pub caught_up_appends: u64,
    /// A standby that failed is tried again after this, then twice that, and so on.
    pub standby_retry: Duration,
    /// The longest of these waits.
    pub standby_retry_most: Duration,
    /// How often a primary tells its backup where it is.
    pub progress: Duration,
    /// How often hosts are asked what they hold.
    pub query: Duration,
    /// How long a standby that confirmed but is not yet named waits for the record to name it, once its
    /// primary is lost, before it renounces.
    pub unnamed: Duration,
    /// How long a relieved primary waits for its successor before it goes on itself.
    pub handover: Duration,
    /// First wait before an unreachable arbiter is asked again; doubles.
    pub arbiter_retry: Duration,
    /// The longest of these waits.
    pub arbiter_retry_most: Duration,
    /// How often a backup that cannot open image and TAP looks again.
    pub world_retry: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            resend: Duration::from_millis(100),
            join: Duration::from_secs(1),
            sync_stalled: Duration::from_secs(10),
            caught_up_appends: 1024,
            standby_retry: Duration::from_millis(500),
            standby_retry_most: Duration::from_secs(30),
            progress: Duration::from_millis(50),
            query: Duration::from_secs(1),
            unnamed: Duration::from_secs(5),
            handover: Duration::from_secs(3),
            arbiter_retry: Duration::from_millis(10),
            arbiter_retry_most: Duration::from_millis(500),
            world_retry: Duration::from_millis(200),
        }
    }
}

impl Config {
    /// A configuration of `me` with these standbys and the defaults.
    #[must_use]
    pub fn new(me: HostId, standbys: Vec<HostId>) -> Self {
        Self {
            me,
            standbys: standbys.into_iter().filter(|host| *host != me).collect(),
            fingerprint: Fingerprint::default(),
            protect: true,
            fencing: false,
            detector: DetectorConfig::default(),
            timings: Timings::default(),
        }
    }
}
