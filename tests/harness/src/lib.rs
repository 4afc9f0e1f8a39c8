//! Test hosts: network namespaces, processes and what they leave behind.
