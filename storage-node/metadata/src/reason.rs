//! Why things are as they are, in words: one place for people and programs to look.

use holdfast_id::VolumeId;

use crate::catalogue::{Catalogue, DiskState, NodeState, Obstacle, Place, Replacement, VolumeState};
use crate::planner::{Bytes, List, Shortfall, candidates};
use crate::spec::SIZE_BYTES_MIN;
use crate::upkeep::{self, Held, Wish};

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
            Obstacle::DiskFailed => ("its disk has failed", "replace the disk"),
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
    reasons.extend(explain_moves(catalogue, id, &subject));
    reasons
}

/// Which replicas of the group move or are made again, and what they wait for.
fn explain_moves(catalogue: &Catalogue, id: VolumeId, subject: &str) -> Vec<Reason> {
    let reason = |code, message, action| Reason { code, message, action, subject: subject.to_owned() };
    let Some(placement) = catalogue.placement(id) else { return Vec::new() };
    let mut reasons = Vec::new();
    let node_of = |place: &Place| catalogue.node_label(place.node);
    let why = |place: &Place| {
        let node = catalogue.node_label(place.node);
        match (catalogue.counts(place), catalogue.is_leaving(place)) {
            (false, _) => format!("its copy on {node} is lost"),
            (true, true) => format!("its copy leaves {node}"),
            (true, false) => format!("its copy on {node} is replaced"),
        }
    };
    let (have, wanted) = (placement.members.len(), placement.wanted);
    if let Some(Replacement { old, new }) = placement.replacement {
        let old = placement.members.iter().find(|place| Some(place.replica) == *old);
        let what = match (old, new) {
            (Some(old), None) => format!("{have} copies are there, {wanted} are wanted: that on {} goes", node_of(old)),
            (Some(old), Some(_)) => why(old),
            (None, _) => format!("{have} of {wanted} copies are there"),
        };
        let node = new.as_ref().map(|new| catalogue.node_label(new.member.node)).unwrap_or_default();
        reasons.push(match new.as_ref().map(|new| (new.created, new.obstacle)) {
            None => reason("RemovingReplica", what, ""),
            Some((true, _)) => {
                let code = if old.is_some() { "ReplacingReplica" } else { "AddingReplica" };
                reason(code, format!("{what}: the new one on {node} catches up, then votes"), "")
            }
            Some((false, None)) => {
                reason("WaitingForReplica", format!("{what}: waiting for {node} to create the new one"), "")
            }
            Some((false, Some(obstacle))) => {
                let (why, action) = obstacle.words();
                reason("ReplicaRefused", format!("{what}: {node} does not create the new one: {why}"), action)
            }
        });
    }
    for (wish, held) in upkeep::held(catalogue, id) {
        let (old, next) = match wish {
            Wish::Replace(place) => (why(&place), "another is about to be made"),
            Wish::Add => (format!("{have} of {wanted} copies are there"), "another is about to be made"),
            Wish::Remove(place) => (
                format!("{have} copies are there, {wanted} are wanted: that on {} is to go", node_of(&place)),
                "it is about to",
            ),
        };
        reasons.push(match held {
            Ok(()) => reason("ReplacementDue", format!("{old}: {next}"), ""),
            Err(Held::Queue) => reason("ReplacementWaits", format!("{old}: other volumes come first"), ""),
            Err(Held::Busy(busy)) => reason("ReplacementWaits", format!("{old}, but {busy}"), ""),
            Err(Held::BelowQuorum { left, needed }) => reason(
                "BelowQuorum",
                format!("{old}, and {left} copies are left where {needed} must agree to that"),
                "start the nodes of the others; what no node has any more can only be restored from a backup",
            ),
            Err(Held::Nowhere(nodes)) => reason(
                "NowhereToGo",
                format!("{old}, and no node can take another{}", List(&nodes)),
                "add a node or room",
            ),
        });
    }
    reasons
}

/// The metadata plane's own moves.
pub fn explain_metadata(catalogue: &Catalogue) -> Vec<Reason> {
    explain_moves(catalogue, catalogue.metadata_id(), "metadata")
}

/// What keeps nodes from taking copies. A node has room as long as the smallest volume fits.
pub fn explain_nodes(catalogue: &Catalogue) -> Vec<Reason> {
    let (_, short) = candidates(catalogue, SIZE_BYTES_MIN);
    let mut reasons: Vec<Reason> = short
        .into_iter()
        .map(|node| {
            let (code, action) = match node.why {
                Shortfall::Draining => ("Draining", "set the node active to use it again"),
                Shortfall::Removing => ("Removing", "wait: what it holds is being moved"),
                Shortfall::Away => {
                    ("Away", "start it, or mend its network; if it is lost for ever: holdfast node replace")
                }
                Shortfall::DiskRemoving => ("DiskRemoving", "wait: what it holds is being moved"),
                Shortfall::NoZone | Shortfall::ZoneHoldsCopy | Shortfall::HoldsCopy | Shortfall::HoldsFormerCopy => {
                    ("NoSpace", "add nodes")
                }
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
            // A disk that was lost and has nothing to be made again is history.
            if catalogue.disk_holds(*id) {
                let message = format!("{node}: disk {id} failed or was lost; what lay on it is made again elsewhere");
                reasons.push(Reason { code: "DiskLost", message, action: "", subject });
            }
        }
    }
    reasons
}
