//! The log: what is acknowledged, released, taken over; time and lag.

use format::SessionId;

use crate::guest::Guest;
use crate::plan::MS;

use super::Checker;

/// What the primary of a session was when it made each append.
#[derive(Debug)]
pub(crate) struct Session {
    primary: u32,
    /// Its state: before the first append, then after each.
    hashes: Vec<u64>,
    ran: Vec<u64>,
    /// What the primary knows to be acknowledged.
    acked: u64,
    /// What a replica could see while it lived and the session was open.
    committed: u64,
    replayed: u64,
    /// From where on outputs are held, once they are.
    holds: Option<u64>,
    close: bool,
}

impl Checker {
    pub(crate) fn session(&mut self, session: SessionId, primary: u32, hash: u64, ran: u64) {
        let fresh = Session {
            primary,
            hashes: vec![hash],
            ran: vec![ran],
            acked: 0,
            committed: 0,
            replayed: 0,
            holds: None,
            close: false,
        };
        self.sessions.insert(session, fresh);
    }

    pub(crate) fn append(&mut self, session: SessionId, hash: u64, ran: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.hashes.push(hash);
            session.ran.push(ran);
        }
    }

    pub(crate) fn last_hash(&self, session: SessionId) -> u64 {
        let hashes = self.sessions.get(&session).map(|session| &session.hashes);
        hashes
            .and_then(|hashes| hashes.last())
            .copied()
            .unwrap_or(0)
    }

    pub(crate) fn committed(&mut self, session: SessionId, next: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.committed = session.committed.max(next);
        }
    }

    pub(crate) fn acked(&mut self, session: SessionId, received: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.acked = session.acked.max(received);
        }
    }

    pub(crate) fn replayed(&mut self, session: SessionId, upto: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.replayed = session.replayed.max(upto);
        }
    }

    /// Outputs of the session are held from `at` on.
    pub(crate) fn holds(&mut self, session: SessionId, at: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.holds.get_or_insert(at);
        }
    }

    /// A record names the standby of a session: outputs are held, and it has all that went out before
    /// (R15).
    pub(crate) fn named(&mut self, now: u64, session: SessionId) {
        let Some(known) = self.sessions.get(&session) else {
            return;
        };
        let (holds, replayed) = (known.holds, known.replayed);
        if holds.is_none_or(|at| replayed < at) {
            let what = format_args!(
                "outputs are held from {holds:?} on, the standby that is named has replayed {replayed}"
            );
            self.violated("named too early", now, what);
        }
    }

    /// An effect that waits for `needs` is let out by a gate that holds for `session`.
    pub(crate) fn held_release(&mut self, now: u64, host: usize, session: SessionId, needs: u64) {
        let committed = self
            .sessions
            .get(&session)
            .map_or(0, |session| session.committed);
        if needs > committed {
            let what = format_args!(
                "host{host} lets out what waits for {needs}, a replica has {committed}"
            );
            self.violated("released unacknowledged", now, what);
        }
    }

    /// A replica that replayed `replayed` appends takes over.
    pub(crate) fn takes_over(
        &mut self,
        now: u64,
        host: usize,
        inc: u32,
        session: SessionId,
        replayed: u64,
        guest: &Guest,
    ) {
        let Some(known) = self.sessions.get(&session) else {
            return self.violated(
                "takeover",
                now,
                format_args!("host{host} takes over an unknown session"),
            );
        };
        let (acked, primary) = (known.acked, known.primary);
        let expected = known.hashes.get(replayed as usize).copied();
        if replayed < acked {
            let what = format_args!(
                "host{host} takes over at {replayed}, {acked} appends were acknowledged to VMM {primary}"
            );
            self.violated("acknowledged input lost", now, what);
        } else if expected != Some(guest.hash()) {
            let what = format_args!(
                "VMM {inc} on host{host} is not where VMM {primary} was at append {replayed}"
            );
            self.violated("other state", now, what);
        }
    }

    /// The lag of a protected primary, checked from when it was small for the first time.
    pub(crate) fn lag(&mut self, now: u64, session: SessionId, ran: u64, small: u64, bound: u64) {
        let Some(known) = self.sessions.get_mut(&session) else {
            return;
        };
        let replayed = known.ran.get(known.replayed as usize).copied().unwrap_or(0);
        let lag = ran.saturating_sub(replayed);
        known.close |= lag <= small;
        if known.close && lag > bound {
            let what = format_args!("{} ms of the primary's run are not replayed", lag / MS);
            self.violated("lag", now, what);
        }
    }

    /// Virtual time goes from `before` to `ns`, in a VM that is live here since `from`.
    #[allow(clippy::too_many_arguments)] // All of them are numbers of one measurement.
    pub(crate) fn time(
        &mut self,
        now: u64,
        host: usize,
        life: u64,
        from: u64,
        before: u64,
        ns: u64,
        drift_ppm: u64,
    ) {
        let base = self
            .times
            .iter()
            .find(|(other, at, _)| *other == life && *at == from);
        let base = base.map(|(_, _, base)| *base).unwrap_or_else(|| {
            self.times.push((life, from, before));
            before
        });
        let span = now - from;
        let most = span + span / 10 + span * drift_ppm / 900_000 + 1_000;
        if ns < before || ns - base > most {
            let what = format_args!(
                "host{host}: virtual time went on by {} us in {} us",
                ns.saturating_sub(base) / 1_000,
                span / 1_000
            );
            self.violated("time", now, what);
        }
    }
}
