//! The fault-tolerance protocol as pure state machines.
