//! Between the words of the API and those of the layers below.

use holdfast_api::refusal::{NOT_LEADER, refuse};
use holdfast_api::v1;
use holdfast_consensus::Standing;
use holdfast_id::{DiskId, NodeId, ReplicaId};
use holdfast_metadata::catalogue::{Catalogue, Disk, DiskState, Node, NodeState, Placed, Volume, VolumeState};
use holdfast_metadata::reason::Reason;
use holdfast_metadata::spec::Spread;
use holdfast_metadata::{Outcome, Refusal};
use holdfast_replica::rebuild::{RebuildPhase, RebuildProgress};
use holdfast_shard::{AdminError, AdminReply, NodeAddress, ReplicaReport};
use std::str::FromStr;
use tonic::{Code, Status};

pub(crate) fn parse<T: FromStr>(field: &'static str, text: &str) -> Result<T, Status>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| refuse(Code::InvalidArgument, "InvalidArgument", &format!("{field}: {error}")))
}

pub(crate) fn addresses(nodes: Vec<v1::NodeAddress>) -> Result<Vec<NodeAddress>, Status> {
    let one = |address: v1::NodeAddress| {
        let node: NodeId = parse("node_id", &address.node_id)?;
        Ok(NodeAddress { node, peer: address.peer_address, api: address.api_address })
    };
    nodes.into_iter().map(one).collect()
}

pub(crate) fn reason(reason: Reason) -> v1::Reason {
    v1::Reason {
        code: reason.code.to_owned(),
        message: reason.message,
        action: reason.action.to_owned(),
        subject: reason.subject,
    }
}

/// What a change of the catalogue came to. `Ok(true)`: it changed something.
pub(crate) fn changed(reply: AdminReply) -> Result<bool, Status> {
    match reply {
        AdminReply::Changed(Outcome::Applied) => Ok(true),
        AdminReply::Changed(Outcome::Unchanged) => Ok(false),
        AdminReply::Changed(Outcome::Refused(refusal)) => Err(refused(&refusal)),
        AdminReply::NotPlaced(error) => Err(refuse(Code::FailedPrecondition, error.code(), &error.to_string())),
        reply => Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
    }
}

pub(crate) fn refused(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Spec(_) | Refusal::Shrink { .. } => Code::InvalidArgument,
        Refusal::UnknownVolume { .. }
        | Refusal::UnknownNode { .. }
        | Refusal::UnknownDisk { .. }
        | Refusal::UnknownReplica { .. } => Code::NotFound,
        Refusal::NameTaken { .. } | Refusal::VolumeDiffers { .. } => Code::AlreadyExists,
        Refusal::GenerationMismatch { .. } | Refusal::StalePlan { .. } => Code::Aborted,
        Refusal::Limit { .. } => Code::ResourceExhausted,
        Refusal::Deleting { .. }
        | Refusal::NodeRemoved { .. }
        | Refusal::DiskRetired { .. }
        | Refusal::DiskMoved { .. }
        | Refusal::Unsafe { .. } => Code::FailedPrecondition,
    };
    refuse(code, refusal.code(), &refusal.to_string())
}

/// Who does not lead says so with a hint, which takes more than the error.
pub(crate) fn failed(error: &AdminError) -> Status {
    let (code, reason) = match error {
        AdminError::NotLeader { .. } => (Code::Unavailable, NOT_LEADER),
        AdminError::NotAFounder | AdminError::FoundedOtherwise | AdminError::Founders(_) | AdminError::Disk { .. } => {
            (Code::FailedPrecondition, "Refused")
        }
        AdminError::NoReplica => (Code::NotFound, "NoReplica"),
        AdminError::Holder { .. } => (Code::InvalidArgument, "InvalidArgument"),
        AdminError::Held { .. } => (Code::FailedPrecondition, "Held"),
        AdminError::UnknownEpoch { .. } => (Code::FailedPrecondition, "UnknownEpoch"),
        AdminError::AttachmentUnderWay => (Code::Unavailable, "AttachmentUnderWay"),
        AdminError::SnapshotName { .. } => (Code::InvalidArgument, "InvalidArgument"),
        AdminError::SnapshotConflict { .. } => (Code::AlreadyExists, "SnapshotConflict"),
        AdminError::TooManySnapshots => (Code::ResourceExhausted, "TooManySnapshots"),
    };
    refuse(code, reason, &error.to_string())
}

pub(crate) fn role(replica: &ReplicaReport) -> v1::ReplicaRole {
    match replica.standing {
        Standing::Follower if !replica.votes => v1::ReplicaRole::Learner,
        Standing::Leader => v1::ReplicaRole::Leader,
        Standing::Follower => v1::ReplicaRole::Follower,
        Standing::PreCandidate | Standing::Candidate => v1::ReplicaRole::Candidate,
    }
}

pub(crate) fn rebuild(replica: ReplicaId, progress: &RebuildProgress) -> v1::Rebuild {
    let phase = match progress.phase {
        RebuildPhase::Waiting => v1::RebuildPhase::Waiting,
        RebuildPhase::Copying => v1::RebuildPhase::Copying,
        RebuildPhase::Done => v1::RebuildPhase::Done,
    };
    v1::Rebuild {
        replica_id: replica.to_string(),
        phase: phase.into(),
        slots_compared: progress.slots_compared,
        bytes_copied: progress.bytes_copied,
        bytes_listed: progress.bytes_listed,
    }
}

pub(crate) fn node_state(state: NodeState) -> v1::NodeState {
    match state {
        NodeState::Active => v1::NodeState::Active,
        NodeState::Draining => v1::NodeState::Draining,
        NodeState::Removing => v1::NodeState::Removing,
        NodeState::Removed => v1::NodeState::Removed,
        NodeState::Away => v1::NodeState::Away,
    }
}

fn disk_life(state: DiskState) -> v1::DiskLife {
    match state {
        DiskState::Active => v1::DiskLife::Active,
        DiskState::Removing => v1::DiskLife::Removing,
        DiskState::Removed => v1::DiskLife::Removed,
        DiskState::Failed => v1::DiskLife::Lost,
    }
}

pub(crate) fn spread(text: &str) -> Result<Spread, Status> {
    match text {
        "" | "node" => Ok(Spread::Node),
        "zone" => Ok(Spread::Zone),
        _ => Err(refuse(Code::InvalidArgument, "InvalidSpec", "spread: say node or zone")),
    }
}

/// Without what only the replicas know.
pub(crate) fn volume(catalogue: &Catalogue, id: holdfast_id::VolumeId, volume: &Volume) -> v1::Volume {
    let replicas = volume.members.iter().chain(volume.coming()).map(|entry| {
        let node = catalogue.nodes().get(&entry.member.node);
        v1::ReplicaStatus {
            replica_id: entry.member.replica.to_string(),
            node_id: entry.member.node.to_string(),
            node_name: node.map_or_else(String::new, |node| node.name.to_string()),
            peer_address: node.map_or_else(String::new, |node| node.peer_address.clone()),
            disk_id: entry.member.disk.to_string(),
            created: entry.created,
            ..v1::ReplicaStatus::default()
        }
    });
    let state = match volume.state {
        VolumeState::Creating => v1::VolumeState::Creating,
        VolumeState::Ready => v1::VolumeState::Ready,
        VolumeState::Deleting => v1::VolumeState::Deleting,
    };
    v1::Volume {
        volume_id: id.to_string(),
        name: volume.name.to_string(),
        size_bytes: volume.spec.size_bytes,
        logical_block_bytes: volume.spec.logical_block_bytes,
        replicas_wanted: u32::from(volume.spec.replicas),
        state: state.into(),
        reason: holdfast_metadata::reason::explain_volume(catalogue, id).into_iter().next().map(reason),
        generation: volume.generation,
        replicas: replicas.collect(),
        labels: volume.labels.clone().into_iter().collect(),
        ..v1::Volume::default()
    }
}

pub(crate) fn disk(id: DiskId, disk: &Disk, placed: Placed) -> v1::ClusterDisk {
    let state = match disk.state {
        DiskState::Active | DiskState::Removing | DiskState::Removed => v1::DiskState::Formatted,
        DiskState::Failed => v1::DiskState::Failed,
    };
    v1::ClusterDisk {
        disk_id: id.to_string(),
        state: state.into(),
        capacity_bytes: disk.capacity_bytes,
        free_bytes: disk.free_bytes,
        placed_bytes: placed.bytes,
        replicas: placed.replicas,
        life: disk_life(disk.state).into(),
        placeable_bytes: disk.placeable_bytes(placed),
        health: None,
    }
}

pub(crate) fn node(catalogue: &Catalogue, id: NodeId, node: &Node) -> v1::ClusterNode {
    let placed = catalogue.placed();
    let disks = catalogue.disks().iter().filter(|(_, disk)| disk.node == id);
    let disks = disks.map(|(id, known)| disk(*id, known, placed.get(id).copied().unwrap_or_default()));
    v1::ClusterNode {
        node_id: id.to_string(),
        name: node.name.to_string(),
        peer_address: node.peer_address.clone(),
        api_address: node.api_address.clone(),
        zone: node.zone.clone().unwrap_or_default(),
        state: node_state(node.state).into(),
        metadata_member: catalogue.metadata().members.iter().any(|place| place.node == id),
        disks: disks.collect(),
        ..v1::ClusterNode::default()
    }
}
