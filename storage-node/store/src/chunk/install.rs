//! Installing a delta: slots of another replica take the place of a group's own, each with its own index.
//!
//! Not here: what to fetch, and from whom. The caller compares maps with [`Chunks::changed_since`], hands in the slots
//! that differ, and ends with the sender's state.
//!
//! # Why every crash is survived
//!
//! Let P be the checkpoint before the install and S the sender's. Slots come in a layer of their own, written out by
//! any number of [`Chunks::commit_install`]; each is a checkpoint that keeps P's index, position and state, and sets
//! the mark `installing` in the header, because slots at P stand beside slots at S from then on. Installed slots always
//! go to fresh places, so that the map before a commit stays whole until the header after it is durable; there is
//! no intent, and nothing in doubt. [`Chunks::finish_install`] writes nothing but a header, and with it sets S and takes
//! the mark away; it refuses a map whose hash is not the sender's.
//!
//! A crash therefore leaves P as it was, or P with the mark and some slots newer, or S. With the mark nothing is
//! read or applied, before and after a restart; what came so far is found by the indices in the map, so an install that
//! goes on, of the same delta or of a later one, need not copy it again. While the mark stands, records above P stay
//! in the WAL as after any checkpoint at P.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::commit::{Commit, Job, Kind};
use crate::chunk::header::Header;
use crate::chunk::layout::{Named, Place, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::overlay::Layer;
use crate::chunk::page::{BLOCKS_MAX, INDEX_MAX, LEVEL_MAX, Leaf};
use crate::chunk::repair::RepairEvent;
use crate::chunk::space::state_slots;
use crate::chunk::{Chunks, check_state};
use crate::device::BLOCK_BYTES;
use crate::group::{GroupState, InstallError, InstalledSlot, StoreError};

/// First slot number no map can hold.
pub const SLOT_NUMBERS_MAX: u64 = BLOCKS_MAX / SLOT_BLOCKS;

impl Chunks {
    /// Takes a slot of a delta towards that index. It is in memory until [`Chunks::commit_install`]; the group is neither read nor applied
    /// to until [`Chunks::finish_install`]. `Busy` while something is applied above the last checkpoint; `Full` where
    /// the disk has no space for it: checkpoints of other groups may help. Promises to records up to `towards` end:
    /// they are not applied any more.
    ///
    /// # Panics
    /// Where the slot lies beyond every map, its index beyond `towards`, or data and checksums are not those of the
    /// present blocks.
    pub fn install(&mut self, group: GroupId, towards: u64, slot: InstalledSlot) -> Result<(), StoreError> {
        self.check_running()?;
        let present = slot.present.count_ones() as usize;
        assert!(slot.slot < SLOT_NUMBERS_MAX, "slot {} is beyond every map", slot.slot);
        assert!(slot.index <= towards && towards < INDEX_MAX, "index {} in a delta to {towards}", slot.index);
        assert!(
            slot.data.len() == present * BLOCK_BYTES && slot.checksums.len() == present,
            "its blocks are all there"
        );
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if found.damaged {
            return Err(StoreError::Damaged);
        }
        let layers = found.active.is_empty() && found.mended.is_empty();
        let settled = !found.committing && layers && found.applied == found.header.index;
        if !found.installing && !settled {
            return Err(StoreError::Busy);
        }
        let found = self.groups.get_mut(&group).expect("it was found above");
        found.installing = true;
        found.installing_to = found.installing_to.max(towards);
        self.settle_promises(group, towards);
        // What takes no slot draws on the reserve.
        let needed = SLOT_BLOCKS + u64::from(LEVEL_MAX) + 1;
        if present > 0 && self.available_blocks() < needed + self.reserve_blocks() {
            self.want_checkpoints();
            return Err(StoreError::Full);
        }
        let found = self.groups.get_mut(&group).expect("it was found above");
        let (blocks_before, bytes_before) = (found.active.blocks_needed(), found.active.bytes());
        found.active.install(slot);
        self.count_change(group, blocks_before, bytes_before);
        self.want_checkpoints();
        Ok(())
    }

    /// Makes every slot taken so far durable, with the mark; `CheckpointDone` at the index of the last checkpoint
    /// follows.
    ///
    /// # Panics
    /// Where no slot was ever taken.
    pub fn commit_install(&mut self, group: GroupId, wal_sequence: u64, hard_state: Bytes) -> Result<(), StoreError> {
        self.check_running()?;
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        assert!(found.installing, "{group} has taken no slot of a delta");
        let mut header = found.header.clone();
        header.installing = found.installing_to;
        header.wal_sequence = wal_sequence;
        header.hard_state = hard_state;
        let state = GroupState { hard_state: header.hard_state.clone(), position: Bytes::new(), state: Bytes::new() };
        check_state(&state)?;
        self.queue_checkpoint(group, header, VecDeque::new(), None)
    }

    /// Ends the install: the group is what the sender has at `index`, with `state` as of it; `CheckpointDone` follows.
    /// Every slot has to be committed before. Also for a delta without any slot. `snapshots`: those of the
    /// state. One at `index` itself is taken with it where it is not here; where there is one, older ones may be gone, for the
    /// log deletes them later. Otherwise all have to be here. What is here beside them goes.
    ///
    /// # Panics
    /// Where `index` is below the last checkpoint.
    pub fn finish_install(
        &mut self,
        group: GroupId,
        index: u64,
        wal_sequence: u64,
        state: GroupState,
        hash: u128,
        snapshots: &[u64],
    ) -> Result<(), InstallError> {
        self.check_running()?;
        check_state(&state)?;
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if found.damaged {
            return Err(StoreError::Damaged.into());
        }
        if found.committing || !found.active.is_empty() || found.applied != found.header.index {
            return Err(StoreError::Busy.into());
        }
        assert!(index >= found.header.index, "{group} is installed at {index}, behind {}", found.header.index);
        let Some(counts) = found.header.counts else {
            self.repair_events.push(RepairEvent::Unknown { group });
            return Err(InstallError::MapLost);
        };
        if counts.hash != hash && !holdfast_planted::is(holdfast_planted::Bug::InstallAnyMap) {
            return Err(InstallError::Hash { found: counts.hash, expected: hash });
        }
        let held: BTreeSet<u64> = found.snapshots_held().filter(|held| !found.doomed.contains_key(held)).collect();
        let wanted: BTreeSet<u64> = snapshots.iter().copied().collect();
        let missing: Vec<u64> = wanted.difference(&held).copied().filter(|missing| *missing != index).collect();
        let taken = wanted.contains(&index) && !held.contains(&index);
        if let Some(first) = missing.first().filter(|_| !wanted.contains(&index)) {
            return Err(InstallError::Snapshots { first: *first, count: missing.len() });
        }
        let snapshot = taken.then(|| (state.position.clone(), state.state.clone()));
        if snapshot.is_some() && state.state.len() > SLOT_BYTES {
            return Err(StoreError::TooLarge { what: "state with a snapshot", limit: SLOT_BYTES }.into());
        }
        let gone: Vec<u64> = held.difference(&wanted).copied().collect();
        let mut header = found.header.clone();
        let (home, jobs) = self.place_state(&state.state)?;
        header.index = index;
        header.installing = 0;
        header.wal_sequence = wal_sequence;
        header.hard_state = state.hard_state;
        header.position = state.position;
        header.state = home;
        let doomed = &mut self.groups.get_mut(&group).expect("it was found above").doomed;
        doomed.extend(gone.into_iter().map(|gone| (gone, index)));
        self.queue_checkpoint(group, header, jobs, snapshot)?;
        // Records up to here are not applied any more.
        self.settle_promises(group, index);
        Ok(())
    }

    /// Freezes the active layer and queues the checkpoint that writes it out.
    pub(super) fn queue_checkpoint(
        &mut self,
        group: GroupId,
        header: Header,
        jobs: VecDeque<Job>,
        snapshot: Option<(Bytes, Bytes)>,
    ) -> Result<(), StoreError> {
        let found = self.groups.get_mut(&group).ok_or(StoreError::UnknownGroup)?;
        if found.committing {
            return Err(StoreError::Busy);
        }
        let (applied, bytes) = (header.index, found.active.bytes());
        let layer = std::mem::take(&mut found.active);
        if let Err(refused) = self.queue_layer(group, header, jobs, layer, snapshot) {
            let (layer, error) = *refused;
            self.groups.get_mut(&group).expect("it was found above").active = layer;
            return Err(error);
        }
        let found = self.groups.get_mut(&group).expect("it was found above");
        found.applied = applied;
        if !found.wanted {
            self.unasked_bytes -= bytes;
        }
        self.advance();
        Ok(())
    }

    /// Queues the checkpoint that writes a layer out. Where there is no space for what it writes beside, the layer comes
    /// back, and what was taken for the state is free again.
    pub(super) fn queue_layer(
        &mut self,
        group: GroupId,
        header: Header,
        jobs: VecDeque<Job>,
        layer: Layer,
        snapshot: Option<(Bytes, Bytes)>,
    ) -> Result<(), Box<(Layer, StoreError)>> {
        let table = match self.place_table(group, header.index, snapshot.is_some()) {
            Ok(table) => table,
            Err(error) => {
                if header.state != self.groups[&group].header.state {
                    state_slots(&header.state).into_iter().for_each(|named| self.allocator.free(named));
                }
                return Err(Box::new((layer, error)));
            }
        };
        let barrier = self.next_read;
        let found = self.groups.get_mut(&group).expect("the caller has looked at it");
        found.committing = true;
        found.taking = snapshot.as_ref().map(|_| header.index);
        let heal = std::mem::take(&mut found.heal_header);
        let layer = Arc::new(self.with_mended(group, layer));
        self.groups.get_mut(&group).expect("it was found above").frozen = Some(layer);
        let mut commit = Commit::new(Kind::Checkpoint, header, jobs, barrier);
        commit.snapshot = snapshot;
        commit.table = table;
        if heal {
            commit.write_both_headers();
        }
        self.commits.push_back(commit);
        Ok(())
    }

    /// Puts an installed slot, the i-th of a leaf, in the place of whatever was there.
    pub(super) fn plan_installed(&mut self, commit: &mut Commit, leaf: &mut Leaf, i: usize, installed: &InstalledSlot) {
        let first = i * SLOT_BLOCKS as usize;
        leaf.checksums[first..first + SLOT_BLOCKS as usize].fill(0);
        let entry = &mut leaf.slots[i];
        if !entry.place.is_none() {
            commit.free(Named::Slot(entry.place), Some(entry.born));
            commit.count(|counts| counts.slots -= 1);
        }
        (entry.index, entry.present, entry.lost) = (installed.index, installed.present, 0);
        (entry.place, entry.born) = (Place::NONE, 0);
        if installed.present == 0 {
            return;
        }
        let Some(place) = self.allocator.take_slot() else { return self.fail_for_space() };
        (entry.place, entry.born) = (place, commit.header.era);
        commit.taken.push(Named::Slot(place));
        commit.count(|counts| counts.slots += 1);
        let blocks = (0..SLOT_BLOCKS).filter(|block| installed.present & (1 << block) != 0);
        for (n, block) in blocks.enumerate() {
            leaf.checksums[first + block as usize] = installed.checksums[n];
            // Neighbours are written together; see `submit`.
            let data = installed.data.slice(n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES);
            commit.jobs.push_back(Job { place: Place(place.0 + block), data });
        }
    }
}
