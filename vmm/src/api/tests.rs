//! The API over its socket, with a session that does what a test says.

pub(crate) mod fake;
mod http;
mod openapi;
mod requests;
mod streams;
