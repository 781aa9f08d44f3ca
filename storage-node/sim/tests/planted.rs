//! Every planted bug is found within a bounded number of seeds; see `holdfast_sim::planted`.

#![cfg(feature = "planted")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use holdfast_sim::planted::Planted;
use holdfast_sim::scenario::{self, Options};
use holdfast_sim::world::Failure;

/// Within so many seeds. A bug that one seed in ten finds is missed by forty in one case of seventy.
const SEEDS_MAX: u64 = 40;

fn is_found(name: &str) {
    let planted = Planted::named(name).expect("a bug of this name");
    let found = |seed: &u64| {
        let run = || planted.during(|| scenario::run(*seed, Options::default()));
        // A panic of the code under test finds it too.
        catch_unwind(AssertUnwindSafe(run)).map_or(true, |result| matches!(result, Err(Failure::Incorrect(_))))
    };
    assert!((1..=SEEDS_MAX).any(|seed| found(&seed)), "{name} is not found by {SEEDS_MAX} seeds");
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
    planted_acknowledge_before_flush: "acknowledge-before-flush",
    planted_skip_wal_flush: "skip-wal-flush",
    planted_truncate_at_bad_checksum: "truncate-at-bad-checksum",
    planted_vote_not_flushed: "vote-not-flushed",
    planted_booted_voter_votes: "booted-voter-votes",
    planted_lease_not_checked: "lease-not-checked",
    planted_committed_alone: "committed-alone",
    planted_submitted_counts_as_flushed: "submitted-counts-as-flushed",
    planted_session_lost_in_snapshot: "session-lost-in-snapshot",
    planted_straggler_of_a_closed_session: "straggler-of-a-closed-session",
    planted_duplicate_applied: "duplicate-applied",
    planted_read_modify_write_from_committed_state: "read-modify-write-from-committed-state",
    planted_overtakes_read_modify_write: "overtakes-read-modify-write",
    planted_now_taken_before_a_stop: "now-taken-before-a-stop",
}
