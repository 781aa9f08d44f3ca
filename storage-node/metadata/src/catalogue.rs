//! The catalogue: the replicated state itself and the questions one can ask of it. Only `apply` changes it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::apply::ApplyError;
use crate::spec::{Name, SpecError, VolumeSpec, check_address, check_zone};

/// Limits of one cluster. Together they keep an encoded state below [`crate::state::STATE_BYTES_MAX`].
/// Removed nodes and their disks are remembered and count.
pub const NODES_MAX: usize = 1024;
pub const DISKS_MAX: usize = 4096;
pub const VOLUMES_MAX: usize = 8192;
/// Founding members of the metadata group.
pub const FOUNDERS_MAX: usize = 5;

/// A twentieth of a disk's capacity takes no volumes: room for rebuilds, checkpoints and what is being deleted.
const RESERVE_DIVISOR: u64 = 20;

/// Everything the metadata plane knows. See the crate for its invariants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    pub(crate) cluster: ClusterId,
    /// Log index of the last command applied; 0 before the first. Called the revision in plans and intents.
    pub(crate) applied: u64,
    /// Log index at which a volume last left the catalogue. A placement planned before it is refused, so that no
    /// delayed command brings back identifiers whose tombstones are forgotten.
    pub(crate) forgotten_at: u64,
    /// The metadata group's replicas as founded.
    pub(crate) founders: BTreeMap<ReplicaId, NodeId>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) disks: BTreeMap<DiskId, Disk>,
    pub(crate) volumes: BTreeMap<VolumeId, Volume>,
    pub(crate) tombstones: BTreeMap<ReplicaId, Tombstone>,
    /// Set by the first command that could not be understood; nothing is applied after it. Never part of the state:
    /// a newer version that restores the same state goes on.
    #[serde(skip)]
    pub(crate) stopped: Option<ApplyError>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Unique among the nodes that are not removed.
    pub name: Name,
    /// `host:port` for peers and sessions.
    pub peer_address: String,
    /// `host:port` of the control API.
    pub api_address: String,
    /// Failure domain above the node.
    pub zone: Option<String>,
    pub state: NodeState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    Active,
    /// Takes no new replicas.
    Draining,
    /// Holds nothing and never comes back under this identifier.
    Removed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub node: NodeId,
    /// Bytes that can hold data, after the log's and the format's share.
    pub capacity_bytes: u64,
    /// Free bytes as last reported; at most the capacity.
    pub free_bytes: u64,
    pub state: DiskState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    Active,
    /// For good: a disk returns only under a new identifier.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Unique among all volumes, also those being deleted.
    pub name: Name,
    /// As wanted. Where the size is larger than `provisioned_bytes`, a resize is under way.
    pub spec: VolumeSpec,
    /// The size the volume's group has confirmed.
    pub provisioned_bytes: u64,
    /// Sorted by replica. Empty once the volume is being deleted: the tombstones say what is left.
    pub members: Vec<VolumeMember>,
    pub state: VolumeState,
    /// Starts at 1 and rises with every change of specification or state.
    pub generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeMember {
    pub member: Member,
    /// The node has confirmed that the replica exists.
    pub created: bool,
    /// Why the node last refused to create it; gone once created.
    pub obstacle: Option<Obstacle>,
}

/// Where one copy lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub replica: ReplicaId,
    pub node: NodeId,
    pub disk: DiskId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Its replicas are being created.
    Creating,
    /// Every replica has existed; it can be attached.
    Ready,
    /// Its replicas are being deleted.
    Deleting,
}

/// Why a node cannot do what it was told. Kept small: one stands in every member that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obstacle {
    NoSpace,
    DiskFailed,
    /// The node does not have the disk it was told to use.
    DiskUnknown,
    /// The node has as many replicas as it can hold.
    TooManyReplicas,
    /// The replica exists with another size, block or membership.
    Conflict,
    /// Something else; the node's log says what.
    Internal,
}

/// The order to delete one replica's data, until its node confirms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    pub volume: VolumeId,
    pub node: NodeId,
    pub disk: DiskId,
    /// Still counts against the disk until the node confirms.
    pub size_bytes: u64,
    /// The volume's generation when the order was given.
    pub generation: u64,
}

/// A founding member of the metadata group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founder {
    pub node: NodeId,
    /// Its replica of the metadata group.
    pub replica: ReplicaId,
    pub name: Name,
    pub peer_address: String,
    pub api_address: String,
    pub zone: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoundError {
    #[error("a cluster is founded by 1, 3 or 5 nodes, not by {count}")]
    Count { count: usize },
    #[error("two founders have the same node id, replica id or name: {name}")]
    Twice { name: Name },
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// Where a node is; see [`Catalogue::peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer<'a> {
    pub name: &'a Name,
    pub peer_address: &'a str,
    pub api_address: &'a str,
}

/// What is promised on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Placed {
    /// Sum of the sizes of the volumes with a copy on it, also of those being deleted.
    pub bytes: u64,
    pub replicas: u32,
}

impl Catalogue {
    /// The state at index 0, equal on every founder: given the same founders in any order.
    pub fn found(cluster: ClusterId, founders: &[Founder]) -> Result<Catalogue, FoundError> {
        if !matches!(founders.len(), 1 | 3 | FOUNDERS_MAX) {
            return Err(FoundError::Count { count: founders.len() });
        }
        let mut catalogue = Catalogue {
            cluster,
            applied: 0,
            forgotten_at: 0,
            founders: BTreeMap::new(),
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            stopped: None,
        };
        let mut names = BTreeSet::new();
        for founder in founders {
            check_address(&founder.peer_address)?;
            check_address(&founder.api_address)?;
            founder.zone.as_deref().map_or(Ok(()), check_zone)?;
            let node = Node {
                name: founder.name.clone(),
                peer_address: founder.peer_address.clone(),
                api_address: founder.api_address.clone(),
                zone: founder.zone.clone(),
                state: NodeState::Active,
            };
            let fresh = names.insert(&founder.name)
                && catalogue.nodes.insert(founder.node, node).is_none()
                && catalogue.founders.insert(founder.replica, founder.node).is_none();
            if !fresh {
                return Err(FoundError::Twice { name: founder.name.clone() });
            }
        }
        Ok(catalogue)
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Log index of the last command applied.
    pub fn revision(&self) -> u64 {
        self.applied
    }

    /// Why nothing is applied any more; `None` in every healthy replica.
    pub fn stopped(&self) -> Option<&ApplyError> {
        self.stopped.as_ref()
    }

    /// The metadata group's replicas as founded, with their nodes.
    pub fn founders(&self) -> &BTreeMap<ReplicaId, NodeId> {
        &self.founders
    }

    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    pub fn disks(&self) -> &BTreeMap<DiskId, Disk> {
        &self.disks
    }

    pub fn volumes(&self) -> &BTreeMap<VolumeId, Volume> {
        &self.volumes
    }

    pub fn tombstones(&self) -> &BTreeMap<ReplicaId, Tombstone> {
        &self.tombstones
    }

    pub fn volume_named(&self, name: &str) -> Option<(VolumeId, &Volume)> {
        self.volumes.iter().find(|(_, volume)| volume.name.as_str() == name).map(|(id, volume)| (*id, volume))
    }

    /// Removed nodes keep their name in the record; they are not found by it.
    pub fn node_named(&self, name: &str) -> Option<(NodeId, &Node)> {
        let live = |node: &Node| node.state != NodeState::Removed;
        self.nodes.iter().find(|(_, node)| node.name.as_str() == name && live(node)).map(|(id, node)| (*id, node))
    }

    /// The address book: every node that is not removed.
    pub fn peers(&self) -> BTreeMap<NodeId, Peer<'_>> {
        let live = self.nodes.iter().filter(|(_, node)| node.state != NodeState::Removed);
        live.map(|(id, node)| {
            let peer = Peer { name: &node.name, peer_address: &node.peer_address, api_address: &node.api_address };
            (*id, peer)
        })
        .collect()
    }

    /// What is promised on every disk that holds or will hold a replica.
    pub fn placed(&self) -> BTreeMap<DiskId, Placed> {
        let mut placed: BTreeMap<DiskId, Placed> = BTreeMap::new();
        let mut add = |disk: DiskId, size: u64| {
            let entry = placed.entry(disk).or_default();
            entry.bytes = entry.bytes.saturating_add(size);
            entry.replicas += 1;
        };
        for volume in self.volumes.values() {
            volume.members.iter().for_each(|member| add(member.member.disk, volume.spec.size_bytes));
        }
        self.tombstones.values().for_each(|tombstone| add(tombstone.disk, tombstone.size_bytes));
        placed
    }

    /// Whether replicas lie on the node, or are still to be deleted from it.
    pub fn node_holds(&self, node: NodeId) -> bool {
        self.volumes.values().any(|volume| volume.members.iter().any(|member| member.member.node == node))
            || self.tombstones.values().any(|tombstone| tombstone.node == node)
            || self.founders.values().any(|founder| *founder == node)
    }

    /// The name people know a node by; its identifier where the catalogue does not have it.
    pub fn node_label(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |node| node.name.to_string())
    }
}

impl Disk {
    /// Bytes that new volumes may claim: the capacity less reserve and promises, and no more than is free in fact.
    pub fn placeable_bytes(&self, placed: Placed) -> u64 {
        let offered = self.capacity_bytes - self.capacity_bytes / RESERVE_DIVISOR;
        offered.saturating_sub(placed.bytes).min(self.free_bytes)
    }
}

impl Volume {
    pub fn group(id: VolumeId) -> GroupId {
        GroupId::first(id)
    }

    pub fn is_resizing(&self) -> bool {
        self.state == VolumeState::Ready && self.provisioned_bytes != self.spec.size_bytes
    }

    pub fn member(&self, replica: ReplicaId) -> Option<&VolumeMember> {
        self.members.iter().find(|member| member.member.replica == replica)
    }
}
