//! What was found broken on disks: for programs, and from the nodes themselves.

use anyhow::Result;
use holdfast_api::v1;
use serde_json::{Value, json};

use crate::client::Cluster;

/// What the nodes that answer say of themselves, when nobody answers for all of them.
///
/// # Errors
/// `error`, where no node has anything to say.
pub async fn ask_each(cluster: &Cluster, error: anyhow::Error) -> Result<Vec<v1::Reason>> {
    let mut reasons = Vec::new();
    for api in cluster.api() {
        let Ok(mut client) = cluster.node(api).await else { continue };
        let Ok(answer) = client.status(v1::StatusRequest {}).await else { continue };
        reasons.extend(answer.into_inner().reasons);
    }
    if reasons.is_empty() {
        return Err(error);
    }
    reasons.push(v1::Reason {
        code: "NoMetadataLeader".into(),
        message: format!("{error:#}"),
        action: "start the nodes that do not run".into(),
        subject: String::new(),
    });
    Ok(reasons)
}

pub fn repair_json(repair: &v1::RepairStatus) -> Value {
    json!({
        "corruptSlots": repair.corrupt_slots,
        "repairedBlocks": repair.repaired_blocks,
        "pendingSlots": repair.pending_slots,
        "lostSlots": repair.lost_slots,
        "mismatches": repair.mismatches,
        "lastFrom": repair.last_from_node_id,
    })
}

pub fn disk_json(health: &v1::DiskHealth) -> Value {
    json!({
        "corruptBlocks": health.corrupt_blocks,
        "corruptPages": health.corrupt_pages,
        "corruptHeaders": health.corrupt_headers,
        "readErrors": health.read_errors,
        "repairedBlocks": health.repaired_blocks,
        "logDamagedGroups": health.log_damaged_groups,
        "logFollowingGroups": health.log_following_groups,
        "scrubPasses": health.scrub_passes,
        "scrubRunning": health.scrub_running,
        "scrubBytes": health.scrub_bytes,
    })
}
