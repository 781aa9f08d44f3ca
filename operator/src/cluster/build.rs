//! The objects of a StorageCluster, as a pure function of what is asked for and of what the operator was told.
//!
//! Nothing here asks the API server. What is built is complete and in a fixed order; who applies it deletes nothing:
//! whatever has to go is decided elsewhere, by name. Names, ports and folders are those of [`super::layout`].

mod csi;
mod local;
mod machines;
mod nodes;

use std::collections::BTreeMap;

use holdfast_crds::names::LABEL_GROUP;
use serde_json::{Value, json};

use super::layout::Layout;
use super::observed::Machine;
use super::validate::ValidCluster;
pub use machines::TOKEN_AUDIENCE;

use crate::object::Object;
use crate::settings::Settings;

/// Label of a pod: the template that it was made from.
pub const TEMPLATE_LABEL: &str = "holdfast.dev/template";
/// Put into a template by `kubectl rollout restart`.
pub const RESTARTED_ANNOTATION: &str = "kubectl.kubernetes.io/restartedAt";

/// What is asked for, and what the world imposes.
pub struct Inputs<'a> {
    pub cluster: &'a ValidCluster,
    pub settings: &'a Settings,
    /// Pods of each group's StatefulSet: more than asked for while one that leaves still holds data.
    pub replicas: &'a BTreeMap<String, i32>,
    /// Where disks of machines may be; empty where no group has such.
    pub machines: &'a [Machine],
    /// The CSI driver, of which there is one, belongs to this cluster.
    pub with_csi: bool,
    /// Changes with the authority: processes that read it at their start only are started again.
    pub trust_pem: &'a str,
}

impl Inputs<'_> {
    fn layout(&self) -> &Layout {
        &self.cluster.layout
    }

    fn uid(&self) -> Option<&str> {
        Some(&self.cluster.uid)
    }

    fn image(&self) -> &str {
        self.cluster.image.as_deref().unwrap_or(&self.settings.image)
    }

    /// Of our own processes.
    fn container(&self, name: &str, command: &[&str], arguments: &[String]) -> Value {
        json!({
            "name": name,
            "image": self.image(),
            "imagePullPolicy": self.settings.image_pull_policy,
            "command": command,
            "args": arguments,
            // The last words of a process that cannot start become the words of a condition.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        })
    }

    fn service_account(&self, component: &str) -> Object {
        let layout = self.layout();
        let name = layout.part(component);
        Object::namespaced(layout, self.uid(), "v1", "ServiceAccount", &name, component)
            .with("automountServiceAccountToken", json!(false))
    }
}

/// Everything, in the order in which it is applied: what others need comes first.
pub fn build(inputs: &Inputs<'_>) -> Vec<Object> {
    let mut objects = nodes::build(inputs);
    if inputs.with_csi {
        objects.extend(machines::build(inputs));
        objects.extend(csi::build(inputs));
    }
    objects
}

/// The template of each workload that the operator itself replaces the pods of: group of storage nodes, or component.
/// `restarted`: when a person last asked for new pods of them.
pub fn templates(objects: &[Object], restarted: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let of = |object: &Object| {
        let labels = &object.0["spec"]["template"]["metadata"]["labels"];
        let template = labels[TEMPLATE_LABEL].as_str()?;
        let key = match object.kind() {
            "StatefulSet" => &labels[LABEL_GROUP],
            _ => &labels["app.kubernetes.io/component"],
        };
        let key = key.as_str()?;
        Some((key.to_owned(), made_from(template, restarted.get(key).map(String::as_str))))
    };
    objects.iter().filter_map(of).collect()
}

/// What tells pods that are to be replaced from others: the value of [`TEMPLATE_LABEL`] and of [`RESTARTED_ANNOTATION`].
pub fn made_from(template: &str, restarted: Option<&str>) -> String {
    match restarted {
        Some(at) => format!("{template}@{at}"),
        None => template.to_owned(),
    }
}

/// A probe that says that the process serves; it never depends on others, so that nobody is restarted for another's
/// failure.
fn probe(port: u16, failures: u32) -> Value {
    json!({
        "httpGet": { "path": "/healthz", "port": port },
        "periodSeconds": 10,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    })
}

/// Names the template: pods that carry another one are outdated. FNV-1a, because it must be the same in every build.
fn with_template_label(mut template: Value) -> Value {
    let hash = template
        .to_string()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    template["metadata"]["labels"][TEMPLATE_LABEL] = json!(format!("{hash:016x}"));
    template
}

fn merge(mut value: Value, more: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut value, more) else {
        unreachable!("both are written as objects in this crate")
    };
    fields.extend(more);
    value
}

#[cfg(test)]
pub(crate) mod tests;
