//! A bounded number of seeds in every test run; `cargo xtask sim --seeds N` runs as many as there is time for.

use holdfast_sim::scenario::{self, Options};

/// Runs the seeds, and fails with the first that does, and the command that shows it again.
fn hold(seeds: std::ops::Range<u64>) {
    let mut counted = 0;
    for seed in seeds {
        let report = scenario::run(seed, Options::default());
        let report = report.unwrap_or_else(|failure| {
            panic!("seed {seed}: {failure}\nreproduce: cargo xtask sim --seed {seed} --replay")
        });
        counted += u32::from(report.counts());
    }
    assert!(counted > 0, "no seed has shown enough to count");
}

// Four parts: the test runner gives each a process of its own.
#[test]
fn seeds_hold_part_1() {
    hold(1001..1006);
}

#[test]
fn seeds_hold_part_2() {
    hold(1006..1011);
}

#[test]
fn seeds_hold_part_3() {
    hold(1011..1016);
}

#[test]
fn seeds_hold_part_4() {
    hold(1016..1021);
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let run = |seed| scenario::run(seed, Options::default()).expect("a seed that holds").log_hash;
    assert_eq!(run(2), run(2));
    assert_ne!(run(2), run(4));
}
