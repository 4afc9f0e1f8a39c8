//! Test hosts: network namespaces, processes and what they leave behind.
//!
//! A [`Host`] is a network namespace without a name: it ends with the test, however that ends. Hosts
//! are joined by [`Link`]s or a [`Switch`]; a [`Process`] is killed and reaped when it goes out of scope. Tests that
//! need root call [`privileges::root`] first.

mod bridge;
mod host;
mod interface;
mod link;
mod population;
pub mod privileges;
mod process;
mod switch;
mod wait;

pub use host::Host;
pub use link::{End, Link};
pub use process::{Process, Stream};
pub use switch::{Port, Switch};
pub use wait::{PATIENCE, wait_for, wait_until};

/// What went wrong in setting up a test.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A system call.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A command that sets something up.
    #[error("{command}: {said}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        said: String,
    },
    /// A state that was waited for and did not come.
    #[error("waited {seconds} s for {what}")]
    Patience {
        /// The state.
        what: String,
        /// How long.
        seconds: u64,
    },
}

pub(crate) fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> HarnessError {
    move |errno| HarnessError::System {
        what,
        source: errno.into(),
    }
}
