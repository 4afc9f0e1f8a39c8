//! A counter or a log: things are only added, and each answer tells how many there are.
//!
//! An addition is answered with the position it got, a read with the number there were; so the answers
//! themselves give the only possible order: by position, an addition before the reads of its position.
//! The history is linearizable exactly if that order agrees with real time, no two additions got one
//! position, and every position that nobody claims can be one of an addition that was never answered.
//! For a log the reads also say which addition has which position.

use std::collections::BTreeMap;

use super::{Span, Verdict, WriteId};
use crate::monotonic::Moment;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// One more; the answer gave its position, counted from 1.
    Add {
        /// What was added, in a log.
        id: Option<WriteId>,
        /// Its position; unknown if there was no answer.
        position: Option<u64>,
    },
    /// So many were there.
    Read(u64),
}

/// One operation. A read that was never answered says nothing and is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Operation {
    /// When.
    pub(crate) span: Span,
    /// What.
    pub(crate) action: Action,
}

/// An operation with its place in the order that the answers give.
#[derive(Debug, Clone, Copy)]
struct Placed {
    span: Span,
    position: u64,
    is_read: bool,
    is_lost: bool,
}

/// Checks the history of a sequence that was empty at first. `content` is what a log was last read to
/// hold, in order, as far as it was read; it is empty for a counter.
pub(crate) fn check(operations: &[Operation], content: &[WriteId]) -> Verdict {
    let mut verdict = Verdict::default();
    let positions = positions(content, &mut verdict);
    let mut placed = Vec::with_capacity(operations.len());
    let mut pending = Vec::new();
    for operation in operations {
        let span = operation.span;
        let place = |position, is_read, is_lost| Placed {
            span,
            position,
            is_read,
            is_lost,
        };
        match operation.action {
            Action::Read(position) => placed.push(place(position, true, false)),
            Action::Add { id, position } => {
                let read = id.and_then(|id| positions.get(&id).copied());
                let is_lost = is_misplaced(id, position, read, content, &mut verdict);
                match position.or(read) {
                    Some(position) => placed.push(place(position, false, is_lost)),
                    None => pending.push(span),
                }
            }
        }
    }
    invented(operations, content, &mut verdict);
    placed.sort_by_key(|p| (p.position, p.is_read, p.span.call));
    lose_doubles(&mut placed, &mut verdict);
    lose_the_forgotten(&mut placed, &mut verdict);
    against_time(&placed, &mut verdict);
    gaps(&placed, pending, &mut verdict);
    verdict
}

/// Where each addition of a log is; one that is there twice was done twice.
fn positions(content: &[WriteId], verdict: &mut Verdict) -> BTreeMap<WriteId, u64> {
    let mut positions = BTreeMap::new();
    for (&id, position) in content.iter().zip(1..) {
        if let Some(before) = positions.insert(id, position) {
            verdict.contradict(|| format!("{id} was added twice, at {before} and {position}"));
        }
    }
    positions
}

/// An acknowledged addition of a log must be where its answer said, if the log was read that far. Counts
/// it if it is not; true if it is gone.
fn is_misplaced(
    id: Option<WriteId>,
    position: Option<u64>,
    read: Option<u64>,
    content: &[WriteId],
    verdict: &mut Verdict,
) -> bool {
    if position == Some(0) {
        verdict.contradict(|| "an addition was answered with 0".to_owned());
        return false;
    }
    let (Some(id), Some(position)) = (id, position) else {
        return false;
    };
    match read {
        None if position <= content.len() as u64 => {
            verdict.lose(|| format!("{id} was added at {position}, and is not in the log"));
            true
        }
        Some(read) if read != position => {
            verdict.contradict(|| format!("{id} was added at {position}, and read at {read}"));
            false
        }
        _ => false,
    }
}

/// A log must hold nothing that nobody added.
fn invented(operations: &[Operation], content: &[WriteId], verdict: &mut Verdict) {
    let added: std::collections::BTreeSet<WriteId> = operations
        .iter()
        .filter_map(|o| match o.action {
            Action::Add { id, .. } => id,
            Action::Read(_) => None,
        })
        .collect();
    for id in content.iter().filter(|id| !added.contains(id)) {
        verdict.contradict(|| format!("{id} was read, and added by nobody"));
    }
}

/// Of two additions that got one position, the one that was answered first is gone.
fn lose_doubles(placed: &mut [Placed], verdict: &mut Verdict) {
    for same in placed.chunk_by_mut(|a, b| a.position == b.position) {
        let mut adds: Vec<&mut Placed> = same
            .iter_mut()
            .filter(|p| !p.is_read && !p.is_lost)
            .collect();
        adds.sort_by_key(|p| p.span.answer);
        for add in adds.into_iter().rev().skip(1) {
            add.is_lost = true;
            let position = add.position;
            verdict.lose(|| format!("two additions were answered with {position}"));
        }
    }
}

/// Acknowledged additions above what the last operation, if it is a read, found are gone.
fn lose_the_forgotten(placed: &mut [Placed], verdict: &mut Verdict) {
    let last = placed.iter().max_by_key(|p| (p.span.call, p.position));
    let Some(&last) = last.filter(|p| p.is_read) else {
        return;
    };
    let gone = placed.iter_mut().filter(|p| {
        !p.is_read && !p.is_lost && p.position > last.position && p.span.precedes(last.span)
    });
    for add in gone {
        add.is_lost = true;
        let (position, found) = (add.position, last.position);
        verdict.lose(|| format!("{position} was acknowledged, and later only {found} found"));
    }
}

/// Nothing may have been called after something with a higher position was answered. Conflicts that a
/// lost addition explains are counted with that.
fn against_time(placed: &[Placed], verdict: &mut Verdict) {
    // The latest call among all that comes earlier in the order.
    let mut latest: Option<Placed> = None;
    for &this in placed.iter().filter(|p| !p.is_lost) {
        if let Some(before) = latest
            && this.span.precedes(before.span)
        {
            verdict.contradict(|| {
                format!(
                    "{} was answered when {} had been answered before",
                    before.position, this.position
                )
            });
        }
        if latest.is_none_or(|l| l.span.call < this.span.call) {
            latest = Some(this);
        }
    }
}

/// Positions that no answer claims must each be one of an addition that was never answered, and was
/// called before any answer showed a position as high.
fn gaps(placed: &[Placed], mut pending: Vec<Span>, verdict: &mut Verdict) {
    pending.sort_by_key(|span| span.call);
    let mut calls = pending.into_iter().peekable();
    let shown = shown_by(placed);
    // The lowest position that nothing has been found for.
    let mut next = 1;
    for this in placed {
        let needed = this.position.saturating_sub(u64::from(!this.is_read));
        while next <= needed {
            let deadline = shown(next);
            if calls.next_if(|span| span.call <= deadline).is_none() {
                let position = next;
                verdict.contradict(|| format!("position {position} was added by nobody"));
                // One finding for a jump: a wild number is one wrong answer, not thousands.
                next = needed;
            }
            next += 1;
        }
        if !this.is_read && this.position == next {
            next += 1;
        }
    }
}

/// When any answer first showed this position or a higher one.
fn shown_by(placed: &[Placed]) -> impl Fn(u64) -> Moment {
    let mut earliest = vec![Moment::NEVER; placed.len() + 1];
    for (at, this) in placed.iter().enumerate().rev() {
        earliest[at] = earliest[at + 1].min(this.span.answer);
    }
    let positions: Vec<u64> = placed.iter().map(|p| p.position).collect();
    move |position| earliest[positions.partition_point(|&p| p < position)]
}
