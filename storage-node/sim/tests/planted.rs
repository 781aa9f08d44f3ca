//! Planted bugs that whole-cluster seeds find; see `holdfast_sim::planted`.
//!
//! The others of that list are not here because no bounded number of seeds is known to find them yet: the tests of the
//! store, consensus and volume crates find their own planted bugs.

#![cfg(feature = "planted")]

use holdfast_sim::planted::Planted;
use holdfast_sim::scenario::Options;

/// Within so many seeds.
const SEEDS_MAX: u64 = 10;

fn is_found(name: &str) {
    let planted = Planted::named(name).expect("a bug of this name");
    assert!(
        (1..=SEEDS_MAX).any(|seed| planted.found_by(seed, Options::default()).is_some()),
        "{name} is not found by {SEEDS_MAX} seeds"
    );
}

macro_rules! planted {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                is_found($name);
            }
        )*
    };
}

planted! {
    planted_committed_alone: "committed-alone",
    planted_straggler_of_a_closed_session: "straggler-of-a-closed-session",
    planted_read_modify_write_from_committed_state: "read-modify-write-from-committed-state",
    planted_overtakes_read_modify_write: "overtakes-read-modify-write",
}
