//! A test host: a network namespace of its own, and the CPU that its processes keep to.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;

use rustix::thread::{
    CpuSet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space, sched_setaffinity,
};

use crate::process::Process;
use crate::{HarnessError, system};

/// A network namespace without a name, held by a descriptor: it ends with the last clone, process or
/// interface of it. Its loopback interface is up.
#[derive(Debug, Clone)]
pub struct Host {
    pub(crate) namespace: Arc<File>,
    cpu: Option<usize>,
}

impl Host {
    /// A host that is connected to nothing.
    ///
    /// # Errors
    /// No right to make network namespaces.
    pub fn new() -> Result<Self, HarnessError> {
        let made = in_thread(|| -> Result<Arc<File>, HarnessError> {
            unshare_network()?;
            let namespace =
                File::open("/proc/thread-self/ns/net").map_err(|source| HarnessError::System {
                    what: "opening a network namespace",
                    source,
                })?;
            Ok(Arc::new(namespace))
        });
        let host = Self {
            namespace: made?,
            cpu: None,
        };
        host.command("ip", &["link", "set", "lo", "up"])?;
        Ok(host)
    }

    /// The same host, with everything that is run on it kept to one CPU.
    #[must_use]
    pub fn on_cpu(&self, cpu: usize) -> Self {
        Self {
            namespace: Arc::clone(&self.namespace),
            cpu: Some(cpu),
        }
    }

    /// Runs a closure on this host, in a thread of its own. Sockets made and processes started there
    /// belong to the host for good.
    ///
    /// # Panics
    /// If the closure does, or the thread cannot enter the host.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            self.enter()
                .expect("a namespace that is held open can be entered");
            job()
        })
    }

    /// Moves the calling thread to this host for good.
    ///
    /// # Errors
    /// No right to, or no such CPU.
    pub fn enter(&self) -> Result<(), HarnessError> {
        move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(system("entering a network namespace"))?;
        if let Some(cpu) = self.cpu {
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set).map_err(system("keeping to a CPU"))?;
        }
        Ok(())
    }

    /// Starts a process on this host.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Process, HarnessError> {
        self.run(|| Process::spawn(command))
    }

    /// Runs a command on this host to its end.
    ///
    /// # Errors
    /// It cannot be started, or fails; then with what it printed.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Result<String, HarnessError> {
        let line = || format!("{program} {}", arguments.join(" "));
        let output = self.run(|| Command::new(program).args(arguments).output());
        let output = output.map_err(|error| HarnessError::Command {
            command: line(),
            said: error.to_string(),
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(HarnessError::Command {
            command: line(),
            said,
        })
    }

    /// A path by which other processes can name this namespace, as long as this value lives.
    pub fn namespace_path(&self) -> String {
        format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.namespace.as_raw_fd()
        )
    }
}

#[allow(unsafe_code)] // the safe wrapper is deprecated, because some flags are not sound
fn unshare_network() -> Result<(), HarnessError> {
    // SAFETY: NEWNET leaves the descriptor table shared, which is what could break I/O safety.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(system("making a network namespace"))
}

fn in_thread<T: Send>(job: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(job).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
