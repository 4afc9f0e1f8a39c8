//! The world that a primary acts on: image, TAP, console.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use devices::Effect;
use ft::{HostId, Quarantine};

use super::Devices;
use super::driver::{Session, SessionError};
use super::event::SessionEvent;
use crate::console::Console;
use crate::io::{Disk, DiskMode, SECTOR_LEN, Storage, Tap, VNET_HEADER_LEN};
use crate::vm::Backends;

/// Storage on which a read and a write take longer than this is no relief for a primary.
const SERVES_WITHIN: Duration = Duration::from_millis(500);

/// Opens everything for use. The gate shuts itself when it did not run for `gap`.
///
/// # Errors
/// What cannot be opened, as text for people.
pub fn open(devices: &Devices, quarantine: &Quarantine, gap: Duration) -> Result<Backends, String> {
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
    Ok(Backends {
        tap,
        disk,
        console,
        gap: Some(gap),
    })
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

/// Whether the storage serves this host: reads from the image, and writes beside it, are done before `limit`.
/// A primary whose storage is slow is not relieved by a host where it is as slow.
pub fn serves(devices: &Devices, me: HostId, limit: Duration) -> bool {
    let began = Instant::now();
    let served = devices
        .disk
        .as_deref()
        .is_none_or(|image| try_storage(image, me).is_ok());
    served && began.elapsed() < limit
}

/// One read and, where the image is a file, one write, both by the storage itself.
fn try_storage(image: &Path, me: HostId) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    // Whatever of it is cached here is not what is asked for.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    file.read_exact_at(&mut [0; SECTOR_LEN as usize], 0)?;
    if !file.metadata()?.is_file() {
        return Ok(());
    }
    let mut name = image.as_os_str().to_owned();
    name.push(format!(".probe-{me}"));
    let probe = Path::new(&name);
    let written = File::create(probe).and_then(|file| {
        file.write_all_at(&[0; SECTOR_LEN as usize], 0)?;
        file.sync_all()
    });
    std::fs::remove_file(probe)?;
    written
}

impl Session {
    /// Tries whether this host can use image and TAP, on a thread: storage that hangs hangs nothing else. Who
    /// takes over has to be quick, and opens them; who is asked to relieve a primary looks closer.
    pub(super) fn probe_world(&mut self) -> Result<(), SessionError> {
        if std::mem::replace(&mut self.probing, true) {
            return Ok(());
        }
        let (devices, me, sender) = (
            self.devices.clone(),
            self.settings.ft.me,
            self.sender.clone(),
        );
        let in_haste = self.follower.is_closing();
        std::thread::Builder::new()
            .name("probe-world".to_owned())
            .spawn(move || {
                let is_usable =
                    usable(&devices) && (in_haste || serves(&devices, me, SERVES_WITHIN));
                let _ = sender.send(SessionEvent::WorldProbed(is_usable));
            })?;
        Ok(())
    }
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
        assert!(!serves(&devices, "a".parse().unwrap(), Duration::MAX));
        assert!(usable(&Devices::default()));
    }

    #[test]
    fn storage_is_tried_by_reading_and_writing_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::write(&image, [1; 4096]).unwrap();
        let devices = Devices {
            disk: Some(image.clone()),
            ..Devices::default()
        };
        let me = "a".parse().unwrap();
        assert!(serves(&devices, me, Duration::MAX));
        assert!(!serves(&devices, me, Duration::ZERO));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(std::fs::read(image).unwrap(), [1; 4096]);
    }
}
