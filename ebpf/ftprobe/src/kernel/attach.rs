//! Where the heartbeat programs are attached.

use aya::Ebpf;
use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, Xdp, XdpMode};
use heartbeat::protocol::ResponderKind;

use super::{KernelConfig, KernelError};
use crate::causes::with_causes;
use crate::objects::{ObjectError, attach_tcx, attach_tracepoint, failed, load_once, program};
use crate::traffic::Traffic;

/// The TCX hooks of the heartbeats' interface.
pub(super) struct Hooks<'a> {
    interface: &'a str,
    /// The probes of the logging channel that stand on them already.
    log: Option<&'a mut Traffic>,
}

impl<'a> Hooks<'a> {
    pub(super) fn of(interface: &'a str, log: Option<&'a mut Traffic>) -> Self {
        Self {
            interface,
            log: log.filter(|log| log.interface() == interface),
        }
    }

    /// Puts a program on a hook: behind the probe of the log, if it is there.
    fn put(
        &mut self,
        object: &mut Ebpf,
        name: &'static str,
        direction: TcAttachType,
    ) -> Result<(), ObjectError> {
        let program: &mut SchedClassifier = program(object, name)?;
        load_once(name, program, SchedClassifier::load)?;
        let Some(log) = &mut self.log else {
            return attach_tcx(object, name, self.interface, direction);
        };
        let Err(error) = log.pass_on(program.fd().map_err(failed(name))?, direction) else {
            return Ok(());
        };
        attach_tcx(object, name, self.interface, direction)?;
        tracing::warn!(
            program = name,
            error = with_causes(&error),
            "attached beside the probe of the logging channel instead of behind it"
        );
        Ok(())
    }
}

/// Attaches the responder in the first way that works; also returns why the ones before did not.
pub(super) fn attach_responder(
    object: &mut Ebpf,
    config: &KernelConfig,
    hooks: &mut Hooks<'_>,
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
            ResponderKind::Tcx => hooks.put(object, "heartbeat_ingress", TcAttachType::Ingress),
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
pub(super) fn attach_egress(object: &mut Ebpf, hooks: &mut Hooks<'_>) -> Result<(), ObjectError> {
    hooks.put(object, "heartbeat_egress", TcAttachType::Egress)
}

/// Watches for exits.
pub(super) fn attach_exit(object: &mut Ebpf) -> Result<(), ObjectError> {
    attach_tracepoint(object, "process_exit", "sched_process_exit")
}
