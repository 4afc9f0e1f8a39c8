//! The driver half against virtio-queue's device side, which knows nothing of this crate.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use ring::{Arena, Desc, Driver, Error, MappedVring, Mapping, VringLayout};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const DATA: u64 = 8192;

struct Pair {
    driver: Driver<MappedVring>,
    mapping: Arc<Mapping>,
    queue: Queue,
    memory: GuestMemoryMmap,
}

fn pair() -> Pair {
    let arena = Arena::create(16384).unwrap();
    let mapping = Arc::new(Mapping::of_file(&arena, 0, 16384).unwrap());
    let file = File::from(arena.as_fd().try_clone_to_owned().unwrap());
    let range = (GuestAddress(0), 16384, Some(FileOffset::new(file, 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    let layout = VringLayout::at(0, SIZE).unwrap();
    let driver = Driver::new(MappedVring::new(Arc::clone(&mapping), layout).unwrap(), 0);
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(layout.desc as u32), Some(0));
    queue.set_avail_ring_address(Some(layout.avail as u32), Some(0));
    queue.set_used_ring_address(Some(layout.used as u32), Some(0));
    queue.set_event_idx(true);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    Pair {
        driver,
        mapping,
        queue,
        memory,
    }
}

fn publish(pair: &mut Pair, value: u64) -> Result<u64, Error> {
    let at = DATA + 8 * (pair.driver.position() % u64::from(SIZE));
    if !pair.driver.has_room() {
        pair.driver.refresh()?;
    }
    if pair.driver.has_room() {
        pair.mapping.write(at, &value.to_le_bytes());
    }
    pair.driver.add(Desc {
        addr: at,
        len: 8,
        ..Desc::default()
    })
}

/// Takes one buffer as a device does and gives it back.
fn take(pair: &mut Pair) -> Option<u64> {
    let mut chain = pair.queue.pop_descriptor_chain(&pair.memory)?;
    let head = chain.head_index();
    let desc = chain.next().unwrap();
    assert_eq!((desc.len(), desc.is_write_only()), (8, false));
    let value: u64 = pair.memory.read_obj(desc.addr()).unwrap();
    assert!(chain.next().is_none());
    pair.queue.add_used(&pair.memory, head, 0).unwrap();
    Some(value)
}

#[test]
fn buffers_arrive_in_order_over_several_turns_of_the_16_bit_index() {
    let mut pair = pair();
    let (mut sent, mut got) = (0u64, 0u64);
    while got < 200_000 {
        for _ in 0..sent % 7 + 1 {
            if publish(&mut pair, sent).is_err() {
                break;
            }
            sent += 1;
        }
        for _ in 0..got % 5 + 1 {
            let Some(value) = take(&mut pair) else { break };
            assert_eq!(value, got);
            got += 1;
        }
        assert_eq!(pair.driver.refresh().unwrap(), got);
        assert_eq!(pair.driver.reaper().used().unwrap(), got);
    }
}

#[test]
fn a_full_ring_refuses_until_the_device_used_a_buffer() {
    let mut pair = pair();
    for value in 0..u64::from(SIZE) {
        publish(&mut pair, value).unwrap();
    }
    assert!(matches!(publish(&mut pair, 0), Err(Error::Full)));
    assert_eq!(take(&mut pair), Some(0));
    publish(&mut pair, 16).unwrap();
}

#[test]
fn kicks_follow_the_device_s_event_index() {
    let mut pair = pair();
    assert!(!pair.queue.enable_notification(&pair.memory).unwrap());
    publish(&mut pair, 0).unwrap();
    assert!(pair.driver.needs_kick());
    publish(&mut pair, 1).unwrap();
    assert!(!pair.driver.needs_kick(), "the event index stands still");
    take(&mut pair).unwrap();
    assert!(pair.queue.enable_notification(&pair.memory).unwrap());
    take(&mut pair).unwrap();
    assert!(!pair.queue.enable_notification(&pair.memory).unwrap());
    publish(&mut pair, 2).unwrap();
    assert!(pair.driver.needs_kick());
}

#[test]
fn calls_follow_the_driver_s_event_index() {
    let mut pair = pair();
    let reaper = pair.driver.reaper();
    for value in 0..4 {
        publish(&mut pair, value).unwrap();
    }
    assert!(!reaper.arm(2).unwrap());
    let mut calls = Vec::new();
    for _ in 0..4 {
        take(&mut pair).unwrap();
        calls.push(pair.queue.needs_notification(&pair.memory).unwrap());
    }
    assert_eq!(calls, [false, false, true, false]);
    assert!(reaper.arm(3).unwrap(), "already used");
}

#[test]
fn a_used_index_that_runs_ahead_is_an_error() {
    let mut pair = pair();
    publish(&mut pair, 0).unwrap();
    pair.queue.set_next_used(8);
    pair.queue.add_used(&pair.memory, 0, 0).unwrap();
    assert!(matches!(pair.driver.refresh(), Err(Error::Broken(_))));
    assert!(matches!(pair.driver.reaper().used(), Err(Error::Broken(_))));
}
