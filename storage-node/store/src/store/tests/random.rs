//! Random runs against the model, with crashes and restarts in between.

use proptest::prelude::*;

use super::model::Run;

#[derive(Clone, Debug)]
enum Action {
    Append {
        group: u8,
        truncated: u64,
        hard_state: bool,
        payloads: Vec<usize>,
    },
    Steps {
        count: usize,
    },
    Drain,
    Checkpoint {
        group: u8,
        kept: u64,
    },
    Snapshot {
        group: u8,
    },
    DeleteSnapshot {
        group: u8,
        n: usize,
    },
    Idle,
    /// Power fails, in the middle of an operation if there is one; `seed` picks the sectors that survive.
    Crash {
        seed: u64,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let append = (
        1..=3u8,
        0..3u64,
        any::<bool>(),
        prop::collection::vec(prop_oneof![4 => 0..3usize, 1 => Just(16), 1 => Just(20), 1 => Just(33)], 0..4),
    );
    prop_oneof![
        8 => append.prop_map(|(group, truncated, hard_state, payloads)| Action::Append { group, truncated, hard_state, payloads }),
        4 => (1..3usize).prop_map(|count| Action::Steps { count }),
        2 => Just(Action::Drain),
        3 => (1..=3u8, 0..3u64).prop_map(|(group, kept)| Action::Checkpoint { group, kept }),
        2 => (1..=3u8).prop_map(|group| Action::Snapshot { group }),
        2 => (1..=3u8, 0..2usize).prop_map(|(group, n)| Action::DeleteSnapshot { group, n }),
        1 => Just(Action::Idle),
        2 => any::<u64>().prop_map(|seed| Action::Crash { seed }),
    ]
}

/// One of four sectors is decided otherwise than the write's fate.
fn survives(seed: u64, write: usize, sector: usize) -> bool {
    let mix =
        |value: u64| value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let fate = mix(seed ^ write as u64) >> 60;
    let own = mix(seed ^ ((write as u64) << 20) ^ sector as u64) >> 60;
    if own < 4 { own < 2 } else { fate < 8 }
}

fn play(actions: Vec<Action>) -> Result<(), String> {
    let mut run = Run::new(3);
    for action in actions {
        match action {
            Action::Append { group, truncated, hard_state, payloads } => {
                run.append(group, truncated, hard_state, &payloads);
            }
            Action::Steps { count } => {
                for _ in 0..count {
                    run.step(|_| {});
                }
            }
            Action::Drain => while run.step(|_| {}) {},
            Action::Checkpoint { group, kept } => run.checkpoint(group, kept),
            Action::Snapshot { group } => run.snapshot_observed(group, |_| {}),
            Action::DeleteSnapshot { group, n } => run.delete_snapshot(group, n),
            Action::Idle => run.idle(),
            Action::Crash { seed } => {
                // The disk as a write in flight has reached it; the store never hears of its end.
                run.begin_step();
                let disk = run.device.fork();
                disk.crash(|write, sector| survives(seed, write, sector));
                run.restart(disk)?;
            }
        }
    }
    while run.step(|_| {}) {}
    let disk = run.device.fork();
    disk.crash(|_, _| false);
    run.restart(disk)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_run_recovers_what_the_model_says(actions in prop::collection::vec(action(), 1..60)) {
        play(actions).map_err(TestCaseError::fail)?;
    }
}
