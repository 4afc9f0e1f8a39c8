//! What the guest does by itself, in turns: processes, disk, nothing. A loop in its shell, so that it goes on
//! wherever the VM runs.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use harness::Stream;

use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{SITES, Stage};

/// What is printed at the end of each turn, as it is printed: what is typed has it in two pieces.
const DONE: &str = "turn-done-";
/// Lines of the console that are told.
const LINES_TOLD: usize = 12;
/// One turn. It is small: where KVM emulates ring 0 a process takes a second and more, a MiB written ten, and
/// beside the client's requests and a busy CPU several times that. Its pause is at another pace than the
/// client's, so that all of the guest is idle now and then, and each part meets each other.
const LOOP: &str = "while :; do \
    seq 1 200 | sort -n | md5sum; \
    dd if=/dev/zero of=/data/load bs=16k count=8 conv=fsync; \
    echo 3 > /proc/sys/vm/drop_caches; dd if=/data/load of=/dev/null bs=16k; rm -f /data/load; \
    echo turn-do''ne-; sleep 10; done 2> /dev/null &\n";

/// See the module.
pub(super) struct Turns {
    /// Open as long as this: an end of file would end the shell.
    _keyboard: File,
    done: u64,
    /// When the last one was seen to be done, or the first began.
    last_at: Instant,
    longest: Duration,
    /// The last lines of the console, the newest first.
    console: Vec<String>,
}

impl Turns {
    /// Types the loop.
    pub(super) fn begin(mut keyboard: File) -> Result<Self, Failure> {
        keyboard.write_all(LOOP.as_bytes())?;
        Ok(Self {
            _keyboard: keyboard,
            done: 0,
            last_at: Instant::now(),
            longest: Duration::ZERO,
            console: Vec::new(),
        })
    }

    /// Counts the turns that are done. Those of a VM that has left its first host are not seen.
    pub(super) fn look(&mut self, stage: &mut Stage) {
        let [a, ..] = SITES;
        if let Some(vmm) = stage.vmm(a) {
            let printed = vmm.process().printed(Stream::Out);
            let done = printed.lines().filter(|line| line.contains(DONE)).count();
            if done as u64 > self.done {
                self.done = done as u64;
                self.longest = self.longest.max(self.last_at.elapsed());
                self.last_at = Instant::now();
            }
            let last = printed.lines().rev().take(LINES_TOLD);
            self.console = last.map(str::to_owned).collect();
        }
    }

    pub(super) fn report(&self, report: &mut Report) {
        let what = "processes, disk and a pause, by the guest itself";
        report.push(Measure::count("guest_turns", self.done).noted(what));
        let longest = self.longest.max(self.last_at.elapsed()).as_secs_f64();
        report.push(Measure::value("guest_turn_longest", "s", longest));
        report.detail("guest_console", self.console.clone().into());
        if self.done == 0 {
            report.fail("the guest did not get through one turn of its own load");
        }
    }
}

impl std::fmt::Display for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} turns of the guest", self.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_turn_is_not_seen_in_what_is_typed() {
        assert!(!LOOP.contains(DONE));
        assert!(LOOP.replace("''", "").contains(DONE));
        assert!(
            LOOP.len() < 1024,
            "a line of a terminal holds no more in one piece"
        );
    }
}
