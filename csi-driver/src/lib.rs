//! The CSI driver `csi.holdfast.dev`, in its two modes.
//!
//! **controller**, one per Kubernetes cluster: a volume is an object `Volume`, which the operator carries out; an
//! attachment is an epoch, which the driver takes and ends at the storage nodes. **node**, one per machine: it puts a
//! device, which the attach agent makes, where kubelet wants it, with a file system on it. No volume's data passes
//! through either, and both may die at any time: what must outlive them is in the cluster, at the agent, in the
//! kernel's mounts, or in a small file per staged volume.
//!
//! Not here: placing, healing, fencing, devices. What is decided is decided by pure functions (`controller::spec`,
//! `controller::capacity`, `controller::outcome`, `node::plan`, `capability`); the services around them lock, call and
//! translate.
//!
//! What holds:
//! 1. At most one RPC works on a volume at a time, also when its caller has given up; the next is told ABORTED.
//! 2. Every RPC may be repeated, and go on where the former ended.
//! 3. A file system is made only where the volume's replicated state says that it has none.
//! 4. A device is used only in the epoch that its attachment was granted.

#![forbid(unsafe_code)]

mod authority;
pub mod capability;
pub mod controller;
pub mod http;
pub mod identity;
pub mod locks;
pub mod metrics;
pub mod names;
pub mod node;
pub mod registration;
pub mod rpc;
pub mod server;

/// The driver's name in Kubernetes: of its CSIDriver object, its classes and its folder below kubelet's.
pub const DRIVER: &str = "csi.holdfast.dev";

/// Key of a machine's topology segment; its value is the node's name in Kubernetes.
pub const TOPOLOGY_NODE: &str = "topology.holdfast.dev/node";

/// The Container Storage Interface 1.13.
#[allow(clippy::all, rustdoc::all)]
pub mod csi {
    include!("generated/csi.v1.rs");
}

/// Kubelet's plugin registration v1.
#[allow(clippy::all, rustdoc::all)]
pub mod kubelet {
    include!("generated/pluginregistration.rs");
}

/// What the two modes tell each other: keys of `publish_context` and `volume_context`.
pub mod context {
    /// Identifier of the volume, which the cluster and the agent know it by.
    pub const VOLUME_ID: &str = "volumeId";
    /// The attachment's epoch, decimal.
    pub const EPOCH: &str = "epoch";
    /// Where the replicas are: `[{"node":"<id>","address":"host:port"}]`.
    pub const NODES: &str = "nodes";
    /// Words for mkfs, of the volume's class.
    pub const MKFS_OPTIONS: &str = "mkfsOptions";
    /// The file system where the capability names none.
    pub const FILE_SYSTEM: &str = "fsType";
}
