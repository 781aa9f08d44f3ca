//! Names, addresses and folders of what belongs to a StorageCluster: one place, because several processes must agree.

use holdfast_crds::ClusterRef;

/// The group of `spec.members`.
pub const MAIN_GROUP: &str = "main";
/// Frames between storage nodes, and with agents.
pub const PEER_PORT: u16 = 7700;
/// gRPC.
pub const API_PORT: u16 = 7701;
/// `/healthz` and `/metrics` of a storage node.
pub const NODE_HTTP_PORT: u16 = 7702;
pub const AGENT_HTTP_PORT: u16 = 7712;
pub const ENROLL_PORT: u16 = 7723;
pub const CSI_CONTROLLER_HTTP_PORT: u16 = 7732;
pub const CSI_NODE_HTTP_PORT: u16 = 7742;
/// Where the disk of a storage node is in its pod.
pub const DATA_DIR: &str = "/var/lib/holdfast";
/// Name of the claim in a StatefulSet's template.
pub const CLAIM: &str = "disk";

/// The names of one StorageCluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layout {
    pub namespace: String,
    pub name: String,
}

impl Layout {
    pub fn new(cluster: &ClusterRef) -> Layout {
        Layout { namespace: cluster.namespace.clone(), name: cluster.name.clone() }
    }

    pub fn cluster_ref(&self) -> ClusterRef {
        ClusterRef { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    pub fn stateful_set(&self, group: &str) -> String {
        format!("{}-{group}", self.name)
    }

    pub fn pod(&self, group: &str, ordinal: i32) -> String {
        format!("{}-{group}-{ordinal}", self.name)
    }

    pub fn claim(&self, group: &str, ordinal: i32) -> String {
        self.claim_of(&self.pod(group, ordinal))
    }

    /// StorageClass of the machines' disks of a group; names of PersistentVolumes begin with it.
    pub fn local_class(&self, group: &str) -> String {
        format!("{}.{}.{group}", self.namespace, self.name)
    }

    /// Of a machine: the files of a storage node beside its device.
    pub fn records_dir(&self, group: &str) -> String {
        format!("{}/{group}", self.state_dir())
    }

    /// Of a pod by its name.
    pub fn claim_of(&self, pod: &str) -> String {
        format!("{CLAIM}-{pod}")
    }

    pub fn nodes_service(&self) -> String {
        format!("{}-nodes", self.name)
    }

    pub fn api_of_all(&self) -> String {
        format!("{}.{}.svc:{API_PORT}", self.nodes_service(), self.namespace)
    }

    pub fn host_of(&self, pod: &str) -> String {
        format!("{pod}.{}.{}.svc", self.nodes_service(), self.namespace)
    }

    pub fn peer_address(&self, pod: &str) -> String {
        format!("{}:{PEER_PORT}", self.host_of(pod))
    }

    pub fn api_address(&self, pod: &str) -> String {
        format!("{}:{API_PORT}", self.host_of(pod))
    }

    /// Secret with the authority's key; read by the operator alone.
    pub fn authority(&self) -> String {
        format!("{}-ca", self.name)
    }

    /// ConfigMap with the authority's certificate, for those that have no certificate yet.
    pub fn trust(&self) -> String {
        format!("{}-ca", self.name)
    }

    pub fn nodes_tls(&self) -> String {
        format!("{}-nodes-tls", self.name)
    }

    pub fn csi_controller_tls(&self) -> String {
        format!("{}-csi-controller-tls", self.name)
    }

    /// ConfigMap with how the storage cluster was founded.
    pub fn founding(&self) -> String {
        format!("{}-founding", self.name)
    }

    pub fn part(&self, part: &str) -> String {
        format!("{}-{part}", self.name)
    }

    /// Of a machine: what must outlive its pods, not its restart.
    pub fn run_dir(&self) -> String {
        format!("/run/holdfast/{}.{}", self.namespace, self.name)
    }

    /// Of a machine: what must outlive its restart.
    pub fn state_dir(&self) -> String {
        format!("/var/lib/holdfast/{}.{}", self.namespace, self.name)
    }

    pub fn agent_dir(&self) -> String {
        format!("{}/agent", self.state_dir())
    }

    /// Name of a cluster-scoped object; two clusters may have the same name in two namespaces.
    pub fn global(&self, part: &str) -> String {
        format!("holdfast:{}:{}:{part}", self.namespace, self.name)
    }

    /// Labels by which its storage nodes' pods are found.
    pub fn node_selector(&self) -> String {
        use holdfast_crds::names::LABEL_CLUSTER;
        format!("{LABEL_CLUSTER}={},app.kubernetes.io/component=storage-node", self.name)
    }
}
