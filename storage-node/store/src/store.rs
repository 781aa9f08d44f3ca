//! The store of one disk as its owner sees it: the WAL and the chunks, and the order between them.
//!
//! At run time it is pure: calls and completions in, operations and events out; the same calls give the same
//! answers. Only `format`, `probe`, `open` and `close` block on the device.
//!
//! What it keeps: an append is accepted only with the space its application needs; a checkpoint names the last WAL
//! batch whose hard states it replaces; records leave the WAL only below a durable checkpoint; once either part has
//! failed, both have, and that is told once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId};
use holdfast_planted::Bug;

use crate::chunk::{
    ChangesAnswer, CheckpointedGroup, Chunks, Counters, Frozen, FrozenId, Kept, Limits, Place, RepairEvent, SlotCopy,
    SnapshotInfo,
};
use crate::device::Device;
use crate::group::{
    Append, AppendError, FormatError, GroupState, InstallError, InstalledSlot, Mutation, OpenError, RecoveredGroup,
    StoreError, StoreEvent, Usage,
};
use crate::ops::{DeviceError, DeviceOp, OpId, OpIds};
use crate::superblock::{FormatOptions, Superblock};
use crate::wal::{Extent, GroupBase, RecoveredLog, Wal};

/// What a disk answers who needs space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Now,
    /// Something is under way that may give some back.
    Later,
    /// Not before something is discarded or deleted.
    Never,
}

/// See the module.
pub struct Store {
    superblock: Superblock,
    wal: Wal,
    chunks: Chunks,
    /// Checkpoints under way, in their order: the index, and the last WAL batch whose hard states they replace.
    checkpoints: BTreeMap<GroupId, VecDeque<(u64, u64)>>,
    /// Groups that were told `CheckpointWanted` and have made no checkpoint since.
    wanted: BTreeSet<GroupId>,
    /// Slots of truncated records: free when the batch of this sequence, which truncates them, is durable.
    truncated: VecDeque<(u64, Vec<Place>)>,
    /// Slots that chunks hold for records no more: free when every payload write below this number has completed.
    orphans: VecDeque<(u64, Vec<Place>)>,
    idle_op: Option<DeviceOp>,
    events: Vec<StoreEvent>,
    failed: bool,
}

impl Store {
    /// Writes an empty store. Refuses a device that holds anything, or is too small.
    pub fn format(device: &dyn Device, options: &FormatOptions) -> Result<Superblock, FormatError> {
        let superblock = Superblock::lay_out(device.len()?, options)?;
        superblock.check_blank(device)?;
        Wal::format(device, &superblock)?;
        Chunks::format(device, superblock.chunks, options.groups_max)?;
        // Last: a format that was cut short leaves a disk that is not formatted.
        superblock.write(device)?;
        Ok(superblock)
    }

    /// What the disk says about itself; `None` where it is blank. Writes nothing.
    pub fn probe(device: &dyn Device) -> Result<Option<Superblock>, OpenError> {
        Superblock::read(device)
    }

    /// Raises the boot epoch durably, rebuilds every group's log, and makes its tail durable.
    pub fn open(device: &dyn Device) -> Result<(Store, Vec<RecoveredGroup>), OpenError> {
        Self::open_with(device, Limits::default())
    }

    /// As `open`, with bounds of memory that change nothing about what is read or written.
    pub fn open_with(device: &dyn Device, limits: Limits) -> Result<(Store, Vec<RecoveredGroup>), OpenError> {
        let mut superblock = Superblock::read(device)?.ok_or(OpenError::NotFormatted)?;
        superblock.check_writable()?;
        superblock.clean = false;
        superblock.boot_epoch += 1;
        superblock.generation += 1;
        superblock.write(device)?;

        let (mut chunks, checkpointed) = Chunks::open(device, superblock.chunks, OpIds::chunks(), limits)?;
        let bases: Vec<GroupBase> = checkpointed.iter().map(base_of).collect();
        let (wal, logs) = Wal::open(device, &superblock, &bases, &mut chunks)?;
        let mut groups = Vec::with_capacity(checkpointed.len());
        for (checkpointed, log) in checkpointed.into_iter().zip(logs) {
            let placed: BTreeMap<u64, &Vec<Extent>> =
                log.placed.iter().map(|(index, placed)| (*index, placed)).collect();
            for record in log.records.iter().filter(|record| record.index > checkpointed.index) {
                let placed = placed.get(&record.index).map_or(&[][..], |placed| placed);
                chunks.reserve_recovered(checkpointed.group, record, placed);
                chunks.hold(checkpointed.group, record.index, placed);
            }
            groups.push(recovered(checkpointed, log));
        }
        let store = Store {
            superblock,
            wal,
            chunks,
            checkpoints: BTreeMap::new(),
            wanted: BTreeSet::new(),
            truncated: VecDeque::new(),
            orphans: VecDeque::new(),
            idle_op: None,
            events: Vec::new(),
            failed: false,
        };
        Ok((store, groups))
    }

    /// Notes an orderly end. Whatever is not flushed is lost, as at a crash.
    pub fn close(mut self, device: &dyn Device) -> io::Result<()> {
        if !self.failed {
            self.superblock.clean = true;
            self.superblock.generation += 1;
            self.superblock.write(device)?;
        }
        Ok(())
    }

    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    pub fn usage(&self) -> Usage {
        Usage { wal_total: self.wal.bytes_total(), wal_used: self.wal.bytes_used(), ..self.chunks.usage() }
    }

    /// Index and hash of the group's last checkpoint; see [`Chunks::map_hash`].
    pub fn map_hash(&self, group: GroupId) -> Option<(u64, u128)> {
        self.chunks.map_hash(group)
    }

    /// What was found broken since open.
    pub fn counters(&self) -> Counters {
        self.chunks.counters()
    }

    /// Index of the last record appended, flushed or not; the next append continues it.
    pub fn last_appended(&self, group: GroupId) -> Option<u64> {
        self.wal.last_appended(group)
    }

    /// Call [`Store::on_idle`] once nothing was appended for a while, at most 100 ms.
    pub fn wants_idle(&self) -> bool {
        !self.failed && self.wal.wants_idle()
    }

    /// Nothing was appended for a while: notes durably how far the WAL is whole.
    pub fn on_idle(&mut self) {
        if let Some(op) = self.wal.on_idle() {
            assert!(self.idle_op.is_none(), "one WAL operation is in flight");
            self.idle_op = Some(op);
        }
    }

    /// # Panics
    /// Where `id` is not in flight.
    pub fn on_completion(&mut self, id: OpId, result: Result<Bytes, DeviceError>) {
        if id.is_wal() {
            self.wal.on_completion(id, result.map(|_| ()));
        } else {
            self.chunks.on_completion(id, result);
        }
        self.settle();
    }

    /// Index 0, no records; `GroupCreated` follows when it is durable, and then appends are taken.
    pub fn create_group(&mut self, group: GroupId, replica: ReplicaId, initial: GroupState) -> Result<(), StoreError> {
        self.chunks.create_group(group, replica, initial)?;
        self.settle();
        Ok(())
    }

    /// `GroupDeleted` follows when it is durable.
    pub fn delete_group(&mut self, group: GroupId, replica: ReplicaId) -> Result<(), StoreError> {
        self.chunks.delete_group(group, replica)?;
        self.settle();
        Ok(())
    }

    /// Whether an append that needs so many blocks would find them; see [`crate::chunk::blocks_for_payload`].
    pub fn room_for(&mut self, blocks: u64) -> Room {
        let room = if self.chunks.has_room(blocks) {
            Room::Now
        } else if self.chunks.may_get_room() {
            Room::Later
        } else {
            Room::Never
        };
        self.settle();
        room
    }

    /// `Flushed` follows when everything in it is durable.
    ///
    /// # Panics
    /// Where the records do not continue the group's log.
    pub fn append(&mut self, append: Append) -> Result<(), AppendError> {
        if self.failed {
            return Err(AppendError::Failed);
        }
        let group = append.group;
        let mut placed = Vec::with_capacity(append.records.len());
        let accepted = self.place(&append, &mut placed).and_then(|()| self.wal.append(&append, &placed));
        match (&accepted, append.truncate_from) {
            (Ok(sequence), Some(from)) => {
                // Records beyond the new end are gone, and their promises with them.
                let end = append.records.last().map_or(from, |record| record.index + 1);
                self.chunks.unreserve(group, end);
                let slots = self.chunks.truncate_payloads(group, from);
                if holdfast_planted::is(Bug::ReuseSlotUnderLog) {
                    self.chunks.free_slots(slots);
                } else if !slots.is_empty() {
                    self.truncated.push_back((*sequence, slots));
                }
            }
            // With a truncation the old records are still there, and may still need what was promised.
            (Err(_), None) => {
                if let Some(first) = append.records.first() {
                    self.chunks.unreserve(group, first.index);
                }
            }
            (Ok(_), None) | (Err(_), Some(_)) => {}
        }
        match &accepted {
            Ok(_) => {
                for (record, placed) in append.records.iter().zip(&placed) {
                    self.chunks.hold(group, record.index, placed);
                }
            }
            Err(_) => placed.iter().for_each(|placed| self.chunks.release(placed)),
        }
        self.settle();
        accepted.map(|_| ())
    }

    /// Committed and flushed here; reads see it at once. In the order of the log.
    pub fn apply(&mut self, group: GroupId, index: u64, mutations: Vec<Mutation>) {
        self.chunks.apply(group, index, mutations);
        self.settle();
    }

    /// `Read` with this token follows; tokens are the caller's.
    pub fn read(&mut self, group: GroupId, first_block: u64, count: u32, token: u64) {
        self.chunks.read(group, first_block, count, token);
        self.settle();
    }

    /// Makes everything applied durable in its place, with `state` as of `index`; `CheckpointDone` follows.
    ///
    /// # Panics
    /// Where entries above `index` were applied, or `index` is below the last checkpoint.
    pub fn checkpoint(&mut self, group: GroupId, index: u64, state: GroupState) -> Result<(), StoreError> {
        let wal_sequence = self.wal.checkpoint_sequence(group);
        self.chunks.checkpoint(group, index, wal_sequence, state)?;
        self.checkpoints.entry(group).or_default().push_back((index, wal_sequence));
        self.settle();
        Ok(())
    }

    /// Keeps the blocks as of `index`, with a checkpoint of its own; see [`Chunks::take_snapshot`].
    ///
    /// # Panics
    /// As [`Store::checkpoint`].
    pub fn take_snapshot(&mut self, group: GroupId, index: u64, state: GroupState) -> Result<(), StoreError> {
        let wal_sequence = self.wal.checkpoint_sequence(group);
        self.chunks.take_snapshot(group, index, wal_sequence, state)?;
        self.checkpoints.entry(group).or_default().push_back((index, wal_sequence));
        self.settle();
        Ok(())
    }

    /// The snapshot is gone as of the entry at `index`; see [`Chunks::delete_snapshot`].
    pub fn delete_snapshot(&mut self, group: GroupId, snapshot: u64, index: u64) {
        self.chunks.delete_snapshot(group, snapshot, index);
        self.settle();
    }

    /// Those on the disk, the oldest first.
    pub fn snapshots(&self, group: GroupId) -> Vec<SnapshotInfo> {
        self.chunks.snapshots(group)
    }

    /// Position and state that the snapshot was taken with.
    pub fn snapshot_state(&self, group: GroupId, snapshot: u64) -> Option<(Bytes, Bytes)> {
        self.chunks.snapshot_state(group, snapshot)
    }

    /// Takes a slot of another replica's map in the place of this one's; see [`Chunks::install`].
    pub fn install(&mut self, group: GroupId, towards: u64, slot: InstalledSlot) -> Result<(), StoreError> {
        self.chunks.install(group, towards, slot)?;
        self.settle();
        Ok(())
    }

    /// Makes the slots taken so far durable; `CheckpointDone` follows. `hard_state` is the newest.
    pub fn commit_install(&mut self, group: GroupId, hard_state: Bytes) -> Result<(), StoreError> {
        let wal_sequence = self.wal.checkpoint_sequence(group);
        self.chunks.commit_install(group, wal_sequence, hard_state)?;
        let index = self.chunks.checkpoint_index(group).expect("it takes slots");
        self.checkpoints.entry(group).or_default().push_back((index, wal_sequence));
        self.settle();
        Ok(())
    }

    /// The group becomes what the sender has at `index`, snapshots included, where the map's hash is the sender's; `CheckpointDone` follows.
    /// Records of the WAL up to `index` count no more from then on, those above it only if the caller says so at the
    /// next open: it truncates what does not follow.
    ///
    /// # Panics
    /// Where `index` is below the last checkpoint.
    pub fn finish_install(
        &mut self,
        group: GroupId,
        index: u64,
        state: GroupState,
        hash: u128,
        snapshots: &[u64],
    ) -> Result<(), InstallError> {
        let wal_sequence = self.wal.checkpoint_sequence(group);
        self.chunks.finish_install(group, index, wal_sequence, state, hash, snapshots)?;
        self.checkpoints.entry(group).or_default().push_back((index, wal_sequence));
        self.settle();
        Ok(())
    }

    /// Records up to `to` may leave the WAL, as far as the last checkpoint reaches.
    pub fn release(&mut self, group: GroupId, to: u64) {
        self.wal.release(group, to);
    }

    /// Tombstones of changes below `index` need not be kept: every configured replica has a checkpoint at or above.
    pub fn forget_tombstones(&mut self, group: GroupId, index: u64) {
        self.chunks.forget_tombstones(group, index);
    }

    /// Keeps the group's last checkpoint readable for a rebuild until [`Store::thaw`]; see [`Chunks::freeze`].
    pub fn freeze(&mut self, group: GroupId) -> Result<Frozen, StoreError> {
        self.chunks.freeze(group)
    }

    pub fn thaw(&mut self, group: GroupId, id: FrozenId) {
        self.chunks.thaw(group, id);
        self.settle();
    }

    /// Which slots of a kept map, or of the last checkpoint, changed above an index; [`Store::take_changes`] has the
    /// answer later.
    pub fn changed_since(&mut self, group: GroupId, kept: Option<Kept>, above: u64, from_slot: u64, token: u64) {
        self.chunks.changed_since(group, kept, above, from_slot, token);
        self.settle();
    }

    pub fn take_changes(&mut self) -> Vec<ChangesAnswer> {
        self.chunks.take_changes()
    }

    /// As [`Store::read`], of a kept map.
    pub fn read_kept(&mut self, group: GroupId, kept: Kept, first_block: u64, count: u32, token: u64) {
        self.chunks.read_kept(group, kept, first_block, count, token);
        self.settle();
    }

    /// Reads a slot for another replica; see [`Chunks::read_slot`].
    pub fn read_slot(&mut self, group: GroupId, slot: u64, applied: u64, token: u64) {
        self.chunks.read_slot(group, slot, applied, token);
        self.settle();
    }

    /// Takes what is corrupt here from another replica's copy; see [`Chunks::mend`].
    pub fn mend(&mut self, group: GroupId, slot: u64, copy: SlotCopy, applied: u64, token: u64) {
        self.chunks.mend(group, slot, copy, applied, token);
        self.settle();
    }

    /// Begins a scrub, or begins it again.
    pub fn scrub_from_start(&mut self) {
        self.chunks.scrub_from_start();
    }

    /// See [`Chunks::scrub_step`].
    pub fn scrub_step(&mut self) {
        self.chunks.scrub_step();
        self.settle();
    }

    pub fn take_repair_events(&mut self) -> Vec<RepairEvent> {
        self.chunks.take_repair_events()
    }

    /// Call after every batch of calls and completions: what gathered meanwhile becomes one batch of the WAL.
    pub fn take_ops(&mut self) -> Vec<DeviceOp> {
        if self.failed {
            return Vec::new();
        }
        let mut ops = self.chunks.take_ops();
        ops.extend(self.wal.take_payload_ops());
        ops.extend(self.idle_op.take());
        ops.extend(self.wal.take_ops());
        ops
    }

    pub fn take_events(&mut self) -> Vec<StoreEvent> {
        // Closing a batch, which `take_ops` does, may have asked for checkpoints.
        self.settle();
        std::mem::take(&mut self.events)
    }

    /// Reserves the space of every record, and finds the places of their payloads.
    fn place(&mut self, append: &Append, placed: &mut Vec<Vec<Extent>>) -> Result<(), AppendError> {
        for record in &append.records {
            let extents = self.chunks.place_record(append.group, record).map_err(|error| match error {
                StoreError::Full => AppendError::NoSpace,
                _ => AppendError::UnknownGroup,
            })?;
            placed.push(extents);
        }
        Ok(())
    }

    /// Carries what one part has to say to the other, and to the owner.
    fn settle(&mut self) {
        for event in self.chunks.take_events() {
            match &event {
                StoreEvent::GroupCreated { group, replica } => self.wal.add_group(*group, *replica),
                StoreEvent::GroupDeleted { group, .. } => {
                    self.wal.remove_group(*group);
                    self.checkpoints.remove(group);
                    self.wanted.remove(group);
                }
                StoreEvent::CheckpointDone { group, index } => self.on_checkpoint_done(*group, *index),
                _ => {}
            }
            self.tell(event);
        }
        for event in self.wal.take_events() {
            self.tell(event);
        }
        self.free_slots();
    }

    /// Gives back the slots of records that are gone, once nothing durable names them and nothing writes to them.
    fn free_slots(&mut self) {
        let orphans = self.chunks.take_orphans();
        if !orphans.is_empty() {
            self.orphans.push_back((self.wal.next_payload_write(), orphans));
        }
        let (wal, chunks) = (&self.wal, &mut self.chunks);
        while let Some((_, slots)) = self.truncated.pop_front_if(|(sequence, _)| *sequence <= wal.flushed_sequence()) {
            chunks.free_slots(slots);
        }
        while let Some((_, slots)) = self.orphans.pop_front_if(|(number, _)| wal.payloads_written_below(*number)) {
            chunks.free_slots(slots);
        }
    }

    fn on_checkpoint_done(&mut self, group: GroupId, index: u64) {
        let under_way = self.checkpoints.get_mut(&group).expect("a checkpoint is done once");
        let (started, wal_sequence) = under_way.pop_front().expect("a checkpoint is done once");
        if under_way.is_empty() {
            self.checkpoints.remove(&group);
        }
        assert_eq!(index, started, "checkpoints of a group are done in their order");
        self.wal.on_checkpoint(group, index, wal_sequence);
        self.wanted.remove(&group);
    }

    fn tell(&mut self, event: StoreEvent) {
        match &event {
            StoreEvent::Failed { .. } if self.failed => return,
            StoreEvent::Failed { reason } => {
                self.failed = true;
                self.wal.fail(reason);
                self.chunks.fail(reason.clone());
                // Reads that the failure ended are told before it.
                for event in self.chunks.take_events() {
                    if matches!(event, StoreEvent::Read { .. }) {
                        self.events.push(event);
                    }
                }
            }
            // The one under way may be enough; where it is not, both parts ask again.
            StoreEvent::CheckpointWanted { group } if self.checkpoints.contains_key(group) => return,
            StoreEvent::CheckpointWanted { group } if !self.wanted.insert(*group) => return,
            _ => {}
        }
        self.events.push(event);
    }
}

pub(crate) fn base_of(checkpointed: &CheckpointedGroup) -> GroupBase {
    GroupBase {
        group: checkpointed.group,
        replica: checkpointed.replica,
        index: checkpointed.index,
        wal_sequence: checkpointed.wal_sequence,
    }
}

fn recovered(checkpointed: CheckpointedGroup, log: RecoveredLog) -> RecoveredGroup {
    RecoveredGroup {
        group: checkpointed.group,
        replica: checkpointed.replica,
        checkpoint_index: checkpointed.index,
        checkpoint: checkpointed.state,
        committed_to: checkpointed.write_back_to,
        installing: checkpointed.installing,
        hard_state: log.hard_state,
        records: log.records,
        // Without its checkpoint the log is of no use, whether whole or not.
        damage: checkpointed.damage.or(log.damage),
    }
}

#[cfg(test)]
pub(crate) mod tests;
