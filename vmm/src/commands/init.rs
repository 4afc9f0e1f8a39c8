//! `pollux init`: makes shared storage ready to decide who runs a VM.
//!
//! A person says once that this is the shared storage. No VMM does: on a host where it is not mounted the
//! empty mount point looks like new storage, and a VM would start on it beside the one that runs.

use std::process::ExitCode;

use arbiter::DirectoryArbiter;

use super::Outcome;
use crate::cli::InitOptions;
use crate::session::epochs;

/// Makes the directory of epochs. One that is there stays as it is.
///
/// # Errors
/// The directory is not there, or nothing can be written to it.
pub fn init(options: &InitOptions) -> Outcome {
    if !options.shared.is_dir() {
        let shared = options.shared.display();
        return Err(format!("{shared} is no directory: mount the shared storage first").into());
    }
    let epochs = epochs(&options.shared);
    DirectoryArbiter::create(&epochs)?;
    println!("{} is ready", epochs.display());
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_made_ready_once_and_only_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().to_owned();
        for _ in 0..2 {
            init(&InitOptions {
                shared: shared.clone(),
            })
            .unwrap();
        }
        let names: Vec<_> = std::fs::read_dir(epochs(&shared)).unwrap().collect();
        assert_eq!(names.len(), 1);
        let missing = InitOptions {
            shared: shared.join("not-mounted"),
        };
        assert!(init(&missing).unwrap_err().to_string().contains("mount"));
    }
}
