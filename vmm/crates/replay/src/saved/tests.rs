//! The layouts of the saved states, held by their bytes: one that changes takes a new schema number.
//!
//! Numbers are different and large, so that a field that is moved, narrowed or left out shows; a list of all
//! variants stands beside each state, so that an enum with another order shows.

use devices::state::{
    AccessState, BlkState, ChannelState, ChipState, CmosState, CountingState, DateTimeState,
    DeferredState, DiskRequestState, EntropyRequestState, FunctionState, InitStepState, NetState,
    OutstandingDiskState, PciState, PicState, PitState, QueueState, RngState, SegmentState,
    TransportState, UartState, VirtioPciState,
};
use devices::{
    BOARD_STATE_SCHEMA, BoardConfig, BoardState, DiskCache, DiskConfig, NetConfig, RequestId,
    VirtualTime,
};
use format::{ExitNumber, crc32c};
use hypervisor::{CpuidLeaf, CpuidTable, Exit, Msr, VcpuState};
use serde::Serialize;

use super::{MACHINE_SCHEMA, MachineState};
use crate::machine::{MachineConfig, Patches, Stage, TrapPorts};
use crate::{Digest, Machine, SavedError};

/// Schema, bytes and CRC32C of the fixed board and of its variants.
const BOARD_GOLDEN: (u32, usize, u32) = (1, 743, 0x8616_eb0e);
/// The same of the fixed machine, after the schema of the board that is part of it.
const MACHINE_GOLDEN: (u32, u32, usize, u32) = (2, 1, 2005, 0x37a8_9086);

const HOW_TO_GO_ON: &str =
    "the layout has changed: give the schema a new number, and this test its new values";

fn encoded(value: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain data always encodes")
}

/// Numbers that no two fields share.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63
    }

    fn long(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    fn short(&mut self) -> u16 {
        (self.next() >> 48) as u16
    }

    fn byte(&mut self) -> u8 {
        (self.next() >> 56) as u8
    }
}

/// Flag `field` of the instance `which` of a state: with three instances no two of eight flags are alike.
fn flag(field: u8, which: u8) -> bool {
    field >> which & 1 != 0
}

fn chip(n: &mut Numbers, which: u8, init_step: InitStepState) -> ChipState {
    ChipState {
        edges: n.byte(),
        lines: n.byte(),
        in_service: n.byte(),
        mask: n.byte(),
        vector_base: n.byte(),
        elcr: n.byte(),
        init_step,
        wants_icw4: flag(0, which),
        single: flag(1, which),
        lowest_priority: n.byte(),
        auto_eoi: flag(2, which),
        rotate_on_auto_eoi: flag(2, which),
        special_mask: flag(4, which),
        special_fully_nested: flag(5, which),
        poll: flag(6, which),
        read_in_service: flag(7, which),
    }
}

fn channel(
    n: &mut Numbers,
    which: u8,
    access: AccessState,
    counting: CountingState,
) -> ChannelState {
    ChannelState {
        mode: n.byte(),
        bcd: flag(0, which),
        access,
        gate: flag(1, which),
        initial: n.long(),
        loaded: flag(2, which),
        counting,
        low_written: Some(n.byte()),
        read_high_next: flag(3, which),
        latched_count: Some(n.short()),
        latched_status: Some(n.byte()),
    }
}

fn pit(n: &mut Numbers) -> PitState {
    let halted = CountingState::Halted { elapsed: n.next() };
    let since = CountingState::Since {
        start: VirtualTime(n.next()),
        elapsed: n.next(),
    };
    PitState {
        channels: [
            channel(n, 0, AccessState::Low, halted),
            channel(n, 1, AccessState::High, since),
            channel(n, 2, AccessState::LowThenHigh, since),
        ],
        port61: n.byte(),
        next_edge: Some(n.next()),
        ticks: n.next(),
        lost_ticks: n.next(),
    }
}

fn function(n: &mut Numbers) -> FunctionState {
    FunctionState {
        command: n.short(),
        bar: n.long(),
        interrupt_line: n.byte(),
    }
}

fn virtio<D>(n: &mut Numbers, device: D) -> VirtioPciState<D> {
    VirtioPciState {
        function: function(n),
        window: (n.byte(), n.long(), n.long()),
        transport: TransportState {
            device_feature_select: n.long(),
            driver_feature_select: n.long(),
            driver_features: n.next(),
            device_status: n.byte(),
            resetting: true,
            queue_select: n.short(),
            isr_status: n.byte(),
            queues: vec![QueueState {
                size: n.short(),
                enabled: true,
                desc: n.next(),
                driver: n.next(),
                device: n.next(),
                next_avail: n.short(),
                next_used: n.short(),
            }],
        },
        device,
    }
}

fn segment(n: &mut Numbers) -> SegmentState {
    SegmentState {
        addr: n.next(),
        len: n.long(),
    }
}

fn disk(n: &mut Numbers) -> BlkState {
    let requests = [
        DiskRequestState::Read {
            sector: n.next(),
            len: n.long(),
        },
        DiskRequestState::Write {
            sector: n.next(),
            data: vec![n.byte(), n.byte()],
        },
        DiskRequestState::Flush,
    ];
    let outstanding = requests.map(|request| OutstandingDiskState {
        id: RequestId(n.next()),
        request,
        head: Some(n.short()),
        writable: vec![segment(n)],
    });
    BlkState {
        outstanding: outstanding.into(),
    }
}

fn entropy(n: &mut Numbers) -> RngState {
    RngState {
        outstanding: vec![EntropyRequestState {
            id: RequestId(n.next()),
            len: n.long(),
            head: n.short(),
            writable: vec![segment(n)],
        }],
    }
}

fn net(n: &mut Numbers) -> NetState {
    NetState {
        tx_interrupt: Some(DeferredState {
            since: n.short(),
            until: VirtualTime(n.next()),
        }),
        tx_dropped: n.next(),
    }
}

fn pci(n: &mut Numbers) -> PciState {
    let (net, disk, entropy) = (net(n), disk(n), entropy(n));
    PciState {
        address: n.long(),
        net: Some(virtio(n, net)),
        disk: Some(virtio(n, disk)),
        entropy: Some(virtio(n, entropy)),
    }
}

fn uart(n: &mut Numbers) -> UartState {
    UartState {
        ier: n.byte(),
        fcr: n.byte(),
        lcr: n.byte(),
        mcr: n.byte(),
        scratch: n.byte(),
        divisor: [n.byte(), n.byte()],
        tx_empty_pending: true,
        overrun: false,
        modem_changes: n.byte(),
        rx: vec![n.byte(), n.byte(), n.byte()],
    }
}

fn cmos(n: &mut Numbers) -> CmosState {
    CmosState {
        base_s: n.next().cast_signed(),
        index: n.byte(),
        stopped: Some(DateTimeState {
            year: n.short(),
            month: n.byte(),
            day: n.byte(),
            hour: n.byte(),
            minute: n.byte(),
            second: n.byte(),
        }),
        memory: vec![n.byte(), n.byte()],
    }
}

fn board_config(n: &mut Numbers) -> BoardConfig {
    BoardConfig {
        wall_clock_base_s: n.next(),
        net: Some(NetConfig {
            mac: [n.byte(), n.byte(), n.byte(), n.byte(), n.byte(), n.byte()],
            offloads: true,
        }),
        disk: Some(DiskConfig {
            sectors: n.next(),
            identity: "identity".to_owned(),
            cache: DiskCache::WriteBack,
        }),
        entropy: true,
    }
}

/// A board that could not be, with each field set.
fn board(n: &mut Numbers) -> BoardState {
    BoardState {
        schema: BOARD_STATE_SCHEMA,
        config: board_config(n),
        now: VirtualTime(n.next()),
        next_request_id: n.next(),
        pic: PicState {
            master: chip(n, 0, InitStepState::Icw3),
            slave: chip(n, 1, InitStepState::Ready),
        },
        pit: pit(n),
        uart: uart(n),
        cmos: cmos(n),
        pci: pci(n),
    }
}

#[test]
fn a_board_state_with_another_layout_has_another_schema() {
    use InitStepState::{Icw2, Icw3, Icw4, Ready};
    let n = &mut Numbers(0);
    let board = board(n);
    let mut bytes = encoded(&board);
    assert_eq!(
        postcard::from_bytes::<BoardState>(&bytes).as_ref(),
        Ok(&board)
    );
    bytes.extend(encoded(&chip(n, 2, Icw4)));
    bytes.extend(encoded(&[Ready, Icw2, Icw3, Icw4]));
    bytes.extend(encoded(&[DiskCache::WriteThrough, DiskCache::WriteBack]));
    let found = (BOARD_STATE_SCHEMA, bytes.len(), crc32c(&bytes));
    assert_eq!(found, BOARD_GOLDEN, "{HOW_TO_GO_ON}");
}

/// A vCPU with a value in each block; the blocks themselves are the kernel's.
fn vcpu(n: &mut Numbers) -> VcpuState {
    let mut state = VcpuState {
        regs: hypervisor::kvm_regs::default(),
        sregs: hypervisor::kvm_sregs::default(),
        xsave: vec![n.byte(), n.byte(), n.byte()],
        xcrs: Default::default(),
        msrs: vec![Msr {
            index: n.long(),
            value: n.next(),
        }],
        events: Default::default(),
        debugregs: Default::default(),
        mp_state: Some(Default::default()),
        interrupt_window: true,
        trap_tsc: false,
        cpuid: cpuid(n),
    };
    (state.regs.rax, state.regs.rflags) = (n.next(), n.next());
    (state.sregs.cs.base, state.sregs.interrupt_bitmap[3]) = (n.next(), n.next());
    (state.xcrs.nr_xcrs, state.xcrs.padding[15]) = (n.long(), n.next());
    state.events.exception_payload = n.next();
    (state.debugregs.db[0], state.debugregs.reserved[8]) = (n.next(), n.next());
    state
}

/// The table has no public fields: its encoding is that of its leaves.
fn cpuid(n: &mut Numbers) -> CpuidTable {
    let leaf = CpuidLeaf {
        function: n.long(),
        index: n.long(),
        indexed: true,
        eax: n.long(),
        ebx: n.long(),
        ecx: n.long(),
        edx: n.long(),
    };
    postcard::from_bytes(&encoded(&vec![leaf])).expect("a table is a list of leaves")
}

fn machine(n: &mut Numbers) -> MachineState {
    MachineState {
        config: MachineConfig {
            ports: TrapPorts {
                tsc: n.short(),
                cpuid: n.short(),
            },
            window_at: Some(n.next()..n.next()),
            patches: Patches {
                id: std::array::from_fn(|_| n.byte()),
                quirks: vec!["quirk".to_owned()],
            },
        },
        exit: ExitNumber(n.next()),
        digest: Digest(n.next()),
        stage: Stage::Open(Exit::Halt),
        ended: true,
        vcpu: vcpu(n),
        board: board(n),
        memory_bytes: n.next(),
    }
}

/// Every stage, and every exit in one.
fn stages(n: &mut Numbers) -> Vec<Stage> {
    let (port, size, count) = (n.short(), n.byte(), n.long());
    let (addr, len) = (n.next(), n.byte());
    let exits = [
        Exit::PortIn { port, size, count },
        Exit::PortOut { port, size, count },
        Exit::MmioRead { addr, len },
        Exit::MmioWrite { addr, len },
        Exit::Halt,
        Exit::InterruptWindow,
        Exit::Shutdown,
        Exit::EmulationFailed,
        Exit::SystemEvent(n.long()),
        Exit::Unknown(n.long()),
    ];
    let others = [Stage::Left, Stage::Access(Exit::Halt), Stage::Between];
    let open = exits.into_iter().map(Stage::Open);
    others.into_iter().chain(open).collect()
}

#[test]
fn a_machine_state_with_another_layout_has_another_schema() {
    let n = &mut Numbers(1000);
    let machine = machine(n);
    let mut bytes = encoded(&machine);
    assert_eq!(
        postcard::from_bytes::<MachineState>(&bytes).as_ref(),
        Ok(&machine)
    );
    bytes.extend(encoded(&stages(n)));
    let found = (
        MACHINE_SCHEMA,
        BOARD_STATE_SCHEMA,
        bytes.len(),
        crc32c(&bytes),
    );
    assert_eq!(found, MACHINE_GOLDEN, "{HOW_TO_GO_ON}");
}

#[test]
fn a_machine_with_a_board_of_another_schema_is_refused() {
    use hypervisor::fake::FakeVm;
    let ram = hypervisor::GuestRam::new(1 << 20).unwrap();
    let vm = FakeVm::new(ram);
    let vcpu = vm.create_toy(0, CpuidTable::default());
    let config = BoardConfig {
        net: None,
        disk: None,
        wall_clock_base_s: 0,
        entropy: false,
    };
    let ports = TrapPorts { tsc: 1, cpuid: 2 };
    let machine_config = MachineConfig {
        ports,
        window_at: None,
        patches: Patches::default(),
    };
    let board = devices::Board::new(&config).unwrap();
    let mut state = Machine::new(vm, vcpu, board, machine_config)
        .save()
        .unwrap()
        .unwrap();
    state.board.schema += 1;
    let other = FakeVm::new(hypervisor::GuestRam::new(1 << 20).unwrap());
    let vcpu = other.create_toy(0, CpuidTable::default());
    let refused = Machine::from_state(other, vcpu, state);
    assert!(matches!(
        refused,
        Err(SavedError::Board(devices::StateError::Schema(found))) if found == BOARD_STATE_SCHEMA + 1
    ));
}
