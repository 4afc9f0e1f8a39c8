//! docs/protocol.md against the code: its tables name all that there is, and nothing else.

use std::collections::BTreeSet;

use ft::{DetectorConfig, Timings};

const DOCUMENT: &str = include_str!("../../../../docs/protocol.md");

/// The rows of the table under a heading, cell by cell.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let section = DOCUMENT.split(&format!("\n## {heading}\n")).nth(1);
    let section = section.unwrap_or_else(|| panic!("no section {heading}"));
    let section = section.split("\n## ").next().expect("a first part");
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let cells = |row: &'static str| row.trim_matches('|').split('|').map(str::trim).collect();
    let rows: Vec<_> = rows.skip(1).map(cells).collect();
    assert!(rows.len() > 5, "{heading}: {rows:?}");
    rows
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The variants of an enum, by its source.
fn variants(source: &'static str, name: &str) -> BTreeSet<&'static str> {
    let body = source
        .split(&format!("pub enum {name} {{\n"))
        .nth(1)
        .expect("the enum stands there");
    let body = body.split("\n}").next().expect("a first part");
    let lines = body.lines().filter_map(|line| line.strip_prefix("    "));
    lines
        .filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))
        .map(|line| {
            line.split(|c: char| !c.is_alphanumeric())
                .next()
                .expect("a name")
        })
        .collect()
}

fn first_column(heading: &str) -> BTreeSet<&'static str> {
    let rows = table(heading).into_iter();
    rows.flat_map(|row| quoted(row[0]).collect::<Vec<_>>())
        .collect()
}

#[test]
fn every_row_of_the_failure_table_names_a_test_that_exists() {
    let tests = [include_str!("failover.rs"), include_str!("cold_start.rs")].concat();
    let rows = table("When something fails");
    assert!(rows.len() > 20);
    for row in rows {
        let name = quoted(row[2]).next();
        let name = name.unwrap_or_else(|| panic!("no test in {row:?}"));
        assert!(tests.contains(&format!("fn {name}()")), "no test {name}");
    }
}

#[test]
fn the_tables_name_every_event_and_every_action() {
    let events = variants(include_str!("../src/event.rs"), "Event");
    assert!(events.len() > 20, "{events:?}");
    assert_eq!(first_column("Events"), events);
    let actions = variants(include_str!("../src/action.rs"), "Action");
    assert!(actions.len() > 20, "{actions:?}");
    assert_eq!(first_column("Actions"), actions);
    for row in table("Actions") {
        for answer in quoted(row[2]) {
            assert!(events.contains(answer), "{answer} is no event");
        }
    }
}

#[test]
fn the_table_of_states_names_every_state() {
    let sources = [
        include_str!("../src/boot.rs"),
        include_str!("../src/primary/mod.rs"),
        include_str!("../src/primary/link.rs"),
        include_str!("../src/backup/mod.rs"),
        include_str!("../src/replica.rs"),
    ];
    let lines = sources.iter().flat_map(|source| source.lines());
    // `Stage::Blocked { .. } => "blocked",` and `Role::Ended => (RoleName::Ended, "ended"),`
    let arm = |line: &'static str| {
        let (_, arm) = line.split_once("=> ")?;
        let name = match arm.strip_prefix("(RoleName::") {
            Some(pair) => pair.split_once(", \"")?.1,
            None => arm.strip_prefix('"')?,
        };
        name.split('"').next()
    };
    let names: BTreeSet<_> = lines.filter_map(arm).collect();
    assert!(names.len() > 15, "{names:?}");
    let rows = table("States").into_iter();
    let listed: BTreeSet<_> = rows
        .flat_map(|row| quoted(row[1]).collect::<Vec<_>>())
        .collect();
    assert_eq!(listed, names);
}

#[test]
fn the_table_of_timers_has_every_timer_and_its_default() {
    let all = format!("{:?}, {:?}", Timings::default(), DetectorConfig::default());
    let fields = all
        .split(['{', '}', ','])
        .filter_map(|field| field.split_once(": "));
    let fields: Vec<_> = fields
        .map(|(name, value)| (name.trim(), value.trim()))
        .collect();
    assert!(fields.len() > 15, "{fields:?}");
    let mut listed = Vec::new();
    for row in table("Timers") {
        listed.extend(quoted(row[0]).zip(row[1].split(", ")));
    }
    assert_eq!(listed, fields);
}
