//! docs/protocol.md names a test for each row of its table of failures: the tests exist.

#[test]
fn every_row_of_the_failure_table_names_a_test_that_exists() {
    let document = include_str!("../../../../docs/protocol.md");
    let tests = [include_str!("failover.rs"), include_str!("cold_start.rs")].concat();
    let section = document.split("## When something fails").nth(1).unwrap();
    let section = section.split("## Kinds of storage").next().unwrap();
    let rows: Vec<_> = section
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1)
        .collect();
    assert!(rows.len() > 20);
    for row in rows {
        let name = row
            .split('`')
            .nth(1)
            .unwrap_or_else(|| panic!("no test in {row}"));
        assert!(tests.contains(&format!("fn {name}()")), "no test {name}");
    }
}
