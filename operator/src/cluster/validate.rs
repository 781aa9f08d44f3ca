//! From what a person wrote to what can be built, or to what is wrong with it and what to do.
//!
//! Pure. The API server has checked what its rules can express; this checks the rest.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_crds::{DeletionPolicy, Members, Storage, StorageCluster, StorageClusterSpec, UpdateType};
use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};

use super::layout::{Layout, MAIN_GROUP};
use holdfast_crds::quantity;

/// Of the smallest disk.
const DISK_BYTES_MIN: u64 = 1 << 30;

/// What cannot be built, as a condition says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: &'static str,
    pub message: String,
}

/// A StorageCluster that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidCluster {
    pub layout: Layout,
    pub uid: String,
    pub image: Option<String>,
    pub groups: Vec<Group>,
    pub default_replicas: i32,
    pub certificate_days: u32,
    pub update: UpdateType,
    pub require_healthy_volumes: bool,
    pub manage_budget: bool,
    pub node_loss_timeout: Duration,
    pub deletion_policy: DeletionPolicy,
}

/// One StatefulSet.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub name: String,
    pub replicas: i32,
    pub node_selector: BTreeMap<String, String>,
    pub tolerations: Vec<Toleration>,
    pub zone: Option<String>,
    pub resources: Option<ResourceRequirements>,
    pub disk: Disk,
}

/// What a storage node is given to keep its bytes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// A file on a claimed volume.
    Claim { storage_class: Option<String>, claim_bytes: u64, file_bytes: u64 },
    /// A file in a folder of the machine, which is this cluster's and group's alone.
    Folder { path: String, file_bytes: u64 },
    /// A device of the machine.
    Device { path: String },
}

impl Disk {
    /// On the machine where the pod runs, which it then never leaves.
    pub fn is_local(&self) -> bool {
        !matches!(self, Disk::Claim { .. })
    }

    /// What a claim asks for.
    pub fn claim_bytes(&self) -> u64 {
        match self {
            Disk::Claim { claim_bytes, .. } => *claim_bytes,
            Disk::Folder { file_bytes, .. } => *file_bytes,
            // How large a device is, its machine alone knows: what every disk has.
            Disk::Device { .. } => DISK_BYTES_MIN,
        }
    }

    /// Of the file that is made where there is none; a device has its own size.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Disk::Claim { file_bytes, .. } | Disk::Folder { file_bytes, .. } => *file_bytes,
            Disk::Device { .. } => DISK_BYTES_MIN,
        }
    }

    /// As a claim says it.
    pub fn volume_mode(&self) -> &'static str {
        if matches!(self, Disk::Device { .. }) { "Block" } else { "Filesystem" }
    }
}

impl ValidCluster {
    /// Every storage node that the spec asks for, group by group: name of the pod, and its group.
    pub fn members(&self) -> Vec<(String, &Group)> {
        let of = |group: &'_ Group| {
            (0..group.replicas).map(|ordinal| self.layout.pod(&group.name, ordinal)).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(|group| of(group).into_iter().map(move |pod| (pod, group))).collect()
    }

    pub fn member_count(&self) -> usize {
        self.groups.iter().map(|group| usize::try_from(group.replicas).unwrap_or(0)).sum()
    }
}

/// # Errors
/// Everything that is wrong, not the first thing alone.
pub fn validate(cluster: &StorageCluster) -> Result<ValidCluster, Vec<Problem>> {
    let mut problems = Vec::new();
    let metadata = &cluster.metadata;
    let (Some(namespace), Some(name), Some(uid)) = (&metadata.namespace, &metadata.name, &metadata.uid) else {
        unreachable!("the API server gives every object of this kind a namespace, a name and a UID");
    };
    let spec: &StorageClusterSpec = &cluster.spec;
    let mut groups = Vec::new();
    let layout = Layout { namespace: namespace.clone(), name: name.clone() };
    groups.extend(group(&layout, MAIN_GROUP, &spec.members, &spec.storage, &mut problems));
    let mut seen = BTreeSet::from([MAIN_GROUP]);
    for further in &spec.node_groups {
        if !seen.insert(&further.name) {
            let message = format!("two node groups are named {}: rename one", further.name);
            problems.push(Problem { reason: "InvalidNodeGroups", message });
        }
        let storage = further.storage.as_ref().unwrap_or(&spec.storage);
        groups.extend(group(&layout, &further.name, &further.members, storage, &mut problems));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(ValidCluster {
        layout,
        uid: uid.clone(),
        image: spec.image.clone().filter(|image| !image.is_empty()),
        groups,
        default_replicas: spec.defaults.replicas.clamp(1, 5),
        certificate_days: u32::try_from(spec.security.certificate_days).unwrap_or(1).max(1),
        update: spec.update.kind,
        require_healthy_volumes: spec.update.require_healthy_volumes,
        manage_budget: spec.disruption.manage_budget,
        node_loss_timeout: spec.disruption.node_loss_timeout.into(),
        deletion_policy: spec.deletion_policy,
    })
}

/// The devices of an older StorageCluster, on machines that this one may use too.
pub fn taken<C: Borrow<StorageCluster>>(cluster: &StorageCluster, others: &[C]) -> Option<Problem> {
    let age = |cluster: &StorageCluster| {
        (cluster.metadata.creation_timestamp.clone(), cluster.metadata.namespace.clone(), cluster.metadata.name.clone())
    };
    let own = devices(cluster);
    for other in others.iter().map(Borrow::borrow).filter(|other| age(other) < age(cluster)) {
        for (path, selector) in devices(other) {
            let meets = |(own_path, own_selector): &&(&str, &BTreeMap<String, String>)| {
                let apart = |(label, value)| own_selector.get(label).is_some_and(|own| own != value);
                *own_path == path && !selector.iter().any(apart)
            };
            if own.iter().any(|own| meets(&own)) {
                let (_, namespace, name) = age(other);
                let message = format!(
                    "{path} belongs to the StorageCluster {}/{}, whose machines may be the same: give another device, or \
                     a nodeSelector with another value of one of its labels",
                    namespace.unwrap_or_default(),
                    name.unwrap_or_default()
                );
                return Some(Problem { reason: "DevicesTaken", message });
            }
        }
    }
    None
}

/// Of each group, with the machines that it may be on.
fn devices(cluster: &StorageCluster) -> Vec<(&str, &BTreeMap<String, String>)> {
    let spec = &cluster.spec;
    let groups = spec.node_groups.iter().map(|group| (&group.members, group.storage.as_ref().unwrap_or(&spec.storage)));
    [(&spec.members, &spec.storage)]
        .into_iter()
        .chain(groups)
        .flat_map(|(members, storage)| {
            storage.devices.iter().flatten().map(move |device| (device.path.as_str(), &members.node_selector))
        })
        .collect()
}

fn group(
    layout: &Layout,
    name: &str,
    members: &Members,
    storage: &Storage,
    problems: &mut Vec<Problem>,
) -> Option<Group> {
    let disk = match disk(layout, name, storage) {
        Ok(disk) => disk,
        Err(message) => {
            problems.push(Problem { reason: "InvalidStorage", message: format!("group {name}: {message}") });
            return None;
        }
    };
    Some(Group {
        name: name.to_owned(),
        replicas: members.replicas.clamp(1, 64),
        node_selector: members.node_selector.clone(),
        tolerations: members.tolerations.clone(),
        zone: members.zone.clone().filter(|zone| !zone.is_empty()),
        resources: members.resources.clone(),
        disk,
    })
}

fn disk(layout: &Layout, group: &str, storage: &Storage) -> Result<Disk, String> {
    match storage {
        Storage { volume_claim_template: Some(claim), devices: None, host_path: None } => {
            let claim_bytes = quantity::bytes(&claim.size).map_err(|error| error.to_string())?;
            if claim_bytes < DISK_BYTES_MIN {
                return Err(format!("a claim of {} is too small: a storage node needs at least 1Gi", claim.size.0));
            }
            // The file system of the claim wants room for itself, and the node for its few small files.
            let file_bytes = (claim_bytes - claim_bytes / 16) & !((1 << 20) - 1);
            Ok(Disk::Claim { storage_class: claim.storage_class_name.clone(), claim_bytes, file_bytes })
        }
        Storage { volume_claim_template: None, devices: None, host_path: None } => {
            Err("give one of volumeClaimTemplate, devices and hostPath".to_owned())
        }
        Storage { volume_claim_template: None, devices: None, host_path: Some(folder) } => {
            let bytes = quantity::bytes(&folder.size).map_err(|error| error.to_string())?;
            if bytes < DISK_BYTES_MIN {
                return Err(format!("a file of {} is too small: a storage node needs at least 1Gi", folder.size.0));
            }
            // Whole units of the format.
            let file_bytes = bytes & !((1 << 20) - 1);
            let base = folder.path.trim_end_matches('/');
            Ok(Disk::Folder { path: format!("{base}/{}", layout.local_class(group)), file_bytes })
        }
        Storage { volume_claim_template: None, devices: Some(devices), host_path: None } => match &devices[..] {
            [device] => Ok(Disk::Device { path: device.path.clone() }),
            _ => Err("give one device: a storage node has one disk".to_owned()),
        },
        _ => Err("give only one of volumeClaimTemplate, devices and hostPath".to_owned()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    pub(crate) fn cluster(yaml: &str) -> StorageCluster {
        let text = format!(
            "apiVersion: holdfast.dev/v1alpha1\nkind: StorageCluster\nmetadata: {{name: main, namespace: storage, uid: \
             11111111-2222-3333-4444-555555555555, generation: 1}}\nspec:\n{yaml}"
        );
        serde_saphyr::from_str(&text).unwrap()
    }

    pub(crate) fn three() -> ValidCluster {
        validate(&cluster("  storage: {volumeClaimTemplate: {size: 20Gi, storageClassName: local-path}}\n")).unwrap()
    }

    #[test]
    fn three_members_are_the_default() {
        let valid = three();
        let names: Vec<String> = valid.members().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["main-main-0", "main-main-1", "main-main-2"]);
        let disk = &valid.groups[0].disk;
        assert_eq!((disk.claim_bytes(), disk.file_bytes()), (20 << 30, 19200 << 20));
    }

    #[test]
    fn a_folder_is_one_clusters_and_groups_alone() {
        let valid = validate(&cluster("  storage: {hostPath: {path: /data/, size: 2Gi}}\n")).unwrap();
        let path = "/data/storage.main.main".to_owned();
        assert_eq!(valid.groups[0].disk, Disk::Folder { path, file_bytes: 2 << 30 });
    }

    #[test]
    fn a_device_is_the_older_clusters_where_machines_may_be_the_same() {
        let of = |name: &str, selector: &str, second: i64| {
            let members =
                format!("  members: {{nodeSelector: {selector}}}\n  storage: {{devices: [{{path: /dev/sdb}}]}}\n");
            let mut cluster = cluster(&members);
            cluster.metadata.name = Some(name.to_owned());
            cluster.metadata.creation_timestamp =
                Some(Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap()));
            cluster
        };
        let old = of("old", "{role: storage}", 10);
        assert_eq!(taken(&old, &[old.clone(), of("new", "{role: storage}", 20)]), None, "it was there first");
        let problem = taken(&of("new", "{}", 20), std::slice::from_ref(&old)).unwrap();
        assert_eq!(problem.reason, "DevicesTaken");
        assert!(problem.message.contains("/dev/sdb") && problem.message.contains("storage/old"), "{}", problem.message);
        assert_eq!(taken(&of("new", "{role: other}", 20), &[old]), None);
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let wrong = cluster(
            "  storage: {volumeClaimTemplate: {size: 10Mi}}\n  nodeGroups:\n  - {name: a, storage: {}}\n  - {name: a, \
             replicas: 1, storage: {volumeClaimTemplate: {size: x}}}\n",
        );
        let problems = validate(&wrong).unwrap_err();
        let reasons: Vec<&str> = problems.iter().map(|problem| problem.reason).collect();
        assert_eq!(reasons, ["InvalidStorage", "InvalidStorage", "InvalidNodeGroups", "InvalidStorage"]);
        assert!(problems[0].message.contains("at least 1Gi"), "{}", problems[0].message);
    }
}
