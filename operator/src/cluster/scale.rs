//! How many pods each group has now, on the way to what is asked for. Pure.
//!
//! Growing is at once; a member that was about to leave and is wanted again stays, and one that has left for good comes
//! back as a new one, with another disk and identity. Shrinking is one member at a time, the last of a group first, because a StatefulSet takes no other:
//! its copies are moved elsewhere while it serves, and only when the metadata plane says that it holds nothing and never
//! comes back is its pod taken away, then its claim. The metadata plane refuses what would leave too few copies.

use std::collections::BTreeMap;

use holdfast_api::v1;

use super::observed::{Catalogue, Observed};
use super::validate::ValidCluster;

/// What to have, and what to do for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pods of each group.
    pub replicas: BTreeMap<String, i32>,
    /// The member whose copies have to be moved elsewhere now.
    pub remove: Option<String>,
    /// Members that were about to leave and are wanted again.
    pub keep: Vec<String>,
    /// Claims of members that are gone for good.
    pub claims: Vec<String>,
    /// What shrinking waits for.
    pub waits: Option<String>,
}

/// From pods, claims, identities and what each StatefulSet has now.
pub fn plan(cluster: &ValidCluster, observed: &Observed, catalogue: Option<&Catalogue>) -> Plan {
    let layout = &cluster.layout;
    let Observed { replicas: current, claims, pods, node_ids, .. } = observed;
    let retired = catalogue.map(Catalogue::retired).unwrap_or_default();
    let is_retired = |name: &str| node_ids.get(name).is_some_and(|id| retired.contains(id));
    let state = |name: &str| catalogue.and_then(|catalogue| state_of(catalogue, name));
    let mut plan = Plan::default();
    let busy = catalogue.is_some_and(|c| c.nodes.iter().any(|node| node.state() == v1::NodeState::Removing));
    for group in &cluster.groups {
        let now = current.get(&group.name).copied().unwrap_or(0);
        let mut count = group.replicas.max(now);
        let last = layout.pod(&group.name, now - 1);
        let stays = (0..group.replicas.min(now)).map(|ordinal| layout.pod(&group.name, ordinal));
        plan.keep.extend(stays.filter(|name| state(name) == Some(v1::NodeState::Removing)));
        if now > group.replicas {
            match (catalogue, state(&last)) {
                (None, _) => plan.waits = Some(format!("{last} leaves when the metadata plane answers")),
                (Some(_), None | Some(v1::NodeState::Removed)) => count = now - 1,
                (Some(_), Some(v1::NodeState::Removing)) => {
                    plan.waits = Some(format!("{last} leaves: what it holds is moved elsewhere"));
                }
                (Some(_), Some(_)) if busy || plan.remove.is_some() => {
                    plan.waits = Some(format!("{last} leaves after others have left"));
                }
                (Some(_), Some(_)) => {
                    plan.waits = Some(format!("{last} leaves: what it holds is moved elsewhere"));
                    plan.remove = Some(last.clone());
                }
            }
        }
        if now <= group.replicas {
            // What is left of it goes first, and its identity with it.
            let new = (now..count).find(|ordinal| is_retired(&layout.pod(&group.name, *ordinal)));
            count = if is_retired(&last) { now - 1 } else { new.unwrap_or(count) };
            if count < group.replicas {
                let name = layout.pod(&group.name, count);
                plan.waits = Some(format!("{name} had left for good: it comes back as a new storage node"));
            }
        }
        // A claim of a member that is gone for good holds a disk that belongs to nobody.
        for ordinal in count.min(now)..64 {
            let (pod, claim) = (layout.pod(&group.name, ordinal), layout.claim(&group.name, ordinal));
            if claims.contains(&claim) && state(&pod) == Some(v1::NodeState::Removed) && !pods.contains_key(&pod) {
                plan.claims.push(claim);
                // Until it is gone, a new member of that name would find it.
                count = count.min(ordinal.max(now.min(group.replicas)));
            }
        }
        plan.replicas.insert(group.name.clone(), count);
    }
    plan
}

/// Of the node that has the name now; one that was removed only where no other has it.
fn state_of(catalogue: &Catalogue, name: &str) -> Option<v1::NodeState> {
    let named = catalogue.nodes.iter().filter(|node| node.name == name).map(v1::ClusterNode::state);
    named.max_by_key(|state| *state != v1::NodeState::Removed)
}

#[cfg(test)]
mod tests {
    use holdfast_id::NodeId;

    use super::*;
    use crate::cluster::observed::Pod;
    use crate::cluster::validate::tests::three;

    fn id(i: usize) -> NodeId {
        NodeId::from_bytes([u8::try_from(i + 1).unwrap(); 16]).unwrap()
    }

    fn name(i: usize) -> String {
        format!("main-main-{i}")
    }

    fn catalogue(states: &[v1::NodeState]) -> Catalogue {
        let node = |(i, state): (usize, &v1::NodeState)| v1::ClusterNode {
            name: name(i),
            node_id: id(i).to_string(),
            state: (*state).into(),
            ..v1::ClusterNode::default()
        };
        Catalogue { nodes: states.iter().enumerate().map(node).collect(), volumes: Vec::new() }
    }

    fn observed(now: i32, claims: &[&str], pods: usize) -> Observed {
        Observed {
            replicas: BTreeMap::from([("main".to_owned(), now)]),
            claims: claims.iter().map(|claim| (*claim).to_owned()).collect(),
            pods: (0..pods).map(|i| (name(i), Pod::default())).collect(),
            node_ids: (0..6).map(|i| (name(i), id(i))).collect(),
            ..Observed::default()
        }
    }

    fn planned(now: i32, states: &[v1::NodeState], claims: &[&str], pods: usize) -> Plan {
        plan(&three(), &observed(now, claims, pods), Some(&catalogue(states)))
    }

    use v1::NodeState::{Active, Removed, Removing};

    #[test]
    fn growing_is_at_once() {
        assert_eq!(planned(0, &[], &[], 0).replicas["main"], 3);
        assert_eq!(planned(2, &[Active, Active], &[], 2).replicas["main"], 3);
    }

    #[test]
    fn a_member_leaves_its_pod_only_when_it_holds_nothing() {
        let asked = planned(5, &[Active; 5], &[], 5);
        assert_eq!((asked.replicas["main"], asked.remove.as_deref()), (5, Some("main-main-4")));
        let moving = planned(5, &[Active, Active, Active, Active, Removing], &[], 5);
        assert_eq!((moving.replicas["main"], moving.remove), (5, None));
        let gone = planned(5, &[Active, Active, Active, Active, Removed], &["disk-main-main-4"], 5);
        assert_eq!((gone.replicas["main"], gone.claims.len()), (4, 0), "its pod still has the claim");
        let clean = planned(4, &[Active, Active, Active, Active, Removed], &["disk-main-main-4"], 4);
        assert_eq!(clean.claims, ["disk-main-main-4"]);
        assert_eq!(clean.remove.as_deref(), Some("main-main-3"), "then the next");
    }

    #[test]
    fn without_the_metadata_plane_nobody_leaves() {
        let plan = plan(&three(), &observed(4, &[], 0), None);
        assert_eq!((plan.replicas["main"], plan.remove), (4, None));
    }

    #[test]
    fn a_member_that_was_about_to_leave_and_is_wanted_again_stays() {
        let plan = planned(3, &[Active, Active, Removing], &[], 3);
        assert_eq!((plan.replicas["main"], plan.keep), (3, vec!["main-main-2".to_owned()]));
        let shrinking = planned(4, &[Active, Active, Active, Removing], &[], 4);
        assert_eq!(shrinking.keep, Vec::<String>::new());
    }

    #[test]
    fn a_member_that_left_for_good_and_is_wanted_again_goes_wholly_before_it_comes_back() {
        let running = planned(3, &[Active, Active, Removed], &["disk-main-main-2"], 3);
        assert_eq!((running.replicas["main"], running.claims.len()), (2, 0));
        let claimed = planned(2, &[Active, Active, Removed], &["disk-main-main-2"], 2);
        assert_eq!((claimed.replicas["main"], claimed.claims.len()), (2, 1));
        let identified = planned(2, &[Active, Active, Removed], &[], 2);
        assert_eq!(identified.replicas["main"], 2, "its Secret still says the former identity");
        assert!(identified.waits.is_some());
        let mut fresh = observed(2, &[], 2);
        fresh.node_ids.insert(name(2), id(9));
        let former = catalogue(&[Active, Active, Removed]);
        assert_eq!(plan(&three(), &fresh, Some(&former)).replicas["main"], 3);
        fresh.replicas.insert("main".to_owned(), 3);
        fresh.pods.insert(name(2), Pod::default());
        fresh.claims.insert("disk-main-main-2".to_owned());
        let joining = plan(&three(), &fresh, Some(&former));
        assert_eq!((joining.replicas["main"], joining.claims.len()), (3, 0), "the new one is left in peace");
    }
}
