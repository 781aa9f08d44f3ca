//! A snapshot of what a replica knows, for people, metrics and tests.

use holdfast_id::ReplicaId;

use crate::entry::{LogIndex, Position, Term};
use crate::liveness::SupportEpoch;
use crate::progress::ProgressState;
use crate::time::Timestamp;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Follower,
    PreCandidate,
    Candidate,
    Leader,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub id: ReplicaId,
    pub standing: Standing,
    pub term: Term,
    pub vote: Option<ReplicaId>,
    pub leader: Option<ReplicaId>,
    pub base: Position,
    pub last: Position,
    pub flushed: LogIndex,
    pub committed: LogIndex,
    /// False while damaged; set again when it caught up with an elected leader.
    pub may_vote: bool,
    /// The leader's first entry is committed here.
    pub serving: bool,
    /// As of the last event; `None` where it does not lead or holds none.
    pub lease_until: Option<Timestamp>,
    /// Leaders only; sorted by replica.
    pub peers: Vec<PeerStatus>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    pub replica: ReplicaId,
    pub state: ProgressState,
    pub next: LogIndex,
    pub submitted: LogIndex,
    pub flushed: LogIndex,
    pub reachable: bool,
    pub epoch: Option<SupportEpoch>,
}
