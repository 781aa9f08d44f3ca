//! StorageNode and StorageDisk: what the catalogue knows of them, made by the operator for people to read.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A storage node as its cluster knows it. Made by the operator.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "holdfast.dev",
    version = "v1alpha1",
    kind = "StorageNode",
    namespaced,
    category = "holdfast",
    status = "StorageNodeStatus",
    derive = "PartialEq",
    doc = "A storage node as its cluster knows it. Made by the operator.",
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(
        name = "Schedulable",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Schedulable")].status"#
    ),
    printcolumn(name = "Zone", type_ = "string", json_path = ".status.zone", priority = 1),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.node"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodeSpec {
    /// The StorageCluster it belongs to, in the same namespace.
    pub cluster: String,
    /// Its identity, which its certificate says; stays the same for the life of the member.
    pub node_id: String,
}

/// How the storage node is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodeStatus {
    /// Active, Draining, Removing, Removed, or Waiting before it is a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// The machine its pod runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its failure domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Where it serves the control API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Of its build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Ready: connected. Schedulable: takes new copies; the message says why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// A disk of a storage node as its cluster knows it. Made by the operator.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "holdfast.dev",
    version = "v1alpha1",
    kind = "StorageDisk",
    namespaced,
    category = "holdfast",
    status = "StorageDiskStatus",
    derive = "PartialEq",
    doc = "A disk of a storage node as its cluster knows it. Made by the operator.",
    printcolumn(name = "Storage Node", type_ = "string", json_path = ".spec.storageNode"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Placed", type_ = "string", json_path = ".status.placed"),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".status.capacity"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Disk ID", type_ = "string", json_path = ".spec.diskId", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct StorageDiskSpec {
    /// The StorageCluster it belongs to, in the same namespace.
    pub cluster: String,
    /// The StorageNode it is in.
    pub storage_node: String,
    /// Minted when it was formatted; a wiped disk is another disk.
    pub disk_id: String,
}

/// How the disk is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageDiskStatus {
    /// Active, Failed, Removing, Removed or Lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Bytes that can hold data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Quantity>,
    /// Sizes of the volumes with a copy on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed: Option<Quantity>,
    /// Copies on it, also those that are being deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i64>,
    /// Ready: it works. Schedulable: takes new copies; the message says why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
