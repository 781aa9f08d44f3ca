//! Whether a change is safe, independent of who planned it. Asked before a command is proposed, and again when it is
//! applied, because the catalogue may have changed in between.
//!
//! Rules: as many copies as wanted, on distinct nodes and in as many zones as there are to be had; on disks that exist,
//! lie where the plan says, are active and have room; under replica ids never seen; one change of a volume at a time;
//! no node or disk leaves while a copy on it is counted on, none is asked to where its copies have nowhere to go, and
//! none is given up that a quorum of anything needs.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_id::{DiskId, NodeId, ReplicaId};

use crate::catalogue::{
    Catalogue, DiskState, Member, NodeState, Place, Placed, Placement, Replacement, Volume, VolumeState,
};
use crate::command::{
    Command, CreateVolume, ReplaceReplica, ResizeVolume, SetDiskState, SetNodeState, SetVolumeReplicas,
};
use crate::planner::{
    Bytes, BytesUp, List, NodeShortfall, candidates, other_zones, plan_replacement, replacement_candidates,
};
use crate::spec::Spread;

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
    #[error("{copies} copies are to be in zones of their own, and are planned in {zones}")]
    ZonesShared { copies: usize, zones: usize },
    #[error("disk {disk} is not known")]
    UnknownDisk { disk: DiskId },
    #[error("disk {disk} is not on node {node}")]
    DiskElsewhere { disk: DiskId, node: String },
    #[error("disk {disk} of node {node} has failed")]
    DiskFailed { disk: DiskId, node: String },
    #[error("node {node} takes no new copies: it is draining, away or removed")]
    NodeNotActive { node: String },
    #[error("node {node} has {} free for new volumes, the copy needs {}", Bytes(*.placeable_bytes), BytesUp(*.needed_bytes))]
    NoRoom { node: String, needed_bytes: u64, placeable_bytes: u64 },
    #[error("volume {name} is being changed already: {what}; wait until it is done")]
    ChangeUnderWay { name: String, what: &'static str },
    #[error("disk {disk} of node {node} is being removed")]
    DiskRemoving { disk: DiskId, node: String },
    #[error(
        "{what} has {left} copies that count, and needs {needed} to decide anything: start the nodes of the others"
    )]
    BelowQuorum { what: String, left: usize, needed: usize },
    #[error(
        "without it {what} would have {left} copies that count, and needs {needed}: its data would be lost; make copies elsewhere first, or delete it"
    )]
    LosesQuorum { what: String, left: usize, needed: usize },
    #[error("the copy of {what} has nowhere to go{}; add a node or room first", List(.nodes))]
    NowhereToGo { what: String, nodes: Vec<NodeShortfall> },
    #[error("disk {disk} still holds copies; wait until they are moved")]
    DiskInUse { disk: DiskId },
    #[error("node {node} still holds copies or a metadata replica; move or delete them first")]
    NodeInUse { node: String },
}

impl Finding {
    /// Stable word for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Finding::NowhereToGo { .. } => "NowhereToGo",
            Finding::LosesQuorum { .. } => "LosesQuorum",
            Finding::BelowQuorum { .. } => "BelowQuorum",
            Finding::ChangeUnderWay { .. } => "ChangeUnderWay",
            _ => "UnsafeChange",
        }
    }
}

/// Every broken rule, in a fixed order. Commands that place nothing and remove nothing are clean.
pub fn check(catalogue: &Catalogue, command: &Command) -> Result<(), Vec<Finding>> {
    let findings = match command {
        Command::CreateVolume(create) => create_volume(catalogue, create),
        Command::ResizeVolume(resize) => resize_volume(catalogue, resize),
        Command::SetVolumeReplicas(set) => set_volume_replicas(catalogue, set),
        Command::SetNodeState(set) => set_node_state(catalogue, set),
        Command::SetDiskState(set) => set_disk_state(catalogue, set),
        Command::ReplaceReplica(replace) => replace_replica(catalogue, replace),
        Command::RegisterNode(_)
        | Command::RegisterDisk(_)
        | Command::UpdateDisk(_)
        | Command::VolumeReplicaCreated(_)
        | Command::VolumeReplicaRefused(_)
        | Command::VolumeResized(_)
        | Command::DeleteVolume(_)
        | Command::VolumeReplicaDeleted(_)
        | Command::ReplicaReplaced(_) => Vec::new(),
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
        takes_copy(catalogue, &placed, *member, create.spec.size_bytes, &mut findings);
    }
    findings
}

fn takes_copy(
    catalogue: &Catalogue,
    placed: &BTreeMap<DiskId, Placed>,
    member: Member,
    needed_bytes: u64,
    findings: &mut Vec<Finding>,
) {
    let Some(disk) = catalogue.disks().get(&member.disk) else {
        findings.push(Finding::UnknownDisk { disk: member.disk });
        return;
    };
    let node = || catalogue.node_label(member.node);
    if disk.node != member.node {
        findings.push(Finding::DiskElsewhere { disk: member.disk, node: node() });
    }
    match disk.state {
        DiskState::Active => {}
        DiskState::Removing => findings.push(Finding::DiskRemoving { disk: member.disk, node: node() }),
        DiskState::Removed | DiskState::Failed => {
            findings.push(Finding::DiskFailed { disk: member.disk, node: node() });
        }
    }
    if catalogue.nodes().get(&member.node).is_none_or(|node| node.state != NodeState::Active) {
        findings.push(Finding::NodeNotActive { node: node() });
    }
    let placeable_bytes = disk.placeable_bytes(placed.get(&member.disk).copied().unwrap_or_default());
    if placeable_bytes < needed_bytes {
        findings.push(Finding::NoRoom { node: node(), needed_bytes, placeable_bytes });
    }
}

/// What exists already, or concerns nothing that exists, is refused or answered elsewhere.
fn replace_replica(catalogue: &Catalogue, replace: &ReplaceReplica) -> Vec<Finding> {
    let Some(placement) = catalogue.placement(replace.volume) else { return Vec::new() };
    let old = placement.members.iter().find(|place| Some(place.replica) == replace.old);
    let coming = placement.replacement.map(|found| (found.old, found.new.as_ref().map(|new| new.member)));
    let known = |new: Member| placement.members.iter().any(|place| place.replica == new.replica);
    if old.is_none() && replace.old.is_some()
        || replace.old.is_none() && replace.new.is_none()
        || replace.new.is_some_and(known)
        || coming == Some((replace.old, replace.new))
    {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let what = catalogue.volume_label(replace.volume);
    if let Some(busy) = replacing_waits_for(catalogue, &placement, replace.old) {
        findings.push(Finding::ChangeUnderWay { name: what.clone(), what: busy });
    }
    let (left, needed) = placement.quorum(catalogue);
    if left < needed {
        findings.push(Finding::BelowQuorum { what, left, needed });
    }
    let planned = placement.members.len() + usize::from(replace.new.is_some()) - usize::from(old.is_some());
    if old.is_none() && planned > placement.wanted || replace.new.is_none() && planned < placement.wanted {
        findings.push(Finding::WrongCopies { wanted: u8::try_from(placement.wanted).unwrap_or(u8::MAX), planned });
    }
    let Some(new) = replace.new else {
        let stays = |place: &&Place| Some(place.replica) != replace.old && catalogue.counts(place);
        let (left, needed) = (placement.members.iter().filter(stays).count(), planned / 2 + 1);
        if left < needed {
            findings.push(Finding::LosesQuorum { what: catalogue.volume_label(replace.volume), left, needed });
        }
        return findings;
    };
    fresh_replicas(catalogue, &[new], &mut findings);
    takes_copy(catalogue, &catalogue.placed(), new, placement.size_bytes, &mut findings);
    let (fit, _) = replacement_candidates(catalogue, &placement, replace.old);
    let node = new.node;
    let beside = placement.members.iter().any(|place| Some(place.replica) != replace.old && place.node == node);
    let former = catalogue.tombstones().values().any(|t| t.volume == replace.volume && t.disk == new.disk);
    if beside || former || old.is_some_and(|old| old.disk == Some(new.disk)) {
        findings.push(Finding::SameNode { node: catalogue.node_label(node) });
    }
    let zones = other_zones(catalogue, &placement, replace.old);
    let zone = catalogue.nodes().get(&node).and_then(|node| node.zone.as_deref());
    if placement.spread == Spread::Zone && (zone.is_none() || zones.contains(&zone)) {
        findings.push(Finding::ZonesShared { copies: zones.len() + 1, zones: zones.len() });
    }
    if zones.contains(&zone) && fit.iter().any(|candidate| !zones.contains(&candidate.zone)) {
        findings.push(Finding::ZonesWasted { used: zones.len(), possible: zones.len() + 1 });
    }
    findings
}

/// What keeps a replica from being replaced for now. A replacement whose own disk is gone is given up for another.
pub(crate) fn replacing_waits_for(
    catalogue: &Catalogue,
    placement: &Placement<'_>,
    old: Option<ReplicaId>,
) -> Option<&'static str> {
    if let Some(found) = placement.replacement {
        let lost = found.old == old && found.is_lost(catalogue);
        return (!lost).then(|| changing(found));
    }
    let volume = catalogue.volumes().get(&placement.volume)?;
    let others = volume.members.iter().filter(|entry| Some(entry.member.replica) != old).all(|entry| entry.created);
    match volume.state {
        VolumeState::Creating if old.is_some() && others && volume.members.len() > 1 => None,
        _ => under_way(volume),
    }
}

fn set_disk_state(catalogue: &Catalogue, set: &SetDiskState) -> Vec<Finding> {
    let Some(disk) = catalogue.disks().get(&set.disk).filter(|disk| !disk.state.is_gone()) else { return Vec::new() };
    match set.state {
        DiskState::Active => Vec::new(),
        DiskState::Removing if disk.state == DiskState::Removing => Vec::new(),
        DiskState::Removing => nowhere_to_go(
            catalogue,
            |place| place.disk == Some(set.disk),
            |scratch| {
                scratch.disks.get_mut(&set.disk).expect("found above").state = DiskState::Removing;
            },
        ),
        DiskState::Removed if catalogue.disk_holds(set.disk) => vec![Finding::DiskInUse { disk: set.disk }],
        DiskState::Removed => Vec::new(),
        DiskState::Failed => loses_quorum(catalogue, set.disk),
    }
}

/// What could not decide anything any more without the disk.
fn loses_quorum(catalogue: &Catalogue, disk: DiskId) -> Vec<Finding> {
    let mut findings = Vec::new();
    for placement in placements(catalogue) {
        let on_it = placement.members.iter().filter(|place| place.disk == Some(disk)).count();
        let (left, needed) = placement.quorum(catalogue);
        let left = left.saturating_sub(on_it);
        if on_it > 0 && left < needed {
            findings.push(Finding::LosesQuorum { what: catalogue.volume_label(placement.volume), left, needed });
        }
    }
    findings
}

/// Plans every move that leaving asks for, one after the other, on a copy of the catalogue.
fn nowhere_to_go(
    catalogue: &Catalogue,
    leaves: impl Fn(&Place) -> bool,
    leave: impl FnOnce(&mut Catalogue),
) -> Vec<Finding> {
    let mut scratch = catalogue.clone();
    leave(&mut scratch);
    let mut findings = Vec::new();
    let ids: Vec<_> = placements(catalogue).map(|placement| placement.volume).collect();
    for id in ids {
        let placement = scratch.placement(id).expect("listed above");
        let goes = placement.members.iter().find(|place| leaves(place)).map(|place| place.replica);
        let Some(replica) = goes else { continue };
        match plan_replacement(&scratch, &placement, goes) {
            // The identifier does not matter on a copy that nobody keeps.
            Ok((node, disk)) => scratch.assume_moved(id, goes, Member { replica, node, disk }),
            Err(nodes) => findings.push(Finding::NowhereToGo { what: catalogue.volume_label(id), nodes }),
        }
    }
    findings
}

fn placements(catalogue: &Catalogue) -> impl Iterator<Item = Placement<'_>> {
    let ids = [catalogue.metadata_id()].into_iter().chain(catalogue.volumes().keys().copied());
    ids.filter_map(|id| catalogue.placement(id)).filter(|placement| !placement.members.is_empty())
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
    let named = zones.iter().flatten().count();
    if create.spec.spread == Spread::Zone && named < create.members.len() {
        findings.push(Finding::ZonesShared { copies: create.members.len(), zones: named });
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
            || catalogue.founding().iter().any(|founder| founder.replica == replica)
            || catalogue.places().any(|place| place.replica == replica)
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
        if disk.state.is_gone() {
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

/// Whether every copy that is to come has a place now; which ones go is decided when they do.
fn set_volume_replicas(catalogue: &Catalogue, set: &SetVolumeReplicas) -> Vec<Finding> {
    let Some(volume) = catalogue.volumes().get(&set.volume) else { return Vec::new() };
    if volume.spec.replicas == set.replicas || volume.state == VolumeState::Deleting {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let settled = volume.state == VolumeState::Ready && !volume.is_resizing();
    let lost = volume.replacement.as_ref().is_some_and(|found| found.is_lost(catalogue));
    if let Some(what) = under_way(volume).filter(|_| !(settled && lost)) {
        findings.push(Finding::ChangeUnderWay { name: volume.name.to_string(), what });
    }
    let placement = catalogue.placement(set.volume).expect("every volume has one");
    let what = catalogue.volume_label(set.volume);
    let (left, needed) = placement.quorum(catalogue);
    if left < needed {
        findings.push(Finding::BelowQuorum { what: what.clone(), left, needed });
    }
    let mut scratch = catalogue.clone();
    for missing in placement.members.len()..usize::from(set.replicas) {
        let placement = scratch.placement(set.volume).expect("it has one");
        match plan_replacement(&scratch, &placement, None) {
            Ok((node, disk)) => {
                let mut replica = [0xff; 16];
                replica[0] = u8::try_from(missing).expect("a volume has few copies");
                let replica = ReplicaId::from_bytes(replica).expect("not zero");
                scratch.assume_moved(set.volume, None, Member { replica, node, disk });
            }
            Err(nodes) => {
                findings.push(Finding::NowhereToGo { what, nodes });
                break;
            }
        }
    }
    findings
}

/// What keeps a volume from being changed; a deletion is refused elsewhere, it is not a matter of waiting.
fn under_way(volume: &Volume) -> Option<&'static str> {
    match volume.state {
        VolumeState::Creating => Some("its copies are being created"),
        VolumeState::Ready if volume.is_resizing() => Some("it is being resized"),
        VolumeState::Ready | VolumeState::Deleting => volume.replacement.as_ref().map(changing),
    }
}

fn changing(replacement: &Replacement) -> &'static str {
    match replacement {
        Replacement { old: None, .. } => "another copy of it is being made",
        Replacement { new: None, .. } => "one of its copies is being taken out",
        Replacement { .. } => "one of its copies is being replaced",
    }
}

fn set_node_state(catalogue: &Catalogue, set: &SetNodeState) -> Vec<Finding> {
    let leaves = set.state == NodeState::Removed
        && catalogue.nodes().get(&set.node).is_some_and(|node| node.state != NodeState::Removed);
    if leaves && catalogue.node_holds(set.node) {
        return vec![Finding::NodeInUse { node: catalogue.node_label(set.node) }];
    }
    if set.state == NodeState::Removing {
        return nowhere_to_go(
            catalogue,
            |place| place.node == set.node,
            |scratch| {
                if let Some(node) = scratch.nodes.get_mut(&set.node) {
                    node.state = NodeState::Removing;
                }
            },
        );
    }
    Vec::new()
}
