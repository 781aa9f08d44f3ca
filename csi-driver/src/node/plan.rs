//! What to do about a volume's device, from what the agent says and what kubelet wants. Pure.

use std::path::PathBuf;

use holdfast_agent::{FormattedState, VolumeState, VolumeStatus};

/// A device that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub device: PathBuf,
    pub formatted: FormattedState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Use(Served),
    /// Also where it is being attached: the command waits for that.
    Attach,
    /// What is there belongs to an epoch that is over, or cannot be served any more: it goes, by force, and a new
    /// device comes. No write of it can land: the cluster has granted a later epoch, or the agent has given it up.
    Replace {
        device: Option<PathBuf>,
    },
    Refuse(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("epoch {wanted} of the volume was granted to this node, and another attachment has taken the volume over")]
    Fenced { wanted: u64 },
    #[error("epoch {wanted} of the volume is over: this node has epoch {current} of it")]
    Stale { wanted: u64, current: u64 },
    #[error("the volume is being detached from this node")]
    Detaching,
}

/// `status`: what the agent says of the volume, where it knows it.
pub fn device(status: Option<&VolumeStatus>, wanted: u64) -> Step {
    let Some(status) = status else { return Step::Attach };
    match status.epoch {
        Some(current) if current > wanted => return Step::Refuse(Refusal::Stale { wanted, current }),
        Some(current) if current < wanted => return Step::Replace { device: status.device.clone() },
        // Without an epoch it was begun in another way, by hand: it is not what was granted.
        None => return Step::Replace { device: status.device.clone() },
        Some(_) => {}
    }
    match (status.state, &status.device, status.formatted) {
        (VolumeState::Attached, Some(device), Some(formatted)) => {
            Step::Use(Served { device: device.clone(), formatted })
        }
        // Served over NBD, by hand.
        (VolumeState::Attached, None, _) => Step::Replace { device: None },
        // What the volume carries is told when its session is open, a moment after a restart of the agent.
        (VolumeState::Attached, Some(_), None) | (VolumeState::Attaching | VolumeState::Refused, _, _) => Step::Attach,
        (VolumeState::Detaching, _, _) => Step::Refuse(Refusal::Detaching),
        (VolumeState::Fenced, _, _) => Step::Refuse(Refusal::Fenced { wanted }),
        (VolumeState::Failed, device, _) => Step::Replace { device: device.clone() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: VolumeState, epoch: Option<u64>) -> VolumeStatus {
        VolumeStatus {
            volume: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            state,
            reason: None,
            epoch,
            session: None,
            leader: None,
            term: 0,
            outstanding: 0,
            waiting_ms: 0,
            longest_gap_ms: 0,
            connections: 0,
            requests: 0,
            read_bytes: 0,
            written_bytes: 0,
            size_bytes: Some(1 << 30),
            nbd_socket: None,
            device: Some("/dev/loop7".into()),
            formatted: Some(FormattedState::None),
            nodes: vec![],
        }
    }

    #[test]
    fn a_device_is_used_only_in_the_epoch_that_was_granted() {
        let served = Served { device: "/dev/loop7".into(), formatted: FormattedState::None };
        let replace = Step::Replace { device: Some("/dev/loop7".into()) };
        assert_eq!(device(None, 4), Step::Attach);
        assert_eq!(device(Some(&status(VolumeState::Attached, Some(4))), 4), Step::Use(served));
        for state in [VolumeState::Attached, VolumeState::Fenced, VolumeState::Attaching, VolumeState::Failed] {
            assert_eq!(device(Some(&status(state, Some(3))), 4), replace, "{state:?}: an older epoch is over");
            let stale = Step::Refuse(Refusal::Stale { wanted: 4, current: 5 });
            assert_eq!(device(Some(&status(state, Some(5))), 4), stale, "{state:?}: a newer one is not given up");
        }
        assert_eq!(device(Some(&status(VolumeState::Attached, None)), 4), replace);
    }

    #[test]
    fn what_cannot_serve_is_waited_for_replaced_or_refused() {
        let of = |state| device(Some(&status(state, Some(4))), 4);
        assert_eq!(of(VolumeState::Attaching), Step::Attach);
        assert_eq!(of(VolumeState::Refused), Step::Attach);
        assert_eq!(of(VolumeState::Fenced), Step::Refuse(Refusal::Fenced { wanted: 4 }));
        assert_eq!(of(VolumeState::Detaching), Step::Refuse(Refusal::Detaching));
        assert_eq!(of(VolumeState::Failed), Step::Replace { device: Some("/dev/loop7".into()) });
        let mut unknown = status(VolumeState::Attached, Some(4));
        unknown.formatted = None;
        assert_eq!(device(Some(&unknown), 4), Step::Attach, "what it carries is not guessed");
    }
}
