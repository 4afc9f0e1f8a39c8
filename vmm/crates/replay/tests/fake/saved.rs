//! A machine that was saved, written out, read and made anew goes on as the one that was saved.

use format::Event;
use hypervisor::fake::{FakeVm, ToyVcpu};
use hypervisor::{CpuidTable, GuestRam};
use replay::{
    MACHINE_SCHEMA, MachineConfig, MachineState, Recorder, Replayer, SavedError, Step,
    load_machine, save_machine,
};
use transfer::{Error, Reader, Writer};

use crate::rig::*;

fn write_out(state: &MachineState, memory: &GuestRam) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).expect("a vector takes all");
    save_machine(&mut writer, state, memory).expect("memory can be read");
    writer.finish().expect("a vector takes all")
}

fn read_in(bytes: &[u8]) -> Result<Guest, SavedError> {
    let mut reader = Reader::new(bytes)?;
    load_machine(&mut reader, |_| Ok(()), make)
}

fn make(_: &MachineConfig, ram: GuestRam) -> Result<(FakeVm, ToyVcpu), SavedError> {
    let vm = FakeVm::new(ram);
    let vcpu = vm.create_toy(0, CpuidTable::default());
    Ok((vm, vcpu))
}

/// A replica goes through the log; wherever all of a point's entries are applied, another one is made from its
/// saved state, and that one replays the rest.
#[test]
fn a_state_saved_anywhere_replays_the_rest_to_the_same_end() {
    let recorded = record(user(&clerk()), busy_day());
    let entries = recorded.entries();
    let (mut saved, mut halted, mut between) = (0, 0, 0);
    let mut replica = Replayer::new(user(&clerk()));
    for (index, bytes) in entries.iter().enumerate() {
        let next = decode(bytes);
        let whole = next.exit > replica.machine().exit() || matches!(next.event, Event::Delta(_));
        if whole {
            halted += u32::from(replica.machine().is_halted());
            between += u32::from(replica.machine().is_open() && !replica.machine().is_at_exit());
            let state = replica.save().unwrap().expect("one exit is one access");
            let stream = write_out(&state, replica.machine().memory());
            let machine = read_in(&stream).unwrap();
            assert_eq!(machine.exit(), replica.machine().exit());
            assert_eq!(machine.digest(), replica.machine().digest());
            let rest = replay(machine, &entries[index..]).unwrap();
            assert_eq!(End::of(rest.machine()), recorded.end, "before {next:?}");
            saved += 1;
        }
        feed(&mut replica, std::slice::from_ref(bytes)).unwrap();
    }
    assert_eq!(End::of(replica.machine()), recorded.end);
    assert!(saved > 10 && halted > 2 && between == 1);
}

#[test]
fn a_guest_saved_in_its_run_is_recorded_on_in_another_machine() {
    let mut halted = 0;
    for exit in 1..=exits::SECOND_DOT + 1 {
        let mut first = live(kernel(&clerk()));
        while first.machine().exit().0 < exit {
            first.step().unwrap();
        }
        first.quiesce(true);
        drive(&mut first, &mut Vec::new().into(), Step::Quiet);
        let state = first.machine_mut().save().unwrap().unwrap();
        halted += u32::from(first.machine().is_halted());
        let memory = first.machine().memory();
        assert_eq!(state.memory_bytes(), memory.size_bytes());
        let stream = write_out(&state, memory);
        let (_, world, log) = first.into_parts();
        let mut machine = read_in(&stream).unwrap();
        machine.set_dirty_log(true).unwrap();
        let mut second = Recorder::new(machine, world, log);
        drive(&mut second, &mut Vec::new().into(), Step::Ended);
        let recorded = finish(second);
        assert_eq!(recorded.console(), "....", "saved at exit {exit}");
        let replica = replay(kernel(&clerk()), &recorded.log).unwrap();
        assert_eq!(End::of(replica.machine()), recorded.end);
    }
    assert_eq!(halted, 2);
}

#[test]
fn a_guest_saved_after_its_end_has_ended_in_another_machine_too() {
    let mut first = live(kernel(&clerk()));
    drive(&mut first, &mut Vec::new().into(), Step::Ended);
    let state = first.machine_mut().save().unwrap().unwrap();
    let stream = write_out(&state, first.machine().memory());
    let (_, world, log) = first.into_parts();
    let machine = read_in(&stream).unwrap();
    assert!(machine.has_ended());
    let mut second = Recorder::new(machine, world, log);
    assert_eq!(second.step().unwrap(), Step::Ended);
}

/// The state and the memory of a clerk that has just read the time.
fn some_state() -> (MachineState, Guest) {
    let mut live = live(kernel(&clerk()));
    while live.machine().exit().0 < exits::TSC {
        live.step().expect("the fake does not fail");
    }
    let state = live.machine_mut().save().expect("the fake saves");
    (state.expect("it is at rest"), live.into_parts().0)
}

/// Why a stream with these records is refused.
fn refused(records: impl FnOnce(&mut Writer<Vec<u8>>)) -> SavedError {
    let mut writer = Writer::new(Vec::new()).expect("a vector takes all");
    records(&mut writer);
    let stream = writer.finish().expect("a vector takes all");
    read_in(&stream).expect_err("it is refused")
}

#[test]
fn a_state_of_another_schema_is_refused() {
    let (state, _) = some_state();
    let found = MACHINE_SCHEMA + 1;
    let error = refused(|writer| writer.section("machine", found, &state).unwrap());
    let SavedError::Stream(Error::Schema { tag, found, known }) = error else {
        panic!("{error}");
    };
    assert_eq!(
        (tag.as_str(), found, known),
        ("machine", MACHINE_SCHEMA + 1, MACHINE_SCHEMA)
    );
}

#[test]
fn a_stream_that_is_no_whole_machine_is_refused() {
    let (state, machine) = some_state();
    let page = [1; hypervisor::PAGE_SIZE];
    let error = refused(|_| {});
    assert!(matches!(error, SavedError::Stream(Error::Missing(_))));
    let error = refused(|writer| writer.page(1, &page).unwrap());
    assert!(matches!(error, SavedError::Stream(Error::Damaged(_))));
    let error = refused(|writer| {
        for _ in 0..2 {
            writer.section("machine", MACHINE_SCHEMA, &state).unwrap();
        }
    });
    assert!(matches!(error, SavedError::Stream(Error::Damaged(_))));
    let error = refused(|writer| {
        writer.section("machine", MACHINE_SCHEMA, &state).unwrap();
        writer.page(1 << 30, &page).unwrap();
    });
    assert!(matches!(error, SavedError::Page(page) if page == 1 << 30));
    let stream = write_out(&state, machine.memory());
    let cut = read_in(&stream[..stream.len() - 1]);
    assert!(matches!(cut, Err(SavedError::Stream(_))));
}

#[test]
fn a_damaged_stream_is_never_taken_for_right() {
    let (state, machine) = some_state();
    let stream = write_out(&state, machine.memory());
    for at in (0..stream.len()).step_by(997) {
        let mut damaged = stream.clone();
        damaged[at] ^= 0x10;
        assert!(read_in(&damaged).is_err(), "byte {at}");
    }
}

#[test]
fn a_guest_with_other_cpuid_than_the_state_is_refused() {
    let (state, machine) = some_state();
    let stream = write_out(&state, machine.memory());
    let mut reader = Reader::new(stream.as_slice()).unwrap();
    let leaf = hypervisor::CpuidLeaf::default();
    let encoded = postcard::to_stdvec(&vec![leaf]).unwrap();
    let table: CpuidTable = postcard::from_bytes(&encoded).unwrap();
    let loaded = load_machine(
        &mut reader,
        |_| Ok(()),
        |_, ram| {
            let vm = FakeVm::new(ram);
            let vcpu = vm.create_toy(0, table);
            Ok::<_, SavedError>((vm, vcpu))
        },
    );
    let error = loaded.expect_err("it is refused");
    assert!(matches!(
        error,
        SavedError::Hypervisor(hypervisor::Error::StateMismatch(_))
    ));
}
