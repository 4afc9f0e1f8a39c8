//! Clocks: virtual time is slewed from the host's monotonic clock, and logs carry its wall clock.

use std::time::Instant;

use super::host::Host;
use super::report::Finding;
use super::sys::{self, WallClock};

const AREA: &str = "Clocks";
/// A clock read through the vDSO takes tens of nanoseconds, a system call several times that.
const SLOW_READ_NS: u128 = 200;

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![
        source(host),
        steadiness(&read_clock()),
        synchronisation(sys::wall_clock()),
    ]
}

fn source(host: &Host) -> Finding {
    const NAME: &str = "clock source";
    let current = host
        .read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        .unwrap_or_else(|| "unknown".into());
    match current.as_str() {
        "tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page" => {
            Finding::ok(AREA, NAME, current, "reading the time is cheap")
        }
        _ => Finding::warn(
            AREA,
            NAME,
            current,
            "reading the time takes a microsecond or more, at every exit of the guest",
            "boot with tsc=reliable if the processor's TSC is invariant",
        ),
    }
}

/// What reading the monotonic clock many times has shown.
struct Steadiness {
    backwards: u32,
    read_ns: u128,
}

fn read_clock() -> Steadiness {
    const READS: u32 = 20_000;
    let begin = Instant::now();
    let mut last = sys::monotonic_ns();
    let mut backwards = 0;
    for _ in 0..READS {
        let now = sys::monotonic_ns();
        backwards += u32::from(now < last);
        last = now;
    }
    Steadiness {
        backwards,
        read_ns: begin.elapsed().as_nanos() / u128::from(READS),
    }
}

fn steadiness(seen: &Steadiness) -> Finding {
    const NAME: &str = "monotonic clock";
    if seen.backwards > 0 {
        return Finding::missing(
            AREA,
            NAME,
            format!("went backwards {} times", seen.backwards),
            "time-outs and virtual time cannot rely on it",
            "boot with another clocksource=",
        );
    }
    let finding = format!("steady, {} ns a read", seen.read_ns);
    if seen.read_ns > SLOW_READ_NS {
        return Finding::warn(
            AREA,
            NAME,
            finding,
            "every reading is a system call",
            "use a clock source that the vDSO can read: tsc, kvm-clock",
        );
    }
    Finding::ok(
        AREA,
        NAME,
        finding,
        "virtual time can follow it at every exit",
    )
}

fn synchronisation(clock: std::io::Result<WallClock>) -> Finding {
    const NAME: &str = "time synchronisation";
    let meaning = "no decision depends on it, but a guest's wall clock may be slewed after a \
                   failover, and the hosts' logs do not line up";
    match clock {
        Ok(WallClock {
            synchronised: true,
            error_us,
        }) => Finding::ok(
            AREA,
            NAME,
            format!("in sync, within {error_us} us"),
            "a guest's wall clock hardly moves at a failover",
        ),
        Ok(WallClock {
            synchronised: false,
            ..
        }) => Finding::warn(
            AREA,
            NAME,
            "not in sync",
            meaning,
            "run chrony or systemd-timesyncd",
        ),
        Err(error) => Finding::warn(
            AREA,
            NAME,
            format!("unknown: {error}"),
            meaning,
            "run chrony or systemd-timesyncd on the host",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::host_of;
    use super::super::report::Status;
    use super::*;

    #[test]
    fn slow_and_unknown_sources_are_warned_of() {
        const PATH: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        for (content, status) in [
            ("tsc\n", Status::Ok),
            ("kvm-clock\n", Status::Ok),
            ("hpet\n", Status::Warn),
        ] {
            let (_dir, host) = host_of(&[(PATH, content)]);
            assert_eq!(source(&host).status, status, "{content}");
        }
        let (_dir, host) = host_of(&[]);
        assert_eq!(source(&host).status, Status::Warn);
    }

    #[test]
    fn clock_that_runs_backwards_is_missing() {
        let status = |backwards, read_ns| steadiness(&Steadiness { backwards, read_ns }).status;
        assert_eq!(status(0, 30), Status::Ok);
        assert_eq!(status(0, 1500), Status::Warn);
        assert_eq!(status(1, 30), Status::Missing);
    }

    #[test]
    fn lacking_synchronisation_is_only_a_warning() {
        let clock = |synchronised| {
            Ok(WallClock {
                synchronised,
                error_us: 5,
            })
        };
        assert_eq!(synchronisation(clock(true)).status, Status::Ok);
        assert_eq!(synchronisation(clock(false)).status, Status::Warn);
        let refused = Err(std::io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(synchronisation(refused).status, Status::Warn);
    }
}
