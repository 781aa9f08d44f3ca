//! What the core asks its driver to do, as data.

use holdfast_id::ReplicaId;

use crate::entry::{Entry, HardState, LogIndex, Term};
use crate::message::Message;

/// Numbers the writes of one group in the order they must become durable; starts at 1 at every boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PersistSequence(pub u64);

/// One atomic step of the durable state. The driver makes these durable in the order of `sequence` and reports
/// progress with `Raft::on_persisted`; it may report several at once by the highest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Persist<C> {
    pub sequence: PersistSequence,
    pub hard_state: Option<HardState>,
    /// Entries at and above this index are gone before `entries` are appended.
    pub truncate_from: Option<LogIndex>,
    pub entries: Vec<Entry<C>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect<C> {
    Persist(Persist<C>),
    /// To be sent once everything up to `after` is durable; at once where `None`. Effects to one peer keep their order
    /// among those that may be sent; a later one with a lower `after` may overtake.
    Send {
        to: ReplicaId,
        message: Message<C>,
        after: Option<PersistSequence>,
    },
    /// Entries up to and with this index are committed and durable *here*; they may be applied.
    Committed(LogIndex),
    /// This replica leads. Client reads and proposals wait for `Serving`.
    BecameLeader(Term),
    /// The leader's first entry is committed here: everything older is known.
    Serving(Term),
    /// This replica led and no longer does: refuse what was not proposed, forget what was; its fate is the new leader's.
    LostLeadership(Term),
    /// The read asked for with this token may be served once everything up to `index` is applied.
    ReadReady {
        token: u64,
        index: LogIndex,
    },
    /// Leadership was lost first.
    ReadFailed {
        token: u64,
    },
    /// The peer needs entries that were compacted: bring it up by the store's delta. Told again where a delta was not
    /// enough and where the peer is connected anew; one under way may go on.
    NeedsDelta {
        peer: ReplicaId,
    },
}
