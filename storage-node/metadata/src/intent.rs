//! What the metadata leader tells a node, and what the node answers: the body of a peer control message.
//!
//! An intent may arrive late, twice or not at all; carrying it out twice is the same as once. What a node must observe:
//!
//! * An intent with a lower `revision` than one it has seen since it started is refused as `Stale`. Only a leader that
//!   holds its lease sends, so nothing older than a deletion can reach a node that has restarted since.
//! * `CreateReplica` for a replica that exists with the same parameters is done already; with others it is a conflict.
//! * `DeleteReplica` names the replica. A group that has another replica on the node keeps it. A replica that is not
//!   there is deleted already.
//! * It answers with `Done` only once the result is durable.

use holdfast_id::{DiskId, GroupId, NodeId, ReplicaId};
use serde::{Deserialize, Serialize};

use crate::catalogue::{FOUNDERS_MAX, Founder, Obstacle};
use crate::spec::{Name, REPLICAS_MAX};

/// Version of both messages.
pub const INTENT_VERSION: u32 = 1;
/// A longer body is refused unread. The largest is a creation with five members, about 1 KiB.
pub const INTENT_BYTES_MAX: usize = 16 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// Addressee; a node drops what is not for it.
    pub node: NodeId,
    /// The catalogue's revision that this follows from.
    pub revision: u64,
    /// The volume's generation that this follows from; returned in the reply.
    pub generation: u64,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    CreateReplica(CreateReplica),
    DeleteReplica(DeleteReplica),
    ResizeGroup(ResizeGroup),
    CreateMetadataReplica(CreateMetadataReplica),
    ChangeMembers(ChangeMembers),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateReplica {
    #[serde(with = "group")]
    pub group: GroupId,
    pub replica: ReplicaId,
    pub disk: DiskId,
    /// Voters of the group with their nodes, sorted by replica: as founded, with this one among them; or, for one that
    /// comes in later, those there are now, without it. It begins empty either way, and such a one as a learner.
    pub members: Vec<(ReplicaId, NodeId)>,
    pub name: Name,
    /// As founded.
    pub size_bytes: u64,
    pub logical_block_bytes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteReplica {
    #[serde(with = "group")]
    pub group: GroupId,
    pub replica: ReplicaId,
    pub disk: DiskId,
}

/// To every member; the one that leads proposes it, the others answer `NotLeader`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeGroup {
    #[serde(with = "group")]
    pub group: GroupId,
    /// The group's own size is never lowered to it.
    pub size_bytes: u64,
}

/// A replica of the metadata group for one that goes. It begins empty, as a learner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateMetadataReplica {
    #[serde(with = "group")]
    pub group: GroupId,
    pub replica: ReplicaId,
    pub disk: DiskId,
    /// Voters there are now, sorted by replica.
    pub members: Vec<(ReplicaId, NodeId)>,
    /// What the state at the log's begin is made of.
    pub founding: Vec<Founder>,
}

/// To every member, also those that come and go; the one that leads brings the group a step nearer to exactly these
/// voters, the others answer `NotLeader`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeMembers {
    #[serde(with = "group")]
    pub group: GroupId,
    /// Sorted by replica.
    pub voters: Vec<(ReplicaId, NodeId)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntentReply {
    /// As in the intent.
    pub generation: u64,
    /// The intent's action, returned so that the answer stands for itself.
    pub action: Action,
    pub result: IntentResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum IntentResult {
    /// Done, or so already; durable.
    Done,
    Refused(Obstacle),
    /// The node has seen a newer revision.
    Stale,
    /// The group is led by another replica.
    NotLeader,
    /// On its way; ask again. A learner that is waited for lacks so many entries, 0 where none is.
    UnderWay {
        behind: u64,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum IntentError {
    #[error("a control message has {bytes} bytes, more than the limit of 16384")]
    TooLarge { bytes: usize },
    #[error("control message version {version} is newer than this build reads; upgrade the node")]
    UnknownVersion { version: u32 },
    #[error("a control message is damaged or of a newer version")]
    Malformed { source: serde_json::Error },
    #[error("the members of a group are not sorted, too many or none, or a founder is missing among them")]
    Members,
}

/// The body of a control message between nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Control {
    Intent(Intent),
    Reply(IntentReply),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<C> {
    version: u32,
    control: C,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Control {
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(&Envelope { version: INTENT_VERSION, control: self })
            .expect("control messages are plain structures with textual keys")
    }

    pub fn decode(bytes: &[u8]) -> Result<Control, IntentError> {
        if bytes.len() > INTENT_BYTES_MAX {
            return Err(IntentError::TooLarge { bytes: bytes.len() });
        }
        let malformed = |source| IntentError::Malformed { source };
        let Version { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version != INTENT_VERSION {
            return Err(IntentError::UnknownVersion { version });
        }
        let Envelope { control, .. } = serde_json::from_slice::<Envelope<Control>>(bytes).map_err(malformed)?;
        let (node, action) = match &control {
            Control::Intent(intent) => (Some(intent.node), &intent.action),
            Control::Reply(reply) => (None, &reply.action),
        };
        if action.is_sound(node) { Ok(control) } else { Err(IntentError::Members) }
    }
}

impl Action {
    pub fn group(&self) -> GroupId {
        match self {
            Action::CreateReplica(create) => create.group,
            Action::DeleteReplica(delete) => delete.group,
            Action::ResizeGroup(resize) => resize.group,
            Action::CreateMetadataReplica(create) => create.group,
            Action::ChangeMembers(change) => change.group,
        }
    }

    /// `node`: the addressee, where it is known.
    fn is_sound(&self, node: Option<NodeId>) -> bool {
        let sorted = |members: &[(ReplicaId, NodeId)]| {
            let within = (1..=usize::from(REPLICAS_MAX)).contains(&members.len());
            within && members.is_sorted_by(|a, b| a.0 < b.0)
        };
        match self {
            Action::CreateReplica(create) => {
                let named = create.members.iter().find(|(replica, _)| *replica == create.replica);
                sorted(&create.members) && named.is_none_or(|(_, home)| node.is_none_or(|node| node == *home))
            }
            Action::CreateMetadataReplica(create) => {
                let new = create.members.iter().all(|(replica, _)| *replica != create.replica);
                sorted(&create.members) && new && create.founding.len() <= FOUNDERS_MAX
            }
            Action::ChangeMembers(change) => sorted(&change.voters),
            Action::DeleteReplica(_) | Action::ResizeGroup(_) => true,
        }
    }
}

/// A group as `volume/shard`.
mod group {
    use holdfast_id::{GroupId, VolumeId};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(group: &GroupId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}", group.volume, group.shard))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<GroupId, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (volume, shard) = text.split_once('/').ok_or_else(|| serde::de::Error::custom("a group has a shard"))?;
        let volume: VolumeId = volume.parse().map_err(serde::de::Error::custom)?;
        let shard = shard.parse().map_err(serde::de::Error::custom)?;
        Ok(GroupId { volume, shard })
    }
}
