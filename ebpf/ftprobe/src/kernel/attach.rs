//! Where the heartbeat programs are attached.

use aya::Ebpf;
use aya::programs::tc::TcAttachType;
use aya::programs::{Xdp, XdpMode};
use heartbeat::protocol::ResponderKind;

use super::{KernelConfig, KernelError};
use crate::causes::with_causes;
use crate::objects::{ObjectError, attach_tcx, attach_tracepoint, failed, load_once, program};

/// Attaches the responder in the first way that works; also returns why the ones before did not.
pub(super) fn attach_responder(
    object: &mut Ebpf,
    config: &KernelConfig,
) -> Result<(ResponderKind, String), KernelError> {
    let mut reasons: Vec<String> = [config.left_out.clone()]
        .into_iter()
        .filter(|r| !r.is_empty())
        .collect();
    let interface = &config.interface;
    for way in &config.ways {
        let attached = match way {
            ResponderKind::XdpNative => attach_xdp(object, interface, XdpMode::Driver),
            ResponderKind::XdpGeneric => attach_xdp(object, interface, XdpMode::Skb),
            ResponderKind::Tcx => attach_tcx(
                object,
                "heartbeat_ingress",
                interface,
                TcAttachType::Ingress,
            ),
            ResponderKind::Userspace => break,
        };
        match attached {
            Ok(()) => return Ok((*way, reasons.join("; "))),
            Err(error) => reasons.push(format!("{way:?}: {}", with_causes(&error))),
        }
    }
    Err(KernelError::Attach(reasons.join("; ")))
}

fn attach_xdp(object: &mut Ebpf, interface: &str, mode: XdpMode) -> Result<(), ObjectError> {
    const NAME: &str = "heartbeat_xdp";
    let program: &mut Xdp = program(object, NAME)?;
    load_once(NAME, program, Xdp::load)?;
    program.attach(interface, mode).map_err(failed(NAME))?;
    Ok(())
}

/// Stamps the departure of requests.
pub(super) fn attach_egress(object: &mut Ebpf, config: &KernelConfig) -> Result<(), ObjectError> {
    attach_tcx(
        object,
        "heartbeat_egress",
        &config.interface,
        TcAttachType::Egress,
    )
}

/// Watches for exits.
pub(super) fn attach_exit(object: &mut Ebpf) -> Result<(), ObjectError> {
    attach_tracepoint(object, "process_exit", "sched_process_exit")
}
