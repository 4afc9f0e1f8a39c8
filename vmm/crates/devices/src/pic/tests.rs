use super::*;

/// Initialised as Linux does (init_8259A): vectors 0x30 and 0x38, cascade on 2, no automatic EOI, all unmasked.
fn initialised(level_triggered: u16) -> Pics {
    let mut pics = Pics::new(level_triggered);
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0x00),
        (0xa1, 0x00),
    ] {
        pics.write(port, value);
    }
    pics
}

fn take(pics: &mut Pics) -> Option<u8> {
    pics.pending().then(|| pics.acknowledge())
}

#[test]
fn power_on_masks_everything() {
    let mut pics = Pics::new(0);
    pics.set_line(0, true);
    assert!(!pics.pending());
}

#[test]
fn an_edge_interrupts_once_and_needs_a_new_edge() {
    let mut pics = initialised(0);
    pics.set_line(4, true);
    assert_eq!(take(&mut pics), Some(0x34));
    pics.write(0x20, 0x20);
    assert_eq!(
        take(&mut pics),
        None,
        "the line is still high, but there was no new edge"
    );
    pics.set_line(4, false);
    pics.set_line(4, true);
    assert_eq!(take(&mut pics), Some(0x34));
}

#[test]
fn an_edge_is_kept_when_the_line_falls_again() {
    let mut pics = initialised(0);
    pics.pulse(0);
    pics.set_line(0, false);
    assert_eq!(take(&mut pics), Some(0x30));
}

#[test]
fn a_level_interrupts_while_its_line_is_high() {
    let mut pics = initialised(1 << 5);
    pics.set_line(5, true);
    assert_eq!(take(&mut pics), Some(0x35));
    assert_eq!(take(&mut pics), None, "in service");
    pics.write(0x20, 0x60 | 5);
    assert_eq!(take(&mut pics), Some(0x35));
    pics.set_line(5, false);
    pics.write(0x20, 0x60 | 5);
    assert_eq!(take(&mut pics), None);
}

#[test]
fn a_level_that_falls_before_inta_leaves_nothing_pending() {
    let mut pics = initialised(1 << 5);
    pics.set_line(5, true);
    pics.set_line(5, false);
    assert_eq!(take(&mut pics), None);
}

#[test]
fn lower_numbers_come_first_and_are_not_interrupted_by_higher_ones() {
    let mut pics = initialised(0);
    pics.set_line(6, true);
    pics.set_line(3, true);
    assert_eq!(take(&mut pics), Some(0x33));
    assert_eq!(take(&mut pics), None);
    pics.pulse(0);
    assert_eq!(take(&mut pics), Some(0x30), "nests");
    pics.write(0x20, 0x20);
    assert_eq!(take(&mut pics), None, "3 is still in service");
    pics.write(0x20, 0x20);
    assert_eq!(take(&mut pics), Some(0x36));
}

#[test]
fn the_slave_comes_through_input_two_and_needs_both_eois() {
    let mut pics = initialised(0);
    pics.set_line(8, true);
    pics.set_line(12, true);
    assert_eq!(take(&mut pics), Some(0x38));
    pics.write(0x20, 0x62);
    assert_eq!(take(&mut pics), None, "the slave still serves 8");
    pics.write(0xa0, 0x60);
    assert_eq!(take(&mut pics), Some(0x3c));
}

#[test]
fn a_second_slave_input_is_not_lost_with_automatic_eoi() {
    let mut pics = initialised(0);
    for (port, value) in [
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x03),
        (0xa1, 0),
    ] {
        pics.write(port, value);
    }
    pics.set_line(8, true);
    pics.set_line(12, true);
    assert_eq!(take(&mut pics), Some(0x38));
    pics.write(0x20, 0x20);
    assert_eq!(take(&mut pics), Some(0x3c));
}

#[test]
fn masked_inputs_wait_and_are_seen_in_the_request_register() {
    let mut pics = initialised(0);
    pics.write(0x21, 0x10);
    pics.set_line(4, true);
    assert_eq!(take(&mut pics), None);
    assert_eq!(pics.read(0x21), 0x10);
    assert_eq!(pics.read(0x20), 0x10);
    pics.write(0x21, 0);
    assert_eq!(take(&mut pics), Some(0x34));
    assert_eq!(pics.read(0x20), 0);
    pics.write(0x20, 0x0b);
    assert_eq!(pics.read(0x20), 0x10, "in service");
}

#[test]
fn inta_without_a_request_is_spurious_and_not_in_service() {
    let mut pics = initialised(0);
    assert_eq!(pics.acknowledge(), 0x37);
    pics.write(0x20, 0x0b);
    assert_eq!(pics.read(0x20), 0);
}

#[test]
fn automatic_eoi_leaves_nothing_in_service() {
    let mut pics = initialised(0);
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x03),
        (0x21, 0),
    ] {
        pics.write(port, value);
    }
    pics.pulse(0);
    assert_eq!(take(&mut pics), Some(0x30));
    pics.pulse(0);
    assert_eq!(take(&mut pics), Some(0x30));
}

#[test]
fn special_mask_mode_lets_lower_priorities_through_a_masked_service() {
    let mut pics = initialised(0);
    pics.set_line(3, true);
    assert_eq!(take(&mut pics), Some(0x33));
    pics.set_line(6, true);
    pics.write(0x21, 1 << 3);
    assert_eq!(take(&mut pics), None);
    pics.write(0x20, 0x68);
    assert_eq!(take(&mut pics), Some(0x36));
}

#[test]
fn rotation_on_eoi_makes_the_served_input_the_lowest() {
    let mut pics = initialised(0);
    pics.set_line(0, true);
    assert_eq!(take(&mut pics), Some(0x30));
    pics.write(0x20, 0xa0);
    pics.pulse(0);
    pics.set_line(7, true);
    assert_eq!(take(&mut pics), Some(0x37));
}

#[test]
fn poll_acknowledges_by_a_read() {
    let mut pics = initialised(0);
    pics.set_line(4, true);
    pics.write(0x20, 0x0c);
    assert_eq!(pics.read(0x20), 0x84);
    assert!(!pics.pending());
    pics.write(0x20, 0x0c);
    assert_eq!(pics.read(0x20), 0);
}

#[test]
fn the_elcr_keeps_the_inputs_that_must_be_edges() {
    let mut pics = initialised(0);
    pics.write(0x4d0, 0xff);
    pics.write(0x4d1, 0xff);
    assert_eq!((pics.read(0x4d0), pics.read(0x4d1)), (0xf8, 0xde));
}

#[test]
fn initialisation_forgets_edges_and_services_but_not_the_elcr() {
    let mut pics = initialised(1 << 5);
    pics.pulse(0);
    pics.set_line(3, true);
    assert_eq!(take(&mut pics), Some(0x30));
    pics.write(0x20, 0x11);
    pics.write(0x21, 0x40);
    pics.write(0x21, 0x04);
    pics.write(0x21, 0x01);
    assert_eq!(take(&mut pics), None);
    pics.set_line(5, true);
    assert_eq!(take(&mut pics), Some(0x45));
    assert_eq!(pics.read(0x4d0), 1 << 5);
}

#[test]
fn state_with_impossible_values_is_refused() {
    let mut state = Pics::new(0).save();
    state.slave.lowest_priority = 8;
    assert!(Pics::restore(&state).is_err());
}
