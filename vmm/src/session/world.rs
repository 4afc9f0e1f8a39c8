//! The world that a primary acts on: image, TAP, console.

use std::fs::OpenOptions;

use devices::Effect;
use ft::Quarantine;

use super::Devices;
use crate::console::Console;
use crate::io::{Disk, DiskMode, Storage, Tap, VNET_HEADER_LEN};
use crate::vm::Backends;

/// Opens everything for use.
///
/// # Errors
/// What cannot be opened, as text for people.
pub fn open(devices: &Devices, quarantine: &Quarantine) -> Result<Backends, String> {
    let tap = devices
        .tap
        .as_deref()
        .map(Tap::open)
        .transpose()
        .map_err(|e| e.to_string())?;
    let disk = devices
        .disk
        .as_deref()
        .map(|path| Disk::open(path, DiskMode::Shared));
    let disk = disk.transpose().map_err(|e| e.to_string())?;
    let disk = disk.map(|disk| Storage::with_quarantine(disk, quarantine.clone()));
    let disk = disk
        .transpose()
        .map_err(|error| format!("side files of the disk: {error}"))?;
    let console = match &devices.console {
        Some(path) => Console::file(path),
        None => Console::stdio(),
    };
    let console = Some(console.map_err(|error| format!("console: {error}"))?);
    Ok(Backends { tap, disk, console })
}

/// Whether everything could be opened, without opening it for use.
pub fn usable(devices: &Devices) -> bool {
    let disk = devices.disk.as_ref().is_none_or(|path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .is_ok_and(|file| file.metadata().is_ok())
    });
    let tap = devices.tap.is_none()
        || OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .is_ok();
    disk && tap
}

/// A RARP request (RFC 903) from `mac`: makes every bridge on the way send the VM's frames here.
pub fn announcement(mac: [u8; 6]) -> Effect {
    let mut frame = vec![0; VNET_HEADER_LEN];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x80, 0x35]); // RARP
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]); // Ethernet, IPv4, reverse request
    for _ in 0..2 {
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&[0; 4]);
    }
    frame.resize(VNET_HEADER_LEN + 60, 0);
    Effect::NetTx(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announcement_is_a_rarp_broadcast_of_minimal_length() {
        let Effect::NetTx(frame) = announcement([2, 0, 0, 0, 0, 9]) else {
            panic!("no frame")
        };
        let frame = &frame[VNET_HEADER_LEN..];
        assert_eq!(
            (frame.len(), &frame[..6], &frame[12..14]),
            (60, &[0xff; 6][..], &[0x80, 0x35][..])
        );
        assert_eq!(&frame[6..12], &[2, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn a_missing_image_makes_the_world_unusable() {
        let devices = Devices {
            disk: Some("/nowhere/disk.img".into()),
            ..Devices::default()
        };
        assert!(!usable(&devices));
        assert!(usable(&Devices::default()));
    }
}
