//! The loads that a shell in the guest runs.

/// A load.
pub(super) struct Load {
    /// Name of the result.
    pub(super) name: &'static str,
    /// Name of what it is compared with.
    pub(super) baseline: &'static str,
    /// How much of what `unit` counts is done.
    pub(super) work: f64,
    pub(super) unit: &'static str,
    /// Done before, not measured.
    pub(super) before: &'static str,
    /// Measured.
    pub(super) command: &'static str,
}

/// All of them, in their order.
pub(super) const LOADS: [Load; 3] = [
    // What a compiler does to a machine: processes, pipes, temporary files, and much to compute.
    Load {
        name: "compile",
        baseline: "compile_unprotected",
        work: 1.0,
        unit: "1/s",
        before: "cd /tmp",
        command: "seq 1 1000 | awk '{ print ($1 * 7919) % 1009, \"line\", $1 }' > text; \
                  sort -n text > sorted; gzip -9 -c sorted > packed; gunzip -c packed | md5sum; \
                  rm -f text sorted packed",
    },
    Load {
        name: "disk_write",
        baseline: "disk_write_unprotected",
        work: 2.0,
        unit: "MiB/s",
        before: "rm -f /data/load; sync",
        command: "dd if=/dev/zero of=/data/load bs=64k count=32 conv=fsync",
    },
    Load {
        name: "disk_read",
        baseline: "disk_read_unprotected",
        work: 2.0,
        unit: "MiB/s",
        before: "sync; echo 3 > /proc/sys/vm/drop_caches",
        command: "dd if=/data/load of=/dev/null bs=64k",
    },
];
