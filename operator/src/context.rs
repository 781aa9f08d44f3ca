//! What every controller shares: the API server, what it was told, the storage clusters that run.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use holdfast_cluster_client::Client as ClusterClient;
use holdfast_crds::ClusterRef;
use holdfast_id::NodeId;
use holdfast_transport::pki::Identity;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::settings::Settings;

/// Field manager of everything that it applies.
pub const FIELD_MANAGER: &str = "holdfast-operator";

/// Reason of a cluster that is not available because it was never made: no news.
pub const NOT_FOUNDED: &str = "NotFounded";

pub struct Context {
    /// Of this process: what it did not see itself, it does not count.
    pub started: Timestamp,
    pub client: kube::Client,
    pub settings: Settings,
    pub metrics: Metrics,
    recorder: Recorder,
    shared: Mutex<Shared>,
}

/// Only what can be found out again: nothing here survives a restart, and nothing has to.
#[derive(Default)]
pub struct Shared {
    /// Storage clusters that have been founded and whose certificates are whole.
    pub running: BTreeMap<ClusterRef, Running>,
    /// Fingerprints of what was applied, and when, by kind, namespace and name.
    pub applied: HashMap<String, (u64, Instant)>,
    /// The operator's own certificates.
    pub admins: BTreeMap<ClusterRef, Identity>,
    /// Builds that members told, by pod, with the life of the pod that told it.
    pub versions: BTreeMap<(ClusterRef, String), (String, String)>,
    /// Identities that never come back, as the catalogue had them last.
    pub retired: BTreeMap<ClusterRef, BTreeSet<NodeId>>,
}

/// A storage cluster that answers, or has answered.
#[derive(Clone)]
pub struct Running {
    pub client: ClusterClient,
    /// Changes where the client has to be made anew.
    pub fingerprint: u64,
    /// Storage nodes by the machine they run on.
    pub nodes_by_machine: BTreeMap<String, String>,
    pub default_replicas: i32,
    /// Its volumes' objects are left alone.
    pub paused: bool,
}

impl Context {
    pub fn new(client: kube::Client, settings: Settings) -> Context {
        let reporter = Reporter { controller: "holdfast-operator".into(), instance: Some(settings.pod_name.clone()) };
        let recorder = Recorder::new(client.clone(), reporter);
        let started = Timestamp::now();
        Context { started, client, settings, metrics: Metrics::default(), recorder, shared: Mutex::default() }
    }

    /// Held for look-ups only, never across an await.
    pub fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn running(&self, cluster: &ClusterRef) -> Option<Running> {
        self.shared().running.get(cluster).cloned()
    }

    /// One event for each condition that changed: the same words as in the condition.
    pub async fn tell(&self, about: &ObjectReference, changed: &[&Condition]) {
        for condition in changed {
            let bad = matches!(condition.type_.as_str(), "Stalled" | "Degraded" | "DeletionBlocked" | "NoRedundancy");
            let away = condition.type_ == "Available" && condition.status == "False" && condition.reason != NOT_FOUNDED;
            let warning = away || (bad && condition.status == "True");
            // What is on its way, or said by another condition at the same time, is no news.
            let ready = condition.type_ == "Ready" && condition.status == "True";
            if !warning && !ready {
                continue;
            }
            let event = Event {
                type_: if warning { EventType::Warning } else { EventType::Normal },
                reason: condition.reason.clone(),
                note: Some(condition.message.chars().take(1000).collect()),
                action: condition.type_.clone(),
                secondary: None,
            };
            if let Err(error) = self.recorder.publish(&event, about).await {
                tracing::warn!(%error, reason = condition.reason, "an event was not recorded");
            }
        }
    }
}
