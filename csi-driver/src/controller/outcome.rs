//! What has become of a Volume object, as its status tells it. Pure.

use holdfast_crds::names::condition;
use holdfast_crds::{Volume, quantity};
use tonic::Code;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is there, and as large as asked.
    Done { bytes: u64 },
    /// The operator or the cluster is at it, or has not looked yet; why, in words.
    Waiting(String),
    /// It will not be before somebody does something.
    Refused { code: Code, message: String },
}

/// Whether the volume exists with the size that its spec asks for.
pub fn of(volume: &Volume) -> Outcome {
    let waiting = |text: &str| Outcome::Waiting(text.to_owned());
    if volume.metadata.deletion_timestamp.is_some() {
        return Outcome::Refused { code: Code::Aborted, message: "it is being deleted".into() };
    }
    let Some(status) = &volume.status else { return waiting("the operator has not looked at it yet") };
    let wanted = quantity::bytes(&volume.spec.size).unwrap_or(u64::MAX);
    let has = status.size.as_ref().and_then(|size| quantity::bytes(size).ok()).unwrap_or_default();
    let exists = matches!(status.state.as_deref(), Some("Detached" | "Attached"));
    if status.volume_id.is_some() && exists && has >= wanted {
        return Outcome::Done { bytes: has };
    }
    let current = match (status.observed_generation, volume.metadata.generation) {
        (Some(observed), Some(generation)) => observed >= generation,
        _ => false,
    };
    if !current {
        return waiting("the operator has not looked at the latest change yet");
    }
    let stalled = status.conditions.iter().find(|c| c.type_ == condition::STALLED && c.status == "True");
    let error = status.last_error.as_ref().map(|error| (error.code.as_str(), error.message.as_str()));
    let said = error.or(stalled.map(|condition| (condition.reason.as_str(), condition.message.as_str())));
    let Some((reason, message)) = said else { return waiting("the cluster makes its copies") };
    match (code_of(reason), stalled) {
        (Some(code), _) => Outcome::Refused { code, message: format!("{message} ({reason})") },
        (None, Some(_)) => Outcome::Refused { code: Code::Internal, message: format!("{message} ({reason})") },
        // Such as a metadata plane without a leader: it passes.
        (None, None) => waiting(message),
    }
}

/// The code of a refusal that time alone does not mend; `None` for the others.
fn code_of(reason: &str) -> Option<Code> {
    match reason {
        // The provisioner then asks the scheduler for another node, or waits for capacity.
        "NoPlacement" | "NoCapacity" | "NoSpace" | "TooFewNodes" | "LimitReached" => Some(Code::ResourceExhausted),
        "InvalidSpec" | "InvalidSize" | "InvalidArgument" | "CannotShrink" => Some(Code::InvalidArgument),
        "VolumeDiffers" | "NameTaken" | "AlreadyExists" | "AnotherVolume" => Some(Code::AlreadyExists),
        _ => None,
    }
}

/// Whether the object is of no use any more once its creation was refused so: nobody will ask for it under this name
/// with the same words again.
pub fn is_final(code: Code) -> bool {
    matches!(code, Code::ResourceExhausted | Code::InvalidArgument)
}

#[cfg(test)]
mod tests {
    use holdfast_crds::{LastError, VolumeSpec, VolumeStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn volume(status: VolumeStatus) -> Volume {
        let spec = VolumeSpec {
            cluster_ref: Default::default(),
            size: quantity::exact(1 << 30),
            replicas: None,
            logical_block_size: None,
            placement: Default::default(),
            qos: None,
            source: None,
        };
        let mut volume = Volume::new("v", spec);
        volume.metadata.generation = Some(2);
        volume.status = Some(status);
        volume
    }

    fn made(bytes: u64) -> VolumeStatus {
        VolumeStatus {
            observed_generation: Some(2),
            volume_id: Some("id".into()),
            state: Some("Detached".into()),
            size: Some(quantity::exact(bytes)),
            ..VolumeStatus::default()
        }
    }

    fn error(code: &str) -> Option<LastError> {
        let time = Time(Timestamp::UNIX_EPOCH);
        Some(LastError { code: code.into(), message: "why".into(), time })
    }

    #[test]
    fn a_volume_is_done_once_it_has_its_size() {
        assert_eq!(of(&volume(made(1 << 30))), Outcome::Done { bytes: 1 << 30 });
        assert!(matches!(of(&volume(made(1 << 29))), Outcome::Waiting(_)), "it grows");
        let creating = VolumeStatus { state: Some("Creating".into()), ..made(1 << 30) };
        assert!(matches!(of(&volume(creating)), Outcome::Waiting(_)));
        let mut unseen = volume(VolumeStatus::default());
        unseen.status = None;
        assert!(matches!(of(&unseen), Outcome::Waiting(_)));
    }

    #[test]
    fn refusals_of_the_current_generation_count_and_no_others() {
        let refused = |status: VolumeStatus| match of(&volume(status)) {
            Outcome::Refused { code, message } => {
                assert!(message.contains("why"), "{message}");
                Some(code)
            }
            _ => None,
        };
        let none = VolumeStatus { observed_generation: Some(2), ..VolumeStatus::default() };
        let with = |code: &str| VolumeStatus { last_error: error(code), ..none.clone() };
        assert_eq!(refused(with("NoPlacement")), Some(Code::ResourceExhausted));
        assert_eq!(refused(with("InvalidSpec")), Some(Code::InvalidArgument));
        assert_eq!(refused(with("NotLeader")), None, "another leader comes");
        assert_eq!(refused(VolumeStatus { observed_generation: Some(1), ..with("NoPlacement") }), None);
        let stalled = Condition {
            type_: "Stalled".into(),
            status: "True".into(),
            reason: "Strange".into(),
            message: "why".into(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        };
        let stalled = VolumeStatus { conditions: vec![stalled], ..none.clone() };
        assert_eq!(refused(stalled), Some(Code::Internal));
    }
}
