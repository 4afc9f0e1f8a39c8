use super::*;

fn run(inputs: &[(u64, u64)]) -> u64 {
    let mut guest = Guest::new(1);
    let mut out = Vec::new();
    for exit in 0..50 {
        guest.run_to_exit(&mut out);
        for (_, ns) in inputs.iter().filter(|(at, _)| *at == exit) {
            assert!(guest.apply(&Event::ConsoleRx(&ns.to_le_bytes())));
        }
    }
    guest.hash()
}

#[test]
fn the_same_inputs_give_the_same_machine_and_any_other_do_not() {
    let same = run(&[(3, 1), (3, 2), (9, 3)]);
    assert_eq!(same, run(&[(3, 1), (3, 2), (9, 3)]));
    for other in [
        vec![(3, 2), (3, 1), (9, 3)],
        vec![(3, 1), (3, 2), (10, 3)],
        vec![(3, 1), (9, 3)],
        vec![(3, 1), (3, 2), (9, 4)],
    ] {
        assert_ne!(same, run(&other), "{other:?}");
    }
}

#[test]
fn a_point_that_is_saved_is_the_point_that_is_loaded() {
    let mut guest = Guest::new(1);
    guest.run_to_exit(&mut Vec::new());
    let mut other = guest.clone();
    guest.run_part(2);
    let mut bytes = Vec::new();
    guest.save_point(0xff, &mut bytes);
    assert!(other.load_point(&bytes));
    assert_eq!(guest, other);
    assert!(!other.load_point(&bytes[..bytes.len() - 1]));
}

#[test]
fn a_write_is_answered_when_it_is_done_and_the_buffer_is_used_again_before() {
    let mut guest = Guest::new(1);
    let mut out = Vec::new();
    for _ in 0..20 {
        guest.run_to_exit(&mut out);
        for io in guest.io.clone() {
            let done = Event::DiskDone {
                request: io.id,
                status: format::DiskStatus::Ok,
                data: &[0; 16],
            };
            assert!(guest.apply(&done));
        }
    }
    let request = Request {
        client: 1,
        number: 1,
        key: 2,
        put: Some(7),
    };
    assert!(guest.apply(&Event::NetRx(&request.encode())));
    out.clear();
    guest.run_to_exit(&mut out);
    let io = guest.io[0];
    assert_eq!(io.write.map(|sector| sector.value), Some(7));
    for _ in 0..20 {
        guest.run_to_exit(&mut out);
    }
    assert_ne!(guest.reread(&io), io.write);
    let answers = |out: &[Effect]| {
        out.iter()
            .any(|e| matches!(e, Effect::Net(p) if p.answers == Some((1, 1))))
    };
    assert!(!answers(&out));
    let done = Event::DiskDone {
        request: io.id,
        status: format::DiskStatus::Ok,
        data: &[],
    };
    assert!(guest.apply(&done));
    guest.run_to_exit(&mut out);
    assert!(answers(&out));
}
