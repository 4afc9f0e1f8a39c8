//! Execution points, recorder, replayer, deltas, digests and divergence reports.
