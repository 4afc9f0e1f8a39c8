//! The entropy device.

use devices::{Effect, Input, Rejected, RequestId};

use crate::guest::{Driver, ENTROPY, Machine, config, writable};

fn started() -> (Machine, Driver) {
    let mut machine = Machine::new(&config());
    machine.init_pics();
    let driver = Driver::start(&mut machine, ENTROPY, !0, 8);
    (machine, driver)
}

#[test]
fn wanted_bytes_arrive_in_the_buffer() {
    let (mut machine, mut driver) = started();
    let head = driver.queues[0].add(
        &machine,
        &[writable(0x20_0000, 40), writable(0x20_1000, 24)],
    );
    assert!(driver.queues[0].kick(&mut machine));
    let id = RequestId(0);
    assert_eq!(
        machine.take_effects(),
        [Effect::EntropyWanted { id, len: 64 }]
    );
    assert_eq!(
        machine.board.outstanding(),
        [Effect::EntropyWanted { id, len: 64 }]
    );
    machine
        .apply(Input::Entropy {
            id,
            data: (0..64).collect(),
        })
        .unwrap();
    assert_eq!(
        driver.queues[0].take_used(&machine),
        [(u32::from(head), 64)]
    );
    assert_eq!(machine.read(0x20_1000, 24), (40..64).collect::<Vec<u8>>());
    assert_eq!(machine.take_irq(), Some(3));
    assert!(machine.board.outstanding().is_empty());
}

#[test]
fn fewer_bytes_than_wanted_are_fine_none_or_more_are_not() {
    let (mut machine, mut driver) = started();
    let head = driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].kick(&mut machine);
    let id = RequestId(0);
    for got in [0, 65] {
        let refused = machine.apply(Input::Entropy {
            id,
            data: vec![7; got],
        });
        assert_eq!(
            refused,
            Err(Rejected::WrongLength {
                id,
                wanted: 64,
                got
            })
        );
    }
    let other = RequestId(1);
    let refused = machine.apply(Input::Entropy {
        id: other,
        data: vec![7; 64],
    });
    assert_eq!(refused, Err(Rejected::UnknownRequest(other)));
    assert_eq!(driver.queues[0].take_used(&machine), []);
    machine.apply(Input::Entropy { id, data: vec![7] }).unwrap();
    assert_eq!(driver.queues[0].take_used(&machine), [(u32::from(head), 1)]);
}

#[test]
fn a_large_buffer_is_not_filled_at_once_and_requests_are_bounded() {
    let (mut machine, mut driver) = started();
    for _ in 0..8 {
        driver.queues[0].add(&machine, &[writable(0x20_0000, 1 << 20)]);
    }
    driver.queues[0].kick(&mut machine);
    let effects = machine.take_effects();
    assert_eq!(effects.len(), 8);
    for (n, effect) in effects.iter().enumerate() {
        assert_eq!(
            *effect,
            Effect::EntropyWanted {
                id: RequestId(n as u64),
                len: 1024
            }
        );
    }
}

#[test]
fn a_reset_forgets_requests_and_refuses_their_answers() {
    let (mut machine, mut driver) = started();
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].kick(&mut machine);
    driver.reset(&mut machine);
    assert_eq!(driver.status(&mut machine), 0);
    let id = RequestId(0);
    let refused = machine.apply(Input::Entropy {
        id,
        data: vec![1; 64],
    });
    assert_eq!(refused, Err(Rejected::UnknownRequest(id)));
    let mut driver = Driver::start(&mut machine, ENTROPY, !0, 8);
    driver.queues[0].add(&machine, &[writable(0x20_0000, 64)]);
    driver.queues[0].kick(&mut machine);
    let next = machine.take_effects().last().and_then(Effect::request);
    assert_eq!(next, Some(RequestId(1)), "numbers are never used again");
}

#[test]
fn a_buffer_without_room_is_a_fault() {
    let (mut machine, mut driver) = started();
    driver.queues[0].add(&machine, &[writable(0x20_0000, 0)]);
    driver.queues[0].kick(&mut machine);
    assert_eq!(driver.status(&mut machine) & 0x40, 0x40);
}
