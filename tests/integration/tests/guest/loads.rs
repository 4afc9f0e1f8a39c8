//! Every load is recorded while the vCPU is kicked at random moments, and replayed on each CPU and with guest
//! memory taken away from the host side now and then. The loads are short here; the variables that the
//! tests name make them long.

use std::process::Command;

use integration::{GUEST_ADDRESS, Vm, amount};

use crate::scene::{Scene, replay_everywhere};

/// Records while `load` runs, and replays.
fn recorded_and_replayed(test: &str, load: impl FnOnce(&Scene, &mut Vm)) -> Option<u64> {
    let scene = Scene::new(test)?;
    let recording = scene.path("recording");
    let mut vm = scene.record(&recording, &["--disturb"]);
    load(&scene, &mut vm);
    vm.stop();
    let report = replay_everywhere(&recording);
    eprintln!("{test}: {report}");
    report["exits"].as_u64()
}

#[test]
fn a_mix_of_processes_replays_identically() {
    let rounds = amount("POLLUX_MIX_ROUNDS", 1);
    let exits = recorded_and_replayed("a_mix_of_processes_replays_identically", |_, vm| {
        let load = format!("workload {rounds}; echo mixed-$((1+1))");
        vm.ask(&load, "mixed-2");
    });
    let least = amount("POLLUX_MIX_EXITS", 2_000);
    assert!(exits.is_none_or(|exits| exits >= least), "{exits:?} exits");
}

#[test]
fn redis_benchmark_over_the_network_replays_identically() {
    let requests = amount("POLLUX_REDIS_REQUESTS", 100).to_string();
    let test = "redis_benchmark_over_the_network_replays_identically";
    recorded_and_replayed(test, |scene, _| {
        let mut benchmark = Command::new("redis-benchmark");
        benchmark.args(["-h", &GUEST_ADDRESS.to_string()]).args([
            "-n",
            &requests,
            "-c",
            "4",
            "-t",
            "set,get,incr",
            "-q",
        ]);
        let output = scene.site.output(&mut benchmark);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        for kind in ["SET", "GET", "INCR"] {
            assert!(said.contains(&format!("{kind}: ")), "{said}");
        }
    });
}

#[test]
fn disk_writes_and_reads_with_sync_replay_identically() {
    let pages = amount("POLLUX_DISK_PAGES", 64);
    let test = "disk_writes_and_reads_with_sync_replay_identically";
    recorded_and_replayed(test, |_, vm| {
        let write = format!("dd if=/bin/busybox of=/data/a bs=4k count={pages} conv=fsync");
        vm.ask(&format!("{write}; echo wrote-$((1+2))"), "wrote-3");
        vm.ask(
            "md5sum /data/a > /tmp/before; sync; echo 3 > /proc/sys/vm/drop_caches",
            "#",
        );
        vm.ask("md5sum -c /tmp/before && echo same-$((2+2))", "same-4");
        vm.ask(
            "cp /data/a /data/b && rm /data/a && sync && echo moved-$((2+3))",
            "moved-5",
        );
    });
}

#[test]
fn a_busy_loop_replays_identically() {
    let millions = amount("POLLUX_BUSY_MILLIONS", 100);
    recorded_and_replayed("a_busy_loop_replays_identically", |_, vm| {
        let load = format!("probe busy {millions}; echo busy-$((3+3))");
        vm.ask(&load, "busy-6");
    });
}

#[test]
fn programs_that_read_time_stamp_and_cpuid_replay_identically() {
    let times = amount("POLLUX_RDTSC_TIMES", 200);
    let test = "programs_that_read_time_stamp_and_cpuid_replay_identically";
    recorded_and_replayed(test, |_, vm| {
        vm.ask(&format!("probe rdtsc {times}; echo tsc-$((3+4))"), "tsc-7");
        vm.ask(
            "probe cpuid 0; probe cpuid 1; probe cpuid 7; echo id-$((4+4))",
            "id-8",
        );
    });
}
