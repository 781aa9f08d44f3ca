//! One command of the log, applied: looked at, refused or done, always the same on every replica.

use holdfast_id::{DiskId, NodeId, ReplicaId, VolumeId};

use crate::catalogue::{
    Catalogue, DISKS_MAX, Disk, DiskState, NODES_MAX, Node, NodeState, Place, VOLUMES_MAX, Volume, VolumeMember,
    VolumeState,
};
use crate::command::{
    Command, CreateVolume, DecodeError, DeleteVolume, RegisterDisk, RegisterNode, ResizeVolume, SetNodeState,
    UpdateDisk, VolumeReplicaCreated, VolumeReplicaDeleted, VolumeReplicaRefused, VolumeResized,
};
use crate::lint::{self, Finding};
use crate::spec::{Name, SpecError, check_address, check_labels, check_size, check_zone};

/// What a command did. A refusal is a result like the others: the log goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// It was so already.
    Unchanged,
    Refused(Refusal),
}

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("volume {volume} does not exist")]
    UnknownVolume { volume: VolumeId },
    #[error("node {node} is not part of the cluster")]
    UnknownNode { node: NodeId },
    #[error("disk {disk} is not part of the cluster")]
    UnknownDisk { disk: DiskId },
    #[error("replica {replica} does not belong to volume {volume}")]
    UnknownReplica { volume: VolumeId, replica: ReplicaId },
    #[error("the name {name} is taken; choose another, or delete what has it")]
    NameTaken { name: Name },
    #[error("volume {volume} exists as something else")]
    VolumeDiffers { volume: VolumeId },
    #[error("volume {name} is at generation {actual}, not {expected}: it has changed since; look again")]
    GenerationMismatch { name: Name, expected: u64, actual: u64 },
    #[error("volume {name} is being deleted")]
    Deleting { name: Name },
    #[error("volume {name} has {from} bytes and cannot shrink to {to}; create a smaller one and copy")]
    Shrink { name: Name, from: u64, to: u64 },
    #[error("the placement was planned at revision {planned_at}, before revision {forgotten_at}; plan again")]
    StalePlan { planned_at: u64, forgotten_at: u64 },
    #[error("node {node} was removed for good; join it with a new identity")]
    NodeRemoved { node: NodeId },
    #[error("disk {disk} failed, was removed or declared lost, for good; format it again to make it a new disk")]
    DiskRetired { disk: DiskId },
    #[error("disk {disk} belongs to node {node}; a disk does not move between nodes")]
    DiskMoved { disk: DiskId, node: NodeId },
    #[error("the cluster has {max} {what}, the most it can have")]
    Limit { what: &'static str, max: usize },
    #[error("the change is not safe: {}", join(.findings))]
    Unsafe { findings: Vec<Finding> },
}

impl Refusal {
    /// Stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::Spec(_) => "InvalidSpec",
            Refusal::UnknownVolume { .. } => "UnknownVolume",
            Refusal::UnknownNode { .. } => "UnknownNode",
            Refusal::UnknownDisk { .. } => "UnknownDisk",
            Refusal::UnknownReplica { .. } => "UnknownReplica",
            Refusal::NameTaken { .. } => "NameTaken",
            Refusal::VolumeDiffers { .. } => "VolumeDiffers",
            Refusal::GenerationMismatch { .. } => "GenerationMismatch",
            Refusal::Deleting { .. } => "Deleting",
            Refusal::Shrink { .. } => "CannotShrink",
            Refusal::StalePlan { .. } => "StalePlan",
            Refusal::NodeRemoved { .. } => "NodeRemoved",
            Refusal::DiskRetired { .. } => "DiskRetired",
            Refusal::DiskMoved { .. } => "DiskMoved",
            Refusal::Limit { .. } => "LimitReached",
            Refusal::Unsafe { findings } => findings.first().map_or("UnsafeChange", Finding::code),
        }
    }
}

fn join(findings: &[Finding]) -> String {
    findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("; ")
}

/// Why this replica applies nothing more. Operational for the first (an upgrade helps), a bug of the driver for the rest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("the command at index {index} stops this replica: {source}")]
    Decode { index: u64, source: DecodeError },
    #[error("index {index} was given to a catalogue that has applied {applied}")]
    OutOfOrder { index: u64, applied: u64 },
}

pub(crate) type Applied = Result<Outcome, Refusal>;

impl Catalogue {
    /// Applies the command at `index`. Indexes rise, and may leave out those that hold no command. An error changes
    /// nothing; after one of kind `Decode` every later call returns it again, so that no command is skipped.
    pub fn apply(&mut self, index: u64, bytes: &[u8]) -> Result<Outcome, ApplyError> {
        if let Some(stopped) = &self.stopped {
            return Err(stopped.clone());
        }
        if index <= self.applied {
            return Err(ApplyError::OutOfOrder { index, applied: self.applied });
        }
        let command = Command::decode(bytes).map_err(|source| {
            let error = ApplyError::Decode { index, source };
            self.stopped = Some(error.clone());
            error
        })?;
        self.applied = index;
        Ok(self.execute(index, command).unwrap_or_else(Outcome::Refused))
    }

    /// What `command` would come to now. For a leader that wants to refuse before it proposes.
    pub fn preview(&self, command: &Command) -> Outcome {
        let mut copy = self.clone();
        copy.execute(self.applied.saturating_add(1), command.clone()).unwrap_or_else(Outcome::Refused)
    }

    fn execute(&mut self, index: u64, command: Command) -> Applied {
        let safe =
            |catalogue: &Catalogue| lint::check(catalogue, &command).map_err(|findings| Refusal::Unsafe { findings });
        match &command {
            Command::RegisterNode(command) => self.register_node(command),
            Command::SetNodeState(command) => self.set_node_state(command, safe),
            Command::RegisterDisk(command) => self.register_disk(index, command),
            Command::UpdateDisk(command) => self.update_disk(index, command),
            Command::CreateVolume(command) => self.create_volume(command, safe),
            Command::VolumeReplicaCreated(command) => self.volume_replica_created(command),
            Command::VolumeReplicaRefused(command) => self.volume_replica_refused(command),
            Command::ResizeVolume(command) => self.resize_volume(command, safe),
            Command::VolumeResized(command) => self.volume_resized(command),
            Command::SetVolumeReplicas(command) => self.set_volume_replicas(command, safe),
            Command::DeleteVolume(command) => self.delete_volume(index, command),
            Command::VolumeReplicaDeleted(command) => self.volume_replica_deleted(index, command),
            Command::SetDiskState(command) => self.set_disk_state(index, command, safe),
            Command::ReplaceReplica(command) => self.replace_replica(command, safe),
            Command::ReplicaReplaced(command) => self.replica_replaced(command),
        }
    }

    fn register_node(&mut self, command: &RegisterNode) -> Applied {
        check_address(&command.peer_address)?;
        check_address(&command.api_address)?;
        command.zone.as_deref().map_or(Ok(()), check_zone)?;
        let known = self.nodes.get(&command.node);
        let state = known.map_or(NodeState::Active, |node| node.state);
        if state == NodeState::Removed {
            return Err(Refusal::NodeRemoved { node: command.node });
        }
        if self.node_named(command.name.as_str()).is_some_and(|(id, _)| id != command.node) {
            return Err(Refusal::NameTaken { name: command.name.clone() });
        }
        if known.is_none() && self.nodes.len() >= NODES_MAX {
            return Err(Refusal::Limit { what: "nodes", max: NODES_MAX });
        }
        let node = Node {
            name: command.name.clone(),
            peer_address: command.peer_address.clone(),
            api_address: command.api_address.clone(),
            zone: command.zone.clone(),
            state,
        };
        Ok(changed(self.nodes.insert(command.node, node.clone()).as_ref() != Some(&node)))
    }

    fn set_node_state(&mut self, command: &SetNodeState, safe: impl Fn(&Catalogue) -> Result<(), Refusal>) -> Applied {
        let unknown = Refusal::UnknownNode { node: command.node };
        let state = self.nodes.get(&command.node).ok_or(unknown)?.state;
        if state == command.state {
            return Ok(Outcome::Unchanged);
        }
        if state == NodeState::Removed {
            return Err(Refusal::NodeRemoved { node: command.node });
        }
        safe(self)?;
        self.nodes.get_mut(&command.node).expect("found above").state = command.state;
        Ok(Outcome::Applied)
    }

    fn register_disk(&mut self, index: u64, command: &RegisterDisk) -> Applied {
        match self.nodes.get(&command.node) {
            None => return Err(Refusal::UnknownNode { node: command.node }),
            Some(node) if node.state == NodeState::Removed => {
                return Err(Refusal::NodeRemoved { node: command.node });
            }
            Some(_) => {}
        }
        match self.disks.get(&command.disk) {
            Some(disk) if disk.node != command.node => Err(Refusal::DiskMoved { disk: command.disk, node: disk.node }),
            Some(disk) if disk.state.is_gone() => Err(Refusal::DiskRetired { disk: command.disk }),
            // Figures of a known disk change by `UpdateDisk`, and a join repeated late must not undo newer ones, nor
            // retire a disk that came after it.
            Some(_) => Ok(Outcome::Unchanged),
            None if self.disks.len() >= DISKS_MAX => Err(Refusal::Limit { what: "disks", max: DISKS_MAX }),
            None => {
                let disk = Disk {
                    node: command.node,
                    capacity_bytes: command.capacity_bytes,
                    free_bytes: command.capacity_bytes,
                    state: DiskState::Active,
                };
                self.disks.insert(command.disk, disk);
                for place in self.metadata.members.iter_mut().filter(|place| place.node == command.node) {
                    place.disk.get_or_insert(command.disk);
                }
                if command.only {
                    self.retire_former_disks(index, command.disk);
                }
                Ok(Outcome::Applied)
            }
        }
    }

    fn update_disk(&mut self, index: u64, command: &UpdateDisk) -> Applied {
        let disk = self.disks.get_mut(&command.disk).ok_or(Refusal::UnknownDisk { disk: command.disk })?;
        if disk.state.is_gone() && !command.failed {
            return Err(Refusal::DiskRetired { disk: command.disk });
        }
        let updated = Disk {
            node: disk.node,
            capacity_bytes: command.capacity_bytes,
            free_bytes: command.free_bytes.min(command.capacity_bytes),
            state: if command.failed { DiskState::Failed } else { disk.state },
        };
        let outcome = changed(*disk != updated);
        *disk = updated;
        if command.failed {
            self.bury_disk(index, command.disk);
        }
        Ok(outcome)
    }

    fn create_volume(&mut self, command: &CreateVolume, safe: impl Fn(&Catalogue) -> Result<(), Refusal>) -> Applied {
        command.spec.check()?;
        check_labels(&command.labels)?;
        let mut planned = command.members.clone();
        planned.sort();
        if let Some(volume) = self.volumes.get(&command.volume) {
            // A resize may have followed; only what was created under this id decides.
            let same = volume.name == command.name
                && volume.spec.replicas == command.spec.replicas
                && volume.spec.logical_block_bytes == command.spec.logical_block_bytes
                && volume.spec.spread == command.spec.spread
                && volume.state != VolumeState::Deleting
                && volume.members.iter().map(|member| member.member).eq(planned.iter().copied());
            return if same { Ok(Outcome::Unchanged) } else { Err(Refusal::VolumeDiffers { volume: command.volume }) };
        }
        if command.volume == self.metadata_id() {
            return Err(Refusal::VolumeDiffers { volume: command.volume });
        }
        if self.volume_named(command.name.as_str()).is_some() {
            return Err(Refusal::NameTaken { name: command.name.clone() });
        }
        if command.planned_at < self.forgotten_at {
            return Err(Refusal::StalePlan { planned_at: command.planned_at, forgotten_at: self.forgotten_at });
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(Refusal::Limit { what: "volumes", max: VOLUMES_MAX });
        }
        safe(self)?;
        let members = planned.into_iter().map(|member| VolumeMember { member, created: false, obstacle: None });
        let volume = Volume {
            name: command.name.clone(),
            spec: command.spec,
            labels: command.labels.clone(),
            provisioned_bytes: command.spec.size_bytes,
            founding_bytes: command.spec.size_bytes,
            replacement: None,
            members: members.collect(),
            state: VolumeState::Creating,
            generation: 1,
        };
        self.volumes.insert(command.volume, volume);
        Ok(Outcome::Applied)
    }

    fn volume_replica_created(&mut self, command: &VolumeReplicaCreated) -> Applied {
        if let Some(new) = self.coming_mut(command.volume, command.replica) {
            new.obstacle = None;
            return Ok(changed(!std::mem::replace(&mut new.created, true)));
        }
        let Some(volume) = self.known_member(command.volume, command.replica)? else { return Ok(Outcome::Unchanged) };
        let member = member_mut(volume, command.replica);
        if member.created {
            return Ok(Outcome::Unchanged);
        }
        member.created = true;
        member.obstacle = None;
        if volume.state == VolumeState::Creating && volume.members.iter().all(|member| member.created) {
            volume.state = VolumeState::Ready;
            volume.generation += 1;
        }
        Ok(Outcome::Applied)
    }

    fn volume_replica_refused(&mut self, command: &VolumeReplicaRefused) -> Applied {
        if let Some(new) = self.coming_mut(command.volume, command.replica).filter(|new| !new.created) {
            return Ok(changed(new.obstacle.replace(command.obstacle) != Some(command.obstacle)));
        }
        let Some(volume) = self.known_member(command.volume, command.replica)? else { return Ok(Outcome::Unchanged) };
        let member = member_mut(volume, command.replica);
        // A refusal that was overtaken by the success of a retry says nothing any more.
        if member.created || member.obstacle == Some(command.obstacle) {
            return Ok(Outcome::Unchanged);
        }
        member.obstacle = Some(command.obstacle);
        Ok(Outcome::Applied)
    }

    fn resize_volume(&mut self, command: &ResizeVolume, safe: impl Fn(&Catalogue) -> Result<(), Refusal>) -> Applied {
        check_size(command.size_bytes)?;
        let unknown = Refusal::UnknownVolume { volume: command.volume };
        let volume = self.volumes.get(&command.volume).ok_or(unknown)?;
        if volume.state == VolumeState::Deleting {
            return Err(Refusal::Deleting { name: volume.name.clone() });
        }
        if volume.spec.size_bytes == command.size_bytes {
            return Ok(Outcome::Unchanged);
        }
        check_generation(volume, command.expected_generation)?;
        if command.size_bytes < volume.spec.size_bytes {
            let (from, to) = (volume.spec.size_bytes, command.size_bytes);
            return Err(Refusal::Shrink { name: volume.name.clone(), from, to });
        }
        safe(self)?;
        let volume = self.volumes.get_mut(&command.volume).expect("found above");
        volume.spec.size_bytes = command.size_bytes;
        volume.generation += 1;
        Ok(Outcome::Applied)
    }

    fn volume_resized(&mut self, command: &VolumeResized) -> Applied {
        let unknown = Refusal::UnknownVolume { volume: command.volume };
        let volume = self.volumes.get_mut(&command.volume).ok_or(unknown)?;
        // Only the size that is waited for counts; an answer to an older resize is late.
        if !volume.is_resizing() || command.size_bytes != volume.spec.size_bytes {
            return Ok(Outcome::Unchanged);
        }
        volume.provisioned_bytes = command.size_bytes;
        volume.generation += 1;
        Ok(Outcome::Applied)
    }

    fn delete_volume(&mut self, index: u64, command: &DeleteVolume) -> Applied {
        // A volume that is not there is deleted already: a retry after the last replica's confirmation must not fail.
        let Some(volume) = self.volumes.get_mut(&command.volume) else { return Ok(Outcome::Unchanged) };
        if volume.state == VolumeState::Deleting {
            return Ok(Outcome::Unchanged);
        }
        check_generation(volume, command.expected_generation)?;
        volume.state = VolumeState::Deleting;
        volume.labels.clear();
        volume.generation += 1;
        let (size_bytes, generation) = (volume.spec.size_bytes, volume.generation);
        let coming = volume.replacement.take().and_then(|replacement| replacement.new);
        for entry in std::mem::take(&mut volume.members).into_iter().chain(coming) {
            self.bury(command.volume, Place::from(entry.member), size_bytes, generation);
        }
        self.forget_if_deleted(index, command.volume);
        Ok(Outcome::Applied)
    }

    fn volume_replica_deleted(&mut self, index: u64, command: &VolumeReplicaDeleted) -> Applied {
        match self.tombstones.get(&command.replica) {
            // Confirmed before, or never ordered: in either case nothing is to be done.
            None => return Ok(Outcome::Unchanged),
            Some(tombstone) if tombstone.volume != command.volume => {
                return Err(Refusal::UnknownReplica { volume: command.volume, replica: command.replica });
            }
            Some(_) => {}
        }
        self.tombstones.remove(&command.replica);
        self.forget_if_deleted(index, command.volume);
        Ok(Outcome::Applied)
    }

    /// The last tombstone takes its volume along, and frees the name.
    pub(crate) fn forget_if_deleted(&mut self, index: u64, volume: VolumeId) {
        let deleting = self.volumes.get(&volume).is_some_and(|volume| volume.state == VolumeState::Deleting);
        if deleting && self.tombstones.values().all(|tombstone| tombstone.volume != volume) {
            self.volumes.remove(&volume);
            self.forgotten_at = index;
        }
    }

    /// The volume of a member. `None` where the replica is being deleted, so that news of its creation is too late.
    fn known_member(&mut self, volume: VolumeId, replica: ReplicaId) -> Result<Option<&mut Volume>, Refusal> {
        let buried = self.tombstones.get(&replica).is_some_and(|tombstone| tombstone.volume == volume);
        let metadata = volume == self.metadata_id() && self.metadata.members.iter().any(|m| m.replica == replica);
        if buried || metadata {
            return Ok(None);
        }
        let found = self.volumes.get_mut(&volume).ok_or(Refusal::UnknownVolume { volume })?;
        if found.member(replica).is_none() {
            return Err(Refusal::UnknownReplica { volume, replica });
        }
        Ok(Some(found))
    }
}

fn changed(changed: bool) -> Outcome {
    if changed { Outcome::Applied } else { Outcome::Unchanged }
}

fn member_mut(volume: &mut Volume, replica: ReplicaId) -> &mut VolumeMember {
    volume.members.iter_mut().find(|member| member.member.replica == replica).expect("the caller looked it up")
}

pub(crate) fn check_generation(volume: &Volume, expected: Option<u64>) -> Result<(), Refusal> {
    match expected {
        Some(expected) if expected != volume.generation => {
            let name = volume.name.clone();
            Err(Refusal::GenerationMismatch { name, expected, actual: volume.generation })
        }
        _ => Ok(()),
    }
}
