//! What the control API asks of a shard, and what it answers.

use holdfast_consensus::{LogIndex, Standing, Term};
use holdfast_id::{DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{FoundError, Founder};
use holdfast_metadata::command::Command;
use holdfast_metadata::planner::PlanError;
use holdfast_metadata::spec::{Name, VolumeSpec};
use holdfast_metadata::{Catalogue, Outcome};
use holdfast_protocol::session::Epoch;
use holdfast_replica::rebuild::RebuildProgress;
use holdfast_store::group::Usage;

#[derive(Clone, Debug)]
pub enum AdminRequest {
    /// Creates this node's replica of the metadata group; the same list of founders goes to every one of them.
    Found { founders: Vec<Founder> },
    /// Changes the catalogue, at the metadata leader.
    Change(Command),
    /// Plans and records a volume, at the metadata leader.
    CreateVolume(NewVolume),
    /// The catalogue as of now, linearizable.
    Catalogue,
    /// What this node itself knows, without asking anybody.
    Report,
}

/// A volume to be planned. Identifiers are minted by the rim, which has the randomness.
#[derive(Clone, Debug)]
pub struct NewVolume {
    pub volume: VolumeId,
    /// As many as the specification wants replicas.
    pub replicas: Vec<ReplicaId>,
    pub name: Name,
    pub spec: VolumeSpec,
}

#[derive(Clone, Debug)]
pub enum AdminReply {
    Founded,
    Changed(Outcome),
    /// A volume of that name is there already; `same`: with the same specification.
    Exists {
        volume: VolumeId,
        same: bool,
    },
    NotPlaced(PlanError),
    Catalogue(Box<Catalogue>),
    Report(Box<ShardReport>),
    Failed(AdminError),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// Ask there, or where there is none, anywhere else.
    #[error("this node does not lead the metadata plane")]
    NotLeader { leader: Option<NodeId> },
    #[error("this node is not among the founders")]
    NotAFounder,
    #[error("the metadata group was founded before, otherwise")]
    FoundedOtherwise,
    #[error(transparent)]
    Founders(FoundError),
    #[error("the disk refused: {reason}")]
    Disk { reason: String },
}

/// A shard as it sees itself.
#[derive(Clone, Debug)]
pub struct ShardReport {
    pub disk: DiskId,
    pub boot_epoch: u64,
    pub usage: Usage,
    pub metadata: Option<ReplicaReport>,
    /// Equal on all replicas of the metadata group at equal applied index.
    pub catalogue_hash: Option<u64>,
    pub volumes: Vec<VolumeReport>,
    /// Groups of which the disk holds nothing usable but the name, and why.
    pub damaged: Vec<(GroupId, String)>,
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
    /// It is being rebuilt, and applies nothing meanwhile.
    pub rebuilding: bool,
    pub voters: usize,
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
    /// Replicas that need more than the log still has, as the leader knows them.
    pub lagging: Vec<ReplicaId>,
    /// Rebuilds that this replica serves, and the last one of each peer since it leads.
    pub rebuilds: Vec<(ReplicaId, RebuildProgress)>,
}
