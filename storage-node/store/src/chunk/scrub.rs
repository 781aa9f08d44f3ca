//! Scrub: reads everything that headers and maps name, so that rot is found while other replicas still have what rots.
//!
//! A pass goes group by group: both copies of the header, the slots of a long state, every page of the map from the
//! disk and not from the cache, and every block of every leaf that the overlay does not hide. Not here: when a pass
//! begins and how fast it goes; the owner asks for one step after the other. What is corrupt is told as
//! [`RepairEvent::Corrupt`]; what memory still knows (headers, states, cached pages) is written again by the group's
//! next checkpoint, without a peer.
//!
//! A group whose counts and hash are not known, because a page was lost, has them again after a pass that found all of
//! its map while no checkpoint came in between.
//!
//! Between two steps nothing is held: a step looks up where it is from the root then in force, so a pass sees each
//! leaf in one of the versions it had meanwhile, and a version written meanwhile is younger than the pass.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::header::{Copy, Counts, Header, StateHome};
use crate::chunk::layout::{SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::page::{FAN_OUT, FAN_OUT_BITS, LEAF_BLOCKS, Leaf, Page, PageId, PageRef};
use crate::chunk::read::Purpose;
use crate::chunk::repair::RepairEvent;
use crate::chunk::walk::Waiter;
use crate::chunk::{Chunks, Pending};
use crate::device::BLOCK_BYTES;
use crate::ops::{DeviceError, DeviceOp};

/// A step goes on until it has read as much: what is small (headers, sparse leaves) is not worth a wake-up each.
const STEP_BYTES: u64 = 256 << 10;

/// A pass that stands still, or none.
#[derive(Debug, Default)]
pub struct Scrub {
    at: Option<At>,
    /// Of the step under way: what it may still look at is not reused.
    serial: Option<u64>,
    waiting: usize,
    /// Read by the step under way.
    bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct At {
    group: GroupId,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Header,
    /// The slots of the state before `next` have this checksum; `generation` is the header's that names them.
    State {
        next: usize,
        crc: u32,
        generation: u64,
    },
    /// Leaves below `next` are done, the last of them was `last`. `counts`: what they and the pages above them name,
    /// as of the header of `generation`, unless something is lost.
    Map {
        next: u64,
        last: Option<u64>,
        generation: u64,
        counts: Option<Counts>,
    },
}

/// What a completion of a scrub is for.
#[derive(Debug)]
pub enum ScrubIo {
    Header { generation: u64 },
    State,
    Page { id: PageId, at: PageRef, leaf: u64 },
}

/// Where a look for the next leaf ends.
enum Next {
    /// A page has to be read first.
    Waits,
    Leaf {
        number: u64,
        leaf: Arc<Page>,
        path: Vec<(PageId, PageRef)>,
    },
    /// This leaf lies below a page that is lost.
    Lost {
        number: u64,
    },
    End,
}

impl Scrub {
    pub fn oldest(&self, none: u64) -> u64 {
        self.serial.unwrap_or(none)
    }
}

impl Stage {
    const fn map(generation: u64) -> Stage {
        Stage::Map { next: 0, last: None, generation, counts: Some(Counts { slots: 0, pages: 0, hash: 0 }) }
    }
}

impl Counts {
    fn add_leaf(&mut self, number: u64, leaf: &Leaf) {
        for (n, _) in leaf.slots.iter().enumerate().filter(|(_, slot)| !slot.place.is_none()) {
            self.slots += 1;
            self.hash = self.hash.wrapping_add(leaf.slot_hash(number, n));
        }
    }
}

impl Chunks {
    /// Begins a pass, or begins it again.
    pub fn scrub_from_start(&mut self) {
        self.scrub.at = self.groups.keys().next().map(|group| At { group: *group, stage: Stage::Header });
    }

    /// Takes the next step of the pass; [`RepairEvent::Scrubbed`] follows, unless the disk fails.
    ///
    /// # Panics
    /// Where a step is under way.
    pub fn scrub_step(&mut self) {
        assert!(self.scrub.serial.is_none(), "one step after the other");
        if self.failed {
            return;
        }
        self.scrub.serial = Some(self.next_read);
        self.next_read += 1;
        self.scrub.bytes = 0;
        self.advance_scrub();
        self.advance();
    }

    /// Goes on until something has to be waited for.
    fn advance_scrub(&mut self) {
        while self.scrub.waiting == 0 && self.scrub.bytes < STEP_BYTES {
            let Some(at) = self.scrub.at else { break };
            match at.stage {
                Stage::Header => self.scrub_header(at.group),
                Stage::State { next, crc, generation } => self.scrub_state(at.group, next, crc, generation),
                Stage::Map { next, last, generation, counts } => {
                    self.scrub_map(at.group, next, last, generation, counts);
                }
            }
        }
        if self.scrub.waiting == 0 && self.scrub.serial.take().is_some() {
            self.repair_events
                .push(RepairEvent::Scrubbed { bytes: self.scrub.bytes, finished: self.scrub.at.is_none() });
        }
    }

    fn scrub_on(&mut self, group: GroupId, stage: Stage) {
        self.scrub.at = Some(At { group, stage });
    }

    fn scrub_next_group(&mut self, group: GroupId) {
        let next = self.groups.range((Bound::Excluded(group), Bound::Unbounded)).next();
        self.scrub.at = next.map(|(group, _)| At { group: *group, stage: Stage::Header });
    }

    /// All of a map was seen.
    fn scrub_end(&mut self, group: GroupId, counts: Option<Counts>) {
        if let (Some(counts), Some(found)) = (counts, self.groups.get_mut(&group)) {
            // Where they were known, they are what is found: open has compared them, and commits keep them.
            found.header.counts.get_or_insert(counts);
        }
        self.scrub_next_group(group);
    }

    fn scrub_read(&mut self, offset: u64, length: usize, io: ScrubIo) {
        let id = self.ids.take();
        self.pending.insert(id, Pending::Scrub(io));
        self.ops.push(DeviceOp::Read { id, offset, length: length as u32, cached: false });
        self.scrub.waiting += 1;
        self.scrub.bytes += length as u64;
    }

    fn scrub_header(&mut self, group: GroupId) {
        let Some(found) = self.groups.get(&group).filter(|found| !found.deleting && !found.damaged) else {
            return self.scrub_next_group(group);
        };
        let header = &found.header;
        let generation = header.generation;
        let stage = match &header.state {
            StateHome::Inline(_) => Stage::map(generation),
            StateHome::Slots { .. } => Stage::State { next: 0, crc: 0, generation },
        };
        // Headers being written are as good as new.
        let offset = (!found.committing).then(|| self.layout.header_offset(header.entry, 0));
        self.scrub_on(group, stage);
        if let Some(offset) = offset {
            self.scrub_read(offset, 2 * BLOCK_BYTES, ScrubIo::Header { generation });
        }
    }

    fn scrub_state(&mut self, group: GroupId, next: usize, crc: u32, generation: u64) {
        let header = self.groups.get(&group).map(|found| &found.header).filter(|h| h.generation == generation);
        match header.map(|header| &header.state) {
            Some(StateHome::Slots { places, bytes, crc: expected }) => {
                if let Some(place) = places.get(next) {
                    let (offset, left) = (self.layout.offset(*place), *bytes as usize - next * SLOT_BYTES);
                    // Only whole blocks were written behind its end.
                    let length = left.min(SLOT_BYTES).next_multiple_of(BLOCK_BYTES);
                    self.scrub_read(offset, length, ScrubIo::State);
                    return;
                }
                if crc != *expected {
                    self.counters.corrupt_headers += 1;
                    self.want_checkpoint_for_mended(group);
                }
            }
            // A checkpoint has written another one.
            Some(StateHome::Inline(_)) | None => {}
        }
        let generation = self.groups.get(&group).map_or(0, |found| found.header.generation);
        self.scrub_on(group, Stage::map(generation));
    }

    fn scrub_map(&mut self, group: GroupId, next: u64, last: Option<u64>, generation: u64, mut counts: Option<Counts>) {
        let Some(found) = self.groups.get(&group).filter(|found| !found.deleting) else {
            return self.scrub_next_group(group);
        };
        let (root, replica) = (found.header.root, found.header.replica);
        if found.committing || found.header.generation != generation {
            counts = None;
        }
        let Some(at) = root.page else { return self.scrub_end(group, counts) };
        let id = PageId { group, replica, level: root.level, number: 0 };
        match self.next_leaf(id, at, next, &mut Vec::new()) {
            Next::Waits => self.scrub.waiting += 1,
            Next::End => self.scrub_end(group, counts),
            Next::Lost { number } => {
                self.tell_leaf_lost(group, number);
                self.scrub_on(group, Stage::Map { next: number + 1, last, generation, counts: None });
                // What it costs to fetch.
                self.scrub.bytes += LEAF_BLOCKS * BLOCK_BYTES as u64;
            }
            Next::Leaf { number, leaf, path } => {
                if let Some(counts) = &mut counts {
                    counts.add_leaf(number, leaf.leaf());
                }
                let lost = leaf.leaf().slots.iter().any(|slot| slot.lost != 0);
                for (id, at) in path {
                    let shift = FAN_OUT_BITS * u32::from(id.level);
                    if last.is_none_or(|last| last >> shift != number >> shift) {
                        if let Some(counts) = &mut counts {
                            counts.pages += 1;
                        }
                        let offset = self.layout.offset(at.place);
                        self.scrub_read(offset, BLOCK_BYTES, ScrubIo::Page { id, at, leaf: number });
                    }
                }
                let counts = counts.filter(|_| !lost);
                self.scrub_on(group, Stage::Map { next: number + 1, last: Some(number), generation, counts });
                self.scrub.waiting += 1;
                if self.start_read(group, number * LEAF_BLOCKS, LEAF_BLOCKS, Purpose::Scrub).is_err() {
                    self.scrub.waiting -= 1;
                }
            }
        }
    }

    /// The first leaf at or behind `from` below a page. Pages come from the cache: it is for finding the way.
    fn next_leaf(&mut self, id: PageId, at: PageRef, from: u64, path: &mut Vec<(PageId, PageRef)>) -> Next {
        let shift = FAN_OUT_BITS * u32::from(id.level);
        if (id.number + 1) << shift <= from {
            return Next::End;
        }
        if self.is_lost(at) {
            return Next::Lost { number: from.max(id.number << shift) };
        }
        let Some(page) = self.cache.get(at.place) else {
            self.read_page(id, at, Waiter::Scrub);
            return Next::Waits;
        };
        path.push((id, at));
        if id.level == 0 {
            return Next::Leaf { number: id.number, leaf: page, path: std::mem::take(path) };
        }
        for i in 0..FAN_OUT {
            let Some(child) = page.inner().children[i] else { continue };
            let below = PageId { level: id.level - 1, number: (id.number << FAN_OUT_BITS) + i as u64, ..id };
            match self.next_leaf(below, child.page, from, path) {
                Next::End => {}
                next => return next,
            }
        }
        path.pop();
        Next::End
    }

    /// A page that was needed to find the way is there, or lost.
    pub(super) fn on_scrub_page(&mut self) {
        self.scrub.waiting -= 1;
        self.advance_scrub();
    }

    pub(super) fn on_scrubbed_blocks(&mut self, blocks: u64) {
        self.scrub.bytes += blocks * BLOCK_BYTES as u64;
        self.scrub.waiting -= 1;
        self.advance_scrub();
    }

    pub(super) fn on_scrub_io(&mut self, io: ScrubIo, result: Result<Bytes, DeviceError>) {
        self.scrub.waiting -= 1;
        self.counters.read_errors += u64::from(result.is_err());
        let data = result.ok();
        match (io, self.scrub.at) {
            (ScrubIo::Header { generation }, Some(At { group, .. })) => self.check_headers(group, generation, data),
            (ScrubIo::State, Some(At { group, stage: Stage::State { next, crc, generation } })) => {
                let bytes = match self.groups.get(&group).map(|found| &found.header.state) {
                    Some(StateHome::Slots { bytes, .. }) => (*bytes as usize).saturating_sub(next * SLOT_BYTES),
                    _ => 0,
                };
                let crc = data.map_or(!crc, |data| crc32c::crc32c_append(crc, &data[..bytes.min(data.len())]));
                self.scrub_on(group, Stage::State { next: next + 1, crc, generation });
            }
            (ScrubIo::Page { id, at, leaf }, _) => self.check_page(id, at, leaf, data),
            (ScrubIo::Header { .. } | ScrubIo::State, _) => {}
        }
        self.advance_scrub();
    }

    /// Both copies of a header have to be valid, and one of them the last that was written.
    fn check_headers(&mut self, group: GroupId, generation: u64, data: Option<Bytes>) {
        let Some(found) = self.groups.get_mut(&group) else { return };
        if found.committing || found.header.generation != generation {
            return;
        }
        let entry = found.header.entry;
        let copies = data.map(|data| {
            let (even, odd) = data.split_at(BLOCK_BYTES);
            [Header::decode(&self.layout, entry, even), Header::decode(&self.layout, entry, odd)]
        });
        let whole = copies.is_some_and(|copies| {
            let generations = copies.map(|copy| match copy {
                Copy::Valid(header) => Some(header.generation),
                Copy::Unused | Copy::Invalid => None,
            });
            generations.iter().all(Option::is_some) && generations.contains(&Some(generation))
        });
        if !whole {
            found.heal_header = true;
            self.counters.corrupt_headers += 1;
            self.want_checkpoint_for_mended(group);
        }
    }

    fn check_page(&mut self, id: PageId, at: PageRef, leaf: u64, data: Option<Bytes>) {
        if data.is_some_and(|data| Page::decode(&self.layout, &id, at.crc, &data).is_ok()) {
            return;
        }
        self.counters.corrupt_pages += 1;
        if self.cache.get(at.place).is_some() {
            // Memory knows what it said: the next checkpoint writes it, and the way to it, to fresh places.
            self.rewrite_leaf(id.group, leaf);
            return;
        }
        self.bad_pages.insert(at.place);
        if id.level == 0 {
            self.tell_leaf_lost(id.group, id.number);
        }
    }

    fn rewrite_leaf(&mut self, group: GroupId, leaf: u64) {
        let Some(found) = self.groups.get_mut(&group).filter(|found| !found.installing) else { return };
        let blocks = found.mended.blocks_needed();
        found.mended.rewrite(leaf);
        self.reserved_blocks += found.mended.blocks_needed() - blocks;
        self.want_checkpoint_for_mended(group);
    }
}

const _: () = assert!(LEAF_BLOCKS < super::READ_BLOCKS_MAX as u64 && SLOT_BLOCKS < LEAF_BLOCKS);
