//! Who promises not to vote against whom: liveness and leases per pair of nodes.
//!
//! A node that received a heartbeat *supports* the sender until a lease after the receipt: no replica on it grants a
//! vote against a leader on that node. The supported node counts the same lease from its own *send* time, so its view
//! ends first. When support lapses, or a replica here grants a vote to somebody else, the supporter raises the
//! `SupportEpoch` for that node: support given in an older epoch proves nothing to a leader that learnt its follower's
//! epoch in an `AppendReply` of its own term.

pub mod pairs;

use holdfast_id::ReplicaId;

use crate::time::Timestamp;

/// Raised whenever support for a node lapses or is withdrawn. The boot epoch is in the high bits' place of honour:
/// compared as a pair, never reused over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SupportEpoch {
    /// Boot epoch of the supporter.
    pub boot: u64,
    pub count: u64,
}

/// What a replica needs to know of the nodes of its peers; answered by the shard's node-pair liveness.
pub trait Liveness {
    /// The peer's node's promise to this node: epoch, and until when by this node's clock (counted from send time).
    fn supported_by(&self, peer: ReplicaId) -> Option<(SupportEpoch, Timestamp)>;
    /// Until when this node has promised not to vote against leaders on the peer's node.
    fn promised_to(&self, peer: ReplicaId) -> Timestamp;
    /// This node's current support epoch for the peer's node, as told in `AppendReply`.
    fn epoch_for(&self, peer: ReplicaId) -> SupportEpoch;
    /// Called when a replica here stops following a leader on the peer's node, so before it votes for another: every
    /// later promise to that node carries a higher epoch. `promised_to` does not fall by it.
    fn withdraw(&mut self, peer: ReplicaId);
}
