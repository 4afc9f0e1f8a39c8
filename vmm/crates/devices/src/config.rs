//! What a board is made of. The configuration is part of the saved state: a board restored is the board saved.

use serde::{Deserialize, Serialize};

use crate::cmos::LAST_SECOND;

/// Longest identity string of a disk, bytes (virtio 1.2, 5.2.6.1: VIRTIO_BLK_ID_BYTES).
pub const DISK_IDENTITY_BYTES: usize = 20;

/// Most sectors that a disk may have: 8 EiB, so that byte offsets fit a signed 64-bit file offset.
pub const DISK_SECTORS_MAX: u64 = (1 << 54) - 1;

/// The devices of a board beside those that every board has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardConfig {
    /// Unix time at the VM's birth, seconds: what the CMOS clock shows at virtual time 0.
    pub wall_clock_base_s: u64,
    /// The network interface, if there is one.
    pub net: Option<NetConfig>,
    /// The disk, if there is one.
    pub disk: Option<DiskConfig>,
    /// Whether there is a virtio entropy source.
    pub entropy: bool,
}

/// A virtio network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// The interface's address: unicast and not zero.
    pub mac: [u8; 6],
    /// Offer checksum and TCP segmentation offloads: frames may then need them done on either side, as their
    /// virtio_net_hdr says.
    pub offloads: bool,
}

/// A virtio disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Capacity in sectors of 512 bytes, 1 to [`DISK_SECTORS_MAX`].
    pub sectors: u64,
    /// What the guest reads as the disk's serial number: at most [`DISK_IDENTITY_BYTES`] bytes of printable ASCII.
    pub identity: String,
    /// Whether a finished write is durable.
    pub cache: DiskCache,
}

/// What `DiskDone` of a write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskCache {
    /// The data is on stable storage. Flush is not offered, so the guest spends no exits on it.
    WriteThrough,
    /// The data may be in a volatile cache until a flush. Flush is offered.
    WriteBack,
}

/// A configuration that makes no board.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The wall clock base is past year 9999.
    #[error("wall clock base {0} s is past the year 9999")]
    WallClockBase(u64),
    /// The MAC address is zero or a group address.
    #[error("MAC address {0:02x?} is zero or a group address")]
    Mac([u8; 6]),
    /// The disk is empty or too large.
    #[error("a disk of {0} sectors: 1 to {DISK_SECTORS_MAX} are possible")]
    Sectors(u64),
    /// The disk's identity does not fit.
    #[error("disk identity {0:?} is not at most {DISK_IDENTITY_BYTES} bytes of printable ASCII")]
    Identity(String),
}

impl BoardConfig {
    /// Says what is wrong with the configuration, if anything.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.wall_clock_base_s > LAST_SECOND {
            return Err(ConfigError::WallClockBase(self.wall_clock_base_s));
        }
        if let Some(net) = &self.net
            && (net.mac == [0; 6] || net.mac[0] & 1 != 0)
        {
            return Err(ConfigError::Mac(net.mac));
        }
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        if !(1..=DISK_SECTORS_MAX).contains(&disk.sectors) {
            return Err(ConfigError::Sectors(disk.sectors));
        }
        let printable = disk
            .identity
            .bytes()
            .all(|byte| (0x20..0x7f).contains(&byte));
        if disk.identity.len() > DISK_IDENTITY_BYTES || !printable {
            return Err(ConfigError::Identity(disk.identity.clone()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> BoardConfig {
        BoardConfig {
            wall_clock_base_s: 1_800_000_000,
            net: Some(NetConfig {
                mac: [2, 0, 0, 0, 0, 1],
                offloads: true,
            }),
            disk: Some(DiskConfig {
                sectors: 2048,
                identity: "root".into(),
                cache: DiskCache::WriteThrough,
            }),
            entropy: true,
        }
    }

    #[test]
    fn limits_are_told_apart() {
        assert_eq!(full().validate(), Ok(()));
        let mut config = full();
        config.wall_clock_base_s = LAST_SECOND + 1;
        assert!(matches!(
            config.validate(),
            Err(ConfigError::WallClockBase(_))
        ));
        for mac in [[0; 6], [1, 2, 3, 4, 5, 6]] {
            let mut config = full();
            config.net.as_mut().unwrap().mac = mac;
            assert_eq!(config.validate(), Err(ConfigError::Mac(mac)));
        }
        for sectors in [0, DISK_SECTORS_MAX + 1] {
            let mut config = full();
            config.disk.as_mut().unwrap().sectors = sectors;
            assert_eq!(config.validate(), Err(ConfigError::Sectors(sectors)));
        }
        for identity in ["123456789012345678901", "caf\u{e9}", "a\nb"] {
            let mut config = full();
            config.disk.as_mut().unwrap().identity = identity.into();
            assert!(matches!(config.validate(), Err(ConfigError::Identity(_))));
        }
    }
}
