//! One look at one Volume.

use std::sync::Arc;
use std::time::Duration;

use holdfast_api::v1;
use holdfast_cluster_client::{CallError, Client, Times};
use holdfast_crds::names::{VOLUME_FINALIZER, condition};
use holdfast_crds::{Volume, VolumeStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;
use tonic::Code;

use super::decide::{self, Step, Wanted};
use super::project::{self, Seen};
use crate::apply;
use crate::conditions;
use crate::context::{Context, FIELD_MANAGER, Running};
use crate::metrics::Metrics;

/// A volume on its way is looked at again soon: somebody waits for it.
const SOON: Duration = Duration::from_millis(300);
/// For so long; what takes longer than this is not waited for with a stopwatch.
const FRESH: SignedDuration = SignedDuration::from_secs(30);
/// What a person has to mend, and what cannot be asked now.
const LATER: Duration = Duration::from_secs(5);
/// Settled volumes together are asked for so many times a second at most.
const SETTLED_PER_SECOND: u64 = 4;
const SETTLED_MIN: Duration = Duration::from_secs(10);
/// Pods of one namespace that are read to find those that use a claim.
const PODS_MAX: u32 = 1000;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("the API server: {0}")]
    Api(#[from] kube::Error),
}

/// # Errors
/// The API server's refusals; what the storage cluster refuses stands in the status.
pub async fn reconcile(volume: Arc<Volume>, context: Arc<Context>) -> Result<Action, VolumeError> {
    Metrics::count(&context.metrics.volume_looks);
    let deleting = volume.metadata.deletion_timestamp.is_some();
    let finalized = volume.finalizers().iter().any(|finalizer| finalizer == VOLUME_FINALIZER);
    if deleting && !finalized {
        return Ok(Action::await_change());
    }
    let running = context.running(&volume.spec.cluster_ref);
    if running.as_ref().is_some_and(|running| running.paused) {
        return Ok(Action::requeue(LATER));
    }
    if !deleting && !finalized {
        // Before anything is made: what was made must not be forgotten when the object is deleted.
        finalize(&context, &volume, true).await?;
        return Ok(Action::await_change());
    }
    let Some(running) = running else {
        let cluster = &volume.spec.cluster_ref;
        let message =
            format!("the StorageCluster {}/{} is not there, or not ready yet", cluster.namespace, cluster.name);
        let seen = Seen { unreachable: Some(("ClusterNotReady", message)), ..Seen::default() };
        write(&context, &volume, &seen).await?;
        return Ok(Action::requeue(LATER));
    };
    let wanted = match decide::wanted(&volume, running.default_replicas) {
        Ok(wanted) => wanted,
        Err(message) => {
            write(&context, &volume, &Seen { refused: Some(("InvalidSize".into(), message)), ..Seen::default() })
                .await?;
            return Ok(Action::await_change());
        }
    };
    let mut seen = look(&running, &wanted, deleting, &volume).await;
    if seen.step == Some(Step::Release) {
        finalize(&context, &volume, false).await?;
        return Ok(Action::await_change());
    }
    seen.pods = pods(&context, &volume, &seen).await?;
    let unready_since = write(&context, &volume, &seen).await?;
    let fresh = unready_since.is_some_and(|since| Timestamp::now().duration_since(since) < FRESH);
    Ok(Action::requeue(again(&seen, deleting, fresh, &context)))
}

/// After an error of the API server; the controller's own queue keeps looks at one object apart.
pub fn on_error(_: Arc<Volume>, error: &VolumeError, context: Arc<Context>) -> Action {
    Metrics::count(&context.metrics.volume_errors);
    tracing::warn!(%error, "a volume is looked at again");
    Action::requeue(LATER)
}

/// Asks, decides, does one step, and asks again.
async fn look(running: &Running, wanted: &Wanted, deleting: bool, object: &Volume) -> Seen {
    let client = &running.client;
    let mut seen = Seen::default();
    let found = match get(client, wanted).await {
        Ok(found) => found,
        Err(error) => return failed(seen, &error),
    };
    let step = decide::next(wanted, deleting, found.as_ref());
    seen.volume = found;
    seen.step = Some(step.clone());
    let done = match &step {
        Step::Create => create(client, wanted, running, object).await.map(Some),
        Step::Grow { volume_id, size_bytes } => grow(client, volume_id, *size_bytes).await.map(Some),
        Step::SetReplicas { volume_id, replicas } => set_replicas(client, volume_id, *replicas).await.map(Some),
        Step::Delete { volume } => delete(client, volume).await.map(|gone| {
            if gone {
                seen.step = Some(Step::Release);
            }
            None
        }),
        Step::Release | Step::Settled | Step::Blocked { .. } | Step::Stuck { .. } => Ok(None),
    };
    match done {
        // It goes on when that is done; what that is stands in the volume.
        Err(CallError::Refused { reason, .. }) if reason == "ChangeUnderWay" => seen,
        Ok(Some(())) => match get(client, wanted).await {
            Ok(found) => {
                seen.volume = found;
                seen
            }
            Err(error) => failed(seen, &error),
        },
        Ok(None) => seen,
        Err(error) => failed(seen, &error),
    }
}

fn failed(mut seen: Seen, error: &CallError) -> Seen {
    match error {
        // The server's own patience ended, not the cluster's will.
        CallError::Refused { code: Code::DeadlineExceeded | Code::Cancelled | Code::Unknown, message, .. } => {
            seen.unreachable = Some(("TakesLong", message.clone()));
        }
        CallError::Refused { code, reason, message } => {
            let code = if reason.is_empty() { format!("{code:?}") } else { reason.clone() };
            seen.refused = Some((code, message.clone()));
        }
        CallError::NoLeader { .. } => seen.unreachable = Some(("NoLeader", error.to_string())),
        CallError::CertificateRefused { .. } => seen.unreachable = Some(("CertificateRefused", error.to_string())),
        CallError::Unreachable { .. } => seen.unreachable = Some(("Unreachable", error.to_string())),
    }
    seen
}

/// By identifier where it is known: a name may have been given to another volume; then by name.
async fn get(client: &Client, wanted: &Wanted) -> Result<Option<v1::Volume>, CallError> {
    for volume in wanted.known_id.iter().chain([&wanted.name]) {
        let request = v1::GetVolumeRequest { volume: volume.clone() };
        let answer = client
            .call(|mut cluster| {
                let request = request.clone();
                async move { cluster.get_volume(request).await }
            })
            .await;
        match answer {
            Ok(answer) => return Ok(answer.volume),
            Err(error) if error.code() == Code::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

async fn create(client: &Client, wanted: &Wanted, running: &Running, object: &Volume) -> Result<(), CallError> {
    let machines = &object.spec.placement.preferred_nodes;
    let nodes = machines.iter().filter_map(|machine| running.nodes_by_machine.get(machine).cloned());
    let annotations = object.metadata.annotations.iter().flatten();
    let labels = annotations
        .filter(|(key, value)| key.starts_with("holdfast.dev/pv") && !value.is_empty() && value.len() <= 256)
        .map(|(key, value)| (key.clone(), value.clone()));
    let request = v1::CreateVolumeRequest {
        name: wanted.name.clone(),
        size_bytes: wanted.size_bytes,
        logical_block_bytes: wanted.block_bytes,
        replicas: wanted.replicas,
        wait_ready: true,
        preferred_nodes: nodes.take(wanted.replicas as usize).collect(),
        spread: wanted.spread.to_owned(),
        labels: labels.collect(),
    };
    // Until the copies exist, which takes longer than other answers.
    let patient = client.clone().with_times(Times::default());
    patient
        .call(|mut cluster| {
            let request = request.clone();
            async move { cluster.create_volume(request).await }
        })
        .await
        .map(|_| ())
}

async fn grow(client: &Client, volume_id: &str, size_bytes: u64) -> Result<(), CallError> {
    let request = v1::ResizeVolumeRequest { volume: volume_id.to_owned(), size_bytes, expected_generation: 0 };
    client
        .call(|mut cluster| {
            let request = request.clone();
            async move { cluster.resize_volume(request).await }
        })
        .await
        .map(|_| ())
}

async fn set_replicas(client: &Client, volume_id: &str, replicas: u32) -> Result<(), CallError> {
    let request = v1::SetVolumeReplicasRequest { volume: volume_id.to_owned(), replicas, expected_generation: 0 };
    client
        .call(|mut cluster| {
            let request = request.clone();
            async move { cluster.set_volume_replicas(request).await }
        })
        .await
        .map(|_| ())
}

/// Whether nothing of it is left.
async fn delete(client: &Client, volume: &str) -> Result<bool, CallError> {
    let request = v1::DeleteVolumeRequest { volume: volume.to_owned(), expected_generation: 0 };
    client
        .call(|mut cluster| {
            let request = request.clone();
            async move { cluster.delete_volume(request).await }
        })
        .await
        .map(|answer| answer.gone)
}

/// Pods that name the claim, looked for while somebody has the volume.
async fn pods(context: &Context, volume: &Volume, seen: &Seen) -> Result<Option<Vec<String>>, VolumeError> {
    let Some((namespace, claim)) = project::claim(volume) else { return Ok(None) };
    match &seen.volume {
        None => return Ok(None),
        Some(volume) if volume.attached_to.is_empty() => return Ok(Some(Vec::new())),
        Some(_) => {}
    }
    // From the API server's cache: a little old is good enough for what people read.
    let every = ListParams::default().limit(PODS_MAX).match_any();
    let pods = Api::<Pod>::namespaced(context.client.clone(), &namespace).list(&every).await?;
    let uses = |pod: &Pod| {
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref()).any(|source| source.claim_name == claim)
    };
    let mut names: Vec<String> = pods.items.iter().filter(|pod| uses(pod)).map(|pod| pod.name_any()).collect();
    names.sort();
    Ok(Some(names))
}

/// When to look again at what nobody touches. `fresh`: it became what it is, other than ready, a moment ago.
fn again(seen: &Seen, deleting: bool, fresh: bool, context: &Context) -> Duration {
    if seen.unreachable.is_some() || seen.refused.is_some() {
        return LATER;
    }
    match &seen.step {
        Some(Step::Stuck { .. } | Step::Blocked { .. }) => LATER,
        // An election is over, or a copy made, within a second or so: somebody waits for it.
        _ if fresh => SOON,
        _ if deleting => LATER,
        _ => {
            let count = context.metrics.volumes.load(std::sync::atomic::Ordering::Relaxed);
            SETTLED_MIN.max(Duration::from_secs(count / SETTLED_PER_SECOND))
        }
    }
}

async fn finalize(context: &Context, volume: &Volume, add: bool) -> Result<(), VolumeError> {
    let mut finalizers: Vec<String> = volume.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != VOLUME_FINALIZER);
    if add {
        finalizers.push(VOLUME_FINALIZER.to_owned());
    }
    // The version makes it a change of the list that was read, not of one that somebody changed meanwhile.
    let patch = json!({ "metadata": { "finalizers": finalizers, "resourceVersion": volume.resource_version() } });
    let volumes: Api<Volume> = Api::all(context.client.clone());
    match volumes.patch(&volume.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // Gone, or changed: the next look begins from what is there.
        Err(error) if apply::is_not_found(&error) || apply::is_conflict(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Only what changed is written. Tells since when it is not ready, if it is not.
async fn write(context: &Context, volume: &Volume, seen: &Seen) -> Result<Option<Timestamp>, VolumeError> {
    let status: VolumeStatus = project::status(volume, seen, Timestamp::now());
    let before = volume.status.clone().unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.type_ == condition::READY);
    let unready_since = ready.filter(|ready| ready.status != "True").map(|ready| ready.last_transition_time.0);
    if status == before {
        return Ok(unready_since);
    }
    let name = volume.name_any();
    let patch = json!({ "apiVersion": "holdfast.dev/v1alpha1", "kind": "Volume", "metadata": { "name": name }, "status": status });
    let volumes: Api<Volume> = Api::all(context.client.clone());
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match volumes.patch_status(&name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => {}
        Err(error) if apply::is_not_found(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let changed = conditions::changed(&before.conditions, &status.conditions);
    context.tell(&volume.object_ref(&()), &changed).await;
    Ok(unready_since)
}
