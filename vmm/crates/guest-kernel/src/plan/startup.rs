//! Takes work out of the start that has no use in a VM, where leaving a whole function out would take
//! too much: loops over tables, and calls within functions that are needed.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::planner::{Planner, Reason};
use super::prelink::NOP5;
use crate::asm::Asm;
use crate::error::PlanError;
use crate::patch::PatchSet;

const fn reason(why: &'static str) -> Reason {
    Reason {
        set: PatchSet::FastBoot,
        why,
    }
}

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    builtin_parameters_in_sysfs(planner)?;
    command_line_of_each_level(planner)?;
    static_calls_by_trampoline(planner)?;
    paravirtual_calls(planner)?;
    spin_unlock(planner)
}

/// Instructions of `function` that `wanted` accepts.
fn insns(
    planner: &mut Planner,
    function: &str,
    wanted: impl Fn(&Instruction) -> bool,
) -> Vec<Instruction> {
    let Some((addr, code)) = planner.function(function) else {
        return Vec::new();
    };
    Decoder::with_ip(64, code, addr, DecoderOptions::NONE)
        .into_iter()
        .filter(|insn| wanted(insn))
        .collect()
}

/// `param_sysfs_init` makes `/sys/module` and fills it with the parameters and versions of what is
/// built in: a thousand files. Its two loops start where they end: `/sys/module` is there for the
/// modules that are loaded later.
fn builtin_parameters_in_sysfs(planner: &mut Planner) -> Result<(), PlanError> {
    const FUNCTION: &str = "param_sysfs_init";
    for (start, stop) in [
        ("__start___param", "__stop___param"),
        ("__start___modver", "__stop___modver"),
    ] {
        let found = planner.symbol(start).zip(planner.symbol(stop));
        let Some((start_addr, stop_addr)) = found else {
            continue;
        };
        let loads = insns(planner, FUNCTION, |insn| {
            insn.code() == Code::Mov_rm64_imm32
                && insn.immediate32to64().cast_unsigned() == start_addr
        });
        let [load] = &loads[..] else {
            planner.miss_table(
                FUNCTION,
                format!("{start} is loaded {} times in it", loads.len()),
            );
            continue;
        };
        let old = planner
            .image
            .read(load.ip(), load.len())
            .unwrap_or_default();
        let mut new = old.to_vec();
        let at = new.len() - 4;
        new[at..].copy_from_slice(&stop_addr.to_le_bytes()[..4]);
        let why = "no files in /sys/module for what is built in";
        planner.replace(load.ip(), old, &new, reason(why))?;
    }
    Ok(())
}

/// Before each of the eight levels of initialisation the kernel compares every parameter of its
/// command line with every parameter that is built in. The few that belong to a level (declared with
/// `core_param_cb` and the like) are not seen then.
fn command_line_of_each_level(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "the command line is not parsed again for each level of initialisation";
    take_out_calls(planner, "kernel_init_freeable", "parse_args", reason(why))
}

/// Indirect calls through `pv_ops` work as they are; the kernel would make some four thousand of them
/// direct.
fn paravirtual_calls(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "calls through pv_ops stay indirect";
    take_out_calls(
        planner,
        "alternative_instructions",
        "apply_paravirt",
        reason(why),
    )
}

/// The call through `pv_ops` for a lock that is given back keeps ten registers for a function that clears
/// one byte. The kernel puts that store in place of direct calls; here it is the callee.
fn spin_unlock(planner: &mut Planner) -> Result<(), PlanError> {
    const FUNCTION: &str = "__raw_callee_save___native_queued_spin_unlock";
    let Some(addr) = planner.symbol(FUNCTION) else {
        return Ok(());
    };
    // push rcx; push rdx; push rsi; push rdi becomes mov byte [rdi], 0; ret
    let (old, new) = ([0x51, 0x52, 0x56, 0x57], [0xc6, 0x07, 0x00, 0xc3]);
    let why = "a lock is given back by one store";
    planner.replace(addr, &old, &new, reason(why))
}

fn take_out_calls(
    planner: &mut Planner,
    function: &str,
    callee: &str,
    reason: Reason,
) -> Result<(), PlanError> {
    let Some(target) = planner.symbol(callee) else {
        return Ok(());
    };
    let calls = insns(planner, function, |insn| {
        insn.code() == Code::Call_rel32_64 && insn.near_branch64() == target
    });
    if calls.is_empty() {
        planner.miss_table(function, format!("no call of {callee} in it"));
    }
    for call in calls {
        let old = planner
            .image
            .read(call.ip(), NOP5.len())
            .unwrap_or_default();
        planner.replace(call.ip(), old, &NOP5, reason)?;
    }
    Ok(())
}

/// `arch_static_call_transform(site, trampoline, function, tail)` changes a trampoline, or one of the
/// thousands of sites that call it. A site that is left alone calls the trampoline, which is always
/// right. A stub in place of the function's `call __fentry__` returns if there is a site.
fn static_calls_by_trampoline(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "static calls go through their trampolines";
    let Some((addr, old)) = planner.fentry_site("arch_static_call_transform") else {
        return Ok(());
    };
    let after = addr + old.len() as u64;
    let stub = planner.stub(reason(why), |stub| {
        let mut asm = Asm::at(stub);
        let has_site = asm.forward();
        asm.raw(&[0x48, 0x85, 0xff]) // test rdi, rdi: the site
            .short(0x75, has_site) // jnz
            .jmp(after)
            .label(has_site)
            .raw(&[0xc3]); // ret
        asm.finish()
    })?;
    let Some(stub) = stub else { return Ok(()) };
    planner.replace(
        addr,
        &old,
        &crate::asm::near_branch(0xe9, addr, stub),
        reason(why),
    )
}
