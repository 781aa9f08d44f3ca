//! Known bugs, compiled in only with the feature `planted`, to prove that the simulator would find them.
//!
//! Without the feature [`is`] is a constant `false` and the optimiser removes every planted branch.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Messages leave before the hard state that they depend on is durable.
    VoteNotFlushed,
    /// A delta brings the blocks and leaves the state machine, with its sessions, as it was.
    StateLeftOutOfDelta,
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
