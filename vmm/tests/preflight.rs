//! `pollux preflight` as a user runs it.

use std::process::Command;

fn preflight(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pollux"))
        .arg("preflight")
        .args(args)
        .output()
        .expect("the binary was built for this test");
    (
        output.status.code(),
        String::from_utf8(output.stdout).expect("UTF-8"),
    )
}

#[test]
fn exit_code_says_whether_anything_is_missing() {
    let (code, json) = preflight(&["--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    let findings = report["findings"].as_array().expect("a list");
    let missing = findings
        .iter()
        .filter(|finding| finding["status"] == "missing")
        .count();
    assert_eq!(code, Some(i32::from(missing > 0)), "{json}");
    assert_eq!(report["usable"], missing == 0);
    for area in [
        "KVM",
        "CPU and memory",
        "io_uring",
        "Network",
        "eBPF",
        "Clocks",
    ] {
        assert!(
            findings.iter().any(|finding| finding["area"] == area),
            "{area}"
        );
    }
    let explained = |field: &str| {
        findings
            .iter()
            .all(|finding| finding[field].as_str().is_some_and(|text| !text.is_empty()))
    };
    assert!(explained("finding") && explained("meaning"), "{json}");
    let helped = findings
        .iter()
        .all(|one| one["status"] == "ok" || one["remedy"].as_str().is_some());
    assert!(helped, "{json}");
}

#[test]
fn table_names_the_same_things() {
    let (_, json) = preflight(&["--json"]);
    let (_, table) = preflight(&[]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    for finding in report["findings"].as_array().expect("a list") {
        let name = finding["name"].as_str().expect("a name");
        assert!(table.contains(name), "{name} in {table}");
    }
}
