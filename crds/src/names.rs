//! Words that programs compare: labels, finalizers, condition types, reasons, the driver's name.

pub const GROUP: &str = "holdfast.dev";
/// The one CSI driver of a Kubernetes cluster.
pub const CSI_DRIVER: &str = "csi.holdfast.dev";

/// Finalizer of a Volume: its data is deleted before the object goes.
pub const VOLUME_FINALIZER: &str = "holdfast.dev/volume";
/// Finalizer of a StorageCluster: volumes in use hold it, and `deletionPolicy: Delete` clears up before it goes.
pub const CLUSTER_FINALIZER: &str = "holdfast.dev/cluster";

/// Label of whatever belongs to a StorageCluster; its name.
pub const LABEL_CLUSTER: &str = "holdfast.dev/cluster";
/// Label of storage nodes' pods; the name of their group.
pub const LABEL_GROUP: &str = "holdfast.dev/group";
/// Label of a StorageDisk: the StorageNode it is in.
pub const LABEL_NODE: &str = "holdfast.dev/node";

/// Conditions of every kind.
pub mod condition {
    /// It is as its spec asks.
    pub const READY: &str = "Ready";
    /// It is on the way to what its spec asks; there only while it is true.
    pub const RECONCILING: &str = "Reconciling";
    /// It gets no further without a person; there only while it is true.
    pub const STALLED: &str = "Stalled";
    /// It works, perhaps with less than was asked for.
    pub const AVAILABLE: &str = "Available";
    /// It works, with less than was asked for; there only while it is true.
    pub const DEGRADED: &str = "Degraded";
    /// It is to be deleted, and something holds it; there only while it is true.
    pub const DELETION_BLOCKED: &str = "DeletionBlocked";
    /// The loss of one node may stop it; there only while it is true.
    pub const NO_REDUNDANCY: &str = "NoRedundancy";
    /// It takes new copies.
    pub const SCHEDULABLE: &str = "Schedulable";
    /// Pods can use its volumes: the CSI driver belongs to it.
    pub const CSI_READY: &str = "CSIReady";
}
