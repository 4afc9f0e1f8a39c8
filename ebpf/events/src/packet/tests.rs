//! Golden bytes, round trips, and what a changed packet is taken for.

use proptest::prelude::*;

use super::*;
use crate::key::KEY_BYTES;

const KEY: Key = Key::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);

const REQUEST: Request = Request {
    session: 0x1122_3344_5566_7788,
    generation: KeyGeneration(3),
    epoch: 9,
    sequence: 0x0102,
    nonce: 0xa1a2_a3a4_a5a6_a7a8,
    time_ns: 1_000_000_007,
};

fn reply() -> Reply {
    Reply {
        flags: ReplyFlags::VMM_KNOWN | ReplyFlags::VMM_DEAD,
        epoch: 10,
        time_ns: 2_000_000_011,
        vmm_progress: 77,
        daemon_progress: 88,
        ..Reply::to(&REQUEST)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn siphash_agrees_with_the_papers_test_vector() {
    // Appendix A of the paper: key 00..0f, input 00..0e.
    let input: Vec<u8> = (0..15).collect();
    assert_eq!(tag(&input, &KEY), 0xa129_ca61_49be_45e5);
}

#[test]
fn request_has_its_golden_bytes() {
    assert_eq!(
        hex(&REQUEST.encode(&KEY)),
        concat!(
            "504c4842",
            "01",
            "01",
            "03",
            "00",
            "8877665544332211",
            "0900000000000000",
            "0201000000000000",
            "a8a7a6a5a4a3a2a1",
            "07ca9a3b00000000",
            "0000000000000000",
            "0000000000000000",
            "0000000000000000",
            "eb9bc447bdd30372"
        )
    );
}

#[test]
fn reply_has_its_golden_bytes() {
    assert_eq!(
        hex(&reply().encode(&KEY)),
        concat!(
            "504c4842",
            "01",
            "02",
            "03",
            "05",
            "8877665544332211",
            "0a00000000000000",
            "0201000000000000",
            "a8a7a6a5a4a3a2a1",
            "0b94357700000000",
            "4d00000000000000",
            "5800000000000000",
            "07ca9a3b00000000",
            "e284aa642febede5"
        )
    );
}

#[test]
fn any_flipped_bit_is_refused() {
    let request = REQUEST.encode(&KEY);
    let answer = reply().encode(&KEY);
    for bit in 0..HEARTBEAT_BYTES * 8 {
        let flip = |mut packet: [u8; HEARTBEAT_BYTES]| {
            packet[bit / 8] ^= 1 << (bit % 8);
            packet
        };
        assert!(
            Request::decode(&flip(request), &KEY).is_err(),
            "request, bit {bit}"
        );
        assert!(
            Reply::decode(&flip(answer), &KEY).is_err(),
            "reply, bit {bit}"
        );
    }
}

#[test]
fn wrong_key_is_forged_and_wrong_kind_is_named() {
    let other = Key::new([1; KEY_BYTES]);
    assert_eq!(
        Request::decode(&REQUEST.encode(&KEY), &other),
        Err(PacketError::Forged)
    );
    assert_eq!(
        Request::decode(&reply().encode(&KEY), &KEY),
        Err(PacketError::Kind(2))
    );
    assert_eq!(
        Reply::decode(&REQUEST.encode(&KEY), &KEY),
        Err(PacketError::Kind(1))
    );
}

#[test]
fn malformed_packets_say_what_is_wrong() {
    let good = REQUEST.encode(&KEY);
    assert_eq!(Opening::read(&good[..79]), Err(PacketError::Length(79)));
    assert_eq!(
        Opening::read(&[good.as_slice(), &[0]].concat()),
        Err(PacketError::Length(81))
    );
    let with = |at: usize, value: u8| {
        let mut packet = good;
        packet[at] = value;
        Opening::read(&packet)
    };
    assert_eq!(with(0, 0), Err(PacketError::Magic));
    assert_eq!(with(4, 2), Err(PacketError::Version(2)));
    assert_eq!(with(5, 0), Err(PacketError::Kind(0)));
    assert_eq!(with(7, 1), Err(PacketError::ReplyFieldInRequest));
    assert_eq!(with(48, 1), Err(PacketError::ReplyFieldInRequest));
    assert_eq!(with(71, 1), Err(PacketError::ReplyFieldInRequest));
}

proptest! {
    #[test]
    fn packets_survive_the_round_trip(
        words in any::<[u64; 8]>(), generation in any::<u8>(), flags in any::<u8>(), key in any::<[u8; 16]>(),
    ) {
        let key = Key::new(key);
        let request = Request {
            session: words[0], generation: KeyGeneration(generation), epoch: words[1],
            sequence: words[2], nonce: words[3], time_ns: words[4],
        };
        prop_assert_eq!(Request::decode(&request.encode(&key), &key), Ok(request));
        let reply = Reply {
            flags: ReplyFlags(flags), epoch: words[5], time_ns: words[6], vmm_progress: words[7],
            daemon_progress: words[0], ..Reply::to(&request)
        };
        prop_assert_eq!(Reply::decode(&reply.encode(&key), &key), Ok(reply));
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Opening::read(&bytes);
        prop_assert!(Request::decode(&bytes, &KEY).is_err());
        prop_assert!(Reply::decode(&bytes, &KEY).is_err());
    }
}
