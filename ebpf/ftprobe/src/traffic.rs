//! The probes of the logging channel: what its interface carries, and how long acknowledgements take.

use aya::maps::{HashMap, MapData, ProgramArray};
use aya::programs::ProgramFd;
use aya::programs::tc::TcAttachType;
use aya::{Ebpf, EbpfLoader};
use ebpf_events::traffic::{FLOW_BYTES, FLOW_KEY_BYTES, Flow, FlowKey};

use crate::objects::{self, ObjectError, attach_tcx};

/// `enum side` of traffic.h.
const fn side(direction: TcAttachType) -> Option<u32> {
    match direction {
        TcAttachType::Ingress => Some(0),
        TcAttachType::Egress => Some(1),
        TcAttachType::Custom(_) => None,
    }
}

/// Attached probes; they end with this value.
pub struct Traffic {
    interface: String,
    /// Programs that get what is not TCP, by [`side`].
    others: ProgramArray<MapData>,
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
            interface: interface.to_owned(),
            others: ProgramArray::try_from(objects::map(&mut object, "others")?)?,
            flows: HashMap::try_from(objects::map(&mut object, "flows")?)?,
            _object: object,
        })
    }

    /// The interface that is watched.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Hands what is not TCP on to a program, as long as both are there: its own place on the hook would be
    /// one more to enter for each segment of the log.
    pub(crate) fn pass_on(
        &mut self,
        program: &ProgramFd,
        direction: TcAttachType,
    ) -> Result<(), ObjectError> {
        let side = side(direction).ok_or(ObjectError::Missing("hook of this kind"))?;
        Ok(self.others.set(side, program, 0)?)
    }

    /// Hands nothing on any more.
    pub(crate) fn pass_nothing_on(&mut self) {
        for side in [TcAttachType::Ingress, TcAttachType::Egress]
            .into_iter()
            .filter_map(side)
        {
            // Fails where none was set.
            let _ = self.others.clear_index(&side);
        }
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
