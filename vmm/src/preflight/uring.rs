//! io_uring: the logging channel and the guest's disk and network run on it.

use std::io;

use io_uring::{IoUring, Probe, opcode};

use super::host::Host;
use super::report::Finding;
use super::sys;

const AREA: &str = "io_uring";
const ENTRIES: u32 = 8;
const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

pub(super) fn check(host: &Host) -> Vec<Finding> {
    match IoUring::new(ENTRIES) {
        Ok(ring) => {
            let usable = Finding::ok(AREA, "rings", "usable", "disk, network and channel can run");
            vec![
                usable,
                task_run(),
                buffer_rings(host, &ring),
                zero_copy(&ring),
                futex(&ring),
            ]
        }
        Err(error) => vec![unusable(host.read_number(SYSCTL), &error)],
    }
}

fn unusable(disabled: Option<u64>, error: &io::Error) -> Finding {
    let (finding, remedy) = match (disabled, error.raw_os_error()) {
        (Some(level @ 1..), _) => (
            format!("switched off (kernel.io_uring_disabled = {level}): {error}"),
            "sysctl kernel.io_uring_disabled=0; with 1 it is enough to be in the group of \
             kernel.io_uring_group",
        ),
        (_, Some(libc::ENOSYS)) => (
            format!("not in this kernel: {error}"),
            "use a kernel with CONFIG_IO_URING",
        ),
        (_, Some(libc::EPERM)) => (
            format!("refused: {error}"),
            "allow io_uring_setup in the container's seccomp filter",
        ),
        _ => (error.to_string(), "see the error"),
    };
    Finding::missing(
        AREA,
        "rings",
        finding,
        "neither disk, network nor channel can run",
        remedy,
    )
}

fn task_run() -> Finding {
    const NAME: &str = "DEFER_TASKRUN";
    let ring: io::Result<IoUring> = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(ENTRIES);
    match ring {
        Ok(_) => Finding::ok(
            AREA,
            NAME,
            "works",
            "completions come when the channel asks for them",
        ),
        Err(error) => Finding::missing(
            AREA,
            NAME,
            error.to_string(),
            "the channel is built on it",
            "use a kernel of 6.1 or newer",
        ),
    }
}

fn buffer_rings(host: &Host, ring: &IoUring) -> Finding {
    const NAME: &str = "incremental buffers";
    match sys::register_incremental_buffer_ring(ring) {
        Ok(()) => Finding::ok(
            AREA,
            NAME,
            "work",
            "log frames arrive contiguously, without a copy",
        ),
        Err(error) => Finding::warn(
            AREA,
            NAME,
            format!("{error} (kernel {})", host.kernel_release()),
            "the channel copies what it receives once more",
            "use a kernel of 6.12 or newer",
        ),
    }
}

fn supports(ring: &IoUring, code: u8) -> bool {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(code)
}

fn zero_copy(ring: &IoUring) -> Finding {
    const NAME: &str = "SEND_ZC";
    const MEANING: &str =
        "an option for large payloads on real network cards; off unless asked for";
    if supports(ring, opcode::SendZc::CODE) {
        return Finding::ok(AREA, NAME, "offered", MEANING);
    }
    Finding::warn(
        AREA,
        NAME,
        "not offered",
        MEANING,
        "none needed; a kernel of 6.0 has it",
    )
}

fn futex(ring: &IoUring) -> Finding {
    const NAME: &str = "FUTEX_WAIT";
    if supports(ring, opcode::FutexWait::CODE) {
        return Finding::ok(
            AREA,
            NAME,
            "offered",
            "the channel sleeps on rings and sockets at once",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        "not offered",
        "the channel needs an eventfd to be woken",
        "use a kernel of 6.7 or newer",
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    #[test]
    fn reason_for_a_refused_ring_is_named() {
        let eperm = io::Error::from_raw_os_error(libc::EPERM);
        let off = unusable(Some(2), &eperm);
        assert_eq!(off.status, Status::Missing);
        assert!(
            off.finding.contains("kernel.io_uring_disabled = 2"),
            "{}",
            off.finding
        );
        assert!(off.remedy.is_some_and(|remedy| remedy.contains("sysctl")));
        let filtered = unusable(Some(0), &eperm);
        assert!(
            filtered
                .remedy
                .is_some_and(|remedy| remedy.contains("seccomp"))
        );
        let absent = unusable(None, &io::Error::from_raw_os_error(libc::ENOSYS));
        assert!(
            absent.finding.starts_with("not in this kernel"),
            "{}",
            absent.finding
        );
    }
}
