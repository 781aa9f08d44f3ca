//! What changes the catalogue, and how a command stands in the log.
//!
//! ```text
//! {"version":1,"command":{"kind":"delete_volume","body":{...}}}
//! ```
//!
//! JSON: the plane sees a few writes per second, and a person can read its log. Every command is idempotent: applied
//! twice, the second time changes nothing. Fields, kinds and versions that are not known are errors, never skipped.

use holdfast_id::{DiskId, NodeId, ReplicaId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::catalogue::{DiskState, Member, NodeState, Obstacle};
use crate::spec::{Labels, Name, VolumeSpec};

/// Version of the commands this build writes, and the newest it can apply.
pub const COMMAND_VERSION: u32 = 1;
/// A longer command is refused before it is proposed. The largest is a volume with five members and labels, about 2 KiB.
pub const COMMAND_BYTES_MAX: usize = 16 << 10;

/// The kinds of `COMMAND_VERSION`, to tell a newer command from a damaged one.
const KINDS: [&str; 15] = [
    "register_node",
    "set_node_state",
    "register_disk",
    "update_disk",
    "create_volume",
    "volume_replica_created",
    "volume_replica_refused",
    "resize_volume",
    "volume_resized",
    "set_volume_replicas",
    "delete_volume",
    "volume_replica_deleted",
    "set_disk_state",
    "replace_replica",
    "replica_replaced",
];

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "body", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// A node says who and where it is: at its first join, and again whenever that has changed.
    RegisterNode(RegisterNode),
    SetNodeState(SetNodeState),
    /// A formatted disk joins; its whole capacity is free.
    RegisterDisk(RegisterDisk),
    /// What a disk reports. Propose it when the figures have moved enough to matter for placement, not at every beat.
    UpdateDisk(UpdateDisk),
    /// With the members the planner chose.
    CreateVolume(CreateVolume),
    VolumeReplicaCreated(VolumeReplicaCreated),
    VolumeReplicaRefused(VolumeReplicaRefused),
    ResizeVolume(ResizeVolume),
    /// The volume's group has committed the size.
    VolumeResized(VolumeResized),
    /// How many copies there are to be; they are made or taken out one after the other.
    SetVolumeReplicas(SetVolumeReplicas),
    /// Turns every member into a tombstone.
    DeleteVolume(DeleteVolume),
    VolumeReplicaDeleted(VolumeReplicaDeleted),
    /// What is to become of a disk: an operator's word, or the end of a removal.
    SetDiskState(SetDiskState),
    /// One replica is to take the place of another, as planned, or to come, or to go.
    ReplaceReplica(ReplaceReplica),
    /// The group has committed it: a former replica is a tombstone from now on.
    ReplicaReplaced(ReplicaReplaced),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterNode {
    pub node: NodeId,
    pub name: Name,
    pub peer_address: String,
    pub api_address: String,
    pub zone: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetNodeState {
    pub node: NodeId,
    pub state: NodeState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterDisk {
    pub disk: DiskId,
    pub node: NodeId,
    pub capacity_bytes: u64,
    /// The node serves from this disk and no other: those it had before are gone. What lies on them is made again
    /// elsewhere; they are given up for good where everything on them has a quorum without them.
    pub only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateDisk {
    pub disk: DiskId,
    pub capacity_bytes: u64,
    /// More than the capacity counts as the capacity.
    pub free_bytes: u64,
    /// It failed while it was in use: for good, and it counts as the deletion of what was to be deleted from it, because
    /// such a disk never comes back under its identifier.
    pub failed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetDiskState {
    pub disk: DiskId,
    /// `Failed` declares it lost for ever, as if it had failed by itself.
    pub state: DiskState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplaceReplica {
    /// A volume, or the metadata plane under the id of its group.
    pub volume: VolumeId,
    /// Without it, another copy is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<ReplicaId>,
    /// Minted by the proposer, never used before. Without it, a copy goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Member>,
    /// The catalogue's revision that the place was chosen on.
    pub planned_at: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaReplaced {
    pub volume: VolumeId,
    /// The new one; where none came, the one that went.
    pub replica: ReplicaId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Minted by the proposer, never used before.
    pub volume: VolumeId,
    pub name: Name,
    pub spec: VolumeSpec,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    pub members: Vec<Member>,
    /// The catalogue's revision that the members were planned on.
    pub planned_at: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeReplicaCreated {
    pub volume: VolumeId,
    pub replica: ReplicaId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeReplicaRefused {
    pub volume: VolumeId,
    pub replica: ReplicaId,
    pub obstacle: Obstacle,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    pub volume: VolumeId,
    pub size_bytes: u64,
    /// `None`: whatever the generation is.
    pub expected_generation: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResized {
    pub volume: VolumeId,
    pub size_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetVolumeReplicas {
    pub volume: VolumeId,
    pub replicas: u8,
    /// `None`: whatever the generation is.
    pub expected_generation: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteVolume {
    pub volume: VolumeId,
    /// `None`: whatever the generation is.
    pub expected_generation: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeReplicaDeleted {
    pub volume: VolumeId,
    pub replica: ReplicaId,
}

/// Why bytes are not a command of this version. All of them stop the replica that meets them in its log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("a metadata command has {bytes} bytes, more than the limit of 16384")]
    TooLarge { bytes: usize },
    #[error("metadata command version {version} is newer than version 1 of this build; upgrade the node")]
    UnknownVersion { version: u32 },
    #[error("metadata command {kind:?} is not known to this build; upgrade the node")]
    UnknownKind { kind: String },
    #[error("a metadata command is damaged: {detail}")]
    Malformed { detail: String },
}

const _: () = assert!(COMMAND_VERSION == 1 && COMMAND_BYTES_MAX == 16384, "the texts of DecodeError name both");

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<C> {
    version: u32,
    command: C,
}

/// What every version has in common; the rest is looked at only once these are known.
#[derive(Deserialize)]
struct Head {
    kind: String,
}

impl Command {
    pub fn encode(&self) -> Vec<u8> {
        let envelope = Envelope { version: COMMAND_VERSION, command: self };
        serde_json::to_vec(&envelope).expect("commands are plain structures with textual keys")
    }

    pub fn decode(bytes: &[u8]) -> Result<Command, DecodeError> {
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(DecodeError::TooLarge { bytes: bytes.len() });
        }
        let malformed = |error: serde_json::Error| DecodeError::Malformed { detail: error.to_string() };
        let value: Envelope<serde_json::Value> = serde_json::from_slice(bytes).map_err(malformed)?;
        if value.version != COMMAND_VERSION {
            return Err(DecodeError::UnknownVersion { version: value.version });
        }
        let head: Head = serde_json::from_value(value.command.clone()).map_err(malformed)?;
        if !KINDS.contains(&head.kind.as_str()) {
            return Err(DecodeError::UnknownKind { kind: head.kind.chars().take(80).collect() });
        }
        serde_json::from_value(value.command).map_err(malformed)
    }
}
