//! Cold starts and late writes: who may start the VM anew, and what old primaries may still write.

mod stage;

use format::Epoch;
use ft::{Command, Event, Notice, RoleName, SectorRange, Tenure};
use stage::{Stage, host};

fn blocked(stage: &mut Stage, name: &str) -> bool {
    let notices = &stage.node(name).notices;
    let blocked = |n: &Notice| matches!(n, Notice::StartBlocked { .. });
    notices.iter().any(blocked)
}

fn open_pair() -> Stage {
    let mut stage = Stage::protected();
    stage.kill("castor");
    stage.kill("pollux");
    stage.run(10);
    stage
}

#[test]
fn first_boot_wins_epoch_one_before_it_acts() {
    let mut stage = Stage::new();
    stage.arbiter_cut.insert(host("castor"));
    stage.boot(Stage::config("castor"));
    stage.run(1000);
    assert!(!stage.did("castor", "GoLive"));
    stage.arbiter_cut.clear();
    stage.run_until(1000, |stage| stage.acting() == ["castor"]);
    assert_eq!(stage.epoch("castor"), 1);
}

#[test]
fn two_first_boots_one_acts() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.boot(Stage::config("pollux"));
    stage.run(3000);
    let mut roles = ["castor", "pollux"].map(|name| stage.role(name));
    roles.sort_by_key(|role| *role != RoleName::Primary);
    assert_eq!(roles, [RoleName::Primary, RoleName::Backup]);
}

#[test]
fn an_open_pair_blocks_a_cold_start_until_the_other_holds_nothing() {
    let mut stage = open_pair();
    stage.boot(Stage::config("castor"));
    stage.run(3000);
    assert!(blocked(&mut stage, "castor"));
    assert!(stage.acting().is_empty());
    stage.standby(Stage::config("pollux"));
    stage.run_until(3000, |stage| stage.acting() == ["castor"]);
    assert_eq!(stage.epoch("castor"), 3);
}

#[test]
fn a_cold_start_is_refused_while_the_other_holds_state() {
    let mut stage = Stage::protected();
    stage.arbiter_cut.insert(host("pollux"));
    stage.kill("castor");
    stage.run_until(1000, |stage| stage.status("pollux") == "arbitrating");
    stage.boot(Stage::config("castor"));
    stage.run(3000);
    assert!(stage.acting().is_empty());
    assert!(blocked(&mut stage, "castor"));
    stage.arbiter_cut.clear();
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
}

#[test]
fn a_start_that_must_wait_becomes_a_standby_when_the_vm_s_primary_asks() {
    let mut stage = Stage::protected();
    stage.kill("helen");
    stage.arbiter_cut.insert(host("pollux"));
    stage.kill("castor");
    stage.run_until(1000, |stage| stage.status("pollux") == "arbitrating");
    stage.boot(Stage::config("castor"));
    stage.run(500);
    assert!(blocked(&mut stage, "castor"));
    assert_eq!(stage.role("castor"), RoleName::Booting);
    stage.arbiter_cut.clear();
    stage.run_until(6000, |stage| stage.status("pollux") == "protected");
    assert_eq!(stage.role("castor"), RoleName::Backup);
    assert_eq!(stage.named_backup(), Some(host("castor")));
}

#[test]
fn an_operator_forces_the_epoch_that_was_shown_and_no_other() {
    let mut stage = open_pair();
    stage.boot(Stage::config("helen"));
    stage.run(500);
    assert!(blocked(&mut stage, "helen"));
    stage.tell(host("helen"), Event::Command(Command::ForceStart(Epoch(1))));
    stage.run(2000);
    assert!(stage.acting().is_empty());
    stage.tell(host("helen"), Event::Command(Command::ForceStart(Epoch(2))));
    stage.run_until(1000, |stage| stage.acting() == ["helen"]);
}

#[test]
fn a_host_that_was_alone_starts_again_by_itself_and_another_does_not() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.run_until(1000, |stage| stage.acting() == ["castor"]);
    stage.kill("castor");
    stage.boot(Stage::config("pollux"));
    stage.run(2000);
    assert!(stage.acting().is_empty() && blocked(&mut stage, "pollux"));
    stage.kill("pollux");
    stage.boot(Stage::config("castor"));
    stage.run_until(1000, |stage| stage.acting() == ["castor"]);
}

#[test]
fn a_closed_record_lets_anybody_start() {
    let mut stage = Stage::protected();
    stage.tell(host("castor"), Event::GuestOff);
    stage.run_until(1000, |stage| stage.role("pollux") == RoleName::Ended);
    stage.kill("helen");
    stage.boot(Stage::config("helen"));
    stage.run_until(1000, |stage| stage.acting() == ["helen"]);
}

fn with_writes(fencing: bool) -> Stage {
    let mut stage = Stage::new();
    let config = |name: &str| {
        let mut config = Stage::config(name);
        config.fencing = fencing;
        config
    };
    stage.boot(config("castor"));
    stage.standby(config("pollux"));
    stage.run_until(2000, |stage| stage.status("castor") == "protected");
    stage.run(200);
    let writes = vec![SectorRange { first: 8, count: 8 }];
    stage.node("pollux").writes = writes;
    stage.kill("castor");
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
    stage
}

#[test]
fn outstanding_writes_are_quarantined_until_the_old_primary_says_that_it_is_gone() {
    let mut stage = with_writes(false);
    let map = stage.newest().quarantine;
    assert_eq!(map.suspects(), [host("castor")]);
    let ranges: Vec<_> = map.ranges().collect();
    assert_eq!(ranges, [(SectorRange { first: 8, count: 8 }, Epoch(3))]);
    stage.run(3000);
    assert!(!stage.did("pollux", "Fold"));
    stage.standby(Stage::config("castor"));
    stage.run_until(3000, |stage| stage.did("pollux", "Unquarantine"));
    assert!(stage.newest().quarantine.is_empty());
}

#[test]
fn an_old_primary_with_io_in_flight_keeps_the_quarantine() {
    let mut stage = Stage::protected();
    stage.node("pollux").writes = vec![SectorRange { first: 8, count: 8 }];
    stage.withhold("castor", "Discard");
    stage.node("castor").stopped = true;
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
    stage.node("castor").stopped = false;
    stage.run_until(2000, |stage| stage.role("castor") == RoleName::Leaving);
    stage.run(3000);
    assert!(!stage.did("pollux", "Fold"));
    stage.tell(host("castor"), Event::Discarded);
    stage.run_until(3000, |stage| stage.did("pollux", "Unquarantine"));
}

#[test]
fn an_operator_may_say_that_the_old_primary_is_gone() {
    let mut stage = with_writes(false);
    stage.run(100);
    stage.tell(
        host("pollux"),
        Event::Command(Command::HostGone(host("castor"))),
    );
    stage.run_until(1000, |stage| stage.did("pollux", "Unquarantine"));
}

#[test]
fn fencing_comes_before_going_live_and_needs_no_quarantine() {
    let mut stage = with_writes(true);
    assert!(stage.newest().quarantine.is_empty());
    let acts = stage.node("pollux").acts.clone();
    let at = |name: &str| acts.iter().position(|a| a.starts_with(name)).unwrap();
    assert!(at("Fence") < at("GoLive"));
}

#[test]
fn a_quarantine_outlives_power_off_and_cold_start() {
    let mut stage = with_writes(false);
    stage.tell(host("pollux"), Event::GuestOff);
    stage.run_until(2000, |stage| stage.role("pollux") == RoleName::Ended);
    assert_eq!(stage.newest().tenure, Tenure::Closed);
    stage.boot(Stage::config("helen"));
    stage.run_until(1000, |stage| stage.acting() == ["helen"]);
    assert!(!stage.newest().quarantine.is_empty());
    let live = stage.node("helen").live.clone().unwrap();
    assert_eq!(live.quarantine, stage.newest().quarantine);
}

#[test]
fn a_second_failover_keeps_both_quarantines_apart() {
    let mut stage = with_writes(false);
    stage.standby(Stage::config("helen"));
    stage.run_until(3000, |stage| stage.status("pollux") == "protected");
    stage.run(200);
    stage.node("helen").writes = vec![SectorRange {
        first: 12,
        count: 8,
    }];
    stage.kill("pollux");
    stage.run_until(2000, |stage| stage.acting() == ["helen"]);
    let map = stage.newest().quarantine;
    let sides: Vec<_> = map
        .ranges()
        .map(|(range, side)| (range.first, side.0))
        .collect();
    assert_eq!(sides, [(8, 3), (12, 5)]);
    assert_eq!(map.suspects(), [host("castor"), host("pollux")]);
}
