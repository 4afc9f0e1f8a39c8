//! The device's configuration space: what the VMM reads and writes by GET_CONFIG and SET_CONFIG.
//!
//! Registers are little-endian. A write covers exactly one register, whole; writing the session
//! register carries the command out before it is answered.
//!
//! | offset | size | access | register |
//! |---|---|---|---|
//! | 0 | 64 | read | identity and limits ([`Identity`]) |
//! | 64 | 32 | read, write | tuning ([`Tuning`]) |
//! | 128 | 128 | write | session command ([`Command`]) |
//! | 256 | 64 | read | status ([`Status`]) |

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use format::{Epoch, MAX_APPEND_LEN, MAX_BODY_LEN, Seq, SessionId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// First word of the configuration space.
pub const MAGIC: u32 = u32::from_le_bytes(*b"PLXD");
/// Version of the device that this build is.
pub const DEVICE_VERSION: u16 = 1;
/// Bytes of the whole space.
pub const SPACE_LEN: usize = 320;
/// Where the registers are.
pub const IDENTITY_AT: u32 = 0;
/// Bytes of the identity register.
pub const IDENTITY_LEN: usize = 64;
/// Offset of the tuning register.
pub const TUNING_AT: u32 = 64;
/// Bytes of the tuning register.
pub const TUNING_LEN: usize = 32;
/// Offset of the command register.
pub const COMMAND_AT: u32 = 128;
/// Bytes of the command register.
pub const COMMAND_LEN: usize = 128;
/// Offset of the status register.
pub const STATUS_AT: u32 = 256;
/// Bytes of the status register.
pub const STATUS_LEN: usize = 64;

/// Queues of the device, in their order.
pub const QUEUE_LOG: usize = 0;
/// The delivery queue: one device-writable descriptor names the delivery ring.
pub const QUEUE_DELIVERY: usize = 1;
/// The event queue: the daemon's notices to the VMM.
pub const QUEUE_EVENT: usize = 2;
/// How many queues there are.
pub const QUEUES: usize = 3;

/// Bytes in a register that are no value of it.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("configuration space: bad {0}")]
pub struct BadRegister(pub &'static str);

/// What the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// [`DEVICE_VERSION`].
    pub version: u16,
    /// How many queues: [`QUEUES`].
    pub queues: u16,
    /// The largest append in bytes.
    pub max_append_len: u32,
    /// The largest body of a frame in bytes.
    pub max_body_len: u32,
    /// The most descriptors of a ring.
    pub max_ring: u16,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            version: DEVICE_VERSION,
            queues: QUEUES as u16,
            max_append_len: MAX_APPEND_LEN as u32,
            max_body_len: MAX_BODY_LEN as u32,
            max_ring: ring::MAX_RING_SIZE,
        }
    }
}

impl Identity {
    /// The register's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; IDENTITY_LEN] {
        let mut out = [0; IDENTITY_LEN];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[6..8].copy_from_slice(&self.queues.to_le_bytes());
        out[8..12].copy_from_slice(&self.max_append_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.max_body_len.to_le_bytes());
        out[16..18].copy_from_slice(&self.max_ring.to_le_bytes());
        out
    }

    /// Reads the register.
    ///
    /// # Errors
    /// Another device, or another version of it.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRegister> {
        let bytes = sized::<IDENTITY_LEN>(bytes, "identity: length")?;
        if u32_at(bytes, 0) != MAGIC {
            return Err(BadRegister("magic: not a logging channel"));
        }
        let version = u16_at(bytes, 4);
        if version != DEVICE_VERSION {
            return Err(BadRegister("version of the logging channel"));
        }
        Ok(Self {
            version,
            queues: u16_at(bytes, 6),
            max_append_len: u32_at(bytes, 8),
            max_body_len: u32_at(bytes, 12),
            max_ring: u16_at(bytes, 16),
        })
    }
}

/// Which of the peer's numbers returns appends to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum AckMode {
    /// The append is published to the replica's VMM.
    #[default]
    Received,
    /// The replica's VMM has replayed it.
    Replayed,
}

/// Limits that can be changed while the channel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// A batch is sent once it has this many bytes.
    pub batch_bytes: u32,
    /// A batch is sent once its first append is this old, in microseconds; where an acknowledgement is on its way,
    /// with it.
    pub batch_us: u32,
    /// The longest time that one wait spins before it sleeps, in microseconds; 0: never spin.
    pub spin_us: u32,
    /// Share of one CPU that spinning may take on average, in thousandths.
    pub spin_permille: u32,
    /// What an acknowledgement means.
    pub ack_mode: AckMode,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            batch_bytes: 64 << 10,
            batch_us: 100,
            spin_us: 0,
            spin_permille: 200,
            ack_mode: AckMode::Received,
        }
    }
}

impl Tuning {
    /// The longest batch time and the longest spin, in microseconds.
    pub const MAX_US: u32 = 1_000_000;

    /// The register's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; TUNING_LEN] {
        let mut out = [0; TUNING_LEN];
        out[0..4].copy_from_slice(&self.batch_bytes.to_le_bytes());
        out[4..8].copy_from_slice(&self.batch_us.to_le_bytes());
        out[8..12].copy_from_slice(&self.spin_us.to_le_bytes());
        out[12..16].copy_from_slice(&self.spin_permille.to_le_bytes());
        out[16] = match self.ack_mode {
            AckMode::Received => 0,
            AckMode::Replayed => 1,
        };
        out
    }

    /// Reads the register.
    ///
    /// # Errors
    /// A value out of its range.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRegister> {
        let bytes = sized::<TUNING_LEN>(bytes, "tuning: length")?;
        let tuning = Self {
            batch_bytes: u32_at(bytes, 0),
            batch_us: u32_at(bytes, 4),
            spin_us: u32_at(bytes, 8),
            spin_permille: u32_at(bytes, 12),
            ack_mode: match bytes[16] {
                0 => AckMode::Received,
                1 => AckMode::Replayed,
                _ => return Err(BadRegister("acknowledgement mode")),
            },
        };
        tuning.validate()?;
        Ok(tuning)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Which value is out of its range.
    pub fn validate(&self) -> Result<(), BadRegister> {
        if self.batch_bytes == 0 || self.batch_bytes > MAX_BODY_LEN as u32 {
            return Err(BadRegister("batch size"));
        }
        if self.batch_us > Self::MAX_US || self.spin_us > Self::MAX_US {
            return Err(BadRegister("batch time or spin time"));
        }
        if self.spin_permille > 1000 {
            return Err(BadRegister("share of CPU to spin"));
        }
        Ok(())
    }
}

/// Which way the log flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The primary's side: it sends the log.
    Sender,
    /// The backup's side: it receives the log.
    Receiver,
}

impl Role {
    /// The other side's role.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }
}

/// How a connection comes about. One side of a session dials, the other listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Wait for the peer on the daemon's listening address.
    Listen,
    /// Connect to the peer, again and again until it answers.
    Dial(SocketAddr),
}

/// A pairing and this side's part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionParams {
    /// The pairing.
    pub session: SessionId,
    /// The sender's epoch: both sides must name the same.
    pub epoch: Epoch,
    /// This side's part.
    pub role: Role,
    /// How the connection comes about.
    pub reach: Reach,
}

/// Names a bulk stream within its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BulkId(pub [u8; 16]);

/// What the VMM can ask for through the command register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Begin a session, or go on with it after the daemon was restarted.
    Open(SessionParams),
    /// End the session: when this is answered no further acknowledgement leaves (R13).
    Close,
    /// Make a second connection of the open session for a bulk stream; it comes about as the
    /// session's own did. The connected socket is fetched by GET_SHARED_OBJECT once the notice
    /// [`Notice::BulkReady`](crate::notice::Notice::BulkReady) came.
    Bulk(BulkId),
}

const OPEN: u32 = 1;
const CLOSE: u32 = 2;
const BULK: u32 = 3;

impl Command {
    /// The register's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; COMMAND_LEN] {
        let mut out = [0; COMMAND_LEN];
        let op = match self {
            Self::Open(params) => {
                encode_params(params, &mut out);
                OPEN
            }
            Self::Close => CLOSE,
            Self::Bulk(id) => {
                out[64..80].copy_from_slice(&id.0);
                BULK
            }
        };
        out[0..4].copy_from_slice(&op.to_le_bytes());
        out
    }

    /// Reads the register.
    ///
    /// # Errors
    /// Which field has no meaning.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRegister> {
        let bytes = sized::<COMMAND_LEN>(bytes, "command: length")?;
        match u32_at(bytes, 0) {
            OPEN => Ok(Self::Open(decode_params(bytes)?)),
            CLOSE => Ok(Self::Close),
            BULK => Ok(Self::Bulk(BulkId(array(bytes, 64)))),
            _ => Err(BadRegister("command")),
        }
    }
}

fn encode_params(params: &SessionParams, out: &mut [u8; COMMAND_LEN]) {
    out[4] = match params.role {
        Role::Sender => 1,
        Role::Receiver => 2,
    };
    out[8..24].copy_from_slice(&params.session.0);
    out[24..32].copy_from_slice(&params.epoch.0.to_le_bytes());
    if let Reach::Dial(address) = params.reach {
        out[5] = 1;
        out[6..8].copy_from_slice(&address.port().to_le_bytes());
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        out[32..48].copy_from_slice(&ip.octets());
        if let SocketAddr::V6(v6) = address {
            out[48..52].copy_from_slice(&v6.scope_id().to_le_bytes());
        }
    }
}

fn decode_params(bytes: &[u8; COMMAND_LEN]) -> Result<SessionParams, BadRegister> {
    let role = match bytes[4] {
        1 => Role::Sender,
        2 => Role::Receiver,
        _ => return Err(BadRegister("role")),
    };
    let reach = match bytes[5] {
        0 => Reach::Listen,
        1 => Reach::Dial(decode_address(bytes)?),
        _ => return Err(BadRegister("way to connect")),
    };
    Ok(SessionParams {
        session: SessionId(array(bytes, 8)),
        epoch: Epoch(u64::from_le_bytes(array(bytes, 24))),
        role,
        reach,
    })
}

fn decode_address(bytes: &[u8; COMMAND_LEN]) -> Result<SocketAddr, BadRegister> {
    let port = u16_at(bytes, 6);
    if port == 0 {
        return Err(BadRegister("port"));
    }
    let ip = Ipv6Addr::from(array::<16>(bytes, 32));
    Ok(match ip.to_ipv4_mapped() {
        Some(v4) => SocketAddr::from((v4, port)),
        None => SocketAddrV6::new(ip, port, 0, u32_at(bytes, 48)).into(),
    })
}

/// Where the session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum LinkState {
    /// No session.
    #[default]
    Closed,
    /// A session without a connection.
    Connecting,
    /// Connected.
    Connected,
}

/// What the status register says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Where the session stands.
    pub link: LinkState,
    /// How often the session got a connection.
    pub connects: u32,
    /// Everything below this is published to the replica (as the sender knows it, or as the
    /// receiver has done it).
    pub received: Seq,
    /// Everything below this has been replayed.
    pub replayed: Seq,
}

impl Status {
    /// The register's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; STATUS_LEN] {
        let mut out = [0; STATUS_LEN];
        out[0] = match self.link {
            LinkState::Closed => 0,
            LinkState::Connecting => 1,
            LinkState::Connected => 2,
        };
        out[4..8].copy_from_slice(&self.connects.to_le_bytes());
        out[8..16].copy_from_slice(&self.received.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.replayed.0.to_le_bytes());
        out
    }

    /// Reads the register.
    ///
    /// # Errors
    /// A state that does not exist.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRegister> {
        let bytes = sized::<STATUS_LEN>(bytes, "status: length")?;
        Ok(Self {
            link: match bytes[0] {
                0 => LinkState::Closed,
                1 => LinkState::Connecting,
                2 => LinkState::Connected,
                _ => return Err(BadRegister("state of the link")),
            },
            connects: u32_at(bytes, 4),
            received: Seq(u64::from_le_bytes(array(bytes, 8))),
            replayed: Seq(u64::from_le_bytes(array(bytes, 16))),
        })
    }
}

fn sized<'a, const N: usize>(
    bytes: &'a [u8],
    what: &'static str,
) -> Result<&'a [u8; N], BadRegister> {
    bytes.try_into().map_err(|_| BadRegister(what))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..]
        .first_chunk()
        .expect("the register is longer than its fields")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(reach: Reach) -> Command {
        Command::Open(SessionParams {
            session: SessionId([3; 16]),
            epoch: Epoch(9),
            role: Role::Receiver,
            reach,
        })
    }

    #[test]
    fn commands_round_trip() {
        let commands = [
            open(Reach::Listen),
            open(Reach::Dial("10.1.2.3:77".parse().unwrap())),
            open(Reach::Dial("[fe80::1%5]:7".parse().unwrap())),
            Command::Close,
            Command::Bulk(BulkId([7; 16])),
        ];
        for command in commands {
            assert_eq!(Command::decode(&command.encode()), Ok(command));
        }
    }

    #[test]
    fn registers_round_trip_and_bad_values_are_refused() {
        assert_eq!(
            Identity::decode(&Identity::default().encode()),
            Ok(Identity::default())
        );
        let tuning = Tuning {
            spin_us: 50,
            ack_mode: AckMode::Replayed,
            ..Tuning::default()
        };
        assert_eq!(Tuning::decode(&tuning.encode()), Ok(tuning));
        let mut bad = tuning.encode();
        bad[16] = 2;
        assert!(Tuning::decode(&bad).is_err());
        assert!(Tuning::decode(&[0; TUNING_LEN]).is_err(), "no batch size");
        assert!(Command::decode(&[0; COMMAND_LEN]).is_err());
        assert!(Command::decode(&[0; 3]).is_err());
        let mut portless = open(Reach::Dial("10.1.2.3:77".parse().unwrap())).encode();
        portless[6..8].fill(0);
        assert!(Command::decode(&portless).is_err());
        let status = Status {
            link: LinkState::Connected,
            connects: 2,
            received: Seq(5),
            replayed: Seq(4),
        };
        assert_eq!(Status::decode(&status.encode()), Ok(status));
    }
}
