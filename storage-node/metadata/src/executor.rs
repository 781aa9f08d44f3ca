//! What nodes have to be told, derived from the catalogue alone, and what their answers come to.
//!
//! Nothing is remembered here: an intent is due until the catalogue says that it is done. The leader sends what is due
//! to the nodes it can reach, again after a pause, and proposes the commands that [`on_reply`] returns.

use std::collections::BTreeSet;

use holdfast_id::{NodeId, ReplicaId, VolumeId};

use crate::catalogue::{Catalogue, Place, Volume, VolumeMember, VolumeState};
use crate::command::{
    Command, ReplicaReplaced, VolumeReplicaCreated, VolumeReplicaDeleted, VolumeReplicaRefused, VolumeResized,
};
use crate::intent::{
    Action, ChangeMembers, CreateMetadataReplica, CreateReplica, DeleteReplica, Intent, IntentReply, IntentResult,
    ResizeGroup,
};

/// Every intent that is due, volumes in the order of their ids, then tombstones in the order of replicas.
pub fn due(catalogue: &Catalogue) -> Vec<Intent> {
    let mut intents = Vec::new();
    for (id, volume) in catalogue.volumes() {
        replace_replica(catalogue, *id, &mut intents);
        match volume.state {
            VolumeState::Creating => create_replicas(catalogue, *id, volume, &mut intents),
            VolumeState::Ready if volume.is_resizing() => resize_group(catalogue, *id, volume, &mut intents),
            VolumeState::Ready | VolumeState::Deleting => {}
        }
    }
    replace_replica(catalogue, catalogue.metadata_id(), &mut intents);
    for (replica, tombstone) in catalogue.tombstones() {
        let group = catalogue.group(tombstone.volume);
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
    let due = |entry: &&VolumeMember| !entry.created && catalogue.counts(&Place::from(entry.member));
    for entry in volume.members.iter().filter(due) {
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

/// First the new replica, where one comes, then the change of the group's members: whoever leads it is told.
fn replace_replica(catalogue: &Catalogue, id: VolumeId, intents: &mut Vec<Intent>) {
    let Some(placement) = catalogue.placement(id) else { return };
    let Some(replacement) = placement.replacement else { return };
    let group = catalogue.group(id);
    let mut tell = |node, action| {
        intents.push(Intent { node, revision: catalogue.revision(), generation: placement.generation, action });
    };
    let Some(VolumeMember { member, .. }) = replacement.new.as_ref().filter(|new| !new.created) else {
        let voters: Vec<(ReplicaId, NodeId)> = placement.voters().into_iter().collect();
        // Also where a disk does not count any more: as long as it works, the leader may be there.
        let members = placement.members.iter().map(|place| place.node).chain(voters.iter().map(|(_, node)| *node));
        let nodes: BTreeSet<NodeId> = members.collect();
        for node in nodes {
            tell(node, Action::ChangeMembers(ChangeMembers { group, voters: voters.clone() }));
        }
        return;
    };
    let members = placement.members.iter().map(|place| (place.replica, place.node)).collect();
    let (replica, disk) = (member.replica, member.disk);
    let create = match catalogue.volumes().get(&id) {
        Some(volume) => Action::CreateReplica(CreateReplica {
            group,
            replica,
            disk,
            members,
            name: volume.name.clone(),
            size_bytes: volume.founding_bytes,
            logical_block_bytes: volume.spec.logical_block_bytes,
        }),
        None => {
            let founding = catalogue.founding().to_vec();
            Action::CreateMetadataReplica(CreateMetadataReplica { group, replica, disk, members, founding })
        }
    };
    tell(member.node, create);
}

/// The command that records an answer; `None` where it says nothing new or `from` has no say in it. The sender is
/// checked, because a confirmed deletion frees a replica's room and a confirmed creation opens the volume.
pub fn on_reply(catalogue: &Catalogue, from: NodeId, reply: &IntentReply) -> Option<Command> {
    match (&reply.action, &reply.result) {
        (_, IntentResult::Stale | IntentResult::NotLeader | IntentResult::UnderWay { .. }) => None,
        (Action::CreateReplica(CreateReplica { group, replica, .. }), result)
        | (Action::CreateMetadataReplica(CreateMetadataReplica { group, replica, .. }), result) => {
            let (volume, replica) = (group.volume, *replica);
            let member = catalogue.volumes().get(&volume).and_then(|found| found.member(replica));
            let coming = || catalogue.placement(volume)?.replacement?.new.as_ref();
            let entry = member.or_else(|| coming().filter(|new| new.member.replica == replica))?;
            if entry.member.node != from || entry.created || *group != catalogue.group(volume) {
                return None;
            }
            match result {
                IntentResult::Refused(obstacle) if entry.obstacle == Some(*obstacle) => None,
                IntentResult::Refused(obstacle) => {
                    Some(Command::VolumeReplicaRefused(VolumeReplicaRefused { volume, replica, obstacle: *obstacle }))
                }
                _ => Some(Command::VolumeReplicaCreated(VolumeReplicaCreated { volume, replica })),
            }
        }
        (Action::ChangeMembers(change), IntentResult::Done) => {
            let volume = change.group.volume;
            let placement = catalogue.placement(volume)?;
            let replica = placement.replacement?.replica()?;
            let voters = placement.voters();
            // Only the members that are wanted now count; an answer to an older wish is late.
            let awaited = voters.iter().map(|(replica, node)| (*replica, *node)).eq(change.voters.iter().copied());
            let member = voters.values().chain(placement.members.iter().map(|place| &place.node)).any(|n| *n == from);
            (awaited && member && change.group == catalogue.group(volume))
                .then_some(Command::ReplicaReplaced(ReplicaReplaced { volume, replica }))
        }
        (Action::DeleteReplica(delete), IntentResult::Done) => {
            let tombstone = catalogue.tombstones().get(&delete.replica)?;
            let volume = delete.group.volume;
            let ours = tombstone.node == from && delete.group == catalogue.group(tombstone.volume);
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
        (Action::DeleteReplica(_) | Action::ResizeGroup(_) | Action::ChangeMembers(_), IntentResult::Refused(_)) => {
            None
        }
    }
}
