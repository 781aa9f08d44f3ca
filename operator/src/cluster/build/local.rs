//! Disks of machines as PersistentVolumes: one on each machine of a group, bound to it by its affinity.
//!
//! So a storage node that has begun on a machine stays with its disk: the scheduler puts its pod nowhere else. Kubernetes
//! never empties or reuses them (`Retain`); a disk is given to another storage node by a person who deletes the
//! PersistentVolume and empties the disk.

use serde_json::{Value, json};

use super::Inputs;
use crate::cluster::observed::Machine;
use crate::cluster::validate::{Disk, Group};
use crate::object::Object;

const COMPONENT: &str = "disk";
const HOST: &str = "kubernetes.io/hostname";

/// Nothing for groups whose disks are claimed from another provisioner.
pub(super) fn build(inputs: &Inputs<'_>, group: &Group) -> Vec<Object> {
    let source = match &group.disk {
        Disk::Claim { .. } => return Vec::new(),
        Disk::Folder { path, .. } => json!({ "hostPath": { "path": path, "type": "DirectoryOrCreate" } }),
        Disk::Device { path } => json!({ "local": { "path": path } }),
    };
    let layout = inputs.layout();
    let class = layout.local_class(&group.name);
    let fits = |machine: &&Machine| {
        group.node_selector.iter().all(|(label, value)| machine.labels.get(label) == Some(value))
            && machine.labels.contains_key(HOST)
    };
    let mut objects = vec![
        Object::global(layout, "storage.k8s.io/v1", "StorageClass", &class, COMPONENT)
            .with("provisioner", json!("kubernetes.io/no-provisioner"))
            .with("reclaimPolicy", json!("Retain"))
            .with("volumeBindingMode", json!("WaitForFirstConsumer")),
    ];
    objects.extend(inputs.machines.iter().filter(fits).map(|machine| {
        let mut spec = json!({
            "capacity": { "storage": holdfast_crds::quantity::exact(group.disk.claim_bytes()).0 },
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": class,
            "volumeMode": group.disk.volume_mode(),
            "nodeAffinity": on(machine),
        });
        spec.as_object_mut().expect("made as one").extend(source.as_object().expect("made as one").clone());
        let name = format!("{class}.{}", machine.name);
        Object::global(layout, "v1", "PersistentVolume", &name, COMPONENT).with("spec", spec)
    }));
    objects
}

fn on(machine: &Machine) -> Value {
    let host = machine.labels.get(HOST).cloned().unwrap_or_default();
    let term = json!({ "matchExpressions": [{ "key": HOST, "operator": "In", "values": [host] }] });
    json!({ "required": { "nodeSelectorTerms": [term] } })
}
