//! Saved state as a stream, and the process that writes it while the VM runs on: what a snapshot and a state
//! transfer have in common.
//!
//! A stream is a header, then records, then an end record. A record is a **section** (one component's
//! state under a tag, with the schema number of that component) or a **run of pages** of guest memory.
//! Pages that are all zero are left out: the reader starts from zeroed memory. Every record is
//! bounded before it is allocated and checked against its CRC32C before it is believed; a stream
//! without its end record is an error, so a cut file never passes for a whole one.
//!
//! This crate knows no other crate of ours: components serialise types of their own, never their
//! runtime types, and bump their schema number when those change.

pub mod fork;
mod stream;

pub use stream::{Item, Reader, Section, Writer};

use thiserror::Error;

/// Bytes of a page of guest memory.
pub const PAGE_LEN: usize = 4096;
/// The most pages in one run.
pub const MAX_RUN_PAGES: usize = 256;
/// The largest section, in bytes.
pub const MAX_SECTION_LEN: usize = 256 * 1024 * 1024;
/// The version of the container.
pub const VERSION: u16 = 1;

/// Why saved state cannot be written or read.
#[derive(Debug, Error)]
pub enum Error {
    /// The stream itself failed.
    #[error("saved state: {0}")]
    Io(#[from] std::io::Error),
    /// Not saved state at all.
    #[error("not a Pollux saved state (bad magic)")]
    Magic,
    /// Written by a version that this build does not read.
    #[error("saved state has container version {found}; this build reads version {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The bytes are damaged.
    #[error("saved state is damaged: {0}")]
    Damaged(&'static str),
    /// The stream ends before its end record.
    #[error("saved state is cut short: it has no end record")]
    Cut,
    /// A section that the reader needs is not there.
    #[error("saved state has no section {0:?}")]
    Missing(String),
    /// A section was written under a schema that this build does not read.
    #[error("section {tag:?} has schema {found}; this build reads schema {known}")]
    Schema {
        /// The section.
        tag: String,
        /// Its schema number.
        found: u32,
        /// The one that this build reads.
        known: u32,
    },
    /// A section's bytes do not decode.
    #[error("section {tag:?} does not decode: {source}")]
    Decode {
        /// The section.
        tag: String,
        /// Why not.
        source: postcard::Error,
    },
}
