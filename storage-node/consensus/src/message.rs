//! Messages between the replicas of one group.
//!
//! Every message carries its sender's term. Node-pair heartbeats and their leases are not here: see `liveness`.

use holdfast_id::ReplicaId;

use crate::entry::{Entry, LogIndex, Position, Term};
use crate::liveness::SupportEpoch;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<C> {
    pub term: Term,
    pub body: MessageBody<C>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MessageBody<C> {
    /// A candidacy, or (`pre`) the question whether it would succeed; `term` is the term campaigned for in both.
    Vote {
        pre: bool,
        last: Position,
        transfer: bool,
    },
    VoteReply {
        pre: bool,
        granted: bool,
    },
    /// Entries directly after `previous`; empty as a probe, a commit notice or a read-index round.
    Append {
        previous: Position,
        commit: LogIndex,
        entries: Vec<Entry<C>>,
        round: u64,
    },
    /// `flushed` is the highest index known durable here that matches the leader's log in this term.
    /// `support` is this node's current support epoch for the leader's node, see `liveness`.
    AppendReply {
        result: AppendResult,
        flushed: LogIndex,
        round: u64,
        support: SupportEpoch,
    },
    /// The leader asks `to` to campaign at once; the leader's lease is renounced already.
    TransferNow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendResult {
    /// Everything up to and with this index matches the leader's log and is submitted to the disk.
    Submitted(LogIndex),
    /// The entry at `previous` does not match; the leader retries at or below `hint`, or just above it where the hint
    /// lies above what was rejected: the log begins there.
    Mismatch { rejected: LogIndex, hint: Position },
    /// The disk is full: nothing was appended; the replica lags until space returns.
    Full { last: LogIndex, of: Shortage },
}

/// What a full disk has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The log, or what the next checkpoints give back.
    Passing,
    /// Data; nobody can promise that it returns.
    Data,
}

/// A message with its address inside the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressed<C> {
    pub from: ReplicaId,
    pub to: ReplicaId,
    pub message: Message<C>,
}
