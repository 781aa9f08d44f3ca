//! Known bugs, compiled in only with the feature `planted`, to prove that the tests would find them.
//!
//! Without the feature [`is`] is a constant `false` and the optimiser removes every planted branch. With it a test
//! plants one bug in its own thread, so that others beside it stay clean, and a program of several threads plants it in
//! all of them.

#![forbid(unsafe_code)]

macro_rules! bugs {
    ($($(#[$doc:meta])* $bug:ident = $name:literal,)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[$doc])* $bug,)*
        }

        impl Bug {
            pub const ALL: &'static [Bug] = &[$(Bug::$bug,)*];

            /// As command lines call it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Bug::$bug => $name,)*
                }
            }
        }
    };
}

bugs! {
    /// `Flushed` is told when the write is submitted.
    AcknowledgeBeforeFlush = "acknowledge-before-flush",
    /// WAL batches are written without a flush.
    SkipWalFlush = "skip-wal-flush",
    /// A batch is told durable without a flush of the payloads that its records name.
    SkipPayloadFlush = "skip-payload-flush",
    /// The slots of truncated records are given away before the truncation is durable.
    ReuseSlotUnderLog = "reuse-slot-under-log",
    /// A checkpoint's header is written without a flush of what it names.
    SkipSlotFlush = "skip-slot-flush",
    /// What a group's map gives up is freed though a snapshot names it.
    FreeSnapshotSlot = "slot-freed-while-a-snapshot-names-it",
    /// A replica takes a snapshot once it has applied all that is committed, instead of at its entry.
    SnapshotAfterBatch = "snapshot-at-different-indexes-on-two-replicas",
    /// A delta is taken for complete whatever the hash of the map is.
    InstallAnyMap = "install-any-map",
    /// Recovery ends the log at the first bad checksum, whatever follows.
    TruncateAtBadChecksum = "truncate-at-bad-checksum",
    /// Messages leave before the hard state that they depend on is durable.
    VoteNotFlushed = "vote-not-flushed",
    /// A delta brings the blocks and leaves the state machine, with its sessions, as it was.
    StateLeftOutOfDelta = "state-left-out-of-delta",
    /// A replica that has just started votes at once, whatever it promised before.
    BootedVoterVotes = "booted-voter-votes",
    /// Reads are served without a lease and without a round.
    LeaseNotChecked = "lease-not-checked",
    /// What the leader alone has flushed counts as committed.
    CommittedAlone = "committed-alone",
    /// What was sent counts as flushed by the one it was sent to.
    SubmittedCountsAsFlushed = "submitted-counts-as-flushed",
    /// A restored state has forgotten which sequences were applied.
    SessionLostInSnapshot = "session-lost-in-snapshot",
    /// Apply looks at the session only at admission, as a leader that trusts its early check would.
    FenceOnlyAtAdmission = "straggler-of-a-closed-session",
    /// Apply does not look whether a sequence has been applied before.
    DuplicateApplied = "duplicate-applied",
    /// A read-modify-write reads without waiting for earlier overlapping requests.
    ReadBeforeApplied = "read-modify-write-from-committed-state",
    /// A whole-block write overtakes an earlier overlapping read-modify-write.
    OvertakesReadModifyWrite = "overtakes-read-modify-write",
    /// The rim samples the clock before it takes what waited while its process was stopped.
    NowTakenBeforeStop = "now-taken-before-a-stop",
}

impl Bug {
    pub fn named(name: &str) -> Option<Bug> {
        Bug::ALL.iter().copied().find(|bug| bug.name() == name)
    }
}

#[cfg(feature = "planted")]
mod switch {
    use std::cell::Cell;
    use std::sync::OnceLock;

    use super::Bug;

    thread_local! {
        static OF_THREAD: Cell<Option<Bug>> = const { Cell::new(None) };
    }
    static OF_PROCESS: OnceLock<Bug> = OnceLock::new();

    /// From now on this thread runs with the bug, or with none.
    pub fn plant(bug: Option<Bug>) {
        OF_THREAD.set(bug);
    }

    /// From now on every thread runs with the bug, for as long as the process lives.
    ///
    /// # Panics
    /// Where another one is planted.
    pub fn plant_everywhere(bug: Bug) {
        assert_eq!(*OF_PROCESS.get_or_init(|| bug), bug, "one bug at a time");
    }

    pub fn is(bug: Bug) -> bool {
        OF_THREAD.get() == Some(bug) || OF_PROCESS.get() == Some(&bug)
    }
}

#[cfg(feature = "planted")]
pub use switch::{is, plant, plant_everywhere};

#[cfg(not(feature = "planted"))]
pub const fn is(_: Bug) -> bool {
    false
}
