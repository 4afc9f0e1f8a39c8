//! A replica that is not where the log says reports it with the point, what was expected and what was found.

use std::cell::Cell;

use format::{ControlOp, Event, ExitNumber};
use hypervisor::fake::{FakeVm, Op, Reg, ScriptedVcpu, Step};
use hypervisor::{Exit, GuestRam, RunError, Vcpu};
use replay::{Divergence, Machine, MachineError, Mismatch, ReplayError, Replayed, Replayer};

use crate::rig::*;

/// Bytes that one printed character counts for in an output sum.
const PRINTED_BYTES: u32 = 18;

/// The clerk with one instruction replaced.
fn other_clerk(index: usize, op: Op) -> Guest {
    let mut program = clerk();
    program[index] = op;
    kernel(&program)
}

fn clerk_log() -> Recorded {
    record(kernel(&clerk()), Vec::new())
}

/// Where the report says that the machine is, and where both last agreed.
fn points(report: &Divergence) -> (u64, u64) {
    (report.exit.0, report.agreed.0)
}

/// Index of the first entry of an exit.
fn index_of(entries: &[Vec<u8>], exit: u64) -> usize {
    let first = entries
        .iter()
        .position(|bytes| decode(bytes).exit.0 == exit);
    first.expect("the exit has an entry")
}

#[test]
fn a_guest_with_another_register_is_found_at_the_first_digest() {
    let recorded = clerk_log();
    let report = report(replay(
        other_clerk(at::ROUNDS, Op::Set(Reg::C, 5)),
        &recorded.log,
    ));
    assert_eq!(points(&report), (exits::DOT, 0));
    let entries = recorded.entries();
    let Event::Output { digest, .. } = decode(&entries[index_of(&entries, exits::DOT)]).event
    else {
        panic!("the dot is an output");
    };
    let Mismatch::Registers { expected, found } = report.mismatch else {
        panic!("{report}");
    };
    assert_eq!(expected, digest);
    assert_ne!(found, digest);
    assert_eq!(report.rip, u64::from(BASE) + at::DOT as u64 * 8);
}

#[test]
fn a_register_that_the_program_does_not_use_is_found_too() {
    let recorded = clerk_log();
    let mut machine = kernel(&clerk());
    let mut regs = *machine.vcpu().regs();
    regs.r15 = 1;
    machine.vcpu_mut().set_regs(&regs);
    let report = report(replay(machine, &recorded.log));
    assert_eq!(points(&report), (exits::DOT, 0));
    assert!(matches!(report.mismatch, Mismatch::Registers { .. }));
}

#[test]
fn a_guest_that_does_not_print_what_was_printed_is_reported() {
    let machine = other_clerk(at::DOT, Op::Out(NOWHERE));
    let report = report(replay(machine, &clerk_log().log));
    assert_eq!(points(&report), (exits::DOT, 0));
    let Mismatch::Output { expected, found } = report.mismatch else {
        panic!("{report}");
    };
    assert_eq!((expected.0, found), (PRINTED_BYTES, (0, 0)));
}

#[test]
fn a_guest_that_prints_something_else_is_reported() {
    // The registers are the same: AL is set by the instruction before, and what differs is the port's data.
    let mut program = clerk();
    program[at::DOT - 1] = Op::Set(Reg::A, 0x0001_0100 | u32::from(b','));
    let report = report(replay(kernel(&program), &clerk_log().log));
    assert_eq!(points(&report), (exits::DOT, 0));
    let Mismatch::Output { expected, found } = report.mismatch else {
        panic!("{report}");
    };
    assert_eq!((expected.0, found.0), (PRINTED_BYTES, PRINTED_BYTES));
    assert_ne!(expected.1, found.1);
}

#[test]
fn a_guest_that_prints_where_the_log_has_no_output_is_reported() {
    let recorded = record(other_clerk(at::DOT, Op::Out(NOWHERE)), Vec::new());
    let report = report(replay(kernel(&clerk()), &recorded.log));
    assert_eq!(points(&report), (exits::DOT, 0));
    let Mismatch::Output { expected, found } = report.mismatch else {
        panic!("{report}");
    };
    assert_eq!((expected, found.0), ((0, 0), PRINTED_BYTES));
}

#[test]
fn a_guest_that_makes_another_exit_than_recorded_is_reported() {
    // Without HLT the exit is the next read of the time, which the log's time for the HLT answers; the tick that
    // comes with it makes one more, and then the guest prints where the log has the read.
    let machine = other_clerk(at::HALT, Op::Jump(at::HALT as u32 + 1));
    let report = report(replay(machine, &clerk_log().log));
    assert_eq!(points(&report), (exits::HALT + 2, exits::DOT));
    let Mismatch::Output { expected, .. } = report.mismatch else {
        panic!("{report}");
    };
    assert_eq!(expected, (0, 0), "the log has no output for that exit");
}

#[test]
fn memory_that_no_register_shows_is_found_at_the_end() {
    let recorded = clerk_log();
    let machine = other_clerk(at::STORE, Op::Store(Reg::A, Reg::B, 24));
    let replica = replay(machine, &recorded.log).unwrap();
    let end = End::of(replica.machine());
    assert!(
        replica
            .compare_end("registers", recorded.end.registers, end.registers)
            .is_ok()
    );
    let report = report(replica.compare_end("memory", recorded.end.memory, end.memory));
    assert_eq!(
        report.mismatch,
        Mismatch::End {
            what: "memory",
            expected: recorded.end.memory,
            found: end.memory
        }
    );
    assert!(report.to_string().contains("memory at the end"));
}

#[test]
fn a_changed_digest_is_reported_with_both_and_the_last_agreement() {
    let mut log = clerk_log().entries();
    let changed = index_of(&log, exits::SECOND_DOT);
    let Event::Output { bytes, crc, digest } = decode(&log[changed]).event else {
        panic!("the dot is an output");
    };
    let wrong = Event::Output {
        bytes,
        crc,
        digest: digest ^ 1,
    };
    log[changed] = entry(exits::SECOND_DOT, wrong);
    let report = report(replay(kernel(&clerk()), &log));
    assert_eq!(points(&report), (exits::SECOND_DOT, exits::DOT));
    let mismatch = Mismatch::Registers {
        expected: digest ^ 1,
        found: digest,
    };
    assert_eq!(report.mismatch, mismatch);
    assert_eq!(report.mismatch.numbers(), (digest ^ 1, digest));
    let text = report.to_string();
    for part in [
        "DIVERGENCE at exit 13 (last agreed at exit 9)".to_owned(),
        format!("the log has {:016x}, here it is {digest:016x}", digest ^ 1),
        format!("RIP {:#x}", report.rip),
        format!("exit {:<10} Time", exits::SECOND_TSC),
    ] {
        assert!(text.contains(&part), "no {part:?} in {text}");
    }
}

#[test]
fn a_report_has_the_newest_24_entries() {
    let mark = |number: u8| entry(0, Event::Control(ControlOp::Mark, &vec![0; number.into()]));
    let mut log: Vec<_> = (0..40).map(mark).collect();
    log.push(entry(0, Event::Reached { digest: 1 }));
    let report = report(replay(kernel(&clerk()), &log));
    assert_eq!(report.entries.len(), 24);
    assert!(report.entries[0].contains("Mark, 17 bytes"));
    assert!(report.entries[23].contains("Reached"));
}

#[test]
fn an_entry_for_an_exit_that_is_past_is_reported() {
    let mut log = clerk_log().entries();
    let dot = index_of(&log, exits::DOT);
    log.truncate(dot + 1);
    log.push(entry(exits::TSC, Event::ConsoleRx(b"x")));
    let report = report(replay(kernel(&clerk()), &log));
    assert_eq!(points(&report), (exits::DOT, exits::DOT));
    assert_eq!(
        report.mismatch,
        Mismatch::Entry {
            kind: "ConsoleRx",
            why: "it belongs to exit 8, which is past".to_owned()
        }
    );
}

#[test]
fn an_entry_that_does_not_fit_its_exit_is_reported() {
    let recorded = clerk_log().entries();
    let done = Event::DiskDone {
        request: 3,
        status: format::DiskStatus::Ok,
        data: &[],
    };
    let random = Event::Entropy {
        request: 4,
        data: b"random",
    };
    let long = [0; 17];
    let cases = [
        (exits::TSC, Event::ConsoleRx(b"x"), "needs the time first"),
        (exits::TSC, done, "needs the time first"),
        (exits::HALT, done, "no such request"),
        (exits::HALT, random, "no such request"),
        (exits::HALT, Event::NetRx(&[0; 60]), "not there"),
        (exits::HALT, Event::ConsoleRx(&long), "no room"),
        (exits::HALT, Event::Time { ns: 1 }, "before the machine's"),
    ];
    for (exit, event, reason) in cases {
        let mut log = recorded[..index_of(&recorded, exit)].to_vec();
        log.push(entry(exit, event));
        let report = report(replay(kernel(&clerk()), &log));
        assert_eq!(report.exit.0, exit, "{event:?}");
        let Mismatch::Entry { kind, why } = &report.mismatch else {
            panic!("{event:?}: {report}");
        };
        assert_eq!(*kind, event.kind().name());
        assert!(why.contains(reason), "{event:?}: {why}");
    }
}

#[test]
fn an_input_for_a_machine_between_two_exits_is_reported() {
    for event in [
        Event::ConsoleRx(b"x"),
        Event::Time {
            ns: 1_000_000_000_000,
        },
    ] {
        let report = report(replay(kernel(&clerk()), &[entry(0, event)]));
        assert_eq!(points(&report), (0, 0));
        assert_eq!(
            report.mismatch,
            Mismatch::Entry {
                kind: event.kind().name(),
                why: "the machine is between two exits".to_owned()
            }
        );
    }
}

#[test]
fn a_replica_that_cannot_leave_its_exit_says_what_it_would_need() {
    let recorded = clerk_log().entries();
    for (exit, what) in [(exits::TSC, "needs the time"), (exits::HALT, "is halted")] {
        let mut log = recorded.clone();
        log.remove(index_of(&recorded, exit));
        let report = report(replay(kernel(&clerk()), &log));
        assert_eq!(report.exit.0, exit);
        let Mismatch::Stuck { why } = &report.mismatch else {
            panic!("{report}");
        };
        assert!(why.contains(what), "{why}");
        assert!(report.to_string().contains("cannot reach"));
    }
}

#[test]
fn a_guest_that_computes_on_can_be_stopped_and_goes_on() {
    let recorded = clerk_log();
    let entries = recorded.entries();
    let dot = index_of(&entries, exits::DOT);
    let mut replica = replay(kernel(&clerk()), &entries[..dot]).unwrap();
    replica.machine_mut().vcpu_mut().kick_after(40);
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        true
    };
    let next = decode(&entries[dot]);
    let stopped = replica.entry(&next, &stop);
    assert!(matches!(stopped, Err(ReplayError::Stopped)));
    assert_eq!((asked.get(), replica.machine().exit().0), (1, exits::TSC));
    feed(&mut replica, &entries[dot..]).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn a_guest_that_never_makes_another_exit_is_an_error_and_not_a_place_to_go_on_from() {
    let exit = Exit::PortOut {
        port: NOWHERE,
        size: 1,
        count: 1,
    };
    let vm = FakeVm::new(GuestRam::new(1 << 20).unwrap());
    let vcpu = ScriptedVcpu::new([Step::exit(exit), Step::kicked(), Step::kicked()]);
    let mut replica = Replayer::new(Machine::new(vm, vcpu, board(), config()));
    let error = replica.advance(ExitNumber(2), &|| false).unwrap_err();
    assert!(
        matches!(
            error,
            ReplayError::Machine(MachineError::Run {
                exit: ExitNumber(1),
                source: RunError::ScriptEnd
            })
        ),
        "{error}"
    );
}

#[test]
fn a_guest_that_has_switched_off_does_not_run_on() {
    let mut replica = replay(kernel(&[Op::Out(POWER_OFF), Op::Out(NOWHERE)]), &[]).unwrap();
    replica.advance(ExitNumber(1), &|| false).unwrap();
    let mut sum = replay::OutputSum::default();
    sum.add(&devices::Effect::PowerOff);
    let output = Event::Output {
        bytes: sum.bytes,
        crc: sum.crc,
        digest: replica.machine().digest().0,
    };
    feed(&mut replica, &[entry(1, output)]).unwrap();
    let report = report(replica.advance(ExitNumber(2), &|| false));
    assert_eq!(points(&report), (1, 1));
    assert!(matches!(report.mismatch, Mismatch::Stuck { why } if why.contains("ended")));
}

#[test]
fn a_control_entry_is_handed_over_with_its_data() {
    let mut replica = replay(kernel(&clerk()), &[]).unwrap();
    let control = entry(1, Event::Control(ControlOp::Limits, b"data"));
    let applied = replica.entry(&decode(&control), &|| false).unwrap();
    let expected = Replayed::Control(ControlOp::Limits, b"data".to_vec());
    assert_eq!(applied, expected);
    assert_eq!(replica.machine().exit(), ExitNumber(1));
    assert!(!replica.machine().has_ended());
}

/// One entry lost, or at the exit before or after its own. A machine that notices nothing has to be the one that
/// was recorded: a time that nobody looks at may be lost.
#[test]
fn a_log_with_any_one_entry_lost_or_moved_is_never_taken_for_right() {
    let recorded = record(user(&clerk()), busy_day());
    let entries = recorded.entries();
    let (last, others) = entries.split_last().unwrap();
    let mut reported = 0;
    for index in 0..others.len() {
        for by in [-1, 0, 1] {
            let mut log = others.to_vec();
            let old = log.remove(index);
            let old = decode(&old);
            if by != 0 {
                let exit = old.exit.0.checked_add_signed(by).unwrap();
                log.insert(index, entry(exit, old.event));
            }
            log.push(last.clone());
            let kind = old.event.kind().name();
            match replay(user(&clerk()), &log) {
                Err(ReplayError::Divergence(_)) => reported += 1,
                Err(other) => panic!("{kind} of exit {} by {by}: {other}", old.exit),
                Ok(replica) => {
                    assert_eq!(kind, "Time", "exit {} by {by}", old.exit);
                    assert_eq!(End::of(replica.machine()), recorded.end);
                }
            }
        }
    }
    assert!(reported * 10 > others.len() * 3 * 9, "only {reported}");
}

#[test]
fn a_log_with_another_key_or_another_output_is_never_taken_for_right() {
    let recorded = record(user(&clerk()), busy_day());
    let entries = recorded.entries();
    let mut changed = 0;
    for (index, bytes) in entries.iter().enumerate() {
        let old = decode(bytes);
        let event = match old.event {
            Event::ConsoleRx(_) => Event::ConsoleRx(b"z"),
            Event::Output { bytes, crc, digest } => Event::Output {
                bytes,
                crc: crc ^ 1,
                digest,
            },
            _ => continue,
        };
        let mut log = entries.clone();
        log[index] = entry(old.exit.0, event);
        let report = report(replay(user(&clerk()), &log));
        assert!(
            matches!(report.mismatch, Mismatch::Output { .. }),
            "{report}"
        );
        changed += 1;
    }
    assert_eq!(changed, 2 + 7, "two keys and all that was put out");
}

#[test]
fn another_time_than_the_guest_has_read_is_in_its_registers() {
    let program = [Op::In(TSC), Op::Out(NOWHERE), Op::Out(POWER_OFF)];
    let mut log = record(kernel(&program), Vec::new()).entries();
    let Event::Time { ns } = decode(&log[0]).event else {
        panic!("the guest reads the time first");
    };
    log[0] = entry(1, Event::Time { ns: ns + 1 });
    let report = report(replay(kernel(&program), &log));
    assert_eq!(points(&report), (3, 0));
    assert!(matches!(report.mismatch, Mismatch::Registers { .. }));
}
