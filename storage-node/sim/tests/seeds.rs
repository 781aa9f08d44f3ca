//! The run is a function of its seed. That seeds hold is what `cargo xtask sim` shows, of which `cargo xtask test` runs
//! as many as there is time for.

use holdfast_sim::scenario::{self, Options};

#[test]
fn the_same_seed_gives_the_same_log() {
    let run = |seed| scenario::run(seed, Options::default()).expect("a seed that holds").log_hash;
    assert_eq!(run(2), run(2));
    assert_ne!(run(2), run(4));
}
