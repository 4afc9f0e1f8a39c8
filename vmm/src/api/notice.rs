//! The protocol's notices as events: what a person is told, and what to do where something is to be
//! done.

use ft::{Cause, Leave, Notice};
use serde_json::Value;

use super::events::{Event, Severity};

/// Why a peer was taken for lost, for people.
#[must_use]
pub fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::HostSilent => "its host is silent",
        Cause::VmmStill => "its host answers, but the VMM stands still",
        Cause::VmmDead => "its VMM died",
        Cause::AckOverdue => "an acknowledgement is overdue",
        Cause::ReplayOverdue => "it has the log and does not replay it",
        Cause::Diverged => "it diverged",
        Cause::GaveUp => "it gave the session up",
        Cause::Relieved => "it asked to be relieved",
        Cause::OwnPause => "this side did not run for so long that the peer may have given it up",
        Cause::Operator => "an operator ended it",
    }
}

/// Why a role ends, for people.
fn leave(leave: &Leave) -> &'static str {
    match leave {
        Leave::Superseded => "another host runs the VM now",
        Leave::PoweredOff => "the VM is powered off",
        Leave::Dropped => "the primary ended the session",
        Leave::Incomplete => "the primary was lost before this replica could take its place",
        Leave::Diverged => "this replica diverged",
        Leave::LoadFailed => "the state could not be loaded",
    }
}

/// A notice as an event.
#[must_use]
pub fn event(notice: &Notice) -> Event {
    use Severity::{Error, Info, Warning};
    match notice {
        Notice::StartBlocked {
            record,
            waiting_for,
        } => start_blocked(record, waiting_for),
        Notice::ArbiterUnreachable(why) => Event::new(
            Error,
            "arbiter-unreachable",
            format!("the shared storage cannot be asked who may run the VM: {why}; waiting for it"),
        ),
        Notice::ProtectionStarting(host) => Event::new(
            Info,
            "protection-starting",
            format!("{host} is being made the backup"),
        )
        .with("standby", host.as_str()),
        Notice::StandbyDiffers {
            standby,
            differences,
        } => differs(standby.as_str(), differences),
        Notice::ProtectionFailed { standby, cause } => Event::new(
            Warning,
            "protection-failed",
            format!("{standby} did not become the backup: {cause}; the next one is tried"),
        )
        .with("standby", standby.as_str())
        .with("cause", cause.as_str()),
        Notice::Protected { backup, epoch } => Event::new(
            Info,
            "protected",
            format!("{backup} can take the VM over (epoch {epoch})"),
        )
        .with("backup", backup.as_str())
        .with("epoch", epoch.0),
        Notice::PeerLost { peer, cause: why } => Event::new(
            Warning,
            "peer-lost",
            format!("{peer} is taken for lost: {}", cause(*why)),
        )
        .with("peer", peer.as_str())
        .with("cause", format!("{why:?}")),
        Notice::Competing => Event::new(
            Info,
            "competing",
            "the log is replayed to its end; asking the shared storage for the VM",
        ),
        Notice::Won { epoch, quarantined } => Event::new(
            Info,
            "won",
            format!("this host owns epoch {epoch}; {quarantined} ranges of sectors in quarantine"),
        )
        .with("epoch", epoch.0)
        .with("quarantined_ranges", *quarantined),
        Notice::Alone(epoch) => Event::new(
            Warning,
            "alone",
            format!("the VM runs without a backup (epoch {epoch})"),
        )
        .with("epoch", epoch.0),
        Notice::Diverged(report) => diverged(report),
        Notice::QuarantineOver(epoch) => Event::new(
            Info,
            "quarantine-over",
            format!(
                "no late write can come any more; all sectors are in the image (epoch {epoch})"
            ),
        )
        .with("epoch", epoch.0),
        Notice::WorldUnusable => Event::new(
            Error,
            "world-unusable",
            "the disk image or the TAP cannot be opened here, so this host does not compete for the \
             VM: look after both; it tries again by itself",
        ),
        Notice::Leaving(why) => leaving(why),
        Notice::CommandRefused(why) => Event::new(
            Warning,
            "command-refused",
            format!("a command was refused: {why}"),
        ),
    }
}

fn start_blocked(record: &ft::EpochRecord, waiting_for: &[ft::HostId]) -> Event {
    let hosts: Vec<&str> = waiting_for.iter().map(ft::HostId::as_str).collect();
    let epoch = record.epoch;
    let message = if hosts.is_empty() {
        format!(
            "the VM was not switched off in order in epoch {epoch}. If another host runs it, do nothing: \
             this one waits to be its standby. Only if no host's status says primary or backup: \
             `pollux ctl SOCKET force-start {epoch}`"
        )
    } else {
        format!(
            "the VM was not switched off in order in epoch {epoch}: waiting for {} to say that it \
             holds nothing; if it is gone for good, `pollux ctl SOCKET host-gone HOST`",
            hosts.join(", ")
        )
    };
    Event::new(Severity::Error, "start-blocked", message)
        .with("epoch", epoch.0)
        .with("owner", record.owner.as_str())
        .with("waiting_for", hosts)
}

fn diverged(report: &ft::DivergenceReport) -> Event {
    Event::new(
        Severity::Error,
        "diverged",
        format!(
            "a replica diverged at exit {}: expected {:016x}, got {:016x}; keep the report",
            report.exit, report.expected, report.actual
        ),
    )
    .with("exit", report.exit.0)
    .with("expected", format!("{:016x}", report.expected))
    .with("actual", format!("{:016x}", report.actual))
    .with("report", report.text.as_str())
}

fn differs(standby: &str, differences: &[ft::Difference]) -> Event {
    let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
    let texts: Vec<String> = differences
        .iter()
        .map(|one| {
            let (here, there) = (side(&one.primary), side(&one.standby));
            format!("{}: {here} here, {there} there", one.name)
        })
        .collect();
    let message = format!(
        "{standby} cannot replay this VM and is not used: {}",
        texts.join("; ")
    );
    Event::new(Severity::Warning, "standby-differs", message)
        .with("standby", standby)
        .with(
            "differences",
            texts.into_iter().map(Value::from).collect::<Vec<_>>(),
        )
}

fn leaving(why: &Leave) -> Event {
    let severity = match why {
        Leave::PoweredOff | Leave::Dropped => Severity::Info,
        Leave::Superseded | Leave::Incomplete => Severity::Warning,
        Leave::Diverged | Leave::LoadFailed => Severity::Error,
    };
    let message = format!("this host gives its role up: {}", leave(why));
    Event::new(severity, "leaving", message).with("why", format!("{why:?}"))
}

#[cfg(test)]
mod tests {
    use format::{Epoch, SessionId};
    use ft::{EpochRecord, Nonce, Quarantine, Tenure};

    use super::*;

    fn blocked(waiting_for: Vec<ft::HostId>) -> Event {
        event(&Notice::StartBlocked {
            record: EpochRecord {
                epoch: Epoch(7),
                nonce: Nonce::default(),
                owner: "castor".parse().unwrap(),
                tenure: Tenure::Pair {
                    backup: "pollux".parse().unwrap(),
                    session: SessionId::default(),
                },
                quarantine: Quarantine::default(),
            },
            waiting_for,
        })
    }

    #[test]
    fn a_blocked_start_says_what_to_do() {
        assert!(blocked(Vec::new()).message.contains("force-start 7"));
        let waiting = blocked(vec!["helen".parse().unwrap()]);
        assert!(waiting.message.contains("helen") && waiting.message.contains("host-gone"));
        assert_eq!(waiting.severity, Severity::Error);
        assert_eq!(waiting.details["waiting_for"][0], "helen");
    }

    #[test]
    fn a_standby_that_differs_is_told_with_both_values() {
        let event = event(&Notice::StandbyDiffers {
            standby: "helen".parse().unwrap(),
            differences: vec![ft::Difference {
                name: "memory".to_owned(),
                primary: Some("192 MiB".to_owned()),
                standby: None,
            }],
        });
        assert!(
            event
                .message
                .contains("memory: 192 MiB here, nothing there")
        );
        assert_eq!(event.details["standby"], "helen");
    }
}
