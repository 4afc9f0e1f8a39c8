//! Whether RDTSC of ring 3 can be made to fault.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use serde::{Deserialize, Serialize};

use super::lab::Lab;
use crate::bare::{CR4_TSD, Ring};
use crate::{Error, Vcpu, guest_code};

/// What makes RDTSC of ring 3 fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TscTrap {
    /// The guest's CR4.TSD alone, as on a processor.
    ByGuest,
    /// The guest's CR4.TSD together with [`crate::Vcpu::set_trap_tsc`].
    ByHost,
    /// Nothing.
    Impossible,
}

guest_code! { fn rdtsc() { "rdtsc", "out 0x10, al" } }

const GENERAL_PROTECTION: u8 = 13;

pub(super) fn probe(lab: &mut Lab) -> Result<TscTrap, Error> {
    for (trap, verdict) in [(false, TscTrap::ByGuest), (true, TscTrap::ByHost)] {
        lab.load(rdtsc(), Ring::User, CR4_TSD)?;
        lab.guest.vcpu.set_trap_tsc(trap);
        let seen = lab.run();
        lab.guest.vcpu.set_trap_tsc(false);
        if seen.took_exception(GENERAL_PROTECTION) {
            return Ok(verdict);
        }
    }
    Ok(TscTrap::Impossible)
}
