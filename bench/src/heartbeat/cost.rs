//! What the probes cost the channel, and whether what they tell adds up.
//!
//! Rounds without probes and with all of them take turns, over the same daemons: heartbeats and traffic
//! probes on both hosts, and a recorder of the stations on each. From the recordings of the rounds with
//! sleeping waits comes the histogram of stages, beside the mean that the VMM's side has measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::{Host, Process};
use hdrhistogram::Histogram;
use rustix::process::Signal;
use serde_json::Value;

use super::channel::{Latency, Pair};
use super::world::World;
use crate::Failure;
use crate::report::{Measure, Report};

/// Rounds of each kind.
const ROUNDS: usize = 5;
/// Length of a load.
const LENGTH: Duration = Duration::from_secs(2);
/// How long a wait looks before it sleeps, in the cases that spin.
const SPIN: Duration = Duration::from_millis(5);

pub(super) fn measure(ftprobe: &Path, report: &mut Report) -> Result<(), Failure> {
    let ftlog = ftprobe.with_file_name("vhost-ftlog");
    if !ftlog.exists() {
        let build = "cargo build --release -p vhost-ftlog";
        return Err(format!("{} is missing: run {build}", ftlog.display()).into());
    }
    let world = World::new(ftprobe)?;
    let scene = Scene {
        world: &world,
        ftprobe,
    };
    let mut asleep = Pair::connect(&world, &ftlog, Duration::ZERO)?;
    let (plain, probed, stages) = scene.latencies("ack_sleep", &mut asleep)?;
    compare(report, "ack_sleep", &plain, &probed);
    add_up(report, &probed, &stages)?;
    let (plain, probed) = scene.throughputs(&mut asleep)?;
    let base = Measure::of_runs("throughput_plain", "MB/s", &plain);
    let with = Measure::of_runs("throughput_probed", "MB/s", &probed);
    report.push(with.against("throughput_plain", &base));
    report.push(base);
    drop(asleep);
    let mut spinning = Pair::connect(&world, &ftlog, SPIN)?;
    let (plain, probed, _) = scene.latencies("ack_spin", &mut spinning)?;
    compare(report, "ack_spin", &plain, &probed);
    Ok(())
}

struct Scene<'a> {
    world: &'a World,
    ftprobe: &'a Path,
}

/// Rounds without probes, rounds with, and what was recorded in the latter.
type Rounds = (Vec<Latency>, Vec<Latency>, Vec<Value>);

impl Scene<'_> {
    fn latencies(&self, name: &str, pair: &mut Pair) -> Result<Rounds, Failure> {
        let (mut plain, mut probed, mut stages) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            eprintln!("{name}: round {round} of {ROUNDS}");
            plain.push(pair.latency(self.world, LENGTH)?);
            let probes = self.probes(pair)?;
            probed.push(pair.latency(self.world, LENGTH)?);
            stages.push(probes.stages(self.ftprobe)?);
        }
        Ok((plain, probed, stages))
    }

    /// In MB/s.
    fn throughputs(&self, pair: &mut Pair) -> Result<(Vec<f64>, Vec<f64>), Failure> {
        let (mut plain, mut probed) = (Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            eprintln!("throughput: round {round} of {ROUNDS}");
            plain.push(pair.throughput(self.world, LENGTH)? / 1e6);
            let probes = self.probes(pair)?;
            probed.push(pair.throughput(self.world, LENGTH)? / 1e6);
            probes.stages(self.ftprobe)?;
        }
        Ok((plain, probed))
    }

    /// Everything on.
    fn probes(&self, pair: &Pair) -> Result<Probes, Failure> {
        let (a, b) = (&self.world.a, &self.world.b);
        let hosts = [
            (a, &self.world.link.a.interface, "a", pair.processes_a()),
            (b, &self.world.link.b.interface, "b", pair.processes_b()),
        ];
        let mut probes = Probes {
            recorders: Vec::new(),
            files: Vec::new(),
            _daemons: Vec::new(),
        };
        for (host, interface, name, processes) in hosts {
            let socket = self.world.socket(&format!("probe-{name}"));
            let daemon = Command::new(self.ftprobe)
                .args([
                    "run",
                    "--interface",
                    interface,
                    "--log-interface",
                    interface,
                ])
                .arg("--socket")
                .arg(&socket)
                .started(host, "ready")?;
            probes._daemons.push(daemon);
            let file = self.world.socket(&format!("{name}.stations"));
            let mut record = Command::new(self.ftprobe);
            record.arg("record").arg("--out").arg(&file);
            record.arg("--socket").arg(&socket);
            for process in processes {
                record.args(["--pid", &process.to_string()]);
            }
            probes.recorders.push(record.started(host, "listening")?);
            probes.files.push(file);
        }
        Ok(probes)
    }
}

/// A command that becomes a process of a host.
trait Started {
    fn started(&mut self, host: &Host, line: &str) -> Result<Process, Failure>;
}

impl Started for Command {
    fn started(&mut self, host: &Host, line: &str) -> Result<Process, Failure> {
        let mut process = host.spawn(self)?;
        process.wait_for_line(line)?;
        Ok(process)
    }
}

struct Probes {
    recorders: Vec<Process>,
    files: Vec<PathBuf>,
    _daemons: Vec<Process>,
}

impl Probes {
    /// Ends the recordings and has them joined.
    fn stages(mut self, ftprobe: &Path) -> Result<Value, Failure> {
        for recorder in &mut self.recorders {
            recorder.signal(Signal::TERM)?;
            let status = recorder.wait()?;
            if !status.success() {
                return Err(format!("ftprobe record: {status}").into());
            }
        }
        let output = Command::new(ftprobe)
            .args(["latency", "--json"])
            .args(&self.files)
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("ftprobe latency: {said}").into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn compare(report: &mut Report, name: &str, plain: &[Latency], probed: &[Latency]) {
    let of = |suffix: &str, rounds: &[Latency]| {
        let histograms: Vec<Histogram<u64>> = rounds.iter().map(|r| r.ns.clone()).collect();
        Measure::microseconds_of_runs(format!("{name}_{suffix}"), &histograms)
    };
    let base = of("plain", plain);
    let baseline = match name {
        "ack_sleep" => "ack_sleep_plain",
        _ => "ack_spin_plain",
    };
    report.push(of("probed", probed).against(baseline, &base));
    report.push(base);
}

/// The sum of the stages' means beside the mean that was measured from end to end.
fn add_up(report: &mut Report, probed: &[Latency], stages: &[Value]) -> Result<(), Failure> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let number = |value: &Value, name: &str| {
        value[name]
            .as_f64()
            .ok_or_else(|| format!("ftprobe latency tells no {name}"))
    };
    let sums: Result<Vec<f64>, _> = stages
        .iter()
        .map(|s| number(s, "sum_of_means_us"))
        .collect();
    let measured: Vec<f64> = probed.iter().map(|r| r.mean_ns / 1e3).collect();
    let base = Measure::value("stages_end_to_end_mean", "us", mean(&measured));
    let joined: Result<Vec<f64>, _> = stages.iter().map(|s| number(s, "joined")).collect();
    let sum = Measure::value("stages_sum_of_means", "us", mean(&sums?));
    let note = format!("{} appends joined", joined?.iter().sum::<f64>());
    report.push(sum.against("stages_end_to_end_mean", &base).noted(note));
    report.push(base);
    report.detail("stages", stages.to_vec().into());
    Ok(())
}
