//! Where the copies of a new volume go, and one that is moved or made again. Pure: the same catalogue and request give
//! the same places.
//!
//! Copies lie on distinct nodes always, and in as many distinct zones as there are to be had; a volume that is spread over
//! zones has each copy in its own, or is not placed. Among the disks that may take one, those of preferred nodes come
//! first, in the order of preference; then more placeable room wins, then fewer replicas, then the lower identifier.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use holdfast_id::{DiskId, NodeId, ReplicaId};

use crate::catalogue::{Catalogue, DiskState, Member, NodeState, Place, Placed, Placement};
use crate::spec::{SpecError, Spread, VolumeSpec};

/// A disk that may take a copy, the best one of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    pub node: NodeId,
    pub disk: DiskId,
    /// Nodes without a zone share the nameless one: nothing says that they are apart.
    pub zone: Option<&'a str>,
    pub placeable_bytes: u64,
    pub replicas: u32,
}

/// Why a volume cannot be placed: what was asked, what there is, and per node why not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("{wanted} replicas need {wanted} nodes with {} free each; have {have}{}", BytesUp(*.size_bytes), List(.nodes))]
    NoPlacement { wanted: u8, size_bytes: u64, have: usize, nodes: Vec<NodeShortfall> },
    #[error("{wanted} replicas in zones of their own need {wanted} zones with {} free in each; have {have}{}", BytesUp(*.size_bytes), List(.nodes))]
    NoZones { wanted: u8, size_bytes: u64, have: usize, nodes: Vec<NodeShortfall> },
    #[error("{wanted} replicas need as many new replica ids, got {got} distinct ones")]
    Ids { wanted: u8, got: usize },
}

impl PlanError {
    /// Stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            PlanError::Spec(_) => "InvalidSpec",
            PlanError::NoPlacement { .. } | PlanError::NoZones { .. } => "NoPlacement",
            PlanError::Ids { .. } => "InvalidPlan",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeShortfall {
    pub node: String,
    pub why: Shortfall,
}

/// Why a node takes no copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortfall {
    Draining,
    Removing,
    Away,
    NoDisk,
    DiskFailed,
    /// Its disk is being removed.
    DiskRemoving,
    /// Nothing says where it is, and the copies are to be in zones of their own.
    NoZone,
    /// Its zone has another copy, and the copies are to be in zones of their own.
    ZoneHoldsCopy,
    /// It has another copy.
    HoldsCopy,
    /// It has not deleted a copy of before.
    HoldsFormerCopy,
    /// The most room that one of its disks has for new volumes.
    Room {
        placeable_bytes: u64,
    },
}

impl fmt::Display for NodeShortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.node)?;
        match &self.why {
            Shortfall::Draining => f.write_str("draining"),
            Shortfall::Removing => f.write_str("being removed"),
            Shortfall::Away => f.write_str("away"),
            Shortfall::DiskRemoving => f.write_str("its disk is being removed"),
            Shortfall::NoZone => f.write_str("has no zone"),
            Shortfall::ZoneHoldsCopy => f.write_str("its zone has another copy"),
            Shortfall::HoldsCopy => f.write_str("has another copy"),
            Shortfall::HoldsFormerCopy => f.write_str("has not deleted a former copy yet"),
            Shortfall::NoDisk => f.write_str("no disk"),
            Shortfall::DiskFailed => f.write_str("disk failed"),
            Shortfall::Room { placeable_bytes } => write!(f, "{} free", Bytes(*placeable_bytes)),
        }
    }
}

/// Most nodes named in one message; the rest are counted.
const NODES_NAMED_MAX: usize = 16;

pub(crate) struct List<'a>(pub(crate) &'a [NodeShortfall]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, node) in self.0.iter().take(NODES_NAMED_MAX).enumerate() {
            write!(f, "{}{node}", if number == 0 { ": " } else { ", " })?;
        }
        match self.0.len().saturating_sub(NODES_NAMED_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Bytes that there are, for people: rounded down, so that a text never claims more room than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Bytes that are needed, for people: rounded up, so that what is needed never reads like what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BytesUp(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_bytes(f, self.0, 0)
    }
}

impl fmt::Display for BytesUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_bytes(f, self.0, 1)
    }
}

/// One decimal of the largest unit that fits. Wide, because a size times ten may pass 64 bits.
fn write_bytes(f: &mut fmt::Formatter<'_>, bytes: u64, round_up: u128) -> fmt::Result {
    let units = [(1u128 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let bytes = u128::from(bytes);
    let Some((unit, name)) = units.into_iter().find(|(unit, _)| bytes >= *unit) else {
        return write!(f, "{bytes} B");
    };
    let tenths = (bytes * 10 + round_up * (unit - 1)) / unit;
    write!(f, "{}.{} {name}", tenths / 10, tenths % 10)
}

/// Chooses the members of a new volume. `ids` are fresh replica ids, used in order; more than needed are left over.
/// `preferred` are names of nodes; those that can take no copy, or that nobody knows, are passed over.
pub fn plan_volume(
    catalogue: &Catalogue,
    spec: &VolumeSpec,
    preferred: &[String],
    ids: &[ReplicaId],
) -> Result<Vec<Member>, PlanError> {
    spec.check()?;
    let (wanted, size_bytes) = (usize::from(spec.replicas), spec.size_bytes);
    let distinct = ids.iter().collect::<BTreeSet<_>>().len();
    if distinct != ids.len() || ids.len() < wanted {
        return Err(PlanError::Ids { wanted: spec.replicas, got: distinct });
    }
    let (mut candidates, mut nodes) = candidates(catalogue, size_bytes);
    if spec.spread == Spread::Zone {
        let without = |candidate: &mut Candidate<'_>| candidate.zone.is_none();
        let named = candidates.extract_if(.., without).map(|candidate| catalogue.node_label(candidate.node));
        nodes.extend(named.map(|node| NodeShortfall { node, why: Shortfall::NoZone }));
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        let have = candidates.iter().map(|candidate| candidate.zone).collect::<BTreeSet<_>>().len();
        if have < wanted {
            return Err(PlanError::NoZones { wanted: spec.replicas, size_bytes, have, nodes });
        }
    }
    if candidates.len() < wanted {
        let have = candidates.len();
        return Err(PlanError::NoPlacement { wanted: spec.replicas, size_bytes, have, nodes });
    }
    // Stable: among those that nobody prefers, the better one stays first.
    candidates.sort_by_key(|candidate| {
        let name = catalogue.node_label(candidate.node);
        preferred.iter().position(|wish| *wish == name).unwrap_or(usize::MAX)
    });
    // Rounds over the zones: the best node of every zone, best zone first, then the second best of each.
    let mut seen_in_zone: BTreeMap<Option<&str>, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, usize, &Candidate<'_>)> = Vec::new();
    for (rank, candidate) in candidates.iter().enumerate() {
        let round = seen_in_zone.entry(candidate.zone).or_default();
        ranked.push((*round, rank, candidate));
        *round += 1;
    }
    ranked.sort_by_key(|(round, rank, _)| (*round, *rank));
    let chosen = ranked.into_iter().take(wanted);
    let mut members: Vec<Member> = chosen
        .zip(ids)
        .map(|((_, _, candidate), id)| Member { replica: *id, node: candidate.node, disk: candidate.disk })
        .collect();
    members.sort();
    Ok(members)
}

/// Where the replica that takes the place of `old`, or comes beside the others, goes: as far from them as can be.
///
/// # Errors
/// Why no node can take it.
pub fn plan_replacement(
    catalogue: &Catalogue,
    placement: &Placement<'_>,
    old: Option<ReplicaId>,
) -> Result<(NodeId, DiskId), Vec<NodeShortfall>> {
    let (candidates, short) = replacement_candidates(catalogue, placement, old);
    let zones = other_zones(catalogue, placement, old);
    let best = candidates.iter().enumerate().min_by_key(|(rank, candidate)| (zones.contains(&candidate.zone), *rank));
    best.map(|(_, candidate)| (candidate.node, candidate.disk)).ok_or(short)
}

/// Which replica goes where there is one too many: one that does not count, or is to leave anyhow; then one that is not
/// alone in its zone; then the one whose disk has the least room for new volumes.
pub fn plan_removal(catalogue: &Catalogue, placement: &Placement<'_>) -> Option<ReplicaId> {
    let placed = catalogue.placed();
    let badness = |place: &&Place| {
        let zone = catalogue.nodes().get(&place.node).and_then(|node| node.zone.as_deref());
        let disk = place.disk.and_then(|id| Some((catalogue.disks().get(&id)?, placed.get(&id).copied())));
        let room = disk.map_or(0, |(disk, load)| disk.placeable_bytes(load.unwrap_or_default()));
        (
            !catalogue.counts(place),
            catalogue.is_leaving(place),
            other_zones(catalogue, placement, Some(place.replica)).contains(&zone),
            std::cmp::Reverse(room),
            place.replica,
        )
    };
    placement.members.iter().max_by_key(badness).map(|place| place.replica)
}

/// The zones of the members that stay.
pub(crate) fn other_zones<'a>(
    catalogue: &'a Catalogue,
    placement: &Placement<'_>,
    old: Option<ReplicaId>,
) -> BTreeSet<Option<&'a str>> {
    let stays = placement.members.iter().filter(|place| Some(place.replica) != old);
    stays.filter_map(|place| catalogue.nodes().get(&place.node)).map(|node| node.zone.as_deref()).collect()
}

/// As [`candidates`], without nodes that have a copy which stays, or one of before that they have still to delete: a
/// disk keeps one replica of a group.
pub(crate) fn replacement_candidates<'a>(
    catalogue: &'a Catalogue,
    placement: &Placement<'_>,
    old: Option<ReplicaId>,
) -> (Vec<Candidate<'a>>, Vec<NodeShortfall>) {
    let (mut fit, mut short) = candidates(catalogue, placement.size_bytes);
    let taken = other_zones(catalogue, placement, old);
    let why = |candidate: &Candidate<'_>| {
        let stays = placement.members.iter().any(|place| Some(place.replica) != old && place.node == candidate.node);
        let goes =
            placement.members.iter().any(|place| Some(place.replica) == old && place.disk == Some(candidate.disk));
        let former = catalogue.tombstones().values();
        let former = former.filter(|t| t.volume == placement.volume && t.disk == candidate.disk).count();
        match (stays || goes, former) {
            (true, _) => Some(Shortfall::HoldsCopy),
            (false, 0) => match (placement.spread, candidate.zone) {
                (Spread::Zone, None) => Some(Shortfall::NoZone),
                (Spread::Zone, zone) if taken.contains(&zone) => Some(Shortfall::ZoneHoldsCopy),
                (Spread::Zone | Spread::Node, _) => None,
            },
            (false, _) => Some(Shortfall::HoldsFormerCopy),
        }
    };
    fit.retain(|candidate| match why(candidate) {
        Some(why) => {
            short.push(NodeShortfall { node: catalogue.node_label(candidate.node), why });
            false
        }
        None => true,
    });
    short.sort_by(|a, b| a.node.cmp(&b.node));
    (fit, short)
}

/// Who could take a copy of this size, best first, and why the other nodes cannot. Removed nodes are in neither.
pub fn candidates(catalogue: &Catalogue, size_bytes: u64) -> (Vec<Candidate<'_>>, Vec<NodeShortfall>) {
    let placed = catalogue.placed();
    let mut best: BTreeMap<NodeId, Candidate<'_>> = BTreeMap::new();
    let mut has_failed_disk: BTreeSet<NodeId> = BTreeSet::new();
    let mut has_removing_disk: BTreeSet<NodeId> = BTreeSet::new();
    for (id, disk) in catalogue.disks() {
        match disk.state {
            DiskState::Active => {}
            DiskState::Failed => {
                has_failed_disk.insert(disk.node);
                continue;
            }
            DiskState::Removing => {
                has_removing_disk.insert(disk.node);
                continue;
            }
            DiskState::Removed => continue,
        }
        let Some(node) = catalogue.nodes().get(&disk.node) else { continue };
        let load: Placed = placed.get(id).copied().unwrap_or_default();
        let candidate = Candidate {
            node: disk.node,
            disk: *id,
            zone: node.zone.as_deref(),
            placeable_bytes: disk.placeable_bytes(load),
            replicas: load.replicas,
        };
        match best.get(&disk.node) {
            Some(other) if rank(other) <= rank(&candidate) => {}
            _ => {
                best.insert(disk.node, candidate);
            }
        }
    }
    let mut candidates = Vec::new();
    let mut short = Vec::new();
    for (id, node) in catalogue.nodes() {
        let why = match (node.state, best.remove(id)) {
            (NodeState::Removed, _) => continue,
            (NodeState::Draining, _) => Shortfall::Draining,
            (NodeState::Removing, _) => Shortfall::Removing,
            (NodeState::Away, _) => Shortfall::Away,
            (NodeState::Active, Some(candidate)) if candidate.placeable_bytes >= size_bytes => {
                candidates.push(candidate);
                continue;
            }
            (NodeState::Active, Some(candidate)) => Shortfall::Room { placeable_bytes: candidate.placeable_bytes },
            (NodeState::Active, None) if has_removing_disk.contains(id) => Shortfall::DiskRemoving,
            (NodeState::Active, None) if has_failed_disk.contains(id) => Shortfall::DiskFailed,
            (NodeState::Active, None) => Shortfall::NoDisk,
        };
        short.push(NodeShortfall { node: node.name.to_string(), why });
    }
    candidates.sort_by_key(rank);
    short.sort_by(|a, b| a.node.cmp(&b.node));
    (candidates, short)
}

/// Lower is better.
fn rank(candidate: &Candidate<'_>) -> (std::cmp::Reverse<u64>, u32, DiskId) {
    (std::cmp::Reverse(candidate.placeable_bytes), candidate.replicas, candidate.disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_to_the_safe_side() {
        let gib = 1u64 << 30;
        assert_eq!(Bytes(4 * gib).to_string(), "4.0 GiB");
        assert_eq!(BytesUp(4 * gib).to_string(), "4.0 GiB");
        assert_eq!(Bytes(4 * gib - 1).to_string(), "3.9 GiB");
        assert_eq!(BytesUp(4 * gib + 1).to_string(), "4.1 GiB");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(u64::MAX).to_string(), "16777215.9 TiB");
        assert_eq!(BytesUp(u64::MAX).to_string(), "16777216.0 TiB");
    }

    #[test]
    fn a_long_refusal_names_some_nodes_and_counts_the_rest() {
        let nodes = (0..20).map(|n| NodeShortfall { node: format!("n{n}"), why: Shortfall::NoDisk }).collect();
        let error = PlanError::NoPlacement { wanted: 3, size_bytes: 1 << 30, have: 0, nodes };
        assert!(error.to_string().ends_with("n15: no disk and 4 more"), "{error}");
    }
}
