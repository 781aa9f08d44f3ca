//! What the metadata plane tells this node to do, and what becomes of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_block::Geometry;
use holdfast_consensus::{Configuration, Member, Refusal, Role};
use holdfast_id::{GroupId, NodeId, ReplicaId};
use holdfast_metadata::catalogue::Obstacle;
use holdfast_metadata::intent::{
    Action, ChangeMembers, Control, CreateMetadataReplica, CreateReplica, DeleteReplica, Intent, IntentReply,
    IntentResult, ResizeGroup,
};
use holdfast_metadata::{Catalogue, catalogue};
use holdfast_replica::Change;
use holdfast_replica::replica::initial_state;
use holdfast_store::group::{GroupState, RecoveredGroup, StoreError};
use holdfast_volume::{Name, Volume, VolumeSpec};

use crate::admin::{AdminError, AdminReply};
use crate::shard::Shard;

/// Whom to tell when something is on the disk.
pub(crate) enum Asker {
    /// The metadata leader, on this node or another one.
    Intent {
        from: NodeId,
        intent: Intent,
    },
    Admin {
        token: u64,
    },
}

/// A group on its way to the disk.
pub(crate) struct Creation {
    pub(crate) replica: ReplicaId,
    pub(crate) state: GroupState,
    pub(crate) asker: Asker,
}

/// Orders under way on this node.
#[derive(Default)]
pub(crate) struct Orders {
    creating: BTreeMap<GroupId, Creation>,
    deleting: BTreeMap<(GroupId, ReplicaId), Asker>,
    /// By the token that comes back with the resize's fate.
    resizing: BTreeMap<u64, Asker>,
    /// The highest revision of the catalogue that an intent came from since this process started.
    revision: u64,
}

impl Shard {
    pub(crate) fn on_control(&mut self, from: NodeId, body: &Bytes) {
        match Control::decode(body) {
            Ok(Control::Intent(intent)) => self.on_intent(from, intent),
            Ok(Control::Reply(reply)) => {
                if let Some(metadata) = &mut self.metadata {
                    self.core.touched.insert(metadata.group());
                    metadata.on_reply(&mut self.core, from, &reply);
                }
            }
            // Another build's: it asks again, and its own log says that nobody understands it.
            Err(_) => {}
        }
    }

    /// What the metadata leader on this very node wants of it, and what has come of resizes.
    pub(crate) fn carry_out_own(&mut self) -> bool {
        let (own, resized) = (std::mem::take(&mut self.core.own_intents), std::mem::take(&mut self.core.resized));
        let any = !own.is_empty() || !resized.is_empty();
        for intent in own {
            self.on_intent(self.core.node, intent);
        }
        for (token, result) in resized {
            if let Some(Asker::Intent { from, intent }) = self.orders.resizing.remove(&token) {
                let result = if result.is_ok() { IntentResult::Done } else { IntentResult::NotLeader };
                self.answer(from, &intent, result);
            }
        }
        any
    }

    fn on_intent(&mut self, from: NodeId, intent: Intent) {
        if intent.node != self.core.node {
            return;
        }
        if intent.revision < self.orders.revision {
            return self.answer(from, &intent, IntentResult::Stale);
        }
        self.orders.revision = intent.revision;
        match intent.action.clone() {
            Action::CreateReplica(create) => self.on_create(from, intent, create),
            Action::DeleteReplica(delete) => self.on_delete(from, intent, &delete),
            Action::ResizeGroup(resize) => self.on_resize(from, intent, &resize),
            Action::CreateMetadataReplica(create) => self.on_create_metadata(from, intent, &create),
            Action::ChangeMembers(change) => self.on_change_members(from, intent, &change),
        }
    }

    fn on_create(&mut self, from: NodeId, intent: Intent, create: CreateReplica) {
        if create.disk != self.core.store.superblock().disk {
            return self.answer(from, &intent, IntentResult::Refused(Obstacle::DiskUnknown));
        }
        if let Some(volume) = self.volumes.get(&create.group) {
            let same = volume.replica.id() == create.replica;
            let result = if same { IntentResult::Done } else { IntentResult::Refused(Obstacle::Conflict) };
            return self.answer(from, &intent, result);
        }
        if self.orders.creating.contains_key(&create.group) {
            return; // Answered when it is on the disk.
        }
        let Some(machine) = new_volume(&create) else {
            return self.answer(from, &intent, IntentResult::Refused(Obstacle::Internal));
        };
        let state = first_state(&create.members, machine);
        match self.core.store.create_group(create.group, create.replica, state.clone()) {
            Ok(()) => {
                let creation = Creation { replica: create.replica, state, asker: Asker::Intent { from, intent } };
                self.orders.creating.insert(create.group, creation);
            }
            Err(error) => self.answer(from, &intent, IntentResult::Refused(obstacle(&error))),
        }
    }

    fn on_create_metadata(&mut self, from: NodeId, intent: Intent, create: &CreateMetadataReplica) {
        let superblock = self.core.store.superblock();
        let (disk, cluster) = (superblock.disk, superblock.cluster);
        if create.disk != disk || create.group != GroupId::metadata(cluster) {
            return self.answer(from, &intent, IntentResult::Refused(Obstacle::DiskUnknown));
        }
        if let Some(metadata) = &self.metadata {
            let same = metadata.replica.id() == create.replica;
            let result = if same { IntentResult::Done } else { IntentResult::Refused(Obstacle::Conflict) };
            return self.answer(from, &intent, result);
        }
        if self.orders.creating.contains_key(&create.group) {
            return; // Answered when it is on the disk.
        }
        let Ok(catalogue) = Catalogue::found(cluster, &create.founding) else {
            return self.answer(from, &intent, IntentResult::Refused(Obstacle::Internal));
        };
        let state = first_state(&create.members, Bytes::from(catalogue.encode_state()));
        match self.core.store.create_group(create.group, create.replica, state.clone()) {
            Ok(()) => {
                let creation = Creation { replica: create.replica, state, asker: Asker::Intent { from, intent } };
                self.orders.creating.insert(create.group, creation);
            }
            Err(error) => self.answer(from, &intent, IntentResult::Refused(obstacle(&error))),
        }
    }

    /// Only who leads the group can bring it further; it answers how far it is.
    fn on_change_members(&mut self, from: NodeId, intent: Intent, change: &ChangeMembers) {
        let voters = change.voters.iter().copied().collect();
        let context = &mut self.core.context();
        let changed = if let Some(volume) = self.volumes.get_mut(&change.group) {
            volume.replica.change_configuration(context, &voters)
        } else if let Some(metadata) = self.metadata.as_mut().filter(|metadata| metadata.group() == change.group) {
            metadata.replica.change_configuration(context, &voters)
        } else {
            return self.answer(from, &intent, IntentResult::NotLeader);
        };
        self.core.touched.insert(change.group);
        let result = match changed {
            Ok(Change::Done) => IntentResult::Done,
            Ok(Change::UnderWay) => IntentResult::UnderWay { behind: 0 },
            Ok(Change::CatchingUp { behind, .. }) => IntentResult::UnderWay { behind },
            Err(Refusal::NotLeader { .. } | Refusal::Transferring | Refusal::UnfitTarget) => IntentResult::NotLeader,
            Err(Refusal::NoLease | Refusal::Busy | Refusal::NoRoom | Refusal::ConfigurationPending) => {
                IntentResult::UnderWay { behind: 0 }
            }
            Err(Refusal::Configuration(_)) => IntentResult::Refused(Obstacle::Internal),
        };
        self.answer(from, &intent, result);
    }

    fn on_delete(&mut self, from: NodeId, intent: Intent, delete: &DeleteReplica) {
        if delete.disk != self.core.store.superblock().disk {
            // The disk that has it is not here; it may come back.
            return self.answer(from, &intent, IntentResult::Refused(Obstacle::DiskUnknown));
        }
        let here = match self.volumes.get(&delete.group) {
            Some(volume) => Some(volume.replica.id()),
            None => self.metadata.as_ref().filter(|m| m.group() == delete.group).map(|m| m.replica.id()),
        };
        match here {
            Some(replica) if replica == delete.replica => {}
            None if self.damaged.contains_key(&delete.group) => {}
            _ if self.orders.deleting.contains_key(&(delete.group, delete.replica)) => return,
            _ if self.orders.creating.contains_key(&delete.group) => return, // Asked again once it is there.
            _ => return self.answer(from, &intent, IntentResult::Done),
        }
        match self.core.store.delete_group(delete.group, delete.replica) {
            Ok(()) => {
                if let Some(mut volume) = self.volumes.remove(&delete.group) {
                    volume.on_deleted(&mut self.core);
                } else if let Some(mut metadata) = self.metadata.take_if(|m| m.group() == delete.group) {
                    metadata.on_deleted(&mut self.core);
                }
                self.damaged.remove(&delete.group);
                self.core.permits.forget(delete.group);
                self.core.due.insert(delete.group);
                self.orders.deleting.insert((delete.group, delete.replica), Asker::Intent { from, intent });
                self.refresh_peers();
            }
            // A checkpoint is under way: asked again in a second.
            Err(StoreError::Busy) => {}
            Err(StoreError::UnknownGroup) => self.answer(from, &intent, IntentResult::Done),
            Err(error) => self.answer(from, &intent, IntentResult::Refused(obstacle(&error))),
        }
    }

    fn on_resize(&mut self, from: NodeId, intent: Intent, resize: &ResizeGroup) {
        let Some(volume) = self.volumes.get_mut(&resize.group).filter(|volume| volume.serving()) else {
            return self.answer(from, &intent, IntentResult::NotLeader);
        };
        if volume.replica.machine().volume.geometry().size_bytes >= resize.size_bytes {
            return self.answer(from, &intent, IntentResult::Done);
        }
        let token = self.core.next_token();
        volume.propose_resize(&mut self.core, resize.size_bytes, token);
        self.core.touched.insert(resize.group);
        self.orders.resizing.insert(token, Asker::Intent { from, intent });
    }

    pub(crate) fn found(&mut self, token: u64, founders: &[catalogue::Founder]) {
        let group = GroupId::metadata(self.core.store.superblock().cluster);
        let own = founders.iter().find(|founder| founder.node == self.core.node);
        let Some(own) = own else { return self.fail(token, AdminError::NotAFounder) };
        if let Some(metadata) = &self.metadata {
            let same = metadata.replica.id() == own.replica;
            let reply = if same { AdminReply::Founded } else { AdminReply::Failed(AdminError::FoundedOtherwise) };
            self.core.effects.admin.push((token, reply));
            return;
        }
        let catalogue = match Catalogue::found(self.core.store.superblock().cluster, founders) {
            Ok(catalogue) => catalogue,
            Err(error) => return self.fail(token, AdminError::Founders(error)),
        };
        let members: Vec<(ReplicaId, NodeId)> =
            catalogue.metadata().members.iter().map(|place| (place.replica, place.node)).collect();
        let state = first_state(&members, Bytes::from(catalogue.encode_state()));
        match self.core.store.create_group(group, own.replica, state.clone()) {
            Ok(()) => {
                let creation = Creation { replica: own.replica, state, asker: Asker::Admin { token } };
                self.orders.creating.insert(group, creation);
            }
            Err(error) => self.fail(token, AdminError::Disk { reason: error.to_string() }),
        }
    }

    fn fail(&mut self, token: u64, error: AdminError) {
        self.core.effects.admin.push((token, AdminReply::Failed(error)));
    }

    pub(crate) fn on_group_created(&mut self, group: GroupId) {
        let Some(creation) = self.orders.creating.remove(&group) else { return };
        let recovered = RecoveredGroup {
            group,
            replica: creation.replica,
            checkpoint_index: 0,
            checkpoint: creation.state,
            committed_to: 0,
            installing: 0,
            hard_state: None,
            records: Vec::new(),
            damage: None,
        };
        let added = self.add_group(recovered);
        self.refresh_peers();
        match creation.asker {
            Asker::Intent { from, intent } => {
                let result = if added.is_ok() { IntentResult::Done } else { IntentResult::Refused(Obstacle::Internal) };
                self.answer(from, &intent, result);
            }
            Asker::Admin { token } => match added {
                Ok(()) => self.core.effects.admin.push((token, AdminReply::Founded)),
                Err(error) => self.fail(token, AdminError::Disk { reason: error.to_string() }),
            },
        }
    }

    pub(crate) fn on_group_deleted(&mut self, group: GroupId, replica: ReplicaId) {
        if let Some(Asker::Intent { from, intent }) = self.orders.deleting.remove(&(group, replica)) {
            self.answer(from, &intent, IntentResult::Done);
        }
    }

    fn answer(&mut self, to: NodeId, intent: &Intent, result: IntentResult) {
        let reply = IntentReply { generation: intent.generation, action: intent.action.clone(), result };
        if to != self.core.node {
            return self.core.send_control(to, Bytes::from(Control::Reply(reply).encode()));
        }
        if let Some(metadata) = &mut self.metadata {
            self.core.touched.insert(metadata.group());
            metadata.on_reply(&mut self.core, to, &reply);
        }
    }
}

fn new_volume(create: &CreateReplica) -> Option<Bytes> {
    let name = Name::new(create.name.as_str()).ok()?;
    let geometry = Geometry::new(create.size_bytes, create.logical_block_bytes)?;
    Some(Volume::new(VolumeSpec { id: create.group.volume, name, geometry }).encode_state())
}

/// What every replica of a group starts from; `members` are sorted by replica. One that is not among them may not vote
/// until the log, or a rebuild, has told it that it is.
fn first_state(members: &[(ReplicaId, NodeId)], machine: Bytes) -> GroupState {
    let voter = |(replica, node): &(ReplicaId, NodeId)| Member { replica: *replica, node: *node, role: Role::Voter };
    let voters = members.iter().map(voter).collect();
    let configuration = Configuration { members: voters, outgoing: Vec::new(), min_data: 1 };
    initial_state(configuration, machine)
}

fn obstacle(error: &StoreError) -> Obstacle {
    match error {
        StoreError::Full => Obstacle::NoSpace,
        StoreError::Failed => Obstacle::DiskFailed,
        StoreError::TooLarge { .. }
        | StoreError::UnknownGroup
        | StoreError::Busy
        | StoreError::Damaged
        | StoreError::Installing
        | StoreError::TooManySnapshots => Obstacle::Internal,
        StoreError::GroupExists => Obstacle::Conflict,
    }
}
