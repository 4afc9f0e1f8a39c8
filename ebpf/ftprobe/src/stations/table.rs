//! One histogram for each stage of an append's way, as a table or as JSON.

use std::fmt;

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use usdt::Station;

use super::join::{Chain, Joined};

/// The longest time that a stage can have here, ns; longer ones count as this.
const MAX_NS: u64 = 60_000_000_000;

/// From one station to the next.
struct Stage {
    from: Station,
    to: Station,
    ns: Histogram<u64>,
    sum_ns: u128,
}

impl Stage {
    fn new(from: Station, to: Station) -> Self {
        Self {
            from,
            to,
            ns: Histogram::new_with_bounds(1, MAX_NS, 3).expect("constant bounds"),
            sum_ns: 0,
        }
    }

    fn take(&mut self, chain: &Chain) {
        if let (Some(from), Some(to)) = (chain.at(self.from), chain.at(self.to)) {
            let ns = to.saturating_sub(from);
            self.ns.saturating_record(ns.max(1));
            self.sum_ns += u128::from(ns);
        }
    }

    /// Exact, where the histogram's own is to three digits.
    fn mean_ns(&self) -> f64 {
        if self.ns.is_empty() {
            return 0.0;
        }
        self.sum_ns as f64 / self.ns.len() as f64
    }

    fn name(&self) -> String {
        format!("{} to {}", self.from.name(), self.to.name())
    }
}

/// Histograms of the stages that every append passes, of all of them together, and of what outputs wait
/// for afterwards.
pub struct Stages {
    stages: Vec<Stage>,
    whole: Stage,
    released: Stage,
    output: Stage,
    ways: Vec<Way>,
    incomplete: usize,
    sample_one_in: u64,
    lost: u64,
    clock_error_ns: Option<u64>,
}

/// One append: its position, and the ns of each stage that every append passes.
struct Way {
    session: u64,
    position: u64,
    stages_ns: Vec<u64>,
}

impl Stages {
    /// Of the complete chains.
    pub fn of(joined: &Joined) -> Self {
        let every = &Station::ALL[..=Station::Seen as usize];
        let mut stages = Self {
            stages: every.windows(2).map(|w| Stage::new(w[0], w[1])).collect(),
            whole: Stage::new(Station::Appended, Station::Seen),
            released: Stage::new(Station::Seen, Station::Released),
            output: Stage::new(Station::Appended, Station::Released),
            ways: Vec::new(),
            incomplete: 0,
            sample_one_in: joined.sample_one_in,
            lost: joined.lost,
            clock_error_ns: joined.clock_error_ns,
        };
        for chain in &joined.chains {
            if !chain.is_complete() {
                // Appends that nobody showed where they began are none of those that are sampled.
                stages.incomplete += usize::from(chain.at(Station::Appended).is_some());
                continue;
            }
            let times: Vec<u64> = every.iter().filter_map(|s| chain.at(*s)).collect();
            stages.ways.push(Way {
                session: chain.session,
                position: chain.position,
                stages_ns: times.windows(2).map(|w| w[1] - w[0]).collect(),
            });
            let of_outputs = [&mut stages.released, &mut stages.output];
            let all = stages.stages.iter_mut().chain([&mut stages.whole]);
            all.chain(of_outputs).for_each(|stage| stage.take(chain));
        }
        stages
    }

    /// Appends whose whole way is known.
    pub const fn joined(&self) -> usize {
        self.ways.len()
    }

    /// The sum of the stages' means, ns.
    pub fn sum_of_means_ns(&self) -> f64 {
        self.stages.iter().map(Stage::mean_ns).sum()
    }

    fn rows(&self) -> impl Iterator<Item = &Stage> {
        let outputs = [&self.released, &self.output];
        let outputs = outputs.into_iter().filter(|stage| !stage.ns.is_empty());
        self.stages.iter().chain([&self.whole]).chain(outputs)
    }

    /// Each append by itself: session, position, and the ns of its stages in their order.
    pub fn each(&self) -> Value {
        let ways = self.ways.iter();
        ways.map(|way| json!([way.session, way.position, way.stages_ns]))
            .collect()
    }

    /// For programs: times in us.
    pub fn json(&self) -> Value {
        let us = |ns: f64| ns / 1e3;
        let rows: Vec<Value> = self
            .rows()
            .map(|stage| {
                let at = |q| us(stage.ns.value_at_quantile(q) as f64);
                json!({
                    "from": stage.from.name(), "to": stage.to.name(), "n": stage.ns.len(),
                    "mean_us": us(stage.mean_ns()), "p50_us": at(0.5), "p90_us": at(0.9),
                    "p99_us": at(0.99), "p999_us": at(0.999), "max_us": us(stage.ns.max() as f64),
                })
            })
            .collect();
        json!({
            "stages": rows, "joined": self.joined(), "incomplete": self.incomplete,
            "sample_one_in": self.sample_one_in, "lost": self.lost,
            "sum_of_means_us": us(self.sum_of_means_ns()),
            "clock_error_us": self.clock_error_ns.map(|ns| us(ns as f64)),
        })
    }
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:28} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "stage (us)", "n", "mean", "p50", "p99", "p99.9", "max"
        )?;
        for stage in self.rows() {
            let at = |q| stage.ns.value_at_quantile(q) as f64 / 1e3;
            writeln!(
                f,
                "{:28} {:>9} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1}",
                stage.name(),
                stage.ns.len(),
                stage.mean_ns() / 1e3,
                at(0.5),
                at(0.99),
                at(0.999),
                stage.ns.max() as f64 / 1e3
            )?;
        }
        writeln!(
            f,
            "{} appends of one in {} joined, {} incomplete, {} events lost; the means of the stages \
             add up to {:.1} us",
            self.joined(),
            self.sample_one_in,
            self.incomplete,
            self.lost,
            self.sum_of_means_ns() / 1e3
        )?;
        match self.clock_error_ns {
            Some(0) => Ok(()),
            Some(ns) => writeln!(
                f,
                "stages between hosts are right to {:.1} us: the error of their clocks' difference",
                ns as f64 / 1e3
            ),
            None => writeln!(
                f,
                "the hosts' clocks were not compared: stages between hosts mean nothing"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(position: u64, at: &[u64]) -> Chain {
        let mut chain = Chain {
            session: 1,
            position,
            at_ns: [None; 8],
            told_by: [None; 8],
        };
        for (to, from) in chain.at_ns.iter_mut().zip(at) {
            *to = Some(*from);
        }
        chain
    }

    #[test]
    fn means_add_up_and_incomplete_chains_are_counted_apart() {
        let joined = Joined {
            chains: vec![
                chain(0, &[0, 1_000, 3_000, 6_000, 10_000, 15_000, 21_000]),
                chain(1, &[0, 2_000, 2_000, 9_000, 9_000, 9_000, 40_000, 50_000]),
                chain(2, &[0, 1]),
            ],
            sample_one_in: 1,
            lost: 3,
            clock_error_ns: Some(1_500),
        };
        let stages = Stages::of(&joined);
        assert!((stages.sum_of_means_ns() - stages.whole.mean_ns()).abs() < 1e-6);
        assert!((stages.whole.mean_ns() - 30_500.0).abs() < 1e-6);
        let json = stages.json();
        assert_eq!(json["joined"], 2);
        assert_eq!(json["incomplete"], 1);
        let each = stages.each();
        let first = json!([1, 0, [1_000, 2_000, 3_000, 4_000, 5_000, 6_000]]);
        assert_eq!(each[0], first);
        assert_eq!(each[1][1], 1);
        assert_eq!(json["stages"][7]["to"], "released");
        assert_eq!(json["stages"][7]["n"], 1);
        let text = stages.to_string();
        assert!(text.contains("add up to 30.5 us"), "{text}");
        assert!(text.contains("right to 1.5 us"), "{text}");
    }
}
