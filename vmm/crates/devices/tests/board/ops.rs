//! The steps of a script, and how bytes become steps.

use crate::guest::{Buffer, DISK, ENTROPY, NET};

/// Small, so that a machine is copied quickly; rings and buffers fit.
pub(crate) const RAM_BYTES: usize = 256 << 10;
/// Behind the rings.
pub(crate) const BUFFERS: u64 = 0x1_0000;
/// Longest script.
const OPS_MAX: usize = 4096;

/// Ports at which something answers.
const PORTS: [u16; 40] = [
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, 0x64, 0x60,
    0xf4, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0xcf8, 0xcf9, 0xcfa, 0xcfb,
    0xcfc, 0xcfd, 0xcfe, 0xcff, 0x3e, 0x1f, 0x6f, 0x3f7, 0x80, 0xfffe, 0x92, 0x2f8,
];

/// One step of a script.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    PortIn {
        port: u16,
        len: usize,
    },
    PortOut {
        port: u16,
        data: Vec<u8>,
    },
    Load {
        addr: u64,
        len: usize,
    },
    Store {
        addr: u64,
        data: Vec<u8>,
    },
    ConfigRead {
        device: u32,
        offset: u32,
        len: usize,
    },
    ConfigWrite {
        device: u32,
        offset: u32,
        data: Vec<u8>,
    },
    Start {
        device: u32,
        features: u64,
        size: u16,
    },
    Reset {
        device: u32,
    },
    Chain {
        device: u32,
        queue: usize,
        buffers: Vec<Buffer>,
        table: Option<u64>,
    },
    Descriptor {
        device: u32,
        queue: usize,
        parts: (u64, u32, u16, u16),
    },
    /// A request as drivers make it.
    DiskRequest {
        kind: u32,
        sector: u64,
        len: u32,
    },
    /// A frame sent as drivers do.
    Transmit {
        frame: Vec<u8>,
    },
    /// Buffers to receive, as drivers post them.
    Post {
        buffers: u64,
    },
    Kick {
        device: u32,
        queue: usize,
        always: bool,
    },
    TakeUsed {
        device: u32,
        queue: usize,
    },
    Interrupts {
        device: u32,
        queue: usize,
        wanted: bool,
    },
    Poke {
        addr: u64,
        data: Vec<u8>,
    },
    Isr {
        device: u32,
    },
    Acknowledge,
    Time {
        ns: u64,
    },
    NetRx {
        frame: Vec<u8>,
    },
    ConsoleRx {
        bytes: Vec<u8>,
    },
    Answer {
        which: usize,
        fail: bool,
        wrong_by: usize,
    },
    /// Makes the second machine from the first.
    Fork,
}

/// Reads a script from bytes.
struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.u8()).collect()
    }

    fn width(&mut self) -> usize {
        1 << self.below(3)
    }

    fn device(&mut self) -> u32 {
        [NET, DISK, ENTROPY][self.below(3)]
    }

    /// Mostly a buffer, sometimes a ring or an end of memory, rarely anything.
    fn guest_address(&mut self) -> u64 {
        let offset = u64::from(self.u16());
        match self.u8() {
            0..200 => BUFFERS + offset * 4 % 0x2_8000,
            200..230 => 0x4000 + offset * 2 % 0xc000,
            230..240 => RAM_BYTES as u64 - offset % 64,
            240..250 => u64::MAX - offset % 64,
            _ => self.u64(),
        }
    }

    fn length(&mut self) -> u32 {
        match self.u8() {
            0..100 => u32::from(self.u8()),
            100..200 => 512 * (1 + u32::from(self.u8() % 8)),
            200..250 => u32::from(self.u16()),
            _ => self.u32(),
        }
    }

    fn buffer(&mut self) -> Buffer {
        Buffer {
            addr: self.guest_address(),
            len: self.length(),
            write: self.u8() % 2 == 1,
        }
    }

    fn buffers(&mut self) -> Vec<Buffer> {
        let mut buffers: Vec<Buffer> = (0..=self.below(6)).map(|_| self.buffer()).collect();
        if !self.u8().is_multiple_of(8) {
            buffers.sort_by_key(|buffer| buffer.write);
        }
        buffers
    }

    fn frame(&mut self) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame[0] = self.u8() % 4;
        frame[1] = [0, 0, 0, 1, 4, 0x81, 3, 0x80][self.below(8)];
        let len = match self.u8() {
            0..150 => 14 + usize::from(self.u8()),
            150..250 => usize::from(self.u16()) % 6000,
            _ => usize::from(self.u16()) + 20,
        };
        let seed = self.u8();
        frame.extend((0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)));
        frame
    }

    /// An address in one of the BARs, as they are placed at power-on; sometimes not.
    fn device_memory(&mut self) -> u64 {
        let offsets = [
            0x00, 0x04, 0x08, 0x0c, 0x14, 0x16, 0x18, 0x1c, 0x20, 0x28, 0x30, 0x34,
        ];
        let offset = match self.below(8) {
            0..4 => offsets[self.below(offsets.len())],
            4 => 0x100,
            5 => 0x200 + u64::from(self.u8() % 80),
            6 => 0x300 + 4 * u64::from(self.u8() % 10),
            _ => u64::from(self.u16()),
        };
        0xc000_0000 + 0x1000 * self.below(3) as u64 + offset
    }

    fn op(&mut self) -> Op {
        match self.u8() % 44 {
            kind @ 0..11 => self.access(kind),
            kind @ 11..29 => self.driving(kind),
            kind => self.input(kind),
        }
    }

    /// Any access to ports and device memory.
    fn access(&mut self, kind: u8) -> Op {
        match kind {
            0..3 => Op::PortIn {
                port: PORTS[self.below(PORTS.len())],
                len: self.width(),
            },
            3..7 => {
                let len = self.width();
                Op::PortOut {
                    port: PORTS[self.below(PORTS.len())],
                    data: self.bytes(len),
                }
            }
            7 => Op::Load {
                addr: self.device_memory(),
                len: self.width(),
            },
            8 => {
                let len = self.width();
                Op::Store {
                    addr: self.device_memory(),
                    data: self.bytes(len),
                }
            }
            9 => Op::ConfigRead {
                device: self.device(),
                offset: self.u8().into(),
                len: 1,
            },
            _ => {
                // Among others: BAR, command, interrupt line, the window.
                let places = [
                    0x04,
                    0x10,
                    0x3c,
                    0x88,
                    0x8c,
                    0x90,
                    0x94,
                    u32::from(self.u8()),
                ];
                let offset = places[self.below(places.len())];
                let len = self.width();
                Op::ConfigWrite {
                    device: self.device(),
                    offset,
                    data: self.bytes(len),
                }
            }
        }
    }

    /// What a driver does, well or badly.
    fn driving(&mut self, kind: u8) -> Op {
        match kind {
            11..14 => Op::Start {
                device: self.device(),
                features: match self.u8() {
                    0..180 => !0,
                    180..230 => !0 ^ 1 << (self.u8() % 33),
                    _ => self.u64(),
                },
                size: 1 << self.below(9),
            },
            14 => Op::Reset {
                device: self.device(),
            },
            15..18 => Op::Chain {
                device: self.device(),
                queue: self.below(2),
                buffers: self.buffers(),
                table: (self.u8() % 2 == 1).then_some(BUFFERS + 0x2_8000),
            },
            18 => Op::Descriptor {
                device: self.device(),
                queue: self.below(2),
                parts: (
                    self.guest_address(),
                    self.length(),
                    self.u16() % 8,
                    self.u16() % 300,
                ),
            },
            19..22 => Op::DiskRequest {
                kind: [0, 0, 1, 1, 4, 8, 11, 77][self.below(8)],
                sector: u64::from(self.u16() % 4100),
                len: 512 * u32::from(self.u8() % 9),
            },
            22..25 => Op::Kick {
                device: self.device(),
                queue: self.below(2),
                always: self.u8().is_multiple_of(4),
            },
            25 => Op::TakeUsed {
                device: self.device(),
                queue: self.below(2),
            },
            26 => Op::Interrupts {
                device: self.device(),
                queue: self.below(2),
                wanted: !self.u8().is_multiple_of(4),
            },
            27 => {
                let addr = 0x4000 + u64::from(self.u16()) * 2 % 0xc000;
                Op::Poke {
                    addr,
                    data: self.bytes(2),
                }
            }
            _ => Op::Isr {
                device: self.device(),
            },
        }
    }

    /// What comes from outside and from the CPU, and whole transfers.
    fn input(&mut self, kind: u8) -> Op {
        match kind {
            29 => Op::Acknowledge,
            30..32 => Op::Time {
                ns: u64::from(self.u32()) >> self.below(24),
            },
            32..34 => Op::NetRx {
                frame: self.frame(),
            },
            34 => {
                let len = self.below(18);
                Op::ConsoleRx {
                    bytes: self.bytes(len),
                }
            }
            35..39 => Op::Answer {
                which: self.below(4),
                fail: self.u8().is_multiple_of(8),
                wrong_by: usize::from(self.u8() == 0),
            },
            39..41 => Op::Transmit {
                frame: self.frame(),
            },
            41..43 => Op::Post {
                buffers: 1 + u64::from(self.u8() % 44),
            },
            _ => Op::Fork,
        }
    }
}

pub(crate) fn decode(data: &[u8]) -> Vec<Op> {
    let mut decoder = Decoder(data);
    let mut ops = Vec::new();
    while !decoder.0.is_empty() && ops.len() < OPS_MAX {
        ops.push(decoder.op());
    }
    ops
}
