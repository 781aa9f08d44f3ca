//! Planted bugs that whole-cluster seeds find; see `holdfast_planted`.
//!
//! The others of that list are not here because no bounded number of seeds is known to find them yet: the tests of the
//! store, consensus and volume crates find their own planted bugs.

#![cfg(feature = "planted")]

use holdfast_planted::Bug;
use holdfast_sim::planted::found_by;
use holdfast_sim::scenario::Options;

/// Within so many seeds.
const SEEDS_MAX: u64 = 30;

fn is_found(bug: Bug) {
    assert!(
        (1..=SEEDS_MAX).any(|seed| found_by(bug, seed, Options::default()).is_some()),
        "{} is not found by {SEEDS_MAX} seeds",
        bug.name()
    );
}

macro_rules! planted {
    ($($test:ident: $bug:ident,)*) => {
        $(
            #[test]
            fn $test() {
                is_found(Bug::$bug);
            }
        )*
    };
}

planted! {
    planted_committed_alone: CommittedAlone,
    planted_state_left_out_of_delta: StateLeftOutOfDelta,
    planted_straggler_of_a_closed_session: FenceOnlyAtAdmission,
    planted_read_modify_write_from_committed_state: ReadBeforeApplied,
    planted_overtakes_read_modify_write: OvertakesReadModifyWrite,
}
