//! Keeps a VM's clock with the wall clock over changes of its host.
//!
//! Virtual time 0 belongs to one moment of the wall clock. That moment travels with the state; a host
//! that goes on from another's log knows by it how far virtual time is behind, and catches up.

use devices::VirtualTime;

use crate::vm::wall_ns;

/// Most that is caught up, in ns: beyond it (a host whose clock is wrong, say) the VM's clock stays
/// behind rather than run fast for days.
const MAX_CATCH_UP_NS: u64 = 600_000_000_000;

/// The wall clock at virtual time 0 of a VM whose virtual time is `now`, in ns since 1970.
pub fn wall_at_birth(now: VirtualTime) -> u64 {
    wall_ns().saturating_sub(now.0)
}

/// How far `now` is behind, in ns.
pub fn behind(now: VirtualTime, wall_at_birth: u64) -> u64 {
    let target = wall_ns().saturating_sub(wall_at_birth);
    let behind = target.saturating_sub(now.0);
    if behind > MAX_CATCH_UP_NS {
        tracing::warn!(
            behind_s = behind / 1_000_000_000,
            "the guest's clock stays behind"
        );
        return 0;
    }
    behind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_travels_is_behind_by_what_passed() {
        let birth = wall_at_birth(VirtualTime(5_000_000_000));
        let behind = behind(VirtualTime(4_000_000_000), birth);
        assert!((1_000_000_000..3_000_000_000).contains(&behind), "{behind}");
        assert_eq!(
            super::behind(VirtualTime(0), wall_ns() - 10 * MAX_CATCH_UP_NS),
            0
        );
    }
}
