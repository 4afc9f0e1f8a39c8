//! Waiting for states: bounded, with a word now and then to those who look on, and ended by an interrupt.

use std::time::{Duration, Instant};

use super::Interrupt;
use crate::Failure;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Between two words.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    interrupt: Interrupt,
}

impl Patience {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { interrupt }
    }

    /// Whether somebody has ended all waiting.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupt.check().is_err()
    }

    /// Looks until there is a value.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let started = Instant::now();
        let mut told = started;
        loop {
            if let Some(value) = look()? {
                return Ok(value);
            }
            self.interrupt.check()?;
            let waited = started.elapsed();
            if waited > limit {
                return Err(format!("waited {} s for {what}", limit.as_secs()).into());
            }
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                eprintln!(
                    "      ... waiting for {what}, {:.0} s",
                    waited.as_secs_f64()
                );
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Looks until it is so.
    pub(crate) fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        self.wait_for(what, limit, || Ok(look()?.then_some(())))
    }
}
