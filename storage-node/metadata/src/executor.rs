//! What nodes have to be told, derived from the catalogue alone, and what their answers come to.
//!
//! Nothing is remembered here: an intent is due until the catalogue says that it is done. The leader sends what is due
//! to the nodes it can reach, again after a pause, and proposes the commands that [`on_reply`] returns.

use holdfast_id::{NodeId, ReplicaId, VolumeId};

use crate::catalogue::{Catalogue, Volume, VolumeState};
use crate::command::{Command, VolumeReplicaCreated, VolumeReplicaDeleted, VolumeReplicaRefused, VolumeResized};
use crate::intent::{Action, CreateReplica, DeleteReplica, Intent, IntentReply, IntentResult, ResizeGroup};

/// Every intent that is due, volumes in the order of their ids, then tombstones in the order of replicas.
pub fn due(catalogue: &Catalogue) -> Vec<Intent> {
    let mut intents = Vec::new();
    for (id, volume) in catalogue.volumes() {
        match volume.state {
            VolumeState::Creating => create_replicas(catalogue, *id, volume, &mut intents),
            VolumeState::Ready if volume.is_resizing() => resize_group(catalogue, *id, volume, &mut intents),
            VolumeState::Ready | VolumeState::Deleting => {}
        }
    }
    for (replica, tombstone) in catalogue.tombstones() {
        let group = Volume::group(tombstone.volume);
        intents.push(Intent {
            node: tombstone.node,
            revision: catalogue.revision(),
            generation: tombstone.generation,
            action: Action::DeleteReplica(DeleteReplica { group, replica: *replica, disk: tombstone.disk }),
        });
    }
    intents
}

fn create_replicas(catalogue: &Catalogue, id: VolumeId, volume: &Volume, intents: &mut Vec<Intent>) {
    let members: Vec<(ReplicaId, NodeId)> =
        volume.members.iter().map(|entry| (entry.member.replica, entry.member.node)).collect();
    for entry in volume.members.iter().filter(|entry| !entry.created) {
        let create = CreateReplica {
            group: Volume::group(id),
            replica: entry.member.replica,
            disk: entry.member.disk,
            members: members.clone(),
            name: volume.name.clone(),
            size_bytes: volume.spec.size_bytes,
            logical_block_bytes: volume.spec.logical_block_bytes,
        };
        intents.push(Intent {
            node: entry.member.node,
            revision: catalogue.revision(),
            generation: volume.generation,
            action: Action::CreateReplica(create),
        });
    }
}

fn resize_group(catalogue: &Catalogue, id: VolumeId, volume: &Volume, intents: &mut Vec<Intent>) {
    for entry in &volume.members {
        let resize = ResizeGroup { group: Volume::group(id), size_bytes: volume.spec.size_bytes };
        intents.push(Intent {
            node: entry.member.node,
            revision: catalogue.revision(),
            generation: volume.generation,
            action: Action::ResizeGroup(resize),
        });
    }
}

/// The command that records an answer; `None` where it says nothing new or `from` has no say in it. The sender is
/// checked, because a confirmed deletion frees a replica's room and a confirmed creation opens the volume.
pub fn on_reply(catalogue: &Catalogue, from: NodeId, reply: &IntentReply) -> Option<Command> {
    match (&reply.action, &reply.result) {
        (_, IntentResult::Stale | IntentResult::NotLeader) => None,
        (Action::CreateReplica(create), result) => {
            let volume = create.group.volume;
            let entry = catalogue.volumes().get(&volume)?.member(create.replica)?;
            if entry.member.node != from || entry.created || create.group != Volume::group(volume) {
                return None;
            }
            let replica = create.replica;
            match result {
                IntentResult::Refused(obstacle) if entry.obstacle == Some(*obstacle) => None,
                IntentResult::Refused(obstacle) => {
                    Some(Command::VolumeReplicaRefused(VolumeReplicaRefused { volume, replica, obstacle: *obstacle }))
                }
                _ => Some(Command::VolumeReplicaCreated(VolumeReplicaCreated { volume, replica })),
            }
        }
        (Action::DeleteReplica(delete), IntentResult::Done) => {
            let tombstone = catalogue.tombstones().get(&delete.replica)?;
            let volume = delete.group.volume;
            let ours = tombstone.node == from && delete.group == Volume::group(tombstone.volume);
            ours.then_some(Command::VolumeReplicaDeleted(VolumeReplicaDeleted { volume, replica: delete.replica }))
        }
        (Action::ResizeGroup(resize), IntentResult::Done) => {
            let id = resize.group.volume;
            let volume = catalogue.volumes().get(&id)?;
            let member = volume.members.iter().any(|entry| entry.member.node == from);
            let awaited = volume.is_resizing() && volume.spec.size_bytes == resize.size_bytes;
            (member && awaited && resize.group == Volume::group(id))
                .then_some(Command::VolumeResized(VolumeResized { volume: id, size_bytes: resize.size_bytes }))
        }
        // What stands in the way is in the node's log; the catalogue keeps waiting and says for whom.
        (Action::DeleteReplica(_) | Action::ResizeGroup(_), IntentResult::Refused(_)) => None,
    }
}
