//! What the metadata leader does by itself: it moves what is on leaving disks and nodes, makes again what was on lost
//! ones, and lets go what holds nothing any more.
//!
//! Pure; asked after every change for the next command, until there is none. Nothing is remembered: what is due follows
//! from the catalogue alone, so a new leader goes on where the former one was.

use std::collections::BTreeSet;

use holdfast_id::{ReplicaId, VolumeId};

use crate::catalogue::{Catalogue, DiskState, Member, NodeState, Place, Placement};
use crate::command::{Command, ReplaceReplica, SetDiskState, SetNodeState};
use crate::lint;
use crate::planner::{NodeShortfall, plan_replacement};

/// Volumes with a replacement at one time: each may copy as much as the volume holds.
pub const REPLACEMENTS_MAX: usize = 8;

/// Why a replica that is to be replaced is not being replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Another change of the same volume comes first.
    Busy(&'static str),
    /// Too few copies are left to decide anything.
    BelowQuorum { left: usize, needed: usize },
    /// No node can take it.
    Nowhere(Vec<NodeShortfall>),
    /// Others come first.
    Queue,
}

/// The next command that is due. `fresh` is the id of a replica that it may make.
pub fn next(catalogue: &Catalogue, fresh: ReplicaId) -> Option<Command> {
    finished(catalogue).or_else(|| {
        let mut waiting = waiting(catalogue);
        // Where the fewest copies are left, loss is nearest.
        waiting.sort_by_key(|(volume, _)| {
            let placement = catalogue.placement(*volume).expect("listed from the catalogue");
            (placement.quorum(catalogue).0, *volume)
        });
        waiting.into_iter().find_map(|(volume, old)| {
            let placement = catalogue.placement(volume)?;
            let (node, disk) = place(catalogue, &placement, old).ok()?;
            let new = Member { replica: fresh, node, disk };
            let replace = ReplaceReplica { volume, old, new, planned_at: catalogue.revision() };
            Some(Command::ReplaceReplica(replace)).filter(|command| lint::check(catalogue, command).is_ok())
        })
    })
}

/// Every replica of the volume that is to be replaced and is not yet, and why not; `Ok` where nothing stands against it.
pub fn held(catalogue: &Catalogue, volume: VolumeId) -> Vec<(Place, Result<(), Held>)> {
    let Some(placement) = catalogue.placement(volume) else { return Vec::new() };
    let leaving: Vec<Place> = leaving(catalogue, &placement).collect();
    leaving.into_iter().map(|old| (old, place(catalogue, &placement, old.replica).map(|_| ()))).collect()
}

/// What was to be removed and holds nothing any more.
fn finished(catalogue: &Catalogue) -> Option<Command> {
    let held: BTreeSet<_> = catalogue.places().map(|place| place.node).collect();
    let tombs: BTreeSet<_> = catalogue.tombstones().values().map(|tombstone| tombstone.node).collect();
    let node = catalogue
        .nodes()
        .iter()
        .find(|(id, node)| node.state == NodeState::Removing && !held.contains(id) && !tombs.contains(id));
    if let Some((node, _)) = node {
        return Some(Command::SetNodeState(SetNodeState { node: *node, state: NodeState::Removed }));
    }
    let removing = catalogue.disks().iter().filter(|(_, disk)| disk.state == DiskState::Removing);
    let disk = removing.map(|(id, _)| *id).find(|disk| !catalogue.disk_holds(*disk))?;
    Some(Command::SetDiskState(SetDiskState { disk, state: DiskState::Removed }))
}

fn waiting(catalogue: &Catalogue) -> Vec<(VolumeId, ReplicaId)> {
    let ids = [catalogue.metadata_id()].into_iter().chain(catalogue.volumes().keys().copied());
    let placements = ids.filter_map(|id| catalogue.placement(id));
    placements
        .flat_map(|placement| {
            let volume = placement.volume;
            leaving(catalogue, &placement).map(move |place| (volume, place.replica)).collect::<Vec<_>>()
        })
        .collect()
}

/// Members that are to be replaced and are not being replaced by one that counts.
fn leaving<'a>(catalogue: &'a Catalogue, placement: &'a Placement<'_>) -> impl Iterator<Item = Place> + 'a {
    let lost = placement.replacement.filter(|found| !catalogue.counts(&Place::from(found.new.member)));
    let (replaced, lost) = (placement.replacement.map(|found| found.old), lost.map(|found| found.old));
    let due = move |place: &&Place| match Some(place.replica) {
        old if old == lost => true,
        old if old == replaced => false,
        _ => catalogue.is_leaving(place),
    };
    placement.members.iter().filter(due).copied()
}

fn place(
    catalogue: &Catalogue,
    placement: &Placement<'_>,
    old: ReplicaId,
) -> Result<(holdfast_id::NodeId, holdfast_id::DiskId), Held> {
    if let Some(busy) = lint::replacing_waits_for(catalogue, placement, old) {
        return Err(Held::Busy(busy));
    }
    let (left, needed) = placement.quorum(catalogue);
    if left < needed {
        return Err(Held::BelowQuorum { left, needed });
    }
    let found = plan_replacement(catalogue, placement, old).map_err(Held::Nowhere)?;
    // The metadata plane decides everything else and is small: it does not wait in line.
    let volumes = catalogue.volumes().values().filter(|volume| volume.replacement.is_some()).count();
    let in_line = placement.volume != catalogue.metadata_id() && placement.replacement.is_none();
    if in_line && volumes >= REPLACEMENTS_MAX { Err(Held::Queue) } else { Ok(found) }
}
