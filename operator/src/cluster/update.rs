//! Which pod is replaced next, where a template has changed. Pure.
//!
//! Storage nodes one at a time, whoever leads the metadata plane last, each only while every other one is connected and,
//! where that is asked for, every volume has all its copies. A storage node that is down anyway is replaced first: that
//! takes nothing away, and its new template may be what mends it. On machines one agent at a time, then its keeper: the
//! two are never away from one machine together, because only both together lose a device.

use std::collections::BTreeMap;

use holdfast_crds::UpdateType;

use super::observed::{Catalogue, Observed};
use super::validate::ValidCluster;

/// One look.
pub struct Looked<'a> {
    pub cluster: &'a ValidCluster,
    pub observed: &'a Observed,
    /// Absent while nobody answers for the metadata plane, or there is none yet.
    pub catalogue: Option<&'a Catalogue>,
    /// What pods should be made from, by group or component.
    pub templates: &'a BTreeMap<String, String>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Every pod is as it should be.
    Done,
    /// Replace this pod, where every volume has all its copies if `healthy`.
    Replace {
        pod: String,
        healthy: bool,
    },
    Wait {
        why: String,
    },
    /// A person deletes the pods.
    Manual {
        pods: Vec<String>,
    },
}

/// Of the storage nodes.
pub fn members(looked: &Looked<'_>) -> Step {
    let (cluster, observed, catalogue) = (looked.cluster, looked.observed, looked.catalogue);
    let members = cluster.members();
    let outdated: Vec<&String> = members
        .iter()
        .filter(|(name, group)| {
            let pod = observed.pods.get(name);
            pod.is_some_and(|pod| {
                !pod.terminating && looked.templates.get(&group.name).is_some_and(|t| *t != pod.template)
            })
        })
        .map(|(name, _)| name)
        .collect();
    if outdated.is_empty() {
        return Step::Done;
    }
    if cluster.update == UpdateType::OnDelete {
        return Step::Manual { pods: outdated.into_iter().cloned().collect() };
    }
    let up = |name: &str| {
        let pod = observed.pods.get(name);
        let connected = catalogue.is_none_or(|catalogue| catalogue.node(name).is_some_and(|node| node.connected));
        pod.is_some_and(|pod| pod.ready && !pod.terminating) && connected
    };
    let down: Vec<&String> = members.iter().map(|(name, _)| name).filter(|name| !up(name)).collect();
    if let Some(pod) = down.iter().find(|name| outdated.contains(*name)) {
        return Step::Replace { pod: (**pod).clone(), healthy: false };
    }
    if let Some(name) = down.first() {
        return Step::Wait { why: format!("{name} is not back yet") };
    }
    let Some(catalogue) = catalogue else {
        return Step::Wait { why: "the metadata plane does not answer".to_owned() };
    };
    let leads = |name: &String| catalogue.node(name).is_some_and(|node| node.metadata_leader);
    let next = outdated.iter().find(|name| !leads(name)).or(outdated.first());
    let pod = next.map(|name| (**name).clone()).unwrap_or_default();
    Step::Replace { pod, healthy: cluster.require_healthy_volumes }
}

/// Of agents and keepers.
pub fn machines(looked: &Looked<'_>) -> Step {
    let mut by_machine: BTreeMap<&str, BTreeMap<&str, (&str, bool, bool)>> = BTreeMap::new();
    let (mut unready, mut leaving) = (None, None);
    for (component, name, pod) in &looked.observed.others {
        let Some(template) =
            looked.templates.get(component).filter(|_| matches!(component.as_str(), "agent" | "keeper"))
        else {
            continue;
        };
        let Some(machine) = &pod.machine else { continue };
        let current = pod.template == *template;
        if pod.terminating {
            leaving = Some(name);
        }
        let up = pod.ready && !pod.terminating;
        if !up && unready.is_none() {
            unready = Some((name, current));
        }
        by_machine.entry(machine).or_default().insert(component, (name, current, up));
    }
    let outdated = by_machine.values().flat_map(BTreeMap::values).any(|(_, current, _)| !current);
    if !outdated {
        return Step::Done;
    }
    if let Some(name) = leaving {
        return Step::Wait { why: format!("{name} is being replaced") };
    }
    match unready {
        Some((name, true)) => return Step::Wait { why: format!("{name} is not ready yet") },
        Some((name, false)) => return Step::Replace { pod: name.clone(), healthy: false },
        None => {}
    }
    for pods in by_machine.values() {
        for component in ["agent", "keeper"] {
            if let Some((name, false, _)) = pods.get(component) {
                return Step::Replace { pod: (*name).to_owned(), healthy: false };
            }
        }
    }
    Step::Done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::observed::Pod;
    use crate::cluster::validate::tests::three;
    use holdfast_api::v1;

    struct World {
        cluster: ValidCluster,
        observed: Observed,
        catalogue: Catalogue,
        templates: BTreeMap<String, String>,
    }

    fn pod(template: &str, machine: &str) -> Pod {
        Pod { ready: true, template: template.into(), machine: Some(machine.into()), ..Pod::default() }
    }

    fn world(templates: [&str; 3]) -> World {
        let name = |i: usize| format!("main-main-{i}");
        World {
            cluster: three(),
            observed: Observed {
                pods: templates.iter().enumerate().map(|(i, t)| (name(i), pod(t, &format!("w{i}")))).collect(),
                ..Observed::default()
            },
            catalogue: Catalogue {
                nodes: (0..3)
                    .map(|i| v1::ClusterNode {
                        name: name(i),
                        state: v1::NodeState::Active.into(),
                        connected: true,
                        metadata_leader: i == 0,
                        ..v1::ClusterNode::default()
                    })
                    .collect(),
                volumes: Vec::new(),
            },
            templates: ["main", "agent", "keeper"].map(|key| (key.to_owned(), "new".to_owned())).into(),
        }
    }

    impl World {
        fn looked(&self) -> Looked<'_> {
            Looked {
                cluster: &self.cluster,
                observed: &self.observed,
                catalogue: Some(&self.catalogue),
                templates: &self.templates,
            }
        }
    }

    fn replace(pod: &str, healthy: bool) -> Step {
        Step::Replace { pod: pod.into(), healthy }
    }

    #[test]
    fn one_at_a_time_and_the_leader_last() {
        assert_eq!(members(&world(["new"; 3]).looked()), Step::Done);
        assert_eq!(members(&world(["old", "old", "old"]).looked()), replace("main-main-1", true));
        assert_eq!(members(&world(["old", "new", "old"]).looked()), replace("main-main-2", true));
        assert_eq!(members(&world(["old", "new", "new"]).looked()), replace("main-main-0", true));
    }

    #[test]
    fn the_next_waits_until_the_one_before_is_connected() {
        let mut world = world(["old", "new", "old"]);
        world.catalogue.nodes[1].connected = false;
        assert!(matches!(members(&world.looked()), Step::Wait { .. }));
        world.observed.pods.get_mut("main-main-2").unwrap().ready = false;
        assert_eq!(members(&world.looked()), replace("main-main-2", false), "what is down anyway comes first");
    }

    #[test]
    fn before_there_is_a_cluster_what_is_down_is_replaced_and_what_is_up_is_left() {
        let mut world = world(["old", "old", "new"]);
        let looked = |world: &World| members(&Looked { catalogue: None, ..world.looked() });
        assert!(matches!(looked(&world), Step::Wait { .. }));
        world.observed.pods.get_mut("main-main-1").unwrap().ready = false;
        assert_eq!(looked(&world), replace("main-main-1", false), "its new template may be what mends it");
    }

    #[test]
    fn a_person_may_keep_it_to_themselves() {
        let mut world = world(["old", "new", "new"]);
        world.cluster.update = UpdateType::OnDelete;
        assert_eq!(members(&world.looked()), Step::Manual { pods: vec!["main-main-0".into()] });
    }

    #[test]
    fn agent_and_keeper_of_one_machine_are_never_away_together() {
        let mut world = world(["new"; 3]);
        let other = |component: &str, machine: &str, template: &str| {
            (component.to_owned(), format!("{component}-{machine}"), pod(template, machine))
        };
        world.observed.others = vec![
            other("agent", "w1", "old"),
            other("keeper", "w1", "old"),
            other("agent", "w2", "old"),
            other("keeper", "w2", "old"),
            other("csi-node", "w1", "old"),
        ];
        assert_eq!(machines(&world.looked()), replace("agent-w1", false));
        world.observed.others[0].2 = Pod { ready: false, ..pod("new", "w1") };
        assert!(matches!(machines(&world.looked()), Step::Wait { .. }), "not before it is back");
        world.observed.others[0].2.terminating = true;
        assert!(matches!(machines(&world.looked()), Step::Wait { .. }), "nor while it goes");
        world.observed.others[0].2.terminating = false;
        world.observed.others[0].2.ready = true;
        assert_eq!(machines(&world.looked()), replace("keeper-w1", false));
        world.observed.others[1].2.template = "new".into();
        assert_eq!(machines(&world.looked()), replace("agent-w2", false));
    }
}
