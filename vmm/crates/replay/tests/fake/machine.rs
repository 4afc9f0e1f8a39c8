//! The machine at single exits, on a vCPU that follows a script.

use devices::{Effect, Input, VirtualTime};
use format::ExitNumber;
use hypervisor::fake::{Done, FakeVm, ScriptedVcpu, Step};
use hypervisor::{Exit, GuestRam, Vcpu, kvm_regs};
use replay::{Machine, MachineConfig, MachineError, Ran};

use crate::rig::{TSC, board, config};

type Scripted = Machine<FakeVm, ScriptedVcpu>;

fn scripted(config: MachineConfig, script: impl IntoIterator<Item = Step>) -> Scripted {
    let vm = FakeVm::new(GuestRam::new(1 << 20).expect("memory for a megabyte"));
    Machine::new(vm, ScriptedVcpu::new(script), board(), config)
}

fn write(port: u16, value: u8) -> Step {
    Step::exit(Exit::PortOut {
        port,
        size: 1,
        count: 1,
    })
    .with_data(&[value])
}

fn read(port: u16) -> Step {
    Step::exit(Exit::PortIn {
        port,
        size: 4,
        count: 1,
    })
}

fn at_rip(step: Step, rip: u64) -> Step {
    step.with_regs(kvm_regs {
        rip,
        rflags: 1 << 9,
        ..kvm_regs::default()
    })
}

/// Runs to the next exit and leaves it, with the time where it is wanted.
fn pass(machine: &mut Scripted) {
    assert_eq!(machine.run().expect("the script goes on"), Ran::Exit);
    if machine.wants_time() {
        let now = Input::Time(VirtualTime(machine.board().now().0 + 1));
        machine.apply(now).expect("time goes on");
    }
    let _ = machine.take_effects();
    machine.leave().expect("the fake takes interrupts");
}

#[test]
fn the_time_stamp_is_virtual_time_in_two_registers_and_in_the_access() {
    let mut machine = scripted(config(), [read(TSC)]);
    machine.run().unwrap();
    assert!(machine.wants_time() && !machine.can_leave());
    let now = 0x1_2345_6789;
    machine.apply(Input::Time(VirtualTime(now))).unwrap();
    assert!(machine.is_open() && machine.is_at_exit());
    let regs = machine.vcpu().regs();
    assert_eq!((regs.rax, regs.rdx), (0x2345_6789, 1));
    machine.leave().unwrap();
    machine.run().unwrap_err();
    let data = 0x2345_6789_u32.to_le_bytes().to_vec();
    let left = Done::Left { step: 0, data };
    assert_eq!(machine.vcpu().done.last(), Some(&left));
}

#[test]
fn exits_are_numbered_and_each_is_in_the_digest() {
    let mut machine = scripted(config(), [write(0x80, 1), Step::kicked(), write(0x80, 1)]);
    let mut seen = vec![machine.digest()];
    pass(&mut machine);
    seen.push(machine.digest());
    assert_eq!(machine.run().unwrap(), Ran::Kicked);
    assert_eq!(machine.digest(), seen[1], "a kick is no exit");
    assert_eq!(machine.exit(), ExitNumber(1));
    pass(&mut machine);
    assert_eq!(machine.exit(), ExitNumber(2));
    assert!(!seen.contains(&machine.digest()));
}

/// What sets both interrupt controllers and the UART up.
fn setup() -> Vec<Step> {
    let writes = [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xef),
        (0x3f9, 0x01),
    ];
    writes.map(|(port, value)| write(port, value)).to_vec()
}

/// The windows that a guest which cannot take its interrupt is asked for, at a read of the time and at a write.
fn windows(config: MachineConfig) -> Vec<bool> {
    let mut script = setup();
    script.push(at_rip(read(TSC), 0x1000));
    script.push(at_rip(write(0x80, 0), 0x1000));
    script.push(at_rip(read(TSC), 0x2000));
    let mut machine = scripted(config, script);
    for _ in 0..setup().len() {
        pass(&mut machine);
    }
    let mut asked = Vec::new();
    for exit in 0..3 {
        machine.run().expect("the script goes on");
        if machine.wants_time() {
            let now = Input::Time(VirtualTime(exit + 1));
            machine.apply(now).expect("time goes on");
        }
        if exit == 0 {
            let key = Input::ConsoleRx(vec![b'x']);
            machine.apply(key).expect("there is room for a key");
        }
        machine.leave().expect("the fake takes a window");
        asked.push(machine.vcpu().interrupt_window());
    }
    assert_eq!(machine.vcpu().injected().count(), 0);
    asked
}

#[test]
fn the_window_is_asked_for_only_where_every_host_opens_it_exactly() {
    assert_eq!(windows(config()), [true, true, true]);
    let exact = MachineConfig {
        window_at: Some(0x800..0x1800),
        ..config()
    };
    assert_eq!(windows(exact), [true, false, false]);
}

#[test]
fn an_interrupt_goes_in_where_the_exit_is_left_and_takes_the_window_back() {
    let mut script = setup();
    script.push(at_rip(write(0x80, 0), 0));
    script.push(at_rip(Step::exit(Exit::InterruptWindow), 0).interruptible());
    let mut machine = scripted(config(), script);
    for _ in 0..setup().len() {
        pass(&mut machine);
    }
    machine.run().unwrap();
    machine.apply(Input::ConsoleRx(vec![b'x'])).unwrap();
    machine.leave().unwrap();
    assert!(machine.vcpu().interrupt_window());
    pass(&mut machine);
    assert_eq!(machine.vcpu().injected().collect::<Vec<_>>(), [0x24]);
    assert!(!machine.vcpu().interrupt_window());
}

#[test]
fn a_halted_guest_is_left_with_an_interrupt_only() {
    let mut script = setup();
    script.push(at_rip(Step::exit(Exit::Halt), 0).interruptible());
    let mut machine = scripted(config(), script);
    for _ in 0..setup().len() {
        pass(&mut machine);
    }
    machine.run().unwrap();
    assert!(machine.is_halted() && machine.is_open() && !machine.can_leave());
    machine.apply(Input::ConsoleRx(vec![b'x'])).unwrap();
    assert!(machine.can_leave());
    machine.leave().unwrap();
    assert_eq!(machine.vcpu().injected().collect::<Vec<_>>(), [0x24]);
}

#[test]
#[should_panic(expected = "HLT with an interrupt")]
fn a_halted_guest_without_an_interrupt_is_never_left() {
    let mut machine = scripted(config(), [at_rip(Step::exit(Exit::Halt), 0)]);
    machine.run().unwrap();
    let _ = machine.leave();
}

#[test]
fn a_triple_fault_is_a_reset() {
    let mut machine = scripted(config(), [Step::exit(Exit::Shutdown)]);
    machine.run().unwrap();
    assert!(!machine.has_ended());
    assert_eq!(machine.take_effects(), [Effect::Reset]);
    assert!(machine.has_ended());
}

#[test]
fn what_the_machine_has_no_use_for_is_an_error_with_its_exit() {
    let odd = Exit::SystemEvent(3);
    let script = [write(0x80, 0), at_rip(Step::exit(odd), 0x77)];
    let mut machine = scripted(config(), script);
    pass(&mut machine);
    let error = machine.run().unwrap_err();
    let MachineError::Unexpected { exit, what, rip } = error else {
        panic!("{error}");
    };
    assert_eq!((exit, what, rip), (ExitNumber(2), odd, 0x77));
    let mut machine = scripted(config(), [at_rip(Step::exit(Exit::EmulationFailed), 0x78)]);
    let error = machine.run().unwrap_err();
    let MachineError::Unemulated { exit, rip, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((exit, rip), (ExitNumber(1), 0x78));
}

#[test]
fn a_rejected_input_is_an_error_and_changes_nothing() {
    let mut machine = scripted(config(), [write(0x80, 0)]);
    machine.run().unwrap();
    let (board, digest) = (machine.board().save(), machine.digest());
    let error = machine.apply(Input::NetRx(vec![0; 60])).unwrap_err();
    assert!(matches!(
        error,
        MachineError::Rejected {
            exit: ExitNumber(1),
            ..
        }
    ));
    assert_eq!((machine.board().save(), machine.digest()), (board, digest));
}
