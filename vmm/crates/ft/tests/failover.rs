//! What happens when each thing fails in each state: one test for each row of the table in
//! docs/protocol.md.

mod stage;

use format::{ControlOp, ExitNumber};
use ft::{Command, DivergenceReport, Event, GateMode, Leave, Notice, RoleName, Tenure};
use stage::{Stage, host};

fn lost(stage: &mut Stage, name: &str) -> bool {
    let notices = &stage.node(name).notices;
    notices.iter().any(|n| matches!(n, Notice::PeerLost { .. }))
}

#[test]
fn protection_names_the_backup_only_after_the_gate_holds() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(2000, |stage| stage.status("castor") == "protected");
    assert_eq!(stage.named_backup(), Some(host("pollux")));
    assert_eq!(stage.epoch("castor"), 2);
    let acts = stage.node("castor").acts.clone();
    let holds = acts
        .iter()
        .position(|a| a.starts_with("Gate(Holding"))
        .unwrap();
    let claims = acts.iter().position(|a| a.contains("Pair")).unwrap();
    assert!(holds < claims);
    assert!(matches!(stage.node("castor").gate, GateMode::Holding(_)));
}

#[test]
fn primary_lost_while_protected_backup_goes_live_and_is_protected_by_the_next_standby() {
    let mut stage = Stage::protected();
    stage.kill("castor");
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
    assert_eq!(stage.epoch("pollux"), 3);
    stage.run_until(3000, |stage| stage.status("pollux") == "protected");
    assert_eq!(stage.named_backup(), Some(host("helen")));
}

#[test]
fn a_backup_closes_the_session_before_it_drains_and_drains_before_it_competes() {
    let mut stage = Stage::protected();
    stage.kill("castor");
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
    let acts = stage.node("pollux").acts.clone();
    let at = |name: &str| acts.iter().position(|a| a.starts_with(name)).unwrap();
    let claim = acts.iter().position(|a| a.contains("TryWin")).unwrap();
    assert!(at("CloseSession") < at("Drain"));
    assert!(at("Drain") < at("ProbeWorld"));
    assert!(at("ProbeWorld") < claim && claim < at("GoLive"));
}

#[test]
fn backup_lost_while_protected_outputs_wait_until_the_primary_has_won_without_it() {
    let mut stage = Stage::protected();
    stage.arbiter_cut.insert(host("castor"));
    stage.kill("pollux");
    stage.run_until(1000, |stage| stage.status("castor") == "arbitrating");
    stage.run(2000);
    assert_eq!(stage.node("castor").gate, GateMode::Shut);
    stage.arbiter_cut.clear();
    stage.run_until(2000, |stage| stage.status("castor") == "protected");
    assert_eq!(stage.named_backup(), Some(host("helen")));
}

#[test]
fn a_backup_that_is_lost_again_and_again_is_not_left_alone_for_longer_than_it_held() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(5000, |stage| stage.status("castor") == "protected");
    for _ in 0..8 {
        stage.run(5000);
        stage.kill("pollux");
        stage.run_until(2000, |stage| stage.status("castor") != "protected");
        stage.standby(Stage::config("pollux"));
        stage.run_until(5000, |stage| stage.status("castor") == "protected");
    }
}

#[test]
fn partition_between_the_pair_exactly_one_goes_on() {
    for (slow, winner) in [("castor", "pollux"), ("pollux", "castor")] {
        let mut stage = Stage::protected();
        stage.part("castor", "pollux");
        stage.arbiter_cut.insert(host(slow));
        stage.run_until(2000, |stage| stage.acting() == [winner]);
        stage.arbiter_cut.clear();
        stage.run_until(2000, |stage| stage.role(slow) == RoleName::Backup);
        assert_eq!(stage.acting(), [winner]);
        assert_eq!(stage.newest().owner, host(winner));
    }
}

#[test]
fn arbiter_unreachable_both_wait_and_one_goes_on_when_it_is_back() {
    let mut stage = Stage::protected();
    stage.part("castor", "pollux");
    stage.arbiter_cut.extend([host("castor"), host("pollux")]);
    stage.run(5000);
    assert!(stage.acting().is_empty());
    assert_eq!(stage.node("castor").gate, GateMode::Shut);
    stage.arbiter_cut.clear();
    stage.run_until(3000, |stage| stage.acting().len() == 1);
}

#[test]
fn standby_lost_before_the_claim_costs_no_arbitration() {
    for withheld in ["LoadState", "Send"] {
        let mut stage = Stage::new();
        stage.boot(Stage::config("castor"));
        stage.standby(Stage::config("pollux"));
        stage.withhold("pollux", withheld);
        stage.run(300);
        let state = stage.status("castor");
        assert!(
            ["syncing", "joining"].contains(&state),
            "{withheld}: {state}"
        );
        stage.kill("pollux");
        stage.run_until(15_000, |stage| {
            stage.acting() == ["castor"] && stage.status("castor") == "alone"
        });
        assert_eq!(stage.records().len(), 1, "{withheld}");
    }
}

#[test]
fn standby_lost_while_outputs_are_held_frees_them_without_arbitration() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(2000, |stage| stage.status("castor") == "confirming");
    stage.kill("pollux");
    stage.run_until(3000, |stage| stage.status("castor") == "alone");
    assert_eq!(stage.node("castor").gate, GateMode::Open);
    assert_eq!(stage.records().len(), 1);
}

#[test]
fn standby_lost_while_the_claim_that_names_it_is_open_outputs_wait_for_the_decision() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(2000, |stage| stage.status("castor") == "confirming");
    stage.arbiter_cut.insert(host("castor"));
    stage.run_until(1000, |stage| stage.status("castor") == "committing");
    stage.kill("pollux");
    stage.run(3000);
    assert!(matches!(stage.node("castor").gate, GateMode::Holding(_)));
    stage.arbiter_cut.clear();
    stage.run_until(3000, |stage| stage.acting() == ["castor"]);
    let tenures: Vec<_> = stage.records().iter().map(|r| r.tenure).collect();
    assert!(matches!(
        tenures[..],
        [Tenure::Alone, Tenure::Pair { .. }, Tenure::Alone]
    ));
}

#[test]
fn primary_lost_before_the_standby_confirmed_the_standby_discards() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.withhold("pollux", "LoadState");
    stage.run_until(1000, |stage| stage.status("castor") == "syncing");
    stage.kill("castor");
    stage.run_until(2000, |stage| stage.status("pollux") == "standby");
    assert!(!stage.did("pollux", "CloseSession"));
}

#[test]
fn primary_lost_after_confirmation_but_before_the_record_the_standby_waits_then_renounces() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(1000, |stage| stage.status("castor") == "confirming");
    stage.arbiter_cut.insert(host("castor"));
    stage.run_until(1000, |stage| stage.status("castor") == "committing");
    stage.kill("castor");
    stage.run_until(2000, |stage| stage.status("pollux") == "arbitrating");
    stage.run(4500);
    assert_eq!(stage.records().len(), 1);
    stage.run_until(2000, |stage| stage.status("pollux") == "standby");
    assert!(!stage.did("pollux", "GoLive"));
    // The record is still castor's, who may start the VM again by it.
    assert_eq!(stage.records().len(), 2);
    assert!(stage.newest().continues(&stage.records()[0]));
    stage.arbiter_cut.clear();
    stage.boot(Stage::config("castor"));
    stage.run_until(2000, |stage| stage.status("castor") == "protected");
}

/// castor's claim that names pollux is on its way for as long as the test likes, and the two do not
/// hear each other.
fn claim_on_its_way() -> Stage {
    let mut stage = Stage::new();
    stage.claims_held.insert(host("castor"));
    stage.boot(Stage::config("castor"));
    stage.run(10);
    stage.land("castor");
    stage.claims_held.insert(host("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(1000, |stage| stage.status("castor") == "committing");
    stage.part("castor", "pollux");
    stage.run_until(2000, |stage| stage.status("pollux") == "arbitrating");
    stage
}

#[test]
fn a_claim_that_lands_after_the_standby_renounced_names_nobody() {
    let mut stage = claim_on_its_way();
    stage.run_until(8000, |stage| stage.status("pollux") == "standby");
    // Whatever becomes of the claim, outputs wait until it is decided.
    assert!(matches!(stage.node("castor").gate, GateMode::Holding(_)));
    stage.land("castor");
    stage.run_until(100, |stage| stage.acting() == ["castor"]);
    assert_eq!(stage.role("castor"), RoleName::Primary);
    assert_eq!(stage.epoch("castor"), 2);
    assert!(stage.records().iter().all(|r| r.tenure == Tenure::Alone));
    stage.cut.clear();
    stage.run_until(5000, |stage| stage.status("castor") == "protected");
}

#[test]
fn a_standby_whose_renunciation_comes_second_finds_itself_named() {
    let mut stage = claim_on_its_way();
    stage.claims_held.insert(host("pollux"));
    stage.run(6000);
    assert_eq!(stage.status("pollux"), "arbitrating");
    stage.kill("castor");
    stage.land("castor");
    stage.land("pollux");
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
    assert_eq!(stage.epoch("pollux"), 3);
}

#[test]
fn a_standby_that_cannot_renounce_keeps_what_it_has() {
    let mut stage = claim_on_its_way();
    stage.arbiter_cut.insert(host("pollux"));
    stage.run(20_000);
    assert_eq!(stage.status("pollux"), "arbitrating");
    stage.kill("castor");
    stage.land("castor");
    stage.arbiter_cut.clear();
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
}

/// pollux confirmed, which castor never heard, and has renounced, which castor does not know.
fn renounced_unheard() -> Stage {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(1000, |stage| stage.status("castor") == "confirming");
    stage.cut.insert((host("pollux"), host("castor")));
    stage.run_until(1000, |stage| stage.confirmed("pollux"));
    stage.part("castor", "pollux");
    let session = stage.session("pollux");
    stage.run_until(9000, |stage| stage.status("pollux") == "standby");
    assert!(stage.newest().renounces(session));
    assert_eq!(stage.epoch("castor"), 1);
    stage
}

#[test]
fn a_renunciation_of_an_earlier_standby_costs_the_next_one_nothing() {
    let mut stage = renounced_unheard();
    stage.standby(Stage::config("helen"));
    stage.run_until(9000, |stage| stage.status("castor") == "protected");
    assert_eq!(stage.named_backup(), Some(host("helen")));
    assert_eq!(stage.records().len(), 3);
    let acts = &stage.node("castor").acts;
    let transfers = acts.iter().filter(|act| act.starts_with("StartTransfer"));
    assert_eq!(transfers.count(), 2);
}

#[test]
fn a_claim_of_another_kind_is_made_again_after_a_renunciation() {
    let mut stage = renounced_unheard();
    stage.tell(host("castor"), Event::GuestOff);
    stage.run_until(1000, |stage| stage.role("castor") == RoleName::Ended);
    let tenures: Vec<_> = stage.records().iter().map(|r| r.tenure).collect();
    assert_eq!(tenures, [Tenure::Alone, Tenure::Alone, Tenure::Closed]);
}

#[test]
fn primary_lost_after_the_record_but_before_its_word_the_standby_finds_itself_named() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(1000, |stage| stage.status("castor") == "committing");
    // The claim is in the directory already; its answer and every later word are lost.
    stage.kill("castor");
    assert_eq!(stage.records().len(), 2);
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
}

#[test]
fn vmm_of_the_primary_stands_still_backup_takes_over_and_the_primary_finds_out() {
    let mut stage = Stage::protected();
    stage.node("castor").stopped = true;
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
    stage.node("castor").stopped = false;
    stage.run_until(2000, |stage| stage.role("castor") == RoleName::Backup);
    assert_eq!(stage.acting(), ["pollux"]);
}

#[test]
fn vmm_of_the_primary_dies_backup_acts_on_the_end_at_once() {
    let mut stage = Stage::protected();
    let session = stage.session("pollux");
    stage.kill("castor");
    stage.tell(host("pollux"), Event::PeerEnd(session));
    stage.run_until(20, |stage| stage.acting() == ["pollux"]);
}

#[test]
fn acknowledgement_overdue_the_primary_goes_alone() {
    let mut stage = Stage::protected();
    stage.acks_stopped = true;
    stage.run_until(1100, |stage| stage.acting() == ["castor"]);
    assert!(lost(&mut stage, "castor"));
    stage.run_until(1000, |stage| stage.status("pollux") == "standby");
}

#[test]
fn image_or_tap_out_of_reach_the_backup_does_not_compete() {
    let mut stage = Stage::protected();
    stage.node("pollux").world_usable = false;
    stage.kill("castor");
    stage.run(3000);
    assert_eq!(stage.records().len(), 2);
    assert!(
        stage
            .node("pollux")
            .notices
            .contains(&Notice::WorldUnusable)
    );
    stage.node("pollux").world_usable = true;
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
}

#[test]
fn storage_lost_on_the_primary_only_the_backup_relieves_it() {
    let mut stage = Stage::protected();
    stage.arbiter_cut.insert(host("castor"));
    stage.tell(host("castor"), Event::StorageLost);
    stage.run_until(3000, |stage| stage.acting() == ["pollux"]);
    stage.run_until(3000, |stage| stage.role("castor") == RoleName::Backup);
}

#[test]
fn storage_lost_on_both_nobody_moves() {
    let mut stage = Stage::protected();
    stage.node("pollux").world_usable = false;
    stage.tell(host("castor"), Event::StorageLost);
    stage.run(5000);
    assert_eq!(stage.status("castor"), "protected");
    assert_eq!(stage.status("pollux"), "following");
}

#[test]
fn divergence_the_vm_runs_on_and_a_new_transfer_starts() {
    let mut stage = Stage::protected();
    diverge(&mut stage, "pollux");
    stage.run_until(1000, |stage| stage.acting() == ["castor"]);
    let told = |n: &Notice| matches!(n, Notice::Diverged(_));
    assert!(stage.node("castor").notices.iter().any(told));
    assert!(!stage.did("pollux", "CloseSession"));
    stage.run_until(3000, |stage| stage.status("castor") == "protected");
}

#[test]
fn divergence_after_the_primary_was_lost_never_competes() {
    let mut stage = Stage::protected();
    stage.withhold("pollux", "Drain");
    stage.kill("castor");
    stage.run_until(1000, |stage| stage.did("pollux", "Drain"));
    diverge(&mut stage, "pollux");
    stage.run(3000);
    assert_eq!(stage.records().len(), 2);
    let left = Notice::Leaving(Leave::Diverged);
    assert!(stage.node("pollux").notices.contains(&left));
}

fn diverge(stage: &mut Stage, name: &str) {
    let session = stage.session(name);
    let report = DivergenceReport {
        exit: ExitNumber(7),
        expected: 1,
        actual: 2,
        text: "rax".to_owned(),
    };
    stage.tell(host(name), Event::Diverged { session, report });
}

#[test]
fn the_gate_did_not_run_the_epoch_is_renewed_and_protection_stays() {
    let mut stage = Stage::protected();
    stage.node("castor").gate = GateMode::Shut;
    let gap = ft::ClockGap {
        gap: std::time::Duration::from_millis(300),
    };
    stage.tell(host("castor"), Event::GateGap(gap));
    stage.run_until(1000, |stage| stage.epoch("castor") == 3);
    assert!(matches!(
        stage.nodes[&host("castor")].gate,
        GateMode::Holding(_)
    ));
    assert_eq!(stage.status("castor"), "protected");
    stage.run(200);
    stage.kill("castor");
    stage.run_until(2000, |stage| stage.acting() == ["pollux"]);
    assert_eq!(stage.epoch("pollux"), 4);
}

#[test]
fn a_backup_is_not_resumed_after_it_began_to_drain() {
    let mut stage = Stage::protected();
    stage.withhold("pollux", "CloseSession");
    stage.part("castor", "pollux");
    stage.run_until(1000, |stage| stage.status("pollux") == "draining");
    stage.cut.clear();
    stage.run(3000);
    assert_ne!(stage.status("pollux"), "following");
    stage.run_until(3000, |stage| {
        stage.acting() == ["castor"] || stage.status("castor") == "protected"
    });
}

#[test]
fn switch_over_moves_the_role_and_the_old_primary_becomes_the_backup() {
    let mut stage = Stage::protected();
    stage.kill("helen");
    stage.tell(host("castor"), Event::Command(Command::SwitchOver));
    stage.run_until(1000, |stage| stage.acting() == ["pollux"]);
    stage.run_until(6000, |stage| stage.status("pollux") == "protected");
    assert_eq!(stage.named_backup(), Some(host("castor")));
}

#[test]
fn switch_over_that_nobody_takes_is_called_off_and_the_guest_resumes() {
    let mut stage = Stage::protected();
    stage.withhold("pollux", "CloseSession");
    stage.tell(host("castor"), Event::Command(Command::SwitchOver));
    stage.run_until(6000, |stage| stage.did("castor", "Resume"));
    assert_eq!(stage.newest().owner, host("castor"));
}

#[test]
fn backup_lost_during_a_switch_over_the_guest_resumes() {
    let mut stage = Stage::protected();
    stage.withhold("castor", "Quiesce");
    stage.tell(host("castor"), Event::Command(Command::SwitchOver));
    stage.kill("pollux");
    stage.run_until(2000, |stage| stage.did("castor", "Resume"));
    assert_eq!(stage.acting(), ["castor"]);
}

#[test]
fn power_off_closes_the_record_and_ends_both() {
    let mut stage = Stage::protected();
    stage.tell(host("castor"), Event::GuestOff);
    stage.run_until(1000, |stage| stage.role("castor") == RoleName::Ended);
    stage.run_until(1000, |stage| stage.role("pollux") == RoleName::Ended);
    assert_eq!(stage.newest().tenure, Tenure::Closed);
}

#[test]
fn power_off_with_the_primary_lost_before_closing_the_backup_closes() {
    let mut stage = Stage::protected();
    stage.node("pollux").guest_off = true;
    stage.kill("castor");
    stage.run_until(2000, |stage| stage.role("pollux") == RoleName::Ended);
    assert_eq!(stage.newest().tenure, Tenure::Closed);
    assert_eq!(stage.newest().owner, host("pollux"));
}

#[test]
fn power_off_with_the_backup_lost_goes_alone_first() {
    let mut stage = Stage::protected();
    stage.acks_stopped = true;
    stage.run(20);
    stage.kill("pollux");
    stage.tell(host("castor"), Event::GuestOff);
    stage.run_until(3000, |stage| stage.role("castor") == RoleName::Ended);
    let tenures: Vec<_> = stage.records().iter().map(|r| r.tenure).collect();
    assert_eq!(tenures[2..], [Tenure::Alone, Tenure::Closed]);
}

#[test]
fn control_operations_go_through_the_log() {
    let mut stage = Stage::protected();
    let reset = Command::Control(ControlOp::Reset, vec![]);
    stage.tell(host("castor"), Event::Command(reset));
    assert!(stage.did("castor", "Inject(Reset"));
}

#[test]
fn unprotect_wins_an_epoch_without_the_backup_and_looks_for_none() {
    let mut stage = Stage::protected();
    stage.tell(host("castor"), Event::Command(Command::Unprotect));
    stage.run(3000);
    assert_eq!(stage.status("castor"), "alone");
    assert_eq!(stage.newest().tenure, Tenure::Alone);
    assert_eq!(stage.status("pollux"), "standby");
    stage.tell(host("castor"), Event::Command(Command::Protect));
    stage.run_until(2000, |stage| stage.status("castor") == "protected");
}

#[test]
fn a_standby_that_differs_is_refused_by_name_and_the_next_one_is_taken() {
    let mut stage = Stage::new();
    let properties = |memory: &str| vec![("memory".to_owned(), memory.to_owned())];
    let with = |name: &str, memory: &str| {
        let mut config = Stage::config(name);
        config.fingerprint = properties(memory).try_into().unwrap();
        config
    };
    stage.boot(with("castor", "128"));
    stage.standby(with("pollux", "256"));
    stage.standby(with("helen", "128"));
    stage.run_until(3000, |stage| stage.status("castor") == "protected");
    assert_eq!(stage.named_backup(), Some(host("helen")));
    let named = |n: &Notice| matches!(n, Notice::StandbyDiffers { differences, .. } if differences[0].name == "memory");
    assert!(stage.node("castor").notices.iter().any(named));
}

#[test]
fn an_answer_older_than_what_is_known_does_not_end_a_standing() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    stage.run_until(1000, |stage| stage.status("castor") == "confirming");
    stage.run_until(1000, |stage| stage.named_backup().is_some());
    stage.kill("castor");
    // The storage client of pollux shows a directory as it was before there was any record.
    stage.records_unseen = true;
    stage.run_until(2000, |stage| stage.status("pollux") == "arbitrating");
    stage.run(7000);
    assert_eq!(stage.status("pollux"), "arbitrating");
    assert!(stage.acting().is_empty());
    stage.records_unseen = false;
    stage.run_until(3000, |stage| stage.acting() == ["pollux"]);
}

#[test]
fn a_backup_whose_replica_hangs_is_given_up_although_all_else_is_well() {
    let mut stage = Stage::protected();
    let castor = host("castor");
    stage.replay_stopped_at = Some(0);
    stage.run_until(15_000, |stage| stage.named_backup() != Some(host("pollux")));
    assert_eq!(stage.newest().owner, castor);
    assert_eq!(stage.role("castor"), RoleName::Primary);
}

#[test]
fn a_standby_that_diverges_soon_after_every_start_is_asked_less_and_less_often() {
    let mut stage = Stage::new();
    stage.boot(Stage::config("castor"));
    stage.standby(Stage::config("pollux"));
    let mut waits = Vec::new();
    for _ in 0..4 {
        let from = stage.now;
        stage.run_until(20_000, |stage| stage.status("castor") == "protected");
        waits.push(stage.now - from);
        let session = stage.session_of("pollux").unwrap();
        let report = DivergenceReport {
            exit: ExitNumber(1),
            expected: 1,
            actual: 2,
            text: String::new(),
        };
        stage.tell(host("pollux"), Event::Diverged { session, report });
        stage.run_until(20_000, |stage| stage.status("castor") != "protected");
    }
    // 0.5 s, 1 s, 2 s, less what the primary takes to notice and to go alone.
    assert!(waits.is_sorted(), "{waits:?}");
    assert!(waits[3] >= 1900 * stage::MS, "{waits:?}");
}
