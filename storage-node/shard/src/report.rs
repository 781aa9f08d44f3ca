//! What a shard tells of itself to people and programs.

use holdfast_consensus::ProgressState;
use holdfast_replica::{Replica, StateMachine};

use crate::admin::{ReplicaReport, ShardReport, VolumeReport};
use crate::shard::Shard;

impl Shard {
    pub(crate) fn report(&self) -> ShardReport {
        let superblock = self.core.store.superblock();
        let metadata = self.metadata.as_ref().map(|group| replica(&group.replica, group.serving(), group.stopped()));
        let volumes = self.volumes.values().map(|group| {
            let volume = &group.replica.machine().volume;
            VolumeReport {
                volume: volume.id(),
                replica: replica(&group.replica, group.serving(), group.stopped()),
                size_bytes: volume.geometry().size_bytes,
                epoch: volume.epoch(),
                holder: volume.attachment().map(|attachment| attachment.holder.to_string()),
            }
        });
        let peers = self.core.watched.iter();
        ShardReport {
            disk: superblock.disk,
            boot_epoch: superblock.boot_epoch,
            usage: self.core.store.usage(),
            metadata,
            catalogue_hash: self.metadata.as_ref().map(|group| group.catalogue().state_hash()),
            volumes: volumes.collect(),
            damaged: self.damaged.iter().map(|(group, reason)| (*group, reason.clone())).collect(),
            peers: peers
                .map(|node| (*node, self.core.connected.contains(node), self.core.pairs.is_suspected(*node)))
                .collect(),
        }
    }
}

fn replica<S: StateMachine>(replica: &Replica<S>, serving: bool, stopped: Option<&str>) -> ReplicaReport {
    let status = replica.status();
    let lagging = status.peers.iter().filter(|peer| peer.state == ProgressState::NeedsDelta);
    ReplicaReport {
        group: replica.group(),
        replica: replica.id(),
        standing: status.standing,
        term: status.term,
        leader: status.leader.and_then(|leader| replica.node_of(leader)),
        serving,
        last: status.last.index,
        flushed: status.flushed,
        committed: status.committed,
        applied: replica.applied().index,
        checkpointed: replica.checkpointed(),
        voters: replica.directory().len(),
        peers: status.peers.iter().map(|peer| (peer.replica, peer.flushed, peer.reachable)).collect(),
        lagging: lagging.map(|peer| peer.replica).collect(),
        stopped: stopped.map(str::to_owned),
    }
}
