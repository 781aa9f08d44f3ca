//! How volumes and the storage behind them are, seen from this machine. Pure.

use holdfast_agent::{VolumeState, VolumeStatus};

use super::agent::AgentError;
use super::record::Record;
use crate::csi::node_get_storage_health_response::StorageBackendHealth;
use crate::csi::volume_health::VolumeHealthEntry;
use crate::csi::{StorageHealthErrorType, VolumeHealthErrorType};
use crate::rpc;

/// A leader that was killed is followed within two seconds, as a rule; a request that waits much longer waits for more.
const WAITING_MS_MAX: u64 = 5_000;

pub fn of_volume(record: &Record, status: Option<&VolumeStatus>, read_only: bool) -> Vec<VolumeHealthEntry> {
    let mut entries = Vec::new();
    let mut add = |status: VolumeHealthErrorType, reason: &str, message: String| {
        entries.push(VolumeHealthEntry { status: status.into(), reason: reason.into(), message });
    };
    let inaccessible = VolumeHealthErrorType::Inaccessible;
    let Some(status) = status else {
        add(inaccessible, "NotAttached", "the attach agent does not serve it on this node".into());
        return entries;
    };
    let why = status.reason.clone().unwrap_or_default();
    match status.state {
        VolumeState::Fenced => add(inaccessible, "Fenced", format!("the device fails every request: {why}")),
        VolumeState::Refused => add(inaccessible, "Refused", why),
        VolumeState::Failed => add(inaccessible, "DeviceFailed", why),
        VolumeState::Attaching | VolumeState::Detaching => add(inaccessible, "NotServed", why),
        VolumeState::Attached if status.epoch.is_some_and(|epoch| epoch != record.epoch) => {
            let message = format!("it is served in another epoch than the {} it was staged in", record.epoch);
            add(inaccessible, "OtherEpoch", message);
        }
        VolumeState::Attached if status.waiting_ms > WAITING_MS_MAX => {
            let message = format!("a request has been waiting for {} s: {why}", status.waiting_ms / 1000);
            add(inaccessible, "NoQuorum", message);
        }
        VolumeState::Attached => {}
    }
    if read_only {
        let message = "the file system takes no writes after an error on it; the next pod gets it checked".into();
        add(VolumeHealthErrorType::Degraded, "FileSystemReadOnly", message);
    }
    let away: Vec<String> =
        status.nodes.iter().filter(|node| !node.connected).map(|node| node.address.to_string()).collect();
    if !away.is_empty() {
        let message = format!("no connection from here to {}", away.join(", "));
        add(VolumeHealthErrorType::Degraded, "ReplicaUnreachable", message);
    }
    entries
}

/// Of the agent and the storage nodes that its volumes need; a machine without volumes has no backend to be ill.
pub fn of_storage(volumes: Result<&[VolumeStatus], &AgentError>) -> Vec<StorageBackendHealth> {
    let entry = |status: StorageHealthErrorType, reason: &str, message: String| StorageBackendHealth {
        status: status.into(),
        reason: reason.into(),
        message,
        volume_capability: None,
    };
    let volumes = match volumes {
        Ok(volumes) => volumes,
        Err(error) => {
            return vec![entry(StorageHealthErrorType::StorageUnreachable, "AgentSilent", rpc::text(error))];
        }
    };
    let mut nodes: std::collections::BTreeMap<String, bool> = std::collections::BTreeMap::new();
    for node in volumes.iter().flat_map(|volume| &volume.nodes) {
        *nodes.entry(node.address.to_string()).or_default() |= node.connected;
    }
    let away: Vec<&str> = nodes.iter().filter(|(_, connected)| !**connected).map(|(node, _)| node.as_str()).collect();
    let message = format!("no connection from here to {}", away.join(", "));
    match away.len() {
        0 => vec![],
        all if all == nodes.len() => vec![entry(StorageHealthErrorType::StorageUnreachable, "NoNode", message)],
        _ => vec![entry(StorageHealthErrorType::StorageDegraded, "NodesUnreachable", message)],
    }
}

#[cfg(test)]
mod tests {
    use holdfast_agent::NodeStatus;

    use super::*;

    fn status(state: VolumeState, connected: [bool; 3]) -> VolumeStatus {
        let node = |(at, connected): (usize, bool)| NodeStatus {
            node: format!("00000000-0000-0000-0000-00000000000{at}").parse().unwrap(),
            address: format!("127.0.0.1:{at}").parse().unwrap(),
            connected,
            reason: None,
        };
        VolumeStatus {
            volume: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            state,
            reason: Some("why".into()),
            epoch: Some(4),
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
            size_bytes: None,
            nbd_socket: None,
            device: None,
            formatted: None,
            nodes: connected.into_iter().enumerate().map(|(at, c)| node((at + 1, c))).collect(),
        }
    }

    #[test]
    fn a_volume_is_well_where_it_is_served_in_its_epoch_and_every_node_is_connected() {
        let record = Record::new("00000000-0000-0000-0000-000000000001".parse().unwrap(), 4, "/s".into(), false);
        let of = |status: &VolumeStatus, read_only| {
            let entries = of_volume(&record, Some(status), read_only);
            entries.into_iter().map(|entry| entry.reason).collect::<Vec<_>>()
        };
        let well = status(VolumeState::Attached, [true; 3]);
        assert!(of(&well, false).is_empty());
        assert_eq!(of(&well, true), ["FileSystemReadOnly"]);
        assert_eq!(of(&status(VolumeState::Attached, [true, false, true]), false), ["ReplicaUnreachable"]);
        assert_eq!(of(&status(VolumeState::Fenced, [true; 3]), false), ["Fenced"]);
        assert_eq!(of(&VolumeStatus { epoch: Some(5), ..well.clone() }, false), ["OtherEpoch"]);
        assert_eq!(of(&VolumeStatus { waiting_ms: WAITING_MS_MAX + 1, ..well.clone() }, false), ["NoQuorum"]);
        assert_eq!(of_volume(&record, None, false)[0].reason, "NotAttached");
    }

    #[test]
    fn storage_is_unreachable_where_no_node_is_connected() {
        let of = |connected| {
            let volumes = [status(VolumeState::Attached, connected)];
            of_storage(Ok(&volumes)).into_iter().map(|entry| entry.status()).collect::<Vec<_>>()
        };
        assert!(of([true; 3]).is_empty());
        assert_eq!(of([true, false, true]), [StorageHealthErrorType::StorageDegraded]);
        assert_eq!(of([false; 3]), [StorageHealthErrorType::StorageUnreachable]);
        assert!(of_storage(Ok(&[])).is_empty());
        assert_eq!(of_storage(Err(&AgentError::Busy))[0].reason, "AgentSilent");
    }
}
