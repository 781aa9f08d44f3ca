//! How many pods each group has now, on the way to what is asked for. Pure.
//!
//! Growing is at once. Shrinking is one member at a time, the last of a group first, because a StatefulSet takes no other:
//! its copies are moved elsewhere while it serves, and only when the metadata plane says that it holds nothing and never
//! comes back is its pod taken away, then its claim. The metadata plane refuses what would leave too few copies.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_api::v1;

use super::observed::Catalogue;
use super::validate::ValidCluster;

/// What to have, and what to do for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pods of each group.
    pub replicas: BTreeMap<String, i32>,
    /// The member whose copies have to be moved elsewhere now.
    pub remove: Option<String>,
    /// Claims of members that are gone for good.
    pub claims: Vec<String>,
    /// What shrinking waits for.
    pub waits: Option<String>,
}

/// `current`: pods that each StatefulSet has now; `claims`: names of claims that there are; `pods`: of pods.
pub fn plan(
    cluster: &ValidCluster,
    current: &BTreeMap<String, i32>,
    claims: &BTreeSet<String>,
    pods: &BTreeSet<String>,
    catalogue: Option<&Catalogue>,
) -> Plan {
    let layout = &cluster.layout;
    let state = |name: &str| catalogue.and_then(|catalogue| state_of(catalogue, name));
    let mut plan = Plan::default();
    let busy = catalogue.is_some_and(|c| c.nodes.iter().any(|node| node.state() == v1::NodeState::Removing));
    for group in &cluster.groups {
        let now = current.get(&group.name).copied().unwrap_or(0);
        let mut count = group.replicas.max(now);
        if now > group.replicas {
            let last = layout.pod(&group.name, now - 1);
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
                    plan.remove = Some(last);
                }
            }
        }
        // A claim of a member that is gone for good holds a disk that belongs to nobody.
        for ordinal in count.min(now)..64 {
            let (pod, claim) = (layout.pod(&group.name, ordinal), layout.claim(&group.name, ordinal));
            if claims.contains(&claim) && state(&pod) == Some(v1::NodeState::Removed) && !pods.contains(&pod) {
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
    use super::*;
    use crate::cluster::validate::tests::three;

    fn catalogue(states: &[v1::NodeState]) -> Catalogue {
        let node = |(i, state): (usize, &v1::NodeState)| v1::ClusterNode {
            name: format!("main-main-{i}"),
            state: (*state).into(),
            ..v1::ClusterNode::default()
        };
        Catalogue { nodes: states.iter().enumerate().map(node).collect(), volumes: Vec::new() }
    }

    fn planned(now: i32, states: &[v1::NodeState], claims: &[&str], pods: i32) -> Plan {
        let current = BTreeMap::from([("main".to_owned(), now)]);
        let claims = claims.iter().map(|claim| (*claim).to_owned()).collect();
        let pods = (0..pods).map(|i| format!("main-main-{i}")).collect();
        plan(&three(), &current, &claims, &pods, Some(&catalogue(states)))
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
        let current = BTreeMap::from([("main".to_owned(), 4)]);
        let plan = plan(&three(), &current, &BTreeSet::new(), &BTreeSet::new(), None);
        assert_eq!((plan.replicas["main"], plan.remove), (4, None));
    }

    #[test]
    fn a_new_member_does_not_get_the_disk_of_one_that_left() {
        let plan = planned(2, &[Active, Active, Removed], &["disk-main-main-2"], 2);
        assert_eq!((plan.replicas["main"], plan.claims.len()), (2, 1));
        assert_eq!(planned(2, &[Active, Active, Removed], &[], 2).replicas["main"], 3);
    }
}
