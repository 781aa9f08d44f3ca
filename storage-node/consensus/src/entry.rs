//! What the log holds and what must be durable beside it.

use holdfast_id::{NodeId, ReplicaId};

/// Raft's term; 0 is before the first election.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(pub u64);

/// Position in a group's log; the first entry is 1, 0 is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogIndex(pub u64);

impl LogIndex {
    pub const fn next(self) -> LogIndex {
        LogIndex(self.0 + 1)
    }
}

/// An entry's name: two entries with the same position are the same entry. Ordered by term, then index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    pub term: Term,
    pub index: LogIndex,
}

/// What is replicated; opaque to consensus but for its size. Cloning must be cheap (a reference count).
pub trait Command: Clone + std::fmt::Debug {
    /// Bytes that count against append and in-flight windows.
    fn size_bytes(&self) -> usize;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<C> {
    pub position: Position,
    pub body: Body<C>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body<C> {
    /// The first entry of every leader's term.
    Noop,
    Command(C),
    Configuration(Configuration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Votes, may lead, holds data.
    Voter,
    /// Holds data, does not vote; on its way to voter.
    Learner,
    /// Votes, stores headers only, never leads. Reserved: configurations with witnesses are refused for now.
    Witness,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    pub replica: ReplicaId,
    /// Where it lives, for good: a configuration tells everybody in it how to find the others.
    pub node: NodeId,
    pub role: Role,
}

/// Who takes part. While `outgoing` is not empty the change is joint: decisions need a majority of the voters of both.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Configuration {
    /// Sorted by replica, no replica twice.
    pub members: Vec<Member>,
    /// The members before a joint change, sorted; empty outside one.
    pub outgoing: Vec<Member>,
    /// Copies with data that must have flushed an entry before it commits, beside the majority; at least 1.
    pub min_data: u8,
}

/// Durable before any message that depends on it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct HardState {
    pub term: Term,
    pub vote: Option<ReplicaId>,
}
