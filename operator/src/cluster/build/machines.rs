//! On every machine: the keeper, which only holds descriptors, and the agent, which serves devices.
//!
//! Two DaemonSets, both `OnDelete`: the two must never go together on one machine, so the operator alone replaces their
//! pods. The keeper has no rights at all; an init container gives it the folder of its socket. The agent is privileged:
//! it makes loop devices and FUSE file systems.

use serde_json::{Value, json};

use super::{Inputs, merge, probe, with_template_label};
use crate::cluster::layout::{AGENT_HTTP_PORT, ENROLL_PORT};
use crate::object::{Object, labels, selector};

/// Who may enrol: the operator asks for tokens of this audience.
pub const TOKEN_AUDIENCE: &str = "holdfast.dev";
/// Seconds; kubelet renews it after four fifths.
const TOKEN_SECONDS: u32 = 3600;
const NOBODY: u32 = 65534;

pub(super) fn build(inputs: &Inputs<'_>) -> Vec<Object> {
    vec![inputs.service_account("agent"), keeper(inputs), agent(inputs)]
}

/// A pod on every machine.
pub(super) fn daemon_set(inputs: &Inputs<'_>, component: &str, strategy: &str, spec: Value) -> Object {
    let layout = inputs.layout();
    let spec = merge(
        json!({
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "priorityClassName": "system-node-critical",
            "terminationGracePeriodSeconds": 30,
            "nodeSelector": { "kubernetes.io/os": "linux" },
            "tolerations": [{ "operator": "Exists" }],
        }),
        spec,
    );
    Object::namespaced(layout, inputs.uid(), "apps/v1", "DaemonSet", &layout.part(component), component).with(
        "spec",
        json!({
            "selector": { "matchLabels": selector(layout, component) },
            "updateStrategy": { "type": strategy },
            "template": with_template_label(json!({ "metadata": { "labels": labels(layout, component) }, "spec": spec })),
        }),
    )
}

pub(super) fn host_path(name: &str, path: &str, kind: &str) -> Value {
    json!({ "name": name, "hostPath": { "path": path, "type": kind } })
}

fn keeper(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    let run = layout.run_dir();
    let mount = json!([{ "name": "run", "mountPath": run }]);
    let socket = format!("--socket={run}/keeper.sock");
    let keeper = merge(
        inputs.container("keeper", &["/usr/bin/holdfast"], &["keeper".to_owned(), socket]),
        json!({
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": NOBODY,
                "runAsGroup": NOBODY,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": mount,
        }),
    );
    let folder = merge(
        inputs.container("folder", &["/usr/bin/chown"], &[NOBODY.to_string(), run.clone()]),
        json!({
            "securityContext": {
                "runAsUser": 0,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"], "add": ["CHOWN"] },
            },
            "volumeMounts": mount,
        }),
    );
    let spec = json!({
        "serviceAccountName": layout.part("agent"),
        // It has nothing to end in order: whoever needs its descriptors has them too.
        "terminationGracePeriodSeconds": 1,
        "initContainers": [folder],
        "containers": [keeper],
        "volumes": [host_path("run", &run, "DirectoryOrCreate")],
    });
    daemon_set(inputs, "keeper", "OnDelete", spec)
}

fn agent(inputs: &Inputs<'_>) -> Object {
    let layout = inputs.layout();
    let (run, dir) = (layout.run_dir(), layout.agent_dir());
    let settings = inputs.settings;
    let arguments = [
        "agent".to_owned(),
        format!("--dir={dir}"),
        "--holder=$(NODE_NAME)".to_owned(),
        format!("--pki={dir}/pki"),
        format!("--sockets={run}/nodes"),
        format!("--keeper-socket={run}/keeper.sock"),
        format!("--http=0.0.0.0:{AGENT_HTTP_PORT}"),
        format!("--enroll={}.{}.svc:{ENROLL_PORT}", settings.service, settings.namespace),
        "--enroll-token=/var/run/secrets/holdfast.dev/token".to_owned(),
        "--enroll-ca=/etc/holdfast/ca.pem".to_owned(),
    ];
    let container = merge(
        inputs.container("agent", &["/usr/bin/holdfast"], &arguments),
        json!({
            "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
            "ports": [{ "name": "http", "containerPort": AGENT_HTTP_PORT, "protocol": "TCP" }],
            // An agent that has enrolled and waits for the cluster is alive: /healthz says that it serves.
            "livenessProbe": probe(AGENT_HTTP_PORT, 6),
            "securityContext": { "privileged": true, "runAsUser": 0, "readOnlyRootFilesystem": true },
            "volumeMounts": [
                { "name": "run", "mountPath": run },
                { "name": "dir", "mountPath": dir },
                { "name": "dev", "mountPath": "/dev" },
                { "name": "token", "mountPath": "/var/run/secrets/holdfast.dev", "readOnly": true },
                { "name": "trust", "mountPath": "/etc/holdfast", "readOnly": true },
            ],
        }),
    );
    let spec = json!({
        "serviceAccountName": layout.part("agent"),
        "containers": [container],
        "volumes": [
            host_path("run", &run, "DirectoryOrCreate"),
            host_path("dir", &dir, "DirectoryOrCreate"),
            host_path("dev", "/dev", "Directory"),
            {
                "name": "token",
                "projected": {
                    "defaultMode": 0o400,
                    "sources": [{
                        "serviceAccountToken": {
                            "audience": TOKEN_AUDIENCE,
                            "expirationSeconds": TOKEN_SECONDS,
                            "path": "token",
                        },
                    }],
                },
            },
            { "name": "trust", "configMap": { "name": layout.trust(), "defaultMode": 0o444 } },
        ],
    });
    daemon_set(inputs, "agent", "OnDelete", spec)
}
