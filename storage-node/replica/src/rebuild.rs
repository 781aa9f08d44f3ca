//! Bringing up a replica whose log was compacted away under it, or that is new, by the slots that differ: the delta.
//!
//! A leader [`Sender`](sender::Sender) freezes its map at a checkpoint S and offers it. A [`Receiver`](receiver::Receiver)
//! asks: which slots changed above its own checkpoint, page by page; the content of those whose index is not its
//! own; the state machine at S. It hands everything to the store, which takes it for complete only where the hash of the
//! map is the sender's. Both are pure: messages, answers of the store and the time go in, actions come out;
//! `rebuilding` carries them out for a [`Replica`](crate::Replica).
//!
//! Everything is asked for again until it is answered, and every message names its rebuild; so lost, repeated and late
//! messages do no harm, and a restart of either side only begins a new rebuild that finds what is here by its index.
//! Drawn in `docs/protocols/rebuild.md`.

pub mod message;
pub mod receiver;
pub mod sender;

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_consensus::Term;
use holdfast_id::{GroupId, ReplicaId};

/// Rebuilds that one shard serves at a time: with more, each would only be slower, and each holds a frozen map.
pub const SENT_MAX: usize = 2;
/// Slots a receiver has asked for and not got: 4 MiB on its way, of which two rebuilds fit a connection's queue. On a
/// busy machine a round trip by two shards and a disk takes tens of milliseconds, and a rebuild has to gain on clients.
pub const SLOTS_IN_FLIGHT_MAX: usize = 64;
/// So many at the beginning, and after an answer was missing; each answer allows one more.
pub const SLOTS_IN_FLIGHT_MIN: usize = 16;
/// Installed bytes after which the receiver makes them durable; it stops asking at twice as many.
pub const COMMIT_BYTES: u64 = 16 << 20;
/// Bytes of the state in one message.
pub const STATE_CHUNK_BYTES: usize = 256 << 10;
/// An answer that is due is asked for again after this.
pub const RESEND_AFTER: Duration = Duration::from_millis(500);
/// A rebuild whose other side was silent for so long is given up; what came stays.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Until what cannot be begun or go on now is tried again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// For so long after a rebuild its leader keeps the log above it: the receiver asks for that next.
pub const LOG_KEPT_FOR: Duration = Duration::from_secs(30);
/// A rebuild that ends within this is worth that clients are held back for it, so that one is enough: what they write
/// meanwhile has to fit the log. Each further one in a row may take twice as long.
pub const HURRY: Duration = Duration::from_secs(10);
/// Log bytes a leader keeps above a rebuild under way. Past it the end of the rebuild begins another, from there.
pub const LOG_KEPT_BYTES_MAX: usize = 128 << 20;

/// Names a rebuild: of a term there is one leader, and it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RebuildId {
    pub term: Term,
    pub number: u64,
}

/// How far a rebuild is, as its leader sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebuildProgress {
    /// Slots of the leader's map that changed above the receiver's base.
    pub slots_compared: u64,
    /// Bytes of those that the receiver asked for, copied so far; one that was lost on the way counts again.
    pub bytes_copied: u64,
    /// Bytes of the slots told so far; rises until all are told.
    pub bytes_listed: u64,
    pub phase: RebuildPhase,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebuildPhase {
    /// For its turn, a checkpoint, or the receiver.
    #[default]
    Waiting,
    Copying,
    /// The receiver has the state at the rebuild's index and follows the log again.
    Done,
}

/// Which rebuilds a shard serves.
#[derive(Debug, Default)]
pub struct Permits {
    taken: BTreeSet<(GroupId, ReplicaId)>,
}

impl Permits {
    /// Whether the rebuild may begin; it holds its permit until [`Permits::give_back`].
    pub fn take(&mut self, group: GroupId, receiver: ReplicaId) -> bool {
        let free = self.taken.len() < SENT_MAX;
        free && self.taken.insert((group, receiver))
    }

    pub fn give_back(&mut self, group: GroupId, receiver: ReplicaId) {
        self.taken.remove(&(group, receiver));
    }

    /// The group is gone from this shard.
    pub fn forget(&mut self, group: GroupId) {
        self.taken.retain(|(taken, _)| *taken != group);
    }
}
