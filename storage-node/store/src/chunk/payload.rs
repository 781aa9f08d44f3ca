//! Payloads that are written once: straight to the slots where their blocks will stay.
//!
//! An append takes fresh slots for the parts of its payload that cover whole ones; its record names them. From then on
//! the group *holds* them: until the record is truncated, durably, or a checkpoint passes it, they are neither changed
//! nor given away. Applying the record makes them the homes of their blocks in the overlay, which serves reads from
//! memory as it does everything else. The checkpoint adopts a home, without a write, where nothing was written into
//! its slot since; else it writes the slot elsewhere, as ever, and gives the home back when the checkpoint is durable.

use std::collections::BTreeSet;

use holdfast_id::GroupId;

use crate::chunk::layout::{Named, Place, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::space::{blocks_for_payload, leaf_blocks_for_payload};
use crate::chunk::{Chunks, Group};
use crate::device::BLOCK_BYTES;
use crate::group::{OUT_OF_PLACE_BYTES_MIN, Record, StoreError};
use crate::wal::{Extent, Slots};

/// Checksum of a block of zeroes.
const ZERO_BLOCK_CHECKSUM: u32 = 0xdb11_e65b;

const _: () = assert!(OUT_OF_PLACE_BYTES_MIN >= SLOT_BYTES, "what leaves the log covers a slot");

/// The slots of one payload: the payload's block that each begins with, rising.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Homes(Vec<(u64, Place)>);

impl Homes {
    /// The place of a slot of the group, where the payload is written from `first_block` on.
    pub fn of_slot(&self, first_block: u64, slot: u64) -> Option<Place> {
        let block = (slot * SLOT_BLOCKS).checked_sub(first_block)?;
        let found = self.0.binary_search_by_key(&block, |(block, _)| *block).ok()?;
        Some(self.0[found].1)
    }
}

impl Group {
    /// A checkpoint has passed the records up to `index`. How many slots they held, and what its map did not adopt.
    pub fn pass_payloads(&mut self, index: u64, adopted: &BTreeSet<Place>) -> (u64, Vec<Place>) {
        let later = self.payloads.split_off(&(index + 1));
        let passed = std::mem::replace(&mut self.payloads, later);
        let mut places: Vec<Place> = passed.into_values().flat_map(|homes| homes.0).map(|(_, place)| place).collect();
        let slots = places.len() as u64;
        places.retain(|place| !adopted.contains(place));
        (slots, places)
    }

    /// Records from `index` on are truncated, or the group is deleted.
    pub fn drop_payloads(&mut self, index: u64) -> Vec<Place> {
        let dropped = self.payloads.split_off(&index);
        dropped.into_values().flat_map(|homes| homes.0).map(|(_, place)| place).collect()
    }
}

impl Chunks {
    /// Promises a record the space it needs, as [`Chunks::reserve_blocks_for`], and takes the slots its payload goes to at once;
    /// empty: all of it stays in the log. They are taken until [`Chunks::hold`] or [`Chunks::release`].
    pub(crate) fn place_record(&mut self, group: GroupId, record: &Record) -> Result<Vec<Extent>, StoreError> {
        let extents = shape(record);
        let slots: usize = extents.iter().map(|extent| extent.bytes_in_slots() / SLOT_BYTES).sum();
        self.reserve_blocks_for(group, record.index, slots as u64, blocks_promised(record, &extents))?;
        let mut placed = Vec::new();
        for extent in extents {
            match extent {
                Extent::Slots { checksums, .. } => {
                    for sums in checksums.chunks(SLOT_BLOCKS as usize) {
                        let place = self.allocator.take_slot().expect("the free slots were counted above");
                        let offset = self.layout.offset(place);
                        match placed.last_mut() {
                            Some(last @ Extent::Slots { .. }) if end(last) == offset => {
                                let Extent::Slots { checksums, .. } = last else { unreachable!("it was one above") };
                                checksums.extend_from_slice(sums);
                            }
                            _ => placed.push(Extent::Slots { offset, checksums: sums.to_vec() }),
                        }
                    }
                }
                stays => placed.push(stays),
            }
        }
        Ok(placed)
    }

    /// The record was appended, or found at open: its slots are the group's to hold.
    pub(crate) fn hold(&mut self, group: GroupId, index: u64, placed: &[Extent]) {
        let homes = self.homes(placed);
        if !homes.0.is_empty() {
            let found = self.groups.get_mut(&group).expect("a record is of a group");
            self.held_slots += homes.0.len() as u64;
            let replaced = found.payloads.insert(index, homes);
            assert!(replaced.is_none(), "a record is appended where none is");
        }
    }

    /// The promise to a record found at open.
    pub(crate) fn reserve_recovered(&mut self, group: GroupId, record: &Record, placed: &[Extent]) {
        let promised = self.promise(group, record.index, blocks_promised(record, placed));
        promised.expect("the group was found by the same chunks");
    }

    /// The append was refused: nothing was written to its slots.
    pub(crate) fn release(&mut self, placed: &[Extent]) {
        let places = self.homes(placed).0.into_iter().map(|(_, place)| place).collect();
        self.free_slots(places);
    }

    /// Records from `index` on are truncated. Their slots are the caller's, to free when that is durable.
    pub(crate) fn truncate_payloads(&mut self, group: GroupId, index: u64) -> Vec<Place> {
        let dropped = self.groups.get_mut(&group).map_or(Vec::new(), |found| found.drop_payloads(index));
        self.held_slots -= dropped.len() as u64;
        dropped
    }

    /// Slots that a checkpoint passed and did not adopt, or a deleted group held. They are the caller's, to free when
    /// nothing is being written to them any more.
    pub(crate) fn take_orphans(&mut self) -> Vec<Place> {
        std::mem::take(&mut self.orphans)
    }

    pub(crate) fn free_slots(&mut self, places: Vec<Place>) {
        places.into_iter().for_each(|place| self.allocator.free(Named::Slot(place)));
        if !self.waiting_cuts.is_empty() {
            self.advance();
        }
    }

    fn homes(&self, placed: &[Extent]) -> Homes {
        let (mut homes, mut block) = (Vec::new(), 0);
        for extent in placed {
            let blocks = (extent.bytes() / BLOCK_BYTES) as u64;
            if let Extent::Slots { offset, .. } = extent {
                let start = self.layout.place_at(*offset).expect("payloads are placed in slots");
                let starts = (0..blocks).step_by(SLOT_BLOCKS as usize);
                homes.extend(starts.map(|within| (block + within, Place(start.0 + within))));
            }
            block += blocks;
        }
        Homes(homes)
    }

    fn slots_at(&self, offset: u64, bytes: usize) -> Option<Vec<Place>> {
        let start = self.layout.place_at(offset).filter(|_| bytes.is_multiple_of(SLOT_BYTES))?;
        let slots = (bytes / SLOT_BYTES) as u64;
        let places: Vec<Place> = (0..slots).map(|n| Place(start.0 + n * SLOT_BLOCKS)).collect();
        places.iter().all(|place| self.layout.is_slot(*place)).then_some(places)
    }
}

impl Slots for Chunks {
    fn are_slots(&self, offset: u64, bytes: usize) -> bool {
        self.slots_at(offset, bytes).is_some()
    }

    fn claim(&mut self, offset: u64, bytes: usize) -> bool {
        let Some(places) = self.slots_at(offset, bytes) else { return false };
        for (n, place) in places.iter().enumerate() {
            if self.allocator.mark(Named::Slot(*place)).is_err() {
                self.free_slots(places[..n].to_vec());
                return false;
            }
        }
        true
    }
}

/// Which parts of a payload go to slots; their places are still open. Empty: it stays in the log.
fn shape(record: &Record) -> Vec<Extent> {
    let Some(at) = record.at.as_ref().filter(|_| record.payload.len() >= OUT_OF_PLACE_BYTES_MIN) else {
        return Vec::new();
    };
    let blocks = at.checksums.len();
    assert_eq!(blocks * BLOCK_BYTES, record.payload.len(), "a payload has a checksum for each block");
    let slot = SLOT_BLOCKS as usize;
    let head = (SLOT_BLOCKS - at.first_block % SLOT_BLOCKS) as usize % slot;
    let whole = (blocks - head) / slot * slot;
    if whole * BLOCK_BYTES < OUT_OF_PLACE_BYTES_MIN {
        return Vec::new();
    }
    let inline = |blocks: usize| (blocks > 0).then_some(Extent::Inline { blocks: blocks as u32 });
    let mut extents: Vec<Extent> = inline(head).into_iter().collect();
    for start in (head..head + whole).step_by(slot) {
        let sums = &at.checksums[start..start + slot];
        let data = &record.payload[start * BLOCK_BYTES..][..SLOT_BYTES];
        if sums.iter().all(|sum| *sum == ZERO_BLOCK_CHECKSUM) && data.iter().all(|byte| *byte == 0) {
            extents.push(Extent::Zero { blocks: slot as u32 });
        } else {
            extents.push(Extent::Slots { offset: 0, checksums: sums.to_vec() });
        }
    }
    extents.extend(inline(blocks - head - whole));
    extents
}

/// What writing back a record takes at most beside the slots its payload has: for each part elsewhere the slots it
/// covers or touches, and the pages of the map.
fn blocks_promised(record: &Record, extents: &[Extent]) -> u64 {
    let blocks = (record.payload.len() / BLOCK_BYTES) as u64;
    if extents.is_empty() {
        return blocks_for_payload(blocks);
    }
    let elsewhere = extents.iter().filter(|extent| !matches!(extent, Extent::Slots { .. }));
    let slots: u64 = elsewhere.map(|extent| (extent.bytes() as u64).div_ceil(SLOT_BYTES as u64)).sum();
    slots * SLOT_BLOCKS + leaf_blocks_for_payload(blocks)
}

/// Byte of the device behind an extent in slots.
fn end(extent: &Extent) -> u64 {
    match extent {
        Extent::Slots { offset, .. } => offset + extent.bytes() as u64,
        Extent::Inline { .. } | Extent::Zero { .. } => 0,
    }
}
