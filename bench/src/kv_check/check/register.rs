//! A register: written with values that are each written once, and read.
//!
//! All operations that wrote or read one value form its cluster. With *first* the earliest answer and
//! *last* the latest call within a cluster, one cluster must come before another if its *first* is before
//! the other's *last*. The history is linearizable exactly if no value was read before its write was
//! called and no two clusters must each come before the other (Gibbons and Korach, "Testing Shared
//! Memories", SIAM J. Comput. 26(4), 1997, theorem 4.1).

use std::collections::{BTreeMap, BTreeSet};

use super::{Span, Verdict, WriteId};
use crate::monotonic::Moment;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// This value was written.
    Write(WriteId),
    /// This value was read; nothing, if none was there.
    Read(Option<WriteId>),
}

/// One operation. A read that was never answered says nothing and is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Operation {
    /// When.
    pub(crate) span: Span,
    /// What.
    pub(crate) action: Action,
}

#[derive(Debug)]
struct Cluster {
    value: Option<WriteId>,
    /// Nobody wrote it: the value from before the history.
    write: Span,
    first: Moment,
    last: Moment,
    /// Latest answer of a read; `START` if it was never read.
    seen: Moment,
}

/// Checks the history of a register that was empty at first.
pub(crate) fn check(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::default();
    let clusters = clusters(operations, &mut verdict);
    let mut lost = BTreeSet::new();
    let mut stale = BTreeSet::new();
    for (a, b) in conflicts(&clusters) {
        let (old, new) = if a.write.call <= b.write.call {
            (a, b)
        } else {
            (b, a)
        };
        // The old value's latest call came after the new one was answered: it is a read, as the old
        // write was called before the new one.
        let gone = new.write.is_answered() && new.seen < old.last;
        if gone && lost.insert(new.value) {
            verdict.lose(|| {
                format!(
                    "{} was acknowledged, and gone when {} was read later",
                    name(new.value),
                    name(old.value)
                )
            });
        } else if !gone && stale.insert((old.value, old.last)) {
            verdict.contradict(|| {
                format!(
                    "{} was read after {} had replaced it",
                    name(old.value),
                    name(new.value)
                )
            });
        }
    }
    verdict
}

fn name(value: Option<WriteId>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |id| id.to_string())
}

/// The clusters in order of their first answer. What cannot be in any is a contradiction.
fn clusters(operations: &[Operation], verdict: &mut Verdict) -> Vec<Cluster> {
    let from_the_start = Span {
        call: Moment::START,
        answer: Moment::START,
    };
    let mut found = BTreeMap::from([(None, cluster(None, from_the_start))]);
    for operation in operations {
        if let Action::Write(id) = operation.action {
            let again = found.insert(Some(id), cluster(Some(id), operation.span));
            assert!(again.is_none(), "{id} written twice: values are unique");
        }
    }
    for operation in operations {
        let Action::Read(value) = operation.action else {
            continue;
        };
        let span = operation.span;
        let Some(cluster) = found.get_mut(&value) else {
            verdict.contradict(|| format!("{} was read, and written by nobody", name(value)));
            continue;
        };
        if span.precedes(cluster.write) {
            verdict.contradict(|| format!("{} was read before it was written", name(value)));
            continue;
        }
        cluster.first = cluster.first.min(span.answer);
        cluster.last = cluster.last.max(span.call);
        cluster.seen = cluster.seen.max(span.answer);
    }
    // A write that was neither answered nor seen may never have happened.
    let mut clusters: Vec<Cluster> = found
        .into_values()
        .filter(|c| c.first != Moment::NEVER)
        .collect();
    clusters.sort_by_key(|c| c.first);
    clusters
}

fn cluster(value: Option<WriteId>, write: Span) -> Cluster {
    Cluster {
        value,
        write,
        first: write.answer,
        last: write.call,
        seen: Moment::START,
    }
}

/// All pairs of clusters that must each come before the other. In such a pair the one that was first
/// answered earlier has a span from its first answer to its last call that reaches over the other's first
/// answer.
fn conflicts(sorted: &[Cluster]) -> impl Iterator<Item = (&Cluster, &Cluster)> {
    sorted.iter().enumerate().flat_map(|(at, cluster)| {
        sorted[at + 1..]
            .iter()
            .take_while(|other| other.first < cluster.last)
            .filter(|other| cluster.first < other.last)
            .map(move |other| (cluster, other))
    })
}
