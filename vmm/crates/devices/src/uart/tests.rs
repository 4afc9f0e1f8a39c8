use super::*;

const DATA: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;

fn with_fifo() -> Uart {
    let mut uart = Uart::new();
    uart.write(FCR, 0x81);
    uart
}

#[test]
fn bytes_leave_at_once_and_the_transmitter_is_always_empty() {
    let mut uart = Uart::new();
    assert_eq!(uart.write(DATA, b'x'), Some(b'x'));
    assert_eq!(uart.read(LSR), 0x60);
}

#[test]
fn the_transmit_interrupt_is_raised_by_enabling_and_by_sending_and_dropped_by_iir() {
    let mut uart = Uart::new();
    assert!(!uart.line());
    uart.write(IER, IER_TX_EMPTY);
    assert!(uart.line());
    assert_eq!(uart.read(IIR), IIR_TX_EMPTY);
    assert!(!uart.line());
    assert_eq!(uart.read(IIR), IIR_NONE);
    uart.write(DATA, 1);
    assert!(uart.line());
    uart.write(IER, 0);
    assert!(!uart.line());
    uart.write(IER, IER_TX_EMPTY);
    assert!(uart.line(), "Linux tests for this");
}

#[test]
fn received_bytes_interrupt_by_trigger_level_or_as_a_timeout() {
    let mut uart = with_fifo();
    uart.write(IER, IER_RX);
    uart.receive(b"abc");
    assert_eq!(uart.read(IIR), 0xc0 | IIR_RX_TIMEOUT);
    uart.receive(b"defgh");
    assert_eq!(uart.read(IIR), 0xc0 | IIR_RX);
    let read: Vec<u8> = (0..8).map(|_| uart.read(DATA)).collect();
    assert_eq!(read, b"abcdefgh");
    assert!(!uart.line());
    assert_eq!(uart.read(LSR) & 1, 0);
}

#[test]
fn the_receiver_has_room_for_its_fifo_and_no_more() {
    let mut uart = Uart::new();
    assert_eq!(uart.rx_room(), 1, "no FIFO yet");
    uart.write(FCR, 1);
    assert_eq!(uart.rx_room(), 16);
    uart.receive(&[0; 10]);
    assert_eq!(uart.rx_room(), 6);
    uart.write(FCR, 3);
    assert_eq!(uart.rx_room(), 16);
}

/// The tests of Linux's 8250 autoconfiguration that decide what it takes the chip for.
#[test]
fn linux_autoconfiguration_finds_a_16550a() {
    let mut uart = Uart::new();
    uart.write(IER, 0x00);
    assert_eq!(uart.read(IER), 0);
    uart.write(IER, 0xff);
    assert_eq!(uart.read(IER), 0x0f, "no bits of later chips");
    uart.write(IER, 0);
    uart.write(MCR, MCR_LOOP | 0x0a);
    assert_eq!(uart.read(MSR) & 0xf0, 0x90);
    uart.write(MCR, 0);
    uart.write(FCR, 1);
    assert_eq!(uart.read(IIR) >> 6, 3);
    uart.write(LCR, LCR_DLAB);
    assert_ne!(uart.read(2), 0, "no EFR");
    uart.write(LCR, 0xbf);
    assert_ne!(uart.read(2), 0, "no EFR");
    uart.write(LCR, 0);
    uart.write(FCR, 0x21);
    assert_eq!(uart.read(IIR) >> 5 & 1, 0, "no 64-byte FIFO");
}

#[test]
fn loopback_keeps_bytes_inside_and_can_overrun() {
    let mut uart = with_fifo();
    uart.write(MCR, MCR_LOOP);
    for byte in 0..17 {
        assert_eq!(uart.write(DATA, byte), None);
    }
    assert_eq!(uart.rx_room(), 0);
    uart.write(IER, IER_LINE);
    assert_eq!(uart.read(IIR) & 0x0f, IIR_LINE);
    assert_eq!(uart.read(LSR), 0x63);
    assert_eq!(uart.read(LSR), 0x61);
    assert_eq!(uart.read(DATA), 0);
}

#[test]
fn modem_changes_interrupt_until_read() {
    let mut uart = Uart::new();
    assert_eq!(uart.read(MSR), 0xb0);
    uart.write(IER, IER_MODEM);
    uart.write(MCR, MCR_LOOP);
    assert_eq!(uart.read(IIR), IIR_MODEM);
    assert_eq!(uart.read(MSR), 0x0b);
    assert_eq!(uart.read(IIR), IIR_NONE);
}

#[test]
fn the_divisor_hides_data_and_ier() {
    let mut uart = Uart::new();
    uart.write(LCR, LCR_DLAB | 3);
    assert_eq!(uart.write(DATA, 12), None);
    uart.write(IER, 7);
    assert_eq!((uart.read(DATA), uart.read(IER)), (12, 7));
    uart.write(LCR, 3);
    assert_eq!((uart.read(DATA), uart.read(IER)), (0, 0));
}

#[test]
fn too_long_a_fifo_is_refused() {
    let mut state = Uart::new().save();
    state.rx = vec![0; 17];
    assert!(Uart::restore(&state).is_err());
}
