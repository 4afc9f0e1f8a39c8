//! Events and actions in a few words, for the trace.

use format::SessionId;
use ft::{Action, ArbiterReply, ArbiterRequest, EpochRecord, Event, PeerMessage, Tenure};

/// Whether an event is worth a line of its own.
pub(super) fn is_news(event: &Event) -> bool {
    !matches!(
        event,
        Event::Tick
            | Event::Heartbeat { .. }
            | Event::Heard(_)
            | Event::Appended { .. }
            | Event::Acked { .. }
            | Event::Released { .. }
            | Event::Replayed { .. }
    )
}

fn short(session: SessionId) -> String {
    session.to_string()[..6].to_owned()
}

pub(super) fn record(record: &EpochRecord) -> String {
    let tenure = match record.tenure {
        Tenure::Alone => "alone".to_owned(),
        Tenure::Pair { backup, session } => format!("with {backup} in {}", short(session)),
        Tenure::Closed => "closed".to_owned(),
    };
    let ranges = record.quarantine.ranges().count();
    let quarantine = if ranges == 0 {
        String::new()
    } else {
        format!(
            ", {ranges} quarantined, feared {:?}",
            record.quarantine.suspects()
        )
    };
    format!(
        "epoch {} of {}, {tenure}{quarantine}",
        record.epoch, record.owner
    )
}

fn message(message: &PeerMessage) -> String {
    let session = match message {
        PeerMessage::Join { session, epoch, .. } => {
            return format!("Join {} epoch {epoch}", short(*session));
        }
        PeerMessage::Synced {
            session,
            bytes,
            replayed,
        } => {
            let replayed = replayed.map(|seq| seq.0);
            return format!(
                "Synced {} bytes {bytes} replayed {replayed:?}",
                short(*session)
            );
        }
        PeerMessage::Progress {
            session,
            epoch,
            named,
            released,
        } => {
            return format!(
                "Progress {} epoch {epoch} named {named} released {released}",
                short(*session)
            );
        }
        PeerMessage::Dropped {
            session,
            epoch,
            closed,
        } => return format!("Dropped {} epoch {epoch} closed {closed}", short(*session)),
        PeerMessage::StateReply { holds, .. } => {
            return format!("StateReply state {} writes {}", holds.state, holds.writes);
        }
        PeerMessage::StateQuery { epoch, .. } => return format!("StateQuery epoch {epoch:?}"),
        PeerMessage::Accepted { session }
        | PeerMessage::Refused { session, .. }
        | PeerMessage::Confirm { session, .. }
        | PeerMessage::Confirmed { session, .. }
        | PeerMessage::TakeOver { session, .. }
        | PeerMessage::GaveUp { session, .. } => session,
    };
    format!("{} {}", message.name(), short(*session))
}

pub(super) fn event(event: &Event) -> String {
    match event {
        Event::Peer {
            from,
            message: said,
        } => format!("{from}: {}", message(said)),
        Event::Arbiter { reply, .. } => match reply {
            ArbiterReply::Newest(None) => "arbiter: there is no record".to_owned(),
            ArbiterReply::Newest(Some(newest)) => format!("arbiter: newest is {}", record(newest)),
            ArbiterReply::Won => "arbiter: won".to_owned(),
            ArbiterReply::Taken(other) => format!("arbiter: taken, {}", record(other)),
            ArbiterReply::Unreachable(why) => format!("arbiter: unreachable, {why}"),
        },
        Event::SessionClosed { session, end } => {
            format!("SessionClosed {} at {end}", short(*session))
        }
        Event::GateHolds { session, at } => format!("GateHolds {} at {at}", short(*session)),
        Event::Drained { writes, .. } => format!("Drained, {} writes outstanding", writes.len()),
        other => name(&format!("{other:?}")),
    }
}

pub(super) fn action(action: &Action) -> String {
    match action {
        Action::Send { to, message: said } => format!("to {to}: {}", message(said)),
        Action::Arbiter { request, .. } => match request {
            ArbiterRequest::Newest => "arbiter: newest?".to_owned(),
            ArbiterRequest::TryWin { record: claim, .. } => {
                format!("arbiter: try {}", record(claim))
            }
        },
        Action::GoLive(go) => format!("GoLive by {}", record(&go.record)),
        Action::Notice(notice) => format!("notice: {}", name(&format!("{notice:?}"))),
        Action::Gate(mode) => match mode {
            ft::GateMode::Holding(session) => format!("Gate holds for {}", short(*session)),
            other => format!("Gate {other:?}"),
        },
        other => name(&format!("{other:?}")),
    }
}

/// The debug text up to where bytes begin.
fn name(debug: &str) -> String {
    let end = debug.find("SessionId(").or_else(|| debug.find("Nonce"));
    let text = &debug[..end.unwrap_or(debug.len())];
    let text = text.trim_end_matches(['{', '(', ' ', ':', ',']);
    text.trim_end_matches(" session")
        .chars()
        .take(120)
        .collect()
}
