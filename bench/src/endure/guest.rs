//! What the guest does by itself, in turns: processes, disk, nothing. A loop in its shell, so that it goes on
//! wherever the VM runs.

use std::fs::File;
use std::io::Write;

use harness::Stream;

use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{SITES, Stage};

/// What is printed at the end of each turn, as it is printed: what is typed has it in two pieces.
const DONE: &str = "turn-done-";
/// Lines of the console that are told.
const LINES_TOLD: usize = 12;
/// One turn. The idle part is as long as that of the client, at another pace, so that all of the guest is idle
/// now and then, and each part meets each other.
const LOOP: &str = "while :; do \
    seq 1 500 | awk '{ print ($1 * 7919) % 1009, \"line\", $1 }' | sort -n | gzip -9 | gunzip | md5sum; \
    dd if=/dev/zero of=/data/load bs=64k count=16 conv=fsync; \
    echo 3 > /proc/sys/vm/drop_caches; dd if=/data/load of=/dev/null bs=64k; rm -f /data/load; \
    echo turn-do''ne-; sleep 20; done 2> /dev/null &\n";

/// See the module.
pub(super) struct Turns {
    /// Open as long as this: an end of file would end the shell.
    _keyboard: File,
    done: u64,
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
            console: Vec::new(),
        })
    }

    /// Counts the turns that are done. Those of a VM that has left its first host are not seen.
    pub(super) fn look(&mut self, stage: &mut Stage) {
        let [a, ..] = SITES;
        if let Some(vmm) = stage.vmm(a) {
            let printed = vmm.process().printed(Stream::Out);
            let done = printed.lines().filter(|line| line.contains(DONE)).count();
            self.done = self.done.max(done as u64);
            let last = printed.lines().rev().take(LINES_TOLD);
            self.console = last.map(str::to_owned).collect();
        }
    }

    pub(super) fn report(&self, report: &mut Report) {
        let what = "processes, disk and a pause, by the guest itself";
        report.push(Measure::count("guest_turns", self.done).noted(what));
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
