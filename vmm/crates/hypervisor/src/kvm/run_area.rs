//! The parts of `kvm_run` that kvm-ioctls does not hand out: the bytes of an access after
//! `run` has returned, the interrupt flags, and the reasons that lie in its union.
#![allow(unsafe_code)] // kvm_run is a C union in memory shared with the kernel.

use std::ptr::NonNull;
use std::slice;

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_INTERNAL_ERROR_EMULATION, kvm_run,
};
use kvm_ioctls::VcpuFd;

use crate::Exit;

/// Where the bytes of the incomplete access lie within the mapping of `kvm_run`.
#[derive(Clone, Copy, Debug)]
pub(super) struct AccessBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is into the mapping that the vCPU's file descriptor wrapper owns; it is only
// followed through `&mut` of that wrapper, so it may move between threads along with it.
unsafe impl Send for AccessBytes {}

/// Decodes a port or MMIO exit, and finds its bytes. `run_size` is the size of the mapping.
pub(super) fn decode_access(fd: &mut VcpuFd, run_size: usize) -> Option<(Exit, AccessBytes)> {
    let run: &mut kvm_run = fd.get_kvm_run();
    let base = NonNull::from(&mut *run).cast::<u8>();
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that this member of the union is valid.
            let io = unsafe { run.__bindgen_anon_1.io };
            let len = usize::from(io.size) * io.count as usize;
            let offset = usize::try_from(io.data_offset).ok()?;
            if offset.checked_add(len)? > run_size {
                return None;
            }
            // SAFETY: offset and length lie within the mapping, as just checked.
            let start = unsafe { base.add(offset) };
            let exit = if u32::from(io.direction) == KVM_EXIT_IO_IN {
                Exit::PortIn {
                    port: io.port,
                    size: io.size,
                    count: io.count,
                }
            } else {
                Exit::PortOut {
                    port: io.port,
                    size: io.size,
                    count: io.count,
                }
            };
            Some((exit, AccessBytes { start, len }))
        }
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that this member of the union is valid.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            let addr = mmio.phys_addr;
            let exit = if mmio.is_write == 0 {
                Exit::MmioRead {
                    addr,
                    len: len as u8,
                }
            } else {
                Exit::MmioWrite {
                    addr,
                    len: len as u8,
                }
            };
            Some((
                exit,
                AccessBytes {
                    start: NonNull::from(&mut mmio.data).cast(),
                    len,
                },
            ))
        }
        _ => None,
    }
}

/// The bytes of an access of this vCPU.
pub(super) fn access_bytes(_owner: &mut VcpuFd, bytes: AccessBytes) -> &mut [u8] {
    // SAFETY: the bytes lie within the mapping of `kvm_run`, which lives as long as its owner,
    // whose exclusive borrow the slice takes over; KVM touches them only during KVM_RUN.
    unsafe { slice::from_raw_parts_mut(bytes.start.as_ptr(), bytes.len) }
}

/// Address of `immediate_exit`, for the kick signal's handler.
pub(super) fn immediate_exit_byte(fd: &mut VcpuFd) -> *mut u8 {
    &raw mut fd.get_kvm_run().immediate_exit
}

/// The suberror of a `KVM_EXIT_INTERNAL_ERROR`.
pub(super) fn internal_suberror(fd: &mut VcpuFd) -> u32 {
    // SAFETY: called for that exit reason only, for which this member of the union is valid.
    unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

/// Whether a suberror means that the instruction emulator gave up.
pub(super) fn is_emulation_failure(suberror: u32) -> bool {
    suberror == KVM_INTERNAL_ERROR_EMULATION
}
