//! What the node tells scrapers: its disk, its copies and its rebuilds, as the data thread sees them at that moment.

use std::sync::Arc;
use std::time::Instant;

use holdfast_http::{Labels, Page, Source};
use holdfast_replica::rebuild::RebuildPhase;
use holdfast_shard::{ShardReport, VolumeReport};

use super::Services;
use crate::control::{DiskState, DiskView};

pub(crate) struct NodeSource(pub(crate) Arc<Services>);

impl Source for NodeSource {
    /// The data thread answers. What its disk or its peers lack, no restart would mend.
    async fn health(&self) -> Result<(), String> {
        self.0.disk().await.map(drop).map_err(|status| status.message().to_owned())
    }

    async fn metrics(&self) -> Page {
        let mut page = Page::new();
        let (disk, report) = (self.0.disk().await.ok(), self.0.report().await.ok());
        node(&mut page, &self.0.config.name, self.0.started, disk.as_ref());
        if let Some(report) = report {
            self::disk(&mut page, &report);
            copies(&mut page, &report.volumes);
            rebuilds(&mut page, &report.volumes);
            plane(&mut page, &report);
        }
        page
    }
}

fn one(value: f64) -> [(Labels, f64); 1] {
    [(Labels::new(), value)]
}

fn count(value: u64) -> [(Labels, u64); 1] {
    [(Labels::new(), value)]
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn node(page: &mut Page, name: &str, started: Instant, disk: Option<&DiskView>) {
    let build = vec![("node", name.to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    page.gauge("holdfast_node_build_info", "The node's name and version; always 1", [(build, 1.0)]);
    page.gauge("holdfast_node_uptime_seconds", "Since the process started", one(started.elapsed().as_secs_f64()));
    let formatted = matches!(disk.map(|disk| &disk.state), Some(DiskState::Formatted(_)));
    page.gauge("holdfast_disk_usable", "Whether the disk is formatted and in use", one(truth(formatted)));
    let failed = matches!(disk.map(|disk| &disk.state), Some(DiskState::Failed(_)));
    page.gauge("holdfast_disk_failed", "Whether the disk failed while it was in use", one(truth(failed)));
}

fn disk(page: &mut Page, report: &ShardReport) {
    let usage = report.usage;
    for (name, help, bytes) in [
        ("holdfast_disk_capacity_bytes", "Room for data", usage.data_total),
        ("holdfast_disk_used_bytes", "Room that holds data", usage.data_used),
        ("holdfast_disk_reserved_bytes", "Room promised to acknowledged writes", usage.data_reserved),
        ("holdfast_disk_wal_capacity_bytes", "Size of the write-ahead log", usage.wal_total),
        ("holdfast_disk_wal_used_bytes", "Part of the log that holds records still needed", usage.wal_used),
        ("holdfast_disk_scrub_bytes", "Read by the scrub under way, or the last one", report.scrub.bytes),
    ] {
        page.gauge(name, help, one(bytes as f64));
    }
    let (counters, log) = (report.counters, &report.log_damage);
    for (name, help, value) in [
        ("holdfast_disk_corrupt_blocks", "Blocks that did not match their checksums", counters.corrupt_blocks),
        ("holdfast_disk_corrupt_pages", "Pages of maps that did not", counters.corrupt_pages),
        ("holdfast_disk_corrupt_headers", "Headers and states of groups that did not", counters.corrupt_headers),
        ("holdfast_disk_read_errors", "Reads that the device failed", counters.read_errors),
        ("holdfast_disk_repaired_blocks", "Blocks taken from other copies", counters.repaired_blocks),
        ("holdfast_disk_scrubs", "Scrubs that ended", report.scrub.passes),
    ] {
        page.counter(name, help, count(value));
    }
    page.gauge("holdfast_disk_scrub_running", "Whether a scrub reads the disk", one(truth(report.scrub.running)));
    if let Some((ago, ..)) = report.scrub.last {
        page.gauge("holdfast_disk_scrub_age_seconds", "Since the last scrub ended", one(ago.as_secs_f64()));
    }
    let following = log.following.len() as f64;
    page.gauge("holdfast_disk_following_copies", "Copies without a vote after damage of the log", one(following));
    let damaged = report.damaged.len() as f64;
    page.gauge("holdfast_disk_damaged_copies", "Copies of which nothing usable is left", one(damaged));
}

/// One series for every copy of a volume on this node.
fn copies(page: &mut Page, volumes: &[VolumeReport]) {
    let each = |value: &dyn Fn(&VolumeReport) -> f64| -> Vec<(Labels, f64)> {
        volumes.iter().map(|volume| (of(volume), value(volume))).collect()
    };
    type Gauge = (&'static str, &'static str, fn(&VolumeReport) -> f64);
    let gauges: [Gauge; 12] = [
        ("holdfast_replica_leads", "Whether the copy leads its volume and serves", |v| truth(v.replica.serving)),
        ("holdfast_replica_votes", "Whether it is a voter that may vote", |v| {
            truth(v.replica.votes && v.replica.may_vote)
        }),
        ("holdfast_replica_has_leader", "Whether it knows who leads", |v| truth(v.replica.leader.is_some())),
        ("holdfast_replica_stopped", "Whether it serves no more", |v| truth(v.replica.stopped.is_some())),
        ("holdfast_replica_rebuilding", "Whether it is being rebuilt", |v| truth(v.replica.rebuilding)),
        ("holdfast_replica_unflushed_entries", "Log entries that are not durable here", |v| {
            v.replica.last.0.saturating_sub(v.replica.flushed.0) as f64
        }),
        ("holdfast_replica_unapplied_entries", "Committed log entries whose effect does not show here", |v| {
            v.replica.committed.0.saturating_sub(v.replica.applied.0) as f64
        }),
        ("holdfast_replica_unchecked_entries", "Applied log entries that no checkpoint holds", |v| {
            v.replica.applied.0.saturating_sub(v.replica.checkpointed.0) as f64
        }),
        ("holdfast_replica_lost_slots", "Parts of 64 KiB with blocks that no copy has", |v| {
            v.repair.lost_slots.len() as f64
        }),
        ("holdfast_replica_repairing_slots", "Parts of 64 KiB asked of other copies", |v| {
            v.repair.pending_slots as f64
        }),
        ("holdfast_replica_size_bytes", "Size of the volume as applied here", |v| v.size_bytes as f64),
        ("holdfast_replica_attached", "Whether the volume is attached, as applied here", |v| truth(v.holder.is_some())),
    ];
    for (name, help, value) in gauges {
        page.gauge(name, help, each(&value));
    }
    // Of followers, as only who leads knows them.
    let peers = volumes.iter().filter(|volume| volume.replica.serving).flat_map(|volume| {
        let last = volume.replica.last.0;
        volume.replica.peers.iter().map(move |(replica, flushed, reachable)| {
            let mut labels = of(volume);
            labels.push(("replica", replica.to_string()));
            (labels, last.saturating_sub(flushed.0), *reachable)
        })
    });
    let peers: Vec<(Labels, u64, bool)> = peers.collect();
    let lag = peers.iter().map(|(labels, lag, _)| (labels.clone(), *lag as f64));
    page.gauge("holdfast_follower_lag_entries", "Log entries that a follower has not flushed", lag);
    let reachable = peers.iter().map(|(labels, _, reachable)| (labels.clone(), truth(*reachable)));
    page.gauge("holdfast_follower_reachable", "Whether a follower answers its leader", reachable);
}

fn of(volume: &VolumeReport) -> Labels {
    vec![("volume", volume.volume.to_string())]
}

/// Those that this node serves, and the last one of each follower.
fn rebuilds(page: &mut Page, volumes: &[VolumeReport]) {
    let all = volumes.iter().flat_map(|volume| {
        volume.rebuilds.iter().map(move |(replica, progress)| {
            let mut labels = of(volume);
            labels.push(("replica", replica.to_string()));
            (labels, progress)
        })
    });
    let all: Vec<_> = all.collect();
    let running = all.iter().filter(|(_, progress)| progress.phase != RebuildPhase::Done).count();
    page.gauge("holdfast_rebuilds_running", "Rebuilds that this node serves", one(running as f64));
    let copied = all.iter().map(|(labels, progress)| (labels.clone(), progress.bytes_copied as f64));
    page.gauge("holdfast_rebuild_copied_bytes", "Sent by a rebuild, or the last one", copied);
    let listed = all.iter().map(|(labels, progress)| (labels.clone(), progress.bytes_listed as f64));
    page.gauge("holdfast_rebuild_listed_bytes", "Parts that a rebuild found to differ", listed);
}

fn plane(page: &mut Page, report: &ShardReport) {
    let peers = |wanted: fn(bool, bool) -> bool| {
        let found = report.peers.iter().filter(|(_, connected, suspected)| wanted(*connected, *suspected));
        one(found.count() as f64)
    };
    page.gauge("holdfast_node_peers", "Nodes that share copies with this one", peers(|_, _| true));
    let unreachable = peers(|connected, suspected| !connected || suspected);
    page.gauge("holdfast_node_peers_unreachable", "Of them, those that do not answer", unreachable);
    if let Some(metadata) = &report.metadata {
        page.gauge("holdfast_metadata_leads", "Whether it leads the metadata plane", one(truth(metadata.serving)));
        let applied = metadata.applied.0 as f64;
        page.gauge("holdfast_metadata_applied_entries", "Last entry of the metadata log applied here", one(applied));
        let stopped = truth(metadata.stopped.is_some());
        page.gauge("holdfast_metadata_stopped", "Whether its replica serves no more", one(stopped));
    }
}
