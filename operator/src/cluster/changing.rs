//! Carries out what [`super::scale`] and [`super::update`] decide: one thing in one look.

use futures::StreamExt as _;
use holdfast_api::v1;
use holdfast_cluster_client::Client;
use holdfast_crds::names::condition;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, DeleteParams};

use super::observed::Catalogue;
use super::scale::Plan;
use super::storage;
use super::update::{self, Looked, Step};
use crate::apply;
use crate::conditions::Conditions;
use crate::context::Context;

/// Volumes asked for at the same time.
const AT_ONCE: usize = 16;

/// Does the next thing, and says in the conditions what is under way.
///
/// # Errors
/// The API server's refusal.
pub async fn advance(
    context: &Context,
    client: &Client,
    plan: &Plan,
    looked: &Looked<'_>,
    conditions: &mut Conditions,
) -> Result<(), kube::Error> {
    let namespace = &looked.cluster.layout.namespace;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), namespace);
    for claim in &plan.claims {
        tracing::info!(claim, "the claim of a member that left for good is deleted");
        gone(claims.delete(claim, &DeleteParams::default()).await.map(|_| ()))?;
    }
    if let Some(member) = &plan.remove
        && let Err(error) = storage::set_node_state(client, member, v1::NodeState::Removing).await
    {
        conditions.stalled("CannotShrink", format!("{member} cannot leave: {error}"));
        return Ok(());
    }
    for member in &plan.keep {
        tracing::info!(member, "it was about to leave, and is wanted again");
        if let Err(error) = storage::set_node_state(client, member, v1::NodeState::Active).await {
            conditions.reconciling("Growing", format!("{member} was about to leave, and is wanted again: {error}"));
        }
    }
    if let Some(waits) = &plan.waits {
        conditions.reconciling("ChangingMembers", waits.clone());
        return Ok(());
    }
    for (step, reason) in [(update::members(looked), "UpdatingMembers"), (update::machines(looked), "UpdatingMachines")]
    {
        match step {
            Step::Done => {}
            Step::Wait { why } => {
                tell(conditions, reason, why);
                return Ok(());
            }
            Step::Manual { pods } => {
                let message = format!("update.type is OnDelete: delete the pods {} one by one", pods.join(", "));
                tell(conditions, reason, message);
            }
            Step::Replace { pod, healthy } => {
                if healthy
                    && let Some(catalogue) = looked.catalogue
                    && let Err(why) = whole(client, catalogue).await
                {
                    tell(conditions, reason, format!("before {pod} is replaced: {why}"));
                    return Ok(());
                }
                tracing::info!(pod, "a pod of a former template is replaced");
                tell(conditions, reason, format!("{pod} is replaced"));
                let pods: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
                return gone(pods.delete(&pod, &DeleteParams::default()).await.map(|_| ()));
            }
        }
    }
    Ok(())
}

/// What stands in the way of being ready is said before an update is.
fn tell(conditions: &mut Conditions, reason: &str, message: String) {
    if conditions.holds(condition::READY) {
        conditions.reconciling(reason, message);
    }
}

fn gone(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(error) if !apply::is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

/// # Errors
/// The first volume that lacks a copy, in words.
async fn whole(client: &Client, catalogue: &Catalogue) -> Result<(), String> {
    let volumes: Vec<(String, String)> =
        catalogue.volumes.iter().map(|volume| (volume.volume_id.clone(), volume.name.clone())).collect();
    let asked = futures::stream::iter(volumes).map(|(volume, name)| async move {
        let request = v1::GetVolumeRequest { volume };
        let answer = client.call(|mut cluster| {
            let request = request.clone();
            async move { cluster.get_volume(request).await }
        });
        match answer.await {
            Ok(answer) if answer.volume.as_ref().is_some_and(|v| v.health() == v1::VolumeHealth::Healthy) => Ok(()),
            Ok(_) => Err(format!("volume {name} has not all its copies")),
            // Deleted meanwhile.
            Err(error) if error.code() == tonic::Code::NotFound => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    });
    let mut answers = asked.buffer_unordered(AT_ONCE);
    while let Some(answer) = answers.next().await {
        answer?;
    }
    Ok(())
}
