//! Static trace points (USDT) at the stations of a log entry.
//!
//! While nobody listens, a station costs one load and one branch. Where `ftprobe` listens, the kernel
//! takes over at a 5-byte no-op, which it can replace by a call: some tenths of a microsecond, where an
//! ordinary probe of a function's entry costs more than ten.
//!
//! A station is passed by a range of appends of one session, `from..upto` as positions in the log. Only
//! ranges with a sampled append in them are shown: those whose position is a multiple of the sampling
//! distance ([`sample_one_in`]), which grows with the rate of the log. All stations of an entry agree on
//! that without a word between them, also across hosts.
//!
//! ```
//! # let (session, seq) = (7, 41);
//! usdt::appended(session, seq, seq + 1);   // one entry
//! usdt::acknowledged(session, 40, 48);     // all up to a cumulative position
//! ```
//!
//! Place the calls where the fact is established: `committed` after the commit point is published,
//! `acknowledged` when the record has been taken from the socket. The notes of the trace points are in
//! the ELF section `.note.stapsdt` (the format of SystemTap's sys/sdt.h, which perf, bpftrace and gdb
//! read too), provider `pollux`, with four arguments: session, from, upto, and the time
//! at which the program was here, in ns of CLOCK_MONOTONIC, which what the event itself costs is not in. On
//! machines other than x86-64 the stations are compiled to nothing.

mod note;
mod sampling;

pub use sampling::{
    DEFAULT_DISTANCE, DISTANCE_VARIABLE, distance_of_environment, sample_as_environment_says,
    sample_one_in, sampled, shows,
};

/// A station on the way of a log entry, in the order in which an entry passes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Station {
    /// In the arena, published by the vCPU thread.
    Appended,
    /// The channel daemon has been told, or was seen to be awake.
    Kicked,
    /// Handed to TCP whole.
    Sent,
    /// Taken from TCP whole on the backup's host.
    Received,
    /// Published to the replica: the commit point.
    Committed,
    /// Its acknowledgement has arrived on the primary's host.
    Acknowledged,
    /// Seen as acknowledged by the VMM.
    Seen,
    /// An output that waited for it has been let go.
    Released,
}

impl Station {
    /// All stations, in order.
    pub const ALL: [Self; 8] = [
        Self::Appended,
        Self::Kicked,
        Self::Sent,
        Self::Received,
        Self::Committed,
        Self::Acknowledged,
        Self::Seen,
        Self::Released,
    ];

    /// Name of the trace point.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Appended => "appended",
            Self::Kicked => "kicked",
            Self::Sent => "sent",
            Self::Received => "received",
            Self::Committed => "committed",
            Self::Acknowledged => "acknowledged",
            Self::Seen => "seen",
            Self::Released => "released",
        }
    }
}

/// Name of the provider in the notes.
pub const PROVIDER: &str = "pollux";

macro_rules! stations {
    ($($(#[$doc:meta])* $name:ident, $literal:literal;)*) => { $(
        $(#[$doc])*
        ///
        /// `session` is the first eight bytes of the channel's session id, little-endian; `from..upto`
        /// are the positions of the appends that have passed.
        #[inline(always)]
        pub fn $name(session: u64, from: u64, upto: u64) {
            note::station!($literal, session, from, upto);
        }
    )* };
}

stations! {
    /// See [`Station::Appended`].
    appended, "appended";
    /// See [`Station::Kicked`].
    kicked, "kicked";
    /// See [`Station::Sent`].
    sent, "sent";
    /// See [`Station::Received`].
    received, "received";
    /// See [`Station::Committed`].
    committed, "committed";
    /// See [`Station::Acknowledged`].
    acknowledged, "acknowledged";
    /// See [`Station::Seen`].
    seen, "seen";
    /// See [`Station::Released`].
    released, "released";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_are_called_by_their_names() {
        let functions: [fn(u64, u64, u64); 8] = [
            appended,
            kicked,
            sent,
            received,
            committed,
            acknowledged,
            seen,
            released,
        ];
        for (function, station) in functions.iter().zip(Station::ALL) {
            function(1, 2, 3);
            assert_eq!(Station::ALL[station as usize], station);
        }
    }
}
