//! The catalogue as bytes: for checkpoints, for replicas that lag, and for comparing replicas.
//!
//! JSON with the fields in the order of the structures and all maps sorted by key, so equal states are equal bytes.
//! `{"version":1,"catalogue":{...}}`

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::catalogue::{
    Catalogue, DISKS_MAX, Disk, FOUNDERS_MAX, NODES_MAX, NodeState, Replacement, VOLUMES_MAX, VolumeMember, VolumeState,
};
use crate::spec::{REPLICAS_MAX, SpecError, check_address, check_labels, check_zone};

/// Version of the state this build writes, and the newest it can read.
pub const STATE_VERSION: u32 = 1;
/// A larger state is refused; the store keeps no larger one. A full catalogue stays below it by its own limits.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// Why bytes are not a catalogue. Nothing of it is used then.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("a catalogue has {bytes} bytes, more than the limit of 16777216")]
    TooLarge { bytes: usize },
    #[error("catalogue version {version} is newer than this build reads; upgrade the node")]
    UnknownVersion { version: u32 },
    #[error("a catalogue is damaged")]
    Malformed { source: serde_json::Error },
    #[error("a catalogue contradicts itself: {what}")]
    Inconsistent { what: String },
    #[error("a catalogue holds what could not have been asked for")]
    Spec(#[from] SpecError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<C> {
    version: u32,
    catalogue: C,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Catalogue {
    pub fn encode_state(&self) -> Vec<u8> {
        let envelope = Envelope { version: STATE_VERSION, catalogue: self };
        let bytes = serde_json::to_vec(&envelope).expect("the catalogue is plain structures with textual keys");
        assert!(bytes.len() <= STATE_BYTES_MAX, "the limits of the catalogue bound its size");
        bytes
    }

    pub fn decode_state(bytes: &[u8]) -> Result<Catalogue, StateError> {
        if bytes.len() > STATE_BYTES_MAX {
            return Err(StateError::TooLarge { bytes: bytes.len() });
        }
        let malformed = |source| StateError::Malformed { source };
        let Version { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version != STATE_VERSION {
            return Err(StateError::UnknownVersion { version });
        }
        let envelope: Envelope<Catalogue> = serde_json::from_slice(bytes).map_err(malformed)?;
        envelope.catalogue.check()?;
        Ok(envelope.catalogue)
    }

    /// Equal on replicas at an equal revision. Against mistakes, not against attackers: FNV-1a over the encoded state.
    pub fn state_hash(&self) -> u64 {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        self.encode_state().iter().fold(0xcbf2_9ce4_8422_2325, step)
    }

    /// The invariants that one state can show; see the crate.
    pub fn check(&self) -> Result<(), StateError> {
        let holds = |good: bool, what: &dyn Fn() -> String| {
            if good { Ok(()) } else { Err(StateError::Inconsistent { what: what() }) }
        };
        holds(self.forgotten_at <= self.applied, &|| "it forgot a volume in the future".into())?;
        let within =
            self.nodes.len() <= NODES_MAX && self.disks.len() <= DISKS_MAX && self.volumes.len() <= VOLUMES_MAX;
        holds(within, &|| "it is over its limits".into())?;
        let mut names = BTreeSet::new();
        for (id, node) in &self.nodes {
            check_address(&node.peer_address)?;
            check_address(&node.api_address)?;
            node.zone.as_deref().map_or(Ok(()), check_zone)?;
            let unique = node.state == NodeState::Removed || names.insert(&node.name);
            holds(unique, &|| format!("node {id} shares its name {}", node.name))?;
        }
        for (id, disk) in &self.disks {
            let good = self.nodes.contains_key(&disk.node) && disk.free_bytes <= disk.capacity_bytes;
            holds(good, &|| format!("disk {id} lies on no known node, or has more free than it has"))?;
        }
        let on_disk = |disk, node| self.disks.get(&disk).is_some_and(|found: &Disk| found.node == node);
        let mut replicas = BTreeSet::new();
        let mut nodes = BTreeSet::new();
        for place in &self.metadata.members {
            let known = self.nodes.contains_key(&place.node) && place.disk.is_none_or(|disk| on_disk(disk, place.node));
            let good = known && nodes.insert(place.node) && replicas.insert(place.replica);
            holds(good, &|| format!("metadata replica {} lies nowhere, twice, or beside another", place.replica))?;
        }
        let sorted = self.metadata.members.is_sorted_by(|a, b| a < b) && self.metadata.generation >= 1;
        holds(sorted && !self.metadata.members.is_empty(), &|| "the metadata plane is not what it says".into())?;
        for founder in &self.founding {
            check_address(&founder.peer_address)?;
            check_address(&founder.api_address)?;
            founder.zone.as_deref().map_or(Ok(()), check_zone)?;
        }
        let founded = self.founding.len() <= FOUNDERS_MAX && self.founding.is_sorted_by(|a, b| a.replica < b.replica);
        holds(founded, &|| "it was founded by too many, or by one twice".into())?;
        for (replica, tombstone) in &self.tombstones {
            let good = on_disk(tombstone.disk, tombstone.node)
                && !self.disks[&tombstone.disk].state.is_gone()
                && (self.volumes.contains_key(&tombstone.volume) || tombstone.volume == self.metadata_id())
                && replicas.insert(*replica);
            holds(good, &|| format!("tombstone {replica} is on no working disk, of no volume, or a second replica"))?;
        }
        let mut names = BTreeSet::new();
        for (id, volume) in &self.volumes {
            volume.spec.check()?;
            check_labels(&volume.labels)?;
            holds(names.insert(&volume.name), &|| format!("volume {id} shares its name {}", volume.name))?;
            let copies = usize::from(volume.spec.replicas);
            let all_created = volume.members.iter().all(|member| member.created);
            holds(volume.founding_bytes <= volume.provisioned_bytes, &|| format!("volume {id} has shrunk"))?;
            let provisioned = volume.provisioned_bytes == volume.spec.size_bytes;
            let state = match volume.state {
                VolumeState::Creating => volume.members.len() == copies && !all_created && provisioned,
                VolumeState::Ready => {
                    (1..=usize::from(REPLICAS_MAX)).contains(&volume.members.len())
                        && all_created
                        && volume.provisioned_bytes <= volume.spec.size_bytes
                }
                VolumeState::Deleting => {
                    volume.members.is_empty()
                        && volume.replacement.is_none()
                        && self.tombstones.values().any(|tombstone| tombstone.volume == *id)
                }
            };
            holds(state && volume.generation >= 1, &|| format!("volume {id} is not what its state says"))?;
            let sorted = volume.members.is_sorted_by(|a, b| a.member < b.member);
            let mut nodes = BTreeSet::new();
            let placed = volume.members.iter().all(|entry| {
                let member = &entry.member;
                on_disk(member.disk, member.node) && nodes.insert(member.node) && replicas.insert(member.replica)
            });
            holds(sorted && placed, &|| format!("volume {id} has members nowhere, twice, or on one node"))?;
        }
        for volume in self.volumes.keys().copied().chain([self.metadata_id()]) {
            let placement = self.placement(volume).expect("every volume and the metadata plane have one");
            let Some(Replacement { old, new }) = placement.replacement else { continue };
            let stays: Vec<_> = placement.members.iter().filter(|place| Some(place.replica) != *old).collect();
            let good = stays.len() + usize::from(old.is_some()) == placement.members.len()
                && (old.is_some() || new.is_some())
                && new.as_ref().is_none_or(|VolumeMember { member, .. }| {
                    on_disk(member.disk, member.node)
                        && stays.iter().all(|place| place.node != member.node)
                        && replicas.insert(member.replica)
                });
            holds(good, &|| {
                format!("{}: a replacement of no member, or one that lies nowhere or twice", self.volume_label(volume))
            })?;
        }
        holds(!self.volumes.contains_key(&self.metadata_id()), &|| "a volume has the metadata plane's id".into())
    }
}
