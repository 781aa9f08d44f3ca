//! Bugs that tests plant to prove that they would be found. Without the feature `planted` no switch exists.

#[cfg(feature = "planted")]
use std::cell::Cell;

/// A bug of this thread's stores.
#[cfg(feature = "planted")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// `Flushed` is told when the write is submitted.
    AcknowledgeBeforeFlush,
    /// WAL batches are written without a flush.
    SkipWalFlush,
    /// A batch is told durable without a flush of the payloads that its records name.
    SkipPayloadFlush,
    /// The slots of truncated records are given away before the truncation is durable.
    ReuseSlotUnderLog,
    /// Recovery ends the log at the first bad checksum, whatever follows.
    TruncateAtBadChecksum,
    /// A delta is taken for complete whatever the hash of the map is.
    InstallAnyMap,
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug in, or cleans, this thread.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

macro_rules! switch {
    ($name:ident, $bug:ident) => {
        #[cfg(feature = "planted")]
        pub(crate) fn $name() -> bool {
            PLANTED.get() == Some(Bug::$bug)
        }
        #[cfg(not(feature = "planted"))]
        pub(crate) const fn $name() -> bool {
            false
        }
    };
}

switch!(acknowledge_before_flush, AcknowledgeBeforeFlush);
switch!(skip_wal_flush, SkipWalFlush);
switch!(skip_payload_flush, SkipPayloadFlush);
switch!(reuse_slot_under_log, ReuseSlotUnderLog);
switch!(truncate_at_bad_checksum, TruncateAtBadChecksum);
switch!(install_any_map, InstallAnyMap);
