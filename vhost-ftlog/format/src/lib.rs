//! Frames and entries of the log: bytes only, no I/O.
