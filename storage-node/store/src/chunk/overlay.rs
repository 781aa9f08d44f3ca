//! Blocks that are applied and not yet in the map: ranges over the very buffers apply was given, nothing is copied.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::chunk::layout::{Place, SLOT_BLOCKS};
use crate::chunk::page::{LEAF_BLOCKS, LEVEL_MAX};
use crate::chunk::payload::Homes;
use crate::device::BLOCK_BYTES;
use crate::group::{InstalledSlot, Mutation};

/// What a range costs in memory beside its data; chosen above the size of a tree node's share.
const PIECE_BYTES: u64 = 256;
/// What a touched leaf or slot costs in memory.
const TOUCHED_BYTES: u64 = 32;

/// A range of blocks with one source.
#[derive(Clone, Debug)]
pub struct Piece {
    pub first: u64,
    pub count: u64,
    /// Log index of the entry that changed it.
    pub index: u64,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub enum Content {
    /// `checksums[checksum..]` belongs to the blocks of `data`.
    Data {
        data: Bytes,
        checksums: Arc<[u32]>,
        checksum: usize,
    },
    Zero,
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The part of it within `range`, which overlaps it.
    pub fn within(&self, range: Range<u64>) -> Piece {
        let first = self.first.max(range.start);
        let end = self.end().min(range.end);
        assert!(first < end, "the ranges overlap");
        let skip = (first - self.first) as usize;
        let content = match &self.content {
            Content::Zero => Content::Zero,
            Content::Data { data, checksums, checksum } => Content::Data {
                data: data.slice(skip * BLOCK_BYTES..(skip + (end - first) as usize) * BLOCK_BYTES),
                checksums: checksums.clone(),
                checksum: checksum + skip,
            },
        };
        Piece { first, count: end - first, index: self.index, content }
    }
}

/// The changes between two checkpoints of one group. Pieces never overlap.
#[derive(Debug, Default)]
pub struct Layer {
    pieces: BTreeMap<u64, Piece>,
    /// Slots that data was ever written to in this layer, also where a later zero hides it: exactly the slots that
    /// may need a place, or a tombstone though the map has never heard of them.
    slots: BTreeSet<u64>,
    /// Slots whose data lies in a place of its own already: all of it is of the payload that was written there, though
    /// zeroes may hide some. A subset of `slots`.
    homes: BTreeMap<u64, Place>,
    leaves: BTreeSet<u64>,
    /// Slots with blocks that were mended: they go to a fresh place.
    mended: BTreeSet<u64>,
    /// Leaves to be written though nothing in them changes.
    rewritten: BTreeSet<u64>,
    /// Slots of a delta, by number. A layer has these or pieces, never both.
    installed: BTreeMap<u64, InstalledSlot>,
    /// An upper bound of the memory held: also what later pieces hid counts, since a buffer lives as long as any part.
    bytes: u64,
    /// Of the last mutation.
    last_index: u64,
}

impl Layer {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.rewritten.is_empty() && self.installed.is_empty()
    }

    pub fn has_installed(&self) -> bool {
        !self.installed.is_empty()
    }

    pub fn installed(&self, slot: u64) -> Option<&InstalledSlot> {
        self.installed.get(&slot)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Index of the last change.
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    pub fn leaves(&self) -> &BTreeSet<u64> {
        &self.leaves
    }

    pub fn has_written(&self, slot: u64) -> bool {
        self.slots.contains(&slot)
    }

    pub fn rewrite(&mut self, leaf: u64) {
        self.rewritten.insert(leaf);
        self.leaves.insert(leaf);
    }

    pub fn rewrites(&self, leaf: u64) -> bool {
        self.rewritten.contains(&leaf)
    }

    pub fn has_mended(&self, slot: u64) -> bool {
        self.mended.contains(&slot)
    }

    /// The highest leaf that holds data, or anything of a delta.
    pub fn last_written_leaf(&self) -> Option<u64> {
        let last = self.slots.last().copied().max(self.installed.keys().next_back().copied());
        last.map(|slot| slot * SLOT_BLOCKS / LEAF_BLOCKS)
    }

    /// Where the data of a slot lies already, if all of it does.
    pub fn home(&self, slot: u64) -> Option<Place> {
        self.homes.get(&slot).copied()
    }

    /// Blocks of the disk that writing this layer back takes at most: a new slot for each slot written that has no
    /// home, and each touched leaf with a path of its own to the root. It falls where a payload with a home covers
    /// what was written without one.
    pub fn blocks_needed(&self) -> u64 {
        (self.slots.len() - self.homes.len()) as u64 * SLOT_BLOCKS
            + self.leaves.len() as u64 * (u64::from(LEVEL_MAX) + 1)
    }

    /// `homes`: the slots that the payload of the entry was written to.
    pub fn apply(&mut self, index: u64, mutation: Mutation, homes: Option<&Homes>) {
        let piece = match mutation {
            Mutation::Write { first_block, data, checksums } => {
                let count = (data.len() / BLOCK_BYTES) as u64;
                assert!(data.len().is_multiple_of(BLOCK_BYTES) && checksums.len() as u64 == count);
                self.bytes += data.len() as u64;
                let content = Content::Data { data, checksums, checksum: 0 };
                Piece { first: first_block, count, index, content }
            }
            Mutation::Zero { first_block, count, discard: _ } => {
                Piece { first: first_block, count, index, content: Content::Zero }
            }
        };
        if piece.count == 0 {
            return;
        }
        self.last_index = index;
        self.clear(piece.first..piece.end());
        if matches!(piece.content, Content::Data { .. }) {
            let touched = piece.first / SLOT_BLOCKS..=(piece.end() - 1) / SLOT_BLOCKS;
            self.slots.extend(touched.clone());
            for slot in touched {
                match homes.and_then(|homes| homes.of_slot(piece.first, slot)) {
                    Some(place) => self.homes.insert(slot, place),
                    None => self.homes.remove(&slot),
                };
            }
        }
        let leaves = piece.first / LEAF_BLOCKS..=(piece.end() - 1) / LEAF_BLOCKS;
        self.bytes += PIECE_BYTES + TOUCHED_BYTES * (leaves.end() - leaves.start() + 1);
        self.leaves.extend(leaves);
        self.pieces.insert(piece.first, piece);
    }

    /// Takes in the blocks of `below` that this layer does not have. They are no changes: the last index stays.
    pub fn underlay(&mut self, below: Layer) {
        self.bytes += below.bytes;
        self.mended.extend(below.pieces.keys().map(|first| first / SLOT_BLOCKS));
        self.slots.extend(below.slots);
        self.rewritten.extend(below.rewritten);
        self.leaves.extend(below.leaves);
        for piece in below.pieces.into_values() {
            for gap in gaps(piece.first..piece.end(), &self.range(piece.first..piece.end())) {
                self.pieces.insert(gap.start, piece.within(gap));
            }
        }
    }

    pub fn into_pieces(self) -> impl Iterator<Item = Piece> {
        self.pieces.into_values()
    }

    /// Takes a slot of a delta.
    pub fn install(&mut self, installed: InstalledSlot) {
        assert!(self.pieces.is_empty(), "a delta is not mixed with entries");
        let leaf = installed.slot * SLOT_BLOCKS / LEAF_BLOCKS;
        self.bytes += installed.data.len() as u64 + PIECE_BYTES;
        self.bytes += if self.leaves.insert(leaf) { TOUCHED_BYTES } else { 0 };
        if installed.present != 0 {
            self.slots.insert(installed.slot);
        }
        self.installed.insert(installed.slot, installed);
    }

    /// The pieces that overlap the range, cut to it, in order.
    pub fn range(&self, range: Range<u64>) -> Vec<Piece> {
        let before = self.pieces.range(..range.start).next_back().map(|(_, piece)| piece);
        let before = before.filter(|piece| piece.end() > range.start);
        let inside = self.pieces.range(range.clone()).map(|(_, piece)| piece);
        before.into_iter().chain(inside).map(|piece| piece.within(range.clone())).collect()
    }

    /// Cuts the range out of every piece.
    fn clear(&mut self, range: Range<u64>) {
        let before = self.pieces.range(..range.start).next_back().map(|(_, piece)| piece.clone());
        if let Some(piece) = before.filter(|piece| piece.end() > range.start) {
            self.pieces.insert(piece.first, piece.within(piece.first..range.start));
            if piece.end() > range.end {
                self.pieces.insert(range.end, piece.within(range.end..piece.end()));
            }
        }
        let inside: Vec<u64> = self.pieces.range(range.clone()).map(|(first, _)| *first).collect();
        for first in inside {
            let piece = self.pieces.remove(&first).expect("it was found above");
            if piece.end() > range.end {
                self.pieces.insert(range.end, piece.within(range.end..piece.end()));
            }
        }
    }
}

/// What sorted pieces leave of the range.
pub fn gaps(range: Range<u64>, pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut next = range.start;
    for piece in pieces {
        if piece.first > next {
            gaps.push(next..piece.first);
        }
        next = piece.end();
    }
    if next < range.end {
        gaps.push(next..range.end);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(first_block: u64, blocks: u8, fill: u8) -> Mutation {
        let data = Bytes::from(vec![fill; usize::from(blocks) * BLOCK_BYTES]);
        Mutation::Write { first_block, data, checksums: (0..u32::from(blocks)).collect() }
    }

    fn shape(layer: &Layer, range: Range<u64>) -> Vec<(u64, u64, u64, Option<usize>)> {
        let checksum = |piece: &Piece| match piece.content {
            Content::Data { checksum, .. } => Some(checksum),
            Content::Zero => None,
        };
        layer.range(range).iter().map(|piece| (piece.first, piece.count, piece.index, checksum(piece))).collect()
    }

    #[test]
    fn later_pieces_cut_earlier_ones() {
        let mut layer = Layer::default();
        layer.apply(1, write(10, 10, 1), None);
        layer.apply(2, Mutation::Zero { first_block: 12, count: 2, discard: true }, None);
        layer.apply(3, write(18, 4, 3), None);
        let all = vec![(10, 2, 1, Some(0)), (12, 2, 2, None), (14, 4, 1, Some(4)), (18, 4, 3, Some(0))];
        assert_eq!(shape(&layer, 0..100), all);
        assert_eq!(shape(&layer, 15..19), vec![(15, 3, 1, Some(5)), (18, 1, 3, Some(0))]);
        layer.apply(4, Mutation::Zero { first_block: 0, count: 1 << 14, discard: false }, None);
        assert_eq!(shape(&layer, 0..100), vec![(0, 100, 4, None)]);
        assert!(layer.has_written(1), "a hidden write still needs its tombstone");
        assert_eq!(layer.leaves().len(), 64);
    }
}
