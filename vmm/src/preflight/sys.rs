//! The system calls of the checks that have no safe interface.
#![allow(unsafe_code)] // ioctl, bpf, adjtimex, io_uring registration of raw memory.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use io_uring::IoUring;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Columns of the terminal on standard output; a readable number if it is none.
pub(super) fn terminal_columns() -> usize {
    const DEFAULT: usize = 100;
    rustix::termios::tcgetwinsize(io::stdout())
        .map_or(DEFAULT, |size| usize::from(size.ws_col))
        .clamp(DEFAULT / 2, DEFAULT * 2)
}

/// Limit of locked memory in bytes; none if there is none.
pub(super) fn locked_memory_limit_bytes() -> Option<u64> {
    getrlimit(Resource::Memlock).current
}

/// The monotonic clock in nanoseconds.
pub(super) fn monotonic_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// What the kernel knows about the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WallClock {
    pub(super) synchronised: bool,
    /// Greatest error that the kernel assumes.
    pub(super) error_us: i64,
}

/// Asks the kernel whether its wall clock is kept in sync.
pub(super) fn wall_clock() -> io::Result<WallClock> {
    // SAFETY: an all-zero timex is valid and asks for nothing to be changed.
    let mut timex: libc::timex = unsafe { mem::zeroed() };
    // SAFETY: the structure is writable and of the size that the call expects.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    let synchronised = state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0;
    Ok(WallClock {
        synchronised,
        error_us: timex.maxerror,
    })
}

/// Registers a ring of incrementally used buffers and takes it away again.
pub(super) fn register_incremental_buffer_ring(ring: &IoUring) -> io::Result<()> {
    /// `IOU_PBUF_RING_INC` of linux/io_uring.h.
    const INCREMENTAL: u16 = 2;
    const GROUP: u16 = 0;
    #[repr(C, align(4096))]
    struct RingPage([u8; 4096]);
    let mut page = Box::new(RingPage([0; 4096]));
    // SAFETY: the page is aligned, large enough for 8 entries of 16 bytes, and outlives the
    // registration, which ends below.
    unsafe {
        ring.submitter().register_buf_ring_with_flags(
            page.0.as_mut_ptr() as u64,
            8,
            GROUP,
            INCREMENTAL,
        )
    }?;
    ring.submitter().unregister_buf_ring(GROUP)
}

/// Checks that `tun` is the TUN/TAP driver and can put a virtio header before packets.
pub(super) fn tap_has_virtio_header(tun: &File) -> io::Result<()> {
    /// `_IOR('T', 207, unsigned int)`.
    const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
    let mut features: libc::c_uint = 0;
    // SAFETY: the call writes one unsigned int.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETFEATURES, &raw mut features) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let wanted = (libc::IFF_TAP | libc::IFF_VNET_HDR) as libc::c_uint;
    if features & wanted == wanted {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "no TAP mode with a virtio header",
        ))
    }
}

/// Loads a program of two instructions (return 0) and drops it: whether eBPF may be used at all.
pub(super) fn load_trivial_bpf() -> io::Result<()> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    /// `r0 = 0; exit`.
    const PROGRAM: [u64; 2] = [0xb7, 0x95];
    const LICENCE: &std::ffi::CStr = c"Apache-2.0";
    /// The first members of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct ProgLoad {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: PROGRAM.len() as u32,
        insns: PROGRAM.as_ptr() as u64,
        license: LICENCE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the structure and what it points to live through the call; its size is passed.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            mem::size_of::<ProgLoad>(),
        )
    };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a fresh descriptor that nothing else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}
