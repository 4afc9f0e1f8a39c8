use super::*;

const START: VirtualTime = VirtualTime(1_000_000);

fn after(ticks: u64) -> VirtualTime {
    START.after_pit_ticks(ticks)
}

/// Channel 0 programmed at `START` with `control` and a 16-bit count.
fn programmed(control: u8, count: u16) -> Pit {
    let mut pit = Pit::new();
    pit.write(0x43, control, START);
    for byte in count.to_le_bytes() {
        pit.write(0x40, byte, START);
    }
    pit
}

fn latched(pit: &mut Pit, channel: u8, now: VirtualTime) -> u16 {
    pit.write(0x43, channel << 6, now);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([pit.read(port, now), pit.read(port, now)])
}

#[test]
fn power_on_raises_nothing() {
    let mut pit = Pit::new();
    assert_eq!(pit.next_tick(), None);
    assert!(!pit.advance(VirtualTime(u64::MAX)));
}

#[test]
fn mode_two_ticks_with_its_period_without_drift() {
    let mut pit = programmed(0x34, 4773);
    for k in 1..1000 {
        assert_eq!(pit.next_tick(), Some(after(4773 * k)));
        assert!(!pit.advance(VirtualTime(after(4773 * k).0 - 1)));
        assert!(pit.advance(after(4773 * k)));
    }
    assert_eq!(pit.ticks(), (999, 0));
}

#[test]
fn ticks_due_together_are_one_interrupt_and_counted_as_lost() {
    let mut pit = programmed(0x34, 4773);
    assert!(pit.advance(after(4773 * 5 + 10)));
    assert!(!pit.advance(after(4773 * 5 + 10)));
    assert_eq!(pit.ticks(), (1, 4));
    assert_eq!(pit.next_tick(), Some(after(4773 * 6)));
}

#[test]
fn a_count_of_zero_is_65536() {
    let pit = programmed(0x36, 0);
    assert_eq!(pit.next_tick(), Some(after(65_536)));
}

#[test]
fn one_shot_modes_fire_once_and_again_when_written() {
    for control in [0x38, 0x30] {
        let mut pit = programmed(control, 1000);
        assert_eq!(pit.next_tick(), Some(after(1000)));
        assert!(pit.advance(after(5000)));
        assert_eq!(pit.next_tick(), None);
        assert!(!pit.advance(after(100_000)));
        let later = after(100_000);
        pit.write(0x40, 0x10, later);
        assert_eq!(pit.next_tick(), None, "half a count written");
        pit.write(0x40, 0x27, later);
        assert_eq!(pit.next_tick(), Some(later.after_pit_ticks(0x2710)));
    }
}

#[test]
fn a_control_word_disarms_the_channel() {
    let mut pit = programmed(0x34, 4773);
    pit.write(0x43, 0x30, after(10));
    assert_eq!(pit.next_tick(), None);
}

#[test]
fn very_short_periods_wake_the_host_at_most_every_hundred_microseconds() {
    let mut pit = programmed(0x34, 7);
    let first = pit.next_tick().unwrap();
    assert!(first.0 - START.0 >= 100_000);
    assert!(pit.advance(first));
    assert!(pit.next_tick().unwrap().0 - first.0 >= 99_999);
}

#[test]
fn the_latched_count_stands_still_until_both_bytes_are_read() {
    let mut pit = programmed(0x34, 0x1234);
    pit.write(0x43, 0x00, after(0x34));
    assert_eq!(pit.read(0x40, after(0x100)), 0x00);
    pit.write(0x43, 0x00, after(0x200));
    assert_eq!(
        pit.read(0x40, after(0x300)),
        0x12,
        "a second latch is ignored"
    );
    assert_eq!(latched(&mut pit, 0, after(0x1000)), 0x234);
}

#[test]
fn counts_by_mode() {
    let mut rate = programmed(0x34, 1000);
    assert_eq!(latched(&mut rate, 0, after(0)), 1000);
    assert_eq!(latched(&mut rate, 0, after(999)), 1);
    assert_eq!(latched(&mut rate, 0, after(1000)), 1000);
    let mut square = programmed(0x36, 1000);
    assert_eq!(latched(&mut square, 0, after(100)), 800);
    assert_eq!(latched(&mut square, 0, after(600)), 800);
    let mut one_shot = programmed(0x30, 1000);
    assert_eq!(latched(&mut one_shot, 0, after(400)), 600);
    assert_eq!(
        latched(&mut one_shot, 0, after(1001)),
        0xffff,
        "goes on below zero"
    );
    let mut decimal = programmed(0x35, 0x1000);
    assert_eq!(latched(&mut decimal, 0, after(1)), 0x0999);
}

#[test]
fn single_byte_access_reads_and_writes_that_byte() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x14, START);
    pit.write(0x40, 200, START);
    assert_eq!(pit.read(0x40, after(50)), 150);
    assert_eq!(pit.read(0x40, after(60)), 140);
    pit.write(0x43, 0x24, START);
    pit.write(0x40, 2, START);
    assert_eq!(pit.read(0x40, START), 2);
}

#[test]
fn read_back_gives_status_then_count() {
    let mut pit = programmed(0x34, 1000);
    pit.write(0x43, 0xc2, after(100));
    assert_eq!(
        pit.read(0x40, after(200)),
        0xb4,
        "out high, loaded, two bytes, mode 2"
    );
    let count = u16::from_le_bytes([pit.read(0x40, after(300)), pit.read(0x40, after(300))]);
    assert_eq!(count, 900);
    pit.write(0x43, 0x30, after(400));
    pit.write(0x43, 0xe2, after(400));
    assert_eq!(
        pit.read(0x40, after(400)),
        0x70,
        "out low, null count, mode 0"
    );
}

/// As Linux calibrates the TSC: gate on, mode 0, then wait for the output in port 0x61.
#[test]
fn channel_two_reaches_terminal_count_in_port_61() {
    let mut pit = Pit::new();
    pit.write(0x61, 0x01, START);
    pit.write(0x43, 0xb0, START);
    pit.write(0x42, 0x9b, START);
    pit.write(0x42, 0x2e, START);
    assert_eq!(pit.read(0x61, after(0x2e9a)) & 0x21, 0x01);
    assert_eq!(pit.read(0x61, after(0x2e9b)) & 0x21, 0x21);
}

#[test]
fn the_gate_halts_and_resumes_mode_zero() {
    let mut pit = Pit::new();
    pit.write(0x43, 0xb0, START);
    pit.write(0x42, 0x00, START);
    pit.write(0x42, 0x10, START);
    assert_eq!(latched(&mut pit, 2, after(100)), 0x1000, "gate is low");
    pit.write(0x61, 1, after(100));
    pit.write(0x61, 0, after(200));
    assert_eq!(latched(&mut pit, 2, after(5000)), 0x1000 - 100);
    pit.write(0x61, 1, after(5000));
    assert_eq!(latched(&mut pit, 2, after(5100)), 0x1000 - 200);
}

#[test]
fn the_gate_restarts_periodic_and_triggered_modes() {
    for (control, mode_output_before) in [(0xb4, true), (0xb2, true)] {
        let mut pit = Pit::new();
        pit.write(0x43, control, START);
        pit.write(0x42, 0x00, START);
        pit.write(0x42, 0x10, START);
        assert_eq!(pit.read(0x61, after(10)) & 0x20 != 0, mode_output_before);
        pit.write(0x61, 1, after(100));
        let later = after(100).after_pit_ticks(50);
        assert_eq!(latched(&mut pit, 2, later), 0x1000 - 50);
        pit.write(0x61, 0, after(200));
        pit.write(0x61, 1, after(300));
        let later = after(300).after_pit_ticks(1);
        assert_eq!(latched(&mut pit, 2, later), 0x1000 - 1);
    }
}

#[test]
fn the_refresh_bit_toggles_with_time() {
    let mut pit = Pit::new();
    let low = pit.read(0x61, VirtualTime(0));
    let high = pit.read(0x61, VirtualTime(REFRESH_TOGGLE_NS));
    assert_eq!(low ^ high, PORT61_REFRESH);
}

#[test]
fn impossible_state_is_refused() {
    let mut state = Pit::new().save();
    state.channels[1].initial = 0;
    assert!(Pit::restore(&state).is_err(), "would divide by zero");
    let mut state = Pit::new().save();
    state.next_edge = Some(5);
    assert!(Pit::restore(&state).is_err());
}
