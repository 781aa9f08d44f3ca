//! How a Volume is, in the words of its status. Pure.

use holdfast_api::v1;
use holdfast_crds::names::condition;
use holdfast_crds::{Attachment, KubernetesUse, LastError, Volume, VolumeReplica, VolumeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::decide::Step;
use crate::cluster::projection::word;
use crate::conditions::Conditions;
use holdfast_crds::quantity;

/// Annotations that the CSI driver writes.
const ANNOTATION_PV: &str = "holdfast.dev/pv";
const ANNOTATION_PVC: &str = "holdfast.dev/pvc";
const ANNOTATION_PVC_NAMESPACE: &str = "holdfast.dev/pvc-namespace";

/// What one look came to.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub step: Option<Step>,
    pub volume: Option<v1::Volume>,
    /// What the metadata plane refused: code and message.
    pub refused: Option<(String, String)>,
    /// Nobody could be asked; it may well succeed later.
    pub unreachable: Option<(&'static str, String)>,
    /// Pods that name the claim; `None`: they were not looked for.
    pub pods: Option<Vec<String>>,
}

/// Claim and namespace of the claim that the volume is for.
pub fn claim(volume: &Volume) -> Option<(String, String)> {
    let annotations = volume.metadata.annotations.as_ref()?;
    Some((annotations.get(ANNOTATION_PVC_NAMESPACE)?.clone(), annotations.get(ANNOTATION_PVC)?.clone()))
}

/// The status after a look; fields of which the look learnt nothing stay as they were.
pub fn status(object: &Volume, seen: &Seen, now: Timestamp) -> VolumeStatus {
    let before = object.status.clone().unwrap_or_default();
    let deleting = object.metadata.deletion_timestamp.is_some();
    let generation = object.metadata.generation;
    let mut status = VolumeStatus { observed_generation: generation, conditions: Vec::new(), ..before.clone() };
    if let Some(volume) = &seen.volume {
        learn(&mut status, volume, deleting);
    } else if deleting {
        status.state = Some("Deleting".to_owned());
    } else if before.state.is_none() {
        status.state = Some("Creating".to_owned());
    }
    status.kubernetes = kubernetes(object, &before, seen.pods.clone());
    status.last_error = match &seen.refused {
        None if seen.unreachable.is_some() => before.last_error.clone(),
        None => None,
        Some((code, message)) => Some(match &before.last_error {
            Some(old) if old.code == *code => LastError { message: message.clone(), ..old.clone() },
            _ => LastError { code: code.clone(), message: message.clone(), time: Time(now) },
        }),
    };
    let mut conditions = Conditions::default();
    judge(seen, deleting, &mut conditions);
    status.conditions = conditions.merge(&before.conditions, generation, now);
    status
}

fn learn(status: &mut VolumeStatus, volume: &v1::Volume, deleting: bool) {
    status.volume_id = Some(volume.volume_id.clone());
    let state = match volume.state() {
        _ if deleting => "Deleting",
        v1::VolumeState::Deleting => "Deleting",
        v1::VolumeState::Ready if !volume.attached_to.is_empty() => "Attached",
        v1::VolumeState::Ready => "Detached",
        v1::VolumeState::Creating | v1::VolumeState::Unspecified => "Creating",
    };
    status.state = Some(state.to_owned());
    status.health = Some(
        match volume.health() {
            v1::VolumeHealth::Healthy => "Healthy",
            v1::VolumeHealth::Degraded => "Degraded",
            v1::VolumeHealth::Unavailable => "Unavailable",
            v1::VolumeHealth::Unspecified => "Unknown",
        }
        .to_owned(),
    );
    let healthy = volume.replicas.iter().filter(|replica| replica.healthy && !is_learner(replica)).count();
    status.ready_replicas = Some(format!("{healthy}/{}", volume.replicas_wanted));
    status.replicas = volume.replicas.iter().map(replica).collect();
    status.size = Some(quantity::exact(volume.size_bytes));
    status.attachment = (!volume.attached_to.is_empty()).then(|| Attachment {
        node: volume.attached_to.clone(),
        epoch: i64::try_from(volume.epoch).unwrap_or(i64::MAX),
    });
}

fn is_learner(replica: &v1::ReplicaStatus) -> bool {
    replica.role() == v1::ReplicaRole::Learner
}

fn replica(replica: &v1::ReplicaStatus) -> VolumeReplica {
    let role = match replica.role() {
        v1::ReplicaRole::Leader => "Leader",
        v1::ReplicaRole::Follower => "Follower",
        v1::ReplicaRole::Candidate => "Candidate",
        v1::ReplicaRole::Learner => "Learner",
        v1::ReplicaRole::Unspecified => "Unknown",
    };
    let state = match replica.condition() {
        v1::ReplicaCondition::Unspecified => "Unknown",
        v1::ReplicaCondition::Healthy => "Healthy",
        v1::ReplicaCondition::Creating => "Creating",
        v1::ReplicaCondition::CatchingUp => "CatchingUp",
        v1::ReplicaCondition::Rebuilding => "Rebuilding",
        v1::ReplicaCondition::Learner => "Learner",
        v1::ReplicaCondition::Unreachable => "Unreachable",
        v1::ReplicaCondition::Stopped => "Stopped",
        v1::ReplicaCondition::Lost => "Lost",
    };
    VolumeReplica {
        node: replica.node_name.clone(),
        disk: replica.disk_id.clone(),
        role: role.to_owned(),
        state: state.to_owned(),
    }
}

fn kubernetes(object: &Volume, before: &VolumeStatus, pods: Option<Vec<String>>) -> Option<KubernetesUse> {
    let annotations = object.metadata.annotations.as_ref();
    let get = |key: &str| annotations.and_then(|annotations| annotations.get(key)).cloned();
    let known = before.kubernetes.clone().unwrap_or_default();
    let used = KubernetesUse {
        pv: get(ANNOTATION_PV),
        pvc: get(ANNOTATION_PVC),
        namespace: get(ANNOTATION_PVC_NAMESPACE),
        pods: pods.unwrap_or(known.pods),
    };
    (used != KubernetesUse::default()).then_some(used)
}

fn judge(seen: &Seen, deleting: bool, conditions: &mut Conditions) {
    if let Some((reason, message)) = &seen.unreachable {
        // Nothing was learnt about the volume: it may serve as well as before.
        conditions.unknown(condition::READY, reason, message.clone());
        if deleting {
            conditions.set(condition::DELETION_BLOCKED, true, reason, message.clone());
        }
        return conditions.set(condition::RECONCILING, true, reason, message.clone());
    }
    if let Some((code, message)) = &seen.refused {
        return conditions.stalled(&word(code), message.clone());
    }
    match &seen.step {
        Some(Step::Stuck { reason, message }) => return conditions.stalled(reason, message.clone()),
        Some(Step::Blocked { reason, message }) => {
            conditions.set(condition::DELETION_BLOCKED, true, reason, message.clone());
            return conditions.reconciling("DeletionBlocked", message.clone());
        }
        _ if deleting => return conditions.reconciling("Deleting", "its data is being deleted"),
        _ => {}
    }
    let Some(volume) = &seen.volume else {
        return conditions.reconciling("Creating", "its copies are being made");
    };
    let why = || {
        let of = |replica: &v1::ReplicaStatus| {
            let reason = replica.reason.as_ref()?;
            Some(format!("{}: {}", replica.node_name, reason.message))
        };
        let reasons: Vec<String> = volume.replicas.iter().filter_map(of).collect();
        let own = volume.reason.as_ref().map(|reason| reason.message.clone());
        own.into_iter().chain(reasons).collect::<Vec<_>>().join("; ")
    };
    if volume.replicas_wanted < 3 {
        let message =
            format!("{} copies tolerate the loss of none; three tolerate the loss of one", volume.replicas_wanted);
        conditions.set(condition::NO_REDUNDANCY, true, "TooFewReplicas", message);
    }
    if volume.state() == v1::VolumeState::Creating {
        return conditions.reconciling("Creating", or(why(), "its copies are being made"));
    }
    match volume.health() {
        v1::VolumeHealth::Healthy => conditions.ready("Healthy", "every copy is current"),
        v1::VolumeHealth::Degraded => {
            // It works: whoever waits for it to be ready need not wait for the last copy.
            conditions.ready("Degraded", or(why(), "a copy is missing or behind"));
            conditions.set(condition::DEGRADED, true, "Degraded", or(why(), "a copy is missing or behind"));
        }
        v1::VolumeHealth::Unavailable | v1::VolumeHealth::Unspecified => {
            conditions.reconciling("NoLeader", or(why(), "it has no leader: requests wait"));
        }
    }
}

fn or(text: String, otherwise: &str) -> String {
    if text.is_empty() { otherwise.to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::super::decide::tests::{found, object};
    use super::*;

    fn healthy() -> v1::Volume {
        let replica = |name: &str, role: v1::ReplicaRole| v1::ReplicaStatus {
            node_name: name.into(),
            role: role.into(),
            healthy: true,
            condition: v1::ReplicaCondition::Healthy.into(),
            ..v1::ReplicaStatus::default()
        };
        v1::Volume {
            health: v1::VolumeHealth::Healthy.into(),
            replicas: vec![
                replica("a", v1::ReplicaRole::Leader),
                replica("b", v1::ReplicaRole::Follower),
                replica("c", v1::ReplicaRole::Follower),
            ],
            ..found("id")
        }
    }

    fn of(object: &Volume, seen: &Seen) -> VolumeStatus {
        status(object, seen, Timestamp::from_second(100).unwrap())
    }

    fn condition<'a>(status: &'a VolumeStatus, kind: &str) -> Option<(&'a str, &'a str)> {
        let found = status.conditions.iter().find(|condition| condition.type_ == kind)?;
        Some((found.status.as_str(), found.reason.as_str()))
    }

    #[test]
    fn a_whole_volume_is_ready() {
        let seen = Seen { volume: Some(healthy()), step: Some(Step::Settled), ..Seen::default() };
        let status = of(&object(""), &seen);
        assert_eq!(status.ready_replicas.as_deref(), Some("3/3"));
        assert_eq!((status.state.as_deref(), status.health.as_deref()), (Some("Detached"), Some("Healthy")));
        assert_eq!(condition(&status, "Ready"), Some(("True", "Healthy")));
        assert_eq!(condition(&status, "Reconciling"), None);
        assert_eq!(status.observed_generation, Some(2));
    }

    #[test]
    fn a_degraded_volume_is_ready_and_says_which_copy() {
        let mut volume = healthy();
        volume.health = v1::VolumeHealth::Degraded.into();
        volume.attached_to = "worker-1".into();
        volume.epoch = 7;
        volume.replicas[2].healthy = false;
        volume.replicas[2].reason = Some(v1::Reason { message: "does not answer".into(), ..v1::Reason::default() });
        let status = of(&object(""), &Seen { volume: Some(volume), ..Seen::default() });
        assert_eq!(status.ready_replicas.as_deref(), Some("2/3"));
        assert_eq!(status.attachment, Some(Attachment { node: "worker-1".into(), epoch: 7 }));
        assert_eq!(condition(&status, "Ready"), Some(("True", "Degraded")));
        let degraded = status.conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap();
        assert!(degraded.message.contains("c: does not answer"));
    }

    #[test]
    fn a_refusal_is_stalled_with_its_code_and_keeps_its_first_time() {
        let seen = Seen { refused: Some(("NoPlacement".into(), "no room".into())), ..Seen::default() };
        let mut asked = object("");
        asked.status = Some(of(&asked, &seen));
        let status = status(&asked, &seen, Timestamp::from_second(200).unwrap());
        let error = status.last_error.as_ref().unwrap();
        assert_eq!((error.code.as_str(), error.time.0.as_second()), ("NoPlacement", 100));
        assert_eq!(condition(&status, "Stalled"), Some(("True", "NoPlacement")));
        assert_eq!(status, asked.status.clone().unwrap(), "nothing changed, so nothing is written");
    }

    #[test]
    fn while_nobody_answers_nothing_known_is_lost() {
        let mut asked = object("");
        asked.status = Some(of(&asked, &Seen { volume: Some(healthy()), ..Seen::default() }));
        let seen = Seen { unreachable: Some(("NoLeader", "silence".into())), ..Seen::default() };
        let status = of(&asked, &seen);
        assert_eq!(status.ready_replicas.as_deref(), Some("3/3"));
        assert_eq!(condition(&status, "Ready"), Some(("Unknown", "NoLeader")));
        assert_eq!(condition(&status, "Stalled"), None);
    }

    #[test]
    fn a_blocked_deletion_names_what_blocks_it() {
        let blocked = Step::Blocked { reason: "Attached", message: "worker-1 has it".into() };
        let seen = Seen { step: Some(blocked), volume: Some(healthy()), ..Seen::default() };
        let mut asked = object("");
        asked.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(1).unwrap()));
        let status = of(&asked, &seen);
        assert_eq!(status.state.as_deref(), Some("Deleting"));
        assert_eq!(condition(&status, "DeletionBlocked"), Some(("True", "Attached")));
        let silent = Seen { unreachable: Some(("ClusterNotReady", "it is not there".into())), ..Seen::default() };
        assert_eq!(condition(&of(&asked, &silent), "DeletionBlocked"), Some(("True", "ClusterNotReady")));
    }
}
