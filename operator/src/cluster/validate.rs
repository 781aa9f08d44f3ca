//! From what a person wrote to what can be built, or to what is wrong with it and what to do.
//!
//! Pure. The API server has checked what its rules can express; this checks the rest.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_crds::{DeletionPolicy, Members, Storage, StorageCluster, StorageClusterSpec, UpdateType};
use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};

use super::layout::{Layout, MAIN_GROUP};
use holdfast_crds::quantity;

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
}

impl ValidCluster {
    /// Every storage node that the spec asks for, group by group: name of the pod, and its group.
    pub fn members(&self) -> Vec<(String, &Group)> {
        let of = |group: &'_ Group| (0..group.replicas).map(|ordinal| self.layout.pod(&group.name, ordinal)).collect::<Vec<_>>();
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
    groups.extend(group(MAIN_GROUP, &spec.members, &spec.storage, &mut problems));
    let mut seen = BTreeSet::from([MAIN_GROUP]);
    for further in &spec.node_groups {
        if !seen.insert(&further.name) {
            let message = format!("two node groups are named {}: rename one", further.name);
            problems.push(Problem { reason: "InvalidNodeGroups", message });
        }
        let storage = further.storage.as_ref().unwrap_or(&spec.storage);
        groups.extend(group(&further.name, &further.members, storage, &mut problems));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(ValidCluster {
        layout: Layout { namespace: namespace.clone(), name: name.clone() },
        uid: uid.clone(),
        image: spec.image.clone().filter(|image| !image.is_empty()),
        groups,
        default_replicas: spec.defaults.replicas.clamp(1, 5),
        certificate_days: u32::try_from(spec.security.certificate_days).unwrap_or(1).max(1),
        update: spec.update.kind,
        require_healthy_volumes: spec.update.require_healthy_volumes,
        manage_budget: spec.disruption.manage_budget,
        deletion_policy: spec.deletion_policy,
    })
}

fn group(name: &str, members: &Members, storage: &Storage, problems: &mut Vec<Problem>) -> Option<Group> {
    let disk = match disk(storage) {
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

fn disk(storage: &Storage) -> Result<Disk, String> {
    match storage {
        Storage { volume_claim_template: Some(claim), devices: None, host_path: None } => {
            let claim_bytes = quantity::bytes(&claim.size).map_err(|error| error.to_string())?;
            if claim_bytes < 1 << 30 {
                return Err(format!("a claim of {} is too small: a storage node needs at least 1Gi", claim.size.0));
            }
            // The file system of the claim wants room for itself, and the node for its few small files.
            let file_bytes = (claim_bytes - claim_bytes / 16) & !((1 << 20) - 1);
            Ok(Disk::Claim { storage_class: claim.storage_class_name.clone(), claim_bytes, file_bytes })
        }
        Storage { volume_claim_template: None, devices: None, host_path: None } => {
            Err("give one of volumeClaimTemplate, devices and hostPath".to_owned())
        }
        Storage { volume_claim_template: None, .. } => {
            Err("this version of the operator takes volumeClaimTemplate only; for a device or folder of the machine, \
                 give the class of a local provisioner"
                .to_owned())
        }
        _ => Err("give only one of volumeClaimTemplate, devices and hostPath".to_owned()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
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
        let Disk::Claim { claim_bytes, file_bytes, .. } = valid.groups[0].disk.clone();
        assert_eq!(claim_bytes, 20 << 30);
        assert_eq!(file_bytes, 19200 << 20);
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
