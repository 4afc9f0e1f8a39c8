//! `--profile` of the commands that run a VM on its own.

use std::error::Error;
use std::path::{Path, PathBuf};

use guest_kernel::KernelImage;
use hypervisor::Kicker;

use crate::config::ConfigError;
use crate::vm::{Command, Sampler, Samples};

/// A profile that is being taken.
#[derive(Debug)]
pub struct Profiling {
    out: PathBuf,
    kernel: PathBuf,
    samples: Samples,
    _sampler: Sampler,
}

impl Profiling {
    /// Begins to take one, if `out` asks for it, of a guest with this kernel.
    ///
    /// # Errors
    /// No kernel is named: its symbols are needed. No thread.
    pub fn start(
        out: Option<&Path>,
        kernel: Option<&Path>,
        kicker: impl FnOnce() -> Kicker,
    ) -> Result<Option<Self>, Box<dyn Error>> {
        let Some(out) = out else { return Ok(None) };
        let kernel = kernel.ok_or(ConfigError::Missing("kernel"))?;
        Ok(Some(Self {
            out: out.to_owned(),
            kernel: kernel.to_owned(),
            samples: Samples::default(),
            _sampler: Sampler::start(kicker())?,
        }))
    }

    /// Has the vCPU's thread note the samples.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::Sample(self.samples.clone())
    }

    /// Ends it and writes the report.
    fn write(self) -> Result<(), Box<dyn Error>> {
        let image = KernelImage::parse(&std::fs::read(&self.kernel)?)?;
        std::fs::write(&self.out, self.samples.report(&image))?;
        Ok(())
    }
}

/// The VM has run: writes the profile, if one was taken, and tells what was emulated.
///
/// # Errors
/// A file of the profile.
pub fn end(profiling: Option<Profiling>, emulated: Option<u64>) -> Result<(), Box<dyn Error>> {
    if let Some(profiling) = profiling {
        profiling.write()?;
    }
    if let Some(count) = emulated {
        tracing::info!(count, "instructions emulated");
    }
    Ok(())
}
