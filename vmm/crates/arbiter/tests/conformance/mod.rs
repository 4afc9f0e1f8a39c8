//! What every arbiter must do, whatever it is made of.
#![allow(clippy::unwrap_used, unreachable_pub)]

use std::sync::{Arc, Barrier};
use std::thread;

use arbiter::Arbiter;
use format::{Epoch, SessionId};
use ft::{
    ArbiterReply, ArbiterRequest, Base, CallId, EpochRecord, HostId, Nonce, Quarantine, Tenure,
};

pub fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

pub fn record(epoch: u64, nonce: u8) -> EpochRecord {
    EpochRecord {
        epoch: Epoch(epoch),
        nonce: Nonce([nonce; 16]),
        owner: host("castor"),
        tenure: Tenure::Pair {
            backup: host("pollux"),
            session: SessionId([nonce; 16]),
        },
        quarantine: Quarantine::default(),
    }
}

pub fn claim(base: Option<&EpochRecord>, record: &EpochRecord) -> ArbiterRequest {
    ArbiterRequest::TryWin {
        base: base.map(|base| Base {
            epoch: base.epoch,
            nonce: base.nonce,
        }),
        record: record.clone(),
    }
}

/// One after the other: first, second, retry, too late, wrong base.
pub fn one_winner_for_each_epoch(arbiter: &mut dyn Arbiter) {
    let mut call = 0;
    let mut ask = |request| {
        call += 1;
        arbiter.answer(CallId(call), request)
    };
    assert_eq!(ask(ArbiterRequest::Newest), ArbiterReply::Newest(None));
    let (first, second) = (record(1, 1), record(2, 2));
    assert_eq!(ask(claim(None, &first)), ArbiterReply::Won);
    assert_eq!(ask(claim(None, &first)), ArbiterReply::Won, "asked again");
    let newest = ask(ArbiterRequest::Newest);
    assert_eq!(newest, ArbiterReply::Newest(Some(first.clone())));
    assert_eq!(ask(claim(Some(&first), &second)), ArbiterReply::Won);
    let late = ask(claim(Some(&first), &record(2, 3)));
    assert_eq!(late, ArbiterReply::Taken(second.clone()));
    assert_eq!(ask(claim(Some(&first), &second)), ArbiterReply::Won);
    let newest = ask(ArbiterRequest::Newest);
    assert_eq!(newest, ArbiterReply::Newest(Some(second.clone())));
    for stranger in [record(2, 9), record(1, 9)] {
        let reply = ask(claim(Some(&stranger), &record(stranger.epoch.0 + 1, 4)));
        assert!(!matches!(reply, ArbiterReply::Won), "{reply:?}");
    }
    let beyond = ask(claim(Some(&record(8, 8)), &record(9, 9)));
    assert!(matches!(beyond, ArbiterReply::Unreachable(_)), "{beyond:?}");
}

/// Many at once, for many epochs: exactly one of them wins each, and the others are told which.
pub fn exactly_one_of_many_wins<A: Arbiter + 'static>(make: impl Fn(usize) -> A) {
    const HOSTS: usize = 4;
    const EPOCHS: u64 = 20;
    let start = Arc::new(Barrier::new(HOSTS));
    let threads: Vec<_> = (0..HOSTS)
        .map(|index| {
            let (mut arbiter, start) = (make(index), Arc::clone(&start));
            thread::spawn(move || {
                let mut base: Option<EpochRecord> = None;
                let mut won = Vec::new();
                for epoch in 1..=EPOCHS {
                    start.wait();
                    let mine = record(epoch, 10 + index as u8);
                    let request = claim(base.as_ref(), &mine);
                    match arbiter.answer(CallId(epoch), request) {
                        ArbiterReply::Won => {
                            won.push(epoch);
                            base = Some(mine);
                        }
                        ArbiterReply::Taken(other) => base = Some(other),
                        other => panic!("{other:?}"),
                    }
                }
                (won, base.unwrap())
            })
        })
        .collect();
    let results: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    let mut won: Vec<u64> = results.iter().flat_map(|(won, _)| won.clone()).collect();
    won.sort_unstable();
    assert_eq!(won, (1..=EPOCHS).collect::<Vec<_>>());
    assert!(results.iter().all(|(_, last)| *last == results[0].1));
}
