//! Why an initial RAM disk cannot be read.

/// What is wrong with an initial RAM disk. Offsets are in bytes; where the archive is compressed they
/// count in what was unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither an archive nor a compressed one is where one should start.
    #[error("initial RAM disk: neither cpio nor a known compression at byte {at}: {found:02x?}")]
    Unknown {
        /// Where.
        at: usize,
        /// The first bytes there.
        found: Vec<u8>,
    },
    /// Linux knows the compression; Pollux does not.
    #[error(
        "initial RAM disk: compressed with {name}, which is not supported (use zstd, xz, gzip or none)"
    )]
    Unsupported {
        /// The compression.
        name: &'static str,
    },
    /// A compressed part does not unpack.
    #[error("initial RAM disk: cannot decompress its {format} part")]
    Decompress {
        /// The compression.
        format: &'static str,
        /// What the decompressor said.
        #[source]
        source: std::io::Error,
    },
    /// It is larger than any that makes sense.
    #[error("initial RAM disk: unpacks to more than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// An entry's header is damaged, or its end is not in the file.
    #[error("initial RAM disk: damaged cpio entry at byte {at}: {what}")]
    BadEntry {
        /// Where its header starts.
        at: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There are more entries than any archive has.
    #[error("initial RAM disk: more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
}
