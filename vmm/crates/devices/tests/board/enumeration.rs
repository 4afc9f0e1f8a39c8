//! PCI as Linux finds it with `pci=conf1 acpi=off`.

use crate::guest::{DISK, Driver, ENTROPY, Machine, NET, config};

#[test]
fn mechanism_one_is_found_as_linux_probes_it() {
    let mut machine = Machine::new(&config());
    machine.outb(0xcfb, 0x01);
    let mut saved = [0; 4];
    machine.port_in(0xcf8, &mut saved);
    machine.port_out(0xcf8, &0x8000_0000u32.to_le_bytes());
    let mut answer = [0; 4];
    machine.port_in(0xcf8, &mut answer);
    assert_eq!(u32::from_le_bytes(answer), 0x8000_0000);
    machine.port_out(0xcf8, &saved);
    assert_eq!(
        machine.config_u32(0, 0x08) >> 16,
        0x0600,
        "a host bridge makes it sane"
    );
}

#[test]
fn the_scan_finds_three_devices_with_their_interrupt_lines() {
    let mut machine = Machine::new(&config());
    let found: Vec<(u32, u32)> = (0..32)
        .map(|device| (device, machine.config_u32(device, 0)))
        .filter(|(_, id)| *id != 0xffff_ffff)
        .collect();
    assert_eq!(
        found,
        [
            (0, 0x0008_1b36),
            (NET, 0x1041_1af4),
            (DISK, 0x1042_1af4),
            (ENTROPY, 0x1044_1af4)
        ]
    );
    for (device, irq) in [(NET, 5), (DISK, 6), (ENTROPY, 3)] {
        assert_eq!(machine.config_u32(device, 0x3c) & 0xffff, 0x0100 | irq);
        assert_eq!(machine.config_u8(device, 0x0e), 0, "one function");
        assert_eq!(machine.config_u8(device, 0x08), 1, "not transitional");
    }
    assert_eq!(machine.inb(0x4d0), 0x68, "level-triggered");
    // Other functions, other buses.
    for address in [0x8000_0900u32, 0x8001_0800, 0x0000_0800] {
        machine.port_out(0xcf8, &address.to_le_bytes());
        let mut id = [0; 4];
        machine.port_in(0xcfc, &mut id);
        assert_eq!(id, [0xff; 4]);
    }
}

#[test]
fn devices_that_are_not_configured_are_not_there() {
    let mut machine = Machine::new(&devices::BoardConfig {
        net: None,
        disk: None,
        entropy: false,
        ..config()
    });
    for device in 1..32 {
        assert_eq!(machine.config_u32(device, 0), 0xffff_ffff);
    }
    assert_eq!(machine.load_u32(0xc000_0000), 0xffff_ffff);
}

#[test]
fn bars_are_placed_sized_and_apart() {
    let mut machine = Machine::new(&config());
    let mut places = Vec::new();
    for device in [NET, DISK, ENTROPY] {
        let bar = machine.config_u32(device, 0x10);
        assert!(bar >= 0xc000_0000 && bar & 0xfff == 0);
        machine.config_write(device, 0x10, &[0xff; 4]);
        assert_eq!(
            machine.config_u32(device, 0x10),
            0xffff_f000,
            "4 KiB of 32-bit memory"
        );
        machine.config_write(device, 0x10, &bar.to_le_bytes());
        places.push(bar);
    }
    places.dedup();
    assert_eq!(places.len(), 3);
}

#[test]
fn a_moved_bar_answers_at_its_new_place_only() {
    let mut machine = Machine::new(&config());
    machine.config_write(NET, 0x10, &0xe000_0000u32.to_le_bytes());
    assert_eq!(machine.load_u32(0xc000_0000), 0xffff_ffff);
    let driver = Driver::find(&mut machine, NET);
    assert_eq!(driver.at.common, 0xe000_0000);
    assert_eq!(machine.load_u16(driver.at.common + 0x12), 2);
    machine.config_write(NET, 0x04, &0u16.to_le_bytes());
    assert_eq!(
        machine.load_u32(0xe000_0000),
        0xffff_ffff,
        "memory decoding is off"
    );
}

#[test]
fn configuration_data_takes_bytes_and_words() {
    let mut machine = Machine::new(&config());
    let mut word = [0; 2];
    machine.config_read(NET, 0x02, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x1041);
    assert_eq!(machine.config_u8(NET, 0x01), 0x1a);
    machine.config_write(NET, 0x3c, &[11]);
    assert_eq!(machine.config_u8(NET, 0x3c), 11);
    let mut wide = [0; 8];
    machine.port_in(0xcfc, &mut wide[..4]);
    machine.port_in(0xcff, &mut wide[..2]);
}

#[test]
fn the_configuration_access_window_reaches_the_bar() {
    let mut machine = Machine::new(&config());
    let driver = Driver::find(&mut machine, NET);
    let window = driver.at.window;
    // num_queues of the common structure.
    machine.config_write(NET, window + 4, &[0]);
    machine.config_write(NET, window + 8, &0x12u32.to_le_bytes());
    machine.config_write(NET, window + 12, &2u32.to_le_bytes());
    assert_eq!(machine.config_u32(NET, window + 8), 0x12);
    let mut queues = [0; 2];
    machine.config_read(NET, window + 16, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 2);
    // device_status.
    machine.config_write(NET, window + 8, &0x14u32.to_le_bytes());
    machine.config_write(NET, window + 12, &1u32.to_le_bytes());
    machine.config_write(NET, window + 16, &[1]);
    assert_eq!(driver.status(&mut machine), 1);
    // Lengths and BARs that are not there do nothing.
    machine.config_write(NET, window + 12, &3u32.to_le_bytes());
    assert_eq!(machine.config_u32(NET, window + 16), 0);
    machine.config_write(NET, window + 12, &1u32.to_le_bytes());
    machine.config_write(NET, window + 4, &[1]);
    machine.config_write(NET, window + 16, &[0]);
    assert_eq!(driver.status(&mut machine), 1);
}
