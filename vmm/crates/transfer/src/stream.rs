//! The container: writer and reader side by side, so that they cannot drift.
//!
//! Header: `PLXS`, version (u16), zero (u16). Record: kind (u8), three zero bytes, length (u32), CRC32C
//! of the payload (u32), payload. Kinds: 1 section (tag length u8, tag, schema u32, bytes), 2 pages
//! (first page number u64, then whole pages), 3 end (empty). All numbers are little-endian.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, MAX_RUN_PAGES, MAX_SECTION_LEN, PAGE_LEN, VERSION};

const MAGIC: [u8; 4] = *b"PLXS";
const SECTION: u8 = 1;
const PAGES: u8 = 2;
const END: u8 = 3;

/// Writes saved state.
pub struct Writer<W: Write> {
    out: W,
    run_first: u64,
    run: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a stream on `out`.
    ///
    /// # Errors
    /// `out` failed.
    pub fn new(mut out: W) -> Result<Self, Error> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&[0; 2])?;
        Ok(Self {
            out,
            run_first: 0,
            run: Vec::with_capacity(MAX_RUN_PAGES * PAGE_LEN),
        })
    }

    fn record(out: &mut W, kind: u8, parts: &[&[u8]]) -> Result<(), Error> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).map_err(|_| Error::Damaged("a record over 4 GiB"))?;
        let crc = parts
            .iter()
            .fold(0, |crc, part| format::crc32c_append(crc, part));
        out.write_all(&[kind, 0, 0, 0])?;
        out.write_all(&len.to_le_bytes())?;
        out.write_all(&crc.to_le_bytes())?;
        for part in parts {
            out.write_all(part)?;
        }
        Ok(())
    }

    /// Writes one component's state under `tag` (1 to 255 bytes).
    ///
    /// # Errors
    /// The stream failed, or the section is over its limit.
    pub fn section(&mut self, tag: &str, schema: u32, state: &impl Serialize) -> Result<(), Error> {
        self.flush_run()?;
        let bytes = postcard::to_stdvec(state).map_err(|source| Error::Decode {
            tag: tag.to_owned(),
            source,
        })?;
        if bytes.len() > MAX_SECTION_LEN {
            return Err(Error::Damaged("a section over its limit"));
        }
        let tag_len =
            u8::try_from(tag.len()).map_err(|_| Error::Damaged("a tag over 255 bytes"))?;
        let parts = [
            &[tag_len][..],
            tag.as_bytes(),
            &schema.to_le_bytes(),
            &bytes,
        ];
        Self::record(&mut self.out, SECTION, &parts)
    }

    /// Adds the page with number `page` (address divided by 4096); a page of zeros is left out.
    ///
    /// # Errors
    /// The stream failed.
    pub fn page(&mut self, page: u64, bytes: &[u8]) -> Result<(), Error> {
        assert_eq!(bytes.len(), PAGE_LEN, "a page has {PAGE_LEN} bytes");
        if is_zero(bytes) {
            return Ok(());
        }
        let follows = self.run_first + (self.run.len() / PAGE_LEN) as u64 == page;
        if !follows || self.run.len() == MAX_RUN_PAGES * PAGE_LEN {
            self.flush_run()?;
        }
        if self.run.is_empty() {
            self.run_first = page;
        }
        self.run.extend_from_slice(bytes);
        Ok(())
    }

    fn flush_run(&mut self) -> Result<(), Error> {
        if !self.run.is_empty() {
            let first = self.run_first.to_le_bytes();
            Self::record(&mut self.out, PAGES, &[&first, &self.run])?;
            self.run.clear();
        }
        Ok(())
    }

    /// Has all that was written so far on its way.
    ///
    /// # Errors
    /// The stream failed.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.flush_run()?;
        Ok(self.out.flush()?)
    }

    /// Writes the end record and hands the stream back, flushed.
    ///
    /// # Errors
    /// The stream failed.
    pub fn finish(mut self) -> Result<W, Error> {
        self.flush_run()?;
        Self::record(&mut self.out, END, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(32).all(|chunk| chunk == [0; 32])
}

/// What a stream holds next.
#[derive(Debug)]
pub enum Item<'a> {
    /// One component's state.
    Section(Section<'a>),
    /// Whole pages one after another, the first one's number with them.
    Pages {
        /// Number of the first page.
        first: u64,
        /// Their bytes: a multiple of [`PAGE_LEN`].
        bytes: &'a [u8],
    },
}

/// One component's state, not yet decoded.
#[derive(Debug)]
pub struct Section<'a> {
    /// Which component.
    pub tag: &'a str,
    /// The schema that it was written under.
    pub schema: u32,
    bytes: &'a [u8],
}

impl Section<'_> {
    /// The state as it is encoded.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// Decodes the section, whose schema must be `known`.
    ///
    /// # Errors
    /// Another schema, or bytes that do not decode.
    pub fn decode<T: DeserializeOwned>(&self, known: u32) -> Result<T, Error> {
        if self.schema != known {
            return Err(Error::Schema {
                tag: self.tag.to_owned(),
                found: self.schema,
                known,
            });
        }
        match postcard::take_from_bytes(self.bytes) {
            Ok((state, [])) => Ok(state),
            Ok(_) => Err(Error::Damaged("bytes after a section's state")),
            Err(source) => Err(Error::Decode {
                tag: self.tag.to_owned(),
                source,
            }),
        }
    }
}

/// Reads saved state.
pub struct Reader<R: Read> {
    input: R,
    payload: Vec<u8>,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header of a stream.
    ///
    /// # Errors
    /// `input` failed or is no saved state of this version.
    pub fn new(mut input: R) -> Result<Self, Error> {
        let mut header = [0; 8];
        input
            .read_exact(&mut header)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Error::Magic,
                _ => error.into(),
            })?;
        if header[..4] != MAGIC {
            return Err(Error::Magic);
        }
        let found = u16::from_le_bytes([header[4], header[5]]);
        if found != VERSION {
            return Err(Error::Version { found });
        }
        Ok(Self {
            input,
            payload: Vec::new(),
            ended: false,
        })
    }

    /// The next record; `None` after the end record.
    ///
    /// # Errors
    /// The stream failed, is damaged or is cut short.
    pub fn next_item(&mut self) -> Result<Option<Item<'_>>, Error> {
        if self.ended {
            return Ok(None);
        }
        let mut header = [0; 12];
        self.fill(&mut header)?;
        let kind = header[0];
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let crc = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let limit = match kind {
            SECTION => MAX_SECTION_LEN + 260,
            PAGES => MAX_RUN_PAGES * PAGE_LEN + 8,
            END => 0,
            _ => return Err(Error::Damaged("a record of unknown kind")),
        };
        if len > limit {
            return Err(Error::Damaged("a record over its limit"));
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(len, 0);
        let filled = self.fill(&mut payload);
        self.payload = payload;
        filled?;
        if format::crc32c(&self.payload) != crc {
            return Err(Error::Damaged("a record's checksum"));
        }
        match kind {
            SECTION => section(&self.payload).map(|section| Some(Item::Section(section))),
            PAGES => pages(&self.payload).map(Some),
            _ => {
                self.ended = true;
                Ok(None)
            }
        }
    }

    /// What follows the end record, where more than saved state is in the stream.
    #[must_use]
    pub fn into_inner(self) -> R {
        self.input
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        self.input
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Error::Cut,
                _ => error.into(),
            })
    }
}

fn section(payload: &[u8]) -> Result<Section<'_>, Error> {
    let short = Error::Damaged("a section too short for its tag");
    let Some((&tag_len, rest)) = payload.split_first() else {
        return Err(short);
    };
    let Some((tag, rest)) = rest.split_at_checked(tag_len.into()) else {
        return Err(short);
    };
    let Some((schema, bytes)) = rest.split_first_chunk() else {
        return Err(short);
    };
    let tag = str::from_utf8(tag).map_err(|_| Error::Damaged("a tag that is not UTF-8"))?;
    Ok(Section {
        tag,
        schema: u32::from_le_bytes(*schema),
        bytes,
    })
}

fn pages(payload: &[u8]) -> Result<Item<'_>, Error> {
    match payload.split_first_chunk() {
        Some((first, bytes)) if !bytes.is_empty() && bytes.len() % PAGE_LEN == 0 => {
            Ok(Item::Pages {
                first: u64::from_le_bytes(*first),
                bytes,
            })
        }
        _ => Err(Error::Damaged("a run that is not whole pages")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE_LEN]
    }

    fn stream() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.section("vcpu", 3, &(7u32, "state")).unwrap();
        for number in [5u64, 6, 7, 9] {
            writer.page(number, &page(number as u8)).unwrap();
        }
        writer.page(10, &page(0)).unwrap();
        writer.section("board", 1, &vec![1u8, 2]).unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<String>, Error> {
        let mut reader = Reader::new(bytes)?;
        let mut seen = Vec::new();
        while let Some(item) = reader.next_item()? {
            seen.push(match item {
                Item::Section(section) => format!("{} {}", section.tag, section.schema),
                Item::Pages { first, bytes } => format!("{first}+{}", bytes.len() / PAGE_LEN),
            });
        }
        Ok(seen)
    }

    #[test]
    fn sections_and_runs_come_back_in_order_without_zero_pages() {
        assert_eq!(
            read(&stream()).unwrap(),
            ["vcpu 3", "5+3", "9+1", "board 1"]
        );
    }

    #[test]
    fn a_section_decodes_under_its_own_schema_only() {
        let bytes = stream();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        let Some(Item::Section(section)) = reader.next_item().unwrap() else {
            panic!("no section")
        };
        assert!(matches!(
            section.decode::<(u32, String)>(4),
            Err(Error::Schema { found: 3, .. })
        ));
        assert_eq!(
            section.decode::<(u32, String)>(3).unwrap(),
            (7, "state".to_owned())
        );
        assert!(section.decode::<u8>(3).is_err(), "bytes left over");
    }

    #[test]
    fn a_cut_stream_is_never_taken_for_a_whole_one() {
        let bytes = stream();
        for len in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
            assert!(read(&bytes[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let bytes = stream();
        for at in (0..bytes.len()).step_by(61) {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            let harmless = (6..8).contains(&at) || bad[..at].is_empty() && at > 8;
            assert!(
                harmless || read(&bad).is_err() || is_padding(&bytes, at),
                "byte {at}"
            );
        }
    }

    /// The three bytes after a record's kind are reserved and not looked at.
    fn is_padding(bytes: &[u8], at: usize) -> bool {
        let mut start = 8;
        while start < bytes.len() {
            if (start + 1..start + 4).contains(&at) {
                return true;
            }
            let len = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap()) as usize;
            start += 12 + len;
        }
        false
    }
}
