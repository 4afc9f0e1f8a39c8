//! Where the heartbeat programs are attached.

use aya::programs::tc::{SchedClassifier, TcAttachOptions, TcAttachType};
use aya::programs::{BtfTracePoint, LinkOrder, Program, ProgramError, Xdp, XdpMode};
use aya::{Btf, Ebpf};
use heartbeat::protocol::ResponderKind;

use super::{KernelConfig, KernelError};
use crate::causes::with_causes;

/// Attaches the responder in the first way that works; also returns why the ones before did not.
pub(super) fn attach_responder(
    object: &mut Ebpf,
    config: &KernelConfig,
) -> Result<(ResponderKind, String), KernelError> {
    let mut reasons: Vec<String> = [config.left_out.clone()]
        .into_iter()
        .filter(|r| !r.is_empty())
        .collect();
    for way in &config.ways {
        let attached = match way {
            ResponderKind::XdpNative => attach_xdp(object, &config.interface, XdpMode::Driver),
            ResponderKind::XdpGeneric => attach_xdp(object, &config.interface, XdpMode::Skb),
            ResponderKind::Tcx => attach_tcx(
                object,
                "heartbeat_ingress",
                &config.interface,
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

fn attach_xdp(object: &mut Ebpf, interface: &str, mode: XdpMode) -> Result<(), KernelError> {
    const NAME: &str = "heartbeat_xdp";
    let program: &mut Xdp = program(object, NAME)?;
    load_once(NAME, program, Xdp::load)?;
    program.attach(interface, mode).map_err(failed(NAME))?;
    Ok(())
}

fn attach_tcx(
    object: &mut Ebpf,
    name: &'static str,
    interface: &str,
    direction: TcAttachType,
) -> Result<(), KernelError> {
    let program: &mut SchedClassifier = program(object, name)?;
    load_once(name, program, SchedClassifier::load)?;
    // Before others: they may want to drop or redirect what they do not know.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    program
        .attach_with_options(interface, direction, order)
        .map_err(failed(name))?;
    Ok(())
}

/// Stamps the departure of requests.
pub(super) fn attach_egress(object: &mut Ebpf, config: &KernelConfig) -> Result<(), KernelError> {
    attach_tcx(
        object,
        "heartbeat_egress",
        &config.interface,
        TcAttachType::Egress,
    )
}

/// Watches for exits.
pub(super) fn attach_exit(object: &mut Ebpf) -> Result<(), KernelError> {
    const NAME: &str = "process_exit";
    let btf = Btf::from_sys_fs().map_err(|error| KernelError::Program {
        program: NAME,
        source: error.into(),
    })?;
    let program: &mut BtfTracePoint = program(object, NAME)?;
    program
        .load("sched_process_exit", &btf)
        .map_err(failed(NAME))?;
    program.attach().map_err(failed(NAME))?;
    Ok(())
}

fn program<'a, P>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    object
        .program_mut(name)
        .ok_or(KernelError::Missing(name))?
        .try_into()
        .map_err(failed(name))
}

fn load_once<P>(
    name: &'static str,
    program: &mut P,
    load: fn(&mut P) -> Result<(), ProgramError>,
) -> Result<(), KernelError> {
    match load(program) {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(failed(name)(error)),
    }
}

const fn failed(program: &'static str) -> impl Fn(ProgramError) -> KernelError {
    move |source| KernelError::Program { program, source }
}
