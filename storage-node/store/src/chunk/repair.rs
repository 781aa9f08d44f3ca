//! Repair: blocks that another replica has, in place of those this disk has lost.
//!
//! Not here: who is asked, and when; the owner does that. What is found corrupt is told as [`RepairEvent::Corrupt`],
//! whoever found it: a read, a checkpoint's copy of a slot, the scrub.
//!
//! # Why a copy of another replica is right
//!
//! A copy is what a slot held after the log up to `copy.index`, read at one moment. Let P be this replica's checkpoint
//! and C the last entry applied here. A block that the overlay does not have was changed by no entry of (P, C]. So for
//! P <= `copy.index` <= C it is at C, here, what it was at `copy.index`, there. Blocks that the overlay has are not
//! taken. What the map still knows of a block (whether it is present, its checksum) has to agree; where the page that
//! knew it is lost, the copy decides, which is exact for the same reason. The last-changed index of a lost slot was at
//! most P, and P is what it gets: a delta then sends a slot too much, never one too few.
//!
//! # How it becomes durable
//!
//! What was taken lies under the overlay's layers and above the map, so reads see it at once. The next checkpoint puts
//! it below what that layer changed, and writes it to a *fresh* slot: nothing the durable map names is touched, and a
//! crash at any point leaves either the map before it, where the damage is found again, or the one after.

use std::ops::Range;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::Chunks;
use crate::chunk::layout::SLOT_BLOCKS;
use crate::chunk::overlay::{Content, Layer, Piece};
use crate::chunk::page::{LEAF_BLOCKS, LEAF_SLOTS, Root, SlotEntry};
use crate::chunk::walk::{Found, Waiter, Walk};
use crate::device::BLOCK_BYTES;
use crate::group::{Mutation, ReadError};

/// Bytes taken from peers that wait for a checkpoint, of all groups together; beyond it repairs wait.
pub const MENDED_BYTES_MAX: u64 = 16 << 20;

/// A slot as one replica has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotCopy {
    /// All entries up to it are in the copy, none above it.
    pub index: u64,
    /// Bit i: block i holds data; others are zero, unless in `bad`.
    pub present: u16,
    /// Bit i: this replica cannot read block i either.
    pub bad: u16,
    /// The blocks present and not bad, in order.
    pub data: Bytes,
}

impl SlotCopy {
    /// Whether the data is as long as the bits say.
    pub fn is_consistent(&self) -> bool {
        self.data.len() == (self.present & !self.bad).count_ones() as usize * BLOCK_BYTES
    }
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mending {
    /// So many blocks read right again; those of `missing` the copy did not have.
    Mended { blocks: u32, missing: u16 },
    /// This replica has not applied what the copy has; the same copy will do later.
    Behind,
    /// This replica has had a checkpoint above the copy: a newer one is needed.
    Stale,
    /// It contradicts what the map here knows.
    Mismatch,
    /// No memory or space for it now.
    Full,
}

/// What the owner of the store is to know for repairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepairEvent {
    /// Blocks of these slots are lost or do not match.
    Corrupt { group: GroupId, slots: Vec<u64> },
    /// The answer to [`Chunks::read_slot`].
    SlotRead { token: u64, result: Result<SlotCopy, ReadError> },
    /// The answer to [`Chunks::mend`].
    Mended { token: u64, result: Mending },
    /// An install cannot end before a pass of the scrub has seen all of the map: a page of it was lost.
    Unknown { group: GroupId },
    /// The step of a scrub is done, and with it perhaps the pass.
    Scrubbed { bytes: u64, finished: bool },
}

/// A copy on its way in: it waits for the leaf that says what it has to agree with.
#[derive(Debug)]
pub struct Mend {
    group: GroupId,
    slot: u64,
    copy: SlotCopy,
    token: u64,
    /// The caller has applied all entries up to it here.
    applied: u64,
    /// Where the walk began.
    root: Root,
}

impl Chunks {
    pub fn take_repair_events(&mut self) -> Vec<RepairEvent> {
        std::mem::take(&mut self.repair_events)
    }

    /// Reads a slot for another replica; [`RepairEvent::SlotRead`] with the token follows. All entries up to `applied`
    /// have been applied, also those that change no block.
    pub fn read_slot(&mut self, group: GroupId, slot: u64, applied: u64, token: u64) {
        match self.start_slot_read(group, slot, applied, token) {
            Ok(()) => self.advance(),
            Err(error) => self.repair_events.push(RepairEvent::SlotRead { token, result: Err(error) }),
        }
    }

    /// Takes what it lacks of a slot from another replica's copy; [`RepairEvent::Mended`] with the token follows.
    /// `applied` as above.
    pub fn mend(&mut self, group: GroupId, slot: u64, copy: SlotCopy, applied: u64, token: u64) {
        let serial = self.next_read;
        self.next_read += 1;
        self.mends.insert(serial, Mend { group, slot, copy, token, applied, root: Root::default() });
        self.start_mend(serial);
        self.advance();
    }

    fn start_mend(&mut self, serial: u64) {
        let mend = self.mends.get_mut(&serial).expect("a copy waits until it is taken or not");
        let Some(found) = self.groups.get(&mend.group).filter(|found| !found.deleting) else {
            return self.finish_mend(serial, &Found::Absent);
        };
        mend.root = found.header.root;
        match Walk::new(found, mend.root, 0, mend.slot / LEAF_SLOTS as u64) {
            Some(walk) => self.walk_for_mend(serial, walk),
            None => self.finish_mend(serial, &Found::Absent),
        }
    }

    pub(super) fn walk_for_mend(&mut self, serial: u64, walk: Walk) {
        let mend = &self.mends[&serial];
        let root = self.groups.get(&mend.group).map(|found| found.header.root);
        if root != Some(mend.root) {
            // A checkpoint came in between.
            return self.start_mend(serial);
        }
        if let Some(found) = self.find(walk, |walk| Waiter::Mend { serial, walk }) {
            self.finish_mend(serial, &found);
        }
    }

    fn finish_mend(&mut self, serial: u64, found: &Found) {
        let mend = self.mends.remove(&serial).expect("a copy is taken once");
        let result = self.take_copy(&mend, found);
        if let Mending::Mended { blocks, .. } = result {
            self.counters.repaired_blocks += u64::from(blocks);
        }
        self.repair_events.push(RepairEvent::Mended { token: mend.token, result });
    }

    fn take_copy(&mut self, mend: &Mend, at: &Found) -> Mending {
        let Mend { group, slot, copy, .. } = mend;
        let Some(found) = self.groups.get(group).filter(|found| !found.deleting) else { return Mending::Stale };
        let header = &found.header;
        if found.installing {
            // What is corrupt is of no single index, and may be replaced anyway.
            return Mending::Behind;
        }
        if copy.index < header.index {
            return Mending::Stale;
        }
        if found.applied.max(mend.applied) < copy.index || found.applied < header.write_back_to {
            return Mending::Behind;
        }
        assert!(copy.is_consistent(), "who received a copy has looked at its length");

        let n = (slot % LEAF_SLOTS as u64) as usize;
        let lost = SlotEntry { lost: u16::MAX, ..SlotEntry::default() };
        let (entry, checksums) = match at {
            Found::Page { page, .. } => {
                let leaf = page.leaf();
                (leaf.slots[n], &leaf.checksums[n * SLOT_BLOCKS as usize..][..SLOT_BLOCKS as usize])
            }
            Found::Absent => (SlotEntry::default(), &[][..]),
            Found::Lost { .. } => (lost, &[][..]),
        };
        let first = slot * SLOT_BLOCKS;
        let blocks = first..first + SLOT_BLOCKS;
        let overlay = found.layers().flat_map(|layer| layer.range(blocks.clone()));
        let hidden = overlay.fold(0, |mask, piece| mask | mask_of(&piece, first));

        let comparable = !(hidden | entry.lost | copy.bad);
        if (entry.present ^ copy.present) & comparable != 0 {
            return Mending::Mismatch;
        }
        let wanted = (entry.present | entry.lost) & !hidden;
        let index = if entry.lost == 0 { entry.index } else { header.index };
        let taken = wanted & !copy.bad;
        let mut layer = Layer::default();
        for run in runs_of(taken & !copy.present) {
            let count = run.end - run.start;
            layer.apply(index, Mutation::Zero { first_block: first + run.start, count, discard: true }, None);
        }
        let held = copy.present & !copy.bad;
        let data = (0..SLOT_BLOCKS).filter(|block| held & (1 << block) != 0).zip(copy.data.chunks_exact(BLOCK_BYTES));
        for (block, data) in data.filter(|(block, _)| taken & (1 << block) != 0) {
            let checksum = holdfast_block::checksum(data);
            if entry.lost & (1 << block) == 0 && checksum != checksums[block as usize] {
                return Mending::Mismatch;
            }
            let data = copy.data.slice_ref(data);
            layer.apply(
                index,
                Mutation::Write { first_block: first + block, data, checksums: [checksum].into() },
                None,
            );
        }
        let result = Mending::Mended { blocks: taken.count_ones(), missing: wanted & copy.bad };
        if layer.is_empty() || self.keep_mended(*group, layer) { result } else { Mending::Full }
    }

    /// Puts what was taken under the overlay, and asks for the checkpoint that makes it durable.
    fn keep_mended(&mut self, group: GroupId, layer: Layer) -> bool {
        let needed = layer.blocks_needed();
        if self.available_blocks() < needed || self.mended_bytes + layer.bytes() > MENDED_BYTES_MAX {
            self.want_checkpoint_for_mended(group);
            return false;
        }
        let found = self.groups.get_mut(&group).expect("it was found by the caller");
        let (blocks, bytes) = (found.mended.blocks_needed(), found.mended.bytes());
        found.mended.overlay(layer);
        self.reserved_blocks += found.mended.blocks_needed() - blocks;
        self.mended_bytes += found.mended.bytes() - bytes;
        self.want_checkpoint_for_mended(group);
        true
    }

    pub(super) fn want_checkpoint_for_mended(&mut self, group: GroupId) {
        let found = &self.groups[&group];
        if !found.wanted && !found.committing {
            self.want_checkpoint(group);
        }
    }

    /// What a checkpoint writes: the layer above what was mended.
    pub(super) fn with_mended(&mut self, group: GroupId, mut layer: Layer) -> Layer {
        let mended = std::mem::take(&mut self.groups.get_mut(&group).expect("it was found by the caller").mended);
        if !mended.is_empty() {
            self.mended_bytes -= mended.bytes();
            self.reserved_blocks -= mended.blocks_needed() + layer.blocks_needed();
            layer.underlay(mended);
            self.reserved_blocks += layer.blocks_needed();
        }
        layer
    }

    /// Something in a group's slots is corrupt, whoever noticed.
    pub(super) fn tell_corrupt(&mut self, group: GroupId, slots: Vec<u64>) {
        if !slots.is_empty() {
            self.repair_events.push(RepairEvent::Corrupt { group, slots });
        }
    }

    /// A whole leaf is lost.
    pub(super) fn tell_leaf_lost(&mut self, group: GroupId, leaf: u64) {
        let first = leaf * LEAF_BLOCKS / SLOT_BLOCKS;
        self.tell_corrupt(group, (first..first + LEAF_SLOTS as u64).collect());
    }
}

/// The blocks of a slot that a piece, which lies within it, covers.
fn mask_of(piece: &Piece, first: u64) -> u16 {
    let start = piece.first - first;
    (start..start + piece.count).fold(0, |mask, block| mask | 1 << block)
}

/// The runs of set bits.
fn runs_of(mask: u16) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for block in (0..SLOT_BLOCKS).filter(|block| mask & (1 << block) != 0) {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

/// What a slot's read came to.
pub fn copy_of(index: u64, pieces: Vec<(u64, u64, Option<Bytes>)>, bad: u16) -> SlotCopy {
    let mut present = 0;
    let mut data = Vec::new();
    for (start, count, bytes) in pieces {
        let Some(bytes) = bytes else { continue };
        for (block, bytes) in (start..start + count).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            present |= 1 << block;
            if bad & (1 << block) == 0 {
                data.extend_from_slice(bytes);
            }
        }
    }
    SlotCopy { index, present, bad, data: Bytes::from(data) }
}

impl Layer {
    /// Puts pieces on top.
    fn overlay(&mut self, above: Layer) {
        for piece in above.into_pieces() {
            let first_block = piece.first;
            let mutation = match piece.content {
                Content::Data { data, checksums, checksum } => {
                    let blocks = data.len() / BLOCK_BYTES;
                    Mutation::Write { first_block, data, checksums: checksums[checksum..checksum + blocks].into() }
                }
                Content::Zero => Mutation::Zero { first_block, count: piece.count, discard: true },
            };
            self.apply(piece.index, mutation, None);
        }
    }
}
