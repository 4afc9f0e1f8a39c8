//! Compiles the eBPF programs of `ebpf/probes` with clang into objects that the binary carries.
//!
//! CO-RE: the objects hold what they need to fit themselves to the running kernel, so nothing of the
//! build machine's kernel goes into them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// One object for each part that must be able to fail alone.
const OBJECTS: [&str; 4] = ["heartbeat", "traffic", "stations", "exits"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let probes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../probes");
    println!("cargo::rerun-if-changed={}", probes.display());
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("Cargo sets OUT_DIR")?);
    let machine = env::var("CARGO_CFG_TARGET_ARCH").map_err(|_| "Cargo sets the target")?;
    let bpf_arch = match machine.as_str() {
        "x86_64" => "x86",
        "aarch64" => "arm64",
        other => return Err(format!("the eBPF probes know no registers of {other}")),
    };
    for object in OBJECTS {
        compile(&probes, object, &machine, bpf_arch, &out)?;
    }
    Ok(())
}

fn compile(
    probes: &Path,
    object: &str,
    machine: &str,
    bpf_arch: &str,
    out: &Path,
) -> Result<(), String> {
    let clang = env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let result = Command::new(&clang)
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-std=gnu11"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"])
        .arg(format!("-D__TARGET_ARCH_{bpf_arch}"))
        // Debian keeps the headers of the machine apart; clang for bpf does not look there by itself.
        .arg(format!("-I/usr/include/{machine}-linux-gnu"))
        .arg("-c")
        .arg(probes.join(format!("{object}.bpf.c")))
        .arg("-o")
        .arg(out.join(format!("{object}.bpf.o")))
        .output()
        .map_err(|error| {
            format!(
                "cannot run {}: {error}. The eBPF probes are compiled with clang, and need the \
                 headers of libbpf: run scripts/setup as root to install both.",
                clang.display()
            )
        })?;
    if result.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&result.stderr);
    let hint = if said.contains("bpf_helpers.h' file not found") {
        "\nThe headers of libbpf are missing: run scripts/setup as root to install them."
    } else {
        ""
    };
    Err(format!(
        "clang could not compile {object}.bpf.c:\n{said}{hint}"
    ))
}
