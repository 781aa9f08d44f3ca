//! The two controllers and what wakes them.
//!
//! A StorageCluster is looked at when it, or a workload that it owns, changes; a Volume when it changes or Kubernetes
//! attaches or detaches it; each of them again after the time that its last look asked for. Looks at one object never
//! overlap; looks at different ones do, up to a bound.

use std::sync::Arc;

use futures::StreamExt as _;
use holdfast_crds::names::CSI_DRIVER;
use holdfast_crds::{StorageCluster, Volume};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::Api;
use kube::runtime::controller::{self, Config, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use tokio::sync::watch;

use crate::cluster::reconcile::{self as cluster, Looker};
use crate::context::Context;
use crate::volume::reconcile as volume;

const CLUSTERS_AT_ONCE: u16 = 4;
/// Creating a volume waits for its copies, and holds a place here meanwhile.
const VOLUMES_AT_ONCE: u16 = 32;
const MANAGED: &str = "app.kubernetes.io/managed-by=holdfast-operator";

/// Runs until it is told to stop, and every look under way has ended.
pub async fn run(context: Arc<Context>, stop: watch::Receiver<bool>) {
    let client = context.client.clone();
    let attachments = watcher::Config::default();
    let volumes = Controller::new(Api::<Volume>::all(client.clone()), watcher::Config::default())
        .with_config(Config::default().concurrency(VOLUMES_AT_ONCE))
        .watches(Api::<VolumeAttachment>::all(client.clone()), attachments, |attachment| attached(&attachment))
        .graceful_shutdown_on(stopped(stop.clone()));
    let clusters = Controller::new(Api::<StorageCluster>::all(client.clone()), watcher::Config::default());
    let ours = || watcher::Config::default().labels(MANAGED);
    let looker = Arc::new(Looker { context: Arc::clone(&context), clusters: clusters.store(), volumes: volumes.store() });
    let clusters = clusters
        .with_config(Config::default().concurrency(CLUSTERS_AT_ONCE))
        .owns(Api::<StatefulSet>::all(client.clone()), ours())
        .owns(Api::<DaemonSet>::all(client.clone()), ours())
        .owns(Api::<Deployment>::all(client), ours())
        .graceful_shutdown_on(stopped(stop));
    let clusters = clusters.run(cluster::reconcile, cluster::on_error, looker).for_each(|result| async move {
        if let Err(error) = result {
            log(&error);
        }
    });
    let volumes = volumes.run(volume::reconcile, volume::on_error, context).for_each(|result| async move {
        if let Err(error) = result {
            log(&error);
        }
    });
    futures::join!(clusters, volumes);
}

fn log<E: std::error::Error, Q: std::error::Error>(error: &controller::Error<E, Q>) {
    match error {
        // Told where it was consumed, or nothing to tell: the object has gone.
        controller::Error::ReconcilerFailed(..) | controller::Error::ObjectNotFound(_) => {}
        other => tracing::warn!(error = %other, "a watch is made again"),
    }
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender is gone only when the process ends.
    let _ = stop.wait_for(|stop| *stop).await.map(|_| ());
}

/// The Volume of an attachment: the CSI driver gives PersistentVolumes the name of their Volume.
fn attached(attachment: &VolumeAttachment) -> Option<ObjectRef<Volume>> {
    let spec = &attachment.spec;
    if spec.attacher != CSI_DRIVER {
        return None;
    }
    spec.source.persistent_volume_name.as_deref().map(ObjectRef::new)
}
