//! Points without a number: what a delta holds, how it travels, and what becomes of a damaged one.

use format::{Event, MAX_APPEND_LEN};
use hypervisor::fake::{Op, Reg};
use hypervisor::{PAGE_SIZE, VcpuState};
use replay::{Mismatch, Ran, ReplayError};

use crate::rig::*;

/// Version and length of the vCPU's state, in bytes.
const HEADER_BYTES: usize = 5;
const PAGES: u32 = 40;

/// Writes many pages in one stretch between two exits.
fn writer() -> Vec<Op> {
    use Reg::{A, B, D};
    vec![
        Op::Set(B, DATA),
        Op::Set(D, PAGES),
        Op::Sti,
        Op::Out(NOWHERE),
        Op::Mix(A), // 4
        Op::Store(A, B, 0),
        Op::AddImm(B, PAGE_SIZE as u32),
        Op::Loop(D, 4),
        Op::Out(POWER_OFF),
    ]
}

fn kicked_writer() -> Recorded {
    let plan = vec![
        (1, Act::Kick(u64::from(PAGES) * 4)),
        (1, Act::Come(typed("x"))),
    ];
    record(user(&writer()), plan)
}

#[test]
fn a_delta_larger_than_an_append_travels_in_parts() {
    let recorded = kicked_writer();
    assert_eq!(recorded.stats.delta_pages, u64::from(PAGES));
    let parts = recorded.outline();
    let parts = parts.iter().filter(|(_, kind)| *kind == "Part").count();
    assert_eq!(parts, (PAGES as usize * PAGE_SIZE) / MAX_APPEND_LEN + 1);
    let replica = replay(user(&writer()), &recorded.log).unwrap();
    assert_eq!(End::of(replica.machine()), recorded.end);
}

#[test]
fn another_entry_between_the_parts_of_a_delta_is_an_error() {
    let mut log = kicked_writer().entries();
    log.insert(1, entry(1, Event::ConsoleRx(b"y")));
    let error = replay(user(&writer()), &log).unwrap_err();
    assert!(matches!(
        error,
        ReplayError::Format(format::Error::Part(
            "another entry between the parts of one"
        ))
    ));
}

#[test]
fn half_a_delta_moves_nothing() {
    let recorded = kicked_writer();
    let replica = replay(user(&writer()), &recorded.entries()[..2]).unwrap();
    let (machine, _, _) = replica.into_live();
    assert!(machine.exit().0 == 0 && machine.is_left());
    let mut live = live(machine);
    drive(&mut live, &mut Vec::new().into(), replay::Step::Ended);
    let undisturbed = record(user(&writer()), Vec::new());
    assert_eq!(finish(live).end.memory, undisturbed.end.memory);
}

#[test]
fn a_delta_has_what_guest_and_vmm_wrote_since_the_log_was_cleared() {
    let mut machine = user(&[
        Op::Set(Reg::B, DATA),
        Op::Store(Reg::B, Reg::B, 0),
        Op::Out(NOWHERE),
        Op::Store(Reg::B, Reg::B, PAGE_SIZE as u32),
        Op::Jump(4),
    ]);
    machine.set_dirty_log(true).unwrap();
    assert_eq!(machine.run().unwrap(), Ran::Exit);
    machine.clear_dirty_log().unwrap();
    machine.leave().unwrap();
    let vmm_page = u64::from(DATA) + 7 * PAGE_SIZE as u64;
    machine.memory().write(vmm_page, &[1]).unwrap();
    machine.vcpu_mut().kick_after(5);
    assert_eq!(machine.run().unwrap(), Ran::Kicked);
    let mut delta = Vec::new();
    assert_eq!(machine.take_delta(&mut delta).unwrap(), 2);
    let first = u64::from(DATA) / PAGE_SIZE as u64;
    let (_, pages) = halves(&delta);
    let pages = pages.chunks_exact(8 + PAGE_SIZE);
    let numbers: Vec<_> = pages
        .map(|page| u64::from_le_bytes(*page.first_chunk().unwrap()))
        .collect();
    assert_eq!(numbers, [first + 1, first + 7]);
}

/// The vCPU's state and the pages of a delta.
fn halves(delta: &[u8]) -> (&[u8], &[u8]) {
    let len = delta[1..HEADER_BYTES].first_chunk();
    let len = u32::from_le_bytes(*len.expect("four bytes"));
    delta[HEADER_BYTES..].split_at(len as usize)
}

/// The log of a busy day with its delta changed.
fn with_delta(recorded: &Recorded, change: impl Fn(&mut Vec<u8>)) -> Vec<Vec<u8>> {
    let mut log = recorded.entries();
    let mut changed = 0;
    for bytes in &mut log {
        let old = decode(bytes);
        if let Event::Delta(delta) = old.event {
            let mut delta = delta.to_vec();
            change(&mut delta);
            let exit = old.exit.0;
            *bytes = entry(exit, Event::Delta(&delta));
            changed += 1;
        }
    }
    assert_eq!(changed, 1);
    log
}

#[test]
fn a_delta_that_does_not_decode_is_reported_with_the_reason() {
    let recorded = record(user(&clerk()), busy_day());
    let state_bytes = |delta: &[u8]| halves(delta).0.len();
    type Damage<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));
    let damages: [Damage<'_>; 7] = [
        ("unknown version", &|delta| delta[0] += 1),
        ("unknown version", &|delta| delta.clear()),
        ("too short", &|delta| delta.truncate(3)),
        ("too short for its vCPU state", &|delta| {
            delta.truncate(state_bytes(delta));
        }),
        ("its vCPU state", &|delta| {
            delta[1..HEADER_BYTES].copy_from_slice(&10_u32.to_le_bytes());
        }),
        ("not whole pages", &|delta| {
            delta.pop();
        }),
        ("outside guest memory", &|delta| {
            let page = HEADER_BYTES + state_bytes(delta);
            delta[page + 5] = 1;
        }),
    ];
    for (reason, damage) in damages {
        let log = with_delta(&recorded, damage);
        let report = report(replay(user(&clerk()), &log));
        assert_eq!((report.exit.0, report.agreed.0), (exits::TSC, 0));
        let Mismatch::Entry { kind: "Delta", why } = &report.mismatch else {
            panic!("{reason}: {report}");
        };
        assert!(why.contains(reason), "{reason}: {why}");
        let last = report.entries.last().unwrap();
        assert!(last.contains("Delta"), "{last}");
    }
}

#[test]
fn a_delta_with_another_register_is_found_at_the_next_digest() {
    let recorded = record(user(&clerk()), busy_day());
    let log = with_delta(&recorded, |delta| {
        let (state, _) = halves(delta);
        let len = state.len();
        let mut state: VcpuState = postcard::from_bytes(state).unwrap();
        state.regs.rcx += 1;
        let state = postcard::to_stdvec(&state).unwrap();
        delta[HEADER_BYTES..HEADER_BYTES + len].copy_from_slice(&state);
    });
    let report = report(replay(user(&clerk()), &log));
    assert_eq!((report.exit.0, report.agreed.0), (exits::TSC + 2, 0));
    let Mismatch::Registers { expected, found } = report.mismatch else {
        panic!("{report}");
    };
    assert_ne!(expected, found);
}

#[test]
fn a_delta_with_another_byte_of_memory_is_found_at_the_end() {
    let recorded = record(user(&clerk()), busy_day());
    let log = with_delta(&recorded, |delta| {
        let page = HEADER_BYTES + halves(delta).0.len();
        delta[page + 8 + 1000] ^= 1;
    });
    let replica = replay(user(&clerk()), &log).unwrap();
    let found = End::of(replica.machine()).memory;
    let report = report(replica.compare_end("memory", recorded.end.memory, found));
    let mismatch = Mismatch::End {
        what: "memory",
        expected: recorded.end.memory,
        found,
    };
    assert_eq!(report.mismatch, mismatch);
}

#[test]
fn a_delta_for_a_guest_that_is_halted_is_reported() {
    let recorded = record(user(&clerk()), busy_day());
    let entries = recorded.entries();
    let delta = entries.iter().find_map(|bytes| match decode(bytes).event {
        Event::Delta(delta) => Some(delta),
        _ => None,
    });
    let mut replica = replay(
        user(&clerk()),
        &record(user(&clerk()), vec![]).entries()[..4],
    )
    .unwrap();
    let late = entry(exits::HALT, Event::Delta(delta.unwrap()));
    let report = report(feed(&mut replica, &[late]));
    assert_eq!((report.exit.0, report.agreed.0), (exits::HALT, exits::DOT));
    assert!(matches!(report.mismatch, Mismatch::Stuck { why } if why.contains("halted")));
}
