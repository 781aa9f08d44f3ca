//! What the control API asks of a shard, and what it answers.

use holdfast_consensus::{LogIndex, Standing, Term};
use holdfast_id::{DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::{Catalogue, Change, Outcome};
use holdfast_protocol::session::Epoch;
use holdfast_store::group::Usage;

#[derive(Clone, Debug)]
pub enum AdminRequest {
    /// Creates this node's replica of the metadata group; the same list of founders goes to every one of them.
    Found { founders: Vec<Founder> },
    /// Changes the catalogue; planned and checked at the metadata leader.
    Change(Change),
    /// The catalogue as of now, linearizable.
    Catalogue,
    /// What this node itself knows, without asking anybody.
    Report,
}

/// A founding member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founder {
    pub node: NodeId,
    pub replica: ReplicaId,
    pub name: String,
    pub peer_address: String,
    pub api_address: String,
    pub zone: Option<String>,
}

#[derive(Clone, Debug)]
pub enum AdminReply {
    Founded,
    Changed(Outcome),
    Catalogue(Box<Catalogue>),
    Report(Box<ShardReport>),
    Failed(AdminError),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// Ask there, or where there is none, anywhere else.
    #[error("this node does not lead the metadata plane")]
    NotLeader { leader: Option<NodeId> },
    #[error("this node has no replica of the metadata group")]
    NoMetadata,
    #[error("this node is not among the founders")]
    NotAFounder,
    #[error("the metadata group was founded before, otherwise")]
    FoundedOtherwise,
    #[error("the disk refused: {reason}")]
    Disk { reason: String },
}

/// A shard as it sees itself.
#[derive(Clone, Debug)]
pub struct ShardReport {
    pub disk: DiskId,
    pub boot_epoch: u64,
    pub usage: Usage,
    pub failed: Option<String>,
    pub metadata: Option<ReplicaReport>,
    pub volumes: Vec<VolumeReport>,
    /// Nodes that share a group with this one: connected, suspected.
    pub peers: Vec<(NodeId, bool, bool)>,
}

#[derive(Clone, Debug)]
pub struct ReplicaReport {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub standing: Standing,
    pub term: Term,
    pub leader: Option<NodeId>,
    pub serving: bool,
    pub last: LogIndex,
    pub flushed: LogIndex,
    pub committed: LogIndex,
    pub applied: LogIndex,
    pub checkpointed: LogIndex,
    /// As this replica knows them if it leads: replica, flushed, reachable.
    pub peers: Vec<(ReplicaId, LogIndex, bool)>,
    /// Why it serves no more.
    pub stopped: Option<String>,
}

#[derive(Clone, Debug)]
pub struct VolumeReport {
    pub volume: VolumeId,
    pub replica: ReplicaReport,
    pub size_bytes: u64,
    pub epoch: Epoch,
    pub holder: Option<String>,
}
