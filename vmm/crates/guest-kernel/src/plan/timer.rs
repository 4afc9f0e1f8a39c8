//! Makes the timer interrupt rare on a host that emulates ring 0.
//!
//! One tick takes some 5,000 instructions there, 1.5 to 3 ms; the kernel wants one every 4 ms
//! (CONFIG_HZ=250), which leaves the guest half of its time or less. Time itself does not depend on
//! ticks: the clock is the time stamp counter, and with `nohz=on` the kernel reads it to learn how many
//! jiffies have passed.

use super::planner::{Planner, Reason};
use crate::error::PlanError;

/// Shortest time for which the kernel may program the timer, in ticks of the 8254 (1,193,182 Hz): 27 ms.
/// Timers get that coarse.
const SHORTEST_TICKS: u32 = 32_000;
/// Longest time, all that the chip's counter holds: 54.9 ms. The kernel is content with half of it.
const LONGEST_TICKS: u32 = 0xffff;
/// Time from one tick to the next while something runs, in ns: a little below the longest. Time slices, and
/// timers while a program computes, get that coarse.
const TICK_NS: u32 = 54_000_000;
/// The same, as the kernel is built (CONFIG_HZ=250).
const BUILT_TICK_NS: u32 = 4_000_000;

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    // `mov edx, 15`, the shortest time in the call of clockevents_config_and_register.
    let [a, b, c, d] = SHORTEST_TICKS.to_le_bytes();
    planner.replace_insn(
        "clockevent_i8253_init",
        &[0xba, 0x0f, 0, 0, 0],
        &[0xba, a, b, c, d],
        Reason::fast_boot("a timer interrupt every 27 ms at most"),
    )?;
    let [a, b, c, d] = LONGEST_TICKS.to_le_bytes();
    planner.replace_insn(
        "clockevent_i8253_init",
        &[0xb9, 0xff, 0x7f, 0, 0], // mov ecx, 0x7fff
        &[0xb9, a, b, c, d],
        Reason::fast_boot("an idle processor sleeps up to 55 ms"),
    )?;
    let [a, b, c, d] = TICK_NS.to_le_bytes();
    let [e, f, g, h] = BUILT_TICK_NS.to_le_bytes();
    planner.replace_insn(
        "tick_nohz_handler",
        &[0xba, e, f, g, h], // mov edx, 4000000: the time to forward the tick by
        &[0xba, a, b, c, d],
        Reason::fast_boot("a tick every 54 ms while something runs"),
    )?;
    // Before the kernel trusts the time stamp counter the timer runs at a fixed rate: `mov eax` with the
    // low and the high byte of 4,773 ticks. 65,535 ticks are 55 ms; until then jiffies go slow.
    let why = "18 timer interrupts a second, not 250, in the first part of the start";
    for old in [[0xb8, 0xa5, 0xff, 0xff, 0xff], [0xb8, 0x12, 0, 0, 0]] {
        let new = [0xb8, 0xff, old[2], old[3], old[4]];
        planner.replace_insn("pit_set_periodic", &old, &new, Reason::fast_boot(why))?;
    }
    Ok(())
}
