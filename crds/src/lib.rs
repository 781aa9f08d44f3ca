//! The Kubernetes face of Holdfast: the types of the group `holdfast.dev/v1alpha1` and their YAML.
//!
//! Types, names and rules that the API server checks; no client, no controller. The YAML in the chart is generated from
//! here (`cargo run -p holdfast-crds -- generate DIR`), and a test fails where the two differ.
//!
//! What holds:
//! 1. An object is what a person asked for (`spec`) and a projection of what the storage cluster says (`status`); the
//!    projection can be rebuilt from the storage cluster at any time.
//! 2. Conditions are `metav1.Condition`. Ready, Reconciling and Stalled mean what kstatus says they mean; Stalled and
//!    Reconciling are there only while they are true.
//! 3. No status holds what changes without a transition: no heartbeat, no rate, no index.

#![forbid(unsafe_code)]
// Columns of a table look alike.
#![allow(clippy::duplicated_attributes)]

mod cluster;
pub mod names;
mod node;
pub mod quantity;
mod volume;
mod yaml;

pub use cluster::{
    Capacity, Defaults, DeletionPolicy, Disruption, HostPathDisk, MemberStatus, Members, NodeGroup, RawDevice,
    Security, Storage, StorageCluster, StorageClusterSpec, StorageClusterStatus, Update, UpdateType, VolumeClaimDisk,
    VolumeCounts,
};
pub use node::{StorageDisk, StorageDiskSpec, StorageDiskStatus, StorageNode, StorageNodeSpec, StorageNodeStatus};
pub use volume::{
    Attachment, ClusterRef, KubernetesUse, LastError, Placement, Qos, Spread, Volume, VolumeReplica, VolumeSource,
    VolumeSpec, VolumeStatus,
};
pub use yaml::{Document, documents};
