//! Tables as the kernel's build writes them, built here in each layout, are read back.

use super::*;

const BASE: u64 = 0xffff_ffff_8200_0000;
const TEXT: u64 = 0xffff_ffff_8100_0000;

/// Where the address table goes, and whether there is a sequence table.
#[derive(Clone, Copy)]
struct Layout {
    addresses_first: bool,
    sequences: bool,
}

fn names() -> Vec<(String, u64)> {
    let mut names = vec![
        (String::from("Dper_cpu_thing"), 0x40),
        (String::from("T_text"), TEXT),
    ];
    // More than two markers' worth, and one name that needs a two-byte length.
    names.extend((0..600).map(|i| (format!("tfunction_{i}"), TEXT + 16 * (i + 1))));
    names.push((format!("t{}", "long_".repeat(40)), TEXT + 0x10_0000));
    names
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Tokens: each printable character stands for itself, token 128 for `function_`.
fn tokens() -> (Vec<u8>, Vec<u8>) {
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for i in 0..=255u8 {
        index.extend(u16::try_from(table.len()).unwrap().to_le_bytes());
        match i {
            b'!'..=b'~' => table.push(i),
            128 => table.extend(b"function_"),
            _ => table.extend(b"??"),
        }
        table.push(0);
    }
    (table, index)
}

fn addresses_table(names: &[(String, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (_, addr) in names {
        let offset = if *addr < TEXT {
            addr.cast_signed()
        } else {
            -1 - (addr - TEXT).cast_signed()
        };
        out.extend(i32::try_from(offset).unwrap().to_le_bytes());
    }
    pad(&mut out);
    out.extend(TEXT.to_le_bytes());
    out
}

fn build(layout: Layout) -> Vec<u8> {
    let names = names();
    let mut out = vec![0xa5; 4096];
    if layout.addresses_first {
        out.extend(addresses_table(&names));
    }
    out.extend((names.len() as u64).to_le_bytes());
    let (mut markers, start) = (Vec::new(), out.len());
    for (i, (name, _)) in names.iter().enumerate() {
        if i % NAMES_PER_MARKER == 0 {
            markers.extend(u32::try_from(out.len() - start).unwrap().to_le_bytes());
        }
        let bytes = match name.strip_prefix("tfunction_") {
            Some(rest) => [b"t\x80", rest.as_bytes()].concat(),
            None => name.as_bytes().to_vec(),
        };
        let len = u16::try_from(bytes.len()).unwrap();
        if len < 128 {
            out.push(len.to_le_bytes()[0]);
        } else {
            out.extend([(len | 0x80).to_le_bytes()[0], (len >> 7).to_le_bytes()[0]]);
        }
        out.extend(bytes);
    }
    pad(&mut out);
    out.extend(markers);
    pad(&mut out);
    if layout.sequences {
        out.extend(vec![0x11; 3 * names.len()]);
        pad(&mut out);
    }
    let (table, index) = tokens();
    out.extend(table);
    pad(&mut out);
    out.extend(index);
    pad(&mut out);
    if !layout.addresses_first {
        out.extend(addresses_table(&names));
    }
    out.extend([0xa5; 4096]);
    out
}

const LAYOUTS: [Layout; 3] = [
    Layout {
        addresses_first: true,
        sequences: false,
    },
    Layout {
        addresses_first: true,
        sequences: true,
    },
    Layout {
        addresses_first: false,
        sequences: false,
    },
];

#[test]
fn each_layout_is_read_back() {
    for layout in LAYOUTS {
        let table = read(&build(layout), BASE, TEXT).unwrap();
        assert_eq!(table.all().len(), names().len());
        for (name, addr) in names() {
            assert_eq!(table.unique(&name[1..]), Some(addr), "{name}");
        }
        assert_eq!(table.all()[0].kind, b'D');
        assert_eq!(table.describe(TEXT + 0x23), "function_1+0x3");
        assert_eq!(table.room_at(TEXT), Some(16));
    }
}

#[test]
fn other_text_address_is_refused() {
    let error = read(&build(LAYOUTS[0]), BASE, TEXT + 0x1000).unwrap_err();
    assert!(matches!(error, SymbolError::NoOffsets { .. }), "{error}");
}

#[test]
fn damaged_names_are_refused() {
    let mut data = build(LAYOUTS[0]);
    let count = (names().len() as u64).to_le_bytes();
    let at = data.windows(8).position(|window| *window == count).unwrap();
    data[at + 8] += 1;
    let error = read(&data, BASE, TEXT).unwrap_err();
    assert!(matches!(error, SymbolError::NoNames { .. }), "{error}");
}

#[test]
fn data_without_tables_is_refused() {
    let error = read(&[0; 65536], BASE, TEXT).unwrap_err();
    assert!(matches!(error, SymbolError::NoTokenTable), "{error}");
}

#[test]
fn name_with_two_addresses_is_not_unique() {
    let symbol = |addr| Symbol {
        name: String::from("init"),
        addr,
        kind: b't',
    };
    let table = SymbolTable::new(vec![symbol(2), symbol(1)]);
    assert_eq!(table.unique("init"), None);
    assert_eq!(table.named("init").count(), 2);
}
