//! Known bugs, compiled in only with the feature `planted`, to prove that the tests would find them.
//!
//! Without the feature [`is`] is a constant `false` and the optimiser removes every planted branch.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A restored state has forgotten which sequences were applied.
    SessionLostInSnapshot,
    /// Apply looks at the session only at admission, as a leader that trusts its early check would.
    FenceOnlyAtAdmission,
    /// Apply does not look whether a sequence has been applied before.
    DuplicateApplied,
    /// A read-modify-write reads without waiting for earlier overlapping requests.
    ReadBeforeApplied,
    /// A whole-block write overtakes an earlier overlapping read-modify-write.
    OvertakesReadModifyWrite,
}

#[cfg(feature = "planted")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// From now on this thread runs with the bug, or with none.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub fn is(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "planted")]
pub use switch::{is, plant};

#[cfg(not(feature = "planted"))]
pub const fn is(_: Bug) -> bool {
    false
}
