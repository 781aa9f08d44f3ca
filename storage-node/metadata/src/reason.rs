//! Why things are as they are, in words: one place for people and programs to look.

use holdfast_id::VolumeId;

use crate::catalogue::{Catalogue, DiskState, NodeState, Obstacle, VolumeState};
use crate::planner::{Bytes, Shortfall, candidates};
use crate::spec::SIZE_BYTES_MIN;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Stable word for programs.
    pub code: &'static str,
    pub message: String,
    /// What to do; empty where waiting is enough.
    pub action: &'static str,
    /// `kind/name`.
    pub subject: String,
}

impl Obstacle {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Obstacle::NoSpace => ("its disk is full", "add disks, or delete volumes"),
            Obstacle::DiskFailed => {
                ("its disk has failed", "delete the volume and create it again, or replace the disk")
            }
            Obstacle::DiskUnknown => ("it does not have the disk", "put the disk back, or create the volume again"),
            Obstacle::TooManyReplicas => ("it holds as many copies as it can", "delete volumes, or add nodes"),
            Obstacle::Conflict => ("it has the copy as something else", "report this: it must not happen"),
            Obstacle::Internal => ("it failed to", "look into the node's log"),
        }
    }
}

/// What a volume waits for; empty where it is as wanted. The catalogue's part: replicas know their own health.
pub fn explain_volume(catalogue: &Catalogue, id: VolumeId) -> Vec<Reason> {
    let Some(volume) = catalogue.volumes().get(&id) else { return Vec::new() };
    let subject = format!("volume/{}", volume.name);
    let reason = |code, message, action| Reason { code, message, action, subject: subject.clone() };
    let mut reasons = Vec::new();
    match volume.state {
        VolumeState::Creating => {
            for entry in volume.members.iter().filter(|entry| !entry.created) {
                let node = catalogue.node_label(entry.member.node);
                reasons.push(match entry.obstacle {
                    None => reason("WaitingForReplica", format!("waiting for {node} to create its copy"), ""),
                    Some(obstacle) => {
                        let (why, action) = obstacle.words();
                        reason("ReplicaRefused", format!("{node} does not create its copy: {why}"), action)
                    }
                });
            }
        }
        VolumeState::Ready if volume.is_resizing() => {
            let (from, to) = (Bytes(volume.provisioned_bytes), Bytes(volume.spec.size_bytes));
            reasons.push(reason("Resizing", format!("growing from {from} to {to}"), ""));
        }
        VolumeState::Ready => {}
        VolumeState::Deleting => {
            for tombstone in catalogue.tombstones().values().filter(|tombstone| tombstone.volume == id) {
                let node = catalogue.node_label(tombstone.node);
                let message = format!("waiting for {node} to delete its copy");
                reasons.push(reason("WaitingForDeletion", message, "if the node is down, start it"));
            }
        }
    }
    for entry in &volume.members {
        let disk = catalogue.disks().get(&entry.member.disk);
        if disk.is_some_and(|disk| disk.state == DiskState::Failed) {
            let message = format!("the disk of its copy on {} failed", catalogue.node_label(entry.member.node));
            reasons.push(reason("CopyLost", message, "back the data up; the copy is not made again by itself yet"));
        }
    }
    reasons
}

/// What keeps nodes from taking copies. A node has room as long as the smallest volume fits.
pub fn explain_nodes(catalogue: &Catalogue) -> Vec<Reason> {
    let (_, short) = candidates(catalogue, SIZE_BYTES_MIN);
    let mut reasons: Vec<Reason> = short
        .into_iter()
        .map(|node| {
            let (code, action) = match node.why {
                Shortfall::Draining => ("Draining", "set the node active to use it again"),
                Shortfall::NoDisk => ("NoDisk", "give the node a disk"),
                Shortfall::DiskFailed => ("DiskFailed", "replace the disk"),
                Shortfall::Room { .. } => ("NoSpace", "add disks, or delete volumes"),
            };
            Reason { code, message: node.to_string(), action, subject: format!("node/{}", node.node) }
        })
        .collect();
    for (id, disk) in catalogue.disks() {
        let node = catalogue.nodes().get(&disk.node);
        if disk.state == DiskState::Failed && node.is_some_and(|node| node.state != NodeState::Removed) {
            let node = catalogue.node_label(disk.node);
            let subject = format!("node/{node}");
            // A node whose only disk failed was named above.
            if reasons.iter().all(|reason| reason.subject != subject || reason.code != "DiskFailed") {
                let message = format!("{node}: disk {id} failed");
                reasons.push(Reason { code: "DiskFailed", message, action: "replace the disk", subject });
            }
        }
    }
    reasons
}
