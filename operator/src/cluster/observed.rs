//! What is seen of a StorageCluster in one look: the inputs of everything that is decided about it.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_api::v1;
use holdfast_cluster_client::CallError;
use holdfast_id::NodeId;

use super::founding::{Said, Step};

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Pods of storage nodes, by name.
    pub pods: BTreeMap<String, Pod>,
    /// Identities of the members, by name.
    pub node_ids: BTreeMap<String, NodeId>,
    /// Other pods of the cluster: component, name, pod.
    pub others: Vec<(String, String, Pod)>,
    /// Pods that the StatefulSet of each group is to have.
    pub replicas: BTreeMap<String, i32>,
    /// Machines, where a group keeps its bytes on their own disks.
    pub machines: Vec<Machine>,
    /// When a person last asked for new pods, by group or component.
    pub restarted: BTreeMap<String, String>,
    /// Claims, by name.
    pub claims: BTreeSet<String>,
    /// What each member says of itself.
    pub said: BTreeMap<String, Said>,
    /// Builds, by name, as far as they have been told.
    pub versions: BTreeMap<String, String>,
    pub cluster_id: Option<String>,
    pub founding: Option<Step>,
    /// What the metadata plane knows; `None` where nobody answered for it, and why.
    pub catalogue: Option<Result<Catalogue, CallError>>,
    /// Workloads that bring volumes to pods, and what each waits for; empty: all are there.
    pub csi_waits: Vec<String>,
}

/// A machine by its Kubernetes name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

/// A storage node's pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// The machine, once it is scheduled.
    pub machine: Option<String>,
    /// Failure domain of that machine, where Kubernetes tells pods of it.
    pub zone: Option<String>,
    pub ready: bool,
    pub terminating: bool,
    /// The template that it was made from.
    pub template: String,
    /// Why it does not run, in words; empty where it does.
    pub waits: String,
    /// Changes with every start of its process.
    pub life: String,
}

/// What the metadata plane knows.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    pub nodes: Vec<v1::ClusterNode>,
    pub volumes: Vec<v1::Volume>,
}

impl Catalogue {
    /// Identities of nodes that were removed for good.
    pub fn retired(&self) -> BTreeSet<NodeId> {
        let removed = self.nodes.iter().filter(|node| node.state() == v1::NodeState::Removed);
        removed.filter_map(|node| node.node_id.parse().ok()).collect()
    }

    pub fn node(&self, name: &str) -> Option<&v1::ClusterNode> {
        self.nodes.iter().find(|node| node.name == name && node.state() != v1::NodeState::Removed)
    }
}

/// How a node is, in one word.
pub fn node_state(node: &v1::ClusterNode) -> &'static str {
    match node.state() {
        v1::NodeState::Active => "Active",
        v1::NodeState::Draining => "Draining",
        v1::NodeState::Removing => "Removing",
        v1::NodeState::Removed => "Removed",
        v1::NodeState::Away => "Away",
        v1::NodeState::Unspecified => "Unknown",
    }
}
