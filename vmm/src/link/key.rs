//! The key that all hosts of one VM share.
//!
//! The same file serves the logging channel's daemon, so the bytes are never used as they are: each
//! protocol derives its own key from them under its own label.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

/// The shortest key, in bytes.
pub const MIN_KEY_LEN: usize = 16;
/// The longest key, in bytes.
pub const MAX_KEY_LEN: usize = 4096;

const LABEL: &[u8] = b"pollux control link 1";

/// Why a key is none.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file.
    #[error("key file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Too short or too long.
    #[error(
        "key file {path} has {len} bytes, a key has {MIN_KEY_LEN} to {MAX_KEY_LEN}: make one with \
         `head -c 32 /dev/urandom > {path}` and copy it to every host"
    )]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length, as far as it was read.
        len: usize,
    },
}

/// A key derived for the control link.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Reads the shared key: all bytes of the file, a newline at its end included.
    ///
    /// # Errors
    /// It cannot be read, or its length is out of bounds.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "others than the owner can use the key: chmod 600");
        }
        let mut bytes = Vec::new();
        file.take(MAX_KEY_LEN as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Self::derive(&bytes).ok_or_else(|| KeyError::Length {
            path: path.to_owned(),
            len: bytes.len(),
        })
    }

    /// The key of these shared bytes; none where their length is out of bounds.
    #[must_use]
    pub fn derive(shared: &[u8]) -> Option<Self> {
        if !(MIN_KEY_LEN..=MAX_KEY_LEN).contains(&shared.len()) {
            return None;
        }
        let mut mac =
            Hmac::<Sha256>::new_from_slice(shared).expect("HMAC takes a key of any length");
        mac.update(LABEL);
        Some(Self(mac.finalize().into_bytes().into()))
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_bounded_at_both_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (len, good) in [
            (0, false),
            (15, false),
            (16, true),
            (4096, true),
            (4097, false),
        ] {
            std::fs::write(&path, vec![7; len]).unwrap();
            match Key::read(&path) {
                Ok(key) => assert!(good && key.0 != [7; 32], "{len}"),
                Err(error) => assert!(!good && error.to_string().contains("urandom"), "{error}"),
            }
        }
        let missing = Key::read(&dir.path().join("none")).unwrap_err();
        assert!(matches!(missing, KeyError::Read { .. }));
    }

    #[test]
    fn a_key_does_not_print_itself() {
        assert_eq!(format!("{:?}", Key::derive(&[1; 16]).unwrap()), "Key(..)");
    }
}
