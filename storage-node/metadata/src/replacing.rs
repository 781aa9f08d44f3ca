//! The part of `apply` that takes disks and nodes out and puts replicas in the place of others.

use std::collections::BTreeSet;

use holdfast_id::{DiskId, ReplicaId, VolumeId};

use crate::apply::{Applied, Outcome, Refusal, check_generation};
use crate::catalogue::{
    Catalogue, DiskState, Member, Place, REPLACED_MAX, Replacement, Tombstone, VolumeMember, VolumeState,
};
use crate::command::{Command, ReplaceReplica, ReplicaReplaced, SetDiskState, SetVolumeReplicas};
use crate::lint;
use crate::spec::check_replicas;

impl Catalogue {
    pub(crate) fn set_disk_state(
        &mut self,
        index: u64,
        command: &SetDiskState,
        safe: impl Fn(&Catalogue) -> Result<(), Refusal>,
    ) -> Applied {
        let state = self.disks.get(&command.disk).ok_or(Refusal::UnknownDisk { disk: command.disk })?.state;
        if state == command.state {
            return Ok(Outcome::Unchanged);
        }
        if state.is_gone() {
            return Err(Refusal::DiskRetired { disk: command.disk });
        }
        safe(self)?;
        self.disks.get_mut(&command.disk).expect("found above").state = command.state;
        if command.state == DiskState::Failed {
            self.bury_disk(index, command.disk);
        }
        Ok(Outcome::Applied)
    }

    /// The node has come back with another disk. What cannot be given up waits for its disk to come back.
    pub(crate) fn retire_former_disks(&mut self, index: u64, disk: DiskId) {
        let node = self.disks[&disk].node;
        let former = self.disks.iter().filter(|(id, other)| {
            other.node == node && **id != disk && matches!(other.state, DiskState::Active | DiskState::Removing)
        });
        for former in former.map(|(id, _)| *id).collect::<Vec<_>>() {
            let lost = SetDiskState { disk: former, state: DiskState::Failed };
            let safe = lint::check(self, &Command::SetDiskState(lost)).is_ok();
            let state = if safe { DiskState::Failed } else { DiskState::Removing };
            self.disks.get_mut(&former).expect("listed above").state = state;
            if safe {
                self.bury_disk(index, former);
            }
        }
    }

    /// A disk is gone: what was to be deleted from it counts as deleted.
    pub(crate) fn bury_disk(&mut self, index: u64, disk: DiskId) {
        let buried = |tombstone: &Tombstone| tombstone.disk == disk;
        let volumes: BTreeSet<VolumeId> =
            self.tombstones.values().filter(|tombstone| buried(tombstone)).map(|found| found.volume).collect();
        self.tombstones.retain(|_, tombstone| !buried(tombstone));
        volumes.into_iter().for_each(|volume| self.forget_if_deleted(index, volume));
    }

    /// Orders the deletion of a replica, unless its disk is gone: nobody could confirm then, and nothing is left to use.
    pub(crate) fn bury(&mut self, volume: VolumeId, place: Place, size_bytes: u64, generation: u64) {
        let Some(disk) = place.disk.filter(|_| self.counts(&place)) else { return };
        let tombstone = Tombstone { volume, node: place.node, disk, size_bytes, generation };
        let fresh = self.tombstones.insert(place.replica, tombstone).is_none();
        assert!(fresh, "a replica is a member or a tombstone, never both");
    }

    pub(crate) fn replace_replica(
        &mut self,
        command: &ReplaceReplica,
        safe: impl Fn(&Catalogue) -> Result<(), Refusal>,
    ) -> Applied {
        let (volume, new) = (command.volume, command.new);
        let placement = self.placement(volume).ok_or(Refusal::UnknownVolume { volume })?;
        let known = |replica: ReplicaId| placement.members.iter().any(|place| place.replica == replica);
        let under_way = placement
            .replacement
            .is_some_and(|found| found.old == command.old && found.new.as_ref().map(|found| found.member) == new);
        if under_way || new.is_some_and(|new| known(new.replica)) || (new.is_none() && command.old.is_none()) {
            return Ok(Outcome::Unchanged);
        }
        if self.volumes.get(&volume).is_some_and(|found| found.state == VolumeState::Deleting) {
            return Err(Refusal::Deleting { name: self.volumes[&volume].name.clone() });
        }
        if let Some(replica) = command.old.filter(|old| !known(*old)) {
            return Err(Refusal::UnknownReplica { volume, replica });
        }
        if command.planned_at < self.forgotten_at {
            return Err(Refusal::StalePlan { planned_at: command.planned_at, forgotten_at: self.forgotten_at });
        }
        if self.replaced() >= REPLACED_MAX {
            return Err(Refusal::Limit { what: "replacements", max: REPLACED_MAX });
        }
        safe(self)?;
        // One that is under way is given up by this only where its disk is gone, so nothing is left to delete.
        let (replacement, generation) = self.replacement_mut(volume).expect("it has a placement");
        let new = new.map(|member| VolumeMember { member, created: false, obstacle: None });
        *replacement = Some(Replacement { old: command.old, new });
        *generation += 1;
        Ok(Outcome::Applied)
    }

    pub(crate) fn set_volume_replicas(
        &mut self,
        command: &SetVolumeReplicas,
        safe: impl Fn(&Catalogue) -> Result<(), Refusal>,
    ) -> Applied {
        check_replicas(command.replicas)?;
        let unknown = Refusal::UnknownVolume { volume: command.volume };
        let volume = self.volumes.get(&command.volume).ok_or(unknown)?;
        if volume.state == VolumeState::Deleting {
            return Err(Refusal::Deleting { name: volume.name.clone() });
        }
        if volume.spec.replicas == command.replicas {
            return Ok(Outcome::Unchanged);
        }
        check_generation(volume, command.expected_generation)?;
        safe(self)?;
        let volume = self.volumes.get_mut(&command.volume).expect("found above");
        volume.spec.replicas = command.replicas;
        volume.generation += 1;
        // Only one whose disk is gone can be under way here. If it is still wanted, it is planned again.
        volume.replacement.take_if(|found| found.old.is_none());
        Ok(Outcome::Applied)
    }

    pub(crate) fn replica_replaced(&mut self, command: &ReplicaReplaced) -> Applied {
        let volume = command.volume;
        let placement = self.placement(volume).ok_or(Refusal::UnknownVolume { volume })?;
        let replacement = placement.replacement.filter(|found| found.replica() == Some(command.replica)).cloned();
        let Some(Replacement { old, new }) = replacement else {
            let late = placement.members.iter().any(|place| place.replica == command.replica)
                || self.tombstones.contains_key(&command.replica);
            let unknown = Refusal::UnknownReplica { volume, replica: command.replica };
            return if late { Ok(Outcome::Unchanged) } else { Err(unknown) };
        };
        let size_bytes = placement.size_bytes;
        let leaves = placement.members.iter().find(|place| Some(place.replica) == old).copied();
        let (replacement, generation) = self.replacement_mut(volume).expect("it has a placement");
        *replacement = None;
        *generation += 1;
        let generation = *generation;
        self.swap_member(volume, old, new.map(|new| new.member));
        if let Some(leaves) = leaves {
            self.bury(volume, leaves, size_bytes, generation);
        }
        Ok(Outcome::Applied)
    }

    fn replaced(&self) -> usize {
        let lives = |volume| self.volumes.get(volume).is_none_or(|found| found.state != VolumeState::Deleting);
        let former = self.tombstones.values().filter(|tombstone| lives(&tombstone.volume)).count();
        former + self.volumes.values().filter(|found| found.replacement.is_some()).count()
    }

    fn swap_member(&mut self, volume: VolumeId, old: Option<ReplicaId>, new: Option<Member>) {
        match self.volumes.get_mut(&volume) {
            Some(found) => {
                found.members.retain(|entry| Some(entry.member.replica) != old);
                found.members.extend(new.map(|member| VolumeMember { member, created: true, obstacle: None }));
                found.members.sort_by_key(|entry| entry.member);
                if found.members.iter().all(|entry| entry.created) {
                    found.state = VolumeState::Ready;
                }
            }
            None => {
                self.metadata.members.retain(|place| Some(place.replica) != old);
                self.metadata.members.extend(new.map(Place::from));
                self.metadata.members.sort();
            }
        }
    }

    /// For plans of several moves: as if this one were done.
    pub(crate) fn assume_moved(&mut self, volume: VolumeId, old: Option<ReplicaId>, new: Member) {
        if let Some((replacement, _)) = self.replacement_mut(volume) {
            *replacement = None;
        }
        self.swap_member(volume, old, Some(new));
    }

    /// With the generation that rises with every change of it.
    fn replacement_mut(&mut self, volume: VolumeId) -> Option<(&mut Option<Replacement>, &mut u64)> {
        if volume == self.metadata_id() {
            return Some((&mut self.metadata.replacement, &mut self.metadata.generation));
        }
        self.volumes.get_mut(&volume).map(|found| (&mut found.replacement, &mut found.generation))
    }

    /// The replica on its way into the group, with this id.
    pub(crate) fn coming_mut(&mut self, volume: VolumeId, replica: ReplicaId) -> Option<&mut VolumeMember> {
        let (replacement, _) = self.replacement_mut(volume)?;
        replacement.as_mut().and_then(|found| found.new.as_mut()).filter(|new| new.member.replica == replica)
    }
}
