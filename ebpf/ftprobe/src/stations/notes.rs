//! The trace points of a program, from the notes in its file (format of SystemTap's sys/sdt.h).

use std::fs::File;
use std::path::{Path, PathBuf};

use object::read::{ReadCache, ReadRef};
use object::{Object, ObjectSection, ObjectSegment, SectionKind};
use thiserror::Error;
use usdt::{PROVIDER, Station};

const SECTION: &str = ".note.stapsdt";
const NOTE_TYPE: u32 = 3;
/// Bytes of a note's sizes and type.
const HEAD: usize = 12;

/// One trace point, as offsets in the program's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// Whose.
    pub station: Station,
    /// Of the no-op.
    pub hook: u64,
    /// Of the gate, raised while somebody listens.
    pub gate: u64,
}

/// Why the trace points of a program cannot be read.
#[derive(Debug, Error)]
pub enum NoteError {
    /// The file.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no program, or its notes are damaged.
    #[error("{}: {what}", path.display())]
    Format {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// The trace points of the program in a file; none if it is another's program.
///
/// # Errors
/// [`NoteError`].
pub fn notes_of(path: &Path) -> Result<Vec<Note>, NoteError> {
    let file = File::open(path).map_err(|source| NoteError::File {
        path: path.to_owned(),
        source,
    })?;
    let cache = ReadCache::new(file);
    read(&cache).map_err(|what| NoteError::Format {
        path: path.to_owned(),
        what,
    })
}

fn read<'a>(data: impl ReadRef<'a>) -> Result<Vec<Note>, String> {
    let file = object::File::parse(data).map_err(|e| e.to_string())?;
    let Some(section) = file.section_by_name(SECTION) else {
        return Ok(Vec::new());
    };
    let bytes = section.data().map_err(|e| e.to_string())?;
    let mut notes = Vec::new();
    for (name, hook, gate) in raw_notes(bytes)? {
        let Some(station) = Station::ALL.into_iter().find(|s| s.name() == name) else {
            continue;
        };
        // The linker keeps the notes of code that it has left out, with addresses in a function at 0.
        if !is_code(&file, hook) {
            continue;
        }
        let offset = |address| {
            file.segments()
                .find_map(|segment| {
                    let (at, _) = segment.file_range();
                    let inside = address >= segment.address()
                        && address < segment.address() + segment.size();
                    inside.then(|| address - segment.address() + at)
                })
                .ok_or_else(|| format!("{name}: {address:#x} is in no segment"))
        };
        notes.push(Note {
            station,
            hook: offset(hook)?,
            gate: offset(gate)?,
        });
    }
    Ok(notes)
}

fn is_code<'a>(file: &object::File<'a, impl ReadRef<'a>>, address: u64) -> bool {
    file.sections().any(|section| {
        let inside = section.address()..section.address() + section.size();
        section.kind() == SectionKind::Text && inside.contains(&address)
    })
}

/// Names and addresses in the notes of our provider.
fn raw_notes(bytes: &[u8]) -> Result<Vec<(&str, u64, u64)>, String> {
    const CUT: &str = "a note is cut off";
    let mut found = Vec::new();
    let mut rest = bytes;
    while rest.len() >= HEAD {
        let word = |at: usize| {
            let word = rest[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(word) as usize
        };
        let name_bytes = word(0).next_multiple_of(4);
        let (desc_at, desc_bytes) = (HEAD + name_bytes, word(4));
        let desc = rest.get(desc_at..desc_at + desc_bytes).ok_or(CUT)?;
        if word(8) == NOTE_TYPE as usize {
            let address = |n: usize| -> Result<u64, String> {
                let bytes = desc.get(8 * n..).and_then(<[u8]>::first_chunk);
                Ok(u64::from_le_bytes(*bytes.ok_or(CUT)?))
            };
            let mut texts = desc.get(24..).ok_or(CUT)?.split(|b| *b == 0);
            let mut text = || std::str::from_utf8(texts.next().unwrap_or_default()).unwrap_or("");
            let (provider, name) = (text(), text());
            if provider == PROVIDER {
                found.push((name, address(0)?, address(2)?));
            }
        }
        let next = desc_at + desc_bytes.next_multiple_of(4);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_note_is_an_error_and_a_strangers_is_passed_over() {
        let mut note = Vec::new();
        for word in [8_u32, 24 + 7 + 2 + 1, 3] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"stapsdt\0");
        for address in [0x100_u64, 0, 0x200] {
            note.extend(address.to_le_bytes());
        }
        let whole = |provider: &[u8]| [&note[..], provider, b"x\0\0", &[0; 4]].concat();
        assert_eq!(
            raw_notes(&whole(b"pollux\0")).unwrap(),
            [("x", 0x100, 0x200)]
        );
        assert_eq!(raw_notes(&whole(b"others\0")).unwrap(), []);
        let cut = whole(b"pollux\0");
        assert!(raw_notes(&cut[..40]).is_err());
    }

    #[test]
    fn a_program_without_trace_points_has_none() {
        assert_eq!(notes_of(Path::new("/bin/true")).unwrap(), []);
        assert!(notes_of(Path::new("/etc/passwd")).is_err());
        assert!(notes_of(Path::new("/nowhere")).is_err());
    }
}
