//! What brings volumes to pods: the CSIDriver, its controller with the sidecars, its plugin on every machine.
//!
//! The plugin may be replaced at any time: no device and no mount depends on its process, so it rolls by itself. Neither
//! plugin nor agent speaks to the API server; the controller does, with the rights of ClusterRoles that the chart makes,
//! so that the operator gives nobody more than its own installer has read.

use holdfast_crds::names::CSI_DRIVER;
use serde_json::{Value, json};

use super::machines::{daemon_set, host_path};
use super::{Inputs, merge, probe};
use crate::cluster::layout::{CSI_CONTROLLER_HTTP_PORT, CSI_NODE_HTTP_PORT};
use crate::object::{Object, labels, selector};

const CONTROLLER: &str = "csi-controller";
const SOCKET: &str = "/csi/csi.sock";
const NOBODY: u32 = 65534;
/// ClusterRoles of the chart.
const CONTROLLER_ROLE: &str = "holdfast-csi-controller";
/// What the provisioner may do in its own namespace.
const CAPACITY_ROLE: &str = "holdfast-csi-controller-namespaced";

pub(super) fn build(inputs: &Inputs<'_>) -> Vec<Object> {
    let mut objects = vec![driver(inputs), inputs.service_account("csi-node"), inputs.service_account(CONTROLLER)];
    objects.extend(bindings(inputs));
    objects.extend([controller(inputs), node(inputs)]);
    objects
}

fn driver(inputs: &Inputs<'_>) -> Object {
    Object::global(inputs.layout(), "storage.k8s.io/v1", "CSIDriver", CSI_DRIVER, "csi-driver").with(
        "spec",
        json!({
            "attachRequired": true,
            "podInfoOnMount": true,
            "fsGroupPolicy": "File",
            "seLinuxMount": true,
            "storageCapacity": true,
            "requiresRepublish": false,
            "volumeLifecycleModes": ["Persistent"],
        }),
    )
}

fn bindings(inputs: &Inputs<'_>) -> [Object; 2] {
    let layout = inputs.layout();
    let account = layout.part(CONTROLLER);
    let subjects = json!([{ "kind": "ServiceAccount", "name": account, "namespace": layout.namespace }]);
    let role = |name| json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name });
    let api = "rbac.authorization.k8s.io/v1";
    [
        Object::global(layout, api, "ClusterRoleBinding", &layout.global(CONTROLLER), CONTROLLER)
            .with("roleRef", role(CONTROLLER_ROLE))
            .with("subjects", subjects.clone()),
        Object::namespaced(layout, inputs.uid(), api, "RoleBinding", &account, CONTROLLER)
            .with("roleRef", role(CAPACITY_ROLE))
            .with("subjects", subjects),
    ]
}

fn controller(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    let arguments = [
        "controller".to_owned(),
        format!("--endpoint={SOCKET}"),
        format!("--cluster={}/{}", layout.namespace, layout.name),
        format!("--api={}", layout.api_of_all()),
        "--pki=/pki".to_owned(),
        format!("--http=0.0.0.0:{CSI_CONTROLLER_HTTP_PORT}"),
    ];
    let driver = merge(
        inputs.container("driver", &["/usr/bin/holdfast-csi"], &arguments),
        json!({
            "ports": [{ "name": "http", "containerPort": CSI_CONTROLLER_HTTP_PORT, "protocol": "TCP" }],
            // For people: `kubectl exec deploy/... -c driver -- holdfast status`.
            "env": [
                { "name": "HOLDFAST_API", "value": layout.api_of_all() },
                { "name": "HOLDFAST_PKI", "value": "/pki" },
            ],
            "livenessProbe": probe(CSI_CONTROLLER_HTTP_PORT, 6),
            "securityContext": unprivileged(),
            "volumeMounts": [
                { "name": "csi", "mountPath": "/csi" },
                { "name": "pki", "mountPath": "/pki", "readOnly": true },
            ],
        }),
    );
    let settings = inputs.settings;
    let provisioner = [
        "--feature-gates=Topology=true",
        "--strict-topology=false",
        "--immediate-topology=false",
        "--enable-capacity=true",
        "--capacity-ownerref-level=2",
        "--capacity-poll-interval=30s",
        "--extra-create-metadata=true",
        "--default-fstype=ext4",
        "--http-endpoint=:7733",
    ];
    let attacher = ["--default-fstype=ext4", "--reconcile-sync=30s", "--http-endpoint=:7734"];
    let spec = json!({
        "serviceAccountName": layout.part(CONTROLLER),
        // The only processes of a cluster that speak to the API server.
        "automountServiceAccountToken": true,
        "enableServiceLinks": false,
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 30,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
            "fsGroup": NOBODY,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        // A machine that is gone must not hold up the volumes of its pods for five minutes.
        "tolerations": [
            { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30 },
            { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30 },
        ],
        "containers": [
            driver,
            sidecar(settings, "provisioner", &settings.provisioner_image, &provisioner),
            sidecar(settings, "attacher", &settings.attacher_image, &attacher),
            sidecar(settings, "resizer", &settings.resizer_image, &["--http-endpoint=:7735"]),
        ],
        "volumes": [
            { "name": "csi", "emptyDir": {} },
            { "name": "pki", "secret": { "secretName": layout.csi_controller_tls(), "defaultMode": 0o440 } },
        ],
    });
    Object::namespaced(layout, inputs.uid(), "apps/v1", "Deployment", &layout.part(CONTROLLER), CONTROLLER).with(
        "spec",
        json!({
            "replicas": 1,
            "strategy": { "type": "Recreate" },
            "selector": { "matchLabels": selector(layout, CONTROLLER) },
            "template": { "metadata": { "labels": labels(layout, CONTROLLER) }, "spec": spec },
        }),
    )
}

fn sidecar(settings: &crate::settings::Settings, name: &str, image: &str, more: &[&str]) -> Value {
    let mut arguments = vec![
        format!("--csi-address={SOCKET}"),
        "--v=2".into(),
        "--timeout=120s".into(),
        "--leader-election=false".into(),
    ];
    arguments.extend(more.iter().map(|&argument| argument.to_owned()));
    let field = |path: &str| json!({ "fieldRef": { "fieldPath": path } });
    json!({
        "name": name,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": arguments,
        "env": [
            { "name": "POD_NAME", "valueFrom": field("metadata.name") },
            { "name": "NAMESPACE", "valueFrom": field("metadata.namespace") },
            { "name": "POD_NAMESPACE", "valueFrom": field("metadata.namespace") },
        ],
        "securityContext": unprivileged(),
        "volumeMounts": [{ "name": "csi", "mountPath": "/csi" }],
    })
}

fn unprivileged() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

fn node(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    let kubelet = &inputs.settings.kubelet_dir;
    let agent = layout.agent_dir();
    let arguments = [
        "node".to_owned(),
        "--node-name=$(NODE_NAME)".to_owned(),
        format!("--kubelet-dir={kubelet}"),
        format!("--agent-socket={agent}/control.sock"),
        format!("--http=0.0.0.0:{CSI_NODE_HTTP_PORT}"),
    ];
    let container = merge(
        inputs.container("plugin", &["/usr/bin/holdfast-csi"], &arguments),
        json!({
            "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
            "ports": [{ "name": "http", "containerPort": CSI_NODE_HTTP_PORT, "protocol": "TCP" }],
            "livenessProbe": probe(CSI_NODE_HTTP_PORT, 6),
            // Bidirectional: what it mounts for a pod has to appear on the machine.
            "securityContext": { "privileged": true, "runAsUser": 0 },
            "volumeMounts": [
                { "name": "kubelet", "mountPath": kubelet, "mountPropagation": "Bidirectional" },
                { "name": "dev", "mountPath": "/dev" },
                { "name": "agent", "mountPath": agent },
            ],
        }),
    );
    let spec = json!({
        "serviceAccountName": layout.part("csi-node"),
        "containers": [container],
        "volumes": [
            host_path("kubelet", kubelet, "Directory"),
            host_path("dev", "/dev", "Directory"),
            host_path("agent", &agent, "DirectoryOrCreate"),
        ],
    });
    daemon_set(inputs, "csi-node", "RollingUpdate", spec)
}
