//! Reads the kernel's own symbol table (kallsyms) out of an image.
//!
//! A Debian kernel file has no ELF symbol table and its System.map is not shipped, but with
//! CONFIG_KALLSYMS every kernel carries compressed names and addresses (scripts/kallsyms.c). Nothing
//! says where; the tables are found by their structure, from the one that looks like nothing else:
//!
//! ```text
//! 6.1:  offsets  relative_base  num_syms  names  markers  [seqs_of_names]  token_table  token_index
//! 6.4:  num_syms  names  markers  token_table  token_index  offsets  relative_base  seqs_of_names
//! ```
//!
//! Later 6.1.y releases have the table of sequence numbers, earlier ones do not. Each part starts on
//! eight bytes. What always holds: the names agree with all the markers, and
//! `_text` is where the text section starts; otherwise there is an error and no table.

use crate::bytes::{i32_at, u16_at, u32_at, u64_at};
use crate::error::SymbolError;

/// Each marker stands for this many names.
const NAMES_PER_MARKER: usize = 256;
/// Most symbols that are accepted; Debian's kernels have about 150 thousand.
const MAX_SYMBOLS: usize = 4 << 20;
/// The names with their markers and sequence table lie within this distance of the token table.
const MAX_NAMES_BYTES: usize = 64 << 20;

/// One symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// Its name.
    pub name: String,
    /// Its virtual address; per-CPU symbols have small ones.
    pub addr: u64,
    /// Its type as `nm` shows it (`t` and `T` are code).
    pub kind: u8,
}

/// All symbols of an image.
#[derive(Debug)]
pub struct SymbolTable {
    /// Sorted by address.
    symbols: Vec<Symbol>,
    /// Indices into `symbols`, sorted by name.
    by_name: Vec<u32>,
}

impl SymbolTable {
    /// Builds the table. The order of symbols with one address is kept.
    pub(crate) fn new(mut symbols: Vec<Symbol>) -> Self {
        symbols.sort_by_key(|symbol| symbol.addr);
        let mut by_name: Vec<u32> = (0u32..).take(symbols.len()).collect();
        by_name.sort_by(|a, b| symbols[*a as usize].name.cmp(&symbols[*b as usize].name));
        SymbolTable { symbols, by_name }
    }

    /// All symbols, by address.
    pub fn all(&self) -> &[Symbol] {
        &self.symbols
    }

    /// All symbols of that name: static functions may share one.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Symbol> {
        let symbol = |index: &u32| &self.symbols[*index as usize];
        let first = self
            .by_name
            .partition_point(|index| symbol(index).name.as_str() < name);
        self.by_name[first..]
            .iter()
            .map(symbol)
            .take_while(move |found| found.name == name)
    }

    /// Address of the symbol of that name; `None` if there is none, or more than one address.
    pub fn unique(&self, name: &str) -> Option<u64> {
        let mut found = self.named(name).map(|symbol| symbol.addr);
        let first = found.next()?;
        found.all(|addr| addr == first).then_some(first)
    }

    /// Bytes from `addr` to the next higher symbol.
    pub fn room_at(&self, addr: u64) -> Option<u64> {
        let next = self.symbols.partition_point(|symbol| symbol.addr <= addr);
        self.symbols.get(next).map(|symbol| symbol.addr - addr)
    }

    /// The symbol that `addr` belongs to, as `name+0x12`.
    pub fn describe(&self, addr: u64) -> String {
        let after = self.symbols.partition_point(|symbol| symbol.addr <= addr);
        match after.checked_sub(1).map(|index| &self.symbols[index]) {
            None => format!("{addr:#x}"),
            Some(symbol) if symbol.addr == addr => symbol.name.clone(),
            Some(symbol) => format!("{}+{:#x}", symbol.name, addr - symbol.addr),
        }
    }
}

/// Reads the tables. `data` is a range of the image in which they are whole, `base` the virtual
/// address of its first byte, `text` that of the text section.
pub(crate) fn read(data: &[u8], base: u64, text: u64) -> Result<SymbolTable, SymbolError> {
    let tokens = TokenTable::find(data).ok_or(SymbolError::NoTokenTable)?;
    let names = Names::find(data, tokens.start).ok_or(SymbolError::NoNames {
        token_table: base + tokens.start as u64,
    })?;
    let decoded = tokens.decode_all(data, &names);
    let count = names.count;
    let after_index = align_up(tokens.index + 512, 8);
    let layout_61 = names
        .count_at
        .checked_sub(8)
        .and_then(|base_at| Some((base_at.checked_sub(align_up(4 * count, 8))?, base_at)));
    let layout_64 = Some((after_index, align_up(after_index + 4 * count, 8)));
    for (offsets, relative_base) in [layout_61, layout_64].into_iter().flatten() {
        let Some(addresses) = addresses(data, offsets, relative_base, count) else {
            continue;
        };
        let right = |((_, name), addr): (&(u8, String), &u64)| name == "_text" && *addr == text;
        if !decoded.iter().zip(&addresses).any(right) {
            continue;
        }
        let symbols = decoded.into_iter().zip(addresses);
        return Ok(SymbolTable::new(
            symbols
                .map(|((kind, name), addr)| Symbol { name, addr, kind })
                .collect(),
        ));
    }
    Err(SymbolError::NoOffsets {
        symbols: count,
        text,
    })
}

/// `kallsyms_token_table` and `kallsyms_token_index`.
struct TokenTable<'a> {
    /// Offset of the token strings.
    start: usize,
    /// Offset of the 256 indices.
    index: usize,
    tokens: Vec<&'a [u8]>,
}

impl<'a> TokenTable<'a> {
    /// The index is 256 rising 16-bit offsets, from zero, to as many strings that end just before it.
    fn find(data: &'a [u8]) -> Option<Self> {
        (0..data.len().saturating_sub(511))
            .step_by(8)
            .find_map(|index| Self::at(data, index))
    }

    fn at(data: &'a [u8], index: usize) -> Option<Self> {
        let entry = |i: usize| u16_at(data, index + 2 * i).map(usize::from);
        if entry(0)? != 0 || entry(1)? < 2 {
            return None;
        }
        for i in 1..256 {
            // A token has at least one character and its final zero.
            if entry(i)? < entry(i - 1)? + 2 {
                return None;
            }
        }
        let last = entry(255)?;
        // The last string, its final zero and padding to eight bytes lie between.
        let earliest = index.checked_sub(last + 64)?;
        let latest = index.checked_sub(last + 2)?;
        (align_up(earliest, 8)..=latest)
            .step_by(8)
            .find_map(|start| {
                let tokens = (0..256)
                    .map(|i| {
                        let from = start + entry(i)?;
                        let until = if i == 255 {
                            index
                        } else {
                            start + entry(i + 1)?
                        };
                        let bytes = data.get(from..until)?;
                        let end = bytes.iter().position(|byte| *byte == 0)?;
                        let (token, rest) = bytes.split_at(end);
                        let well_formed = !token.is_empty()
                            && token.iter().all(u8::is_ascii_graphic)
                            && if i == 255 {
                                rest.len() <= 8
                            } else {
                                rest.len() == 1
                            }
                            && rest.iter().all(|byte| *byte == 0);
                        well_formed.then_some(token)
                    })
                    .collect::<Option<Vec<_>>>()?;
                Some(TokenTable {
                    start,
                    index,
                    tokens,
                })
            })
    }

    /// Expands every name; its first character is the symbol's type.
    fn decode_all(&self, data: &[u8], names: &Names) -> Vec<(u8, String)> {
        let mut at = names.start;
        let mut out = Vec::with_capacity(names.count);
        let mut text = Vec::new();
        for _ in 0..names.count {
            let Some((prefix, length)) = name_length(data, at) else {
                break;
            };
            text.clear();
            for byte in &data[at + prefix..at + prefix + length] {
                text.extend_from_slice(self.tokens[usize::from(*byte)]);
            }
            let (kind, name) = text.split_first().unwrap_or((&b'?', &[]));
            out.push((*kind, String::from_utf8_lossy(name).into_owned()));
            at += prefix + length;
        }
        out
    }
}

/// `kallsyms_num_syms`, `kallsyms_names` and `kallsyms_markers`.
struct Names {
    /// Offset of the number of symbols.
    count_at: usize,
    count: usize,
    /// Offset of the first name.
    start: usize,
    /// Offset of the first marker: the position of each 256th name, in 32 bits.
    markers: usize,
}

impl Names {
    /// The nearest place before the token table where a number is followed by so many names, these
    /// by markers that agree with all of them, and those, with or without the sequence table, by the
    /// token table.
    fn find(data: &[u8], token_table: usize) -> Option<Self> {
        let earliest = token_table.saturating_sub(MAX_NAMES_BYTES);
        let mut count_at = token_table.checked_sub(8)? & !7;
        while count_at > earliest {
            count_at -= 8;
            let count = u32_at(data, count_at)? as usize;
            if u32_at(data, count_at + 4)? != 0 || !(1..=MAX_SYMBOLS).contains(&count) {
                continue;
            }
            for sequences in [0, align_up(3 * count, 8)] {
                let found = Self::at(data, count_at, count, token_table.saturating_sub(sequences));
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    fn at(data: &[u8], count_at: usize, count: usize, markers_end: usize) -> Option<Self> {
        let start = count_at + 8;
        let markers = markers_end.checked_sub(4 * count.div_ceil(NAMES_PER_MARKER))? & !7;
        let names = Names {
            count_at,
            count,
            start,
            markers,
        };
        // A name takes two bytes or more.
        let plausible = markers >= start + 2 * count && u32_at(data, markers)? == 0;
        (plausible && names.agree(data)).then_some(names)
    }

    fn agree(&self, data: &[u8]) -> bool {
        let mut at = self.start;
        for i in 0..self.count {
            if i % NAMES_PER_MARKER == 0 {
                let marker = u32_at(data, self.markers + 4 * (i / NAMES_PER_MARKER));
                if marker.map(|marker| marker as usize) != Some(at - self.start) {
                    return false;
                }
            }
            match name_length(data, at) {
                Some((prefix, length)) if at + prefix + length <= self.markers => {
                    at += prefix + length
                }
                _ => return false,
            }
        }
        self.markers - at < 8
    }
}

/// Length of a compressed name: seven bits, or fourteen if the top bit is set (since 6.1).
fn name_length(data: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = usize::from(*data.get(at)?);
    let (prefix, length) = if low & 0x80 == 0 {
        (1, low)
    } else {
        (2, low & 0x7f | usize::from(*data.get(at + 1)?) << 7)
    };
    (length > 0 && at + prefix + length <= data.len()).then_some((prefix, length))
}

/// With CONFIG_KALLSYMS_ABSOLUTE_PERCPU an offset of zero or more is an absolute address (per-CPU
/// symbols), a negative one counts down from the base: `base - 1 - offset`.
fn addresses(data: &[u8], offsets: usize, base_at: usize, count: usize) -> Option<Vec<u64>> {
    let base = u64_at(data, base_at)?;
    (0..count)
        .map(|i| {
            let offset = i64::from(i32_at(data, offsets + 4 * i)?);
            Some(if offset >= 0 {
                offset.cast_unsigned()
            } else {
                base.wrapping_sub(1).wrapping_sub(offset.cast_unsigned())
            })
        })
        .collect()
}

fn align_up(value: usize, to: usize) -> usize {
    value.next_multiple_of(to)
}

#[cfg(test)]
#[path = "kallsyms_tests.rs"]
mod tests;
