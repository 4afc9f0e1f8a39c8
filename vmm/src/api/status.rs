//! How things stand, as the API tells it. Times are in the unit that their names end with; floating
//! point numbers are finite.

use ft::{HostId, RoleName};
use serde::{Deserialize, Serialize};

use super::limits::Limits;

/// The whole status.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Version of the program.
    pub version: String,
    /// This process' part.
    pub role: Role,
    /// The state within it, for people.
    pub state: String,
    /// The guest stands still because an operator said so.
    pub paused: bool,
    /// This host's name; none where the VM knows of no other host.
    pub host: Option<HostId>,
    /// The newest epoch known.
    pub epoch: Option<u64>,
    /// The other host of the session.
    pub peer: Option<HostId>,
    /// On a primary: a backup could take over. On a backup: it could take over.
    pub protected: bool,
    /// How far the backup is behind.
    pub lag: Lag,
    /// What keeping the backup close costs the guest.
    pub pacing: Pacing,
    /// Outputs on their way to the world.
    pub output: Output,
    /// From an output's log entry to its acknowledgement; none before the first.
    pub ack_us: Option<Quantiles>,
    /// The log of late, in Mbit/s.
    pub log_mbit_s: f64,
    /// Exits of the guest since it was made.
    pub exits: u64,
    /// The guest's time since it was made, in seconds.
    pub virtual_time_s: f64,
    /// Other hosts, in the order of preference.
    pub standbys: Vec<StandbyReport>,
    /// The last time that this process took the VM over.
    pub last_failover: Option<Failover>,
    /// The last transfer of the VM's state from or to this process.
    pub last_transfer: Option<Transfer>,
    /// Who answers this host's heartbeats; none where no other host is known.
    pub heartbeats: Option<Heartbeats>,
    /// Divergences of replicas since the start.
    pub divergences: u64,
    /// Sectors are under quarantine.
    pub quarantine: bool,
    /// Age of this process in seconds.
    pub uptime_s: f64,
    /// The limits in force.
    pub limits: Limits,
    /// What an operator should do, if anything.
    pub advice: Vec<String>,
}

/// A role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Wants to start the VM.
    #[default]
    Booting,
    /// Runs the VM, alone or protected.
    Primary,
    /// Waits for work, or follows a primary.
    Backup,
    /// Gives everything up.
    Leaving,
    /// Has nothing left to do.
    Ended,
}

impl From<RoleName> for Role {
    fn from(role: RoleName) -> Self {
        match role {
            RoleName::Booting => Self::Booting,
            RoleName::Primary => Self::Primary,
            RoleName::Backup => Self::Backup,
            RoleName::Leaving => Self::Leaving,
            RoleName::Ended => Self::Ended,
        }
    }
}

impl Role {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Primary => "primary",
            Self::Backup => "backup",
            Self::Leaving => "leaving",
            Self::Ended => "ended",
        }
    }
}

/// How far the backup's execution is behind the primary's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// In exits.
    pub exits: u64,
    /// In ms of the vCPU's run time: what the backup has yet to run.
    pub ms: f64,
    /// The most of it since the backup caught up, in ms.
    pub most_ms: f64,
}

/// What keeping the backup close costs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pacing {
    /// Share of its time that the guest may run now, 0 to 1.
    pub share: f64,
    /// How long the guest was held for it since it runs here, in ms.
    pub held_ms: f64,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            share: 1.0,
            held_ms: 0.0,
        }
    }
}

/// Outputs on their way to the world.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// Held now, until the backup has the log up to them.
    pub held: u64,
    /// How long the oldest has been held, in ms.
    pub oldest_ms: f64,
    /// Released since the start.
    pub released: u64,
}

/// Who answers this host's heartbeats.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeats {
    /// Who, for people.
    pub answered_by: String,
    /// The kernel does: a starved host is not taken for a dead one.
    pub in_kernel: bool,
    /// The peer is told by the kernel when this process ends.
    pub exits_told: bool,
    /// Why it is not done better; empty for the best.
    pub reason: String,
}

/// A distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StandbyReport {
    /// Its name.
    pub host: HostId,
    /// Its address.
    pub address: String,
    /// What is known of it, for people.
    pub state: String,
}

/// A failover or switch-over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// Why.
    pub cause: String,
    /// When the VM ran again, in ms since 1970 (UTC) by this host's clock.
    pub at_unix_ms: u64,
    /// From the moment that the loss was noticed to the VM's running again, in ms.
    pub total_ms: f64,
    /// The stations, in their order.
    pub timeline: Vec<Part>,
}

/// A station of a failover.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// What was done.
    pub name: String,
    /// When it was done, in ms since the loss was noticed.
    pub ms: f64,
}

/// A transfer of the VM's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// The other host.
    pub peer: Option<HostId>,
    /// Bytes on the wire.
    pub bytes: u64,
    /// How long the VM stood still for it, in ms.
    pub stop_ms: f64,
    /// How long it took, in ms.
    pub total_ms: f64,
}
