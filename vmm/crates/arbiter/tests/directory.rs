//! The directory arbiter on a real directory.
#![allow(clippy::unwrap_used)]

mod conformance;

use std::fs;

use arbiter::{Arbiter, DirectoryArbiter};
use conformance::{claim, host, record};
use ft::directory::record_name;
use ft::{ArbiterReply, ArbiterRequest, CallId};

fn directory() -> (tempfile::TempDir, DirectoryArbiter) {
    let dir = tempfile::tempdir().unwrap();
    DirectoryArbiter::create(dir.path()).unwrap();
    let arbiter = DirectoryArbiter::open(dir.path(), host("castor"));
    (dir, arbiter)
}

#[test]
fn directory_has_one_winner_for_each_epoch() {
    let (_dir, mut arbiter) = directory();
    conformance::one_winner_for_each_epoch(&mut arbiter);
}

#[test]
fn exactly_one_of_many_wins_on_a_directory() {
    let (dir, _) = directory();
    let path = dir.path().to_owned();
    conformance::exactly_one_of_many_wins(move |index| {
        DirectoryArbiter::open(&path, host(&format!("host{index}")))
    });
}

#[test]
fn claims_leave_nothing_but_records_behind() {
    let (dir, mut arbiter) = directory();
    // An earlier process of this host died in the middle of a claim.
    fs::write(dir.path().join(".claim-castor@00-1"), b"torn").unwrap();
    fs::write(dir.path().join(".claim-castor-2@00-1"), b"of another host").unwrap();
    let first = record(1, 1);
    assert_eq!(
        arbiter.answer(CallId(1), claim(None, &first)),
        ArbiterReply::Won
    );
    let taken = arbiter.answer(CallId(2), claim(None, &record(1, 2)));
    assert_eq!(taken, ArbiterReply::Taken(first));
    let mut names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let record = record_name(format::Epoch(1));
    assert_eq!(names, [".claim-castor-2@00-1", &record, "pollux-epochs"]);
}

#[test]
fn a_directory_that_is_missing_or_not_marked_is_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("missing")] {
        let mut arbiter = DirectoryArbiter::open(&path, host("castor"));
        for request in [ArbiterRequest::Newest, claim(None, &record(1, 1))] {
            let reply = arbiter.answer(CallId(1), request);
            assert!(matches!(reply, ArbiterReply::Unreachable(_)), "{reply:?}");
        }
    }
}

#[test]
fn an_oversized_record_is_refused_without_reading_it_whole() {
    let (dir, mut arbiter) = directory();
    let huge = vec![0x41; 4 << 20];
    fs::write(dir.path().join(record_name(format::Epoch(1))), huge).unwrap();
    let reply = arbiter.answer(CallId(1), ArbiterRequest::Newest);
    assert!(matches!(reply, ArbiterReply::Unreachable(_)));
}

#[test]
fn making_a_directory_twice_keeps_its_records() {
    let (dir, mut arbiter) = directory();
    arbiter.answer(CallId(1), claim(None, &record(1, 1)));
    DirectoryArbiter::create(dir.path()).unwrap();
    let newest = arbiter.answer(CallId(2), ArbiterRequest::Newest);
    assert_eq!(newest, ArbiterReply::Newest(Some(record(1, 1))));
}
