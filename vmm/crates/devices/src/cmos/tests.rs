use super::*;

/// 2026-11-23 16:35:08 UTC, a Monday.
const BASE: u64 = 1_795_451_708;

fn read(cmos: &mut Cmos, index: u8, now: VirtualTime) -> u8 {
    cmos.write_index(index);
    cmos.read_data(now)
}

fn write(cmos: &mut Cmos, index: u8, value: u8, now: VirtualTime) {
    cmos.write_index(index);
    cmos.write_data(value, now);
}

fn clock(cmos: &mut Cmos, now: VirtualTime) -> Vec<u8> {
    [CENTURY, 9, 8, 7, 6, 4, 2, 0]
        .map(|index| read(cmos, index, now))
        .to_vec()
}

#[test]
fn the_clock_is_base_plus_virtual_time_in_bcd() {
    let mut cmos = Cmos::new(BASE);
    let at_birth = vec![0x20, 0x26, 0x11, 0x23, 2, 0x16, 0x35, 0x08];
    assert_eq!(clock(&mut cmos, VirtualTime(0)), at_birth);
    assert_eq!(clock(&mut cmos, VirtualTime(NS_PER_S - 1)), at_birth);
    let later = VirtualTime((24 * 3600 + 52) * NS_PER_S);
    assert_eq!(
        clock(&mut cmos, later),
        vec![0x20, 0x26, 0x11, 0x24, 3, 0x16, 0x36, 0x00]
    );
}

#[test]
fn an_update_is_never_in_progress_and_the_battery_is_good() {
    let mut cmos = Cmos::new(BASE);
    write(&mut cmos, REG_A, 0xff, VirtualTime(0));
    assert_eq!(read(&mut cmos, REG_A, VirtualTime(0)), 0x7f);
    assert_eq!(read(&mut cmos, REG_C, VirtualTime(0)), 0);
    assert_eq!(read(&mut cmos, REG_D, VirtualTime(0)), 0x80);
}

/// As Linux sets it: stop, write all, start.
#[test]
fn a_clock_set_while_stopped_goes_on_from_there() {
    let mut cmos = Cmos::new(BASE);
    let now = VirtualTime(100 * NS_PER_S);
    write(&mut cmos, REG_B, 0x82, now);
    for (index, value) in [
        (9, 0x30),
        (8, 0x01),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ] {
        write(&mut cmos, index, value, now);
    }
    let stopped = clock(&mut cmos, VirtualTime(500 * NS_PER_S));
    assert_eq!(stopped, vec![0x20, 0x30, 0x01, 0x31, 5, 0x23, 0x59, 0x58]);
    write(&mut cmos, REG_B, 0x02, VirtualTime(500 * NS_PER_S));
    let later = clock(&mut cmos, VirtualTime(502 * NS_PER_S));
    assert_eq!(later, vec![0x20, 0x30, 0x02, 0x01, 6, 0x00, 0x00, 0x00]);
}

#[test]
fn a_running_clock_can_be_set_field_by_field() {
    let mut cmos = Cmos::new(BASE);
    write(&mut cmos, 2, 0x00, VirtualTime(0));
    assert_eq!(read(&mut cmos, 2, VirtualTime(0)), 0x00);
    assert_eq!(read(&mut cmos, 4, VirtualTime(0)), 0x16);
}

#[test]
fn binary_and_twelve_hours() {
    let mut cmos = Cmos::new(BASE);
    let now = VirtualTime(0);
    write(&mut cmos, REG_B, REG_B_BINARY, now);
    assert_eq!(read(&mut cmos, 2, now), 35);
    assert_eq!(read(&mut cmos, 4, now), 4 | HOUR_PM);
    write(&mut cmos, 4, 12, now);
    assert_eq!(read(&mut cmos, 4, now), 12, "midnight");
    write(&mut cmos, REG_B, REG_B_24_HOURS | REG_B_BINARY, now);
    assert_eq!(read(&mut cmos, 4, now), 0);
    write(&mut cmos, REG_B, REG_B_BINARY, now);
    write(&mut cmos, 4, 12 | HOUR_PM, now);
    write(&mut cmos, REG_B, REG_B_24_HOURS | REG_B_BINARY, now);
    assert_eq!(read(&mut cmos, 4, now), 12);
}

#[test]
fn memory_keeps_what_is_written() {
    let mut cmos = Cmos::new(BASE);
    write(&mut cmos, 0x0f, 0x5a, VirtualTime(0));
    write(&mut cmos, 0x7f, 0xa5, VirtualTime(0));
    assert_eq!(read(&mut cmos, 0x0f, VirtualTime(0)), 0x5a);
    assert_eq!(
        read(&mut cmos, 0xff, VirtualTime(0)),
        0xa5,
        "bit 7 is the NMI mask"
    );
}

#[test]
fn any_register_values_are_survived() {
    let mut cmos = Cmos::new(u64::MAX);
    for value in 0..=255 {
        for index in 0..=0x7f {
            write(&mut cmos, index, value, VirtualTime(u64::MAX));
            read(&mut cmos, index, VirtualTime(u64::MAX));
        }
        let saved = cmos.save();
        assert_eq!(Cmos::restore(&saved).unwrap().save(), saved);
    }
}
