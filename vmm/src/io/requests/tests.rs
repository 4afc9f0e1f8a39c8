//! A backend over a real image, driven by hand.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use ft::GateMode;

use super::super::disk::{Disk, DiskMode};
use super::super::handle::{IoConfig, IoHandle, Shared};
use super::super::ring::Ring;
use super::super::storage::Storage;
use super::errors::is_transport;
use super::*;

/// A backend that a test drives, over a disk of ones of which sectors 8 to 15 are in a side file.
fn backend(dir: &Path) -> (Backend, Receiver<Delivery>) {
    let (backend, deliveries, _) = backend_and_handle(dir);
    (backend, deliveries)
}

fn backend_and_handle(dir: &Path) -> (Backend, Receiver<Delivery>, IoHandle) {
    let path = dir.join("disk.img");
    std::fs::write(&path, vec![1; 64 * 512]).unwrap();
    let wire = serde_json::json!({
        "ranges": [[{ "first": 8, "count": 8 }, 2]],
        "suspects": [],
    });
    let disk = Disk::open(&path, DiskMode::Cached).unwrap();
    let storage = Storage::with_quarantine(disk, serde_json::from_value(wire).unwrap());
    let (send, deliveries) = channel();
    let config = IoConfig {
        tap: None,
        disk: Some(storage.unwrap()),
        console: None,
        gate: GateMode::Open,
        gap: None,
        deliver: Box::new(move |delivery| {
            let _ = send.send(delivery);
        }),
    };
    let shared = Arc::new(Shared::new().unwrap());
    let (send, receive) = channel();
    let handle = IoHandle::new(send, Arc::clone(&shared));
    let backend = Backend::new(config, Ring::new().unwrap(), receive, shared);
    (backend, deliveries, handle)
}

/// Nobody wakes the thread for what comes just before it says that it sleeps.
#[test]
fn a_message_that_comes_while_the_thread_goes_to_sleep_keeps_it_awake() {
    let (slept, awake) = channel();
    std::thread::spawn(move || {
        let dir = tempfile::tempdir().unwrap();
        let (mut backend, _deliveries, handle) = backend_and_handle(dir.path());
        backend.take_messages().unwrap();
        handle.discard_held();
        backend.sleep().unwrap();
        slept.send(()).unwrap();
    });
    awake
        .recv_timeout(Duration::from_secs(60))
        .expect("the thread sleeps for ever");
}

/// Lets everything end that is under way.
fn settle(backend: &mut Backend) {
    while backend.ring.count(|_| true) > 0 {
        backend.ring.wait(1).unwrap();
        while let Some(done) = backend.ring.reap() {
            backend.complete(done).unwrap();
        }
        backend.look_after_storage().unwrap();
    }
}

/// What was delivered: the requests that are done with the first byte read, and "folded".
fn delivered(deliveries: &Receiver<Delivery>) -> Vec<String> {
    let text = |delivery| match delivery {
        Delivery::Input(Input::DiskDone { id, status, data }) => {
            assert_eq!(status, DiskStatus::Ok);
            format!("{} {:?}", id.0, data.first())
        }
        Delivery::Folded => "folded".to_owned(),
        other => format!("{other:?}"),
    };
    deliveries.try_iter().map(text).collect()
}

fn write(id: u64, byte: u8) -> Effect {
    Effect::DiskWrite {
        id: RequestId(id),
        sector: 8,
        data: Arc::new(vec![byte; 512]),
    }
}

fn read(id: u64) -> Effect {
    Effect::DiskRead {
        id: RequestId(id),
        sector: 8,
        len: 512,
    }
}

#[test]
fn a_write_under_way_when_a_quarantine_ends_is_in_what_is_folded() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (mut backend, deliveries) = backend(dir.path());
    backend.start_disk(write(1, 2)).unwrap();
    backend.fold().unwrap();
    backend.start_disk(write(2, 3)).unwrap();
    settle(&mut backend);
    assert_eq!(delivered(&deliveries), ["1 None", "folded"]);
    let image = std::fs::read(dir.path().join("disk.img")).unwrap();
    assert!(image[8 * 512..9 * 512].iter().all(|byte| *byte == 2));

    // A read is under way when the side file is to go; one more comes.
    backend.start_disk(read(3)).unwrap();
    backend.unquarantine().unwrap();
    backend.start_disk(read(4)).unwrap();
    settle(&mut backend);
    let done = delivered(&deliveries);
    assert_eq!(done[0], "3 Some(2)");
    assert!(done.contains(&"2 None".to_owned()), "{done:?}");
    assert_eq!(done.len(), 3, "{done:?}");
    backend.start_disk(read(5)).unwrap();
    settle(&mut backend);
    assert_eq!(delivered(&deliveries), ["5 Some(3)"]);
    assert!(!dir.path().join("disk.img.side-2").exists());
}

#[test]
fn a_fold_that_fails_is_tried_again_and_loses_nothing() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (mut backend, deliveries) = backend(dir.path());
    // Shorter than its sectors: what is there cannot be copied whole.
    let side = dir.path().join("disk.img.side-2");
    let whole = std::fs::read(&side).unwrap();
    std::fs::write(&side, &whole[..8 * 512]).unwrap();
    backend.fold().unwrap();
    backend.start_disk(write(1, 4)).unwrap();
    assert!(delivered(&deliveries).is_empty());
    assert_eq!(backend.requests.pause(), Some(FOLD_PAUSE));
    std::fs::write(&side, &whole).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while delivered(&deliveries) != ["folded"] {
        assert!(Instant::now() < deadline);
        backend.look_after_storage().unwrap();
    }
    backend.unquarantine().unwrap();
    settle(&mut backend);
    assert_eq!(delivered(&deliveries), ["1 None"]);
}

/// A part that has ended so on the host.
fn ended(backend: &mut Backend, id: u64, part: Part, result: io::Result<usize>) {
    let done = Done {
        tag: Tag::Disk(RequestId(id), part),
        buffer: Buffer::zeroed(512),
        result,
    };
    backend.complete(done).unwrap();
}

#[test]
fn a_part_that_is_done_in_part_goes_on_where_it_ended() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (mut backend, deliveries) = backend(dir.path());
    let fd = backend.config.disk.as_ref().unwrap().fd();
    backend.begin(RequestId(1), 1, 512);
    let read = Part::Read {
        fd,
        at: 0,
        offset: 0,
    };
    // The first half was zeros, says the host; the image holds ones.
    ended(&mut backend, 1, read, Ok(256));
    assert_eq!(delivered(&deliveries), Vec::<String>::new());
    settle(&mut backend);
    let Ok(Delivery::Input(Input::DiskDone { data, .. })) = deliveries.try_recv() else {
        panic!("the request ends");
    };
    assert_eq!(data, [[0; 256], [1; 256]].concat());
}

#[test]
fn an_io_error_is_the_mediums_once_another_place_can_be_read() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (mut backend, deliveries) = backend(dir.path());
    let fd = backend.config.disk.as_ref().unwrap().fd();
    backend.begin(RequestId(1), 1, 512);
    let read = Part::Read {
        fd,
        at: 0,
        offset: 0,
    };
    let eio = || Err(io::Error::from_raw_os_error(libc::EIO));
    ended(&mut backend, 1, read, eio());
    assert_eq!(backend.requests.retries.len(), 1);
    backend.requests.retries.clear();
    while backend.requests.elsewhere.is_none() {
        backend.ring.wait(1).unwrap();
        while let Some(done) = backend.ring.reap() {
            backend.complete(done).unwrap();
        }
    }
    ended(&mut backend, 1, read, eio());
    let done = deliveries.try_recv();
    let Ok(Delivery::Input(Input::DiskDone { status, .. })) = done else {
        panic!("{done:?}");
    };
    assert_eq!(status, DiskStatus::MediumError);
    // A flush that failed is told at once.
    backend.begin(RequestId(2), 1, 0);
    ended(&mut backend, 2, Part::Flush { fd }, eio());
    assert!(deliveries.try_recv().is_ok());
}

#[test]
fn a_bad_medium_is_no_matter_of_transport() {
    let is = |code| is_transport(&io::Error::from_raw_os_error(code));
    assert!(is(libc::ETIMEDOUT) && is(libc::ESTALE) && is(libc::ENOSPC));
    assert!(!is(libc::EIO) && !is(libc::EINVAL) && !is(libc::EBADF));
    assert!(!is_transport(&io::Error::other("short")));
}
