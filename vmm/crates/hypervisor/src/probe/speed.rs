//! How fast the rings run and what an exit costs, in processor time.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use std::time::Duration;

use super::Speeds;
use super::lab::{Lab, thread_time};
use crate::bare::Ring;
use crate::{Error, Vcpu, guest_code};

guest_code! { fn count() { "2: inc rax", "jmp 2b" } }
guest_code! { fn exit() { "2: out 0x10, al", "jmp 2b" } }

/// How long instructions are counted.
const COUNT_FOR: Duration = Duration::from_millis(15);
/// Instructions of one turn of the loop.
const LOOP_INSTRUCTIONS: f64 = 2.0;
const EXITS: u32 = 100;

pub(super) fn probe(lab: &mut Lab) -> Result<Speeds, Error> {
    Ok(Speeds {
        ring0_minstr_per_s: minstr_per_s(lab, Ring::Kernel)?,
        ring3_minstr_per_s: minstr_per_s(lab, Ring::User)?,
        ring0_exit_us: exit_us(lab, Ring::Kernel)?,
        ring3_exit_us: exit_us(lab, Ring::User)?,
    })
}

fn minstr_per_s(lab: &mut Lab, ring: Ring) -> Result<f64, Error> {
    lab.load(count(), ring, 0)?;
    let seen = lab.run_for(COUNT_FOR);
    Ok(seen.regs.rax as f64 * LOOP_INSTRUCTIONS / (seen.took.as_secs_f64() * 1e6))
}

/// The fastest of a few rounds, since what else runs on the host only adds.
fn exit_us(lab: &mut Lab, ring: Ring) -> Result<f64, Error> {
    const ROUNDS: u32 = 3;
    lab.load(exit(), ring, 0)?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let begin = thread_time();
        for _ in 0..EXITS / ROUNDS {
            // Without a limit of its own: the loop cannot but exit.
            lab.guest.vcpu.run()?;
        }
        best = best.min((thread_time() - begin).as_secs_f64() * 1e6 / f64::from(EXITS / ROUNDS));
    }
    Ok(best)
}
