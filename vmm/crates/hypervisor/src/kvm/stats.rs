//! What KVM counts about a vCPU: its binary statistics.
//!
//! Source: Documentation/virt/kvm/api.rst, 4.133. A descriptor gives a header, descriptions with names, and
//! values.
#![allow(unsafe_code)] // KVM_GET_STATS_FD is missing in kvm-ioctls.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Bytes of the header, and of a description before its name.
const HEADER_BYTES: usize = 24;
const DESCRIPTION_BYTES: usize = 16;
/// More would be none of KVM's.
const MAX_DESCRIPTIONS: u32 = 4096;
const MAX_NAME_BYTES: u32 = 4096;

/// The value of one counter; none where this KVM does not count it.
pub(super) fn counter(fd: &VcpuFd, name: &str) -> Option<u64> {
    // SAFETY: the descriptor is a vCPU, and the call takes no argument.
    let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    if stats < 0 {
        return None;
    }
    // SAFETY: the call made this descriptor, and nobody else has it.
    let stats = unsafe { File::from_raw_fd(stats) };
    read(&stats, name).ok().flatten()
}

fn read(stats: &File, name: &str) -> io::Result<Option<u64>> {
    let mut header = [0; HEADER_BYTES];
    stats.read_exact_at(&mut header, 0)?;
    let field = |at: usize| word(&header, at);
    let (name_bytes, count) = (field(4), field(8));
    let (descriptions, values) = (field(16), field(20));
    if count > MAX_DESCRIPTIONS || name_bytes > MAX_NAME_BYTES {
        return Ok(None);
    }
    let size = DESCRIPTION_BYTES + name_bytes as usize;
    let mut all = vec![0; size * count as usize];
    stats.read_exact_at(&mut all, descriptions.into())?;
    for description in all.chunks_exact(size) {
        let text = &description[DESCRIPTION_BYTES..];
        let end = text
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(text.len());
        if &text[..end] == name.as_bytes() {
            let mut value = [0; 8];
            let at = u64::from(values) + u64::from(word(description, 8));
            stats.read_exact_at(&mut value, at)?;
            return Ok(Some(u64::from_le_bytes(value)));
        }
    }
    Ok(None)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(
        bytes[at..at + 4]
            .try_into()
            .expect("four bytes are four bytes"),
    )
}
