//! How a StorageCluster is, in the words of its status. Pure.

use holdfast_api::v1;
use holdfast_cluster_client::CallError;
use holdfast_crds::names::condition;
use holdfast_crds::{Capacity, MemberStatus, StorageClusterStatus, VolumeCounts};

use super::founding::{Said, Step};
use super::layout::MAIN_GROUP;
use super::observed::{Catalogue, Observed, node_state};
use super::validate::{Problem, ValidCluster};
use crate::conditions::Conditions;
use crate::context::NOT_FOUNDED;
use holdfast_crds::quantity;

/// Whether the one CSI driver belongs to this cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Csi {
    Here,
    Elsewhere { cluster: String },
}

/// A spec that cannot be built.
pub fn invalid(problems: &[Problem], conditions: &mut Conditions) {
    let message: Vec<&str> = problems.iter().map(|problem| problem.message.as_str()).collect();
    conditions.stalled(problems.first().map_or("Invalid", |problem| problem.reason), message.join("; "));
}

/// Everything but the conditions' times.
pub fn status(
    cluster: &ValidCluster,
    observed: &Observed,
    csi: &Csi,
    conditions: &mut Conditions,
) -> StorageClusterStatus {
    let catalogue = observed.catalogue.as_ref().and_then(|catalogue| catalogue.as_ref().ok());
    let wanted = cluster.members();
    let connected = |name: &str| catalogue.and_then(|c| c.node(name)).is_some_and(|node| node.connected);
    let ready = wanted.iter().filter(|(name, _)| connected(name)).count();
    judge(cluster, observed, ready, conditions);
    redundancy(cluster, conditions);
    match csi {
        Csi::Elsewhere { cluster } => conditions.set(
            condition::CSI_READY,
            false,
            "AnotherCluster",
            format!(
                "the CSI driver belongs to the StorageCluster {cluster}: a Kubernetes cluster has one. Pods cannot use \
                     volumes of this one"
            ),
        ),
        Csi::Here if observed.csi_waits.is_empty() => {
            conditions.set(condition::CSI_READY, true, "Ready", "the driver's processes are ready");
        }
        Csi::Here => conditions.set(condition::CSI_READY, false, "Starting", observed.csi_waits.join("; ")),
    }
    StorageClusterStatus {
        observed_generation: None,
        phase: Some(phase(conditions).to_owned()),
        conditions: Vec::new(),
        cluster_id: observed.cluster_id.clone(),
        replicas: i32::try_from(observed.pods.keys().filter(|name| is_main(cluster, name)).count()).unwrap_or(i32::MAX),
        selector: Some(format!("{},holdfast.dev/group={MAIN_GROUP}", cluster.layout.node_selector())),
        ready_members: Some(format!("{ready}/{}", wanted.len())),
        leader: catalogue.and_then(|c| c.nodes.iter().find(|node| node.metadata_leader)).map(|node| node.name.clone()),
        members: members(cluster, observed, catalogue),
        capacity: catalogue.map(capacity),
        volumes: catalogue.map(|catalogue| VolumeCounts {
            total: i64::try_from(catalogue.volumes.len()).unwrap_or(i64::MAX),
            ready: i64::try_from(catalogue.volumes.iter().filter(|v| v.state() == v1::VolumeState::Ready).count())
                .unwrap_or(i64::MAX),
        }),
    }
}

fn is_main(cluster: &ValidCluster, pod: &str) -> bool {
    let prefix = format!("{}-", cluster.layout.stateful_set(MAIN_GROUP));
    pod.strip_prefix(&prefix).is_some_and(|ordinal| ordinal.bytes().all(|byte| byte.is_ascii_digit()))
}

fn judge(cluster: &ValidCluster, observed: &Observed, ready: usize, conditions: &mut Conditions) {
    match &observed.founding {
        None => return conditions.reconciling("Starting", "the storage nodes are being started"),
        Some(Step::Stuck { reason, message }) => {
            conditions.stalled(reason, message.clone());
            // What runs goes on running.
        }
        Some(Step::Wait { silent, why }) => {
            let pods: Vec<String> =
                silent.iter().filter_map(|name| Some(format!("{name}: {}", waits(observed, name)?))).collect();
            let why = if pods.is_empty() { why.clone() } else { pods.join("; ") };
            conditions.reconciling(
                "WaitingForMembers",
                format!("before the cluster is made, every member has to answer: {why}"),
            );
        }
        Some(Step::Mint { .. } | Step::Adopt { .. } | Step::Found { .. } | Step::RecordFounded { .. }) => {
            conditions.reconciling("Founding", "the storage cluster is being made");
        }
        Some(Step::Join { .. } | Step::Settled { .. }) => {}
    }
    match &observed.catalogue {
        None => conditions.set(condition::AVAILABLE, false, NOT_FOUNDED, "there is no storage cluster yet"),
        Some(Err(error)) => {
            let (reason, message) = match error {
                CallError::CertificateRefused { .. } => (
                    "CertificateRefused",
                    format!(
                        "storage nodes and the operator do not trust each other: {error}; was the Secret {} replaced? \
                         Restore it: the storage nodes keep their data and serve those they trust meanwhile",
                        cluster.layout.authority()
                    ),
                ),
                _ => ("NoLeader", format!("nobody leads the metadata plane: {error}")),
            };
            conditions.set(condition::AVAILABLE, false, reason, error.to_string());
            if !conditions.is_decided() {
                conditions.reconciling(reason, message);
            }
        }
        Some(Ok(catalogue)) => {
            conditions.set(condition::AVAILABLE, true, "Available", "the metadata plane answers");
            if conditions.is_decided() {
                return;
            }
            let missing = missing(cluster, observed, catalogue);
            if missing.is_empty() {
                conditions.ready("Ready", format!("{ready} storage nodes are connected"));
            } else {
                conditions.set(condition::DEGRADED, true, "MembersMissing", missing.join("; "));
                conditions.reconciling("MembersMissing", missing.join("; "));
            }
        }
    }
}

/// Members that are not connected, each with what is known of the reason.
fn missing(cluster: &ValidCluster, observed: &Observed, catalogue: &Catalogue) -> Vec<String> {
    let mut missing = Vec::new();
    for (name, _) in cluster.members() {
        match catalogue.node(&name) {
            Some(node) if node.connected => {}
            known => {
                let what = if known.is_some() { "is not connected" } else { "is not registered yet" };
                let why = waits(observed, &name).or_else(|| match observed.said.get(&name) {
                    Some(Said::Nothing { why } | Said::Unusable { why }) => Some(why.clone()),
                    _ => None,
                });
                missing.push(match why {
                    Some(why) => format!("{name} {what}: {why}"),
                    None => format!("{name} {what}"),
                });
            }
        }
    }
    missing
}

fn waits(observed: &Observed, name: &str) -> Option<String> {
    match observed.pods.get(name) {
        None => Some("it has no pod yet".to_owned()),
        Some(pod) if pod.waits.is_empty() => None,
        Some(pod) => Some(pod.waits.clone()),
    }
}

fn redundancy(cluster: &ValidCluster, conditions: &mut Conditions) {
    let members = cluster.member_count();
    if members < 3 {
        let message = format!("{members} storage nodes tolerate the loss of none; three tolerate the loss of one");
        conditions.set(condition::NO_REDUNDANCY, true, "TooFewMembers", message);
    } else if cluster.default_replicas < 3 {
        let message =
            format!("volumes get {} copies by default, which tolerate the loss of none", cluster.default_replicas);
        conditions.set(condition::NO_REDUNDANCY, true, "TooFewReplicas", message);
    }
}

fn phase(conditions: &Conditions) -> &'static str {
    if conditions.holds(condition::STALLED) {
        "Stalled"
    } else if conditions.holds(condition::READY) {
        "Ready"
    } else if conditions.holds(condition::AVAILABLE) {
        "Degraded"
    } else {
        "Starting"
    }
}

fn members(cluster: &ValidCluster, observed: &Observed, catalogue: Option<&Catalogue>) -> Vec<MemberStatus> {
    let mut names: std::collections::BTreeSet<String> = cluster.members().into_iter().map(|(name, _)| name).collect();
    names.extend(observed.pods.keys().cloned());
    names
        .into_iter()
        .map(|name| {
            let node = catalogue.and_then(|catalogue| catalogue.node(&name));
            let state = match (node, observed.said.get(&name)) {
                (Some(node), _) if node.connected => node_state(node),
                (Some(_), _) => "Disconnected",
                (None, Some(Said::Empty { .. })) => "Waiting",
                (None, Some(Said::Formatted { .. })) => "Joining",
                (None, Some(Said::Unusable { .. })) => "DiskUnusable",
                (None, _) => "Starting",
            };
            MemberStatus {
                node_id: observed.node_ids.get(&name).map(ToString::to_string),
                node: observed.pods.get(&name).and_then(|pod| pod.machine.clone()),
                state: state.to_owned(),
                version: observed.versions.get(&name).cloned(),
                name,
            }
        })
        .collect()
}

fn capacity(catalogue: &Catalogue) -> Capacity {
    let (mut total, mut placed) = (0u64, 0u64);
    for node in catalogue.nodes.iter().filter(|node| node.state() == v1::NodeState::Active) {
        for disk in node
            .disks
            .iter()
            .filter(|disk| disk.life() == v1::DiskLife::Active && disk.state() == v1::DiskState::Formatted)
        {
            total = total.saturating_add(disk.capacity_bytes);
            placed = placed.saturating_add(disk.placed_bytes);
        }
    }
    Capacity {
        total: quantity::readable(total),
        placed: quantity::readable(placed),
        available: quantity::readable(total.saturating_sub(placed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::observed::Pod;
    use crate::cluster::validate::tests::three;

    fn node(name: &str, connected: bool) -> v1::ClusterNode {
        v1::ClusterNode {
            node_id: format!("id-{name}"),
            name: name.into(),
            connected,
            state: v1::NodeState::Active.into(),
            metadata_leader: name.ends_with('0'),
            disks: vec![v1::ClusterDisk {
                disk_id: "d".into(),
                state: v1::DiskState::Formatted.into(),
                life: v1::DiskLife::Active.into(),
                capacity_bytes: 10 << 30,
                placed_bytes: 1 << 30,
                ..v1::ClusterDisk::default()
            }],
            ..v1::ClusterNode::default()
        }
    }

    fn observed(connected: [bool; 3]) -> Observed {
        let names = ["main-main-0", "main-main-1", "main-main-2"];
        Observed {
            pods: names.iter().map(|name| ((*name).to_owned(), Pod { ready: true, ..Pod::default() })).collect(),
            founding: Some(Step::Settled { silent: Vec::new() }),
            catalogue: Some(Ok(Catalogue {
                nodes: names.iter().zip(connected).map(|(name, connected)| node(name, connected)).collect(),
                volumes: Vec::new(),
            })),
            ..Observed::default()
        }
    }

    fn of(observed: &Observed) -> (StorageClusterStatus, Conditions) {
        let mut conditions = Conditions::default();
        let status = status(&three(), observed, &Csi::Here, &mut conditions);
        (status, conditions)
    }

    #[test]
    fn a_whole_cluster_is_ready() {
        let (status, conditions) = of(&observed([true; 3]));
        assert_eq!(status.phase.as_deref(), Some("Ready"));
        assert_eq!(status.ready_members.as_deref(), Some("3/3"));
        assert_eq!(status.leader.as_deref(), Some("main-main-0"));
        assert_eq!(status.capacity.unwrap().available.0, "27Gi");
        assert!(conditions.holds(condition::READY) && conditions.holds(condition::CSI_READY));
        assert!(!conditions.holds(condition::RECONCILING) && !conditions.holds(condition::NO_REDUNDANCY));
    }

    #[test]
    fn a_missing_member_is_named_with_its_reason() {
        let mut looked = observed([true, false, true]);
        looked.pods.get_mut("main-main-1").unwrap().waits = "ImagePullBackOff".into();
        let (status, conditions) = of(&looked);
        assert_eq!((status.phase.as_deref(), status.ready_members.as_deref()), (Some("Degraded"), Some("2/3")));
        assert!(conditions.holds(condition::AVAILABLE) && conditions.holds(condition::DEGRADED));
        let merged = conditions.merge(&[], None, k8s_openapi::jiff::Timestamp::UNIX_EPOCH);
        let ready = merged.iter().find(|c| c.type_ == "Ready").unwrap();
        assert!(ready.message.contains("main-main-1 is not connected: ImagePullBackOff"), "{}", ready.message);
    }

    #[test]
    fn what_a_person_must_mend_is_stalled_even_while_it_works() {
        let mut looked = observed([true; 3]);
        looked.founding = Some(Step::Stuck { reason: "ForeignCluster", message: "disks".into() });
        let (status, conditions) = of(&looked);
        assert_eq!(status.phase.as_deref(), Some("Stalled"));
        assert!(conditions.holds(condition::STALLED) && conditions.holds(condition::AVAILABLE));
    }

    #[test]
    fn before_there_is_a_cluster_it_says_whom_it_waits_for() {
        let mut looked = observed([false; 3]);
        looked.catalogue = None;
        looked.pods.remove("main-main-2");
        looked.founding = Some(Step::Wait { silent: vec!["main-main-2".into()], why: "no answer".into() });
        let (status, conditions) = of(&looked);
        assert_eq!(status.phase.as_deref(), Some("Starting"));
        assert!(conditions.holds(condition::RECONCILING) && !conditions.holds(condition::AVAILABLE));
    }
}
