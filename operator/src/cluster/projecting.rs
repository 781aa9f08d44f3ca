//! Writes StorageNodes and StorageDisks where they differ from the catalogue, and takes away those it no longer knows.

use std::collections::BTreeMap;
use std::fmt::Debug;

use holdfast_crds::names::{LABEL_CLUSTER, condition};
use holdfast_crds::{StorageDisk, StorageNode};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Patch};
use kube::{Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::observed::{Catalogue, Observed};
use super::projection::{Projected, disks, nodes};
use super::validate::ValidCluster;
use crate::apply;
use crate::conditions;
use crate::context::Context;

/// What the two kinds have in common.
trait Shown:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize
{
    fn conditions(&self) -> Vec<Condition>;
    fn set_conditions(&mut self, conditions: Vec<Condition>);
    /// Nothing is to be written.
    fn shows_the_same(&self, other: &Self) -> bool;
}

impl Shown for StorageNode {
    fn conditions(&self) -> Vec<Condition> {
        self.status.clone().unwrap_or_default().conditions
    }

    fn set_conditions(&mut self, conditions: Vec<Condition>) {
        self.status.get_or_insert_default().conditions = conditions;
    }

    fn shows_the_same(&self, other: &StorageNode) -> bool {
        self.spec == other.spec && self.status == other.status && self.labels() == other.labels()
    }
}

impl Shown for StorageDisk {
    fn conditions(&self) -> Vec<Condition> {
        self.status.clone().unwrap_or_default().conditions
    }

    fn set_conditions(&mut self, conditions: Vec<Condition>) {
        self.status.get_or_insert_default().conditions = conditions;
    }

    fn shows_the_same(&self, other: &StorageDisk) -> bool {
        self.spec == other.spec && self.status == other.status && self.labels() == other.labels()
    }
}

/// Since when nodes are not connected, by name: their objects remember it.
pub type GoneSince = BTreeMap<String, Timestamp>;

/// # Errors
/// The API server's refusal.
pub async fn project(
    context: &Context,
    cluster: &ValidCluster,
    observed: &Observed,
    catalogue: &Catalogue,
) -> Result<GoneSince, kube::Error> {
    let layout = &cluster.layout;
    let gone = write(context, cluster, nodes(layout, &cluster.uid, observed, catalogue)).await?;
    write(context, cluster, disks(layout, &cluster.uid, catalogue)).await?;
    Ok(gone)
}

/// Tells since when which of them are not ready.
async fn write<T: Shown>(
    context: &Context,
    cluster: &ValidCluster,
    all: Vec<Projected<T>>,
) -> Result<GoneSince, kube::Error> {
    let mut gone = GoneSince::new();
    let layout = &cluster.layout;
    let api: Api<T> = Api::namespaced(context.client.clone(), &layout.namespace);
    let ours = ListParams::default().labels(&format!("{LABEL_CLUSTER}={}", layout.name));
    let mut known: BTreeMap<String, T> =
        api.list(&ours).await?.items.into_iter().map(|object| (object.name_any(), object)).collect();
    for Projected { mut object, conditions } in all {
        let name = object.name_any();
        let before = known.remove(&name);
        let former = before.as_ref().map(Shown::conditions).unwrap_or_default();
        let merged = conditions.merge(&former, None, Timestamp::now());
        let ready = merged.iter().find(|found| found.type_ == condition::READY && found.status != "True");
        gone.extend(ready.map(|ready| (name.clone(), ready.last_transition_time.0)));
        object.set_conditions(merged);
        if before.as_ref().is_some_and(|before| before.shows_the_same(&object)) {
            continue;
        }
        api.patch(&name, &apply::params(), &Patch::Apply(&object)).await?;
        let status = serde_json::to_value(&object).map(|value| value["status"].clone()).unwrap_or_default();
        let patch = json!({
            "apiVersion": T::api_version(&()),
            "kind": T::kind(&()),
            "metadata": { "name": name },
            "status": status,
        });
        let written = api.patch_status(&name, &apply::params(), &Patch::Apply(&patch)).await?;
        let now = object.conditions();
        context.tell(&written.object_ref(&()), &conditions::changed(&former, &now)).await;
    }
    for name in known.into_keys() {
        match api.delete(&name, &DeleteParams::default()).await {
            Err(error) if !apply::is_not_found(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(gone)
}
