//! What happened, for a person: time, host, what it was, the state after it.
//!
//! Off unless asked for; then every line is kept. The same seed gives the same bytes.

use std::fmt::{Arguments, Write};

/// Lines kept at most; older ones are counted and dropped.
pub const MAX_LINES: usize = 2_000_000;

/// The trace of a run.
#[derive(Debug, Default)]
pub struct Trace {
    /// Whether lines are kept.
    pub on: bool,
    text: String,
    lines: usize,
}

impl Trace {
    /// A trace that keeps lines, or none.
    #[must_use]
    pub fn new(on: bool) -> Self {
        Self {
            on,
            ..Self::default()
        }
    }

    /// One line.
    pub fn line(&mut self, now: u64, host: Option<usize>, state: &str, what: Arguments<'_>) {
        if !self.on || self.lines >= MAX_LINES {
            return;
        }
        self.lines += 1;
        let (ms, us) = (now / 1_000_000, now / 1_000 % 1_000);
        let place = host.map_or_else(|| "world".to_owned(), |host| format!("host{host}"));
        let done = writeln!(
            self.text,
            "{ms:>6}.{us:03} ms  {place:<5}  {state:<12}  {what}"
        );
        debug_assert!(done.is_ok(), "writing to a string does not fail");
    }

    /// All lines.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}
