//! Tests of the programs as a user runs them.
