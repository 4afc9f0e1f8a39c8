//! The checkers against a search that tries every order, on small random histories of which some are
//! spoilt; and against the histories of known faults.

use rand::{Rng, RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use super::{Span, Verdict, WriteId, register, sequence};
use crate::monotonic::Moment;

const HISTORIES: u64 = 20_000;

fn span(call: u64, answer: Option<u64>) -> Span {
    Span {
        call: Moment(call),
        answer: answer.map_or(Moment::NEVER, Moment),
    }
}

fn id(n: u64) -> WriteId {
    WriteId {
        connection: 1,
        sequence: u32::try_from(n).unwrap(),
    }
}

/// Whether some order explains what is left: tries them all. `step` gives the state after an operation,
/// or nothing if its answer cannot be given in this state.
fn some_order<S, O>(state: &S, left: &[(Span, O)], step: &impl Fn(&S, &O) -> Option<S>) -> bool
where
    O: Copy,
{
    if left.iter().all(|(span, _)| !span.is_answered()) {
        return true;
    }
    (0..left.len()).any(|next| {
        let (span, operation) = left[next];
        if left.iter().any(|(other, _)| other.precedes(span)) {
            return false;
        }
        step(state, &operation).is_some_and(|after| {
            let mut rest = left.to_vec();
            rest.swap_remove(next);
            some_order(&after, &rest, step)
        })
    })
}

/// Spans with a point in each at which the operation truly happens, in order of these points. An
/// operation that is not answered may happen late, or never.
fn spans(rng: &mut impl Rng) -> Vec<(Span, bool)> {
    let mut points: Vec<(u64, Span, bool)> = (0..rng.random_range(1..=7))
        .map(|_| {
            let call = rng.random_range(1..20);
            let answer = rng
                .random_bool(0.85)
                .then(|| call + rng.random_range(1..10));
            let point = rng.random_range(call..=answer.unwrap_or(30));
            let happens = answer.is_some() || rng.random_bool(0.5);
            (point, span(call, answer), happens)
        })
        .collect();
    points.sort_by_key(|p| p.0);
    points
        .into_iter()
        .map(|(_, span, happens)| (span, happens))
        .collect()
}

/// Makes histories, and holds the checker's verdict against the search's.
fn compare<H: std::fmt::Debug>(
    make: impl Fn(&mut ChaCha8Rng) -> H,
    check: impl Fn(&H) -> Verdict,
    is_possible: impl Fn(&H) -> bool,
) {
    let mut impossible = 0;
    for seed in 0..HISTORIES {
        let history = make(&mut ChaCha8Rng::seed_from_u64(seed));
        let (verdict, possible) = (check(&history), is_possible(&history));
        assert_eq!(
            verdict.is_clean(),
            possible,
            "seed {seed}: {verdict:?} of {history:#?}"
        );
        impossible += u64::from(!possible);
    }
    let share = impossible as f64 / HISTORIES as f64;
    assert!(
        (0.05..0.95).contains(&share),
        "{share} of them are impossible"
    );
}

fn random_register(rng: &mut ChaCha8Rng) -> Vec<register::Operation> {
    use register::{Action, Operation};
    let mut value = None;
    let mut written = vec![None];
    let mut operations = Vec::new();
    for (n, (span, happens)) in spans(rng).into_iter().enumerate() {
        let n = n as u64;
        if rng.random_bool(0.5) {
            written.push(Some(id(n)));
            let action = Action::Write(id(n));
            operations.push(Operation { span, action });
            value = if happens { Some(id(n)) } else { value };
        } else if span.is_answered() {
            let action = Action::Read(value);
            operations.push(Operation { span, action });
        }
    }
    if rng.random_bool(0.5)
        && let Some(Operation {
            action: Action::Read(value),
            ..
        }) = operations
            .iter_mut()
            .rfind(|o| matches!(o.action, Action::Read(_)))
    {
        *value = *written.choose(rng).unwrap();
    }
    operations
}

#[test]
fn register_checker_agrees_with_the_search_of_all_orders() {
    use register::{Action, check};
    compare(
        random_register,
        |history| check(history),
        |history| {
            let left: Vec<_> = history.iter().map(|o| (o.span, o.action)).collect();
            some_order(
                &None,
                &left,
                &|state: &Option<WriteId>, action| match action {
                    Action::Write(id) => Some(Some(*id)),
                    Action::Read(value) => (value == state).then_some(*state),
                },
            )
        },
    );
}

#[derive(Debug)]
struct Sequence {
    operations: Vec<sequence::Operation>,
    content: Vec<WriteId>,
}

/// A log if `is_log`, else a counter.
fn random_sequence(rng: &mut ChaCha8Rng, is_log: bool) -> Sequence {
    use sequence::{Action, Operation};
    let mut held = Vec::new();
    let mut operations = Vec::new();
    let mut content = Vec::new();
    for (n, (span, happens)) in spans(rng).into_iter().enumerate() {
        let n = n as u64;
        let length = held.len() as u64;
        if rng.random_bool(0.6) {
            held.extend(happens.then_some(id(n)));
            let position = span.is_answered().then_some(length + 1);
            let id = is_log.then(|| id(n));
            let action = Action::Add { id, position };
            operations.push(Operation { span, action });
        } else if span.is_answered() {
            content = if is_log { held.clone() } else { content };
            let action = Action::Read(length);
            operations.push(Operation { span, action });
        }
    }
    let mut history = Sequence {
        operations,
        content,
    };
    if rng.random_bool(0.5) {
        spoil(rng, &mut history, is_log);
    }
    history
}

fn spoil(rng: &mut ChaCha8Rng, history: &mut Sequence, is_log: bool) {
    use sequence::Action;
    let length = history.content.len();
    if is_log && length > 1 && rng.random_bool(0.5) {
        history.content.swap(0, length - 1);
        return;
    }
    let answers = history
        .operations
        .iter_mut()
        .filter_map(|o| match &mut o.action {
            Action::Add { position, .. } => position.as_mut(),
            // A log's read must stay within what was read of it.
            Action::Read(found) => (!is_log).then_some(found),
        });
    if let Some(last) = answers.last() {
        *last = rng.random_range(0..=4);
    }
}

fn sequence_is_possible(history: &Sequence, is_log: bool) -> bool {
    use sequence::Action;
    let left: Vec<_> = history
        .operations
        .iter()
        .map(|o| (o.span, o.action))
        .collect();
    let step = |held: &Vec<Option<WriteId>>, action: &Action| match *action {
        Action::Add { id, position } => {
            let mut after = held.clone();
            after.push(id);
            (position.is_none_or(|p| p == after.len() as u64)).then_some(after)
        }
        Action::Read(found) => {
            let same = held
                .iter()
                .zip(&history.content)
                .all(|(id, read)| *id == Some(*read));
            (found == held.len() as u64 && (same || !is_log)).then(|| held.clone())
        }
    };
    some_order(&Vec::new(), &left, &step)
}

#[test]
fn counter_checker_agrees_with_the_search_of_all_orders() {
    compare(
        |rng| random_sequence(rng, false),
        |history| sequence::check(&history.operations, &history.content),
        |history| sequence_is_possible(history, false),
    );
}

#[test]
fn log_checker_agrees_with_the_search_of_all_orders() {
    compare(
        |rng| random_sequence(rng, true),
        |history| sequence::check(&history.operations, &history.content),
        |history| sequence_is_possible(history, true),
    );
}

fn write(n: u64, call: u64) -> register::Operation {
    register::Operation {
        span: span(call, Some(call + 1)),
        action: register::Action::Write(id(n)),
    }
}

fn read(n: u64, call: u64) -> register::Operation {
    register::Operation {
        span: span(call, Some(call + 1)),
        action: register::Action::Read(Some(id(n))),
    }
}

#[test]
fn register_that_goes_back_for_good_has_lost_its_writes() {
    let history = [
        write(1, 0),
        read(1, 2),
        write(2, 4),
        write(3, 6),
        read(1, 8),
    ];
    let verdict = register::check(&history);
    assert_eq!((verdict.lost, verdict.contradictory), (2, 0), "{verdict:?}");
}

#[test]
fn register_that_goes_back_once_contradicts_itself() {
    let history = [write(1, 0), write(2, 4), read(1, 8), read(2, 10)];
    let verdict = register::check(&history);
    assert_eq!((verdict.lost, verdict.contradictory), (0, 1), "{verdict:?}");
}

fn add(position: u64, call: u64) -> sequence::Operation {
    sequence::Operation {
        span: span(call, Some(call + 1)),
        action: sequence::Action::Add {
            id: None,
            position: Some(position),
        },
    }
}

fn count(found: u64, call: u64) -> sequence::Operation {
    sequence::Operation {
        span: span(call, Some(call + 1)),
        action: sequence::Action::Read(found),
    }
}

#[test]
fn counter_that_goes_back_has_lost_what_it_counts_again() {
    let history = [
        add(1, 0),
        add(2, 2),
        add(3, 4),
        add(2, 6),
        add(3, 8),
        add(4, 10),
        count(4, 12),
    ];
    let verdict = sequence::check(&history, &[]);
    assert_eq!((verdict.lost, verdict.contradictory), (2, 0), "{verdict:?}");
    let history = [add(1, 0), add(2, 2), add(3, 4), count(1, 6)];
    let verdict = sequence::check(&history, &[]);
    assert_eq!((verdict.lost, verdict.contradictory), (2, 0), "{verdict:?}");
}

#[test]
fn counter_that_counts_one_twice_contradicts_itself() {
    let history = [add(1, 0), add(3, 2), count(3, 4)];
    let verdict = sequence::check(&history, &[]);
    assert_eq!((verdict.lost, verdict.contradictory), (0, 1), "{verdict:?}");
}

#[test]
fn log_without_an_acknowledged_addition_has_lost_it() {
    let add = |n, position, call| sequence::Operation {
        span: span(call, Some(call + 1)),
        action: sequence::Action::Add {
            id: Some(id(n)),
            position: Some(position),
        },
    };
    let history = [add(1, 1, 0), add(2, 2, 2), add(3, 2, 4), count(2, 6)];
    let verdict = sequence::check(&history, &[id(1), id(3)]);
    assert_eq!((verdict.lost, verdict.contradictory), (1, 0), "{verdict:?}");
}

#[test]
fn ids_are_read_only_as_they_are_written() {
    let id = WriteId {
        connection: 0xab,
        sequence: 0xc0ffee,
    };
    assert_eq!(id.to_string().len(), super::WRITE_ID_LENGTH);
    assert_eq!(id.to_string().parse(), Ok(id));
    for text in [
        "",
        "ab.c0ffee",
        "00AB.00c0ffee",
        "00ab.00c0ffee ",
        "00ab-00c0ffee",
    ] {
        assert_eq!(text.parse::<WriteId>(), Err(()), "{text}");
    }
}
