//! The probes of the logging channel: what its interface carries, and how long acknowledgements take.

use aya::maps::{HashMap, MapData};
use aya::programs::tc::TcAttachType;
use aya::{Ebpf, EbpfLoader};
use ebpf_events::traffic::{FLOW_BYTES, FLOW_KEY_BYTES, Flow, FlowKey};

use crate::objects::{self, ObjectError, attach_tcx};

/// Attached probes; they end with this value.
pub struct Traffic {
    flows: HashMap<MapData, [u8; FLOW_KEY_BYTES], [u8; FLOW_BYTES]>,
    _object: Ebpf,
}

impl Traffic {
    /// Watches an interface.
    ///
    /// # Errors
    /// [`ObjectError`]: no rights, or a kernel without TCX (before 6.6).
    pub fn start(interface: &str) -> Result<Self, ObjectError> {
        let mut object = EbpfLoader::new().load(objects::TRAFFIC)?;
        attach_tcx(&mut object, "log_ingress", interface, TcAttachType::Ingress)?;
        attach_tcx(&mut object, "log_egress", interface, TcAttachType::Egress)?;
        Ok(Self {
            flows: HashMap::try_from(objects::map(&mut object, "flows")?)?,
            _object: object,
        })
    }

    /// The flows as they are now, in the order of their addresses.
    pub fn flows(&self) -> Vec<(FlowKey, Flow)> {
        let mut flows: Vec<_> = self
            .flows
            .iter()
            .filter_map(Result::ok)
            .map(|(key, flow)| (FlowKey::from_bytes(&key), Flow::from_bytes(&flow)))
            .collect();
        flows.sort_unstable_by_key(|(key, _)| *key);
        flows
    }
}
