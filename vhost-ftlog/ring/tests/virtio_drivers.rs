//! The device half against the driver of the crate virtio-drivers, which keeps a free list, negotiates
//! no in-order use and knows nothing of this crate.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // The other crate's memory and queue traits are unsafe to implement and call.

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;

use ring::{Desc, Device, Error, MappedVring, Mapping, RingMemory, VringLayout};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const SIZE: usize = 16;

thread_local! {
    static MEMORY: RefCell<Option<Arc<Mapping>>> = const { RefCell::new(None) };
    static NEXT: Cell<usize> = const { Cell::new(0) };
    static BOUNCE: Cell<usize> = const { Cell::new(0) };
}

const POOL: usize = 64 * PAGE_SIZE;
const BOUNCE_START: usize = 32 * PAGE_SIZE;

/// "Physical memory": one heap mapping for each test thread, an address is an offset.
struct Pool;

fn memory() -> Arc<Mapping> {
    MEMORY.with_borrow(|memory| Arc::clone(memory.as_ref().expect("the test made it")))
}

// SAFETY: allocations are page-sized steps of a mapping that lives as long as the test's thread.
unsafe impl Hal for Pool {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let at = NEXT.get();
        NEXT.set(at + pages * PAGE_SIZE);
        assert!(NEXT.get() <= BOUNCE_START);
        (at as PhysAddr, memory().bytes_at(at as u64, 1).unwrap())
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("no registers here")
    }

    /// Copies the buffer to the pool; each gets a place of its own for the last 1000 buffers.
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        // SAFETY: the caller owns the buffer.
        let bytes = unsafe { buffer.as_ref() };
        let at = BOUNCE_START + BOUNCE.get();
        BOUNCE.set((BOUNCE.get() + 64) % 64_000);
        memory().write(at as u64, bytes);
        at as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

#[derive(Default)]
struct Registers {
    queue: Option<(u64, u64, u64)>,
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        0
    }
    fn write_driver_features(&mut self, _: u64) {}
    fn max_queue_size(&mut self, _: u16) -> u32 {
        SIZE as u32
    }
    fn notify(&mut self, _: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, _: u16, _: u32, desc: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.queue = Some((desc, driver, device));
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
}

struct Pair {
    driver: VirtQueue<Pool, SIZE>,
    device: Device<MappedVring>,
    ring: MappedVring,
}

fn pair(event_idx: bool) -> Pair {
    let memory = Arc::new(Mapping::on_heap(POOL));
    MEMORY.set(Some(Arc::clone(&memory)));
    NEXT.set(PAGE_SIZE); // address 0 means failure
    let mut registers = Registers::default();
    let driver = VirtQueue::new(&mut registers, 0, false, event_idx).unwrap();
    let (desc, avail, used) = registers.queue.unwrap();
    let layout = VringLayout {
        size: SIZE as u16,
        desc,
        avail,
        used,
    };
    let ring = MappedVring::new(memory, layout).unwrap();
    Pair {
        driver,
        device: Device::new(ring.clone(), 0, false),
        ring,
    }
}

fn add(pair: &mut Pair, value: u64) -> virtio_drivers::Result<u16> {
    // SAFETY: the buffer was copied to the pool when `add` returns.
    unsafe { pair.driver.add(&[&value.to_le_bytes()], &mut []) }
}

fn look(pair: &Pair, position: u64) -> u64 {
    let desc = pair.device.desc(position).unwrap();
    assert_eq!((desc.len, desc.flags), (8, 0));
    let mut bytes = [0; 8];
    memory().read(desc.addr, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn buffers_arrive_in_order_and_come_back_one_by_one() {
    let mut pair = pair(true);
    let mut tokens = std::collections::VecDeque::new();
    let (mut sent, mut used) = (0u64, 0u64);
    while used < 200_000 {
        for _ in 0..sent % 7 + 1 {
            let Ok(token) = add(&mut pair, sent) else {
                assert_eq!(sent - used, SIZE as u64, "refused only when full");
                break;
            };
            tokens.push_back(token);
            sent += 1;
        }
        assert_eq!(pair.device.available().unwrap(), sent);
        for position in used..sent {
            assert_eq!(look(&pair, position), position);
        }
        let upto = used + (sent - used).min(used % 5 + 1);
        pair.device.use_up_to(upto, 0);
        for _ in used..upto {
            let token = tokens.pop_front().unwrap();
            // SAFETY: the same buffers as in `add`; nothing is copied back.
            unsafe { pair.driver.pop_used(token, &[&[0; 8]], &mut []) }.unwrap();
        }
        used = upto;
        assert!(!pair.driver.can_pop());
    }
}

#[test]
fn the_driver_is_asked_for_a_kick_and_for_none() {
    let mut pair = pair(true);
    assert!(!pair.device.ask_kick(1).unwrap());
    add(&mut pair, 0).unwrap();
    assert!(!pair.driver.should_notify(), "a kick was asked for later");
    add(&mut pair, 1).unwrap();
    assert!(pair.driver.should_notify());
    assert!(pair.device.ask_kick(1).unwrap(), "already available");
}

#[test]
fn the_driver_s_event_index_decides_about_calls() {
    let mut pair = pair(true);
    for value in 0..4 {
        add(&mut pair, value).unwrap();
    }
    pair.device.available().unwrap();
    assert!(pair.device.use_up_to(1, 0), "used_event stands at 0");
    assert!(!pair.device.use_up_to(3, 0), "used_event is behind");
}

#[test]
fn a_chain_is_refused() {
    let mut pair = pair(true);
    // SAFETY: the buffers were copied to the pool when `add` returns.
    unsafe { pair.driver.add(&[&[1; 8], &[2; 8]], &mut []) }.unwrap();
    pair.device.available().unwrap();
    assert!(matches!(pair.device.desc(0), Err(Error::Broken(_))));
}

#[test]
fn an_available_index_that_jumps_or_goes_back_is_an_error() {
    let mut pair = pair(true);
    for value in 0..3 {
        add(&mut pair, value).unwrap();
    }
    assert_eq!(pair.device.available().unwrap(), 3);
    pair.ring.store_avail_idx(SIZE as u16 + 1);
    assert!(matches!(pair.device.available(), Err(Error::Broken(_))));
    pair.ring.store_avail_idx(2);
    assert!(matches!(pair.device.available(), Err(Error::Broken(_))));
}

#[test]
fn a_slot_that_names_no_descriptor_is_an_error() {
    let mut pair = pair(true);
    add(&mut pair, 0).unwrap();
    pair.device.available().unwrap();
    pair.ring.write_avail_slot(0, SIZE as u16);
    assert!(matches!(pair.device.desc(0), Err(Error::Broken(_))));
    pair.ring.write_avail_slot(0, 3);
    pair.ring.write_desc(
        3,
        Desc {
            flags: Desc::INDIRECT,
            ..Desc::default()
        },
    );
    assert!(matches!(pair.device.desc(0), Err(Error::Broken(_))));
}
