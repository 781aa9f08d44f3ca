//! What the control API asks of a shard, and what it answers.

use std::sync::Arc;
use std::time::Duration;

use holdfast_consensus::{LogIndex, Member, Standing, Term};
use holdfast_id::{DiskId, GroupId, NodeId, ReplicaId, SnapshotId, VolumeId};
use holdfast_metadata::catalogue::{FoundError, Founder};
use holdfast_metadata::command::Command;
use holdfast_metadata::planner::PlanError;
use holdfast_metadata::spec::{Labels, Name, VolumeSpec};
use holdfast_metadata::{Catalogue, Outcome};
use holdfast_protocol::session::{Epoch, Instance};
use holdfast_replica::rebuild::RebuildProgress;
use holdfast_store::chunk::Counters;
use holdfast_store::group::Usage;
use holdfast_volume::volume::SNAPSHOTS_MAX;

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
    /// Attaches a volume for somebody else, at the volume's leader.
    Attach(AttachVolume),
    /// Ends the attachment of `epoch`, at the volume's leader.
    Detach { volume: VolumeId, epoch: Epoch },
    /// Keeps a volume's blocks as of now, at the volume's leader. Repeating it is harmless: the snapshot is named by
    /// whoever asks.
    TakeSnapshot { volume: VolumeId, snapshot: SnapshotId, name: String },
    /// Gives a snapshot back, at the volume's leader. One that is not there is success.
    DeleteSnapshot { volume: VolumeId, snapshot: SnapshotId },
    /// What this node itself knows, without asking anybody.
    Report,
    /// The same of some volumes alone; of all where none is named.
    Volumes { volumes: Vec<VolumeId> },
    /// How full its disk is.
    Usage,
}

/// The machine opens its own sessions under the epoch that comes back.
#[derive(Clone, Debug)]
pub struct AttachVolume {
    pub volume: VolumeId,
    pub holder: String,
    /// Random, minted by the rim for this call alone.
    pub instance: Instance,
    pub take_over: bool,
}

/// A volume to be planned. Identifiers are minted by the rim, which has the randomness.
#[derive(Clone, Debug)]
pub struct NewVolume {
    pub volume: VolumeId,
    /// As many as the specification wants replicas.
    pub replicas: Vec<ReplicaId>,
    pub name: Name,
    pub spec: VolumeSpec,
    /// Names of nodes that get a copy where that is possible.
    pub preferred: Vec<String>,
    pub labels: Labels,
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
    Catalogue(Arc<Catalogue>),
    /// `already`: under the same epoch before.
    Attached {
        epoch: Epoch,
        already: bool,
    },
    /// The epoch is over, now or since some time.
    Detached,
    /// It is kept, now or since some time, as of this index of the volume's log.
    SnapshotTaken {
        index: LogIndex,
    },
    /// There is no such snapshot any more.
    SnapshotDeleted,
    Report(Box<ShardReport>),
    Volumes(Vec<VolumeReport>),
    Usage(Usage),
    Failed(AdminError),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// Ask there, or where there is none, anywhere else.
    #[error("this node does not lead what was asked for")]
    NotLeader { leader: Option<NodeId> },
    #[error("this node is not among the founders")]
    NotAFounder,
    #[error("the metadata group was founded before, otherwise")]
    FoundedOtherwise,
    #[error(transparent)]
    Founders(FoundError),
    #[error("the disk refused: {reason}")]
    Disk { reason: String },
    #[error("this node holds no replica of the volume")]
    NoReplica,
    #[error("the holder's name is none: {reason}")]
    Holder { reason: String },
    #[error("attached by {holder} (epoch {}): detach it there, or take it over, which fences that holder for good", epoch.0)]
    Held { holder: String, epoch: Epoch },
    #[error("epoch {} was never granted, the latest is {}", epoch.0, latest.0)]
    UnknownEpoch { epoch: Epoch, latest: Epoch },
    #[error("another attachment of the volume is under way; ask again")]
    AttachmentUnderWay,
    #[error("the snapshot's name is none: {reason}")]
    SnapshotName { reason: String },
    #[error("the volume has another snapshot of this name or identifier: {name}, {snapshot}")]
    SnapshotConflict { snapshot: SnapshotId, name: String },
    #[error("the volume has {SNAPSHOTS_MAX} snapshots, the most there can be; delete some")]
    TooManySnapshots,
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
    /// What was found broken since the start, and what was repaired.
    pub counters: Counters,
    pub log_damage: LogDamageReport,
    pub scrub: ScrubReport,
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
    /// False after damage of the log, until the replica has followed an elected leader to its end.
    pub may_vote: bool,
    /// It is being rebuilt, and applies nothing meanwhile.
    pub rebuilding: bool,
    pub voters: usize,
    /// False for a learner, and for one that is no member any more.
    pub votes: bool,
    /// The configuration in force; while it changes, both sides of it.
    pub members: Vec<Member>,
    pub outgoing: Vec<Member>,
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
    pub repair: RepairReport,
    /// As applied here, the oldest first.
    pub snapshots: Vec<SnapshotReport>,
}

/// A snapshot as this replica has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    pub snapshot: SnapshotId,
    pub name: String,
    pub index: LogIndex,
    /// Of the volume at that index.
    pub size_bytes: u64,
    /// `None`: it is applied and not on the disk yet, or not any more.
    pub held: Option<HeldSnapshot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldSnapshot {
    /// Equal on every replica. `None`: parts of its map are lost here.
    pub hash: Option<u128>,
    /// Of the slots it names, whoever else does.
    pub allocated_bytes: Option<u64>,
}

/// What the disk had lost of a group's blocks, since the start of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairReport {
    /// Slots of sixteen blocks in which something was found corrupt.
    pub corrupt_slots: u64,
    pub repaired_blocks: u64,
    /// Copies of other replicas that contradicted the map here. Never, unless a program is wrong somewhere.
    pub mismatches: u64,
    /// Asked for and not repaired yet.
    pub pending_slots: u64,
    /// Slots some of whose blocks no replica has any more.
    pub lost_slots: Vec<u64>,
    pub last: Option<LastRepair>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRepair {
    pub from: NodeId,
    pub ago: Duration,
    pub first_block: u64,
}

/// Logs that were not whole when the disk was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogDamageReport {
    /// Groups whose log this start found damaged.
    pub found: Vec<GroupId>,
    /// Groups that did not vote after this start, also for damage that an earlier one had found.
    pub groups: u64,
    /// Of them, those that still follow a leader, or wait for one.
    pub following: Vec<GroupId>,
    /// Since the last of them became whole.
    pub whole_ago: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubReport {
    pub running: bool,
    /// Passes ended since the start.
    pub passes: u64,
    /// Read by the pass under way, or the last one.
    pub bytes: u64,
    /// How long ago the last pass ended, how long it took, and what it read.
    pub last: Option<(Duration, Duration, u64)>,
}
