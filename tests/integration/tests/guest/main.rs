//! A Debian guest, recorded, replayed, saved, cut and taken live again, as a user does it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod cuts;
mod divergence;
mod loads;
mod protected;
mod refusals;
mod restart;
mod saves;
mod scene;
mod terminal;
