//! CPUs, memory, and what the process may do with them.

use super::host::{Capability, Host};
use super::report::Finding;
use super::sys;

const AREA: &str = "CPU and memory";
/// A small guest, its copy during a state transfer, and the programs around it.
const COMFORTABLE_MIB: u64 = 1024;
/// The least a guest that boots needs, with the programs around it.
const LEAST_MIB: u64 = 256;
/// Buffers that the logging channel registers.
const LOCKED_MIB: u64 = 300;

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![
        cpus(std::thread::available_parallelism().map_or(1, usize::from)),
        memory(host),
        overcommit(host),
        transparent_huge_pages(host),
        locked_memory(host, sys::locked_memory_limit_bytes()),
        priorities(host),
    ]
}

fn cpus(count: usize) -> Finding {
    let finding = format!("{count} usable");
    if count >= 2 {
        return Finding::ok(
            AREA,
            "CPUs",
            finding,
            "the vCPU and the logging channel run side by side",
        );
    }
    Finding::warn(
        AREA,
        "CPUs",
        finding,
        "the logging channel waits for the vCPU, which delays every output",
        "give the host two CPUs or more",
    )
}

fn memory(host: &Host) -> Finding {
    const NAME: &str = "free memory";
    let Some(mib) = host.meminfo_mib("MemAvailable") else {
        return Finding::warn(
            AREA,
            NAME,
            "unknown",
            "guests may not fit",
            "mount /proc, so that /proc/meminfo can be read",
        );
    };
    let finding = format!("{mib} MiB");
    if mib < LEAST_MIB {
        return Finding::missing(
            AREA,
            NAME,
            finding,
            "not even a small guest fits",
            "free memory or add some",
        );
    }
    if mib < COMFORTABLE_MIB {
        return Finding::warn(
            AREA,
            NAME,
            finding,
            "a small guest fits; its copy during a state transfer perhaps not",
            "keep twice the guest's memory free",
        );
    }
    Finding::ok(
        AREA,
        NAME,
        finding,
        "keep twice a guest's memory free: a state transfer copies it",
    )
}

fn overcommit(host: &Host) -> Finding {
    const NAME: &str = "overcommit";
    match host.read_number("/proc/sys/vm/overcommit_memory") {
        Some(2) => Finding::warn(
            AREA,
            NAME,
            "strict (vm.overcommit_memory = 2)",
            "guest memory counts in full from the start, and a state transfer needs it twice",
            "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
        ),
        _ => Finding::ok(AREA, NAME, "allowed", "guest memory counts when it is used"),
    }
}

fn transparent_huge_pages(host: &Host) -> Finding {
    const NAME: &str = "transparent huge pages";
    match host
        .bracketed("/sys/kernel/mm/transparent_hugepage/enabled")
        .as_deref()
    {
        Some(mode @ ("always" | "madvise")) => {
            Finding::ok(AREA, NAME, mode, "guest memory can use them")
        }
        mode => Finding::warn(
            AREA,
            NAME,
            mode.unwrap_or("not in this kernel").to_owned(),
            "guest memory is mapped in small pages: slower first touches, slower page walks",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    }
}

fn locked_memory(host: &Host, limit_bytes: Option<u64>) -> Finding {
    const NAME: &str = "locked memory";
    if host.has(Capability::IpcLock) {
        return Finding::ok(
            AREA,
            NAME,
            "unlimited (CAP_IPC_LOCK)",
            "the channel registers its buffers",
        );
    }
    match limit_bytes.map(|bytes| bytes >> 20) {
        None => Finding::ok(AREA, NAME, "unlimited", "the channel registers its buffers"),
        Some(mib) if mib >= LOCKED_MIB => Finding::ok(
            AREA,
            NAME,
            format!("{mib} MiB"),
            "the channel registers its buffers",
        ),
        Some(mib) => Finding::warn(
            AREA,
            NAME,
            format!("{mib} MiB"),
            "the channel cannot register its buffers and copies more",
            "raise the limit (ulimit -l, LimitMEMLOCK=), or grant CAP_IPC_LOCK",
        ),
    }
}

fn priorities(host: &Host) -> Finding {
    const NAME: &str = "priorities";
    if host.has(Capability::SysNice) {
        return Finding::ok(
            AREA,
            NAME,
            "may be raised",
            "the channel keeps its latency beside busy vCPUs",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        "may not be raised (no CAP_SYS_NICE)",
        "beside a busy vCPU the channel's latency rises from microseconds to milliseconds",
        "grant CAP_SYS_NICE to the channel's daemon",
    )
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::host_of;
    use super::super::report::Status;
    use super::*;

    #[test]
    fn little_memory_warns_and_too_little_is_missing() {
        for (kib, status) in [
            (8 << 20, Status::Ok),
            (600 << 10, Status::Warn),
            (100 << 10, Status::Missing),
        ] {
            let meminfo = format!("MemAvailable: {kib} kB\n");
            let (_dir, host) = host_of(&[("/proc/meminfo", &meminfo)]);
            assert_eq!(memory(&host).status, status, "{kib} KiB");
        }
    }

    #[test]
    fn limits_count_only_without_the_capability() {
        let (_dir, plain) = host_of(&[("/proc/self/status", "CapEff:\t0\n")]);
        let (_dir2, root) = host_of(&[("/proc/self/status", "CapEff:\t000001ffffffffff\n")]);
        assert_eq!(locked_memory(&plain, Some(8 << 20)).status, Status::Warn);
        assert_eq!(locked_memory(&plain, Some(512 << 20)).status, Status::Ok);
        assert_eq!(locked_memory(&plain, None).status, Status::Ok);
        assert_eq!(locked_memory(&root, Some(0)).status, Status::Ok);
        assert_eq!(priorities(&plain).status, Status::Warn);
        assert_eq!(priorities(&root).status, Status::Ok);
    }

    #[test]
    fn strict_overcommit_and_lacking_huge_pages_are_warned_of() {
        let (_dir, host) = host_of(&[
            ("/proc/sys/vm/overcommit_memory", "2\n"),
            (
                "/sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]\n",
            ),
        ]);
        assert_eq!(overcommit(&host).status, Status::Warn);
        assert_eq!(transparent_huge_pages(&host).status, Status::Warn);
        let (_dir, none) = host_of(&[]);
        assert_eq!(overcommit(&none).status, Status::Ok);
        assert_eq!(transparent_huge_pages(&none).finding, "not in this kernel");
        assert_eq!(cpus(1).status, Status::Warn);
    }
}
