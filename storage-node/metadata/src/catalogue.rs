//! The catalogue: the replicated state itself and the questions one can ask of it. Only `apply` changes it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::apply::ApplyError;
use crate::spec::{Labels, Name, SpecError, Spread, VolumeSpec, check_address, check_zone};

/// Limits of one cluster. Together they keep an encoded state below [`crate::state::STATE_BYTES_MAX`].
/// Removed nodes and their disks are remembered and count.
pub const NODES_MAX: usize = 1024;
pub const DISKS_MAX: usize = 4096;
pub const VOLUMES_MAX: usize = 6144;
/// Replacements, under way or with the former replica not deleted yet, of volumes that are not being deleted.
pub const REPLACED_MAX: usize = 8192;
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
    /// How the cluster was founded: what the state at index 0 is made of again where a replica begins at it.
    pub(crate) founding: Vec<Founder>,
    pub(crate) metadata: MetadataPlane,
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
    /// As `Draining`, and what it holds is moved elsewhere; `Removed` once it holds nothing.
    Removing,
    /// Holds nothing and never comes back under this identifier.
    Removed,
    /// Gone for so long that what it holds is made again elsewhere; `Active` as soon as it is back.
    Away,
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
    /// Takes no new replicas, and what it holds is moved elsewhere; `Removed` once it holds nothing.
    Removing,
    /// Holds nothing and never comes back under this identifier.
    Removed,
    /// It failed, or was declared lost: for good, a disk returns only under a new identifier.
    Failed,
}

impl DiskState {
    /// Nothing on it counts any more.
    pub fn is_gone(self) -> bool {
        matches!(self, DiskState::Removed | DiskState::Failed)
    }
}

/// Where the replicas of the metadata group are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetadataPlane {
    /// Sorted by replica.
    pub members: Vec<Place>,
    pub replacement: Option<Replacement>,
    /// Starts at 1 and rises with every change of the members.
    pub generation: u64,
}

/// Where one replica lies. A founder's disk is not known before its node has registered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    pub replica: ReplicaId,
    pub node: NodeId,
    pub disk: Option<DiskId>,
}

impl From<Member> for Place {
    fn from(member: Member) -> Place {
        Place { replica: member.replica, node: member.node, disk: Some(member.disk) }
    }
}

/// One replica takes the place of another; or, where there is no old one, comes beside the others; or, where there is no
/// new one, goes. The group goes on with its former members until the new one votes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replacement {
    /// A member until the replacement is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<ReplicaId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<VolumeMember>,
}

/// A group as its placement is planned and carried out: a volume's, or the metadata plane's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement<'a> {
    /// The metadata plane has the volume id that its group has.
    pub volume: VolumeId,
    pub members: Vec<Place>,
    pub replacement: Option<&'a Replacement>,
    /// Members that there are to be.
    pub wanted: usize,
    /// What a disk must have room for.
    pub size_bytes: u64,
    pub spread: Spread,
    pub generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Unique among all volumes, also those being deleted.
    pub name: Name,
    /// As wanted. Where the size is larger than `provisioned_bytes`, a resize is under way; where there are fewer or more
    /// members than replicas, they are made or taken out.
    pub spec: VolumeSpec,
    /// Gone once it is being deleted.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The size the volume's group has confirmed.
    pub provisioned_bytes: u64,
    /// The size it was created with: a replica that begins at the log's begin begins with it.
    pub founding_bytes: u64,
    /// Sorted by replica. Empty once the volume is being deleted: the tombstones say what is left.
    pub members: Vec<VolumeMember>,
    /// While one copy is moved or made again.
    pub replacement: Option<Replacement>,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
            founding: founders.to_vec(),
            metadata: MetadataPlane { members: Vec::new(), replacement: None, generation: 1 },
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            stopped: None,
        };
        catalogue.founding.sort_by_key(|founder| founder.replica);
        let (mut names, mut replicas) = (BTreeSet::new(), BTreeSet::new());
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
                && replicas.insert(founder.replica);
            if !fresh {
                return Err(FoundError::Twice { name: founder.name.clone() });
            }
            catalogue.metadata.members.push(Place { replica: founder.replica, node: founder.node, disk: None });
        }
        catalogue.metadata.members.sort();
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

    /// How the cluster was founded, in the order of the replicas.
    pub fn founding(&self) -> &[Founder] {
        &self.founding
    }

    pub fn metadata(&self) -> &MetadataPlane {
        &self.metadata
    }

    /// What commands and tombstones call the metadata plane's group; no volume has it.
    pub fn metadata_id(&self) -> VolumeId {
        GroupId::metadata(self.cluster).volume
    }

    pub fn group(&self, volume: VolumeId) -> GroupId {
        if volume == self.metadata_id() { GroupId::metadata(self.cluster) } else { Volume::group(volume) }
    }

    /// Where a volume's copies, or the metadata plane's replicas, are and are to be.
    pub fn placement(&self, volume: VolumeId) -> Option<Placement<'_>> {
        if volume == self.metadata_id() {
            let MetadataPlane { members, replacement, generation } = &self.metadata;
            let replacement = replacement.as_ref();
            // The reserve of every disk has room for it.
            let (members, generation) = (members.clone(), *generation);
            let (spread, wanted) = (Spread::Node, members.len());
            return Some(Placement { volume, members, replacement, wanted, size_bytes: 0, spread, generation });
        }
        let found = self.volumes.get(&volume)?;
        Some(Placement {
            volume,
            members: found.members.iter().map(|entry| Place::from(entry.member)).collect(),
            replacement: found.replacement.as_ref(),
            wanted: usize::from(found.spec.replicas),
            size_bytes: found.spec.size_bytes,
            spread: found.spec.spread,
            generation: found.generation,
        })
    }

    /// What people call it.
    pub fn volume_label(&self, volume: VolumeId) -> String {
        match self.volumes.get(&volume) {
            Some(found) => format!("volume {}", found.name),
            None if volume == self.metadata_id() => "the metadata plane".into(),
            None => format!("volume {volume}"),
        }
    }

    /// Whether what lies there still counts: its disk is there as far as anybody knows.
    pub fn counts(&self, place: &Place) -> bool {
        place.disk.and_then(|disk| self.disks.get(&disk)).is_none_or(|disk| !disk.state.is_gone())
    }

    /// Whether what lies there is to be moved or made again elsewhere.
    pub fn is_leaving(&self, place: &Place) -> bool {
        let disk = place.disk.and_then(|disk| self.disks.get(&disk));
        let node = self.nodes.get(&place.node);
        disk.is_some_and(|disk| disk.state != DiskState::Active)
            || node.is_some_and(|node| !matches!(node.state, NodeState::Active | NodeState::Draining))
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
            volume
                .members
                .iter()
                .chain(volume.coming())
                .for_each(|entry| add(entry.member.disk, volume.spec.size_bytes));
        }
        self.tombstones.values().for_each(|tombstone| add(tombstone.disk, tombstone.size_bytes));
        placed
    }

    /// Whether replicas lie on the node, or are still to be deleted from it.
    pub fn node_holds(&self, node: NodeId) -> bool {
        self.places().any(|place| place.node == node)
            || self.tombstones.values().any(|tombstone| tombstone.node == node)
    }

    /// As `node_holds`, of a disk.
    pub fn disk_holds(&self, disk: DiskId) -> bool {
        self.places().any(|place| place.disk == Some(disk))
            || self.tombstones.values().any(|tombstone| tombstone.disk == disk)
    }

    /// Every replica that is a member of a group or is to be one.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        let volumes = self.volumes.values().flat_map(|volume| volume.members.iter().chain(coming(&volume.replacement)));
        let metadata = self.metadata.members.iter().copied();
        let replicas = volumes.chain(coming(&self.metadata.replacement)).map(|entry| Place::from(entry.member));
        metadata.chain(replicas)
    }

    /// The name people know a node by; its identifier where the catalogue does not have it.
    pub fn node_label(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |node| node.name.to_string())
    }
}

fn coming(replacement: &Option<Replacement>) -> impl Iterator<Item = &VolumeMember> {
    replacement.iter().filter_map(|replacement| replacement.new.as_ref())
}

impl Replacement {
    /// What it is known by: the new replica; where none comes, the one that goes.
    pub fn replica(&self) -> Option<ReplicaId> {
        self.new.as_ref().map(|new| new.member.replica).or(self.old)
    }

    /// Whether what is to come lies on a disk that is gone: it never will.
    pub fn is_lost(&self, catalogue: &Catalogue) -> bool {
        self.new.as_ref().is_some_and(|new| !catalogue.counts(&Place::from(new.member)))
    }
}

impl Placement<'_> {
    /// Members that count, and how many of them a quorum needs.
    pub fn quorum(&self, catalogue: &Catalogue) -> (usize, usize) {
        (self.members.iter().filter(|place| catalogue.counts(place)).count(), self.members.len() / 2 + 1)
    }

    /// The replica that is on its way in.
    pub fn coming(&self) -> Option<&VolumeMember> {
        self.replacement?.new.as_ref()
    }

    /// Who votes when the replacement is done.
    pub fn voters(&self) -> BTreeMap<ReplicaId, NodeId> {
        let old = self.replacement.and_then(|replacement| replacement.old);
        let stays = self.members.iter().filter(|place| Some(place.replica) != old);
        let coming = self.coming().map(|new| new.member);
        stays.map(|place| (place.replica, place.node)).chain(coming.map(|m| (m.replica, m.node))).collect()
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

    /// The replica that is on its way in.
    pub fn coming(&self) -> Option<&VolumeMember> {
        coming(&self.replacement).next()
    }

    pub fn member(&self, replica: ReplicaId) -> Option<&VolumeMember> {
        self.members.iter().find(|member| member.member.replica == replica)
    }
}
