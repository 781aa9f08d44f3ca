//! StorageNodes and StorageDisks: the catalogue for people who look with kubectl. Pure.

use std::collections::BTreeMap;

use holdfast_api::v1;
use holdfast_crds::names::{LABEL_CLUSTER, LABEL_NODE, condition};
use holdfast_crds::{StorageDisk, StorageDiskSpec, StorageDiskStatus, StorageNode, StorageNodeSpec, StorageNodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::layout::Layout;
use super::observed::{Catalogue, Observed, node_state};
use crate::conditions::Conditions;
use holdfast_crds::quantity;

/// One object, and its conditions before they have their times.
pub struct Projected<T> {
    pub object: T,
    pub conditions: Conditions,
}

/// In the order of the names; nodes that are removed for good are not among them.
pub fn nodes(layout: &Layout, uid: &str, observed: &Observed, catalogue: &Catalogue) -> Vec<Projected<StorageNode>> {
    let there = catalogue.nodes.iter().filter(|node| node.state() != v1::NodeState::Removed);
    there.map(|node| storage_node(layout, uid, observed, node)).collect()
}

/// Disks of those nodes.
pub fn disks(layout: &Layout, uid: &str, catalogue: &Catalogue) -> Vec<Projected<StorageDisk>> {
    let there = catalogue.nodes.iter().filter(|node| node.state() != v1::NodeState::Removed);
    there
        .flat_map(|node| node.disks.iter().map(move |disk| (node, disk)))
        .filter(|(_, disk)| disk.life() != v1::DiskLife::Removed)
        .map(|(node, disk)| storage_disk(layout, uid, node, disk))
        .collect()
}

fn storage_node(layout: &Layout, uid: &str, observed: &Observed, node: &v1::ClusterNode) -> Projected<StorageNode> {
    let spec = StorageNodeSpec { cluster: layout.name.clone(), node_id: node.node_id.clone() };
    let mut object = StorageNode::new(&node.name, spec);
    own(&mut object.metadata, layout, uid, None);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    object.status = Some(StorageNodeStatus {
        state: Some(node_state(node).to_owned()),
        node: observed.pods.get(&node.name).and_then(|pod| pod.machine.clone()),
        zone: text(&node.zone),
        address: text(&node.api_address),
        version: observed.versions.get(&node.name).cloned(),
        conditions: Vec::new(),
    });
    let mut conditions = Conditions::default();
    if node.connected {
        conditions.ready("Connected", "it is connected");
    } else {
        let why = observed.pods.get(&node.name).map(|pod| pod.waits.as_str()).filter(|waits| !waits.is_empty());
        conditions.set(condition::READY, false, "Disconnected", why.unwrap_or("it is not connected"));
    }
    let reasons = &node.reasons;
    let has_disk = node.disks.iter().any(|disk| disk.life() == v1::DiskLife::Active);
    match (node.state(), reasons.first()) {
        (v1::NodeState::Active, None) if !has_disk => {
            let message =
                "it has no disk to take copies on: delete its claim and its pod, and it begins with an empty one";
            conditions.set(condition::SCHEDULABLE, false, "NoDisk", message);
        }
        (v1::NodeState::Active, None) => conditions.set(condition::SCHEDULABLE, true, "Active", "it takes new copies"),
        (_, Some(reason)) => conditions.set(condition::SCHEDULABLE, false, &word(&reason.code), say(reasons)),
        (_, None) => {
            let message = format!("it takes no new copies: it is {}", node_state(node).to_lowercase());
            conditions.set(condition::SCHEDULABLE, false, node_state(node), message);
        }
    }
    Projected { object, conditions }
}

fn storage_disk(layout: &Layout, uid: &str, node: &v1::ClusterNode, disk: &v1::ClusterDisk) -> Projected<StorageDisk> {
    let spec = StorageDiskSpec {
        cluster: layout.name.clone(),
        storage_node: node.name.clone(),
        disk_id: disk.disk_id.clone(),
    };
    let short: String = disk.disk_id.chars().take(8).collect();
    let mut object = StorageDisk::new(&format!("{}-{short}", node.name), spec);
    own(&mut object.metadata, layout, uid, Some(&node.name));
    let state = match (disk.state(), disk.life()) {
        (_, v1::DiskLife::Lost) => "Lost",
        (v1::DiskState::Failed, _) => "Failed",
        (_, v1::DiskLife::Removing) => "Removing",
        (_, v1::DiskLife::Removed) => "Removed",
        (v1::DiskState::Formatted, v1::DiskLife::Active) => "Active",
        _ => "Unknown",
    };
    object.status = Some(StorageDiskStatus {
        state: Some(state.to_owned()),
        capacity: Some(quantity::readable(disk.capacity_bytes)),
        placed: Some(quantity::exact(disk.placed_bytes)),
        replicas: Some(i64::from(disk.replicas)),
        conditions: Vec::new(),
    });
    let mut conditions = Conditions::default();
    match state {
        "Active" if node.connected => conditions.ready("Active", "it works"),
        "Active" => conditions.set(condition::READY, false, "Disconnected", "its node is not connected"),
        "Removing" => conditions.ready("Removing", "it works; what it holds is moved elsewhere"),
        "Failed" => {
            let message = "it failed, for good: replace it; its copies are made again elsewhere where there is room";
            conditions.set(condition::READY, false, "Failed", message);
        }
        _ => conditions.set(condition::READY, false, state, "what it had is made again elsewhere where there is room"),
    }
    let takes = state == "Active" && node.state() == v1::NodeState::Active;
    let (reason, message) =
        if takes { ("Active", "it takes new copies") } else { ("NotActive", "it or its node takes no new copies") };
    conditions.set(condition::SCHEDULABLE, takes, reason, message);
    Projected { object, conditions }
}

fn own(metadata: &mut kube::core::ObjectMeta, layout: &Layout, uid: &str, node: Option<&str>) {
    metadata.namespace = Some(layout.namespace.clone());
    let mut labels = BTreeMap::from([(LABEL_CLUSTER.to_owned(), layout.name.clone())]);
    labels.extend(node.map(|node| (LABEL_NODE.to_owned(), node.to_owned())));
    metadata.labels = Some(labels);
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: "holdfast.dev/v1alpha1".into(),
        kind: "StorageCluster".into(),
        name: layout.name.clone(),
        uid: uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }]);
}

fn say(reasons: &[v1::Reason]) -> String {
    let one = |reason: &v1::Reason| match reason.action.as_str() {
        "" => reason.message.clone(),
        action => format!("{}: {action}", reason.message),
    };
    reasons.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// A reason of another process as a condition takes it.
pub fn word(code: &str) -> String {
    let word: String = code.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
    if word.is_empty() { "Unknown".to_owned() } else { word }
}
