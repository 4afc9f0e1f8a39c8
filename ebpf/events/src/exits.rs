//! What is counted of virtual machines: the mirror of `ebpf/probes/exits.bpf.c`.

use std::borrow::Cow;

/// Bytes of an [`ExitKey`] in the map.
pub const EXIT_KEY_BYTES: usize = 8;
/// Bytes of a [`PortKey`] in the map.
pub const PORT_KEY_BYTES: usize = 8;

/// Exits of one process for one reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExitKey {
    /// The VMM.
    pub process: u32,
    /// `exit_reason` of linux/kvm.h, or the negative error that KVM_RUN ended with.
    pub reason: i32,
}

impl ExitKey {
    /// From the map's key.
    pub fn from_bytes(bytes: &[u8; EXIT_KEY_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Self {
            process: u32::from_ne_bytes([a, b, c, d]),
            reason: i32::from_ne_bytes([e, f, g, h]),
        }
    }

    /// Name of the reason, after linux/kvm.h.
    pub fn reason_name(&self) -> Cow<'static, str> {
        /// EINTR: a signal, or a kick.
        const INTERRUPTED: i32 = -4;
        let name = match self.reason {
            INTERRUPTED => "interrupted",
            0 => "unknown",
            1 => "exception",
            2 => "io",
            3 => "hypercall",
            4 => "debug",
            5 => "hlt",
            6 => "mmio",
            7 => "irq_window_open",
            8 => "shutdown",
            9 => "fail_entry",
            10 => "intr",
            11 => "set_tpr",
            12 => "tpr_access",
            16 => "nmi",
            17 => "internal_error",
            24 => "system_event",
            26 => "ioapic_eoi",
            27 => "hyperv",
            29 => "x86_rdmsr",
            30 => "x86_wrmsr",
            31 => "dirty_ring_full",
            33 => "x86_bus_lock",
            37 => "notify",
            39 => "memory_fault",
            error if error < 0 => return format!("error_{}", error.unsigned_abs()).into(),
            other => return format!("reason_{other}").into(),
        };
        name.into()
    }
}

/// Accesses of one process' guest to one port, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The VMM.
    pub process: u32,
    /// The port.
    pub port: u16,
    /// The guest wrote.
    pub out: bool,
}

impl PortKey {
    /// From the map's key.
    pub fn from_bytes(bytes: &[u8; PORT_KEY_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Self {
            process: u32::from_ne_bytes([a, b, c, d]),
            port: u16::from_ne_bytes([e, f]),
            out: u16::from_ne_bytes([g, h]) != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_and_named() {
        let mut bytes = [0; EXIT_KEY_BYTES];
        bytes[..4].copy_from_slice(&77_u32.to_ne_bytes());
        bytes[4..].copy_from_slice(&(-4_i32).to_ne_bytes());
        let key = ExitKey::from_bytes(&bytes);
        assert_eq!((key.process, key.reason), (77, -4));
        let name = |reason| ExitKey { process: 1, reason }.reason_name();
        assert_eq!(name(-4), "interrupted");
        assert_eq!(name(6), "mmio");
        assert_eq!(name(-14), "error_14");
        assert_eq!(name(99), "reason_99");
        bytes[4..6].copy_from_slice(&0x3f8_u16.to_ne_bytes());
        bytes[6..].copy_from_slice(&1_u16.to_ne_bytes());
        let key = PortKey::from_bytes(&bytes);
        assert_eq!((key.process, key.port, key.out), (77, 0x3f8, true));
    }
}
