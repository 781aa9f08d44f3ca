//! What two storage nodes say to each other.

mod encoding;
pub mod kind;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use holdfast_consensus::SupportEpoch;
use holdfast_id::{GroupId, ReplicaId};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerMessage {
    /// Every 100 ms per node pair and direction. `boot` is the sender's boot epoch. `disk_stalled`: the sender's
    /// disk has made no progress on outstanding I/O since the last beat; the receiver then suspects its leaders.
    Heartbeat { sequence: u64, boot: u64, disk_stalled: bool },
    /// The receiver of the heartbeat supports its sender in this epoch until one lease after receipt. `sequence` and
    /// `boot` are the heartbeat's: an answer to an earlier life of its sender proves nothing.
    HeartbeatReply { sequence: u64, boot: u64, support: SupportEpoch },
    /// A consensus message, encoded by the replica layer: `meta` is its header, `payload` the data of its entries.
    Raft { group: GroupId, from: ReplicaId, to: ReplicaId, meta: Bytes, payload: Bytes },
    /// An intent of the metadata plane, or its answer; encoded by `metadata`, idempotent.
    Control { body: Bytes },
    /// Rebuild traffic, encoded by the replica layer.
    Delta { group: GroupId, from: ReplicaId, to: ReplicaId, meta: Bytes, payload: Bytes },
    /// What does this replica have in slot `slot`? The sender has lost some of it.
    RepairRequest { group: GroupId, from: ReplicaId, to: ReplicaId, slot: u64 },
    /// The answer; `copy` is `None` where this replica cannot tell now.
    RepairReply { group: GroupId, from: ReplicaId, to: ReplicaId, slot: u64, copy: Option<SlotCopy> },
}

/// A slot as a replica has it after all entries up to `index`, and none above it. Bit i stands for block i.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotCopy {
    pub index: u64,
    /// Blocks that hold data; others are zero, unless bad.
    pub present: u16,
    /// Blocks that this replica cannot read either.
    pub bad: u16,
    /// The blocks present and not bad, in order.
    pub data: Bytes,
}
