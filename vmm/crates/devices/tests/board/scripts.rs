//! Random scripts: a board restored from a saved state goes on as the one saved, and no guest makes a board panic.

use std::hash::{BuildHasher, RandomState};

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};

use crate::ops::decode;
use crate::script::{Reach, run, run_from_changed_state};

const SCRIPTS: u32 = 300;
const SCRIPT_BYTES: usize = 6000;

/// The seed of this run, from `POLLUX_SEED` when it is set.
fn seed() -> u64 {
    match std::env::var("POLLUX_SEED") {
        Ok(seed) => seed.parse().expect("POLLUX_SEED is a number"),
        Err(_) => RandomState::new().hash_one("devices"),
    }
}

/// The runner of this run, by its seed.
fn runner(seed: u64, cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 3000,
        ..Config::default()
    })
}

#[test]
fn restored_boards_go_on_as_the_saved_ones_whatever_the_guest_does() {
    let seed = seed();
    let mut total = Reach::default();
    let reach = std::cell::RefCell::new(&mut total);
    let result = runner(seed, SCRIPTS).run(&vec(any::<u8>(), 0..SCRIPT_BYTES), |script| {
        reach.borrow_mut().add(run(&decode(&script)));
        Ok(())
    });
    if let Err(TestError::Fail(reason, script)) = result {
        panic!(
            "{reason}\nshortest script: {:#?}\nrerun: POLLUX_SEED={seed} cargo test -p devices \
             --test board restored_boards",
            decode(&script)
        );
    }
    println!("seed {seed}: {total:?}");
    for (what, count) in total.counts() {
        assert!(
            count > 100,
            "the scripts reach too little, {what}: {count} (POLLUX_SEED={seed})"
        );
    }
}

#[test]
fn a_state_that_no_board_saved_is_refused_or_makes_a_board_that_does_not_panic() {
    let seed = seed();
    let accepted = std::cell::Cell::new(0);
    let script = || vec(any::<u8>(), 0..2000);
    let changes = vec(any::<(u16, u8)>(), 1..4);
    let result =
        runner(seed, SCRIPTS).run(&(script(), changes, script()), |(first, changes, then)| {
            if run_from_changed_state(&decode(&first), &changes, &decode(&then)) {
                accepted.set(accepted.get() + 1);
            }
            Ok(())
        });
    if let Err(TestError::Fail(reason, input)) = result {
        panic!(
            "{reason}\nfirst, changes, then: {input:?}\nrerun: POLLUX_SEED={seed} cargo test -p \
             devices --test board a_state_that_no_board_saved"
        );
    }
    let accepted = accepted.get();
    println!("seed {seed}: {accepted} of {SCRIPTS} changed states made a board");
    assert!(
        accepted > 20 && accepted < SCRIPTS - 5,
        "{accepted} (POLLUX_SEED={seed})"
    );
}
