//! The logging channel: a vhost-user backend on io_uring, and its frontend.
