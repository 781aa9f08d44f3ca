//! How volumes are, in CSI's words. Pure, over the status of their objects.

use holdfast_crds::Volume;

use crate::csi::VolumeHealthErrorType;
use crate::csi::volume_health::VolumeHealthEntry;

/// What is wrong with a volume; empty where nothing is known to be.
pub fn of(volume: &Volume) -> Vec<VolumeHealthEntry> {
    let Some(status) = &volume.status else { return vec![] };
    let entry = |status: VolumeHealthErrorType, reason: &str, message: String| VolumeHealthEntry {
        status: status.into(),
        reason: reason.into(),
        message,
    };
    match status.health.as_deref() {
        Some("Degraded") => {
            let ready = status.ready_replicas.as_deref().unwrap_or("not all");
            let bad: Vec<String> = status
                .replicas
                .iter()
                .filter(|replica| replica.state != "Healthy")
                .map(|replica| format!("{} is {}", replica.node, replica.state))
                .collect();
            let message = format!("copies that are current: {ready}; {}", bad.join(", "));
            vec![entry(VolumeHealthErrorType::Degraded, "ReplicasMissing", message)]
        }
        Some("Unavailable") => {
            let message = "no quorum of its copies answers; requests wait until one does".to_owned();
            vec![entry(VolumeHealthErrorType::Inaccessible, "NoQuorum", message)]
        }
        _ => vec![],
    }
}
