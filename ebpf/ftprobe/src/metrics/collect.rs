//! The metrics one by one. Names are in base units; sessions are told as 16 hexadecimal digits, as `ftprobe
//! status` tells them.

use std::fmt;

use ebpf_events::exits::{ExitKey, PortKey};
use ebpf_events::histogram::{BUCKETS, Histogram, lower_bound_ns};
use ebpf_events::maps::Counter;
use ebpf_events::traffic::{Direction, Flow, FlowKey};
use heartbeat::clock::monotonic_ns;
use heartbeat::protocol::SessionStatus;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::channel::{Answer, Distribution};
use crate::state::State;

type Labels<'a> = Vec<(&'a str, String)>;

const NS_PER_S: f64 = 1e9;
/// Histograms of the kernel have four buckets to a power of two; one is enough here, from 1 us to 17 s.
const EXPORTED_BUCKETS: std::ops::RangeInclusive<u32> = 10..=34;

/// Writes families one after the other.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn family<S>(
        &mut self,
        (name, help): (&str, &str),
        unit: Option<&Unit>,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels<'static>, S)>,
        mut put: impl FnMut(&mut MetricEncoder<'_>, S) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut encoder = self.0.encode_descriptor(name, help, unit, kind)?;
        for (labels, sample) in samples {
            if labels.is_empty() {
                put(&mut encoder, sample)?;
            } else {
                put(&mut encoder.encode_family(&labels)?, sample)?;
            }
        }
        Ok(())
    }

    fn counters(
        &mut self,
        name: (&str, &str),
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels<'static>, u64)>,
    ) -> fmt::Result {
        self.family(name, unit, MetricType::Counter, samples, |to, value| {
            to.encode_counter::<NoLabelSet, _, u64>(&value, None)
        })
    }

    fn gauges(
        &mut self,
        name: (&str, &str),
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels<'static>, f64)>,
    ) -> fmt::Result {
        self.family(name, unit, MetricType::Gauge, samples, |to, value| {
            to.encode_gauge(&value)
        })
    }

    fn histograms(
        &mut self,
        name: (&str, &str),
        samples: impl IntoIterator<Item = (Labels<'static>, Seconds)>,
    ) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        self.family(name, unit, MetricType::Histogram, samples, |to, value| {
            to.encode_histogram::<NoLabelSet>(value.sum, value.count, &value.buckets, None)
        })
    }
}

/// A histogram as it is exported: in seconds, buckets not cumulative.
#[derive(Debug, Clone, PartialEq)]
struct Seconds {
    sum: f64,
    count: u64,
    buckets: Vec<(f64, u64)>,
}

impl Seconds {
    fn of_kernel(histogram: &Histogram) -> Self {
        let mut buckets = Vec::new();
        let mut from = 0;
        for power in EXPORTED_BUCKETS {
            let bound = 1_u64 << power;
            let upto = (0..BUCKETS).find(|b| lower_bound_ns(*b) >= bound);
            let upto = upto.unwrap_or(BUCKETS);
            let inside = histogram.buckets[from..upto].iter().sum();
            buckets.push((bound as f64 / NS_PER_S, inside));
            from = upto;
        }
        let beyond = histogram.buckets[from..].iter().sum();
        buckets.push((f64::INFINITY, beyond));
        Self::whole(histogram.sum_ns, buckets)
    }

    fn of_daemon(distribution: &Distribution) -> Self {
        let bounds = distribution.buckets.iter();
        let mut buckets: Vec<_> = bounds
            .map(|(bound, count)| (*bound as f64 / NS_PER_S, *count))
            .collect();
        buckets.push((f64::INFINITY, 0));
        Self::whole(distribution.sum, buckets)
    }

    /// The count is that of the buckets, so that it agrees with them while others count on.
    fn whole(sum_ns: u64, buckets: Vec<(f64, u64)>) -> Self {
        Self {
            sum: sum_ns as f64 / NS_PER_S,
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }
}

fn label(name: &'static str, value: impl ToString) -> (&'static str, String) {
    (name, value.to_string())
}

fn session(id: u64) -> (&'static str, String) {
    ("session", format!("{id:016x}"))
}

/// Who answers.
#[derive(Debug)]
pub(super) struct Up(pub(super) Vec<(&'static str, bool)>);

impl Collector for Up {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let samples = self.0.iter();
        let samples =
            samples.map(|(part, up)| (vec![label("part", part)], f64::from(u8::from(*up))));
        let name = ("pollux_up", "1 where a part of Pollux on this host answers");
        Families(encoder).gauges(name, None, samples)
    }
}

/// What the probes have seen.
#[derive(Debug)]
pub(super) struct ProbeMetrics {
    packets: Vec<(Counter, u64)>,
    in_kernel: bool,
    sessions: Vec<SessionStatus>,
    round_trips: Vec<(u64, Histogram)>,
    flows: Vec<(FlowKey, Flow)>,
    exits: Vec<(ExitKey, u64)>,
    ports: Vec<(PortKey, u64)>,
    now_ns: u64,
}

impl ProbeMetrics {
    pub(super) fn of(state: &State) -> Self {
        let (packets, in_kernel, sessions, round_trips) = {
            let table = state.table();
            let packets = Counter::ALL.into_iter().zip(table.counters()).collect();
            let in_kernel = table.abilities().responder.in_kernel();
            (
                packets,
                in_kernel,
                table.status().sessions,
                table.round_trips(),
            )
        };
        Self {
            packets,
            in_kernel,
            sessions,
            round_trips,
            flows: state.flows(),
            exits: state.exits(),
            ports: state.ports(),
            now_ns: monotonic_ns(),
        }
    }

    fn heartbeats(&self, to: &mut Families<'_>) -> fmt::Result {
        to.counters(
            (
                "pollux_heartbeat_packets",
                "Heartbeat packets by what became of them",
            ),
            None,
            self.packets
                .iter()
                .map(|(counter, count)| (vec![label("outcome", counter.name())], *count)),
        )?;
        to.gauges(
            (
                "pollux_heartbeat_in_kernel",
                "1 where the kernel answers heartbeats, 0 where a program must be given a CPU first",
            ),
            None,
            [(Vec::new(), f64::from(u8::from(self.in_kernel)))],
        )?;
        let each = |value: fn(&SessionStatus) -> u64| {
            let sessions = self.sessions.iter();
            sessions.map(move |s| (vec![session(s.session)], value(s)))
        };
        to.counters(
            (
                "pollux_heartbeat_answered",
                "Requests of the peer that were answered",
            ),
            None,
            each(|s| s.answered),
        )?;
        to.counters(
            (
                "pollux_heartbeat_accepted",
                "Replies of the peer that were accepted",
            ),
            None,
            each(|s| s.accepted),
        )?;
        to.gauges(
            (
                "pollux_process_dead",
                "1 once a process of a session has exited",
            ),
            None,
            self.sessions.iter().flat_map(|s| {
                [("vmm", s.vmm_dead), ("channel", s.daemon_dead)].map(|(part, dead)| {
                    let labels = vec![session(s.session), label("part", part)];
                    (labels, f64::from(u8::from(dead)))
                })
            }),
        )?;
        let clocks = || self.sessions.iter().filter_map(|s| Some((s, s.clock?)));
        to.gauges(
            (
                "pollux_peer_clock_offset",
                "The peer's monotonic clock minus this host's",
            ),
            Some(&Unit::Seconds),
            clocks().map(|(s, c)| (vec![session(s.session)], c.offset_ns as f64 / NS_PER_S)),
        )?;
        to.gauges(
            (
                "pollux_peer_clock_error",
                "How far off that difference can be",
            ),
            Some(&Unit::Seconds),
            clocks().map(|(s, c)| (vec![session(s.session)], c.error_ns as f64 / NS_PER_S)),
        )?;
        to.histograms(
            (
                "pollux_heartbeat_round_trip",
                "Round trips of heartbeats, from kernel to kernel",
            ),
            self.round_trips
                .iter()
                .map(|(id, histogram)| (vec![session(*id)], Seconds::of_kernel(histogram))),
        )
    }

    fn traffic(&self, to: &mut Families<'_>) -> fmt::Result {
        let by_direction = |value: fn(&Direction) -> u64| {
            self.flows.iter().flat_map(move |(key, flow)| {
                [("in", flow.incoming), ("out", flow.outgoing)].map(|(direction, of)| {
                    let mut labels = flow_labels(key, flow);
                    labels.push(label("direction", direction));
                    (labels, value(&of))
                })
            })
        };
        to.counters(
            (
                "pollux_log_payload",
                "Payload on the wire, what was sent again included",
            ),
            Some(&Unit::Bytes),
            by_direction(|d| d.bytes),
        )?;
        to.counters(
            ("pollux_log_packets", "Packets on the wire"),
            None,
            by_direction(|d| d.packets),
        )?;
        to.gauges(
            (
                "pollux_log_idle",
                "Time since the last payload; absent before the first",
            ),
            Some(&Unit::Seconds),
            by_direction(|d| d.last_ns)
                .filter(|(_, last)| *last > 0)
                .map(|(labels, last)| (labels, self.now_ns.saturating_sub(last) as f64 / NS_PER_S)),
        )?;
        let each = |value: fn(&Flow) -> u64| {
            let flows = self.flows.iter();
            flows.map(move |(key, flow)| (flow_labels(key, flow), value(flow)))
        };
        to.counters(
            ("pollux_log_retransmits", "Segments that TCP has sent again"),
            None,
            each(|f| f.retransmits),
        )?;
        to.counters(
            (
                "pollux_log_acknowledgements",
                "Acknowledgement records on the wire",
            ),
            None,
            each(|f| f.ack_records),
        )?;
        to.gauges(
            (
                "pollux_log_received_position",
                "Highest position that is acknowledged as received",
            ),
            None,
            each(|f| f.received).map(|(labels, at)| (labels, at as f64)),
        )?;
        to.gauges(
            (
                "pollux_log_replayed_position",
                "Highest position that is acknowledged as replayed",
            ),
            None,
            each(|f| f.replayed).map(|(labels, at)| (labels, at as f64)),
        )?;
        to.gauges(
            (
                "pollux_log_tcp_round_trip",
                "TCP's smoothed round trip; absent where not known",
            ),
            Some(&Unit::Seconds),
            each(|f| f.rtt_us)
                .filter(|(_, us)| *us > 0)
                .map(|(labels, us)| (labels, us as f64 / 1e6)),
        )?;
        to.histograms(
            (
                "pollux_log_acknowledgement_latency",
                "From a frame's passing the interface to the acknowledgement that covers it",
            ),
            self.flows.iter().map(|(key, flow)| {
                (
                    flow_labels(key, flow),
                    Seconds::of_kernel(&flow.ack_latency),
                )
            }),
        )
    }

    fn machines(&self, to: &mut Families<'_>) -> fmt::Result {
        to.counters(
            ("pollux_kvm_exits", "Exits of virtual machines to their VMM"),
            None,
            self.exits.iter().map(|(key, count)| {
                let labels = vec![
                    label("process", key.process),
                    label("reason", key.reason_name()),
                ];
                (labels, *count)
            }),
        )?;
        to.counters(
            ("pollux_kvm_port_accesses", "Accesses of guests to ports"),
            None,
            self.ports.iter().map(|(key, count)| {
                let labels = vec![
                    label("process", key.process),
                    label("port", format!("{:#x}", key.port)),
                    label("direction", if key.out { "out" } else { "in" }),
                ];
                (labels, *count)
            }),
        )
    }
}

impl Collector for ProbeMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Families(encoder);
        self.heartbeats(&mut to)?;
        self.traffic(&mut to)?;
        self.machines(&mut to)
    }
}

fn flow_labels(key: &FlowKey, flow: &Flow) -> Labels<'static> {
    vec![
        session(flow.session),
        label("local", key.local),
        label("remote", key.remote),
    ]
}

/// What the channel's daemon has counted.
#[derive(Debug)]
pub(super) struct ChannelMetrics(pub(super) Answer);

impl Collector for ChannelMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Families(encoder);
        let answer = &self.0;
        to.gauges(
            (
                "pollux_channel_queue_depth",
                "Appends that are not acknowledged",
            ),
            None,
            [(Vec::new(), answer.queue_depth as f64)],
        )?;
        to.gauges(
            (
                "pollux_channel_delivery_backlog",
                "Delivered log that is not read yet",
            ),
            Some(&Unit::Bytes),
            [(Vec::new(), answer.delivery_backlog_bytes as f64)],
        )?;
        to.counters(
            (
                "pollux_channel_events",
                "What the channel's daemon has done",
            ),
            None,
            answer
                .counters
                .iter()
                .filter(|(name, _)| !is_measure(name))
                .map(|(name, count)| (vec![label("event", name)], *count)),
        )?;
        let bytes = [("in", "bytes_in"), ("out", "bytes_out")];
        to.counters(
            ("pollux_channel_log", "Log carried, without headers"),
            Some(&Unit::Bytes),
            bytes.into_iter().filter_map(|(direction, name)| {
                let labels = vec![label("direction", direction)];
                Some((labels, *answer.counters.get(name)?))
            }),
        )?;
        to.gauges(
            (
                "pollux_channel_spun",
                "CPU time spent waiting in a loop since the start",
            ),
            Some(&Unit::Seconds),
            answer
                .counters
                .get("spin_ns")
                .map(|ns| (Vec::new(), *ns as f64 / NS_PER_S)),
        )?;
        to.histograms(
            (
                "pollux_channel_stage",
                "Parts of the way of a flushed append",
            ),
            answer
                .stages_ns
                .iter()
                .map(|(stage, of)| (vec![label("stage", stage)], Seconds::of_daemon(of))),
        )
    }
}

/// Counters that are exported under a name and unit of their own.
fn is_measure(name: &str) -> bool {
    ["bytes_in", "bytes_out", "spin_ns"].contains(&name)
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    fn encoded(collector: impl Collector) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(collector));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn buckets_of_the_kernel_are_exported_by_powers_of_two_and_none_is_lost() {
        let mut histogram = Histogram::default();
        for ns in [1, 1_023, 1_024, 70_000, 1 << 40] {
            histogram.observe(ns);
        }
        let seconds = Seconds::of_kernel(&histogram);
        assert_eq!(seconds.count, 5);
        assert_eq!(seconds.buckets[0], (1_024.0 / NS_PER_S, 2));
        assert_eq!(seconds.buckets[1], (2_048.0 / NS_PER_S, 1));
        let (bound, beyond) = *seconds.buckets.last().unwrap();
        assert!(bound.is_infinite());
        assert_eq!(beyond, 1);
    }

    #[test]
    fn the_channels_numbers_come_with_units() {
        let answer: Answer = serde_json::from_str(
            r#"{"queue_depth":3,"counters":{"frames_out":5,"bytes_out":700,"spin_ns":2000000000},
                "stages_ns":{"sent":{"n":2,"sum":3000,"buckets":[[1000,1],[2000,1]]}}}"#,
        )
        .unwrap();
        let text = encoded(ChannelMetrics(answer));
        for line in [
            "pollux_channel_queue_depth 3.0",
            "pollux_channel_events_total{event=\"frames_out\"} 5",
            "pollux_channel_log_bytes_total{direction=\"out\"} 700",
            "pollux_channel_spun_seconds 2.0",
            "pollux_channel_stage_seconds_count{stage=\"sent\"} 2",
            "pollux_channel_stage_seconds_bucket{stage=\"sent\",le=\"+Inf\"} 2",
        ] {
            let found = text.lines().any(|l| {
                // The order of labels is the encoder's.
                l == line
                    || l == line.replace("stage=\"sent\",le=\"+Inf\"", "le=\"+Inf\",stage=\"sent\"")
            });
            assert!(found, "no {line} in\n{text}");
        }
    }

    #[test]
    fn parts_that_do_not_answer_are_told() {
        let text = encoded(Up(vec![("vmm", true), ("channel", false)]));
        assert!(text.contains("pollux_up{part=\"vmm\"} 1.0"), "{text}");
        assert!(text.contains("pollux_up{part=\"channel\"} 0.0"), "{text}");
    }
}
