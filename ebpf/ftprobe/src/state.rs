//! All that the running daemon knows, for its socket and its metrics.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpf_events::exits::{ExitKey, PortKey};
use ebpf_events::traffic::{Flow, FlowKey};
use heartbeat::protocol::{ExitStatus, FlowStatus, Status};

use crate::exits::Exits;
use crate::table::Table;
use crate::traffic::Traffic;

/// Reasons of exits in a status: it must fit into a message.
const MAX_EXITS_TOLD: usize = 32;

/// Shared between the thread that serves clients and the one that serves metrics.
pub struct State {
    table: Mutex<Table>,
    traffic: Option<Traffic>,
    exits: Option<Exits>,
}

impl State {
    /// Of these parts.
    pub const fn new(table: Table, traffic: Option<Traffic>, exits: Option<Exits>) -> Self {
        Self {
            table: Mutex::new(table),
            traffic,
            exits,
        }
    }

    /// The sessions. Locked for the time of one call at most.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flows of the logging channel; none where they are not watched.
    pub fn flows(&self) -> Vec<(FlowKey, Flow)> {
        self.traffic
            .as_ref()
            .map(Traffic::flows)
            .unwrap_or_default()
    }

    /// Exits of virtual machines; none where they are not counted.
    pub fn exits(&self) -> Vec<(ExitKey, u64)> {
        self.exits.as_ref().map(Exits::exits).unwrap_or_default()
    }

    /// Accesses of guests to ports; none where they are not counted.
    pub fn ports(&self) -> Vec<(PortKey, u64)> {
        self.exits.as_ref().map(Exits::ports).unwrap_or_default()
    }

    /// What is going on, with the table locked by the caller.
    pub fn status_of(&self, table: &Table) -> Status {
        let mut status = table.status();
        status.traffic_watched = self.traffic.is_some();
        status.flows = self
            .flows()
            .iter()
            .map(|(key, flow)| flow_status(key, flow))
            .collect();
        let mut exits = self.exits();
        exits.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        exits.truncate(MAX_EXITS_TOLD);
        status.exits = exits.iter().map(exit_status).collect();
        status
    }
}

fn exit_status((key, count): &(ExitKey, u64)) -> ExitStatus {
    ExitStatus {
        process: key.process,
        reason: key.reason_name().into_owned(),
        count: *count,
    }
}

fn flow_status(key: &FlowKey, flow: &Flow) -> FlowStatus {
    let latency = &flow.ack_latency;
    FlowStatus {
        session: flow.session,
        local: key.local,
        remote: key.remote,
        bytes_in: flow.incoming.bytes,
        bytes_out: flow.outgoing.bytes,
        packets_in: flow.incoming.packets,
        packets_out: flow.outgoing.packets,
        received: flow.received,
        replayed: flow.replayed,
        acks_timed: latency.count,
        ack_p50_ns: latency.quantile_ns(0.5),
        ack_p99_ns: latency.quantile_ns(0.99),
        rtt_us: flow.rtt_us,
        retransmits: flow.retransmits,
    }
}
