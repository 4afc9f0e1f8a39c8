//! Any bytes as a log: as frames that come from outside, and, since checksums stop nearly all of those, as the
//! body of frames that are whole. Nothing panics; what decodes encodes to something that decodes to the same; what was
//! cut off the end of a log takes nothing from before the cut.

#![no_main]

use format::{
    Assembler, Entry, EntryReader, Epoch, Event, FrameFlags, FrameHeader, FrameReader, Seq, SessionId, Tail,
};

/// The largest entry in parts that is put together here.
const LIMIT: u64 = 1 << 16;

fn entries(body: &[u8]) {
    let mut parts = Assembler::new(LIMIT);
    for entry in EntryReader::new(body) {
        let Ok(entry) = entry else { return };
        same_again(&entry);
        let Event::Part(header, data) = entry.event else { continue };
        if parts.push(entry.exit, header, data) == Ok(true)
            && let Ok(whole) = parts.whole()
        {
            same_again(&whole);
        }
    }
}

fn same_again(entry: &Entry<'_>) {
    let mut encoded = Vec::new();
    entry.encode(&mut encoded);
    assert_eq!(encoded.len(), entry.encoded_len());
    let mut rest = encoded.as_slice();
    let again = Entry::decode_bounded(&mut rest, LIMIT).expect("what was encoded decodes");
    assert!(rest.is_empty());
    assert_eq!(again, *entry);
}

/// The bodies of the frames, and whether the log ends with a cut or a close.
fn frames(log: &[u8]) -> (Vec<&[u8]>, Option<Tail>) {
    let mut reader = FrameReader::new(log);
    let mut bodies = Vec::new();
    while let Ok(Some(frame)) = reader.next_frame() {
        entries(frame.body);
        bodies.push(frame.body);
    }
    assert!(reader.offset() <= log.len());
    (bodies, reader.tail().cloned())
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    frames(data);
    entries(data);

    let Some((cut, data)) = data.split_first_chunk::<2>() else { return };
    let mut log = Vec::new();
    let mut sent = Vec::new();
    for (index, body) in data.chunks(64).take(8).enumerate() {
        let header = FrameHeader {
            flags: FrameFlags::default(),
            session: SessionId([7; 16]),
            epoch: Epoch(3),
            first: Seq(index as u64),
            stamp_ns: 0,
            count: 1,
            body_len: 0,
        };
        format::encode_frame(header, body, &mut log);
        sent.push((log.len(), body));
    }
    let cut = usize::from(u16::from_le_bytes(*cut)) % (log.len() + 1);
    let whole: Vec<_> = sent.iter().filter(|(end, _)| *end <= cut).map(|(_, body)| *body).collect();
    assert_eq!(frames(&log[..cut]), (whole, Some(Tail::Cut)));
});
