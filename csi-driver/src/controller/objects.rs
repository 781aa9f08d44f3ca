//! Volume objects at the Kubernetes API: made, found, grown, deleted and waited for, each within a bound.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use holdfast_crds::{Volume, quantity};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde_json::json;

use super::error::ControllerError;
use super::outcome::{self, Outcome};
use super::spec::Wanted;

/// One call of the API.
const CALL_WITHIN: Duration = Duration::from_secs(20);
/// For the operator and the cluster to make, grow or delete a volume. The sidecars give up after two minutes and come
/// again, and find it further.
pub const DONE_WITHIN: Duration = Duration::from_secs(90);
/// Between two watches of which the first broke.
const WATCH_AGAIN_AFTER: Duration = Duration::from_millis(500);

pub struct Objects {
    volumes: Api<Volume>,
    nodes: Api<Node>,
}

impl Objects {
    pub fn new(client: Client) -> Objects {
        Objects { volumes: Api::all(client.clone()), nodes: Api::all(client) }
    }

    pub async fn volume(&self, name: &str) -> Result<Option<Volume>, ControllerError> {
        // The API server answers names that no object can have with a refusal of the path.
        if !crate::names::is_label(name) {
            return Ok(None);
        }
        within(self.volumes.get_opt(name)).await
    }

    pub async fn volumes(&self) -> Result<Vec<Volume>, ControllerError> {
        Ok(within(self.volumes.list(&ListParams::default())).await?.items)
    }

    pub async fn has_node(&self, name: &str) -> Result<bool, ControllerError> {
        if name.is_empty() || name.contains('/') {
            return Ok(false);
        }
        Ok(within(self.nodes.get_metadata_opt(name)).await?.is_some())
    }

    /// Makes the object where it is not there.
    pub async fn create(&self, wanted: &Wanted) -> Result<Volume, ControllerError> {
        let mut volume = Volume::new(&wanted.object, wanted.spec.clone());
        volume.metadata = ObjectMeta { annotations: Some(wanted.annotations.clone()), ..volume.metadata };
        match within(self.volumes.create(&PostParams::default(), &volume)).await {
            Err(ControllerError::Kubernetes(error)) if is_conflict(&error) => {
                let present = self.volume(&wanted.object).await?;
                present.ok_or_else(|| ControllerError::UnknownVolume(wanted.object.clone()))
            }
            result => result,
        }
    }

    pub async fn grow(&self, name: &str, bytes: u64) -> Result<Volume, ControllerError> {
        let patch = Patch::Merge(json!({ "spec": { "size": quantity::exact(bytes) } }));
        within(self.volumes.patch(name, &PatchParams::default(), &patch)).await
    }

    /// Asks for the end of this very object; one that has gone has gone.
    pub async fn delete(&self, volume: &Volume) -> Result<(), ControllerError> {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let uid = Preconditions { uid: volume.metadata.uid.clone(), ..Preconditions::default() };
        let parameters = DeleteParams { preconditions: Some(uid), ..DeleteParams::default() };
        match within(self.volumes.delete(name, &parameters)).await {
            // Conflict: another object has the name now.
            Err(ControllerError::Kubernetes(error)) if is_gone(&error) || is_conflict(&error) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Until the volume is as its spec asks, or is refused.
    pub async fn done(&self, name: &str) -> Result<u64, ControllerError> {
        let mut why = "nothing was heard of it".to_owned();
        let seen = self.watch(name, |volume| {
            let Some(volume) = volume else { return Some(Err(ControllerError::UnknownVolume(name.to_owned()))) };
            match outcome::of(&volume) {
                Outcome::Done { bytes } => Some(Ok(bytes)),
                Outcome::Refused { code, message } => {
                    Some(Err(ControllerError::Refused { name: name.to_owned(), code, message }))
                }
                Outcome::Waiting(reason) => {
                    why = reason;
                    None
                }
            }
        });
        match tokio::time::timeout(DONE_WITHIN, seen).await {
            Ok(result) => result,
            Err(_) => Err(ControllerError::Pending { name: name.to_owned(), within: DONE_WITHIN, why }),
        }
    }

    /// Until the object, and with it the data, has gone.
    pub async fn gone(&self, name: &str) -> Result<(), ControllerError> {
        let mut why = "nothing was heard of it".to_owned();
        let seen = self.watch(name, |volume| {
            let Some(volume) = volume else { return Some(()) };
            let conditions = volume.status.map(|status| status.conditions).unwrap_or_default();
            let blocked = conditions.iter().find(|condition| condition.type_ == "DeletionBlocked");
            why = blocked.map_or("its copies are being deleted".into(), |condition| condition.message.clone());
            None
        });
        match tokio::time::timeout(DONE_WITHIN, seen).await {
            Ok(()) => Ok(()),
            Err(_) => Err(ControllerError::Pending { name: name.to_owned(), within: DONE_WITHIN, why }),
        }
    }

    /// Looks at the object now and at each change, until `look` has seen enough. A watch that breaks is begun again.
    async fn watch<T>(&self, name: &str, mut look: impl FnMut(Option<Volume>) -> Option<T>) -> T {
        loop {
            let mut changes = pin!(watcher::watch_object(self.volumes.clone(), name));
            loop {
                match changes.try_next().await {
                    Ok(Some(volume)) => {
                        if let Some(enough) = look(volume) {
                            return enough;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(name, %error, "the watch is begun again");
                        break;
                    }
                }
            }
            tokio::time::sleep(WATCH_AGAIN_AFTER).await;
        }
    }
}

async fn within<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ControllerError> {
    let begun = Instant::now();
    match tokio::time::timeout(CALL_WITHIN, call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ControllerError::Silent(begun.elapsed())),
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
