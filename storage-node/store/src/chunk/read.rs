//! Reads: the overlay first, then the map, then the slots; every block is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::layout::SLOT_BLOCKS;
use crate::chunk::overlay::{Content, Piece, gaps};
use crate::chunk::page::{LEAF_BLOCKS, Leaf, Root};
use crate::chunk::repair::{RepairEvent, SlotCopy, copy_of};
use crate::chunk::walk::{Found, Waiter, Walk};
use crate::chunk::{Chunks, Pending, READ_BLOCKS_MAX};
use crate::device::BLOCK_BYTES;
use crate::group::{ReadError, StoreEvent};
use crate::ops::{DeviceError, DeviceOp};

/// A read in flight.
#[derive(Debug)]
pub struct ReadState {
    group: GroupId,
    purpose: Purpose,
    first: u64,
    count: u64,
    /// By first block; complete when no walk and no operation is under way.
    segments: BTreeMap<u64, Segment>,
    /// What the overlay does not have.
    gaps: Vec<Range<u64>>,
    /// Walks and operations under way.
    waiting: usize,
    /// Blocks that are lost or did not match.
    corrupt: BTreeSet<u64>,
}

/// Who waits for a read.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// `cached`: for a client, who may well ask for it again.
    Bytes { token: u64, cached: bool },
    /// A slot for another replica, of the state after the entry `index`.
    Copy { token: u64, index: u64 },
    /// Only whether it can be read.
    Scrub,
}

#[derive(Debug)]
enum Segment {
    Data(Bytes),
    Zero(u64),
    /// On its way from the disk, with the checksums to hold it against.
    Awaited(Vec<u32>),
    /// So many blocks that could not be read, or that nobody wants.
    Nothing(u64),
}

/// Consecutive blocks of a leaf with one source.
#[derive(Debug, PartialEq, Eq)]
enum Run {
    Zero { first: u64, count: u64 },
    Lost { first: u64, count: u64 },
    Device { first: u64, offset: u64, checksums: Vec<u32> },
}

impl Chunks {
    /// Reads blocks as the last applied entry left them; [`StoreEvent::Read`] with the token follows.
    ///
    /// # Panics
    /// Where it is longer than [`READ_BLOCKS_MAX`].
    pub fn read(&mut self, group: GroupId, first_block: u64, count: u32, token: u64) {
        match self.start_read(group, first_block, u64::from(count), Purpose::Bytes { token, cached: true }) {
            Ok(()) => self.advance(),
            Err(error) => self.events.push(StoreEvent::Read { token, result: Err(error) }),
        }
    }

    pub(super) fn start_slot_read(
        &mut self,
        group: GroupId,
        slot: u64,
        index: u64,
        token: u64,
    ) -> Result<(), ReadError> {
        let applied = self.groups.get(&group).map_or(0, |found| found.applied);
        assert!(index >= applied, "{group} has applied {applied}, and its owner knows only of {index}");
        self.start_read(group, slot * SLOT_BLOCKS, SLOT_BLOCKS, Purpose::Copy { token, index })
    }

    pub(super) fn start_read(
        &mut self,
        group: GroupId,
        first: u64,
        count: u64,
        purpose: Purpose,
    ) -> Result<(), ReadError> {
        if self.failed {
            return Err(ReadError::Failed);
        }
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(ReadError::UnknownGroup)?;
        if found.installing {
            return Err(ReadError::Installing);
        }
        if found.applied < found.header.write_back_to {
            return Err(ReadError::Behind { needed: found.header.write_back_to });
        }
        let end = first.saturating_add(count);
        let mut pieces = Vec::new();
        for layer in found.layers().chain([&found.mended]).filter(|layer| !layer.is_empty()) {
            let hidden = gaps(first..end, &pieces);
            pieces.extend(hidden.into_iter().flat_map(|gap| layer.range(gap)));
            pieces.sort_unstable_by_key(|piece| piece.first);
        }
        let root = found.header.root;
        self.start_map_read(group, root, first, count, pieces, purpose);
        Ok(())
    }

    /// Reads what the pieces leave open from a map.
    pub(super) fn start_map_read(
        &mut self,
        group: GroupId,
        root: Root,
        first: u64,
        count: u64,
        pieces: Vec<Piece>,
        purpose: Purpose,
    ) {
        assert!(count <= u64::from(READ_BLOCKS_MAX), "a read of {count} blocks");
        let found = &self.groups[&group];
        let gaps = gaps(first..first.saturating_add(count), &pieces);
        let leaves: BTreeSet<u64> =
            gaps.iter().flat_map(|gap| gap.start / LEAF_BLOCKS..=(gap.end - 1) / LEAF_BLOCKS).collect();
        let walks: Vec<(u64, Option<Walk>)> =
            leaves.into_iter().map(|leaf| (leaf, Walk::new(found, root, 0, leaf))).collect();

        let segments = pieces.into_iter().map(|piece| (piece.first, Segment::from(piece))).collect();
        let serial = self.next_read;
        self.next_read += 1;
        // One more than the walks, so that it cannot finish before all of them have begun.
        let waiting = walks.len() + 1;
        let read = ReadState { group, purpose, first, count, segments, gaps, waiting, corrupt: BTreeSet::new() };
        self.reads.insert(serial, read);
        for (leaf, walk) in walks {
            match walk {
                Some(walk) => self.walk_for_read(serial, walk),
                None => self.fill(serial, leaf, &Found::Absent),
            }
        }
        self.finish_step(serial);
    }

    pub(super) fn walk_for_read(&mut self, read: u64, walk: Walk) {
        let leaf = walk.number;
        if let Some(found) = self.find(walk, |walk| Waiter::Read { read, walk }) {
            self.fill(read, leaf, &found);
        }
    }

    /// Resolves the gaps of one leaf.
    fn fill(&mut self, serial: u64, leaf_number: u64, found: &Found) {
        let covered = leaf_number * LEAF_BLOCKS..(leaf_number + 1) * LEAF_BLOCKS;
        let read = self.reads.get_mut(&serial).expect("a read with a walk is in flight");
        let mut runs = Vec::new();
        for gap in &read.gaps {
            let range = gap.start.max(covered.start)..gap.end.min(covered.end);
            if range.is_empty() {
                continue;
            }
            let (first, count) = (range.start, range.end - range.start);
            match found {
                Found::Absent => runs.push(Run::Zero { first, count }),
                Found::Lost { .. } => runs.push(Run::Lost { first, count }),
                Found::Page { page, .. } => leaf_runs(page.leaf(), range, |place| self.layout.offset(place), &mut runs),
            }
        }
        for run in runs {
            match run {
                Run::Zero { first, count } => {
                    read.segments.insert(first, Segment::Zero(count));
                }
                Run::Lost { first, count } => {
                    self.counters.corrupt_blocks += count;
                    read.corrupt.extend(first..first + count);
                }
                Run::Device { first, offset, checksums } => {
                    let length = (checksums.len() * BLOCK_BYTES) as u32;
                    let id = self.ids.take();
                    self.pending.insert(id, Pending::Blocks { read: serial, first_block: first, offset });
                    let cached = matches!(read.purpose, Purpose::Bytes { cached: true, .. });
                    self.ops.push(DeviceOp::Read { id, offset, length, cached });
                    read.waiting += 1;
                    read.segments.insert(first, Segment::Awaited(checksums));
                }
            }
        }
        self.finish_step(serial);
    }

    pub(super) fn on_blocks(&mut self, serial: u64, first: u64, offset: u64, result: Result<Bytes, DeviceError>) {
        let read = self.reads.get_mut(&serial).expect("a read with an operation is in flight");
        let segment = read.segments.get_mut(&first).expect("an operation fills a segment");
        let Segment::Awaited(checksums) = segment else { panic!("a segment is filled once") };
        match result {
            Ok(data) => {
                assert_eq!(data.len(), checksums.len() * BLOCK_BYTES, "a read completes in full");
                let blocks = data.chunks_exact(BLOCK_BYTES).zip(checksums.iter()).zip(first..);
                let bad = blocks
                    .filter(|((block, sum), _)| holdfast_block::checksum(block) != **sum)
                    .map(|(_, number)| number);
                let before = read.corrupt.len();
                read.corrupt.extend(bad);
                self.counters.corrupt_blocks += (read.corrupt.len() - before) as u64;
                *segment = match read.purpose {
                    Purpose::Scrub => Segment::Nothing(checksums.len() as u64),
                    Purpose::Bytes { .. } | Purpose::Copy { .. } => Segment::Data(data),
                };
            }
            Err(_) if checksums.len() > 1 => {
                // One sector fails the whole operation: its neighbours may well be readable by themselves.
                self.counters.read_errors += 1;
                for ((checksum, block), offset) in
                    std::mem::take(checksums).into_iter().zip(first..).zip((offset..).step_by(BLOCK_BYTES))
                {
                    let id = self.ids.take();
                    self.pending.insert(id, Pending::Blocks { read: serial, first_block: block, offset });
                    self.ops.push(DeviceOp::Read { id, offset, length: BLOCK_BYTES as u32, cached: false });
                    read.waiting += 1;
                    read.segments.insert(block, Segment::Awaited(vec![checksum]));
                }
            }
            Err(_) => {
                // A sector that cannot be read is lost like one that reads wrong: peers have it.
                self.counters.read_errors += 1;
                self.counters.corrupt_blocks += 1;
                read.corrupt.insert(first);
                *segment = Segment::Nothing(1);
            }
        }
        self.finish_step(serial);
    }

    /// One walk or operation has ended; the last one answers the read.
    fn finish_step(&mut self, serial: u64) {
        let read = self.reads.get_mut(&serial).expect("a read with a step under way is in flight");
        read.waiting -= 1;
        if read.waiting == 0 {
            let read = self.reads.remove(&serial).expect("it was found above");
            let slots: BTreeSet<u64> = read.corrupt.iter().map(|block| block / SLOT_BLOCKS).collect();
            self.tell_corrupt(read.group, slots.into_iter().collect());
            match read.purpose {
                Purpose::Bytes { token, .. } => {
                    self.events.push(StoreEvent::Read { token, result: read.into_result() });
                }
                Purpose::Copy { token, index } => {
                    let result = Ok(read.into_copy(index));
                    self.repair_events.push(RepairEvent::SlotRead { token, result });
                }
                Purpose::Scrub => self.on_scrubbed_blocks(read.blocks_read()),
            }
        }
    }
}

impl ReadState {
    /// The disk has failed: whoever waits hears it.
    pub fn into_failed(self) -> Option<StoreEvent> {
        match self.purpose {
            Purpose::Bytes { token, .. } => Some(StoreEvent::Read { token, result: Err(ReadError::Failed) }),
            Purpose::Copy { .. } | Purpose::Scrub => None,
        }
    }

    fn blocks_read(&self) -> u64 {
        let read = |segment: &Segment| if let Segment::Nothing(count) = segment { *count } else { 0 };
        self.segments.values().map(read).sum()
    }

    fn into_copy(self, index: u64) -> SlotCopy {
        let bad = self.corrupt.iter().fold(0, |mask, block| mask | 1 << (block - self.first));
        let piece = |(first, segment)| match segment {
            Segment::Data(data) => (first - self.first, (data.len() / BLOCK_BYTES) as u64, Some(data)),
            Segment::Zero(count) | Segment::Nothing(count) => (first - self.first, count, None),
            Segment::Awaited(_) => panic!("an answered read awaits nothing"),
        };
        copy_of(index, self.segments.into_iter().map(piece).collect(), bad)
    }

    fn into_result(self) -> Result<Bytes, ReadError> {
        if let Some(first_block) = self.corrupt.first().copied() {
            let count =
                self.corrupt.iter().zip(first_block..).take_while(|(block, expected)| *block == expected).count();
            return Err(ReadError::Corrupt { first_block, count: count as u32 });
        }
        let mut segments = self.segments;
        if let (1, Some(entry)) = (segments.len(), segments.first_entry())
            && let Segment::Data(data) = entry.get()
        {
            return Ok(data.clone());
        }
        let mut bytes = Vec::with_capacity(self.count as usize * BLOCK_BYTES);
        for (first, segment) in segments {
            assert_eq!(bytes.len(), (first - self.first) as usize * BLOCK_BYTES, "segments leave no gap");
            match segment {
                Segment::Data(data) => bytes.extend_from_slice(&data),
                Segment::Zero(count) => bytes.resize(bytes.len() + count as usize * BLOCK_BYTES, 0),
                Segment::Awaited(_) | Segment::Nothing(_) => panic!("a whole read has all of its blocks"),
            }
        }
        assert_eq!(bytes.len(), self.count as usize * BLOCK_BYTES, "segments cover the read");
        Ok(Bytes::from(bytes))
    }
}

impl From<Piece> for Segment {
    fn from(piece: Piece) -> Segment {
        match piece.content {
            Content::Data { data, .. } => Segment::Data(data),
            Content::Zero => Segment::Zero(piece.count),
        }
    }
}

/// Splits a range of a leaf's blocks at every change of source.
fn leaf_runs(leaf: &Leaf, range: Range<u64>, offset_of: impl Fn(crate::chunk::Place) -> u64, runs: &mut Vec<Run>) {
    for block in range {
        let within = (block % LEAF_BLOCKS) as usize;
        let slot = &leaf.slots[within / 16];
        let bit = 1u16 << (within % 16);
        if slot.present & bit != 0 {
            let at = offset_of(slot.place) + (within % 16 * BLOCK_BYTES) as u64;
            let checksum = leaf.checksums[within];
            match runs.last_mut() {
                Some(Run::Device { first, offset, checksums })
                    if *first + checksums.len() as u64 == block
                        && *offset + (checksums.len() * BLOCK_BYTES) as u64 == at =>
                {
                    checksums.push(checksum);
                }
                _ => runs.push(Run::Device { first: block, offset: at, checksums: vec![checksum] }),
            }
        } else if slot.lost & bit != 0 {
            match runs.last_mut() {
                Some(Run::Lost { first, count }) if *first + *count == block => *count += 1,
                _ => runs.push(Run::Lost { first: block, count: 1 }),
            }
        } else {
            match runs.last_mut() {
                Some(Run::Zero { first, count }) if *first + *count == block => *count += 1,
                _ => runs.push(Run::Zero { first: block, count: 1 }),
            }
        }
    }
}
