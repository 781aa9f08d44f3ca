//! Who has been promised how much of the disk, so that applying a committed entry never fails for space.
//!
//! Counted in blocks. Free are the free slots; promised are, for each appended entry that is not applied, an upper
//! bound from its payload's length alone, and for each layer of the overlay an upper bound from what it touches. Both
//! take every touched slot for a new one, whether the map has a place for it or not: the map may not be in memory, and
//! a frozen map makes it true. So a nearly full disk refuses appends a little early, and asks for checkpoints first.
//!
//! What layers share of the promises to their entries is no longer known after a restart, when all of them are made
//! again; and the group may need to append a little more before it knows what was committed. So the promises to applied
//! entries count until a checkpoint passes those, and one is asked for before they take half of what is free.

use std::collections::VecDeque;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::Chunks;
use crate::chunk::commit::Job;
use crate::chunk::header::{INLINE_STATE_BYTES_MAX, StateHome};
use crate::chunk::layout::{Named, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::page::{LEAF_BLOCKS, LEVEL_MAX};
use crate::device::BLOCK_BYTES;
use crate::group::{StoreError, StoreEvent, Usage};

/// Share of the slots that only entries without a payload and checkpoints may use.
const RESERVE_SHARE: u64 = 64;
const RESERVE_SLOTS_MIN: u64 = 4;
/// 256 MiB: the pages that writing back a whole overlay of scattered blocks takes at most.
const RESERVE_SLOTS_MAX: u64 = 4096;

/// The promise an entry needs: with a payload of n blocks at an unknown place, the slots and leaves it may touch and
/// the pages above them. An entry without payload draws on the reserve.
pub const fn blocks_for_payload(blocks: u64) -> u64 {
    if blocks == 0 {
        return 0;
    }
    let slots = (blocks - 1).div_ceil(SLOT_BLOCKS) + 1;
    slots * SLOT_BLOCKS + leaf_blocks_for_payload(blocks)
}

/// Of that the part of the map.
pub const fn leaf_blocks_for_payload(blocks: u64) -> u64 {
    let leaves = (blocks - 1).div_ceil(LEAF_BLOCKS) + 1;
    leaves * (LEVEL_MAX as u64 + 1)
}

impl Chunks {
    pub fn usage(&self) -> Usage {
        let total = self.layout.slots;
        Usage {
            data_total: total * SLOT_BYTES as u64,
            data_used: (total - self.allocator.free_slots()) * SLOT_BYTES as u64,
            data_reserved: self.reserved_blocks * BLOCK_BYTES as u64,
            ..Usage::default()
        }
    }

    /// [`Chunks::reserve_blocks_for`] of a payload that stays in the log.
    #[cfg(test)]
    pub fn reserve(&mut self, group: GroupId, index: u64, payload_blocks: u64) -> Result<(), StoreError> {
        self.reserve_blocks_for(group, index, 0, blocks_for_payload(payload_blocks))
    }

    /// Promises the entry the space it needs, before its append is accepted: `slots` are taken at once and `promised`
    /// blocks later. The promise ends when it is applied, or with [`Chunks::unreserve`]. Refused with `Full`; a
    /// checkpoint is asked for where that would help.
    pub(super) fn reserve_blocks_for(
        &mut self,
        group: GroupId,
        index: u64,
        slots: u64,
        promised: u64,
    ) -> Result<(), StoreError> {
        let needed = slots * SLOT_BLOCKS + promised;
        if needed > 0 && !self.has_room(needed) {
            return Err(StoreError::Full);
        }
        self.promise(group, index, promised)
    }

    /// Whether so many blocks could be promised now; a checkpoint is asked for where they cannot, and that would help.
    pub fn has_room(&mut self, blocks: u64) -> bool {
        let has_room = self.available_blocks() >= blocks + self.reserve_blocks();
        if !has_room {
            self.want_checkpoints();
        }
        has_room
    }

    /// Whether something is under way that may give room back.
    pub fn may_get_room(&self) -> bool {
        self.reserved_blocks > 0
            || self.commit.is_some()
            || !self.commits.is_empty()
            || !self.frees.is_empty()
            || !self.drops.is_empty()
            || self.groups.values().any(|group| !group.active.is_empty() || group.frozen.is_some())
    }

    /// Takes back the promises to entries from `index` on: they were truncated, or their append was refused.
    pub fn unreserve(&mut self, group: GroupId, index: u64) {
        let Some(found) = self.groups.get_mut(&group) else { return };
        let dropped: u64 = found.promised.split_off(&index).values().sum();
        self.reserved_blocks -= dropped;
        self.promised_blocks -= dropped + found.promised_before.split_off(&index).values().sum::<u64>();
    }

    pub(super) fn promise(&mut self, group: GroupId, index: u64, blocks: u64) -> Result<(), StoreError> {
        let found = self.groups.get_mut(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if blocks > 0 && index > found.applied {
            let replaced = found.promised.insert(index, blocks).unwrap_or(0);
            self.reserved_blocks = self.reserved_blocks + blocks - replaced;
            self.promised_blocks = self.promised_blocks + blocks - replaced;
        }
        Ok(())
    }

    /// Ends the promises to entries up to `index`: they are applied, and their layer needs the space now.
    pub(super) fn settle_promises(&mut self, group: GroupId, index: u64) {
        let Some(found) = self.groups.get_mut(&group) else { return };
        while let Some(first) = found.promised.first_entry().filter(|first| *first.key() <= index) {
            let (index, blocks) = first.remove_entry();
            self.reserved_blocks -= blocks;
            found.promised_before.insert(index, blocks);
        }
    }

    /// A checkpoint has passed the entries up to `index`.
    pub(super) fn pass_promises(&mut self, group: GroupId, index: u64) {
        self.settle_promises(group, index);
        let Some(found) = self.groups.get_mut(&group) else { return };
        while let Some(first) = found.promised_before.first_entry().filter(|first| *first.key() <= index) {
            self.promised_blocks -= first.remove();
        }
    }

    pub(super) fn available_blocks(&self) -> u64 {
        let promised = self.reserved_blocks.max(self.promised_blocks);
        (self.allocator.free_slots() * SLOT_BLOCKS).saturating_sub(promised)
    }

    pub(super) fn reserve_blocks(&self) -> u64 {
        (self.layout.slots / RESERVE_SHARE).clamp(RESERVE_SLOTS_MIN, RESERVE_SLOTS_MAX) * SLOT_BLOCKS
    }

    /// Asks for the checkpoints that memory or space need. Costs nothing while neither is short.
    pub(super) fn want_checkpoints(&mut self) {
        let owed = self.promised_blocks + self.held_slots * SLOT_BLOCKS;
        let half = (self.allocator.free_slots() + self.held_slots) * SLOT_BLOCKS / 2;
        let tight = self.available_blocks() < 2 * self.reserve_blocks()
            || owed > half && !self.groups.values().any(|group| group.wanted);
        while self.unasked_bytes > self.limits.overlay_bytes || tight && self.unasked_bytes > 0 {
            // The largest; of equals the first.
            let largest = self.groups.iter().rev().filter(|(_, group)| !group.wanted);
            let largest = largest.max_by_key(|(_, group)| group.active.bytes()).map(|(group, _)| *group);
            self.want_checkpoint(largest.expect("some group holds the bytes"));
            if tight {
                return;
            }
        }
    }

    pub(super) fn want_checkpoint(&mut self, group: GroupId) {
        let found = self.groups.get_mut(&group).expect("it was found by the caller");
        found.wanted = true;
        self.unasked_bytes -= found.active.bytes();
        self.events.push(StoreEvent::CheckpointWanted { group });
    }

    /// Finds a home for a state, and the writes that bring it there. The slots are taken at once, so that a
    /// checkpoint that was accepted does not fail for space.
    pub(super) fn place_state(&mut self, state: &Bytes) -> Result<(StateHome, VecDeque<Job>), StoreError> {
        if state.len() <= INLINE_STATE_BYTES_MAX {
            return Ok((StateHome::Inline(state.clone()), VecDeque::new()));
        }
        let slots = state.len().div_ceil(SLOT_BYTES);
        if self.available_blocks() < slots as u64 * SLOT_BLOCKS {
            return Err(StoreError::Full);
        }
        let mut jobs = VecDeque::new();
        let mut places = Vec::new();
        for start in (0..state.len()).step_by(SLOT_BYTES) {
            let place = self.allocator.take_slot().expect("the free slots were counted above");
            places.push(place);
            jobs.push_back(Job { place, data: state.slice(start..state.len().min(start + SLOT_BYTES)) });
        }
        let home = StateHome::Slots { places, bytes: state.len() as u32, crc: crc32c::crc32c(state) };
        Ok((home, jobs))
    }
}

/// What a state's home takes.
pub fn state_slots(home: &StateHome) -> Vec<Named> {
    match home {
        StateHome::Inline(_) => Vec::new(),
        StateHome::Slots { places, .. } => places.iter().map(|place| Named::Slot(*place)).collect(),
    }
}
