//! The processes of a host: all whose network namespace it is, whoever started them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::host::Host;
use crate::{HarnessError, system, wait_until};

impl Host {
    /// Ids of the processes that are on this host now. What has exited and is not reaped is on none.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<Pid>, HarnessError> {
        let entries = fs::read_dir("/proc").map_err(|source| HarnessError::System {
            what: "reading /proc",
            source,
        })?;
        let ids = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(Pid::from_raw);
        Ok(ids.filter(|pid| self.holds(*pid)).collect())
    }

    /// Sends a signal to every process on this host, whoever started it. How many got it.
    ///
    /// # Errors
    /// A process may not be signalled.
    pub fn signal_all(&self, signal: Signal) -> Result<usize, HarnessError> {
        self.signal_each(signal, |_| true)
    }

    /// Sends a signal to every process on this host that runs the program of this file name. How many got it.
    ///
    /// # Errors
    /// A process may not be signalled.
    pub fn signal_program(&self, program: &str, signal: Signal) -> Result<usize, HarnessError> {
        self.signal_each(signal, |pid| {
            let file = fs::read_link(format!("/proc/{pid}/exe"));
            file.is_ok_and(|file| file.file_name().is_some_and(|name| name == program))
        })
    }

    fn signal_each(
        &self,
        signal: Signal,
        wanted: impl Fn(Pid) -> bool,
    ) -> Result<usize, HarnessError> {
        let mut count = 0;
        for pid in self.processes()?.into_iter().filter(|pid| wanted(*pid)) {
            // The descriptor is of one process for good: looked at after it was opened, the process is
            // on this host and no other that got the same number.
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            if !self.holds(pid) {
                continue;
            }
            match pidfd_send_signal(process, signal) {
                Ok(()) => count += 1,
                Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => return Err(system("signal to a process of a host")(errno)),
            }
        }
        Ok(count)
    }

    /// Kills every process on this host with SIGKILL, and those that they may have started meanwhile.
    ///
    /// # Errors
    /// As [`Host::signal_all`].
    pub fn kill_all(&self) -> Result<(), HarnessError> {
        let mut failed = Ok(());
        wait_until("the processes of a host to end", || {
            match self.signal_all(Signal::KILL) {
                Ok(count) => count == 0,
                Err(error) => {
                    failed = Err(error);
                    true
                }
            }
        })?;
        failed
    }

    fn holds(&self, pid: Pid) -> bool {
        let path = format!("/proc/{pid}/ns/net");
        let (Ok(its), Ok(ours)) = (fs::metadata(path), self.namespace.metadata()) else {
            return false;
        };
        (its.dev(), its.ino()) == (ours.dev(), ours.ino())
    }
}
