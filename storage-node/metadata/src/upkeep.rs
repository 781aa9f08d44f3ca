//! What the metadata leader does by itself: it moves what is on leaving disks and nodes, makes again what was on lost
//! ones, makes copies that are wanted, takes out those that are not, and lets go what holds nothing any more.
//!
//! Pure; asked after every change for the next command, until there is none. Nothing is remembered: what is due follows
//! from the catalogue alone, so a new leader goes on where the former one was.

use std::collections::BTreeSet;

use holdfast_id::{DiskId, NodeId, ReplicaId, VolumeId};

use crate::catalogue::{Catalogue, DiskState, Member, NodeState, Place, Placement};
use crate::command::{Command, ReplaceReplica, SetDiskState, SetNodeState};
use crate::lint;
use crate::planner::{NodeShortfall, plan_removal, plan_replacement};

/// Volumes with a replacement at one time: each may copy as much as the volume holds.
pub const REPLACEMENTS_MAX: usize = 8;

/// What is to become of a volume's copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Another takes its place.
    Replace(Place),
    /// There is one too few.
    Add,
    /// There is one too many, and this is the one to go.
    Remove(Place),
}

impl Wish {
    fn old(self) -> Option<ReplicaId> {
        match self {
            Wish::Replace(place) | Wish::Remove(place) => Some(place.replica),
            Wish::Add => None,
        }
    }
}

/// Why a wish is not being carried out.
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
        waiting.into_iter().find_map(|(volume, wish)| {
            let placement = catalogue.placement(volume)?;
            let new = place(catalogue, &placement, wish).ok()?;
            let new = new.map(|(node, disk)| Member { replica: fresh, node, disk });
            let replace = ReplaceReplica { volume, old: wish.old(), new, planned_at: catalogue.revision() };
            Some(Command::ReplaceReplica(replace)).filter(|command| lint::check(catalogue, command).is_ok())
        })
    })
}

/// What is still to become of the volume's copies, and why it is not; `Ok` where nothing stands against it.
pub fn held(catalogue: &Catalogue, volume: VolumeId) -> Vec<(Wish, Result<(), Held>)> {
    let Some(placement) = catalogue.placement(volume) else { return Vec::new() };
    let wishes = wishes(catalogue, &placement).into_iter();
    wishes.map(|wish| (wish, place(catalogue, &placement, wish).map(|_| ()))).collect()
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

fn waiting(catalogue: &Catalogue) -> Vec<(VolumeId, Wish)> {
    let ids = [catalogue.metadata_id()].into_iter().chain(catalogue.volumes().keys().copied());
    let placements = ids.filter_map(|id| catalogue.placement(id));
    placements
        .flat_map(|placement| {
            let volume = placement.volume;
            wishes(catalogue, &placement).into_iter().map(move |wish| (volume, wish))
        })
        .collect()
}

/// What is to be done and is not being done with a replica that counts, in the order in which it is. Before one that
/// leaves is replaced, it is seen whether it is wanted at all.
fn wishes(catalogue: &Catalogue, placement: &Placement<'_>) -> Vec<Wish> {
    // Its copies are not members any more, and the last of them is not missing.
    if placement.members.is_empty() {
        return Vec::new();
    }
    let under_way = placement.replacement;
    let lost = under_way.filter(|found| found.is_lost(catalogue));
    let going = under_way.filter(|found| found.new.is_none());
    let (replaced, lost) = (under_way.and_then(|found| found.old), lost.map(|found| found.old));
    let due = |place: &&Place| match Some(place.replica) {
        old if Some(old) == lost => true,
        old if old == replaced => false,
        _ => catalogue.is_leaving(place),
    };
    let (have, wanted) = (placement.members.len(), placement.wanted);
    let surplus = have.saturating_sub(wanted + usize::from(going.is_some())) > 0;
    let first = surplus.then(|| plan_removal(catalogue, placement)).flatten();
    let first = placement.members.iter().find(|place| Some(place.replica) == first).copied();
    let mut wishes: Vec<Wish> = first.into_iter().map(Wish::Remove).collect();
    let leaving = placement.members.iter().filter(due).filter(|place| first.is_none_or(|first| first != **place));
    wishes.extend(leaving.copied().map(Wish::Replace));
    let coming = under_way.is_some_and(|found| found.old.is_none()) && lost != Some(None);
    if have + usize::from(coming) < wanted {
        wishes.push(Wish::Add);
    }
    wishes
}

/// Where the replica that is to come goes; `None` where none comes.
fn place(catalogue: &Catalogue, placement: &Placement<'_>, wish: Wish) -> Result<Option<(NodeId, DiskId)>, Held> {
    let old = wish.old();
    if let Some(busy) = lint::replacing_waits_for(catalogue, placement, old) {
        return Err(Held::Busy(busy));
    }
    let (left, needed) = placement.quorum(catalogue);
    if left < needed {
        return Err(Held::BelowQuorum { left, needed });
    }
    if let Wish::Remove(_) = wish {
        return Ok(None);
    }
    let found = plan_replacement(catalogue, placement, old).map_err(Held::Nowhere)?;
    // The metadata plane decides everything else and is small: it does not wait in line.
    let volumes = catalogue.volumes().values().filter(|volume| volume.replacement.is_some()).count();
    let in_line = placement.volume != catalogue.metadata_id() && placement.replacement.is_none();
    if in_line && volumes >= REPLACEMENTS_MAX { Err(Held::Queue) } else { Ok(Some(found)) }
}
