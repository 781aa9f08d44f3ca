//! What was found broken on disks, in the words of the API, and the reasons that follow from it.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_api::v1;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_shard::{RepairReport, ShardReport};

use super::Services;

/// A node answers within this, or is shown without what only it knows.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const SLOT_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: u64 = 4 << 10;

pub(super) fn repair(report: &RepairReport) -> v1::RepairStatus {
    v1::RepairStatus {
        corrupt_slots: report.corrupt_slots,
        repaired_blocks: report.repaired_blocks,
        pending_slots: report.pending_slots,
        lost_slots: report.lost_slots.len() as u64,
        first_lost_slot: report.lost_slots.first().copied().unwrap_or(0),
        mismatches: report.mismatches,
        last_from_node_id: report.last.map(|last| last.from.to_string()).unwrap_or_default(),
        last_ago_ns: report.last.map_or(0, |last| nanos(last.ago)),
        last_offset: report.last.map_or(0, |last| last.first_block * BLOCK_BYTES),
    }
}

pub(super) fn disk(report: &ShardReport) -> v1::DiskHealth {
    let (counters, log, scrub) = (report.counters, &report.log_damage, report.scrub);
    v1::DiskHealth {
        corrupt_blocks: counters.corrupt_blocks,
        corrupt_pages: counters.corrupt_pages,
        corrupt_headers: counters.corrupt_headers,
        read_errors: counters.read_errors,
        repaired_blocks: counters.repaired_blocks,
        log_damaged_groups: log.groups,
        log_following_groups: log.following.len() as u64,
        log_whole_ago_ns: log.whole_ago.map_or(0, |ago| nanos(ago).max(1)),
        scrub_running: scrub.running,
        scrub_bytes: scrub.bytes,
        scrub_passes: scrub.passes,
        scrub_last_ago_ns: scrub.last.map_or(0, |(ago, ..)| nanos(ago).max(1)),
    }
}

/// What a person should know of a disk that works, most serious first.
pub(super) fn disk_reasons(disk: &str, health: &v1::DiskHealth) -> Vec<v1::Reason> {
    let reason = |code: &str, message: String, action: &str| v1::Reason {
        code: code.into(),
        message,
        action: action.into(),
        subject: format!("disk/{disk}"),
    };
    let mut reasons = Vec::new();
    let (damaged, following) = (health.log_damaged_groups, health.log_following_groups);
    if following > 0 {
        let message = format!(
            "the log was damaged at the start: {following} of {damaged} copies do not vote before they have followed an \
             elected leader"
        );
        reasons.push(reason("LogDamaged", message, "start the nodes with the other copies, where they do not run"));
    } else if damaged > 0 {
        let message = format!(
            "the log was damaged at the start: {damaged} copies followed their leaders and are whole again since {}",
            ago(health.log_whole_ago_ns)
        );
        reasons.push(reason("LogRepaired", message, WATCH));
    }
    let found = health.corrupt_blocks + health.corrupt_pages + health.corrupt_headers;
    if found > 0 {
        let message = format!(
            "{} corrupt blocks, {} corrupt map pages and {} corrupt headers were met since the start, {} blocks were \
             repaired from other copies",
            health.corrupt_blocks, health.corrupt_pages, health.corrupt_headers, health.repaired_blocks
        );
        reasons.push(reason("DiskCorrupt", message, WATCH));
    }
    reasons
}

const WATCH: &str = "nothing now; a disk that goes on like this is to be replaced";

/// What a person should know of a copy's blocks, most serious first.
pub(super) fn repair_reasons(
    volume: &str,
    node: &str,
    repair: &v1::RepairStatus,
    names: &BTreeMap<String, String>,
) -> Vec<v1::Reason> {
    let reason = |code: &str, message: String, action: &str| v1::Reason {
        code: code.into(),
        message,
        action: action.into(),
        subject: format!("volume/{volume}"),
    };
    let mut reasons = Vec::new();
    if repair.lost_slots > 0 {
        let message = format!(
            "no copy has all blocks of {} slots of 64 KiB, the first at byte {}: reads of the lost blocks fail",
            repair.lost_slots,
            repair.first_lost_slot * SLOT_BYTES
        );
        reasons.push(reason("BlocksLost", message, "restore them from a backup, or write them again"));
    }
    if repair.mismatches > 0 {
        let message = format!("{} answers of other copies contradicted the copy on {node}", repair.mismatches);
        reasons.push(reason("CopiesDiffer", message, "report it: copies of one log entry are never different"));
    }
    if repair.pending_slots > 0 {
        let message = format!("the copy on {node} asks other copies for {} corrupt slots", repair.pending_slots);
        reasons.push(reason("Repairing", message, ""));
    }
    if repair.repaired_blocks > 0 {
        let from = names.get(&repair.last_from_node_id).unwrap_or(&repair.last_from_node_id);
        let message = format!(
            "on {node}, {} slots were found corrupt and {} blocks repaired, the last ones from {from}, {}, at byte {}",
            repair.corrupt_slots,
            repair.repaired_blocks,
            ago(repair.last_ago_ns),
            repair.last_offset
        );
        reasons.push(reason("Repaired", message, WATCH));
    }
    reasons
}

impl Services {
    /// Asks every node that is connected what only it knows of its disks.
    pub(super) async fn ask_nodes(&self, nodes: &mut [v1::ClusterNode]) {
        let mut asked = Vec::new();
        for node in nodes.iter() {
            let (address, tls, connected) = (node.api_address.clone(), self.tls(), node.connected);
            asked.push(tokio::spawn(async move {
                if !connected {
                    return None;
                }
                let channel = holdfast_api::channel::connect(&address, &tls, ANSWER_WITHIN).await.ok()?;
                let mut client = NodeClient::new(channel);
                let answer = tokio::time::timeout(ANSWER_WITHIN, client.status(v1::StatusRequest {})).await;
                Some(answer.ok()?.ok()?.into_inner())
            }));
        }
        for (node, task) in nodes.iter_mut().zip(asked) {
            let Some(status) = task.await.ok().flatten() else { continue };
            node.reasons.extend(status.reasons);
            for disk in &mut node.disks {
                let found = status.disks.iter().find(|found| found.disk_id == disk.disk_id);
                disk.health = found.and_then(|found| found.health);
            }
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn ago(nanos: u64) -> String {
    match nanos / 1_000_000_000 {
        seconds @ 0..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3600),
    }
}
