//! The end of a StorageCluster's object: what holds it, and what goes with it.
//!
//! With `deletionPolicy: Retain` claims, identities and the record of the founding stay, so that the same object made
//! again finds its volumes. With `Delete` they go, once there are no volumes. Nothing is taken from under a pod: while
//! a volume of the cluster is attached, the object stays.

use holdfast_crds::names::{CLUSTER_FINALIZER, LABEL_CLUSTER};
use holdfast_crds::{DeletionPolicy, StorageCluster, Volume};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Secret};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

use super::layout::{Layout, MAIN_GROUP};
use super::reconcile::{ClusterError, Looker};
use crate::apply;
use crate::context::Context;
use crate::object::{LABEL_CLUSTER_NAMESPACE, Object};
use holdfast_crds::names::CSI_DRIVER;

/// Names in one message.
const NAMED_MAX: usize = 5;

/// What holds the deletion, if anything: reason and message.
pub fn held(policy: DeletionPolicy, volumes: &[&Volume]) -> Option<(&'static str, String)> {
    let list = |volumes: &[&Volume]| {
        let names: Vec<String> = volumes.iter().take(NAMED_MAX).map(|volume| volume.name_any()).collect();
        let more = volumes.len().saturating_sub(NAMED_MAX);
        if more > 0 { format!("{} and {more} more", names.join(", ")) } else { names.join(", ") }
    };
    let attached = |volume: &&&Volume| volume.status.as_ref().is_some_and(|status| status.attachment.is_some());
    let attached: Vec<&Volume> = volumes.iter().filter(attached).copied().collect();
    if !attached.is_empty() {
        let message = format!("pods use {}: delete them first", list(&attached));
        return Some(("VolumesAttached", message));
    }
    if policy == DeletionPolicy::Delete && !volumes.is_empty() {
        let message = format!(
            "deletionPolicy is Delete, and there are volumes: {}; delete their claims first, or set it to \
                               Retain",
            list(volumes)
        );
        return Some(("VolumesExist", message));
    }
    None
}

/// Ends it, or tells what holds it.
///
/// # Errors
/// The API server's refusal.
pub async fn end(
    looker: &Looker,
    cluster: &StorageCluster,
    layout: &Layout,
) -> Result<Option<(&'static str, String)>, ClusterError> {
    let context = &looker.context;
    if !cluster.finalizers().iter().any(|finalizer| finalizer == CLUSTER_FINALIZER) {
        return Ok(None);
    }
    // Asked of the API server itself: what a cache does not show yet would be lost.
    let volumes = Api::<Volume>::all(context.client.clone()).list(&ListParams::default()).await?;
    let own = layout.cluster_ref();
    let ours: Vec<&Volume> = volumes.items.iter().filter(|volume| volume.spec.cluster_ref == own).collect();
    if let Some(held) = held(cluster.spec.deletion_policy, &ours) {
        return Ok(Some(held));
    }
    let mut global = vec![
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", layout.global("csi-controller")),
        ("storage.k8s.io/v1", "CSIDriver", CSI_DRIVER.to_owned()),
    ];
    let groups = cluster.spec.node_groups.iter().map(|group| group.name.as_str());
    let groups = groups.chain([MAIN_GROUP]);
    global.extend(groups.map(|group| ("storage.k8s.io/v1", "StorageClass", layout.local_class(group))));
    for (api, kind, name) in global {
        let object = Object::global(layout, api, kind, &name, "");
        if apply::is_ours(context, &object, layout).await? {
            apply::delete(context, &object).await?;
        }
    }
    if cluster.spec.deletion_policy == DeletionPolicy::Delete {
        erase(context, layout).await?;
    }
    context.shared().running.remove(&own);
    finalize(context, cluster, false).await?;
    Ok(None)
}

/// Claims first: while an identity is there, its disk may still be used.
async fn erase(context: &Context, layout: &Layout) -> Result<(), kube::Error> {
    let ours = ListParams::default().labels(&format!("{LABEL_CLUSTER}={}", layout.name));
    let namespace = &layout.namespace;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), namespace);
    claims.delete_collection(&DeleteParams::default(), &ours).await?;
    // What is on the machines' disks stays there: who made them decides about it.
    let disks = format!("{LABEL_CLUSTER}={},{LABEL_CLUSTER_NAMESPACE}={namespace}", layout.name);
    let disks = ListParams::default().labels(&disks);
    let volumes: Api<PersistentVolume> = Api::all(context.client.clone());
    volumes.delete_collection(&DeleteParams::default(), &disks).await?;
    for name in [layout.nodes_tls(), layout.authority()] {
        let secrets: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
        ignore_missing(secrets.delete(&name, &DeleteParams::default()).await.map(|_| ()))?;
    }
    let configs: Api<ConfigMap> = Api::namespaced(context.client.clone(), namespace);
    ignore_missing(configs.delete(&layout.founding(), &DeleteParams::default()).await.map(|_| ()))
}

fn ignore_missing(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(error) if !apply::is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Adds or takes away the finalizer, as a change of what was read.
///
/// # Errors
/// The API server's refusal.
pub async fn finalize(context: &Context, cluster: &StorageCluster, add: bool) -> Result<(), kube::Error> {
    let mut finalizers: Vec<String> = cluster.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != CLUSTER_FINALIZER);
    if add {
        finalizers.push(CLUSTER_FINALIZER.to_owned());
    }
    let patch = json!({ "metadata": { "finalizers": finalizers, "resourceVersion": cluster.resource_version() } });
    let clusters: Api<StorageCluster> =
        Api::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default());
    match clusters.patch(&cluster.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
        Err(error) if !apply::is_not_found(&error) && !apply::is_conflict(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::decide::tests::object;

    #[test]
    fn what_is_in_use_holds_it_and_data_holds_its_erasure() {
        let (idle, used) = (object(""), object("status: {attachment: {node: worker-1, epoch: 1}}"));
        assert_eq!(held(DeletionPolicy::Retain, &[&idle]), None);
        assert_eq!(held(DeletionPolicy::Delete, &[]), None);
        assert_eq!(held(DeletionPolicy::Retain, &[&idle, &used]).unwrap().0, "VolumesAttached");
        let (reason, message) = held(DeletionPolicy::Delete, &[&idle; 7]).unwrap();
        assert_eq!(reason, "VolumesExist");
        assert!(message.contains("and 2 more"), "{message}");
    }
}
