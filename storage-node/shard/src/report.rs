//! What a shard tells of itself to people and programs.

use bytes::Bytes;
use holdfast_consensus::{Configuration, LogIndex, ProgressState, Role};
use holdfast_id::{GroupId, ReplicaId, VolumeId};
use holdfast_replica::replica::RebuildCounters;
use holdfast_replica::{Replica, StateMachine};
use holdfast_store::chunk::SnapshotInfo;
use holdfast_volume::{Snapshot, Volume};

use crate::admin::{HeldSnapshot, ReplicaReport, ShardReport, SnapshotReport, VolumeReport};
use crate::shard::Shard;
use crate::volume_group::VolumeGroup;

impl Shard {
    /// Whether this node's replica of the group leads and serves.
    pub fn leads(&self, group: GroupId) -> bool {
        match self.volumes.get(&group) {
            Some(volume) => volume.serving(),
            None => self.metadata.as_ref().is_some_and(|metadata| metadata.group() == group && metadata.serving()),
        }
    }

    /// Whether the log of the group here has everything that this node told to be durable: false after damage, until
    /// the leader has filled it up.
    pub fn is_whole(&self, group: GroupId) -> bool {
        match self.volumes.get(&group) {
            Some(volume) => volume.replica.status().may_vote,
            None => self.metadata.as_ref().is_none_or(|metadata| metadata.replica.status().may_vote),
        }
    }

    /// Replicas of the group that need more than the log still has, where this node's leads.
    pub fn lagging(&self, group: GroupId) -> Vec<ReplicaId> {
        match self.volumes.get(&group) {
            Some(volume) => lagging(&volume.replica),
            None => self.metadata.as_ref().filter(|m| m.group() == group).map_or(Vec::new(), |m| lagging(&m.replica)),
        }
    }

    /// What the replicas here went through since they were opened.
    pub fn rebuild_counters(&self) -> RebuildCounters {
        let volumes = self.volumes.values().map(|volume| volume.replica.rebuild_counters());
        let metadata = self.metadata.iter().map(|metadata| metadata.replica.rebuild_counters());
        volumes.chain(metadata).fold(RebuildCounters::default(), |sum, of| RebuildCounters {
            installed: sum.installed + of.installed,
            snapshots: sum.snapshots + of.snapshots,
            given_up: sum.given_up + of.given_up,
            hash_mismatches: sum.hash_mismatches + of.hash_mismatches,
        })
    }

    /// The replica of the group here, how far it has applied the log, and the state that came of it: equal on all
    /// replicas at equal indexes.
    pub fn machine_state(&self, group: GroupId) -> Option<(ReplicaId, LogIndex, Bytes)> {
        fn of<S: StateMachine>(replica: &Replica<S>) -> (ReplicaId, LogIndex, Bytes) {
            (replica.id(), replica.applied().index, replica.machine().encode_state())
        }
        match self.volumes.get(&group) {
            Some(volume) => Some(of(&volume.replica)),
            None => self.metadata.as_ref().filter(|metadata| metadata.group() == group).map(|m| of(&m.replica)),
        }
    }

    /// Whether a group that this node leads is in the middle of a change of its members.
    pub fn leads_joint_change(&self) -> bool {
        let volumes = self.volumes.values();
        let mut volumes = volumes.filter(|group| group.serving()).map(|group| group.replica.configuration());
        let metadata = self.metadata.as_ref().filter(|group| group.serving());
        volumes.any(Configuration::is_joint) || metadata.is_some_and(|group| group.replica.configuration().is_joint())
    }

    /// Elections won here in the middle of such a change, since the start.
    pub fn elected_in_joint_change(&self) -> u64 {
        self.core.elected_in_joint_change
    }

    /// What this node itself knows, without asking anybody.
    pub fn report(&self) -> ShardReport {
        let superblock = self.core.store.superblock();
        let metadata = self.metadata.as_ref().map(|group| replica(&group.replica, group.serving(), group.stopped()));
        let peers = self.core.watched.iter();
        ShardReport {
            disk: superblock.disk,
            boot_epoch: superblock.boot_epoch,
            usage: self.core.store.usage(),
            metadata,
            catalogue_hash: self.metadata.as_ref().map(|group| group.catalogue().state_hash()),
            volumes: self.report_volumes(&[]),
            damaged: self.damaged.iter().map(|(group, reason)| (*group, reason.clone())).collect(),
            counters: self.core.store.counters(),
            log_damage: self.recovery.report(self.core.now),
            scrub: self.scrub.report(self.core.now),
            peers: peers
                .map(|node| (*node, self.core.connected.contains(node), self.core.pairs.is_suspected(*node)))
                .collect(),
        }
    }

    /// Of those that are here; of all where none is named.
    pub(crate) fn report_volumes(&self, wanted: &[VolumeId]) -> Vec<VolumeReport> {
        let report = |group: &VolumeGroup| {
            let volume = &group.replica.machine().volume;
            VolumeReport {
                volume: volume.id(),
                replica: replica(&group.replica, group.serving(), group.stopped()),
                size_bytes: volume.geometry().size_bytes,
                epoch: volume.epoch(),
                holder: volume.attachment().map(|attachment| attachment.holder.to_string()),
                lagging: lagging(&group.replica),
                repair: self.repairs.report(group.replica.group(), self.core.now),
                rebuilds: group.replica.rebuilds(),
                snapshots: snapshots(volume, &self.core.store.snapshots(group.replica.group())),
            }
        };
        if wanted.is_empty() {
            return self.volumes.values().map(report).collect();
        }
        wanted.iter().filter_map(|volume| self.volumes.get(&GroupId::first(*volume))).map(report).collect()
    }
}

fn snapshots(volume: &Volume, held: &[SnapshotInfo]) -> Vec<SnapshotReport> {
    let report = |snapshot: &Snapshot| {
        let held = held.iter().find(|held| held.index == snapshot.index);
        SnapshotReport {
            snapshot: snapshot.id,
            name: snapshot.name.to_string(),
            index: LogIndex(snapshot.index),
            size_bytes: snapshot.size_bytes,
            held: held.map(|held| HeldSnapshot { hash: held.hash, allocated_bytes: held.allocated_bytes }),
        }
    };
    volume.snapshots().iter().map(report).collect()
}

/// Peers whose next entry has left the leader's log, until they are past its base again.
fn lagging<S: StateMachine>(replica: &Replica<S>) -> Vec<ReplicaId> {
    let peers = replica.status().peers.into_iter();
    peers.filter(|peer| peer.state == ProgressState::NeedsDelta).map(|peer| peer.replica).collect()
}

fn replica<S: StateMachine>(replica: &Replica<S>, serving: bool, stopped: Option<&str>) -> ReplicaReport {
    let status = replica.status();
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
        rebuilding: replica.installing(),
        voters: voters(replica),
        votes: replica.configuration().is_voter(replica.id()),
        members: replica.configuration().members.clone(),
        outgoing: replica.configuration().outgoing.clone(),
        may_vote: status.may_vote,
        peers: status.peers.iter().map(|peer| (peer.replica, peer.flushed, peer.reachable)).collect(),
        stopped: stopped.map(str::to_owned),
    }
}

fn voters<S: StateMachine>(replica: &Replica<S>) -> usize {
    replica.configuration().members.iter().filter(|member| member.role == Role::Voter).count()
}
