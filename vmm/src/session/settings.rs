//! The devices that a VM has wherever it runs.

use std::path::PathBuf;

/// Names of the host's side of the devices.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// The TAP.
    pub tap: Option<String>,
    /// The disk image on shared storage.
    pub disk: Option<PathBuf>,
    /// File for the console's output; standard input and output where there is none.
    pub console: Option<PathBuf>,
}
