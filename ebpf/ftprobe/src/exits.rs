//! Exits of the virtual machines on this host, by reason, from the tracepoints of KVM.

use aya::maps::{MapData, PerCpuHashMap};
use aya::{Ebpf, EbpfLoader};
use ebpf_events::exits::{EXIT_KEY_BYTES, ExitKey, PORT_KEY_BYTES, PortKey};

use crate::causes::with_causes;
use crate::kernel::pid_namespace;
use crate::objects::{self, ObjectError, attach_tracepoint};

/// Attached probes; they end with this value.
pub struct Exits {
    exits: PerCpuHashMap<MapData, [u8; EXIT_KEY_BYTES], u64>,
    ports: PerCpuHashMap<MapData, [u8; PORT_KEY_BYTES], u64>,
    _object: Ebpf,
}

impl Exits {
    /// Counts from now on.
    ///
    /// # Errors
    /// [`ObjectError`]: no rights (CAP_PERFMON), or a kernel without KVM or type information of it.
    pub fn start() -> Result<Self, ObjectError> {
        let (device, inode) =
            pid_namespace().map_err(|_| ObjectError::Missing("PID namespace to count in"))?;
        let mut object = EbpfLoader::new()
            .override_global("pid_namespace_device", &device, true)
            .override_global("pid_namespace_inode", &inode, true)
            .load(objects::EXITS)?;
        attach_tracepoint(&mut object, "userspace_exit", "kvm_userspace_exit")?;
        if let Err(error) = attach_tracepoint(&mut object, "port_access", "kvm_pio") {
            tracing::warn!(error = with_causes(&error), "without accesses to ports");
        }
        Ok(Self {
            exits: PerCpuHashMap::try_from(objects::map(&mut object, "exits")?)?,
            ports: PerCpuHashMap::try_from(objects::map(&mut object, "ports")?)?,
            _object: object,
        })
    }

    /// Exits so far, in the order of their keys.
    pub fn exits(&self) -> Vec<(ExitKey, u64)> {
        sums(&self.exits, ExitKey::from_bytes)
    }

    /// Accesses to ports so far, in the order of their keys.
    pub fn ports(&self) -> Vec<(PortKey, u64)> {
        sums(&self.ports, PortKey::from_bytes)
    }
}

fn sums<const N: usize, K: Ord>(
    map: &PerCpuHashMap<MapData, [u8; N], u64>,
    key: fn(&[u8; N]) -> K,
) -> Vec<(K, u64)> {
    let mut counts: Vec<(K, u64)> = map
        .iter()
        .filter_map(Result::ok)
        .map(|(bytes, counts)| (key(&bytes), counts.iter().sum()))
        .collect();
    counts.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    counts
}
