//! The block device.

use devices::{
    BoardConfig, DiskCache, DiskStatus, Effect, Input, Rejected, RequestId, SECTOR_BYTES,
};

use crate::guest::{Buffer, DISK, Driver, Machine, SECTORS, VERSION_1, config, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Where the tests' requests lie: header, status, data, each request with a page of its own.
const HEADERS: u64 = 0x20_0000;
const STATUSES: u64 = 0x21_0000;
const DATA: u64 = 0x22_0000;

struct Disk {
    machine: Machine,
    driver: Driver,
    requests: u64,
}

fn with_cache(cache: DiskCache) -> BoardConfig {
    let mut config = config();
    config.disk.as_mut().expect("there is one").cache = cache;
    config
}

impl Disk {
    fn start(config: &BoardConfig, features: u64) -> Disk {
        let mut machine = Machine::new(config);
        machine.init_pics();
        let driver = Driver::start(&mut machine, DISK, features, 128);
        Disk {
            machine,
            driver,
            requests: 0,
        }
    }

    fn new() -> Disk {
        Disk::start(&config(), !0)
    }

    /// Adds a request; where its status will be.
    fn add(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u64 {
        let at = HEADERS + 16 * self.requests;
        let status = STATUSES + self.requests;
        self.requests += 1;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.machine.write(at, &header);
        self.machine.write(status, &[0xff]);
        let mut chain = vec![readable(at, 16)];
        chain.extend(data);
        chain.push(writable(status, 1));
        self.driver.queues[0].add(&self.machine, &chain);
        status
    }

    /// Adds a request and notifies; its effects.
    fn submit(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u64, Vec<Effect>) {
        let status = self.add(kind, sector, data);
        self.driver.queues[0].kick(&mut self.machine);
        (status, self.machine.take_effects())
    }

    fn done(&mut self, id: u64, status: DiskStatus, data: Vec<u8>) -> Result<(), Rejected> {
        self.machine.apply(Input::DiskDone {
            id: RequestId(id),
            status,
            data,
        })
    }

    fn byte(&self, addr: u64) -> u8 {
        self.machine.read(addr, 1)[0]
    }

    fn used(&mut self) -> Vec<(u32, u32)> {
        self.driver.queues[0].take_used(&self.machine)
    }
}

#[test]
fn the_configuration_tells_capacity_and_limits() {
    let mut disk = Disk::new();
    let at = disk.driver.at.device;
    let mut capacity = [0; 8];
    disk.machine.load(at, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    assert_eq!(disk.machine.load_u32(at + 8), 32 * 1024, "size_max");
    assert_eq!(disk.machine.load_u32(at + 12), 126, "seg_max");
    assert_eq!(disk.machine.load_u32(at + 20), 512, "blk_size");
}

#[test]
fn a_write_is_copied_at_its_notification_and_ends_with_disk_done() {
    let mut disk = Disk::new();
    disk.machine.write(DATA, &[0x11; 512]);
    disk.machine.write(DATA + 0x1000, &[0x22; 1024]);
    let buffers = [readable(DATA, 512), readable(DATA + 0x1000, 1024)];
    let (status, effects) = disk.submit(OUT, 7, &buffers);
    let [
        Effect::DiskWrite {
            id: RequestId(0),
            sector: 7,
            data,
        },
    ] = &effects[..]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(data[..], [[0x11; 512], [0x22; 512], [0x22; 512]].concat());
    // What the guest does to its buffer afterwards does not matter.
    disk.machine.write(DATA, &[0x33; 512]);
    assert_eq!(disk.machine.board.outstanding(), effects);
    assert_eq!(disk.byte(status), 0xff);
    assert_eq!(disk.used(), []);
    disk.done(0, DiskStatus::Ok, vec![]).unwrap();
    assert_eq!(disk.byte(status), OK);
    assert_eq!(disk.used(), [(0, 1)]);
    assert_eq!(disk.machine.take_irq(), Some(6));
}

#[test]
fn a_read_scatters_what_disk_done_brings() {
    let mut disk = Disk::new();
    let buffers = [writable(DATA, 100), writable(DATA + 0x1000, 412)];
    let (status, effects) = disk.submit(IN, SECTORS - 1, &buffers);
    let id = RequestId(0);
    assert_eq!(
        effects,
        [Effect::DiskRead {
            id,
            sector: SECTORS - 1,
            len: 512
        }]
    );
    let data: Vec<u8> = (0..512).map(|i| (i % 251) as u8).collect();
    disk.done(0, DiskStatus::Ok, data.clone()).unwrap();
    let got = [
        disk.machine.read(DATA, 100),
        disk.machine.read(DATA + 0x1000, 412),
    ];
    assert_eq!(got.concat(), data);
    assert_eq!(disk.byte(status), OK);
    assert_eq!(disk.used(), [(0, 513)]);
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut disk = Disk::new();
    // Header in two pieces, data directly behind it, status at the end of a data buffer, all in an indirect table.
    let mut bytes = vec![0; 16 + 512];
    bytes[..4].copy_from_slice(&OUT.to_le_bytes());
    bytes[8] = 3;
    bytes[16..].fill(0x5a);
    disk.machine.write(HEADERS, &bytes);
    let chain = [
        readable(HEADERS, 5),
        readable(HEADERS + 5, 523),
        writable(STATUSES, 1),
    ];
    disk.driver.queues[0].add_indirect(&disk.machine, 0x30_0000, &chain);
    disk.driver.queues[0].kick(&mut disk.machine);
    let effects = disk.machine.take_effects();
    let [
        Effect::DiskWrite {
            sector: 3, data, ..
        },
    ] = &effects[..]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(data[..], [0x5a; 512]);
    let chain = [readable(HEADERS + 5, 11), writable(DATA, 513)];
    disk.machine.write(HEADERS + 5, &[0; 16]);
    disk.driver.queues[0].add(
        &disk.machine,
        &[readable(HEADERS + 5, 5), chain[0], chain[1]],
    );
    disk.driver.queues[0].kick(&mut disk.machine);
    disk.done(1, DiskStatus::Ok, vec![0xab; 512]).unwrap();
    assert_eq!(disk.byte(DATA + 511), 0xab);
    assert_eq!(disk.byte(DATA + 512), OK);
}

#[test]
fn requests_end_in_any_order_with_one_interrupt_until_it_is_seen() {
    let mut disk = Disk::new();
    for n in 0..3 {
        disk.add(IN, n, &[writable(DATA + n * 0x1000, 512)]);
    }
    assert!(disk.driver.queues[0].kick(&mut disk.machine));
    assert_eq!(disk.machine.take_effects().len(), 3);
    assert_eq!(disk.driver.queues[0].kicks, 1);
    for id in [2, 0, 1] {
        disk.done(id, DiskStatus::Ok, vec![id as u8; 512]).unwrap();
    }
    assert_eq!(disk.machine.take_irq(), Some(6));
    assert_eq!(disk.driver.isr(&mut disk.machine), 1);
    assert_eq!(
        disk.used().iter().map(|used| used.0).collect::<Vec<_>>(),
        [6, 0, 3]
    );
}

#[test]
fn an_error_of_the_medium_reaches_the_guest_without_data() {
    let mut disk = Disk::new();
    let (status, _) = disk.submit(IN, 0, &[writable(DATA, 512)]);
    disk.done(0, DiskStatus::MediumError, vec![]).unwrap();
    assert_eq!(disk.byte(status), IOERR);
    assert_eq!(disk.used(), [(0, 1)]);
}

#[test]
fn answers_that_answer_nothing_are_refused() {
    let mut disk = Disk::new();
    disk.submit(IN, 0, &[writable(DATA, 512)]);
    let id = RequestId(0);
    let refused = disk.done(0, DiskStatus::Ok, vec![0; 511]);
    assert_eq!(
        refused,
        Err(Rejected::WrongLength {
            id,
            wanted: 512,
            got: 511
        })
    );
    let refused = disk.done(0, DiskStatus::MediumError, vec![0; 512]);
    assert_eq!(
        refused,
        Err(Rejected::WrongLength {
            id,
            wanted: 0,
            got: 512
        })
    );
    let refused = disk.done(9, DiskStatus::Ok, vec![]);
    assert_eq!(refused, Err(Rejected::UnknownRequest(RequestId(9))));
    disk.done(0, DiskStatus::Ok, vec![0; 512]).unwrap();
    let refused = disk.done(0, DiskStatus::Ok, vec![0; 512]);
    assert_eq!(refused, Err(Rejected::UnknownRequest(id)));
}

#[test]
fn flush_is_offered_with_a_write_back_cache_only() {
    let mut disk = Disk::new();
    let (status, effects) = disk.submit(FLUSH, 0, &[]);
    assert_eq!(effects, [Effect::DiskFlush { id: RequestId(0) }]);
    disk.done(0, DiskStatus::Ok, vec![]).unwrap();
    assert_eq!(disk.byte(status), OK);

    let mut disk = Disk::start(&with_cache(DiskCache::WriteThrough), !0);
    assert_eq!(disk.driver.features & 1 << 9, 0);
    let (status, effects) = disk.submit(FLUSH, 0, &[]);
    assert_eq!(effects, []);
    assert_eq!(disk.byte(status), UNSUPPORTED);
}

#[test]
fn the_identity_is_told_as_far_as_it_fits() {
    let mut disk = Disk::new();
    let (status, effects) = disk.submit(GET_ID, 0, &[writable(DATA, 20)]);
    assert_eq!((effects, disk.byte(status)), (vec![], OK));
    assert_eq!(
        disk.machine.read(DATA, 20),
        b"pollux-root\0\0\0\0\0\0\0\0\0"
    );
    let (status, _) = disk.submit(GET_ID, 0, &[writable(DATA, 3)]);
    assert_eq!(disk.byte(status), OK);
    assert_eq!(disk.used(), [(0, 21), (3, 4)]);
    assert_eq!(disk.machine.take_irq(), Some(6), "done at once");
}

#[test]
fn what_lies_outside_the_disk_or_is_no_sector_is_an_io_error() {
    let mut disk = Disk::new();
    for (kind, sector, len) in [
        (IN, SECTORS, 512),
        (IN, SECTORS - 1, 1024),
        (IN, u64::MAX, 512),
        (OUT, SECTORS, 512),
        (IN, 0, 511),
        (OUT, 0, 513),
        (OUT, 0, 0),
        (IN, 0, 0),
    ] {
        let buffer = Buffer {
            addr: DATA,
            len,
            write: kind == IN,
        };
        let (status, effects) = disk.submit(kind, sector, &[buffer]);
        assert_eq!(
            (effects, disk.byte(status)),
            (vec![], IOERR),
            "{kind} {sector} {len}"
        );
    }
    let (status, effects) = disk.submit(DISCARD, 0, &[readable(DATA, 16)]);
    assert_eq!((effects, disk.byte(status)), (vec![], UNSUPPORTED));
    assert_eq!(
        disk.driver.status(&mut disk.machine) & 0x40,
        0,
        "all that is no fault"
    );
}

/// A chain of `count` segments that all lie on the same memory.
fn overlapping(count: u32, len: u32) -> Vec<Buffer> {
    (0..count).map(|_| readable(DATA, len)).collect()
}

#[test]
fn the_largest_request_that_the_limits_allow_is_taken_and_no_larger_one() {
    let mut disk = Disk::new();
    let (_, effects) = disk.submit(OUT, 0, &overlapping(126, 16 * 1024));
    let [Effect::DiskWrite { data, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(data.len(), 126 * 16 * 1024);
    let mut config = config();
    config.disk.as_mut().unwrap().sectors = 1 << 20;
    let mut disk = Disk::start(&config, !0);
    let (_, effects) = disk.submit(OUT, 0, &overlapping(126, 32 * 1024));
    assert_eq!(effects.len(), 1);
    let (status, effects) = disk.submit(OUT, 0, &overlapping(3, 0x15_0200));
    assert_eq!((effects, disk.byte(status)), (vec![], IOERR));
}

#[test]
fn bytes_on_their_way_are_bounded_and_the_rest_follows_when_some_are_done() {
    let mut config = config();
    config.disk.as_mut().unwrap().sectors = 1 << 20;
    let mut disk = Disk::start(&config, !0);
    let mib = [readable(DATA, 1 << 20)];
    for sector in 0..40 {
        disk.add(OUT, sector, &mib);
    }
    disk.driver.queues[0].kick(&mut disk.machine);
    assert_eq!(disk.machine.take_effects().len(), 32);
    disk.done(5, DiskStatus::Ok, vec![]).unwrap();
    let effects = disk.machine.take_effects();
    let [
        Effect::DiskWrite {
            id: RequestId(32),
            sector: 32,
            ..
        },
    ] = effects[..]
    else {
        panic!()
    };
    for id in 0..40 {
        if id != 5 {
            disk.done(id, DiskStatus::Ok, vec![]).unwrap();
        }
    }
    assert_eq!(disk.machine.take_effects().len(), 7);
    assert_eq!(disk.used().len(), 40);
    let (_, effects) = disk.submit(IN, 0, &[writable(DATA, SECTOR_BYTES as u32)]);
    assert_eq!(effects.len(), 1, "notifications work again");
}

#[test]
fn requests_without_header_or_status_are_faults() {
    for chain in [
        vec![readable(HEADERS, 15), writable(STATUSES, 1)],
        vec![readable(HEADERS, 16)],
        vec![writable(STATUSES, 1)],
        vec![writable(STATUSES, 1), readable(HEADERS, 16)],
        vec![
            readable(HEADERS, 16),
            writable(0xfff_ffff_ffff_f000, 512),
            writable(STATUSES, 1),
        ],
        vec![readable(HEADERS, 16), writable(0x3f_ff00, 0xffff_ffff)],
    ] {
        let mut disk = Disk::new();
        disk.driver.queues[0].add(&disk.machine, &chain);
        disk.driver.queues[0].kick(&mut disk.machine);
        assert_eq!(
            disk.driver.status(&mut disk.machine) & 0x40,
            0x40,
            "{chain:?}"
        );
        assert_eq!(disk.machine.take_effects(), []);
        assert_eq!(disk.used(), []);
    }
}

#[test]
fn loops_nested_tables_and_bad_links_are_faults() {
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    let table = 0x30_0000;
    for descriptor in [
        // A loop.
        (HEADERS, 16, NEXT, 0),
        // A link outside the table.
        (HEADERS, 16, NEXT, 999),
        // A table in a table, an empty, a ragged and a huge one, one outside RAM.
        (table, 16, INDIRECT, 0),
        (table, 0, INDIRECT, 0),
        (table, 17, INDIRECT, 0),
        (table, 0xffff_fff0, INDIRECT, 0),
        (0xffff_0000, 16, INDIRECT, 0),
    ] {
        let mut disk = Disk::new();
        disk.driver.queues[0].add_raw(&disk.machine, descriptor);
        // In the table: a reference to itself.
        let mut nested = [0; 16];
        nested[..8].copy_from_slice(&u64::to_le_bytes(table));
        nested[8] = 16;
        nested[12] = INDIRECT as u8;
        disk.machine.write(table, &nested);
        disk.driver.queues[0].kick(&mut disk.machine);
        assert_eq!(
            disk.driver.status(&mut disk.machine) & 0x40,
            0x40,
            "{descriptor:?}"
        );
    }
    // A chain of more descriptors than the queue has, in a table.
    let mut disk = Disk::new();
    let chain: Vec<Buffer> = (0..200).map(|_| readable(HEADERS, 16)).collect();
    disk.driver.queues[0].add_indirect(&disk.machine, table, &chain);
    disk.driver.queues[0].kick(&mut disk.machine);
    assert_eq!(disk.driver.status(&mut disk.machine) & 0x40, 0x40);
}

#[test]
fn a_jump_of_the_available_index_or_a_head_outside_is_a_fault() {
    let mut disk = Disk::new();
    let avail = disk.driver.queues[0].avail;
    disk.driver.queues[0].put(&disk.machine, avail + 2, 129u16);
    disk.driver.queues[0].notify(&mut disk.machine);
    assert_eq!(disk.driver.status(&mut disk.machine) & 0x40, 0x40);
    let mut disk = Disk::new();
    disk.driver.queues[0].make_available(&disk.machine, 128);
    disk.driver.queues[0].notify(&mut disk.machine);
    assert_eq!(disk.driver.status(&mut disk.machine) & 0x40, 0x40);
}

#[test]
fn after_a_fault_requests_on_their_way_end_without_touching_memory() {
    let mut disk = Disk::new();
    let (status, _) = disk.submit(IN, 0, &[writable(DATA, 512)]);
    disk.driver.queues[0].make_available(&disk.machine, 999);
    disk.driver.queues[0].notify(&mut disk.machine);
    disk.done(0, DiskStatus::Ok, vec![0xee; 512]).unwrap();
    assert_eq!((disk.byte(DATA), disk.byte(status)), (0, 0xff));
    assert!(disk.machine.board.outstanding().is_empty());
}

#[test]
fn interrupts_are_spared_as_the_driver_asks_with_and_without_event_index() {
    for features in [!0, VERSION_1] {
        let mut disk = Disk::start(&config(), features);
        disk.driver.queues[0].disable_interrupts(&disk.machine);
        disk.submit(IN, 0, &[writable(DATA, 512)]);
        disk.done(0, DiskStatus::Ok, vec![0; 512]).unwrap();
        assert_eq!(disk.machine.take_irq(), None);
        disk.used();
        disk.driver.queues[0].enable_interrupts(&disk.machine);
        disk.submit(IN, 0, &[writable(DATA, 512)]);
        disk.done(1, DiskStatus::Ok, vec![0; 512]).unwrap();
        assert_eq!(disk.machine.take_irq(), Some(6));
    }
}

#[test]
fn a_queue_works_past_the_wrap_of_its_indices() {
    let mut disk = Disk::new();
    for n in 0..70_000u64 {
        disk.requests = 0;
        disk.driver.queues[0].enable_interrupts(&disk.machine);
        let (_, effects) = disk.submit(IN, n % SECTORS, &[writable(DATA, 512)]);
        assert_eq!(effects.len(), 1, "notification of request {n}");
        disk.done(n, DiskStatus::Ok, vec![n as u8; 512]).unwrap();
        assert_eq!(disk.machine.take_irq(), Some(6), "interrupt of request {n}");
        disk.driver.isr(&mut disk.machine);
        assert_eq!(disk.used().len(), 1);
        assert_eq!(disk.byte(DATA), n as u8);
    }
}
