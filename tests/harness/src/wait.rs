//! Waiting for a state instead of sleeping.

use std::time::{Duration, Instant};

use crate::HarnessError;

/// How long a state is waited for: far longer than any takes on a busy machine, so that running out
/// means that it never comes.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_micros(500);

/// Waits until `state` gives a value.
///
/// # Errors
/// [`HarnessError::Patience`] after [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> Result<T, HarnessError> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = state() {
            return Ok(value);
        }
        if Instant::now() > end {
            return Err(HarnessError::Patience {
                what: what.into(),
                seconds: PATIENCE.as_secs(),
            });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until `state` is true.
///
/// # Errors
/// As [`wait_for`].
pub fn wait_until(what: &str, mut state: impl FnMut() -> bool) -> Result<(), HarnessError> {
    wait_for(what, || state().then_some(()))
}
