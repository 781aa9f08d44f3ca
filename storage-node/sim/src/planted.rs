//! The bugs that can be planted, over all crates, by name; see `planted` of each of them.
//!
//! Compiled in only with the feature `planted`: a simulator that does not find them shows nothing when it finds none.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::scenario::{self, Options};
use crate::world::Failure;

/// A bug by its name on the command line.
#[derive(Clone, Copy, Debug)]
pub struct Planted {
    pub name: &'static str,
    plant: fn(bool),
}

thread_local! {
    static STALE_NOW: Cell<bool> = const { Cell::new(false) };
}

/// Whether the rim samples the clock before it takes what waited while its process was stopped.
pub(crate) fn stale_now() -> bool {
    STALE_NOW.get()
}

macro_rules! bug {
    ($name:literal, $module:path, $bug:ident) => {{
        use $module as of;
        Planted { name: $name, plant: |on| of::plant(on.then_some(of::Bug::$bug)) }
    }};
}

impl Planted {
    pub fn all() -> Vec<Planted> {
        vec![
            bug!("acknowledge-before-flush", holdfast_store::planted, AcknowledgeBeforeFlush),
            bug!("skip-wal-flush", holdfast_store::planted, SkipWalFlush),
            bug!("truncate-at-bad-checksum", holdfast_store::planted, TruncateAtBadChecksum),
            bug!("vote-not-flushed", holdfast_replica::planted, VoteNotFlushed),
            bug!("state-left-out-of-delta", holdfast_replica::planted, StateLeftOutOfDelta),
            bug!("booted-voter-votes", holdfast_consensus::planted, BootedVoterVotes),
            bug!("lease-not-checked", holdfast_consensus::planted, LeaseNotChecked),
            bug!("committed-alone", holdfast_consensus::planted, CommittedAlone),
            bug!("submitted-counts-as-flushed", holdfast_consensus::planted, SubmittedCountsAsFlushed),
            bug!("session-lost-in-snapshot", holdfast_volume::planted, SessionLostInSnapshot),
            bug!("straggler-of-a-closed-session", holdfast_volume::planted, FenceOnlyAtAdmission),
            bug!("duplicate-applied", holdfast_volume::planted, DuplicateApplied),
            bug!("read-modify-write-from-committed-state", holdfast_volume::planted, ReadBeforeApplied),
            bug!("overtakes-read-modify-write", holdfast_volume::planted, OvertakesReadModifyWrite),
            Planted { name: "now-taken-before-a-stop", plant: |on| STALE_NOW.set(on) },
        ]
    }

    pub fn named(name: &str) -> Option<Planted> {
        Planted::all().into_iter().find(|planted| planted.name == name)
    }

    /// How the seed fails with the bug, if it does and holds without it.
    pub fn found_by(self, seed: u64, options: Options) -> Option<Failure> {
        // A panic of the code under test is a failure like any other.
        let run = || catch_unwind(AssertUnwindSafe(|| scenario::run(seed, options)));
        let failure = match self.during(run) {
            Ok(Ok(_)) => return None,
            Ok(Err(failure)) => failure,
            Err(_) => Failure::Incorrect("it panicked".to_owned()),
        };
        matches!(run(), Ok(Ok(_))).then_some(failure)
    }

    /// Runs `call` with the bug in this thread, and without it again afterwards, however it ends.
    fn during<T>(self, call: impl FnOnce() -> T) -> T {
        struct Gone(fn(bool));
        impl Drop for Gone {
            fn drop(&mut self) {
                (self.0)(false);
            }
        }
        (self.plant)(true);
        let _gone = Gone(self.plant);
        call()
    }
}
