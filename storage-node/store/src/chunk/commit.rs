//! Creations, checkpoints and deletions: whatever ends with the durable write of a group's header.
//!
//! The order of the steps and why it is safe stand at the module `chunk`. Planning goes leaf by leaf and stops
//! while many writes wait, so that a large layer neither stalls the shard nor fills memory: jobs refer to the overlay's
//! buffers and are copied, into aligned ones, only when they are submitted.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use holdfast_id::GroupId;
use holdfast_planted::Bug;

use crate::chunk::header::{Counts, Header};
use crate::chunk::layout::{Named, Place, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::plan::{Plan, level_for};
use crate::chunk::snapshot::{Snapshot, table_slot};
use crate::chunk::space::state_slots;
use crate::chunk::{Chunks, Pending};
use crate::device::BLOCK_BYTES;
use crate::group::StoreEvent;
use crate::ops::{AlignedBuffer, DeviceError, DeviceOp};

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
    pub header: Header,
    /// Reads below this serial number may still need blocks this commit overwrites.
    barrier: u64,
    stage: Stage,
    pub plan: Plan,
    pub jobs: VecDeque<Job>,
    pub copies: VecDeque<CopyJob>,
    /// In flight, but for headers and flushes.
    operations: usize,
    wrote: bool,
    /// Copies of the header still to be written. Creations and deletions write both, so that a single copy that
    /// rots neither hides a group nor brings a deleted one back.
    headers: u8,
    /// What only the previous checkpoint names.
    pub freed: Vec<Named>,
    /// What only the new one names.
    pub taken: Vec<Named>,
    /// Homes of payloads that the new map names.
    pub adopted: BTreeSet<Place>,
    /// Places born up to it are named by snapshots too.
    shared_to: Option<u32>,
    /// What it makes is kept as a snapshot, with this position and state.
    pub snapshot: Option<(Bytes, Bytes)>,
    /// Slots taken for the table of snapshots and the state of a new one, and not used yet.
    pub table: Vec<Place>,
    /// What the new table says, where it is another.
    pub snapshots: Option<Vec<Snapshot>>,
    table_planned: bool,
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

/// Bytes on their way to a place.
#[derive(Debug)]
pub struct Job {
    pub place: Place,
    pub data: Bytes,
}

/// A slot that may not be overwritten, on its way to a fresh one.
#[derive(Debug)]
pub struct CopyJob {
    /// Its number in the group.
    pub slot: u64,
    pub from: Place,
    pub to: Place,
    /// Bit i: block i is copied.
    pub kept: u16,
    /// Of the new slot, by block.
    pub checksums: Vec<u32>,
    /// New data by block within the slot.
    pub changed: Vec<(u64, Bytes)>,
}

/// What a completion of a commit is for.
#[derive(Debug)]
pub enum CommitIo {
    Intent,
    Write,
    Copy(CopyJob),
    /// Of one block, given by its number in the slot: the operation for the whole of it failed.
    CopyBlock(CopyJob, u64),
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
            adopted: BTreeSet::new(),
            shared_to: None,
            snapshot: None,
            table: Vec::new(),
            snapshots: None,
            table_planned: kind != Kind::Checkpoint,
        }
    }

    pub fn group(&self) -> GroupId {
        self.header.group
    }

    /// Overwrites nothing more before those reads have finished.
    pub fn wait_for_reads_below(&mut self, serial: u64) {
        self.barrier = self.barrier.max(serial);
    }

    pub fn count(&mut self, change: impl FnOnce(&mut Counts)) {
        if let Some(counts) = &mut self.header.counts {
            change(counts);
        }
    }

    /// Whether a snapshot names what was born in that era and is in the group's map.
    pub fn is_shared(&self, born: u32) -> bool {
        self.shared_to.is_some_and(|era| born <= era)
    }

    /// The new map does not name it any more. `born`: `None` where that cannot be read.
    pub fn free(&mut self, named: Named, born: Option<u32>) {
        let shared = born.map_or(self.shared_to.is_some(), |born| self.is_shared(born));
        if !shared || holdfast_planted::is(Bug::FreeSnapshotSlot) {
            self.freed.push(named);
        }
    }

    /// Not only the one that is not in force.
    pub fn write_both_headers(&mut self) {
        self.headers = 2;
    }

    fn is_written(&self) -> bool {
        self.table_planned && self.jobs.is_empty() && self.copies.is_empty() && self.operations == 0
    }
}

impl Chunks {
    pub(super) fn advance_commit(&mut self) {
        let Some(mut commit) = self.commit.take().or_else(|| self.commits.pop_front()) else { return };
        if commit.stage == Stage::Queued {
            self.begin(&mut commit);
        }
        self.plan(&mut commit);
        if commit.plan.finished && !std::mem::replace(&mut commit.table_planned, true) {
            self.plan_table(&mut commit);
        }
        if commit.stage == Stage::Writing && !self.failed {
            self.submit(&mut commit);
            if commit.is_written() && commit.wrote && !holdfast_planted::is(Bug::SkipSlotFlush) {
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
            (CommitIo::Copy(job), Ok(old)) => self.write_copy(commit.header.group, &job, &old),
            (CommitIo::Copy(job), Err(_)) => {
                self.counters.read_errors += 1;
                commit.operations -= 1;
                self.copy_block_by_block(&mut commit, job);
            }
            (CommitIo::CopyBlock(job, block), Ok(data)) => {
                self.check_copy(commit.header.group, &job, block, &data);
                self.write(Place(job.to.0 + block), AlignedBuffer::padded(&data));
            }
            (CommitIo::CopyBlock(job, _), Err(_)) => {
                // The fresh place holds something else, which does not match the checksum either.
                self.counters.read_errors += 1;
                self.counters.corrupt_blocks += 1;
                self.tell_corrupt(commit.header.group, vec![job.slot]);
                commit.operations -= 1;
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

    /// Sets out what there is to plan, and writes the intent where blocks may be overwritten.
    fn begin(&mut self, commit: &mut Commit) {
        let group = self.groups.get_mut(&commit.header.group).expect("a commit is of a group");
        commit.stage = Stage::Writing;
        commit.header.forget_below = group.header.forget_below;
        commit.shared_to = group.shared_to();
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

        // Zeroes change the map alone, and installed slots go to fresh places.
        if layer.last_written_leaf().is_none() || layer.has_installed() {
            return;
        }
        commit.stage = Stage::Intent;
        group.header.generation += 1;
        let mut intent = group.header.clone();
        intent.write_back_to = unsettled.max(layer.last_index());
        self.put_header(&intent, CommitIo::Intent);
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
                self.ops.push(DeviceOp::Read { id, offset, length: SLOT_BYTES as u32, cached: false });
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
        self.ops.push(DeviceOp::Write { id, offset: self.layout.offset(place), data: data.into(), durable: false });
    }

    /// Blocks are copied as they are, with the checksums the map has for them: a corrupt one stays corrupt until it
    /// is repaired.
    fn write_copy(&mut self, group: GroupId, job: &CopyJob, old: &Bytes) {
        assert_eq!(old.len(), SLOT_BYTES, "a read completes in full");
        for (block, data) in (0..).zip(old.chunks_exact(BLOCK_BYTES)) {
            if job.kept & (1 << block) != 0 {
                self.check_copy(group, job, block, data);
            }
        }
        let mut buffer = AlignedBuffer::padded(old);
        for (block, data) in &job.changed {
            let start = *block as usize * BLOCK_BYTES;
            buffer[start..start + data.len()].copy_from_slice(data);
        }
        self.write(job.to, buffer);
    }

    fn check_copy(&mut self, group: GroupId, job: &CopyJob, block: u64, data: &[u8]) {
        if holdfast_block::checksum(data) != job.checksums[block as usize] {
            self.counters.corrupt_blocks += 1;
            self.tell_corrupt(group, vec![job.slot]);
        }
    }

    /// A sector that cannot be read takes none of its neighbours with it.
    fn copy_block_by_block(&mut self, commit: &mut Commit, mut job: CopyJob) {
        for (block, data) in std::mem::take(&mut job.changed) {
            commit.jobs.push_back(Job { place: Place(job.to.0 + block), data });
        }
        for block in (0..SLOT_BLOCKS).filter(|block| job.kept & (1 << block) != 0) {
            let CopyJob { slot, from, to, kept, .. } = job;
            let one = CopyJob { slot, from, to, kept, checksums: job.checksums.clone(), changed: Vec::new() };
            let id = self.ids.take();
            let offset = self.layout.offset(Place(from.0 + block));
            self.pending.insert(id, Pending::Commit(CommitIo::CopyBlock(one, block)));
            self.ops.push(DeviceOp::Read { id, offset, length: BLOCK_BYTES as u32, cached: false });
            commit.operations += 1;
        }
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
        let data = AlignedBuffer::padded(&header.encode()).into();
        self.ops.push(DeviceOp::Write { id, offset, data, durable: true });
    }

    /// The header is durable: what it no longer names can go.
    fn finish(&mut self, commit: Commit) {
        let header = commit.header;
        let (id, replica) = (header.group, header.replica);
        let group = self.groups.get_mut(&id).expect("a commit is of a group");
        group.committing = false;
        group.taking = None;
        let mut freed = group.settle(commit.taken, commit.freed);
        if header.state != group.header.state {
            freed.extend(state_slots(&group.header.state));
        }
        if header.table != group.header.table {
            freed.extend(table_slot(group.header.table));
        }
        assert!(commit.table.is_empty(), "what was taken for snapshots is used");
        match commit.kind {
            Kind::Create => {
                group.header = header;
                self.events.push(StoreEvent::GroupCreated { group: id, replica });
            }
            Kind::Checkpoint => {
                let layer = group.frozen.take().expect("a checkpoint has frozen a layer");
                self.reserved_blocks -= layer.blocks_needed();
                let (passed, orphans) = group.pass_payloads(header.index, &commit.adopted);
                self.held_slots -= passed;
                self.orphans.extend(orphans);
                // Of a group that was not asked, what was applied meanwhile counts already.
                if std::mem::take(&mut group.wanted) {
                    self.unasked_bytes += group.active.bytes();
                }
                let index = header.index;
                let forget_below = group.header.forget_below;
                if header.installing == 0 {
                    (group.installing, group.installing_to) = (false, 0);
                }
                group.header = header;
                group.header.forget_below = forget_below;
                let mended = !group.mended.is_empty();
                self.pass_promises(id, index);
                if let Some(snapshots) = commit.snapshots {
                    self.put_snapshots(id, snapshots);
                }
                self.start_next_cut(id);
                self.events.push(StoreEvent::CheckpointDone { group: id, index });
                if mended {
                    self.want_checkpoint_for_mended(id);
                }
                self.want_checkpoint_for_doomed(id);
            }
            Kind::Delete => {
                let mut group = self.groups.remove(&id).expect("it was found above");
                freed.extend(group.freezes.drain(..).flat_map(|freeze| freeze.dead));
                let promised: u64 = group.promised.values().sum();
                self.reserved_blocks -= promised + group.active.blocks_needed() + group.mended.blocks_needed();
                self.promised_blocks -= promised + group.promised_before.values().sum::<u64>();
                let held = group.drop_payloads(0);
                self.held_slots -= held.len() as u64;
                self.orphans.extend(held);
                self.mended_bytes -= group.mended.bytes();
                self.unasked_bytes -= if group.wanted { 0 } else { group.active.bytes() };
                self.entries.insert(header.entry, header.generation);
                self.drop_maps(&group);
                self.events.push(StoreEvent::GroupDeleted { group: id, replica });
            }
        }
        self.free_later(freed);
    }
}
