//! Hooks a program to a trace point: a perf event of the kernel's uprobes, with the trace point's gate as
//! the reference counter that the kernel raises. aya's own uprobes know no gate.
#![allow(unsafe_code)] // perf_event_open takes a structure with a pointer, and its descriptor an ioctl

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{
    PERF_EVENT_IOC_ENABLE, PERF_EVENT_IOC_SET_BPF, PERF_FLAG_FD_CLOEXEC, perf_event_attr,
};

use super::notes::Note;

/// Number of the kernel's uprobe events.
const PMU_TYPE: &str = "/sys/bus/event_source/devices/uprobe/type";
/// Where the offset of the gate begins in the event's configuration
/// (`PERF_UPROBE_REF_CTR_OFFSET_SHIFT` of the kernel).
const GATE_SHIFT: u32 = 32;

/// A hooked trace point; dropping it lets go.
#[derive(Debug)]
pub(super) struct Hook {
    _event: OwnedFd,
}

/// Hooks `program` to a trace point in the program at `path`, in one process or in all that run it.
pub(super) fn hook(
    path: &Path,
    note: Note,
    process: Option<u32>,
    program: BorrowedFd<'_>,
) -> io::Result<Hook> {
    let event = open(path, note, process)?;
    control(event.as_fd(), PERF_EVENT_IOC_SET_BPF, program.as_raw_fd())?;
    control(event.as_fd(), PERF_EVENT_IOC_ENABLE, 0)?;
    Ok(Hook { _event: event })
}

fn open(path: &Path, note: Note, process: Option<u32>) -> io::Result<OwnedFd> {
    let kind = std::fs::read_to_string(PMU_TYPE)?;
    let kind = kind.trim().parse().map_err(io::Error::other)?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zero is a valid perf_event_attr.
    let mut attributes: perf_event_attr = unsafe { std::mem::zeroed() };
    attributes.type_ = kind;
    attributes.size = u32::try_from(size_of::<perf_event_attr>()).expect("some hundred bytes");
    attributes.config = note.gate << GATE_SHIFT;
    attributes.__bindgen_anon_3.uprobe_path = path.as_ptr() as u64;
    attributes.__bindgen_anon_4.probe_offset = note.hook;
    let (process, cpu) = match process {
        Some(process) => (i32::try_from(process).map_err(io::Error::other)?, -1),
        None => (-1, 0),
    };
    // SAFETY: the attributes and the path that they point to live through the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            process,
            cpu,
            -1,
            libc::c_ulong::from(PERF_FLAG_FD_CLOEXEC),
        )
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made, and that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn control(event: BorrowedFd<'_>, request: u32, argument: i32) -> io::Result<()> {
    // SAFETY: both requests take a number.
    let result = unsafe { libc::ioctl(event.as_raw_fd(), request.into(), argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
