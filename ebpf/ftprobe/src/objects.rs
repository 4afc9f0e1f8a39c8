//! The compiled eBPF objects, as build.rs made them, and what is done with any of them.

use std::sync::OnceLock;

use aya::maps::{Map, MapError};
use aya::programs::tc::{SchedClassifier, TcAttachOptions, TcAttachType};
use aya::programs::{BtfTracePoint, LinkOrder, Program, ProgramError};
use aya::{Btf, Ebpf, EbpfError, include_bytes_aligned};
use thiserror::Error;

/// Heartbeats and the watch for exits (`ebpf/probes/heartbeat.bpf.c`).
pub(crate) const HEARTBEAT: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/heartbeat.bpf.o"));
/// The logging channel on its interface (`ebpf/probes/traffic.bpf.c`).
pub(crate) const TRAFFIC: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/traffic.bpf.o"));
/// The stations of a log entry (`ebpf/probes/stations.bpf.c`).
pub(crate) const STATIONS: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/stations.bpf.o"));
/// Exits of virtual machines (`ebpf/probes/exits.bpf.c`).
pub(crate) const EXITS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/exits.bpf.o"));

/// Why an object, or a program of it, cannot be used.
#[derive(Debug, Error)]
pub enum ObjectError {
    /// The object could not be loaded: no rights, no BTF, an old kernel.
    #[error("eBPF: {0}")]
    Load(#[from] EbpfError),
    /// A program was refused by the verifier or could not be attached.
    #[error("eBPF program {program}: {source}")]
    Program {
        /// Which one.
        program: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
    /// A map is not as expected.
    #[error("eBPF map: {0}")]
    Map(#[from] MapError),
    /// The object is not the one this was written for.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
}

/// Type information of the running kernel; `None` if it has none. Read once: it is large.
fn kernel_btf() -> Option<&'static Btf> {
    static BTF: OnceLock<Option<Btf>> = OnceLock::new();
    BTF.get_or_init(|| Btf::from_sys_fs().ok()).as_ref()
}

/// Takes a map out of an object.
pub(crate) fn map(object: &mut Ebpf, name: &'static str) -> Result<Map, ObjectError> {
    object.take_map(name).ok_or(ObjectError::Missing(name))
}

/// Finds a program of the expected kind.
pub(crate) fn program<'a, P>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut P, ObjectError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    object
        .program_mut(name)
        .ok_or(ObjectError::Missing(name))?
        .try_into()
        .map_err(failed(name))
}

/// Loads a program that may have been loaded before, for another way of attaching it.
pub(crate) fn load_once<P>(
    name: &'static str,
    program: &mut P,
    load: fn(&mut P) -> Result<(), ProgramError>,
) -> Result<(), ObjectError> {
    match load(program) {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(failed(name)(error)),
    }
}

/// Puts a program on an interface's TCX hook, before others: they may drop or redirect what they do
/// not know.
pub(crate) fn attach_tcx(
    object: &mut Ebpf,
    name: &'static str,
    interface: &str,
    direction: TcAttachType,
) -> Result<(), ObjectError> {
    let program: &mut SchedClassifier = program(object, name)?;
    load_once(name, program, SchedClassifier::load)?;
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    program
        .attach_with_options(interface, direction, order)
        .map_err(failed(name))?;
    Ok(())
}

/// Puts a program on a tracepoint of the kernel, by its BTF. Needs CAP_PERFMON.
pub(crate) fn attach_tracepoint(
    object: &mut Ebpf,
    name: &'static str,
    tracepoint: &str,
) -> Result<(), ObjectError> {
    let btf = kernel_btf().ok_or(ObjectError::Missing("type information of this kernel"))?;
    let program: &mut BtfTracePoint = program(object, name)?;
    program.load(tracepoint, btf).map_err(failed(name))?;
    program.attach().map_err(failed(name))?;
    Ok(())
}

pub(crate) const fn failed(program: &'static str) -> impl Fn(ProgramError) -> ObjectError {
    move |source| ObjectError::Program { program, source }
}
