//! The notes in this test's own binary: what a tracer finds of the stations.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeMap;

use object::{Object, ObjectSection, ObjectSegment};
use usdt::{PROVIDER, Station};

struct Note {
    provider: String,
    name: String,
    arguments: String,
    pc: u64,
    base: u64,
    gate: u64,
}

fn notes(file: &object::File<'_>) -> Vec<Note> {
    let data = file
        .section_by_name(".note.stapsdt")
        .expect("the notes")
        .data()
        .unwrap();
    let mut notes = Vec::new();
    let mut at = 0;
    let align = |n: usize| n.next_multiple_of(4);
    while at < data.len() {
        let word = |n: usize| u32::from_le_bytes(data[at + n..at + n + 4].try_into().unwrap());
        let (name_len, desc_len) = (word(0) as usize, word(4) as usize);
        assert_eq!(word(8), 3);
        assert_eq!(&data[at + 12..at + 12 + name_len], b"stapsdt\0");
        let desc = at + 12 + align(name_len);
        let address =
            |n: usize| u64::from_le_bytes(data[desc + 8 * n..desc + 8 * n + 8].try_into().unwrap());
        let mut texts = data[desc + 24..desc + desc_len].split(|b| *b == 0);
        let mut text = || String::from_utf8(texts.next().unwrap().to_vec()).unwrap();
        notes.push(Note {
            provider: text(),
            name: text(),
            arguments: text(),
            pc: address(0),
            base: address(1),
            gate: address(2),
        });
        at = desc + align(desc_len);
    }
    notes
}

fn bytes_at(file: &object::File<'_>, address: u64, count: u64) -> Vec<u8> {
    let segments = file.segments();
    let mut found = segments.filter_map(|s| s.data_range(address, count).ok().flatten());
    found
        .next()
        .unwrap_or_else(|| panic!("{address:#x} is not loaded from the file"))
        .to_vec()
}

#[test]
fn every_station_has_a_note_with_a_hook_and_a_gate() {
    for function in [usdt::appended, usdt::kicked, usdt::sent, usdt::received] {
        function(1, 2, 3);
    }
    for function in [
        usdt::committed,
        usdt::acknowledged,
        usdt::seen,
        usdt::released,
    ] {
        function(1, 2, 3);
    }
    let binary = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let file = object::File::parse(binary.as_slice()).unwrap();
    let mut gates = BTreeMap::new();
    for note in notes(&file) {
        assert_eq!(note.provider, PROVIDER);
        assert_eq!(note.arguments, "8@%rdi 8@%rsi 8@%rdx 8@%r8");
        assert_eq!(note.base, 0);
        assert_eq!(
            bytes_at(&file, note.pc, 5),
            [0x0f, 0x1f, 0x44, 0, 0],
            "a 5-byte no-op"
        );
        assert_eq!(bytes_at(&file, note.gate, 2), [0, 0], "a closed gate");
        gates.insert(note.name, note.gate);
    }
    let names: Vec<&str> = Station::ALL.iter().map(|s| s.name()).collect();
    let mut found: Vec<&str> = gates.keys().map(String::as_str).collect();
    found.sort_by_key(|name| names.iter().position(|n| n == name));
    assert_eq!(found, names);
    let distinct: std::collections::BTreeSet<u64> = gates.values().copied().collect();
    assert_eq!(
        distinct.len(),
        names.len(),
        "each station has a gate of its own"
    );
}
