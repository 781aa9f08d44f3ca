//! Creations, checkpoints and deletions: whatever ends with the durable write of a group's header.
//!
//! The order of the steps and why it is safe stand at the module `chunk`. Planning goes leaf by leaf and stops
//! while many writes wait, so that a large layer neither stalls the shard nor fills memory: jobs refer to the overlay's
//! buffers and are copied, into aligned ones, only when they are submitted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::chunk::header::{Counts, Header};
use crate::chunk::layout::{Named, Place, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::overlay::{Content, Layer, Piece};
use crate::chunk::page::{Child, FAN_OUT_BITS, LEAF_BLOCKS, Leaf, Page, PageId, PageRef, Root};
use crate::chunk::space::state_slots;
use crate::chunk::walk::{Found, Waiter, Walk};
use crate::chunk::{Chunks, Pending};
use crate::device::BLOCK_BYTES;
use crate::group::StoreEvent;
use crate::ops::{AlignedBuffer, DeviceError, DeviceOp};

/// Planning pauses while more jobs than this wait to be submitted.
const JOBS_MAX: usize = 256;
/// Map pages looked up at the same time.
const WALKS_MAX: usize = 32;
/// Operations of a checkpoint in flight; few, because the WAL and reads share the disk.
const OPERATIONS_MAX: usize = 8;
/// Adjacent jobs are written together up to this many bytes.
const WRITE_BYTES_MAX: usize = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Create,
    Checkpoint,
    Delete,
}

/// The one under way, or one waiting.
#[derive(Debug)]
pub struct Commit {
    kind: Kind,
    /// What the header will say; root and counts are filled in by planning.
    header: Header,
    /// Reads below this serial number may still need blocks this commit overwrites.
    barrier: u64,
    stage: Stage,
    plan: Plan,
    jobs: VecDeque<Job>,
    copies: VecDeque<CopyJob>,
    /// In flight, but for headers and flushes.
    operations: usize,
    wrote: bool,
    /// Copies of the header still to be written. Creations and deletions write both, so that a single copy that
    /// rots neither hides a group nor brings a deleted one back.
    headers: u8,
    /// What only the previous checkpoint names.
    freed: Vec<Named>,
    /// What only the new one names.
    taken: Vec<Named>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    /// The intent is on its way; nothing may be overwritten before it is durable.
    Intent,
    Writing,
    Flushing,
    Header,
}

/// Which pages of the new map have been made, level by level.
#[derive(Debug, Default)]
struct Plan {
    level: u8,
    /// Level of the new root.
    top: u8,
    todo: BTreeSet<u64>,
    walking: usize,
    /// New references to pages of the level below, and of this one. `None`: the page is gone.
    below: BTreeMap<u64, Option<Child>>,
    done: BTreeMap<u64, Option<Child>>,
    finished: bool,
}

/// Bytes on their way to a place.
#[derive(Debug)]
pub struct Job {
    pub place: Place,
    pub data: Bytes,
}

/// A slot that may not be overwritten, on its way to a fresh one.
#[derive(Debug)]
pub struct CopyJob {
    from: Place,
    to: Place,
    /// New data by block within the slot.
    changed: Vec<(u64, Bytes)>,
}

/// What a completion of a commit is for.
#[derive(Debug)]
pub enum CommitIo {
    Intent,
    Write,
    Copy(CopyJob),
    Flush,
    Header,
}

impl Commit {
    pub fn new(kind: Kind, header: Header, jobs: VecDeque<Job>, barrier: u64) -> Commit {
        Commit {
            kind,
            header,
            barrier,
            stage: Stage::Queued,
            plan: Plan::default(),
            jobs,
            copies: VecDeque::new(),
            operations: 0,
            wrote: false,
            headers: if kind == Kind::Checkpoint { 1 } else { 2 },
            freed: Vec::new(),
            taken: Vec::new(),
        }
    }

    pub fn group(&self) -> GroupId {
        self.header.group
    }

    /// Overwrites nothing more before those reads have finished.
    pub fn wait_for_reads_below(&mut self, serial: u64) {
        self.barrier = self.barrier.max(serial);
    }

    fn count(&mut self, change: impl FnOnce(&mut Counts)) {
        if let Some(counts) = &mut self.header.counts {
            change(counts);
        }
    }

    fn is_written(&self) -> bool {
        self.plan.finished && self.jobs.is_empty() && self.copies.is_empty() && self.operations == 0
    }
}

impl Chunks {
    pub(super) fn advance_commit(&mut self) {
        let Some(mut commit) = self.commit.take().or_else(|| self.commits.pop_front()) else { return };
        if commit.stage == Stage::Queued {
            self.begin(&mut commit);
        }
        self.plan(&mut commit);
        if commit.stage == Stage::Writing && !self.failed {
            self.submit(&mut commit);
            if commit.is_written() && commit.wrote {
                commit.stage = Stage::Flushing;
                let id = self.ids.take();
                self.pending.insert(id, Pending::Commit(CommitIo::Flush));
                self.ops.push(DeviceOp::Flush { id });
            } else if commit.is_written() {
                // Nothing but the header changes, so there is nothing to flush before it.
                self.write_header(&mut commit);
            }
        }
        self.commit = Some(commit);
    }

    pub(super) fn on_commit_io(&mut self, io: CommitIo, result: Result<Bytes, DeviceError>) {
        let mut commit = self.commit.take().expect("an operation of a commit is in flight");
        match (io, result) {
            (CommitIo::Copy(job), result) => {
                self.counters.read_errors += u64::from(result.is_err());
                self.write_copy(&job, result.ok());
            }
            (_, Err(error)) => self.fail(error.to_string()),
            (CommitIo::Intent, Ok(_)) => commit.stage = Stage::Writing,
            (CommitIo::Write, Ok(_)) => commit.operations -= 1,
            (CommitIo::Flush, Ok(_)) => self.write_header(&mut commit),
            (CommitIo::Header, Ok(_)) => {
                commit.headers -= 1;
                if commit.headers == 0 {
                    self.finish(commit);
                    return;
                }
                self.write_header(&mut commit);
            }
        }
        self.commit = Some(commit);
    }

    pub(super) fn walk_for_commit(&mut self, walk: Walk) {
        let mut commit = self.commit.take().expect("a walk of a commit is under way");
        commit.plan.walking -= 1;
        self.look_up(&mut commit, walk);
        self.commit = Some(commit);
    }

    /// Sets out what there is to plan, and writes the intent where blocks may be overwritten.
    fn begin(&mut self, commit: &mut Commit) {
        let group = self.groups.get_mut(&commit.header.group).expect("a commit is of a group");
        commit.stage = Stage::Writing;
        commit.header.forget_below = group.header.forget_below;
        // A group that was cut short in a write-back before it was opened keeps its mark until a checkpoint passes it.
        let unsettled = group.header.write_back_to;
        commit.header.write_back_to = if unsettled > commit.header.index { unsettled } else { 0 };
        let Some(layer) = group.frozen.clone().filter(|layer| !layer.is_empty()) else {
            commit.plan.finished = true;
            return;
        };
        let root = group.header.root;
        let grown = layer.last_written_leaf().map_or(0, level_for);
        commit.plan.top = if root.page.is_some() { grown.max(root.level) } else { grown };
        commit.plan.todo = layer.leaves().clone();

        // Zeroes change the map alone.
        if layer.last_written_leaf().is_none() {
            return;
        }
        commit.stage = Stage::Intent;
        group.header.generation += 1;
        let mut intent = group.header.clone();
        intent.write_back_to = unsettled.max(layer.last_index());
        self.put_header(&intent, CommitIo::Intent);
    }

    fn plan(&mut self, commit: &mut Commit) {
        while !commit.plan.finished && !self.failed {
            while commit.plan.walking < WALKS_MAX && commit.jobs.len() + commit.copies.len() < JOBS_MAX && !self.failed
            {
                let Some(number) = commit.plan.todo.pop_first() else { break };
                let group = &self.groups[&commit.header.group];
                match Walk::new(group, group.header.root, commit.plan.level, number) {
                    Some(walk) => self.look_up(commit, walk),
                    None => self.plan_page(commit, number, &Found::Absent),
                }
            }
            if commit.plan.walking > 0 || !commit.plan.todo.is_empty() {
                return;
            }
            self.finish_level(commit);
        }
    }

    fn look_up(&mut self, commit: &mut Commit, walk: Walk) {
        let number = walk.number;
        match self.find(walk, |walk| Waiter::Commit { walk }) {
            Some(found) => self.plan_page(commit, number, &found),
            None => commit.plan.walking += 1,
        }
    }

    /// Makes the new version of a page of the level being planned, if it changes.
    fn plan_page(&mut self, commit: &mut Commit, number: u64, found: &Found) {
        let level = commit.plan.level;
        let (absent, lost) = (Page::empty(level), Page::lost(level));
        let (old, old_at) = match found {
            Found::Page { at, page } => (&**page, Some(*at)),
            Found::Absent => (&absent, None),
            Found::Lost { at } => (&lost, *at),
        };
        if matches!(found, Found::Lost { .. }) {
            commit.header.counts = None;
        }
        let new = if level == 0 {
            let Some(leaf) = self.plan_leaf(commit, number, old.leaf()) else { return };
            Page::Leaf(Box::new(leaf))
        } else {
            let mut inner = old.inner().clone();
            for (child, page) in commit.plan.below.range(number << FAN_OUT_BITS..(number + 1) << FAN_OUT_BITS) {
                inner.children[(child & 0xff) as usize] = *page;
            }
            Page::Inner(Box::new(inner))
        };
        if let Some(at) = old_at {
            commit.freed.push(Named::Page(at.place));
            commit.count(|counts| counts.pages -= 1);
        }
        if new.is_empty() {
            commit.plan.done.insert(number, None);
            return;
        }
        let Some(place) = self.allocator.take_page() else { return self.fail_for_space() };
        let Header { group, replica, .. } = commit.header;
        let data = new.encode(&PageId { group, replica, level, number }, commit.header.generation);
        let page = PageRef { place, crc: crc32c::crc32c(&data) };
        commit.plan.done.insert(number, Some(Child { page, index: new.index() }));
        commit.taken.push(Named::Page(place));
        commit.count(|counts| counts.pages += 1);
        commit.jobs.push_back(Job { place, data: Bytes::from(data) });
        // Nobody finds it before the header is durable, by when it is written.
        self.cache.insert(place, std::sync::Arc::new(new));
    }

    /// Gives every changed slot of a leaf its place and checksums. `None`: nothing changes.
    fn plan_leaf(&mut self, commit: &mut Commit, number: u64, old: &Leaf) -> Option<Leaf> {
        let group = &self.groups[&commit.header.group];
        let layer = group.frozen.clone().expect("what is planned is frozen");
        let mut leaf = old.clone();
        let first_slot = number * LEAF_BLOCKS / SLOT_BLOCKS;
        for (i, slot) in (first_slot..).take(leaf.slots.len()).enumerate() {
            let pieces = layer.range(slot * SLOT_BLOCKS..(slot + 1) * SLOT_BLOCKS);
            if !pieces.is_empty() {
                self.plan_slot(commit, &layer, &mut leaf, i, slot, &pieces);
                let (before, after) = (old.slot_hash(number, i), leaf.slot_hash(number, i));
                commit.count(|counts| counts.hash = counts.hash.wrapping_sub(before).wrapping_add(after));
            }
            let entry = &mut leaf.slots[i];
            if entry.present == 0 && entry.index < commit.header.forget_below {
                entry.index = 0;
            }
        }
        (leaf != *old).then_some(leaf)
    }

    fn plan_slot(
        &mut self,
        commit: &mut Commit,
        layer: &Layer,
        leaf: &mut Leaf,
        i: usize,
        slot: u64,
        pieces: &[Piece],
    ) {
        let (mut written, mut zeroed) = (0u16, 0u16);
        let mut changed = Vec::new();
        let entry = &mut leaf.slots[i];
        for piece in pieces {
            for n in 0..piece.count as usize {
                let block = (piece.first + n as u64) % SLOT_BLOCKS;
                let checksum = match &piece.content {
                    Content::Data { checksums, checksum, .. } => {
                        written |= 1 << block;
                        checksums[checksum + n]
                    }
                    Content::Zero => {
                        zeroed |= 1 << block;
                        0
                    }
                };
                leaf.checksums[i * SLOT_BLOCKS as usize + block as usize] = checksum;
            }
            if let Content::Data { data, .. } = &piece.content {
                changed.push((piece.first % SLOT_BLOCKS, data.clone()));
            }
        }
        // Zeroing what no replica ever held is no change. What this layer wrote and zeroed again is one, for another
        // replica may have had a checkpoint in between: without a tombstone a delta would leave it the old bytes.
        if written == 0 && entry.place.is_none() && entry.lost == 0 && !layer.has_written(slot) {
            return;
        }
        let old = *entry;
        entry.index = pieces.iter().map(|piece| piece.index).max().unwrap_or(entry.index);
        entry.present = old.present & !zeroed | written;
        entry.lost &= !(zeroed | written);
        if entry.present == 0 {
            entry.place = Place::NONE;
        } else if old.place.is_none() || written != 0 && self.is_shared(commit.header.group, old.place) {
            let Some(place) = self.allocator.take_slot() else { return self.fail_for_space() };
            entry.place = place;
            commit.taken.push(Named::Slot(place));
            commit.count(|counts| counts.slots += 1);
        }
        let (kept, place) = (old.present & entry.present & !written, entry.place);
        if !old.place.is_none() && old.place != place {
            commit.freed.push(Named::Slot(old.place));
            commit.count(|counts| counts.slots -= 1);
        }
        if old.place != place && kept != 0 {
            commit.copies.push_back(CopyJob { from: old.place, to: place, changed });
        } else {
            let jobs = changed.into_iter().map(|(block, data)| Job { place: Place(place.0 + block), data });
            commit.jobs.extend(jobs);
        }
    }

    /// Whether a slot must not be overwritten although the group's own map names it: a frozen map does too.
    fn is_shared(&self, group: GroupId, place: Place) -> bool {
        let latest = self.groups[&group].freezes.last();
        latest.is_some_and(|freeze| !freeze.fresh.contains(&Named::Slot(place)))
    }

    fn finish_level(&mut self, commit: &mut Commit) {
        let Header { root, index, .. } = self.groups[&commit.header.group].header;
        let plan = &mut commit.plan;
        if plan.done.is_empty() {
            plan.finished = true;
            return;
        }
        if plan.level == root.level && plan.level < plan.top && root.page.is_some() {
            // The map grows: the old root, where it was not itself rewritten, becomes the first child.
            plan.done.entry(0).or_insert(root.page.map(|page| Child { page, index }));
        }
        if plan.level == plan.top {
            assert_eq!(plan.done.len(), 1, "one page covers the map");
            commit.header.root = match plan.done[&0] {
                Some(child) => Root { page: Some(child.page), level: plan.top },
                None => Root::default(),
            };
            plan.finished = true;
            return;
        }
        plan.below = std::mem::take(&mut plan.done);
        plan.todo = plan.below.keys().map(|number| number >> FAN_OUT_BITS).collect();
        plan.level += 1;
    }

    fn submit(&mut self, commit: &mut Commit) {
        if self.reads.first_key_value().is_some_and(|(serial, _)| *serial < commit.barrier) {
            return;
        }
        while commit.operations < OPERATIONS_MAX {
            if let Some(job) = commit.copies.pop_front() {
                let id = self.ids.take();
                let offset = self.layout.offset(job.from);
                self.pending.insert(id, Pending::Commit(CommitIo::Copy(job)));
                self.ops.push(DeviceOp::Read { id, offset, length: SLOT_BYTES as u32 });
            } else if let Some(Job { place, data }) = commit.jobs.pop_front() {
                let mut buffer = AlignedBuffer::padded(&data);
                while let Some(next) = commit.jobs.front()
                    && next.place.0 == place.0 + (buffer.len() / BLOCK_BYTES) as u64
                    && buffer.len() + next.data.len() <= WRITE_BYTES_MAX
                {
                    buffer.extend_from_slice(&next.data);
                    buffer.pad_to_block();
                    commit.jobs.pop_front();
                }
                self.write(place, buffer);
            } else {
                return;
            }
            commit.operations += 1;
            commit.wrote = true;
        }
    }

    fn write(&mut self, place: Place, data: AlignedBuffer) {
        let id = self.ids.take();
        self.pending.insert(id, Pending::Commit(CommitIo::Write));
        self.ops.push(DeviceOp::Write { id, offset: self.layout.offset(place), data, durable: false });
    }

    /// Blocks are copied as they are, with the checksums the map has for them: a corrupt one stays corrupt, and one
    /// that could not be read becomes so.
    fn write_copy(&mut self, job: &CopyJob, old: Option<Bytes>) {
        let mut buffer = AlignedBuffer::zeroed(SLOT_BYTES);
        if let Some(old) = old {
            assert_eq!(old.len(), SLOT_BYTES, "a read completes in full");
            buffer.copy_from_slice(&old);
        }
        for (block, data) in &job.changed {
            let start = *block as usize * BLOCK_BYTES;
            buffer[start..start + data.len()].copy_from_slice(data);
        }
        self.write(job.to, buffer);
    }

    fn write_header(&mut self, commit: &mut Commit) {
        commit.stage = Stage::Header;
        let group = self.groups.get_mut(&commit.header.group).expect("a commit is of a group");
        group.header.generation += 1;
        commit.header.generation = group.header.generation;
        self.put_header(&commit.header, CommitIo::Header);
    }

    fn put_header(&mut self, header: &Header, io: CommitIo) {
        let id = self.ids.take();
        self.pending.insert(id, Pending::Commit(io));
        let offset = self.layout.header_offset(header.entry, header.generation);
        let data = AlignedBuffer::padded(&header.encode());
        self.ops.push(DeviceOp::Write { id, offset, data, durable: true });
    }

    /// The header is durable: what it no longer names can go.
    fn finish(&mut self, commit: Commit) {
        let header = commit.header;
        let (id, replica) = (header.group, header.replica);
        let group = self.groups.get_mut(&id).expect("a commit is of a group");
        group.committing = false;
        let mut freed = group.settle(commit.taken, commit.freed);
        freed.extend(state_slots(&group.header.state));
        match commit.kind {
            Kind::Create => {
                group.header = header;
                self.events.push(StoreEvent::GroupCreated { group: id, replica });
            }
            Kind::Checkpoint => {
                let layer = group.frozen.take().expect("a checkpoint has frozen a layer");
                self.reserved_blocks -= layer.blocks_needed();
                // Of a group that was not asked, what was applied meanwhile counts already.
                if std::mem::take(&mut group.wanted) {
                    self.unasked_bytes += group.active.bytes();
                }
                let index = header.index;
                let forget_below = group.header.forget_below;
                group.header = header;
                group.header.forget_below = forget_below;
                self.events.push(StoreEvent::CheckpointDone { group: id, index });
            }
            Kind::Delete => {
                let mut group = self.groups.remove(&id).expect("it was found above");
                freed.extend(group.freezes.drain(..).flat_map(|freeze| freeze.dead));
                let promised: u64 = group.promised.values().sum();
                self.reserved_blocks -= promised + group.active.blocks_needed();
                self.unasked_bytes -= if group.wanted { 0 } else { group.active.bytes() };
                self.entries.insert(header.entry, header.generation);
                self.drop_map(&group);
                self.events.push(StoreEvent::GroupDeleted { group: id, replica });
            }
        }
        self.free_later(freed);
    }

    fn fail_for_space(&mut self) {
        // Promises are made before appends are accepted, so this is a promise that was not asked for.
        self.fail("a checkpoint found no space that was promised to it".to_owned());
    }
}

/// Lowest level of a root that covers a leaf.
fn level_for(leaf: u64) -> u8 {
    (0..).find(|level| leaf >> (FAN_OUT_BITS * u32::from(*level)) == 0).expect("a block number bounds the level")
}
