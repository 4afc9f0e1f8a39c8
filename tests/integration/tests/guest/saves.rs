//! A replay that is saved at random exits, and goes on from each saved state in a fresh process.

use integration::{Random, amount, run, stderr};

use crate::scene::{Scene, replay, text};
use crate::{scene, scene::assert_whole};

#[test]
fn saved_at_random_exits_the_rest_replays_identically() {
    let name = "saved_at_random_exits_the_rest_replays_identically";
    let Some(mut scene) = Scene::new(name) else {
        return;
    };
    let mut random = Random::seeded(name);
    let recording = scene.path("recording");
    scene::record_traffic(&scene, &recording);
    assert_whole(&replay(&recording, &[]));
    let saves = amount("POLLUX_SAVES", 8).to_string();
    let seed = random.below(1 << 32).to_string();
    let arguments = [
        "replay",
        text(&recording),
        "--saves",
        &saves,
        "--seed",
        &seed,
        "--json",
    ];
    let output = run(&arguments);
    if !output.status.success() {
        let kept = scene.keep().display().to_string();
        panic!(
            "{}\nrerun: pollux {}   (kept in {kept})",
            stderr(&output),
            arguments.join(" ")
        );
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    eprintln!("{name}: {report}");
    assert_eq!(report["saves"].to_string(), saves, "{report}");
    assert!(
        report["with_disk_outstanding"]
            .as_u64()
            .is_some_and(|n| n > 0),
        "{report}"
    );
}
