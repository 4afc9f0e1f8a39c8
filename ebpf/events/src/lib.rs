//! Types that the eBPF programs and their readers share.
