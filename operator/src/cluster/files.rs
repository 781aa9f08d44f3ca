//! Secrets and ConfigMaps as named texts.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, Patch, PostParams};
use serde_json::json;

use super::certificates::Files;
use super::layout::Layout;
use crate::apply;
use crate::context::Context;
use crate::object::{Object, labels};

/// Empty where there is none; what is no text is left out, as if it were not there.
///
/// # Errors
/// The API server's refusal.
pub async fn read_secret(context: &Context, namespace: &str, name: &str) -> Result<Option<Files>, kube::Error> {
    let secret = Api::<Secret>::namespaced(context.client.clone(), namespace).get_opt(name).await?;
    Ok(secret.map(|secret| {
        let data = secret.data.unwrap_or_default().into_iter();
        data.filter_map(|(file, ByteString(bytes))| Some((file, String::from_utf8(bytes).ok()?))).collect()
    }))
}

/// # Errors
/// The API server's refusal.
pub async fn read_config(context: &Context, namespace: &str, name: &str) -> Result<Option<Files>, kube::Error> {
    let config = Api::<ConfigMap>::namespaced(context.client.clone(), namespace).get_opt(name).await?;
    Ok(config.map(|config| config.data.unwrap_or_default()))
}

/// Makes the Secret, and never changes one that is there; told in `Err` as a conflict.
///
/// # Errors
/// The API server's refusal.
pub async fn create_secret(context: &Context, layout: &Layout, name: &str, files: &Files) -> Result<(), kube::Error> {
    let secret: Secret = typed(&secret(layout, None, name, files));
    Api::<Secret>::namespaced(context.client.clone(), &layout.namespace).create(&PostParams::default(), &secret).await?;
    Ok(())
}

/// Whole: files that are not given are taken out. `uid`: it goes with the cluster's object.
///
/// # Errors
/// The API server's refusal.
pub async fn apply_secret(
    context: &Context,
    layout: &Layout,
    uid: Option<&str>,
    name: &str,
    files: &Files,
) -> Result<(), kube::Error> {
    let secrets: Api<Secret> = Api::namespaced(context.client.clone(), &layout.namespace);
    secrets.patch(name, &apply::params(), &Patch::Apply(secret(layout, uid, name, files).dynamic())).await?;
    Ok(())
}

/// Makes the ConfigMap that records the founding. It outlives the cluster's object: the disks do, too.
///
/// # Errors
/// The API server's refusal; a conflict where it is there.
pub async fn create_record(context: &Context, layout: &Layout, files: &Files) -> Result<(), kube::Error> {
    let config: ConfigMap = typed(&record(layout, files));
    let configs: Api<ConfigMap> = Api::namespaced(context.client.clone(), &layout.namespace);
    configs.create(&PostParams::default(), &config).await?;
    Ok(())
}

/// # Errors
/// The API server's refusal.
pub async fn apply_record(context: &Context, layout: &Layout, files: &Files) -> Result<(), kube::Error> {
    let configs: Api<ConfigMap> = Api::namespaced(context.client.clone(), &layout.namespace);
    configs.patch(&layout.founding(), &apply::params(), &Patch::Apply(record(layout, files).dynamic())).await?;
    Ok(())
}

fn secret(layout: &Layout, uid: Option<&str>, name: &str, files: &Files) -> Object {
    let data: BTreeMap<&String, ByteString> =
        files.iter().map(|(file, text)| (file, ByteString(text.clone().into_bytes()))).collect();
    Object::namespaced(layout, uid, "v1", "Secret", name, "certificates")
        .with("type", json!("Opaque"))
        .with("data", json!(data))
}

fn record(layout: &Layout, files: &Files) -> Object {
    let mut object = Object::namespaced(layout, None, "v1", "ConfigMap", &layout.founding(), "founding");
    object.0["metadata"]["labels"] = labels(layout, "founding");
    object.with("data", json!(files))
}

fn typed<T: serde::de::DeserializeOwned>(object: &Object) -> T {
    serde_json::from_value(object.0.clone()).expect("the object is one of its kind")
}
