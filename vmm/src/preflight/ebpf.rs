//! eBPF: heartbeats that the kernel answers, and measurements. Pollux runs without it, slower to
//! notice a failure.

use std::io;

use super::host::{Capability, Host};
use super::report::Finding;
use super::sys;

const AREA: &str = "eBPF";

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![
        loading(host, sys::load_trivial_bpf()),
        type_information(host),
        attaching(host),
        program(),
    ]
}

fn loading(host: &Host, loaded: io::Result<()>) -> Finding {
    const NAME: &str = "loading programs";
    let Err(error) = loaded else {
        return Finding::ok(
            AREA,
            NAME,
            "permitted",
            "heartbeats can be answered by the kernel",
        );
    };
    let meaning = "heartbeats are answered by a program, which busy hosts delay: time-outs must be \
                   longer";
    if error.raw_os_error() == Some(libc::ENOSYS) {
        let finding = format!("not in this kernel: {error}");
        return Finding::warn(
            AREA,
            NAME,
            finding,
            meaning,
            "use a kernel with CONFIG_BPF_SYSCALL",
        );
    }
    let unprivileged = host.read("/proc/sys/kernel/unprivileged_bpf_disabled");
    let bpf = host.has(Capability::Bpf) || host.has(Capability::SysAdmin);
    let finding = format!(
        "refused: {error} ({} CAP_BPF, kernel.unprivileged_bpf_disabled = {})",
        if bpf { "with" } else { "without" },
        unprivileged.as_deref().unwrap_or("unknown"),
    );
    Finding::warn(
        AREA,
        NAME,
        finding,
        meaning,
        "grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN to ftprobe, or run it as root",
    )
}

fn type_information(host: &Host) -> Finding {
    const NAME: &str = "BTF";
    if host.exists("/sys/kernel/btf/vmlinux") {
        return Finding::ok(
            AREA,
            NAME,
            "present",
            "probes adapt to this kernel's structures",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        "/sys/kernel/btf/vmlinux does not exist",
        "probes that read kernel structures cannot be loaded: fewer measurements",
        "use a kernel with CONFIG_DEBUG_INFO_BTF",
    )
}

fn attaching(host: &Host) -> Finding {
    const NAME: &str = "TCX and XDP";
    let release = host.kernel_release();
    if !host.has(Capability::NetAdmin) {
        return Finding::warn(
            AREA,
            NAME,
            "no CAP_NET_ADMIN",
            "heartbeats and acknowledgements cannot be seen on the interface",
            "grant CAP_NET_ADMIN to ftprobe",
        );
    }
    if host.kernel_at_least(6, 6) {
        return Finding::ok(
            AREA,
            NAME,
            format!("offered by kernel {release}"),
            "heartbeats and acknowledgements are seen on the interface",
        );
    }
    Finding::warn(
        AREA,
        NAME,
        format!("kernel {release} has XDP but no TCX"),
        "acknowledgements cannot be seen without the cost of XDP on bulk traffic",
        "use a kernel of 6.6 or newer",
    )
}

/// The programs that a protected VM starts.
fn program() -> Finding {
    const NAME: &str = "ftprobe";
    let own = std::env::current_exe().unwrap_or_default();
    match crate::session::find_program("ftprobe", &own) {
        Some(path) => Finding::ok(
            AREA,
            NAME,
            format!("at {}", path.display()),
            "`run --protect` and `standby` start it",
        ),
        None => Finding::warn(
            AREA,
            NAME,
            format!("not beside {} and not in PATH", own.display()),
            "heartbeats are answered by pollux itself, which a starved host delays; a peer is told \
             of a killed VMM by the channel only",
            "install ftprobe beside pollux",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::host_of;
    use super::super::report::Status;
    use super::*;

    const RELEASE: &str = "/proc/sys/kernel/osrelease";
    const STATUS: &str = "/proc/self/status";

    #[test]
    fn refusal_names_capability_and_sysctl() {
        let (_dir, host) = host_of(&[
            ("/proc/sys/kernel/unprivileged_bpf_disabled", "2"),
            (STATUS, "CapEff:\t0\n"),
        ]);
        let refused = loading(&host, Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert_eq!(refused.status, Status::Warn);
        assert!(
            refused.finding.contains("without CAP_BPF"),
            "{}",
            refused.finding
        );
        assert!(refused.finding.contains("unprivileged_bpf_disabled = 2"));
        assert_eq!(loading(&host, Ok(())).status, Status::Ok);
    }

    #[test]
    fn attaching_needs_capability_and_kernel() {
        let all = "CapEff:\t000001ffffffffff\n";
        for (release, status, expected) in [
            ("6.6.0", all, Status::Ok),
            ("6.1.0-18-amd64", all, Status::Warn),
            ("6.6.0", "CapEff:\t0\n", Status::Warn),
        ] {
            let (_dir, host) = host_of(&[(RELEASE, release), (STATUS, status)]);
            assert_eq!(attaching(&host).status, expected, "{release} {status}");
        }
    }
}
