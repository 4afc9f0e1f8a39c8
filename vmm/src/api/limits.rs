//! Limits that can be changed while the VM runs.

use std::ops::RangeInclusive;
use std::time::Duration;

use ft::{GateLimits, LagLimits};
use serde::{Deserialize, Serialize};
use vhost_ftlog::config_space::{AckMode, Tuning};

use super::control::Refused;

/// Bounds of times in ms.
const MS: RangeInclusive<u64> = 1..=60_000;
/// Bounds of one hold of the vCPU, in us.
const HOLD_US: RangeInclusive<u64> = 1..=1_000_000;
/// Bounds of the number of held effects.
const HELD_OUTPUTS: RangeInclusive<u64> = 1..=1 << 20;
/// Bounds of the bytes of held effects.
const HELD_BYTES: RangeInclusive<u64> = 1 << 16..=1 << 30;

/// When an acknowledgement releases an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AckAt {
    /// The backup has received the log up to it.
    Received,
    /// The backup has replayed the log up to it.
    Replayed,
}

/// The limits in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Lag of the backup below which the VM runs freely, in ms.
    pub lag_ms: u64,
    /// Range above it over which the VM is slowed to a stop, in ms.
    pub lag_span_ms: u64,
    /// The longest single hold of the vCPU, in us.
    pub longest_hold_us: u64,
    /// Effects held at which the vCPU stops.
    pub held_outputs: u64,
    /// Bytes of effects held at which the vCPU stops.
    pub held_bytes: u64,
    /// The log is sent once it has this many bytes.
    pub batch_bytes: u32,
    /// The log is sent once its first entry is this old, or with the acknowledgement that is then on its way, in us.
    pub batch_us: u32,
    /// The longest time that the channel spins before it sleeps, in us; 0: never.
    pub spin_us: u32,
    /// Share of one CPU that spinning may take, in thousandths.
    pub spin_permille: u32,
    /// When an acknowledgement releases an output.
    pub ack_at: AckAt,
}

impl Default for Limits {
    fn default() -> Self {
        let (lag, gate, tuning) = (
            LagLimits::default(),
            GateLimits::default(),
            Tuning::default(),
        );
        Self {
            lag_ms: lag.target.as_millis() as u64,
            lag_span_ms: lag.span.as_millis() as u64,
            longest_hold_us: lag.longest_hold.as_micros() as u64,
            held_outputs: gate.count as u64,
            held_bytes: gate.bytes as u64,
            batch_bytes: tuning.batch_bytes,
            batch_us: tuning.batch_us,
            spin_us: tuning.spin_us,
            spin_permille: tuning.spin_permille,
            ack_at: match tuning.ack_mode {
                AckMode::Received => AckAt::Received,
                AckMode::Replayed => AckAt::Replayed,
            },
        }
    }
}

impl Limits {
    /// As pacing takes them.
    #[must_use]
    pub fn lag(&self) -> LagLimits {
        LagLimits {
            target: Duration::from_millis(self.lag_ms),
            span: Duration::from_millis(self.lag_span_ms),
            longest_hold: Duration::from_micros(self.longest_hold_us),
        }
    }

    /// As the output gate takes them: effects, and their bytes.
    #[must_use]
    pub fn gate(&self) -> (usize, usize) {
        (self.held_outputs as usize, self.held_bytes as usize)
    }

    /// As the logging channel takes them.
    #[must_use]
    pub fn tuning(&self) -> Tuning {
        Tuning {
            batch_bytes: self.batch_bytes,
            batch_us: self.batch_us,
            spin_us: self.spin_us,
            spin_permille: self.spin_permille,
            ack_mode: match self.ack_at {
                AckAt::Received => AckMode::Received,
                AckAt::Replayed => AckMode::Replayed,
            },
        }
    }
}

/// New limits; what is not named stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsChange {
    /// Lag of the backup below which the VM runs freely, in ms
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u64>,
    /// Range above it over which the VM is slowed to a stop, in ms
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_span_ms: Option<u64>,
    /// The longest single hold of the vCPU, in us
    #[arg(long, value_name = "US")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longest_hold_us: Option<u64>,
    /// Effects held at which the vCPU stops
    #[arg(long, value_name = "COUNT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_outputs: Option<u64>,
    /// Bytes of effects held at which the vCPU stops
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_bytes: Option<u64>,
    /// The log is sent once it has this many bytes
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_bytes: Option<u32>,
    /// The log is sent once its first entry is this old, in us
    #[arg(long, value_name = "US")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_us: Option<u32>,
    /// The longest time that the channel spins before it sleeps, in us; 0: never
    #[arg(long, value_name = "US")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spin_us: Option<u32>,
    /// Share of one CPU that spinning may take, in thousandths
    #[arg(long, value_name = "PERMILLE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spin_permille: Option<u32>,
    /// When an acknowledgement releases an output: received, replayed
    #[arg(long, value_name = "WHEN", value_parser = parse_ack_at)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ack_at: Option<AckAt>,
}

fn parse_ack_at(text: &str) -> Result<AckAt, String> {
    match text {
        "received" => Ok(AckAt::Received),
        "replayed" => Ok(AckAt::Replayed),
        _ => Err("it is received or replayed".to_owned()),
    }
}

impl LimitsChange {
    /// The limits that come out of it.
    ///
    /// # Errors
    /// One is out of its bounds; then none changes.
    pub fn apply(&self, now: &Limits) -> Result<Limits, Refused> {
        let to = Limits {
            lag_ms: bounded("lag_ms", self.lag_ms, now.lag_ms, MS)?,
            lag_span_ms: bounded("lag_span_ms", self.lag_span_ms, now.lag_span_ms, MS)?,
            longest_hold_us: bounded(
                "longest_hold_us",
                self.longest_hold_us,
                now.longest_hold_us,
                HOLD_US,
            )?,
            held_outputs: bounded(
                "held_outputs",
                self.held_outputs,
                now.held_outputs,
                HELD_OUTPUTS,
            )?,
            held_bytes: bounded("held_bytes", self.held_bytes, now.held_bytes, HELD_BYTES)?,
            batch_bytes: self.batch_bytes.unwrap_or(now.batch_bytes),
            batch_us: self.batch_us.unwrap_or(now.batch_us),
            spin_us: self.spin_us.unwrap_or(now.spin_us),
            spin_permille: self.spin_permille.unwrap_or(now.spin_permille),
            ack_at: self.ack_at.unwrap_or(now.ack_at),
        };
        to.tuning().validate().map_err(|bad| {
            Refused::invalid(
                bad.to_string(),
                format!(
                    "batch_bytes: 1 to {}; batch_us, spin_us: at most {}; spin_permille: at most 1000",
                    format::MAX_BODY_LEN,
                    Tuning::MAX_US
                ),
            )
        })?;
        Ok(to)
    }
}

fn bounded(
    name: &str,
    value: Option<u64>,
    now: u64,
    range: RangeInclusive<u64>,
) -> Result<u64, Refused> {
    let value = value.unwrap_or(now);
    if range.contains(&value) {
        return Ok(value);
    }
    Err(Refused::invalid(
        format!("{name} {value} is out of bounds"),
        format!("{name}: {} to {}", range.start(), range.end()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_parts_and_convert_back() {
        let limits = Limits::default();
        assert_eq!(limits.lag(), LagLimits::default());
        assert_eq!(limits.tuning(), Tuning::default());
        let gate = GateLimits::default();
        assert_eq!(limits.gate(), (gate.count, gate.bytes));
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let change = LimitsChange {
            lag_ms: Some(50),
            ack_at: Some(AckAt::Replayed),
            ..LimitsChange::default()
        };
        let to = change.apply(&Limits::default()).unwrap();
        let expected = Limits {
            lag_ms: 50,
            ack_at: AckAt::Replayed,
            ..Limits::default()
        };
        assert_eq!(to, expected);
        let nothing = LimitsChange::default();
        assert_eq!(nothing.apply(&to).unwrap(), to);
    }

    #[test]
    fn limits_out_of_bounds_are_refused_with_the_bounds() {
        let bad = [
            ("{\"lag_ms\": 0}", "60000"),
            ("{\"lag_span_ms\": 60001}", "60000"),
            ("{\"longest_hold_us\": 0}", "1000000"),
            ("{\"held_outputs\": 0}", "1048576"),
            ("{\"held_bytes\": 1}", "65536"),
            ("{\"batch_bytes\": 0}", "batch_bytes"),
            ("{\"batch_us\": 1000001}", "batch_us"),
            ("{\"spin_permille\": 1001}", "spin_permille"),
        ];
        for (text, remedy) in bad {
            let change: LimitsChange = serde_json::from_str(text).unwrap();
            let refused = change.apply(&Limits::default()).unwrap_err();
            assert!(refused.remedy.contains(remedy), "{text}: {refused:?}");
        }
        assert!(serde_json::from_str::<LimitsChange>("{\"lag\": 1}").is_err());
    }
}
