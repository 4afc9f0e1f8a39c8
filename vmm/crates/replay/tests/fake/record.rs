//! What the recorder writes, and that a replica of it is the same machine.

use devices::{DiskStatus, Effect, Input, RequestId, VirtualTime};
use format::{ControlOp, EntryReader, Event, Seq};
use hypervisor::fake::{Op, Reg};
use replay::{NoLog, Recorder, Step};

use crate::rig::*;

#[test]
fn a_replayed_guest_ends_as_the_recorded_one() {
    let recorded = record(kernel(&clerk()), Vec::new());
    assert_eq!(recorded.console(), "....");
    assert!(recorded.end.ended);
    let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn the_time_is_logged_where_the_guest_reads_it_and_where_a_timer_wakes_it() {
    let recorded = record(kernel(&clerk()), Vec::new());
    let expected = [
        (6, "Time"), // the timer is set up
        (7, "Time"),
        (exits::TSC, "Time"),
        (exits::DOT, "Output"),
        (exits::HALT, "Time"),
        (exits::SECOND_TSC, "Time"),
        (exits::SECOND_DOT, "Output"),
    ];
    assert_eq!(recorded.outline()[..expected.len()], expected);
    assert_eq!(recorded.outline().last(), Some(&(24, "Output")));
    let bytes: usize = recorded.log.iter().map(Vec::len).sum();
    assert_eq!(recorded.stats.log_bytes, bytes as u64);
}

#[test]
fn inputs_at_an_exit_and_between_exits_replay_alike() {
    let recorded = record(user(&clerk()), busy_day());
    assert_eq!(recorded.console(), "x.y...");
    assert_eq!((recorded.stats.deltas, recorded.stats.kicks), (1, 1));
    let replica = replay(user(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn an_input_comes_with_the_time_of_its_coming() {
    let recorded = record(user(&clerk()), busy_day());
    let outline = recorded.outline();
    let from = |kind| {
        let at = outline.iter().position(|(_, found)| *found == kind);
        &outline[at.expect("there is one")..]
    };
    let expected = [(8, "Delta"), (8, "Time"), (8, "ConsoleRx"), (10, "Output")];
    assert_eq!(from("Delta")[..4], expected);
    let second = recorded.entries().len() - from("Output").len() + 2;
    let expected = [(13, "Time"), (13, "ConsoleRx"), (15, "Output")];
    assert_eq!(outline[second..second + 3], expected);
}

#[test]
fn two_recordings_with_the_same_inputs_are_the_same() {
    let [one, other] = [(); 2].map(|()| record(user(&clerk()), busy_day()));
    assert_eq!(one.log, other.log);
    assert_eq!(one.end, other.end);
}

#[test]
fn output_waits_for_the_append_that_holds_its_digest() {
    let recorded = record(kernel(&clerk()), Vec::new());
    assert_eq!(recorded.emitted.len(), 5, "four dots and the end");
    for (effect, after) in &recorded.emitted {
        let Seq(next) = after.expect("there is a log");
        let append = &recorded.log[next as usize - 1];
        let last = EntryReader::new(append).last().unwrap().unwrap();
        assert!(matches!(last.event, Event::Output { .. }), "{effect:?}");
    }
}

#[test]
fn without_a_log_the_guest_does_the_same_and_nothing_waits() {
    let mut plain = Recorder::new(user(&clerk()), World::new(), NoLog);
    while plain.machine().exit().0 < exits::TSC || !plain.machine().is_left() {
        plain.step().unwrap();
    }
    plain.outside_mut().inputs.push_back(typed("x"));
    plain.machine_mut().vcpu_mut().kick_after(40);
    while plain.step().unwrap() != Step::Ended {}
    assert_eq!(plain.stats().deltas, 0);
    let (machine, world, _) = plain.into_parts();
    assert!(machine.has_ended());
    let text: Vec<_> = world
        .emitted
        .iter()
        .take(2)
        .map(|(effect, after)| (effect.clone(), *after))
        .collect();
    let expected = [b'x', b'.'].map(|byte| (Effect::ConsoleTx(byte), None));
    assert_eq!(text, expected, "what was typed came before the dot");
}

#[test]
fn a_kick_with_nothing_due_leaves_no_trace() {
    let undisturbed = record(user(&clerk()), Vec::new());
    let kicked = record(user(&clerk()), vec![(exits::TSC, Act::Kick(40))]);
    assert_eq!(kicked.stats.kicks, 1);
    assert_eq!(kicked.stats.deltas, 0);
    let outline = undisturbed.outline();
    assert_eq!(kicked.outline(), outline);
    assert!(outline.iter().all(|(_, kind)| *kind != "Delta"));
}

#[test]
fn an_input_waits_for_an_exit_of_the_kernel_but_not_for_long() {
    let mut live = live(kernel(&clerk()));
    while live.machine().exit().0 < exits::TSC || !live.machine().is_left() {
        live.step().unwrap();
    }
    live.outside_mut().inputs.push_back(typed("x"));
    live.machine_mut().vcpu_mut().kick_after(20);
    assert_eq!(live.step().unwrap(), Step::Kicked);
    live.outside_mut().now.0 += 40_000_000;
    live.machine_mut().vcpu_mut().kick_after(20);
    assert_eq!(live.step().unwrap(), Step::Kicked);
    assert_eq!(live.stats().deltas, 0);
    live.outside_mut().now.0 += 20_000_000;
    live.machine_mut().vcpu_mut().kick_after(20);
    assert_eq!(live.step().unwrap(), Step::Moved);
    assert_eq!(live.stats().deltas, 1);
    drive(&mut live, &mut Vec::new().into(), Step::Ended);
    let recorded = finish(live);
    let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

/// So many silent exits, and then what is given.
fn silent(exits: u32, then: &[Op]) -> Vec<Op> {
    let begin = [
        Op::Set(Reg::C, exits),
        Op::Out(NOWHERE),
        Op::Loop(Reg::C, 1),
    ];
    begin.iter().chain(then).copied().collect()
}

#[test]
fn a_silent_guest_gets_a_digest_every_512_exits() {
    let program = silent(1200, &[Op::Out(POWER_OFF)]);
    let recorded = record(kernel(&program), Vec::new());
    let expected = [(512, "Reached"), (1024, "Reached"), (1201, "Output")];
    assert_eq!(recorded.outline(), expected);
    let replica = replay(kernel(&program), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn a_guest_whose_exits_are_far_apart_gets_a_digest_at_each() {
    let program = silent(5, &[Op::Out(POWER_OFF)]);
    let mut live = live(kernel(&program));
    live.outside_mut().tick_ns = 25_000_000;
    drive(&mut live, &mut Vec::new().into(), Step::Ended);
    let reached = (1..=5).map(|exit| (exit, "Reached"));
    let expected: Vec<_> = reached.chain([(6, "Output")]).collect();
    assert_eq!(finish(live).outline(), expected);
}

#[test]
fn a_guest_that_has_come_to_rest_after_many_silent_exits_gets_a_digest() {
    for (exits, expected) in [(62, vec![]), (63, vec![(64, "Reached")])] {
        let mut live = live(kernel(&silent(exits, &[Op::Sti, Op::Halt])));
        drive(&mut live, &mut Vec::new().into(), Step::Halted);
        assert_eq!(finish(live).outline(), expected, "{exits} exits");
    }
}

#[test]
fn an_input_that_the_board_does_not_take_is_not_logged() {
    let done = Input::DiskDone {
        id: RequestId(7),
        status: DiskStatus::Ok,
        data: Vec::new(),
    };
    let recorded = record(kernel(&clerk()), vec![(exits::TSC, Act::Come(done))]);
    let outline = recorded.outline();
    assert!(outline.iter().all(|(_, kind)| *kind != "DiskDone"));
    let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn a_guest_that_halts_with_interrupts_off_has_switched_off() {
    let program = [Op::Cli, Op::Halt];
    let recorded = record(kernel(&program), Vec::new());
    assert_eq!(recorded.outline(), [(1, "Output")]);
    assert_eq!(recorded.emitted, [(Effect::PowerOff, Some(Seq(1)))]);
    let replica = replay(kernel(&program), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn an_operator_who_switches_off_ends_both_at_the_same_exit() {
    let mut live = live(kernel(&clerk()));
    drive(&mut live, &mut Vec::new().into(), Step::Halted);
    live.control(ControlOp::PowerOff, b"why").unwrap();
    assert_eq!(live.step().unwrap(), Step::Ended);
    let recorded = finish(live);
    assert_eq!(recorded.outline().last(), Some(&(exits::HALT, "Control")));
    let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
    assert!(replica.machine().has_ended());
}

#[test]
fn a_guest_that_is_to_be_quiet_rests_at_an_exit_that_was_left_and_goes_on() {
    let mut live = live(kernel(&clerk()));
    while live.machine().exit().0 < exits::TSC {
        live.step().unwrap();
    }
    live.quiesce(true);
    drive(&mut live, &mut Vec::new().into(), Step::Quiet);
    assert!(live.machine().is_left());
    assert_eq!(live.step().unwrap(), Step::Quiet, "as long as it is asked");
    live.quiesce(false);
    drive(&mut live, &mut Vec::new().into(), Step::Ended);
    let recorded = finish(live);
    assert_eq!(recorded.console(), "....");
    let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn a_replica_goes_live_where_the_log_ends_and_the_guest_does_not_notice() {
    let undisturbed = record(kernel(&clerk()), Vec::new());
    let entries = undisturbed.entries();
    for cut in 0..entries.len() {
        let replica = replay(kernel(&clerk()), &entries[..cut]).unwrap();
        let seen = entries[..cut].iter().map(|bytes| decode(bytes));
        let dots = seen.filter(|entry| matches!(entry.event, Event::Output { .. }));
        let (machine, _, unconfirmed) = replica.into_live();
        let mut text: String = ".".repeat(dots.count());
        text.extend(unconfirmed.iter().map(|_| '.'));
        let mut live = live(machine);
        live.outside_mut().now = VirtualTime(live.machine().board().now().0);
        drive(&mut live, &mut Vec::new().into(), Step::Ended);
        text += &finish(live).console();
        assert_eq!(text, "....", "after {cut} entries");
    }
}
