//! An object of the Kubernetes API as a value to be applied.

use holdfast_crds::names::LABEL_CLUSTER;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::{Value, json};

use crate::cluster::layout::Layout;

/// Label of objects that no namespace holds: that of their StorageCluster.
pub const LABEL_CLUSTER_NAMESPACE: &str = "holdfast.dev/cluster-namespace";

/// Complete but for what the API server adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Object(pub Value);

impl Object {
    /// In the cluster's namespace, labelled as its part, and gone with it where `uid` is given.
    pub fn namespaced(
        layout: &Layout,
        uid: Option<&str>,
        api: &str,
        kind: &str,
        name: &str,
        component: &str,
    ) -> Object {
        let mut object = Object::bare(layout, api, kind, name, component);
        object.0["metadata"]["namespace"] = json!(layout.namespace);
        if let Some(uid) = uid {
            object.0["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "holdfast.dev/v1alpha1",
                "kind": "StorageCluster",
                "name": layout.name,
                "uid": uid,
                "controller": true,
                "blockOwnerDeletion": true,
            }]);
        }
        object
    }

    /// Of the whole Kubernetes cluster: nothing owns it, and who deletes the StorageCluster deletes it too.
    pub fn global(layout: &Layout, api: &str, kind: &str, name: &str, component: &str) -> Object {
        let mut object = Object::bare(layout, api, kind, name, component);
        object.0["metadata"]["labels"][LABEL_CLUSTER_NAMESPACE] = json!(layout.namespace);
        object
    }

    fn bare(layout: &Layout, api: &str, kind: &str, name: &str, component: &str) -> Object {
        Object(json!({
            "apiVersion": api,
            "kind": kind,
            "metadata": { "name": name, "labels": labels(layout, component) },
        }))
    }

    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Object {
        self.0[field] = value;
        self
    }

    pub fn kind(&self) -> &str {
        self.0["kind"].as_str().unwrap_or_default()
    }

    pub fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().unwrap_or_default()
    }

    pub fn namespace(&self) -> Option<&str> {
        self.0["metadata"]["namespace"].as_str()
    }

    /// What it changes, it changes in processes.
    pub fn runs_pods(&self) -> bool {
        matches!(self.kind(), "StatefulSet" | "DaemonSet" | "Deployment")
    }

    pub fn resource(&self) -> ApiResource {
        let api = self.0["apiVersion"].as_str().unwrap_or_default();
        let (group, version) = api.split_once('/').unwrap_or(("", api));
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, self.kind()))
    }

    pub fn dynamic(&self) -> DynamicObject {
        serde_json::from_value(self.0.clone()).expect("an object has a kind and metadata")
    }
}

/// Labels of everything that belongs to a StorageCluster.
pub fn labels(layout: &Layout, component: &str) -> Value {
    json!({
        "app.kubernetes.io/name": "holdfast",
        "app.kubernetes.io/managed-by": "holdfast-operator",
        "app.kubernetes.io/component": component,
        LABEL_CLUSTER: layout.name,
    })
}

/// What a selector may use: never the labels that may change.
pub fn selector(layout: &Layout, component: &str) -> Value {
    json!({ "app.kubernetes.io/component": component, LABEL_CLUSTER: layout.name })
}
