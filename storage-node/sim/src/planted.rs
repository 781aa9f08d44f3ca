//! Whether a seed finds a planted bug.
//!
//! Compiled in only with the feature `planted`: a simulator that does not find them shows nothing when it finds none.

use std::panic::{AssertUnwindSafe, catch_unwind};

use holdfast_planted::{Bug, plant};

use crate::scenario::{self, Options};
use crate::world::Failure;

/// How the seed fails with the bug, if it does and holds without it.
pub fn found_by(bug: Bug, seed: u64, options: Options) -> Option<Failure> {
    // A panic of the code under test is a failure like any other.
    let run = || catch_unwind(AssertUnwindSafe(|| scenario::run(seed, options)));
    let failure = match during(bug, run) {
        Ok(Ok(_)) => return None,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::Incorrect("it panicked".to_owned()),
    };
    matches!(run(), Ok(Ok(_))).then_some(failure)
}

/// Runs `call` with the bug in this thread, and without it again afterwards, however it ends.
fn during<T>(bug: Bug, call: impl FnOnce() -> T) -> T {
    struct Gone;
    impl Drop for Gone {
        fn drop(&mut self) {
            plant(None);
        }
    }
    plant(Some(bug));
    let _gone = Gone;
    call()
}
