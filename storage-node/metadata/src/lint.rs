//! Whether a change is safe, independent of who planned it. Asked before a command is proposed, and again when it is
//! applied, because the catalogue may have changed in between.
//!
//! Rules: as many copies as wanted, on distinct nodes and in as many zones as there are to be had; on disks that exist,
//! lie where the plan says, are active and have room; under replica ids never seen; one change of a volume at a time;
//! no node leaves while a copy on it is counted on.

use std::collections::BTreeSet;

use holdfast_id::{DiskId, NodeId, ReplicaId};

use crate::catalogue::{Catalogue, DiskState, Member, NodeState, Volume, VolumeState};
use crate::command::{Command, CreateVolume, ResizeVolume, SetNodeState};
use crate::planner::{Bytes, BytesUp, candidates};

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    #[error("{planned} copies are planned where {wanted} are wanted")]
    WrongCopies { wanted: u8, planned: usize },
    #[error("two copies are planned on node {node}")]
    SameNode { node: String },
    #[error("replica {replica} is planned twice or was used before")]
    ReplicaReused { replica: ReplicaId },
    #[error("copies are planned in {used} zones where {possible} could be used")]
    ZonesWasted { used: usize, possible: usize },
    #[error("disk {disk} is not known")]
    UnknownDisk { disk: DiskId },
    #[error("disk {disk} is not on node {node}")]
    DiskElsewhere { disk: DiskId, node: String },
    #[error("disk {disk} of node {node} has failed")]
    DiskFailed { disk: DiskId, node: String },
    #[error("node {node} takes no new copies: it is draining or removed")]
    NodeNotActive { node: String },
    #[error("node {node} has {} free for new volumes, the copy needs {}", Bytes(*.placeable_bytes), BytesUp(*.needed_bytes))]
    NoRoom { node: String, needed_bytes: u64, placeable_bytes: u64 },
    #[error("volume {name} is being changed already: {what}; wait until it is done")]
    ChangeUnderWay { name: String, what: &'static str },
    #[error("node {node} still holds copies or a metadata replica; move or delete them first")]
    NodeInUse { node: String },
}

/// Every broken rule, in a fixed order. Commands that place nothing and remove nothing are clean.
pub fn check(catalogue: &Catalogue, command: &Command) -> Result<(), Vec<Finding>> {
    let findings = match command {
        Command::CreateVolume(create) => create_volume(catalogue, create),
        Command::ResizeVolume(resize) => resize_volume(catalogue, resize),
        Command::SetNodeState(set) => set_node_state(catalogue, set),
        Command::RegisterNode(_)
        | Command::RegisterDisk(_)
        | Command::UpdateDisk(_)
        | Command::VolumeReplicaCreated(_)
        | Command::VolumeReplicaRefused(_)
        | Command::VolumeResized(_)
        | Command::DeleteVolume(_)
        | Command::VolumeReplicaDeleted(_) => Vec::new(),
    };
    if findings.is_empty() { Ok(()) } else { Err(findings) }
}

/// A volume that exists under this id is the same command once more, and nothing is placed by it.
fn create_volume(catalogue: &Catalogue, create: &CreateVolume) -> Vec<Finding> {
    if catalogue.volumes().contains_key(&create.volume) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if create.members.len() != usize::from(create.spec.replicas) {
        findings.push(Finding::WrongCopies { wanted: create.spec.replicas, planned: create.members.len() });
    }
    distinct_domains(catalogue, create, &mut findings);
    fresh_replicas(catalogue, &create.members, &mut findings);
    let placed = catalogue.placed();
    for member in &create.members {
        let Some(disk) = catalogue.disks().get(&member.disk) else {
            findings.push(Finding::UnknownDisk { disk: member.disk });
            continue;
        };
        let node = || catalogue.node_label(member.node);
        if disk.node != member.node {
            findings.push(Finding::DiskElsewhere { disk: member.disk, node: node() });
        }
        if disk.state != DiskState::Active {
            findings.push(Finding::DiskFailed { disk: member.disk, node: node() });
        }
        if catalogue.nodes().get(&member.node).is_none_or(|node| node.state != NodeState::Active) {
            findings.push(Finding::NodeNotActive { node: node() });
        }
        let placeable_bytes = disk.placeable_bytes(placed.get(&member.disk).copied().unwrap_or_default());
        if placeable_bytes < create.spec.size_bytes {
            findings.push(Finding::NoRoom { node: node(), needed_bytes: create.spec.size_bytes, placeable_bytes });
        }
    }
    findings
}

fn distinct_domains(catalogue: &Catalogue, create: &CreateVolume, findings: &mut Vec<Finding>) {
    let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
    let mut zones: BTreeSet<Option<&str>> = BTreeSet::new();
    for member in &create.members {
        if !nodes.insert(member.node) {
            findings.push(Finding::SameNode { node: catalogue.node_label(member.node) });
        }
        if let Some(node) = catalogue.nodes().get(&member.node) {
            zones.insert(node.zone.as_deref());
        }
    }
    let (candidates, _) = candidates(catalogue, create.spec.size_bytes);
    let zones_there: BTreeSet<Option<&str>> = candidates.iter().map(|candidate| candidate.zone).collect();
    let possible = zones_there.len().min(create.members.len());
    if zones.len() < possible {
        findings.push(Finding::ZonesWasted { used: zones.len(), possible });
    }
}

fn fresh_replicas(catalogue: &Catalogue, members: &[Member], findings: &mut Vec<Finding>) {
    let in_use = |replica: ReplicaId| {
        catalogue.tombstones().contains_key(&replica)
            || catalogue.founders().contains_key(&replica)
            || catalogue.volumes().values().any(|volume| volume.member(replica).is_some())
    };
    let mut seen = BTreeSet::new();
    for member in members {
        if !seen.insert(member.replica) || in_use(member.replica) {
            findings.push(Finding::ReplicaReused { replica: member.replica });
        }
    }
}

fn resize_volume(catalogue: &Catalogue, resize: &ResizeVolume) -> Vec<Finding> {
    let Some(volume) = catalogue.volumes().get(&resize.volume) else { return Vec::new() };
    let wanted = resize.size_bytes;
    if wanted <= volume.spec.size_bytes {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if let Some(what) = under_way(volume) {
        findings.push(Finding::ChangeUnderWay { name: volume.name.to_string(), what });
    }
    let placed = catalogue.placed();
    for member in volume.members.iter().map(|member| member.member) {
        let Some(disk) = catalogue.disks().get(&member.disk) else { continue };
        let node = catalogue.node_label(member.node);
        if disk.state != DiskState::Active {
            findings.push(Finding::DiskFailed { disk: member.disk, node });
            continue;
        }
        let needed_bytes = wanted - volume.spec.size_bytes;
        let placeable_bytes = disk.placeable_bytes(placed.get(&member.disk).copied().unwrap_or_default());
        if placeable_bytes < needed_bytes {
            findings.push(Finding::NoRoom { node, needed_bytes, placeable_bytes });
        }
    }
    findings
}

/// What keeps a volume from being changed; a deletion is refused elsewhere, it is not a matter of waiting.
fn under_way(volume: &Volume) -> Option<&'static str> {
    match volume.state {
        VolumeState::Creating => Some("its copies are being created"),
        VolumeState::Ready if volume.is_resizing() => Some("it is being resized"),
        VolumeState::Ready | VolumeState::Deleting => None,
    }
}

fn set_node_state(catalogue: &Catalogue, set: &SetNodeState) -> Vec<Finding> {
    let leaves = set.state == NodeState::Removed
        && catalogue.nodes().get(&set.node).is_some_and(|node| node.state != NodeState::Removed);
    if leaves && catalogue.node_holds(set.node) {
        return vec![Finding::NodeInUse { node: catalogue.node_label(set.node) }];
    }
    Vec::new()
}
