//! The storage nodes: a StatefulSet for each group, the Service that gives them names, their budget.
//!
//! Every pod of a group starts at once and none waits for another (`Parallel`): a broken first one must not hold up
//! the quorum of the rest. Pods are replaced by the operator alone (`OnDelete`), because only it knows when the volumes
//! can do without one. Names resolve before a pod is ready (`publishNotReadyAddresses`): nodes need each other to
//! become ready. A pod runs as root without capabilities: the folder of sockets on the machine is root's.

use serde_json::{Value, json};

use super::machines::host_path;
use super::{Inputs, local, merge, probe, with_template_label};
use crate::cluster::layout::{API_PORT, CLAIM, DATA_DIR, NODE_HTTP_PORT, PEER_PORT};
use crate::cluster::validate::{Disk, Group};
use crate::object::{Object, labels, selector};
use holdfast_crds::names::LABEL_GROUP;

const COMPONENT: &str = "storage-node";
/// Where a device of the machine is in its pod.
const DEVICE: &str = "/dev/holdfast";
/// A node that is told to end hands over its leaders and closes its disk within seconds.
const GRACE_SECONDS: u32 = 60;
/// Of ten seconds each. A node reads its log back before it serves anything: that is as long as its disk is slow, and to
/// begin again would take as long again.
const START_FAILURES_MAX: u32 = 360;

pub(super) fn build(inputs: &Inputs<'_>) -> Vec<Object> {
    let mut objects = vec![inputs.service_account("nodes"), trust(inputs), service(inputs)];
    if inputs.cluster.manage_budget {
        objects.push(budget(inputs));
    }
    objects.extend(inputs.cluster.groups.iter().flat_map(|group| local::build(inputs, group)));
    objects.extend(inputs.cluster.groups.iter().map(|group| stateful_set(inputs, group)));
    objects
}

fn trust(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    Object::namespaced(layout, inputs.uid(), "v1", "ConfigMap", &layout.trust(), "trust")
        .with("data", json!({ "ca.pem": inputs.trust_pem }))
}

fn service(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    let port = |name: &str, port: u16| json!({ "name": name, "port": port, "targetPort": port, "protocol": "TCP" });
    Object::namespaced(layout, inputs.uid(), "v1", "Service", &layout.nodes_service(), COMPONENT).with(
        "spec",
        json!({
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": selector(layout, COMPONENT),
            "ports": [port("peer", PEER_PORT), port("api", API_PORT), port("http", NODE_HTTP_PORT)],
        }),
    )
}

fn budget(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    Object::namespaced(layout, inputs.uid(), "policy/v1", "PodDisruptionBudget", &layout.nodes_service(), COMPONENT)
        .with("spec", json!({ "maxUnavailable": 1, "selector": { "matchLabels": selector(layout, COMPONENT) } }))
}

fn stateful_set(inputs: &Inputs<'_>, group: &Group) -> Object {
    let layout = inputs.layout();
    let matched = merge(selector(layout, COMPONENT), json!({ LABEL_GROUP: group.name }));
    let pod_labels = merge(labels(layout, COMPONENT), json!({ LABEL_GROUP: group.name }));
    let name = layout.stateful_set(&group.name);
    let replicas = inputs.replicas.get(&group.name).copied().unwrap_or(group.replicas);
    Object::namespaced(layout, inputs.uid(), "apps/v1", "StatefulSet", &name, COMPONENT).with(
        "spec",
        json!({
            "replicas": replicas,
            "serviceName": layout.nodes_service(),
            "podManagementPolicy": "Parallel",
            "updateStrategy": { "type": "OnDelete" },
            "persistentVolumeClaimRetentionPolicy": { "whenDeleted": "Retain", "whenScaled": "Retain" },
            "selector": { "matchLabels": matched },
            "template": with_template_label(json!({
                "metadata": { "labels": pod_labels },
                "spec": pod(inputs, group),
            })),
            "volumeClaimTemplates": [claim(inputs, group)],
        }),
    )
}

fn pod(inputs: &Inputs<'_>, group: &Group) -> Value {
    let layout = inputs.layout();
    let mut volumes = vec![
        json!({ "name": "tls", "secret": { "secretName": layout.nodes_tls(), "defaultMode": 0o400 } }),
        host_path("sockets", &format!("{}/nodes", layout.run_dir()), "DirectoryOrCreate"),
    ];
    if let Disk::Device { .. } = group.disk {
        // Beside a device there is no file system of its own for the few files of a node; it never leaves the machine.
        volumes.push(host_path("data", &layout.records_dir(&group.name), "DirectoryOrCreate"));
    }
    json!({
        "serviceAccountName": layout.part("nodes"),
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": group.node_selector,
        "tolerations": group.tolerations,
        "affinity": {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [{
                    "labelSelector": { "matchLabels": selector(layout, COMPONENT) },
                    "topologyKey": "kubernetes.io/hostname",
                }],
            },
        },
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": selector(layout, COMPONENT) },
        }],
        "containers": [container(inputs, group)],
        "volumes": volumes,
    })
}

fn container(inputs: &Inputs<'_>, group: &Group) -> Value {
    let layout = inputs.layout();
    let host = layout.host_of("$(POD_NAME)");
    let device = match group.disk {
        Disk::Claim { .. } | Disk::Folder { .. } => format!("{DATA_DIR}/disk"),
        Disk::Device { .. } => DEVICE.to_owned(),
    };
    let arguments = [
        "storage-node".to_owned(),
        "--name=$(POD_NAME)".to_owned(),
        format!("--dir={DATA_DIR}"),
        format!("--device={device}"),
        format!("--disk-size={}", group.disk.file_bytes()),
        format!("--listen=0.0.0.0:{PEER_PORT}"),
        format!("--advertise={host}:{PEER_PORT}"),
        format!("--api=0.0.0.0:{API_PORT}"),
        format!("--advertise-api={host}:{API_PORT}"),
        "--zone=$(ZONE)".to_owned(),
        "--pki=/etc/holdfast/tls".to_owned(),
        format!("--sockets={}/nodes", layout.run_dir()),
        format!("--http=0.0.0.0:{NODE_HTTP_PORT}"),
    ];
    let zone = match &group.zone {
        Some(zone) => json!({ "name": "ZONE", "value": zone }),
        None => json!({
            "name": "ZONE",
            "valueFrom": { "fieldRef": { "fieldPath": "metadata.labels['topology.kubernetes.io/zone']" } },
        }),
    };
    let port = |name: &str, port: u16| json!({ "name": name, "containerPort": port, "protocol": "TCP" });
    let is_device = matches!(group.disk, Disk::Device { .. });
    let mut container = merge(
        inputs.container(COMPONENT, &["/usr/bin/holdfast"], &arguments),
        json!({
            "env": [
                { "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
                zone,
            ],
            "ports": [port("peer", PEER_PORT), port("api", API_PORT), port("http", NODE_HTTP_PORT)],
            "startupProbe": probe(NODE_HTTP_PORT, START_FAILURES_MAX),
            "livenessProbe": probe(NODE_HTTP_PORT, 6),
            "readinessProbe": probe(NODE_HTTP_PORT, 3),
            "securityContext": {
                "runAsUser": 0,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": [
                { "name": if is_device { "data" } else { CLAIM }, "mountPath": DATA_DIR },
                { "name": "tls", "mountPath": "/etc/holdfast/tls", "readOnly": true },
                { "name": "sockets", "mountPath": format!("{}/nodes", layout.run_dir()) },
            ],
        }),
    );
    if is_device {
        container["volumeDevices"] = json!([{ "name": CLAIM, "devicePath": DEVICE }]);
    }
    if let Some(resources) = &group.resources {
        container["resources"] = serde_json::to_value(resources).expect("resources have string keys");
    }
    container
}

fn claim(inputs: &Inputs<'_>, group: &Group) -> Value {
    let class = match &group.disk {
        Disk::Claim { storage_class, .. } => storage_class.clone(),
        Disk::Folder { .. } | Disk::Device { .. } => Some(inputs.layout().local_class(&group.name)),
    };
    let mut spec = json!({
        "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": holdfast_crds::quantity::exact(group.disk.claim_bytes()).0 } },
        // As the API server fills it in: it compares templates, which cannot be changed.
        "volumeMode": group.disk.volume_mode(),
    });
    if let Some(class) = class {
        spec["storageClassName"] = json!(class);
    }
    // The same labels for as long as the StatefulSet lives.
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": { "name": CLAIM },
        "spec": spec,
    })
}
