//! Saved state: a versioned container of sections and a page stream.
