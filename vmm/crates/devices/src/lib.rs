//! The machine's devices as pure functions of execution point and logged inputs.
