//! The board's old devices together: interrupts from device to vector, ports, reset.

use devices::{Board, BusAddress, Effect, Input, Rejected, VirtualTime};

use crate::guest::{Machine, config};

#[test]
fn a_tick_reaches_the_cpu_as_irq_zero() {
    let mut machine = Machine::new(&config());
    machine.init_pics();
    // 250 Hz, as Linux programs it.
    for (port, value) in [(0x43, 0x34), (0x40, 0xa5), (0x40, 0x12)] {
        machine.outb(port, value);
    }
    let due = machine.board.next_timer().expect("armed");
    assert!((3_999_000..4_001_000).contains(&due.0));
    machine.set_time(due.0 - 1);
    assert_eq!(machine.take_irq(), None);
    machine.set_time(due.0);
    assert_eq!(machine.take_irq(), Some(0));
    assert_eq!(machine.take_irq(), None);
    machine.set_time(due.0 + 41_000_000);
    assert_eq!(machine.take_irq(), Some(0));
    let counters = machine.board.counters();
    assert_eq!((counters.timer_ticks, counters.timer_ticks_lost), (2, 9));
}

#[test]
fn time_never_goes_back() {
    let mut machine = Machine::new(&config());
    machine.set_time(100);
    machine.set_time(100);
    let (now, to) = (VirtualTime(100), VirtualTime(99));
    let refused = machine.apply(Input::Time(to));
    assert_eq!(refused, Err(Rejected::TimeBackwards { now, to }));
    assert_eq!(machine.board.now(), now);
}

#[test]
fn the_accesses_that_depend_on_time_say_so() {
    let reads: Vec<u16> = (0..=0xffff)
        .filter(|port| Board::reads_time(BusAddress::Port(*port), true))
        .collect();
    assert_eq!(reads, [0x40, 0x41, 0x42, 0x61, 0x71]);
    let writes: Vec<u16> = (0..=0xffff)
        .filter(|port| Board::reads_time(BusAddress::Port(*port), false))
        .collect();
    assert_eq!(writes, [0x40, 0x41, 0x42, 0x43, 0x61, 0x71]);
    assert!(!Board::reads_time(BusAddress::Memory(0xc000_0000), true));
}

#[test]
fn the_console_talks_both_ways_over_irq_four() {
    let mut machine = Machine::new(&config());
    machine.init_pics();
    machine.outb(0x3f8, b'>');
    assert_eq!(machine.take_effects(), [Effect::ConsoleTx(b'>')]);
    machine.outb(0x3fa, 0x01);
    machine.outb(0x3f9, 0x01);
    assert_eq!(machine.board.console_rx_room(), 16);
    machine.apply(Input::ConsoleRx(b"ls\r".to_vec())).unwrap();
    assert_eq!(machine.take_irq(), Some(4));
    assert_eq!(
        [machine.inb(0x3f8), machine.inb(0x3f8), machine.inb(0x3f8)],
        *b"ls\r"
    );
    assert_eq!(machine.take_irq(), None);
    let refused = machine.apply(Input::ConsoleRx(vec![b'x'; 17]));
    assert_eq!(refused, Err(Rejected::NoRoom));
    assert_eq!(machine.board.console_rx_room(), 16, "nothing was taken");
}

#[test]
fn switching_off_and_resetting_are_effects() {
    for (port, value, effect) in [
        (0xf4, 0, Some(Effect::PowerOff)),
        (0x64, 0xfe, Some(Effect::Reset)),
        (0xcf9, 0x06, Some(Effect::Reset)),
        (0xcf9, 0x02, None),
        (0x64, 0xd1, None),
    ] {
        let mut machine = Machine::new(&config());
        machine.outb(port, value);
        assert_eq!(
            machine.take_effects(),
            Vec::from_iter(effect),
            "{port:#x} {value:#x}"
        );
    }
}

#[test]
fn no_keyboard_controller_keeps_linux_waiting() {
    let mut machine = Machine::new(&config());
    let status = machine.inb(0x64);
    assert_eq!(status & 0x02, 0, "ready for the reset command");
    assert_eq!(status & 0x01, 0x01, "never drained: no controller is found");
}

#[test]
fn what_nobody_claims_reads_as_ones() {
    let mut machine = Machine::new(&config());
    for port in [0x80, 0x2f8, 0x3c0, 0x70, 0x1f0, 0xffff] {
        assert_eq!(machine.inb(port), 0xff, "{port:#x}");
        machine.outb(port, 0);
    }
    assert_eq!(machine.load_u32(0xfee0_0020), 0xffff_ffff);
    machine.store(0xfec0_0000, &[0; 4]);
    let mut wide = [0; 4];
    machine.port_in(0xfffe, &mut wide);
    assert!(machine.take_effects().is_empty());
}

#[test]
fn wide_accesses_reach_byte_registers_in_order() {
    let mut machine = Machine::new(&config());
    machine.port_out(0x20, &[0x11, 0x50]);
    machine.outb(0x21, 0x04);
    machine.outb(0x21, 0x01);
    machine.port_out(0x70, &[0x0f, 0x5a]);
    assert_eq!(machine.inb(0x71), 0x5a);
    let mut word = [0; 2];
    machine.port_in(0x20, &mut word);
    assert_eq!(word, [0, 0]);
}

#[test]
fn a_string_instruction_of_a_page_has_room_for_its_effects() {
    let mut machine = Machine::new(&config());
    for byte in 0..4096 {
        machine.board.port_write(&machine.ram, 0x3f8, &[byte as u8]);
    }
    assert_eq!(machine.board.take_effects().len(), 4096);
    assert!(!machine.board.has_effects());
}
