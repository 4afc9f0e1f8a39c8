use vm_memory::GuestMemoryMmap;

use super::*;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 8;

fn ram() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
}

fn state(next_avail: u16, next_used: u16) -> QueueState {
    QueueState {
        size: SIZE,
        enabled: true,
        desc: DESC,
        driver: AVAIL,
        device: USED,
        next_avail,
        next_used,
    }
}

fn queue(next_used: u16, event_idx: bool) -> Virtqueue {
    Virtqueue::restore(&state(0, next_used), SIZE, event_idx).unwrap()
}

fn set_used_event(ram: &GuestMemoryMmap<()>, event: u16) {
    ram.write_obj(event, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE)))
        .unwrap();
}

#[test]
fn an_interrupt_is_owed_when_the_used_index_passes_the_event() {
    let ram = ram();
    // Used index before, after, event; owed.
    for (since, next, event, owed) in [
        (0, 1, 0, true),
        (0, 1, 1, false),
        (0, 3, 2, true),
        (1, 3, 0, false),
        (5, 5, 5, false),
        (0xfffe, 1, 0xffff, true),
        (0xfffe, 1, 0, true),
        (0xfffe, 1, 1, false),
        (0xfffe, 1, 0xfffd, false),
    ] {
        set_used_event(&ram, event);
        let got = queue(next, true).owes_interrupt(&ram, since).unwrap();
        assert_eq!(got, owed, "{since} to {next}, event {event}");
    }
}

#[test]
fn without_event_index_the_flag_decides() {
    let ram = ram();
    let queue = queue(3, false);
    assert!(queue.owes_interrupt(&ram, 2).unwrap());
    assert!(
        !queue.owes_interrupt(&ram, 3).unwrap(),
        "nothing was completed"
    );
    ram.write_obj(1u16, GuestAddress(AVAIL)).unwrap();
    assert!(!queue.owes_interrupt(&ram, 2).unwrap());
}

#[test]
fn kicks_are_asked_for_from_the_available_index_on() {
    let ram = ram();
    ram.write_obj(7u16, GuestAddress(AVAIL + 2)).unwrap();
    queue(0, true).ask_for_kick(&ram).unwrap();
    let event: u16 = ram
        .read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE)))
        .unwrap();
    assert_eq!(event, 7);
    let plain = queue(0, false);
    plain.spare_kicks(&ram).unwrap();
    assert_eq!(ram.read_obj::<u16>(GuestAddress(USED)).unwrap(), 1);
    plain.ask_for_kick(&ram).unwrap();
    assert_eq!(ram.read_obj::<u16>(GuestAddress(USED)).unwrap(), 0);
}

#[test]
fn chains_given_back_are_taken_again() {
    let ram = ram();
    for head in 0..3u16 {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&u64::to_le_bytes(0x8000));
        descriptor[8] = 4;
        ram.write_slice(&descriptor, GuestAddress(DESC + 16 * u64::from(head)))
            .unwrap();
        ram.write_obj(head, GuestAddress(AVAIL + 4 + 2 * u64::from(head)))
            .unwrap();
    }
    ram.write_obj(3u16, GuestAddress(AVAIL + 2)).unwrap();
    let mut queue = queue(0, true);
    let heads = |queue: &mut Virtqueue| {
        std::iter::from_fn(|| queue.pop(&ram).unwrap())
            .map(|chain| chain.head)
            .collect::<Vec<_>>()
    };
    assert_eq!(heads(&mut queue.preview()), [0, 1, 2]);
    assert_eq!(heads(&mut queue), [0, 1, 2]);
    queue.undo_pops(2);
    assert_eq!(heads(&mut queue), [1, 2]);
    assert!(heads(&mut queue).is_empty());
}

#[test]
fn a_saved_queue_is_itself_again_and_an_impossible_one_is_refused() {
    for state in [
        state(5, 0xffff),
        QueueState {
            enabled: false,
            ..state(0, 0)
        },
    ] {
        assert_eq!(
            Virtqueue::restore(&state, SIZE, true).unwrap().save(),
            state
        );
    }
    for wrong in [
        QueueState {
            size: 0,
            ..state(0, 0)
        },
        QueueState {
            size: 16,
            ..state(0, 0)
        },
        QueueState {
            size: 6,
            ..state(0, 0)
        },
        QueueState {
            desc: 1,
            ..state(0, 0)
        },
        QueueState {
            device: 2,
            ..state(0, 0)
        },
    ] {
        assert!(Virtqueue::restore(&wrong, SIZE, true).is_err(), "{wrong:?}");
    }
}
