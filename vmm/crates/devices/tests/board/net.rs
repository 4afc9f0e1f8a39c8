//! The network device.

use devices::{BoardConfig, Effect, Input, NetOffloads, Rejected, VirtualTime};

use crate::guest::{Driver, EVENT_IDX, MAC, Machine, NET, VERSION_1, config, readable, writable};

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;

const CSUM: u64 = 1 << 0;
const MRG_RXBUF: u64 = 1 << 15;
const OFFLOADS: u64 = 0x3b83;

const RX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFERS: u64 = 0x30_0000;
/// As Linux: header, Ethernet header, VLAN tag, 1500 bytes.
const RX_BUFFER_BYTES: u32 = 1530;

const MS: u64 = 1_000_000;

struct Net {
    machine: Machine,
    driver: Driver,
}

fn without_offloads() -> BoardConfig {
    let mut config = config();
    config.net.as_mut().expect("there is one").offloads = false;
    config
}

/// A frame of `len` bytes with header, whose bytes all differ from their neighbours.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..len - HEADER).map(|i| (i % 253) as u8 + 1));
    frame
}

impl Net {
    fn start(config: &BoardConfig, features: u64) -> Net {
        let mut machine = Machine::new(config);
        machine.init_pics();
        let driver = Driver::start(&mut machine, NET, features, 256);
        Net { machine, driver }
    }

    fn new() -> Net {
        let mut net = Net::start(&config(), !0);
        net.machine.take_effects();
        net
    }

    fn post(&mut self, count: u64) {
        for n in 0..count {
            let buffer = writable(RX_BUFFERS + n * 0x800, RX_BUFFER_BYTES);
            self.driver.queues[RX].add(&self.machine, &[buffer]);
        }
        self.driver.queues[RX].kick(&mut self.machine);
    }

    fn send(&mut self, frame: &[u8]) -> Vec<Effect> {
        self.machine.write(TX_BUFFERS, frame);
        let chain = [readable(TX_BUFFERS, frame.len() as u32)];
        self.driver.queues[TX].add(&self.machine, &chain);
        self.driver.queues[TX].kick(&mut self.machine);
        self.machine.take_effects()
    }

    fn receive(&mut self, frame: Vec<u8>) -> Result<(), Rejected> {
        self.machine.apply(Input::NetRx(frame))
    }

    fn room(&self) -> bool {
        self.machine.board.net_rx_room(&self.machine.ram)
    }

    fn memory(&self, addr: u64, len: usize) -> Vec<u8> {
        self.machine.read(addr, len)
    }
}

#[test]
fn address_and_link_are_in_the_configuration() {
    let mut net = Net::new();
    let mut config = [0; 8];
    let at = net.driver.at.device;
    net.machine.load(at, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0], "link up");
    // Nothing in it can be written.
    net.machine.store(at, &[0xff; 4]);
    net.machine.load(at, &mut config);
    assert_eq!(config[..6], MAC);
}

#[test]
fn offloads_are_told_when_the_driver_starts_and_stops() {
    let mut net = Net::start(&config(), !0);
    let all = NetOffloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
    assert_eq!(net.machine.take_effects(), [Effect::NetOffloads(all)]);
    assert_eq!(net.machine.board.net_offloads(), all);
    net.driver.reset(&mut net.machine);
    assert_eq!(
        net.machine.take_effects(),
        [Effect::NetOffloads(NetOffloads::default())]
    );

    let mut net = Net::start(&without_offloads(), !0);
    assert_eq!(net.driver.features & OFFLOADS, 0);
    assert_eq!(
        net.machine.take_effects(),
        [Effect::NetOffloads(NetOffloads::default())]
    );
}

#[test]
fn a_sent_frame_is_copied_and_completed_at_once() {
    let mut net = Net::new();
    let sent = frame(80);
    assert_eq!(net.send(&sent), [Effect::NetTx(sent.clone())]);
    assert_eq!(net.driver.queues[TX].take_used(&net.machine), [(0, 0)]);
    // In pieces, from an indirect table.
    let pieces = [
        readable(TX_BUFFERS, 12),
        readable(TX_BUFFERS + 12, 14),
        readable(TX_BUFFERS + 26, 54),
    ];
    net.driver.queues[TX].add_indirect(&net.machine, 0x3f_0000, &pieces);
    assert!(net.driver.queues[TX].kick(&mut net.machine));
    assert_eq!(net.machine.take_effects(), [Effect::NetTx(sent)]);
}

#[test]
fn frames_too_short_too_long_or_with_needs_not_agreed_are_dropped_and_counted() {
    let mut net = Net::start(&config(), !CSUM & !OFFLOADS);
    net.machine.take_effects();
    let mut checksum = frame(80);
    checksum[0] = 1;
    let mut segments = frame(80);
    segments[1] = 1;
    for bad in [frame(13), frame(25), frame(70_000), checksum, segments] {
        assert_eq!(net.send(&bad), []);
    }
    assert_eq!(net.driver.queues[TX].take_used(&net.machine).len(), 5);
    assert_eq!(net.machine.board.counters().net_tx_dropped, 5);
    assert_eq!(net.driver.status(&mut net.machine) & 0x40, 0, "no fault");
    assert_eq!(net.send(&frame(26)).len(), 1);
}

#[test]
fn the_interrupt_for_sent_frames_is_held_back_for_four_milliseconds() {
    let mut net = Net::new();
    net.machine.set_time(10 * MS);
    net.driver.queues[TX].enable_interrupts(&net.machine);
    net.send(&frame(80));
    assert_eq!(net.machine.take_irq(), None);
    assert_eq!(net.machine.board.next_timer(), Some(VirtualTime(14 * MS)));
    net.machine.set_time(13 * MS);
    net.send(&frame(80));
    assert_eq!(
        net.machine.board.next_timer(),
        Some(VirtualTime(14 * MS)),
        "since the first"
    );
    net.machine.set_time(14 * MS);
    assert_eq!(net.machine.take_irq(), Some(5));
    assert_eq!(net.machine.board.next_timer(), None);
}

#[test]
fn a_driver_that_has_moved_on_is_not_interrupted_for_sent_frames() {
    let mut net = Net::new();
    net.driver.queues[TX].enable_interrupts(&net.machine);
    net.send(&frame(80));
    net.driver.queues[TX].take_used(&net.machine);
    net.driver.queues[TX].enable_interrupts(&net.machine);
    net.machine.set_time(4 * MS);
    assert_eq!(net.machine.take_irq(), None);
    assert_eq!(net.machine.board.next_timer(), None);
}

#[test]
fn a_received_frame_carries_the_interrupt_for_sent_ones() {
    let mut net = Net::new();
    net.post(64);
    net.driver.queues[TX].enable_interrupts(&net.machine);
    net.send(&frame(80));
    net.receive(frame(80)).unwrap();
    assert_eq!(net.machine.take_irq(), Some(5));
    assert_eq!(net.machine.board.next_timer(), None);
    assert_eq!(net.driver.isr(&mut net.machine), 1);
    net.machine.set_time(10 * MS);
    assert_eq!(net.machine.take_irq(), None);
}

#[test]
fn a_burst_of_sent_frames_interrupts_at_once() {
    let mut net = Net::new();
    net.machine.write(TX_BUFFERS, &frame(80));
    net.driver.queues[TX].enable_interrupts(&net.machine);
    for _ in 0..64 {
        net.driver.queues[TX].add(&net.machine, &[readable(TX_BUFFERS, 80)]);
    }
    assert!(net.driver.queues[TX].kick(&mut net.machine));
    assert_eq!(net.machine.take_effects().len(), 64);
    assert_eq!(net.machine.take_irq(), Some(5));
}

#[test]
fn no_interrupt_is_owed_when_the_driver_wants_none() {
    for features in [!0, !EVENT_IDX] {
        let mut net = Net::start(&config(), features);
        net.driver.queues[TX].disable_interrupts(&net.machine);
        net.send(&frame(80));
        assert_eq!(net.machine.board.next_timer(), None);
    }
}

#[test]
fn a_received_frame_lands_in_one_buffer_with_its_header() {
    let mut net = Net::new();
    assert!(!net.room());
    net.post(64);
    assert!(net.room());
    let mut received = frame(90);
    received[..2].copy_from_slice(&[1, 0]);
    net.receive(received.clone()).unwrap();
    assert_eq!(net.machine.take_irq(), Some(5));
    assert_eq!(net.driver.queues[RX].take_used(&net.machine), [(0, 90)]);
    received[10] = 1;
    assert_eq!(net.memory(RX_BUFFERS, 90), received);
}

#[test]
fn a_large_frame_is_merged_from_several_buffers() {
    let mut net = Net::new();
    net.post(64);
    let mut received = frame(4000);
    received[..2].copy_from_slice(&[1, 1]);
    net.receive(received.clone()).unwrap();
    let used = net.driver.queues[RX].take_used(&net.machine);
    assert_eq!(used, [(0, 1530), (1, 1530), (2, 940)]);
    received[10] = 3;
    let got = [
        net.memory(RX_BUFFERS, 1530),
        net.memory(RX_BUFFERS + 0x800, 1530),
        net.memory(RX_BUFFERS + 0x1000, 940),
    ];
    assert_eq!(got.concat(), received);
}

#[test]
fn frames_wait_outside_while_there_is_no_room() {
    let mut net = Net::new();
    net.post(42);
    assert!(!net.room(), "43 buffers make the longest frame");
    net.receive(frame(1530 * 42)).unwrap();
    assert_eq!(net.driver.queues[RX].take_used(&net.machine).len(), 42);
    assert_eq!(net.receive(frame(80)), Err(Rejected::NoRoom));
    net.post(2);
    assert_eq!(net.receive(frame(4000)), Err(Rejected::NoRoom));
    net.receive(frame(3000)).unwrap();
    assert_eq!(
        net.driver.queues[RX].take_used(&net.machine).len(),
        2,
        "NoRoom took none"
    );
}

#[test]
fn the_driver_tells_of_new_buffers_only_when_room_was_short() {
    for features in [!0, !EVENT_IDX] {
        let mut net = Net::start(&config(), features);
        net.post(100);
        assert_eq!(net.driver.queues[RX].kicks, 1);
        for _ in 0..50 {
            net.receive(frame(100)).unwrap();
        }
        net.post(10);
        assert_eq!(net.driver.queues[RX].kicks, 1, "60 buffers are room enough");
        for _ in 0..20 {
            net.receive(frame(100)).unwrap();
        }
        assert!(!net.room());
        net.post(10);
        assert_eq!(net.driver.queues[RX].kicks, 2);
        assert!(net.room());
    }
}

#[test]
fn without_merged_buffers_each_frame_has_one() {
    let mut net = Net::start(&config(), !MRG_RXBUF & !OFFLOADS);
    net.post(2);
    assert!(net.room());
    net.receive(frame(1530)).unwrap();
    assert_eq!(net.memory(RX_BUFFERS + 10, 2), [1, 0]);
    // The buffers are smaller than the longest frame that could come.
    let mut net = Net::start(&config(), !MRG_RXBUF);
    net.post(1);
    assert_eq!(net.receive(frame(1531)), Err(Rejected::BadFrame));
    net.receive(frame(1530)).unwrap();
}

#[test]
fn frames_that_the_driver_cannot_take_are_refused() {
    let mut net = Net::start(&config(), VERSION_1 | MRG_RXBUF);
    net.post(64);
    let mut checksum = frame(80);
    checksum[0] = 1;
    let mut segments = frame(80);
    segments[1] = 1;
    for bad in [vec![], frame(25), frame(1531), checksum, segments] {
        assert_eq!(net.receive(bad), Err(Rejected::BadFrame));
    }
    let mut checked = frame(80);
    checked[0] = 2;
    net.receive(checked).unwrap();
    assert_eq!(
        net.memory(RX_BUFFERS, 1),
        [0],
        "flags that were not agreed are cleared"
    );
}

#[test]
fn without_a_running_driver_nothing_is_received() {
    let mut machine = Machine::new(&config());
    assert_eq!(
        machine.apply(Input::NetRx(frame(80))),
        Err(Rejected::NotRunning)
    );
    assert!(!machine.board.net_rx_room(&machine.ram));
    let mut machine = Machine::new(&BoardConfig {
        net: None,
        ..config()
    });
    assert_eq!(
        machine.apply(Input::NetRx(frame(80))),
        Err(Rejected::NotRunning)
    );
}

#[test]
fn a_broken_receive_ring_takes_one_frame_and_stops_the_device() {
    let mut net = Net::new();
    net.driver.queues[RX].add(&net.machine, &[writable(0xffff_ffff_f000, 2000)]);
    net.machine.take_effects();
    assert!(net.room(), "so that the fault comes to light");
    net.receive(frame(80)).unwrap();
    assert_eq!(net.driver.status(&mut net.machine) & 0x40, 0x40);
    assert_eq!(net.receive(frame(80)), Err(Rejected::NotRunning));
    assert!(!net.room());
    // Too small for the header.
    let mut net = Net::new();
    net.driver.queues[RX].add(&net.machine, &[writable(RX_BUFFERS, 11)]);
    net.receive(frame(80)).unwrap();
    assert_eq!(net.driver.status(&mut net.machine) & 0x40, 0x40);
}

#[test]
fn a_fault_silences_the_held_back_interrupt() {
    let mut net = Net::new();
    net.driver.queues[TX].enable_interrupts(&net.machine);
    net.send(&frame(80));
    assert!(net.machine.board.next_timer().is_some());
    net.driver.queues[RX].add(&net.machine, &[writable(RX_BUFFERS, 11)]);
    net.receive(frame(80)).unwrap();
    assert_eq!(net.machine.board.next_timer(), None);
    net.machine.set_time(100 * MS);
    assert_eq!(net.driver.isr(&mut net.machine), 2, "the fault alone");
}

/// A string instruction may notify over and over within one exit, before anybody takes the effects.
#[test]
fn frames_stay_in_the_queue_while_a_thousand_effects_wait() {
    let mut net = Net::new();
    net.machine.write(TX_BUFFERS, &frame(80));
    let notify = net.driver.at.notify + u64::from(net.driver.at.notify_multiplier);
    for _ in 0..6 {
        for _ in 0..200 {
            net.driver.queues[TX].add(&net.machine, &[readable(TX_BUFFERS, 80)]);
        }
        let Machine { ram, board, .. } = &mut net.machine;
        board.mmio_write(ram, notify, &[1, 0]);
        if net.driver.queues[TX].take_used(&net.machine).len() < 200 {
            break;
        }
    }
    assert_eq!(net.machine.board.take_effects().len(), 1024);
    net.driver.queues[TX].notify(&mut net.machine);
    assert!(!net.machine.take_effects().is_empty(), "the rest follows");
}
