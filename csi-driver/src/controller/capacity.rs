//! How much can still be placed. Pure, over the catalogue's own figures.
//!
//! Volumes are thin and promises are not: what is placed counts in full, so what is told here can be filled.

use std::collections::BTreeMap;

use holdfast_api::v1::{ClusterDisk, ClusterNode, DiskLife, DiskState, NodeState};
use holdfast_crds::Spread;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The largest sum of sizes that further volumes can have.
    pub available_bytes: u64,
    /// The largest volume that can be made now.
    pub largest_bytes: u64,
}

/// Of what no two copies may share a part of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Domain {
    /// On all of its disks.
    all: u64,
    /// On the one disk of it with most.
    most: u64,
}

/// For volumes of so many copies, spread so.
pub fn placeable(nodes: &[ClusterNode], replicas: usize, spread: Spread) -> Capacity {
    let mut domains: BTreeMap<&str, Domain> = BTreeMap::new();
    for node in nodes.iter().filter(|node| node.state() == NodeState::Active) {
        let key = match spread {
            Spread::Node => node.node_id.as_str(),
            Spread::Zone if node.zone.is_empty() => continue,
            Spread::Zone => node.zone.as_str(),
        };
        let domain = domains.entry(key).or_default();
        for room in node.disks.iter().map(room) {
            domain.all += room;
            domain.most = domain.most.max(room);
        }
    }
    // Each volume takes as much of as many domains as it has copies. What the k fullest offer beyond the sum of all
    // sizes serves nobody, whence one bound for each k; the least of them can be reached.
    let mut all: Vec<u64> = domains.values().map(|domain| domain.all).collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    let bound = |taken: usize| all.iter().skip(taken).sum::<u64>() / (replicas - taken) as u64;
    let mut most: Vec<u64> = domains.values().map(|domain| domain.most).collect();
    most.sort_unstable_by(|a, b| b.cmp(a));
    Capacity {
        available_bytes: (0..replicas).map(bound).min().unwrap_or_default(),
        largest_bytes: replicas.checked_sub(1).and_then(|last| most.get(last)).copied().unwrap_or_default(),
    }
}

/// Bytes that new copies may claim on a disk.
pub fn room(disk: &ClusterDisk) -> u64 {
    let takes_copies = disk.state() == DiskState::Formatted && disk.life() == DiskLife::Active;
    if takes_copies { disk.placeable_bytes } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn node(name: &str, zone: &str, rooms: &[u64]) -> ClusterNode {
        let disk = |room: &u64| ClusterDisk {
            state: DiskState::Formatted.into(),
            life: DiskLife::Active.into(),
            capacity_bytes: 100 * GIB,
            free_bytes: 90 * GIB,
            placeable_bytes: *room,
            ..ClusterDisk::default()
        };
        ClusterNode {
            node_id: name.into(),
            zone: zone.into(),
            state: NodeState::Active.into(),
            disks: rooms.iter().map(disk).collect(),
            ..ClusterNode::default()
        }
    }

    fn capacity(available: u64, largest: u64) -> Capacity {
        Capacity { available_bytes: available * GIB, largest_bytes: largest * GIB }
    }

    #[test]
    fn copies_need_as_many_nodes() {
        let nodes = [node("a", "", &[10 * GIB]), node("b", "", &[6 * GIB]), node("c", "", &[4 * GIB])];
        assert_eq!(placeable(&nodes, 3, Spread::Node), capacity(4, 4));
        assert_eq!(
            placeable(&nodes, 2, Spread::Node),
            capacity(10, 6),
            "6+4 and 6 of the first, in two volumes or more"
        );
        assert_eq!(placeable(&nodes, 1, Spread::Node), capacity(20, 10));
        assert_eq!(placeable(&nodes, 4, Spread::Node), capacity(0, 0));
        assert_eq!(placeable(&[], 3, Spread::Node), capacity(0, 0));
    }

    #[test]
    fn a_zone_counts_once() {
        let nodes = [
            node("a", "x", &[10 * GIB]),
            node("b", "x", &[8 * GIB]),
            node("c", "y", &[4 * GIB]),
            node("d", "", &[50 * GIB]),
        ];
        assert_eq!(placeable(&nodes, 2, Spread::Zone), capacity(4, 4));
        assert_eq!(placeable(&nodes, 3, Spread::Zone), capacity(0, 0), "there are two zones");
        assert_eq!(placeable(&nodes, 2, Spread::Node), capacity(22, 10));
    }

    #[test]
    fn what_takes_no_copies_has_no_room() {
        let mut draining = node("a", "", &[10 * GIB]);
        draining.state = NodeState::Draining.into();
        let mut lost = node("b", "", &[10 * GIB]);
        lost.disks[0].life = DiskLife::Lost.into();
        let mut failed = node("c", "", &[10 * GIB]);
        failed.disks[0].state = DiskState::Failed.into();
        assert_eq!(placeable(&[draining, lost, failed], 1, Spread::Node), capacity(0, 0));
    }

    #[test]
    fn one_volume_lies_on_one_disk_of_a_node() {
        let nodes = [node("a", "", &[10 * GIB, 5 * GIB])];
        assert_eq!(placeable(&nodes, 1, Spread::Node), capacity(15, 10));
    }
}
