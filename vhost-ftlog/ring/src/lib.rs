//! Split virtqueues for both sides, and the arena that they live in.
