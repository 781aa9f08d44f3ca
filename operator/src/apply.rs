//! Server-side apply under one field manager, and only where something changed or was not looked at for a while.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use holdfast_crds::names::LABEL_CLUSTER;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::core::DynamicObject;
use tokio::time::Instant;

use crate::cluster::layout::Layout;
use crate::context::{Context, FIELD_MANAGER};
use crate::object::{LABEL_CLUSTER_NAMESPACE, Object};

/// What somebody else changed is put right after this long at most.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Applies the object where it differs from what was applied last, or that was a while ago.
///
/// # Errors
/// The API server's refusal.
pub async fn apply(context: &Context, object: &Object) -> Result<(), kube::Error> {
    let key = key(object);
    let fingerprint = fingerprint(&object.0.to_string());
    let known = context.shared().applied.get(&key).copied();
    if known.is_some_and(|(known, at)| known == fingerprint && at.elapsed() < AGAIN_AFTER) {
        return Ok(());
    }
    api(context, object).patch(object.name(), &params(), &Patch::Apply(object.dynamic())).await?;
    context.shared().applied.insert(key, (fingerprint, Instant::now()));
    Ok(())
}

/// Deletes it where it is there.
///
/// # Errors
/// The API server's refusal.
pub async fn delete(context: &Context, object: &Object) -> Result<(), kube::Error> {
    context.shared().applied.remove(&key(object));
    match api(context, object).delete(object.name(), &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether an object without an owner belongs to this cluster.
///
/// # Errors
/// The API server's refusal.
pub async fn is_ours(context: &Context, object: &Object, layout: &Layout) -> Result<bool, kube::Error> {
    let found = api(context, object).get_opt(object.name()).await?;
    Ok(found.is_some_and(|found| {
        let label = |key: &str| found.labels().get(key).map(String::as_str);
        label(LABEL_CLUSTER) == Some(layout.name.as_str())
            && label(LABEL_CLUSTER_NAMESPACE) == Some(layout.namespace.as_str())
    }))
}

fn key(object: &Object) -> String {
    format!("{}/{}/{}", object.kind(), object.namespace().unwrap_or_default(), object.name())
}

fn api(context: &Context, object: &Object) -> Api<DynamicObject> {
    match object.namespace() {
        Some(namespace) => Api::namespaced_with(context.client.clone(), namespace, &object.resource()),
        None => Api::all_with(context.client.clone(), &object.resource()),
    }
}

/// Ours is the last word on every field that we set.
pub fn params() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

pub fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

pub fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
