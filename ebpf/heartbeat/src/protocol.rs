//! What is spoken over the probe daemon's Unix socket.
//!
//! The socket is of type SOCK_SEQPACKET: one packet is one message, a JSON object of at most
//! [`MESSAGE_BYTES`]. The client sends a [`Call`], the daemon answers each with one [`Answer`], in
//! order; descriptors travel beside the answer (SCM_RIGHTS). The first call must be `hello`. Ids are
//! decimal numbers, keys 32 hexadecimal digits.
//!
//! | call | answer | descriptors |
//! |---|---|---|
//! | `{"hello":{"version":1}}` | `{"hello":{…}}`: what the daemon can do here | |
//! | `{"join":{"session":7,"epoch":3,"role":"vmm"}}` | `"joined"` | VMM page, seen page |
//! | `{"join":{"session":7,"epoch":3,"role":"daemon"}}` | `"joined"` | daemon page |
//! | `{"keys":{"session":7,"generation":1,"ours":"…","theirs":"…"}}` | `"done"` | |
//! | `{"epoch":{"session":7,"epoch":4}}` | `"done"` | |
//! | `{"close":{"session":7}}` | `"done"` | |
//! | `"status"` | `{"status":{…}}` | |
//!
//! A session begins with the first `join` that names it, and ends with `close`. Closing the connection
//! ends nothing: what has joined is watched until its process exits. The process is the one at the
//! other end of the socket (SO_PEERCRED). A session whose VMM has exited goes on saying so until it is
//! closed, or until its place is needed for a new one; a daemon may join again after an exit, a VMM
//! may not: its state is lost, and with it the session.

use ebpf_events::{Key, KeyGeneration, SessionKeys, key::KEY_BYTES};
use serde::{Deserialize, Serialize};

/// Version of this protocol.
pub const VERSION: u32 = 1;
/// Where the probe daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/pollux/ftprobe.sock";
/// Bytes of a message at most.
pub const MESSAGE_BYTES: usize = 16_384;
/// Descriptors beside one answer at most.
pub const MESSAGE_DESCRIPTORS: usize = 2;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Opens the conversation.
    Hello {
        /// [`VERSION`] of the client.
        version: u32,
    },
    /// Takes a role in a session, which begins if it is new.
    Join {
        /// The channel's session.
        session: u64,
        /// This host's epoch.
        epoch: u64,
        /// What the calling process is.
        role: Role,
    },
    /// Installs the keys of a session: a new handshake has been made.
    Keys {
        /// The session; it must have been joined.
        session: u64,
        /// Counts the keys of the session.
        generation: u8,
        /// Signs what this host asks.
        ours: HexKey,
        /// Signs what the peer asks.
        theirs: HexKey,
    },
    /// This host's epoch has grown.
    Epoch {
        /// The session.
        session: u64,
        /// The new epoch.
        epoch: u64,
    },
    /// The session is over: its heartbeats are answered no more.
    Close {
        /// The session.
        session: u64,
    },
    /// What is going on.
    Status,
}

/// What a process is in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The VMM: it has progress of its own and probes the peer.
    Vmm,
    /// The channel daemon: it has progress of its own.
    Daemon,
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To `hello`.
    Hello(Abilities),
    /// To `join`, with descriptors.
    Joined,
    /// Done.
    Done,
    /// To `status`.
    Status(Status),
    /// Not done, and why.
    Error(Refusal),
}

/// What the probe daemon can do on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// [`VERSION`] of the daemon.
    pub version: u32,
    /// Who answers heartbeats.
    pub responder: ResponderKind,
    /// Why it is not a better one; empty for the best.
    pub responder_reason: String,
    /// Who notices that a process exits.
    pub exit_watch: ExitWatch,
    /// Whether the departure of requests is stamped in the kernel.
    pub departures: bool,
    /// UDP port of the responder.
    pub port: u16,
    /// Interface of the heartbeats.
    pub interface: String,
}

/// Who answers heartbeats, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResponderKind {
    /// XDP in the driver.
    XdpNative,
    /// XDP after the driver.
    XdpGeneric,
    /// TCX on the interface's ingress.
    Tcx,
    /// A thread of the probe daemon, which a starved host delays.
    Userspace,
}

impl ResponderKind {
    /// Whether replies are made in the kernel, whatever its processes are doing.
    pub const fn in_kernel(self) -> bool {
        !matches!(self, Self::Userspace)
    }
}

/// Who notices that a process exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitWatch {
    /// A tracepoint program: the next reply says so.
    Kernel,
    /// The probe daemon by pidfd, when it is given a CPU.
    Pidfd,
}

/// What is going on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// As in `hello`.
    pub abilities: Abilities,
    /// Counters of heartbeats by name.
    pub counters: std::collections::BTreeMap<String, u64>,
    /// The open sessions.
    pub sessions: Vec<SessionStatus>,
    /// Whether the logging channel's interface is watched.
    #[serde(default)]
    pub traffic_watched: bool,
    /// The logging channel's connections.
    #[serde(default)]
    pub flows: Vec<FlowStatus>,
    /// Exits of virtual machines to their VMM; the most frequent, where there are many.
    #[serde(default)]
    pub exits: Vec<ExitStatus>,
}

/// Exits of one VMM's machine for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// The VMM's process.
    pub process: u32,
    /// After linux/kvm.h.
    pub reason: String,
    /// So far.
    pub count: u64,
}

/// One connection of the logging channel, as the kernel sees it on its interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// The first eight bytes of the channel's session id, little-endian; 0 before the first frame.
    pub session: u64,
    /// This host's end.
    pub local: std::net::SocketAddr,
    /// The peer's.
    pub remote: std::net::SocketAddr,
    /// Payload bytes towards this host.
    pub bytes_in: u64,
    /// Payload bytes from this host.
    pub bytes_out: u64,
    /// Packets towards this host.
    pub packets_in: u64,
    /// Packets from this host.
    pub packets_out: u64,
    /// Highest position that acknowledgements cover.
    pub received: u64,
    /// Highest position that they say is replayed.
    pub replayed: u64,
    /// Frames whose acknowledgement was timed.
    pub acks_timed: u64,
    /// Median of those times, ns, to 25 %.
    pub ack_p50_ns: u64,
    /// 99th percentile of those times, ns, to 25 %.
    pub ack_p99_ns: u64,
    /// TCP's smoothed round trip, us; 0 if it is not known.
    pub rtt_us: u64,
    /// Segments sent again; 0 if it is not known.
    pub retransmits: u64,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its id.
    pub session: u64,
    /// This host's epoch in it.
    pub epoch: u64,
    /// The VMM's process id, if one has joined.
    pub vmm: Option<u32>,
    /// The channel daemon's process id, if one has joined.
    pub daemon: Option<u32>,
    /// Whether the VMM has exited.
    pub vmm_dead: bool,
    /// Whether the channel daemon has exited.
    pub daemon_dead: bool,
    /// Key generations in use.
    pub generations: Vec<u8>,
    /// Requests of the peer that were answered.
    pub answered: u64,
    /// Replies of the peer that were accepted.
    pub accepted: u64,
    /// What the last of them says of the peer's clock; none before the first.
    #[serde(default)]
    pub clock: Option<ClockStatus>,
}

/// The peer's clock (CLOCK_MONOTONIC) against this host's, as one heartbeat has measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStatus {
    /// When the reply arrived, ns of this host's clock.
    pub at_ns: u64,
    /// The peer's clock minus this host's, ns.
    pub offset_ns: i64,
    /// It may be off by this much: half of the round trip.
    pub error_ns: u64,
}

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

/// Kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// Not a message of this protocol.
    Malformed,
    /// Another version of it.
    Version,
    /// `hello` must come first.
    NoHello,
    /// No such session.
    UnknownSession,
    /// Another living process has the role, or the session's VMM has died.
    RoleTaken,
    /// All places are taken by sessions whose processes live.
    Full,
    /// The kernel said no.
    System,
}

/// A key as 32 hexadecimal digits. `Debug` does not show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HexKey(pub Key);

impl TryFrom<String> for HexKey {
    type Error = &'static str;

    fn try_from(digits: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; KEY_BYTES];
        if digits.len() != 2 * KEY_BYTES || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("a key has 32 hexadecimal digits");
        }
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| "checked above")?;
        }
        Ok(Self(Key::new(bytes)))
    }
}

impl From<HexKey> for String {
    fn from(key: HexKey) -> Self {
        use std::fmt::Write as _;
        let mut digits = Self::with_capacity(2 * KEY_BYTES);
        for byte in key.0.bytes() {
            write!(digits, "{byte:02x}").expect("writing to a string does not fail");
        }
        digits
    }
}

impl Call {
    /// The call that installs `keys`.
    pub fn keys(session: u64, generation: KeyGeneration, keys: &SessionKeys) -> Self {
        Self::Keys {
            session,
            generation: generation.0,
            ours: HexKey(keys.ours.clone()),
            theirs: HexKey(keys.theirs.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_read_as_the_table_above_says() {
        let keys = SessionKeys {
            ours: Key::new([0xab; 16]),
            theirs: Key::new([1; 16]),
        };
        for (call, text) in [
            (
                Call::Hello { version: 1 },
                r#"{"hello":{"version":1}}"#.to_owned(),
            ),
            (
                Call::Join {
                    session: 7,
                    epoch: 3,
                    role: Role::Vmm,
                },
                r#"{"join":{"session":7,"epoch":3,"role":"vmm"}}"#.to_owned(),
            ),
            (
                Call::keys(7, KeyGeneration(1), &keys),
                format!(
                    r#"{{"keys":{{"session":7,"generation":1,"ours":"{}","theirs":"{}"}}}}"#,
                    "ab".repeat(16),
                    "01".repeat(16)
                ),
            ),
            (
                Call::Close { session: 7 },
                r#"{"close":{"session":7}}"#.to_owned(),
            ),
            (Call::Status, r#""status""#.to_owned()),
        ] {
            assert_eq!(serde_json::to_string(&call).unwrap(), text);
            assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
        }
        assert_eq!(
            serde_json::to_string(&Answer::Joined).unwrap(),
            r#""joined""#
        );
    }

    #[test]
    fn bad_keys_are_refused() {
        for bad in ["", "ab", &"g".repeat(32), &"é".repeat(16), &"a".repeat(33)] {
            assert!(HexKey::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
