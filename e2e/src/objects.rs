//! The objects that lanes make, as Kubernetes reads them.

use anyhow::{Context, Result};
use holdfast_crds::StorageCluster;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Where the operator and the storage cluster are.
pub const SYSTEM: &str = "holdfast-system";
/// Where pods that use volumes are.
pub const WORK: &str = "holdfast-e2e";
/// The StorageCluster.
pub const CLUSTER: &str = "main";
/// User and group of `e2e/postgres/Dockerfile`.
const POSTGRES: u32 = 5432;
/// Folder of every node where writers keep their logs.
pub const LOGS: &str = "/var/log/holdfast-e2e";

/// How a pod sees a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Ext4,
    Xfs,
    Block,
}

impl Mode {
    /// The StorageClass of `e2e/values.yaml`.
    fn class(self) -> &'static str {
        match self {
            Mode::Ext4 | Mode::Block => "holdfast",
            Mode::Xfs => "holdfast-xfs",
        }
    }
}

pub fn storage_cluster(members: i32) -> Result<StorageCluster> {
    object(json!({
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "StorageCluster",
        "metadata": {"name": CLUSTER, "namespace": SYSTEM},
        "spec": {
            "members": {"replicas": members},
            "storage": {"volumeClaimTemplate": {"size": "4Gi"}},
            "deletionPolicy": "Delete",
        },
    }))
}

pub fn claim(name: &str, mode: Mode, size: &str) -> Result<PersistentVolumeClaim> {
    object(json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": WORK},
        "spec": {
            "storageClassName": mode.class(),
            "accessModes": ["ReadWriteOnce"],
            "volumeMode": if mode == Mode::Block { "Block" } else { "Filesystem" },
            "resources": {"requests": {"storage": size}},
        },
    }))
}

/// One writer on a claim, on a node of this name or on any: a set of one pod, which Kubernetes starts again elsewhere
/// where its node goes away.
pub fn writer(claim: &str, mode: Mode, image: &str, node: Option<&str>) -> Result<StatefulSet> {
    let labels = json!({"app": "writer", "writer": claim});
    let log = format!("{LOGS}/{claim}.log");
    let (path, mount) = match mode {
        Mode::Ext4 | Mode::Xfs => (
            "/volume/data",
            json!({"volumeMounts": [
            {"name": "volume", "mountPath": "/volume"}, {"name": "logs", "mountPath": LOGS}]}),
        ),
        Mode::Block => (
            "/dev/volume",
            json!({
            "volumeDevices": [{"name": "volume", "devicePath": "/dev/volume"}],
            "volumeMounts": [{"name": "logs", "mountPath": LOGS}]}),
        ),
    };
    let mut container = json!({
        "name": "writer",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["holdfast-e2e", "write", "--path", path, "--log", log],
        // The folder of the logs and a raw device belong to root.
        "securityContext": {"runAsUser": 0},
    });
    merge(&mut container, mount);
    let selector = node.map(|node| json!({"kubernetes.io/hostname": node}));
    let pod = json!({
        "nodeSelector": selector,
        "terminationGracePeriodSeconds": 10,
        "containers": [container],
        "volumes": [
            {"name": "volume", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "logs", "hostPath": {"path": LOGS, "type": "DirectoryOrCreate"}},
        ],
    });
    stateful_set(claim, &labels, &pod)
}

/// PostgreSQL on a claim, which it initialises where it is empty.
pub fn postgres(claim: &str, image: &str) -> Result<StatefulSet> {
    let labels = json!({"app": "postgres"});
    // A file system has a folder of its own in its root.
    let start = "[ -s $PGDATA/PG_VERSION ] || initdb --data-checksums --auth=trust --username=postgres; \
                 exec postgres -c unix_socket_directories=/tmp -c listen_addresses=";
    let pod = json!({
        "securityContext": {
            "runAsUser": POSTGRES,
            "runAsGroup": POSTGRES,
            "fsGroup": POSTGRES,
            // PostgreSQL starts on no folder that its group may write to.
            "fsGroupChangePolicy": "OnRootMismatch",
        },
        "containers": [{
            "name": "postgres",
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", start],
            "env": [{"name": "PGUSER", "value": "postgres"}],
            "volumeMounts": [{"name": "volume", "mountPath": "/volume"}],
        }],
        "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}],
    });
    stateful_set(claim, &labels, &pod)
}

/// Of one pod, called as its claim.
fn stateful_set(claim: &str, labels: &Value, pod: &Value) -> Result<StatefulSet> {
    object(json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": claim, "namespace": WORK, "labels": labels},
        "spec": {
            "replicas": 1,
            "serviceName": claim,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }))
}

fn merge(into: &mut Value, more: Value) {
    let (Value::Object(into), Value::Object(more)) = (into, more) else { unreachable!("both are objects") };
    into.extend(more);
}

fn object<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("an object of the tests")
}
