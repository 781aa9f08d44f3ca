//! Where the blocks of groups live: slots, maps, checkpoints and the allocator of one disk.
//!
//! Not here: the log. Chunks hold what the log up to the checkpoint said; the WAL holds the rest, and this module
//! relies on it: records above a group's checkpoint are kept until [`StoreEvent::CheckpointDone`], and their entries
//! are applied here only once they are committed and flushed on this disk.
//!
//! Driven by the store's facade: calls and completions go in, operations and events come out. Only `format` and
//! `open` block. The same calls in the same order give the same operations.
//!
//! # What a checkpoint does, and why every crash is survived
//!
//! Let P be the checkpoint the durable header names, and N the one being made. Everything applied in (P, N] is in
//! the frozen layer of the overlay; what is applied meanwhile goes to the active layer.
//!
//! 1. *Intent*: the header of P is written again, durably, to the other copy, with `write_back_to` = W, the index of
//!    the last change in the frozen layer.
//! 2. *Write back*: each changed block goes to its slot. A slot that P does not name is fresh. In a slot that P does
//!    name the block is overwritten in place. Map pages and a long state go to fresh places, always.
//!    A slot all of whose data an append has put into a slot of its own is not written: N's map adopts that one, which
//!    the records in (P, N] name and P does not; see `payload`.
//! 3. *Flush*. Data and pages may share it: nothing durable names the pages yet.
//! 4. *Header*: that of N goes, durably, to the copy that does not hold the intent.
//! 5. What only P named is freed, and the frozen layer forgotten.
//!
//! A crash before 4 is durable leaves P's header, from before 1 or from 1 (a torn write of one copy leaves the other).
//! P's pages and its slots are all still there, since nothing is freed before 5. Of their blocks only those that are
//! present in P's map and changed by records in (P, W] may hold something else: the old bytes, the new ones, or a
//! mixture. Those records are in the WAL, flushed before they were applied, and not released before `CheckpointDone`.
//! Replaying them puts every such block into the overlay, which hides the slot. So the state after a replay up to
//! any index >= W is exact. Between P and W it is not, and `write_back_to` is there to know that: reads are refused
//! with [`ReadError::Behind`](crate::group::ReadError::Behind) until W is applied again. Every record up to W was committed before the crash, so the
//! caller may take W as a lower bound of the group's commit index and replay up to it without asking anyone. A checkpoint
//! between P and W after such a restart carries W on. Where the WAL has lost a record of (P, W], a delta from P
//! repairs the replica, for the sender's map has each of the slots in doubt as changed above P.
//!
//! A crash after 4 leaves N. Its blocks and pages were flushed in 3, adopted ones before their entries were applied; what
//! P alone named is free at open, because open takes as named only what the headers in force name, and records of the WAL
//! above them.
//!
//! A block that P's map holds as absent (zero, discarded) is written in place without harm: nobody reads it through P.
//!
//! In-place writes cost one more 4 KiB write per checkpoint (the intent); the alternative, a fresh slot for every
//! changed slot, costs up to fifteen times the bytes for random 4 KiB writes.
//!
//! # Readers
//!
//! A read takes the overlay's pieces and the durable root when it is called, so it is one point in time. Two rules keep
//! what it goes on to fetch from changing under it: blocks are overwritten only after every read from before the
//! layer was frozen has finished (reads from after it find those blocks in the layer), and what a checkpoint frees is
//! reused only after every read from before its header was durable has finished. What a frozen map names is never
//! overwritten, and after a thaw the first rule holds for reads of the frozen map too.
//!
//! # Corruption
//!
//! Every page, state and block is checked against a checksum that lies elsewhere. A page that fails is lost: blocks
//! below it read as [`ReadError::Corrupt`](crate::group::ReadError::Corrupt) until they are overwritten, also across later checkpoints, which write
//! *lost* marks into the new pages. Its place is never trusted again while the disk is open, and slots it named
//! are not found at the next open; they may be reused then, which is harmless, for nothing leads to them any more.

mod allocator;
mod cache;
mod commit;
mod difference;
mod frozen;
mod header;
mod install;
mod layout;
mod open;
mod overlay;
mod page;
mod payload;
mod plan;
mod read;
mod repair;
mod scrub;
mod snapshot;
mod space;
mod walk;

pub use install::SLOT_NUMBERS_MAX;

pub use frozen::{CHANGES_MAX, Changes, ChangesAnswer, FREEZES_MAX, Frozen, FrozenId, Kept, SlotChange};
pub use repair::{MENDED_BYTES_MAX, Mending, RepairEvent, SlotCopy};
pub use snapshot::{SNAPSHOTS_MAX, SnapshotInfo};
pub use space::blocks_for_payload;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId};

use crate::chunk::allocator::Allocator;
use crate::chunk::cache::PageCache;
use crate::chunk::commit::{Commit, CommitIo, Kind};
use crate::chunk::difference::Difference;
use crate::chunk::frozen::{Freeze, Question};
use crate::chunk::header::{Counts, Header, StateHome};
pub use crate::chunk::layout::GROUPS_MAX;
pub(crate) use crate::chunk::layout::Place;
use crate::chunk::layout::{Layout, Named};
use crate::chunk::overlay::Layer;
pub use crate::chunk::page::INDEX_MAX;
use crate::chunk::page::{BLOCKS_MAX, Root};
use crate::chunk::payload::Homes;
use crate::chunk::read::ReadState;
use crate::chunk::repair::Mend;
use crate::chunk::scrub::{Scrub, ScrubIo};
use crate::chunk::snapshot::{Cut, Snapshot};
use crate::chunk::walk::PageRead;
use crate::device::BLOCK_BYTES;
use crate::group::{
    Damage, GroupState, HARD_STATE_BYTES_MAX, Mutation, POSITION_BYTES_MAX, STATE_BYTES_MAX, StoreError, StoreEvent,
};
use crate::ops::{DeviceError, DeviceOp, OpId, OpIds};

/// Most blocks of one read: the longest request.
pub const READ_BLOCKS_MAX: u32 = 257;
/// Most blocks of one [`Mutation::Zero`]: 64 MiB, the longest discard.
pub const ZERO_BLOCKS_MAX: u64 = 1 << 14;

/// Bounds of memory. They change nothing about what is read or what lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A group whose overlay is larger is asked for a checkpoint. The hard bound is the WAL: what is in the overlay
    /// is in records it cannot release, and it refuses appends when it is full.
    pub group_overlay_bytes: u64,
    /// As above, for all groups together: the largest one is asked.
    pub overlay_bytes: u64,
    /// Decoded map pages kept; a leaf takes about 1.5 KiB, one of the few inner pages 8 KiB.
    pub cached_pages: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { group_overlay_bytes: 32 << 20, overlay_bytes: 96 << 20, cached_pages: 32 << 10 }
    }
}

/// A group as its last checkpoint left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointedGroup {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub index: u64,
    /// WAL batches up to it hold no newer hard state of this group.
    pub wal_sequence: u64,
    /// Records up to here were committed; none of the group's blocks is readable before they are applied again.
    /// At or below `index`: nothing of that kind.
    pub write_back_to: u64,
    /// See [`crate::group::RecoveredGroup`].
    pub installing: u64,
    pub state: GroupState,
    /// Equal on every replica whose checkpoint has this index. `None`: parts of the map are lost.
    pub map_hash: Option<u128>,
    pub damage: Option<Damage>,
}

/// What was found broken since open, each time it was met, and what was repaired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub corrupt_blocks: u64,
    pub corrupt_pages: u64,
    pub read_errors: u64,
    /// Blocks taken from another replica in place of corrupt ones.
    pub repaired_blocks: u64,
    /// Headers and states of groups that did not match what was last written there; they are written again.
    pub corrupt_headers: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Chunks {
    layout: Layout,
    limits: Limits,
    ids: OpIds,
    groups: BTreeMap<GroupId, Group>,
    /// Unused entries of the group table, with the last generation written there.
    entries: BTreeMap<u32, u64>,
    damaged_entries: Vec<u32>,
    allocator: Allocator,
    /// Blocks promised to appends and to layers that are not written back.
    reserved_blocks: u64,
    /// Blocks promised to entries above their group's checkpoint, applied or not: what a restart would promise.
    promised_blocks: u64,
    /// Slots held for such entries.
    held_slots: u64,
    /// Overlay of the groups that were not asked for a checkpoint since their last one.
    unasked_bytes: u64,
    cache: PageCache,
    /// Pages that were unreadable once.
    bad_pages: BTreeSet<Place>,
    page_reads: BTreeMap<Place, PageRead>,
    /// By serial number, which rises.
    reads: BTreeMap<u64, ReadState>,
    next_read: u64,
    /// One at a time per disk; a header written while another group's data is written back would only be slower.
    commit: Option<Commit>,
    commits: VecDeque<Commit>,
    /// Free once every read with a serial number below the first has finished.
    frees: VecDeque<(u64, Vec<Named>)>,
    /// What deleted maps name, on its way back to the allocator.
    drops: VecDeque<Difference>,
    /// Groups whose next cut waits for its turn, or for space.
    waiting_cuts: BTreeSet<GroupId>,
    /// Slots that were held for records and are not any more; see [`Chunks::take_orphans`].
    orphans: Vec<Place>,
    next_frozen: u64,
    /// By serial number, from the same count as reads.
    questions: BTreeMap<u64, Question>,
    changes: Vec<ChangesAnswer>,
    /// By serial number, from the same count as reads.
    mends: BTreeMap<u64, Mend>,
    mended_bytes: u64,
    repair_events: Vec<RepairEvent>,
    scrub: Scrub,
    pending: BTreeMap<OpId, Pending>,
    ops: Vec<DeviceOp>,
    events: Vec<StoreEvent>,
    counters: Counters,
    failed: bool,
}

/// What a completion is for.
#[derive(Debug)]
enum Pending {
    Page(Place),
    Blocks { read: u64, first_block: u64, offset: u64 },
    Scrub(ScrubIo),
    Commit(CommitIo),
}

#[derive(Debug)]
struct Group {
    /// What the durable header says, but for a damaged group, whose map is treated as lost.
    header: Header,
    active: Layer,
    /// Being written back, or waiting for it.
    frozen: Option<Arc<Layer>>,
    /// Waiting to be written back after it, the oldest first.
    cuts: VecDeque<Cut>,
    /// The snapshot that the checkpoint under way makes.
    taking: Option<u64>,
    /// As the durable header names them, the oldest first.
    snapshots: Vec<Snapshot>,
    /// By snapshot: the index of its deletion, above the last checkpoint.
    doomed: BTreeMap<u64, u64>,
    /// Taken from other replicas, since the last checkpoint; lies below both layers.
    mended: Layer,
    /// The next checkpoint writes both copies of the header, for one of them has rotted.
    heal_header: bool,
    /// Index of the last applied entry.
    applied: u64,
    /// Blocks promised to appended entries that are not applied yet, by their index.
    promised: BTreeMap<u64, u64>,
    /// What was promised to applied entries above the checkpoint.
    promised_before: BTreeMap<u64, u64>,
    /// Slots that records above the checkpoint name, by their index.
    payloads: BTreeMap<u64, Homes>,
    /// The oldest first.
    freezes: Vec<Freeze>,
    /// A creation, checkpoint or deletion is under way or queued.
    committing: bool,
    deleting: bool,
    /// `CheckpointWanted` was told since the last `CheckpointDone`.
    wanted: bool,
    damaged: bool,
    /// Slots of a delta are in the map or on their way there; see [`install`].
    installing: bool,
    /// No slot of a delta has a higher index.
    installing_to: u64,
}

impl Group {
    fn new(header: Header) -> Group {
        Group {
            applied: header.index,
            header,
            active: Layer::default(),
            frozen: None,
            cuts: VecDeque::new(),
            taking: None,
            snapshots: Vec::new(),
            doomed: BTreeMap::new(),
            mended: Layer::default(),
            heal_header: false,
            promised: BTreeMap::new(),
            promised_before: BTreeMap::new(),
            payloads: BTreeMap::new(),
            freezes: Vec::new(),
            committing: false,
            deleting: false,
            wanted: false,
            damaged: false,
            installing: false,
            installing_to: 0,
        }
    }
}

impl Chunks {
    /// Index of the last checkpoint, and the hash of its map, which is equal on every replica with a checkpoint at that
    /// index. `None`: no such group, or parts of its map are lost.
    pub fn map_hash(&self, group: GroupId) -> Option<(u64, u128)> {
        let found = self.groups.get(&group).filter(|found| !found.installing)?;
        let header = &found.header;
        header.counts.map(|counts| (header.index, counts.hash))
    }

    pub(crate) fn checkpoint_index(&self, group: GroupId) -> Option<u64> {
        self.groups.get(&group).map(|found| found.header.index)
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Entries of the group table none of whose copies can be read: a group of this disk that cannot be named.
    pub fn damaged_entries(&self) -> &[u32] {
        &self.damaged_entries
    }

    /// Makes an empty group at index 0; [`StoreEvent::GroupCreated`] follows when it is durable.
    pub fn create_group(&mut self, group: GroupId, replica: ReplicaId, initial: GroupState) -> Result<(), StoreError> {
        self.check_running()?;
        check_state(&initial)?;
        if self.groups.contains_key(&group) {
            return Err(StoreError::GroupExists);
        }
        let (entry, generation) = match self.entries.first_key_value() {
            Some((entry, generation)) => (*entry, *generation),
            None => return Err(StoreError::Full),
        };
        let (state, jobs) = self.place_state(&initial.state)?;
        self.entries.remove(&entry);
        let header = Header {
            group,
            replica,
            deleted: false,
            entry,
            generation,
            index: 0,
            wal_sequence: 0,
            write_back_to: 0,
            root: Root::default(),
            counts: Some(Counts::default()),
            forget_below: 0,
            installing: 0,
            era: 1,
            table: None,
            hard_state: initial.hard_state,
            position: initial.position,
            state,
        };
        let mut created = Group::new(header.clone());
        created.committing = true;
        // Until the header is durable the group has no state of its own that a second commit would have to free.
        created.header.state = StateHome::Inline(Bytes::new());
        self.groups.insert(group, created);
        self.commits.push_back(Commit::new(Kind::Create, header, jobs, self.next_read));
        self.advance();
        Ok(())
    }

    /// Forgets the group; [`StoreEvent::GroupDeleted`] follows when that is durable. Its space comes back later.
    pub fn delete_group(&mut self, group: GroupId, replica: ReplicaId) -> Result<(), StoreError> {
        self.check_running()?;
        let found = self.groups.get_mut(&group).filter(|found| found.header.replica == replica && !found.deleting);
        let found = found.ok_or(StoreError::UnknownGroup)?;
        // A cut that waits for space may well wait for this.
        if found.committing && !self.waiting_cuts.remove(&group) {
            return Err(StoreError::Busy);
        }
        self.reserved_blocks -= found.cuts.drain(..).map(|cut| cut.layer.blocks_needed()).sum::<u64>();
        found.committing = true;
        found.deleting = true;
        let mut header = found.header.clone();
        header.deleted = true;
        header.root = Root::default();
        header.counts = Some(Counts::default());
        header.table = None;
        header.state = StateHome::Inline(Bytes::new());
        self.commits.push_back(Commit::new(Kind::Delete, header, VecDeque::new(), self.next_read));
        self.advance();
        Ok(())
    }

    /// Takes the changes of the entry at `index`, which is committed and flushed on this disk. Reads see them at once.
    ///
    /// # Panics
    /// Where the index does not rise, a range lies beyond every map, a zero is longer than [`ZERO_BLOCKS_MAX`], the
    /// number of checksums is not that of the blocks, or a delta is being installed.
    pub fn apply(&mut self, group: GroupId, index: u64, mutations: Vec<Mutation>) {
        let Some(found) = self.groups.get_mut(&group).filter(|found| !found.deleting) else { return };
        assert!(index > found.applied, "index {index} of {group} is applied after {}", found.applied);
        assert!(index < INDEX_MAX, "index {index} does not fit a map");
        assert!(!found.installing, "{group} is being installed: its blocks are of no single index");
        found.applied = index;
        let (blocks_before, bytes_before) = (found.active.blocks_needed(), found.active.bytes());
        for mutation in mutations {
            let (first, count) = match &mutation {
                Mutation::Write { first_block, data, .. } => (*first_block, (data.len() / BLOCK_BYTES) as u64),
                Mutation::Zero { first_block, count, .. } => (*first_block, *count),
            };
            assert!(count <= ZERO_BLOCKS_MAX, "{count} blocks are changed at once");
            assert!(first.checked_add(count).is_some_and(|end| end <= BLOCKS_MAX), "block {first} is beyond every map");
            found.active.apply(index, mutation, found.payloads.get(&index));
        }
        self.count_change(group, blocks_before, bytes_before);
        self.settle_promises(group, index);
        self.want_checkpoints();
    }

    /// The active layer has grown from those sizes.
    fn count_change(&mut self, group: GroupId, blocks_before: u64, bytes_before: u64) {
        let found = self.groups.get_mut(&group).expect("its layer was changed");
        self.reserved_blocks = self.reserved_blocks + found.active.blocks_needed() - blocks_before;
        if !found.wanted {
            self.unasked_bytes += found.active.bytes() - bytes_before;
            if found.active.bytes() > self.limits.group_overlay_bytes {
                self.want_checkpoint(group);
            }
        }
    }

    /// Writes back everything applied, which is everything up to `index`, and makes it durable together with `state`,
    /// the caller's state at `index`; [`StoreEvent::CheckpointDone`] follows. `wal_sequence`: WAL batches up to it
    /// hold no newer hard state of this group.
    ///
    /// # Panics
    /// Where entries above `index` were applied, or `index` is below the last checkpoint.
    pub fn checkpoint(
        &mut self,
        group: GroupId,
        index: u64,
        wal_sequence: u64,
        state: GroupState,
    ) -> Result<(), StoreError> {
        self.check_running()?;
        check_state(&state)?;
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if found.damaged {
            return Err(StoreError::Damaged);
        }
        if found.installing {
            return Err(StoreError::Installing);
        }
        if found.committing {
            return Err(StoreError::Busy);
        }
        assert!(index >= found.applied, "a checkpoint of {group} at {index} is behind {}", found.applied);
        let mut header = found.header.clone();
        let (home, jobs) = self.place_state(&state.state)?;
        header.index = index;
        header.wal_sequence = wal_sequence;
        header.hard_state = state.hard_state;
        header.position = state.position;
        header.state = home;
        self.queue_checkpoint(group, header, jobs, None)
    }

    /// Tombstones of changes below `index` need not be kept: every configured replica has a checkpoint at or above it.
    /// They go when their leaf is next rewritten.
    pub fn forget_tombstones(&mut self, group: GroupId, index: u64) {
        if let Some(found) = self.groups.get_mut(&group) {
            found.header.forget_below = found.header.forget_below.max(index);
        }
    }

    pub fn on_completion(&mut self, id: OpId, result: Result<Bytes, DeviceError>) {
        let pending = self.pending.remove(&id).expect("completions are of operations in flight, once each");
        if self.failed {
            return;
        }
        match pending {
            Pending::Page(place) => self.on_page(place, result),
            Pending::Blocks { read, first_block, offset } => self.on_blocks(read, first_block, offset, result),
            Pending::Scrub(io) => self.on_scrub_io(io, result),
            Pending::Commit(io) => self.on_commit_io(io, result),
        }
        self.advance();
    }

    pub fn take_ops(&mut self) -> Vec<DeviceOp> {
        std::mem::take(&mut self.ops)
    }

    pub fn take_events(&mut self) -> Vec<StoreEvent> {
        std::mem::take(&mut self.events)
    }

    fn check_running(&self) -> Result<(), StoreError> {
        if self.failed { Err(StoreError::Failed) } else { Ok(()) }
    }

    /// Does whatever can be done without a further completion.
    fn advance(&mut self) {
        if !self.failed {
            self.advance_commit();
            self.advance_drops();
            self.settle_frees();
            // What was just freed may be what they wait for, and nothing else may come.
            if self.start_cuts() {
                self.advance_commit();
            }
        }
    }

    /// Gives up the disk: nothing is retried, for after a failed write or flush nobody knows what the disk holds.
    pub(crate) fn fail(&mut self, reason: String) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        self.ops.clear();
        for (_, read) in std::mem::take(&mut self.reads) {
            self.events.extend(read.into_failed());
        }
        for (_, question) in std::mem::take(&mut self.questions) {
            self.changes.push(question.into_failed());
        }
        self.events.push(StoreEvent::Failed { reason });
    }
}

fn check_state(state: &GroupState) -> Result<(), StoreError> {
    let checks = [
        (state.hard_state.len(), "hard state", HARD_STATE_BYTES_MAX),
        (state.position.len(), "position", POSITION_BYTES_MAX),
        (state.state.len(), "state", STATE_BYTES_MAX),
    ];
    match checks.into_iter().find(|(bytes, _, limit)| bytes > limit) {
        Some((_, what, limit)) => Err(StoreError::TooLarge { what, limit }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
