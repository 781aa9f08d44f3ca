//! Volume: one replicated block volume, the counterpart of one PersistentVolume.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A replicated block volume. Deleting it deletes its data.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "holdfast.dev",
    version = "v1alpha1",
    kind = "Volume",
    category = "holdfast",
    status = "VolumeStatus",
    derive = "PartialEq",
    doc = "A replicated block volume. Deleting it deletes its data.",
    printcolumn(name = "Size", type_ = "string", json_path = ".spec.size"),
    printcolumn(name = "Replicas", type_ = "string", json_path = ".status.readyReplicas"),
    printcolumn(name = "Health", type_ = "string", json_path = ".status.health"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.attachment.node"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".status.kubernetes.namespace", priority = 1),
    printcolumn(name = "PVC", type_ = "string", json_path = ".status.kubernetes.pvc", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 63").message("names of volumes have at most 63 characters"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("names of volumes are lower-case letters, digits and hyphens"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.logicalBlockSize) == has(oldSelf.logicalBlockSize)").message("the logical block size of a volume cannot be changed: make another volume and copy"),
    validation = Rule::new("has(self.source) == has(oldSelf.source)").message("the source of a volume cannot be changed"),
)]
pub struct VolumeSpec {
    /// The StorageCluster that keeps it.
    #[x_kube(validation = Rule::new("self == oldSelf").message("a volume cannot be moved to another cluster"))]
    pub cluster_ref: ClusterRef,
    /// Grows only; rounded up to a multiple of 4 KiB, at least 1 MiB, at most 64 TiB.
    #[x_kube(validation = Rule::new("quantity(string(self)).compareTo(quantity(string(oldSelf))) >= 0").message("a volume cannot shrink: make a smaller one and copy"))]
    #[x_kube(validation = Rule::new("quantity(string(self)).isGreaterThan(quantity('0'))").message("a volume has a size"))]
    pub size: Quantity,
    /// Copies, on different nodes; the cluster's `defaults.replicas` where absent. May be changed while the volume is
    /// used: copies are made or taken out one after the other. Taken away, the volume keeps those it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 5))]
    pub replicas: Option<i32>,
    /// Bytes of the smallest write: 512 or 4096; 4096 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == 512 || self == 4096").message("logical blocks have 512 or 4096 bytes"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("the logical block size of a volume cannot be changed: make another volume and copy"))]
    pub logical_block_size: Option<i32>,
    /// Where its copies go.
    #[serde(default)]
    pub placement: Placement,
    /// Reserved for limits of rate; nothing may stand in it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos: Option<Qos>,
    /// Reserved for snapshots and clones; nothing may stand in it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
}

/// A StorageCluster by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRef {
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
}

/// Where the copies of a volume go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Machines by their Kubernetes names; a copy goes to a storage node there where there is room. Matters when the
    /// volume is made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub preferred_nodes: Vec<String>,
    /// What two copies never share.
    #[serde(default)]
    pub spread: Spread,
}

/// What two copies of a volume never share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// A storage node.
    #[default]
    Node,
    /// A zone.
    Zone,
}

/// Reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Qos {}

/// Reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeSource {}

/// How the volume is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// Generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Minted when it was made; never used for another volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_id: Option<String>,
    /// Creating, Detached, Attached or Deleting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Healthy, Degraded, Unavailable or Unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<String>,
    /// Copies that are current, of those wanted: `3/3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<String>,
    /// Every copy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<VolumeReplica>,
    /// The size that the storage cluster has recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Quantity>,
    /// Who has it; absent while nobody has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// What uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesUse>,
    /// Why the last thing asked of the storage cluster was refused; absent after it was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// Ready, Reconciling, Stalled and others; each says what and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// One copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeReplica {
    /// The storage node it lies on.
    pub node: String,
    /// The disk it lies on.
    pub disk: String,
    /// Leader, Follower, Learner, or Unknown.
    pub role: String,
    /// How it is, in one word.
    pub state: String,
}

/// Who has the volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The machine, by its Kubernetes name; outside Kubernetes as it named itself.
    pub node: String,
    /// Rises with every attachment; writes of an earlier one are fenced.
    pub epoch: i64,
}

/// What uses the volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KubernetesUse {
    /// The PersistentVolume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pv: Option<String>,
    /// The claim it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pvc: Option<String>,
    /// The claim's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Pods that name the claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<String>,
}

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// Stable CamelCase word, such as NoPlacement.
    pub code: String,
    /// For people.
    pub message: String,
    /// When it was refused first.
    pub time: Time,
}
