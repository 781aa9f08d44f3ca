//! StorageCluster: the storage nodes, their disks, and the processes that bring volumes to pods.

use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Storage nodes that keep volumes identical among themselves, and what brings those volumes to pods.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "holdfast.dev",
    version = "v1alpha1",
    kind = "StorageCluster",
    namespaced,
    shortname = "stc",
    category = "holdfast",
    status = "StorageClusterStatus",
    derive = "PartialEq",
    doc = "Storage nodes that keep volumes identical among themselves, and what brings those volumes to pods.",
    scale(
        spec_replicas_path = ".spec.members.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Members", type_ = "string", json_path = ".status.readyMembers"),
    printcolumn(name = "Volumes", type_ = "integer", json_path = ".status.volumes.total"),
    printcolumn(name = "Placed", type_ = "string", json_path = ".status.capacity.placed"),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".status.capacity.total"),
    printcolumn(name = "Leader", type_ = "string", json_path = ".status.leader", priority = 1),
    printcolumn(name = "Cluster ID", type_ = "string", json_path = ".status.clusterId", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 40").message("names of clusters have at most 40 characters: names of pods are made from them"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("names of clusters are lower-case letters, digits and hyphens, and begin with a letter: names of services are made from them"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.nodeGroups) || self.nodeGroups.all(g, g.name != 'main')").message("the group 'main' is that of spec.members"))]
pub struct StorageClusterSpec {
    /// Image of all its processes; the operator's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The storage nodes of the group `main`.
    #[serde(default)]
    pub members: Members,
    /// The disk of each storage node.
    pub storage: Storage,
    /// Further groups of storage nodes, on other machines or with other disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub node_groups: Vec<NodeGroup>,
    /// What volumes get that do not say otherwise.
    #[serde(default)]
    pub defaults: Defaults,
    /// Certificates; the operator keeps an authority for each cluster.
    #[serde(default)]
    pub security: Security,
    /// How storage nodes get another image or other settings.
    #[serde(default)]
    pub update: Update,
    /// What drains and evictions may take away at once.
    #[serde(default)]
    pub disruption: Disruption,
    /// What becomes of disks and certificates when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// The operator changes nothing while this is set; everything goes on working.
    #[serde(default)]
    pub paused: bool,
}

/// The storage nodes of the group `main`, one on a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Members {
    /// How many; three tolerate the loss of one.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 64))]
    pub replicas: i32,
    /// Only on machines with these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of machines that are no obstacle.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Failure domain of all of them; where absent, each takes that of its machine
    /// (`topology.kubernetes.io/zone`, told to pods from Kubernetes 1.35 on).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Processor time and memory of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

impl Default for Members {
    fn default() -> Members {
        Members {
            replicas: three(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            zone: None,
            resources: None,
        }
    }
}

/// A further group of storage nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeGroup {
    /// Unique in the cluster; part of the names of its pods.
    #[schemars(length(max = 15), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// As for `members`.
    #[serde(flatten)]
    pub members: Members,
    /// Its disks; as `spec.storage` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
}

/// Where the disk of a storage node comes from: exactly one of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.volumeClaimTemplate) ? 1 : 0) + (has(self.devices) ? 1 : 0) + (has(self.hostPath) ? 1 : 0) == 1").message("give exactly one of volumeClaimTemplate, devices and hostPath"),
    validation = Rule::new("has(self.volumeClaimTemplate) == has(oldSelf.volumeClaimTemplate) && has(self.devices) == has(oldSelf.devices) && has(self.hostPath) == has(oldSelf.hostPath)").message("the kind of storage cannot be changed; add a node group with the other kind, then shrink this one"),
)]
pub struct Storage {
    /// A file on a claimed volume of another storage class, such as a local one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_claim_template: Option<VolumeClaimDisk>,
    /// A whole block device of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1))]
    pub devices: Option<Vec<RawDevice>>,
    /// A file in a folder of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathDisk>,
}

/// A claim for each storage node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeClaimDisk {
    /// The cluster's default class where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("the storage class of claims cannot be changed; add a node group with the other class, then shrink this one"))]
    pub storage_class_name: Option<String>,
    /// Size of the claim; a sixteenth of it is left to the file system.
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity(oldSelf)) == 0").message("the size of claims cannot be changed; add a node group with the other size, then shrink this one"))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('1Gi')) >= 0").message("a storage node needs at least 1Gi"))]
    #[schemars(schema_with = "short_text")]
    pub size: Quantity,
}

/// A block device, the same path on each machine of the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RawDevice {
    /// A path that outlives a start of the machine, such as /dev/disk/by-id/....
    #[schemars(regex(pattern = r"^/dev/[-_.:/A-Za-z0-9]+$"))]
    pub path: String,
}

/// A file in a folder of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPathDisk {
    /// The folder; the cluster's namespace and name are appended, so that two clusters cannot meet in one.
    #[schemars(regex(pattern = r"^/[-_./A-Za-z0-9]+$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("the folder cannot be changed; add a node group with the other one, then shrink this one"))]
    pub path: String,
    /// Size of the file.
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity(oldSelf)) == 0").message("the size of disks cannot be changed; add a node group with the other size, then shrink this one"))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('1Gi')) >= 0").message("a storage node needs at least 1Gi"))]
    #[schemars(schema_with = "short_text")]
    pub size: Quantity,
}

/// What volumes get that do not say otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Defaults {
    /// Copies of a volume.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 5))]
    pub replicas: i32,
}

impl Default for Defaults {
    fn default() -> Defaults {
        Defaults { replicas: three() }
    }
}

/// Certificates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Security {
    /// Days a certificate counts; it is renewed when two thirds of them are over.
    #[serde(default = "ninety")]
    #[schemars(range(min = 1, max = 825))]
    pub certificate_days: i32,
}

impl Default for Security {
    fn default() -> Security {
        Security { certificate_days: ninety() }
    }
}

/// How storage nodes get another image or other settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// Rolling: one storage node at a time, by the operator. OnDelete: when a person deletes its pod.
    #[serde(default, rename = "type")]
    pub kind: UpdateType,
    /// The next storage node has to wait until every volume has all its copies.
    #[serde(default = "yes")]
    pub require_healthy_volumes: bool,
}

impl Default for Update {
    fn default() -> Update {
        Update { kind: UpdateType::Rolling, require_healthy_volumes: true }
    }
}

/// Who decides when a storage node is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UpdateType {
    #[default]
    Rolling,
    OnDelete,
}

/// What drains and evictions may take away at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disruption {
    /// Keep a PodDisruptionBudget that lets one storage node go at a time.
    #[serde(default = "yes")]
    pub manage_budget: bool,
    /// A storage node that is gone for so long has its copies made again elsewhere. One that comes back sooner catches up
    /// with what changed meanwhile.
    #[serde(default = "ten_minutes")]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]{1,6}[smh])+$') && duration(self) >= duration('1s')").message("a duration such as 10m, 90s or 1h30m"))]
    #[schemars(schema_with = "short_text")]
    pub node_loss_timeout: Duration,
}

impl Default for Disruption {
    fn default() -> Disruption {
        Disruption { manage_budget: true, node_loss_timeout: ten_minutes() }
    }
}

/// What becomes of disks and certificates when the object is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// Claims and certificates stay; the same StorageCluster created again finds its volumes.
    #[default]
    Retain,
    /// Claims and certificates go, and with them the data of every volume. Refused while there are volumes.
    Delete,
}

/// How the cluster is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageClusterStatus {
    /// Generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people; programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Ready, Reconciling, Stalled, Available and others; each says what and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Minted once for the storage cluster; what the disks were formatted for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Storage nodes of the group `main`.
    #[serde(default)]
    pub replicas: i32,
    /// Label selector of the storage nodes' pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Storage nodes that are connected, of those wanted: `3/3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_members: Option<String>,
    /// The storage node that leads the metadata plane.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// Every storage node, in the order of the names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub members: Vec<MemberStatus>,
    /// Of all disks together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// The volumes there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<VolumeCounts>,
}

/// One storage node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    /// Its pod and its StorageNode.
    pub name: String,
    /// From its certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
    /// The machine its pod runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// In one word.
    pub state: String,
    /// Of its build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// Bytes of all disks together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// That can hold data, on disks that take copies.
    pub total: Quantity,
    /// Sizes of the volumes, times their copies.
    pub placed: Quantity,
    /// For further copies.
    pub available: Quantity,
}

/// How many volumes there are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeCounts {
    /// All of them.
    pub total: i64,
    /// Those whose copies exist.
    pub ready: i64,
}

/// A text of bounded length, so that the API server can bound the cost of its rules for each of the groups.
fn short_text(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "maxLength": 32 })
}

fn three() -> i32 {
    3
}

fn ten_minutes() -> Duration {
    Duration::from(std::time::Duration::from_secs(600))
}

fn ninety() -> i32 {
    90
}

fn yes() -> bool {
    true
}
