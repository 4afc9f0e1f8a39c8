//! Loads a Linux kernel and rewrites in it what is not deterministic.
