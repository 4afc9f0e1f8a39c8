//! What every virtio device's driver relies on: features, status, reset, errors.

use devices::{DiskStatus, Effect, Input};

use crate::guest::{
    DISK, Driver, ENTROPY, EVENT_IDX, INDIRECT, Machine, NET, VERSION_1, config, readable, writable,
};

const NEEDS_RESET: u8 = 0x40;

#[test]
fn every_device_offers_the_modern_rings() {
    let mut machine = Machine::new(&config());
    for device in [NET, DISK, ENTROPY] {
        let driver = Driver::find(&mut machine, device);
        let ring_features = VERSION_1 | INDIRECT | EVENT_IDX;
        assert_eq!(driver.offered(&mut machine) & !0x00ff_ffff, ring_features);
    }
}

#[test]
fn features_need_version_one_and_must_be_offered() {
    let mut machine = Machine::new(&config());
    let mut driver = Driver::find(&mut machine, NET);
    assert!(!driver.negotiate(&mut machine, INDIRECT | EVENT_IDX));
    driver.write_features(&mut machine, VERSION_1 | 1 << 40);
    driver.set_status(&mut machine, 0x08);
    assert_eq!(driver.status(&mut machine) & 0x08, 0);
    // DRIVER_OK without FEATURES_OK does not start the device.
    driver.set_status(&mut machine, 0x04);
    assert_eq!(driver.status(&mut machine) & 0x04, 0);
    driver.write_features(&mut machine, VERSION_1);
    driver.set_status(&mut machine, 0x08);
    assert_eq!(driver.status(&mut machine) & 0x08, 0x08);
    // Agreed is agreed.
    driver.write_features(&mut machine, VERSION_1 | INDIRECT);
    machine.store(driver.at.common + 0x08, &0u32.to_le_bytes());
    assert_eq!(machine.load_u32(driver.at.common + 0x0c), 0);
}

#[test]
fn network_offloads_need_what_they_build_on() {
    const GUEST_CSUM: u64 = 1 << 1;
    const GUEST_TSO4: u64 = 1 << 7;
    const GUEST_ECN: u64 = 1 << 9;
    for (wanted, accepted) in [
        (GUEST_TSO4, false),
        (GUEST_TSO4 | GUEST_CSUM, true),
        (GUEST_ECN | GUEST_CSUM, false),
        (GUEST_ECN | GUEST_CSUM | GUEST_TSO4, true),
    ] {
        let mut machine = Machine::new(&config());
        let mut driver = Driver::find(&mut machine, NET);
        assert_eq!(
            driver.negotiate(&mut machine, VERSION_1 | wanted),
            accepted,
            "{wanted:#x}"
        );
    }
}

#[test]
fn queues_are_chosen_and_read_back_by_their_number() {
    let mut machine = Machine::new(&config());
    let mut driver = Driver::find(&mut machine, NET);
    driver.negotiate(&mut machine, VERSION_1);
    let common = driver.at.common;
    assert_eq!(machine.load_u16(common + 0x12), 2);
    machine.store(common + 0x16, &7u16.to_le_bytes());
    assert_eq!(machine.load_u16(common + 0x18), 0, "there is no queue 7");
    machine.store(common + 0x16, &1u16.to_le_bytes());
    assert_eq!(machine.load_u16(common + 0x18), 256);
    machine.store(common + 0x18, &100u16.to_le_bytes());
    assert_eq!(machine.load_u16(common + 0x18), 256, "not a power of two");
    machine.store(common + 0x18, &64u16.to_le_bytes());
    machine.store(common + 0x20, &0x1234_5678_9abc_def0u64.to_le_bytes());
    let mut address = [0; 8];
    machine.load(common + 0x20, &mut address);
    assert_eq!(u64::from_le_bytes(address), 0x1234_5678_9abc_def0);
    assert_eq!(machine.load_u16(common + 0x18), 64);
    assert_eq!(machine.load_u16(common + 0x1a), 0xffff, "no MSI-X");
    assert_eq!(machine.load_u16(common + 0x10), 0xffff, "no MSI-X");
}

#[test]
fn a_ring_outside_ram_or_misaligned_needs_a_reset() {
    for (desc, avail, used) in [
        (0xffff_0000, 0x11000, 0x12000),
        (0x10000, 0x003f_ffff, 0x12000),
        (0x10000, 0x11000, 0xffff_ffff_ffff_fffc),
        (0x10001, 0x11000, 0x12000),
        (0x10000, 0x11001, 0x12000),
        (0x10000, 0x11000, 0x12002),
    ] {
        let mut machine = Machine::new(&config());
        let mut driver = Driver::find(&mut machine, ENTROPY);
        driver.negotiate(&mut machine, VERSION_1);
        for (at, addr) in [(0x20, desc), (0x28, avail), (0x30, used)] {
            machine.store(driver.at.common + at, &u64::to_le_bytes(addr));
        }
        machine.store(driver.at.common + 0x1c, &1u16.to_le_bytes());
        assert_eq!(machine.load_u16(driver.at.common + 0x1c), 0);
        assert_eq!(driver.status(&mut machine) & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(machine.board.take_faults().len(), 1);
    }
}

#[test]
fn a_fault_interrupts_with_the_configuration_bit_and_a_reset_heals_it() {
    let mut machine = Machine::new(&config());
    machine.init_pics();
    let mut driver = Driver::start(&mut machine, ENTROPY, !0, 8);
    driver.queues[0].add_raw(&machine, (0xffff_ffff_0000, 64, 2, 0));
    driver.queues[0].kick(&mut machine);
    assert_eq!(driver.status(&mut machine) & NEEDS_RESET, NEEDS_RESET);
    let fault = &machine.board.take_faults()[0];
    assert_eq!(fault.device, "rng");
    assert!(fault.reason.contains("outside RAM"), "{}", fault.reason);
    assert_eq!(machine.take_irq(), Some(3));
    assert_eq!(driver.isr(&mut machine), 2);
    assert_eq!(machine.take_irq(), None);
    // Deaf until reset.
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].notify(&mut machine);
    assert!(machine.take_effects().is_empty());
    driver.reset(&mut machine);
    assert_eq!(driver.status(&mut machine), 0);
    let mut driver = Driver::start(&mut machine, ENTROPY, !0, 8);
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].kick(&mut machine);
    assert_eq!(machine.take_effects().len(), 1);
}

#[test]
fn a_reset_waits_for_requests_on_their_way_and_forgets_their_buffers() {
    let mut machine = Machine::new(&config());
    let mut driver = Driver::start(&mut machine, DISK, !0, 128);
    let header = [0u8; 16];
    machine.write(0x20_0000, &header);
    let chain = [
        readable(0x20_0000, 16),
        writable(0x20_1000, 512),
        writable(0x20_2000, 1),
    ];
    driver.queues[0].add(&machine, &chain);
    driver.queues[0].kick(&mut machine);
    let effects = machine.take_effects();
    let [Effect::DiskRead { id, .. }] = effects[..] else {
        panic!("{effects:?}")
    };
    driver.reset(&mut machine);
    assert_ne!(driver.status(&mut machine), 0, "not over yet");
    machine.store(driver.at.common + 0x14, &[1]);
    assert_eq!(machine.board.outstanding(), effects, "still to be done");
    let done = Input::DiskDone {
        id,
        status: DiskStatus::Ok,
        data: vec![0xaa; 512],
    };
    machine.apply(done).unwrap();
    assert_eq!(driver.status(&mut machine), 0);
    assert_eq!(
        machine.read(0x20_1000, 512),
        [0; 512],
        "the driver has taken its memory back"
    );
    assert!(machine.board.outstanding().is_empty());
}

#[test]
fn the_interrupt_line_is_a_level_that_reading_isr_lowers() {
    let mut machine = Machine::new(&config());
    machine.init_pics();
    let mut driver = Driver::start(&mut machine, ENTROPY, !0, 8);
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].kick(&mut machine);
    let id = machine.take_effects()[0].request().unwrap();
    machine
        .apply(Input::Entropy {
            id,
            data: vec![1; 64],
        })
        .unwrap();
    assert_eq!(machine.take_irq(), Some(3));
    assert_eq!(machine.take_irq(), Some(3), "nobody has looked");
    machine.config_write(ENTROPY, 0x04, &0x0406u16.to_le_bytes());
    assert_eq!(machine.take_irq(), None, "INTx is off");
    assert_eq!(machine.config_u8(ENTROPY, 0x06) & 8, 8, "but pending");
    machine.config_write(ENTROPY, 0x04, &0x0006u16.to_le_bytes());
    assert_eq!(driver.isr(&mut machine), 1);
    assert_eq!(machine.take_irq(), None);
}

#[test]
fn notifications_before_the_driver_runs_do_nothing() {
    let mut machine = Machine::new(&config());
    let mut driver = Driver::find(&mut machine, ENTROPY);
    driver.negotiate(&mut machine, !0);
    driver.set_up_queues(&mut machine, 8);
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].notify(&mut machine);
    assert!(machine.take_effects().is_empty());
    driver.set_status(&mut machine, 0x04);
    driver.queues[0].notify(&mut machine);
    assert_eq!(machine.take_effects().len(), 1);
}
