//! A StorageCluster that the chart asks for: made once where it is not there, and never changed afterwards.
//!
//! The chart cannot make it itself: on the first installation its definition is not there yet.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use holdfast_crds::StorageCluster;
use kube::ResourceExt as _;
use kube::api::{Api, PostParams};

use crate::apply;
use crate::context::Context;

const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Makes it, as soon as the API server takes it; returns at once where there is nothing to make.
pub async fn make(context: &Context) {
    let path = &context.settings.default_cluster;
    let cluster = match read(path).await {
        Ok(None) => return,
        Ok(Some(cluster)) => cluster,
        Err(error) => return tracing::error!(path = %path.display(), "the default StorageCluster is not made: {error:#}"),
    };
    let (namespace, name) = (cluster.namespace().unwrap_or_default(), cluster.name_any());
    let clusters: Api<StorageCluster> = Api::namespaced(context.client.clone(), &namespace);
    loop {
        match clusters.create(&PostParams::default(), &cluster).await {
            Ok(_) => return tracing::info!(namespace, name, "the default StorageCluster was made"),
            Err(error) if apply::is_conflict(&error) => return,
            Err(error) => tracing::warn!(namespace, name, %error, "the default StorageCluster is not made yet"),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

async fn read(path: &Path) -> anyhow::Result<Option<StorageCluster>> {
    let text = match tokio::fs::read_to_string(path).await {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let cluster: StorageCluster = serde_saphyr::from_str(&text).context("it is no StorageCluster")?;
    anyhow::ensure!(cluster.namespace().is_some() && cluster.metadata.name.is_some(), "it has no namespace or name");
    Ok(Some(cluster))
}
