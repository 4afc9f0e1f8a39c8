//! Takes work out of the start that has no use in a VM, where leaving a whole function out would take
//! too much: loops over tables, and calls within functions that are needed.

use iced_x86::{Code, Register};

use super::planner::{Planner, Reason, is_call};
use crate::asm::{Asm, near_branch};
use crate::bytes::low_half;
use crate::error::PlanError;

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    builtin_parameters_in_sysfs(planner)?;
    command_line_of_each_level(planner)?;
    static_calls_by_trampoline(planner)?;
    paravirtual_calls(planner)?;
    spin_unlock(planner)?;
    parameters(planner)?;
    behind_memory(planner)?;
    names_of_owners(planner)?;
    random_numbers(planner)?;
    changes_of_code(planner)
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
        let loads = planner.insns(FUNCTION, |insn| {
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
        new[at..].copy_from_slice(&low_half(stop_addr));
        let why = "no files in /sys/module for what is built in";
        planner.replace(load.ip(), old, &new, Reason::fast_boot(why))?;
    }
    Ok(())
}

/// Before each of the eight levels of initialisation the kernel compares every parameter of its
/// command line with every parameter that is built in. The few that belong to a level (declared with
/// `core_param_cb` and the like) are not seen then.
fn command_line_of_each_level(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "the command line is not parsed again for each level of initialisation";
    planner.take_out_calls("kernel_init_freeable", "parse_args", Reason::fast_boot(why))
}

/// Indirect calls through `pv_ops` work as they are; the kernel would make some four thousand of them
/// direct.
fn paravirtual_calls(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "calls through pv_ops stay indirect";
    planner.take_out_calls(
        "alternative_instructions",
        "apply_paravirt",
        Reason::fast_boot(why),
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
    planner.replace(addr, &old, &new, Reason::fast_boot(why))
}

/// `arch_static_call_transform(site, trampoline, function, tail)` changes a trampoline, or one of the
/// thousands of sites that call it. A site that is left alone calls the trampoline, which is always
/// right. A stub in place of the function's `call __fentry__` returns if there is a site.
fn static_calls_by_trampoline(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "static calls go through their trampolines";
    planner.in_front(
        "arch_static_call_transform",
        Reason::fast_boot(why),
        |stub, rest| {
            let mut asm = Asm::at(stub);
            let has_site = asm.forward();
            asm.raw(&[0x48, 0x85, 0xff]) // test rdi, rdi: the site
                .short(0x75, has_site) // jnz
                .jmp(rest)
                .label(has_site)
                .raw(&[0xc3]); // ret
            asm.finish()
        },
    )
}

/// The kernel looks each parameter of its command line up in its tables of names, and measures
/// the length of a name before it compares. Here the first characters are compared before, in a stub each.
fn parameters(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason::fast_boot(
        "names of parameters are compared only if they begin with the same character",
    );
    let by_rsi = [0x3a, 0x06]; // cmp al, [rsi]
    // parameq(a, b): whether they are the same.
    planner.in_front("parameq", reason, |stub, rest| {
        unless_first_differs(stub, &by_rsi, 0, rest)
    })?;
    lengths_of_names(planner, reason)?;
    // strcmp(parameter, "console") for each entry that is not early: not zero if they differ.
    if let Some(strcmp) = planner.symbol("strcmp") {
        let stub = planner.stub(reason, |stub| {
            unless_first_differs(stub, &by_rsi, 1, strcmp)
        })?;
        let Some(stub) = stub else { return Ok(()) };
        planner.redirect_calls("do_early_param", "strcmp", stub, reason)?;
    }
    Ok(())
}

/// `unknown_bootoption` compares as many characters as the name in the table has: one is enough where the
/// first differs. The parameter is in RBX.
fn lengths_of_names(planner: &mut Planner, reason: Reason) -> Result<(), PlanError> {
    const FUNCTION: &str = "unknown_bootoption";
    /// Under which name a kernel with other registers is counted.
    const KIND: &str = "lengths of names of parameters";
    let symbols = planner.symbol("strlen").zip(planner.symbol("parameqn"));
    let Some((strlen, parameqn)) = symbols else {
        return Ok(());
    };
    let insns = planner.insns(FUNCTION, |_| true);
    // call strlen; mov rsi, …; mov rdi, rbx; movsxd rdx, eax; mov …, rdx; call parameqn
    let found = insns.windows(6).find(|window| {
        is_call(&window[0], strlen)
            && is_call(&window[5], parameqn)
            && window.iter().any(|insn| {
                insn.op0_register() == Register::RDI && insn.op1_register() == Register::RBX
            })
    });
    let Some(found) = found else {
        planner.leave_site(KIND);
        return Ok(());
    };
    let by_rbx = [0x3a, 0x03]; // cmp al, [rbx]
    let stub = planner.stub(reason, |stub| {
        unless_first_differs(stub, &by_rbx, 1, strlen)
    })?;
    let Some(stub) = stub else { return Ok(()) };
    let call = found[0].ip();
    let old = near_branch(0xe8, call, strlen);
    planner.replace_site(KIND, call, &old, &near_branch(0xe8, call, stub), reason)
}

/// A stub that goes on at `target` if the character at RDI equals the one that `compare` (`cmp al, …`) names,
/// and returns `answer` if not.
fn unless_first_differs(stub: u64, compare: &[u8], answer: u32, target: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let same = asm.forward();
    asm.raw(&[0x8a, 0x07]) // mov al, [rdi]
        .raw(compare) // cmp al, …
        .short(0x74, same) // jz
        .raw(&[0xb8])
        .raw(&answer.to_le_bytes()) // mov eax, answer
        .raw(&[0xc3]) // ret
        .label(same)
        .jmp(target);
    asm.finish()
}

/// Where memory is mapped, the rest of each page table, behind the end of memory, would be cleared where
/// nothing is in the memory map: a new table is clear.
fn behind_memory(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason::fast_boot("page tables behind the end of memory are clear already");
    for function in ["phys_pud_init", "phys_pmd_init", "phys_pte_init"] {
        planner.answer_calls(function, "e820__mapped_any", 1, reason)?;
    }
    Ok(())
}

/// A module's symbol is resolved with the name of its owner, which is copied, and padded to 56 bytes.
fn names_of_owners(planner: &mut Planner) -> Result<(), PlanError> {
    let Some(strcpy) = planner.symbol("strcpy") else {
        return Ok(());
    };
    let reason =
        Reason::fast_boot("names of modules are not padded; they are shorter than their place");
    planner.redirect_calls("resolve_symbol", "strncpy", strcpy, reason)
}

/// The VMM gives the kernel a seed of random numbers at start. Two things are done with them then that cost
/// more than they give: each step of initialisation adds when it comes, and a table of counters
/// is filled, which is as large here as on a machine with little memory.
fn random_numbers(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "steps of initialisation add no randomness: the seed is the VMM's";
    planner.take_out_calls(
        "do_one_initcall",
        "add_device_randomness",
        Reason::fast_boot(why),
    )?;
    // push 256 << 10 becomes push 2 << 10, the least that the kernel makes.
    let (old, new) = ([0x68, 0, 0, 4, 0], [0x68, 0, 8, 0, 0]);
    let why = "2048 counters for the identifications of IP packets";
    planner.replace_insn("ip_rt_init", &old, &new, Reason::fast_boot(why))
}

/// Copies RDX bytes, a few, from RSI to RDI.
const COPY: &[u8] = &[
    0x9c, // pushfq
    0xfa, // cli
    0x89, 0xd1, // mov ecx, edx
    0xf3, 0xa4, // rep movsb
    0x9d, // popfq
    0xc3, // ret
];

/// `text_poke_early(to, from, length)` asks whether the code is a module's, and has the processor forget what it
/// has read ahead: an emulator reads nothing ahead of an interrupt.
fn changes_of_code(planner: &mut Planner) -> Result<(), PlanError> {
    let why = "code is changed at start by a copy with interrupts off";
    planner.in_front("text_poke_early", Reason::fast_boot(why), |_, _| {
        COPY.to_vec()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let code = unless_first_differs(STUB, &[0x3a, 0x06], 1, 0xffff_ffff_8120_0000);
        assert_eq!(
            listing(&code, STUB),
            "mov al,[rdi]\n\
             cmp al,[rsi]\n\
             je short 0FFFFFFFF8101000Ch\n\
             mov eax,1\n\
             ret\n\
             jmp 0FFFFFFFF81200000h\n"
        );
    }
}
