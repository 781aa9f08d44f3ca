//! Snapshots: maps of a group kept for good, each exactly as of one log index, which is its name.
//!
//! A snapshot is the root of the map that a checkpoint at its index made. The group's header names a table of them,
//! which lies in a slot of its own and goes to another with every change, so a snapshot comes and goes with the durable
//! write of a header like everything else.
//!
//! # Who names a place
//!
//! Maps of one group share pages and slots. Nothing counts the references: they follow from when a place was taken.
//! The group's *era* rises with every snapshot, and each place notes the era it is *born* in, beside its name in a leaf
//! and in the page itself. A snapshot of era e holds whatever the group's map named when it was made, all of it born in e
//! or before; a place that leaves the map never comes back to it. So at any time:
//!
//! - a place of the group's map is named by a snapshot too exactly where one of an era at or above its birth exists:
//!   it is then neither overwritten nor freed with the map;
//! - what a snapshot names and neither its older nor its younger neighbour does (for the youngest: the group's map) is
//!   what goes with it: born after the older one's era, and not at the same position of the younger one's map. Walking
//!   the two maps side by side finds it and passes by whatever they share; see `difference`.
//!
//! Memory does not grow with what is shared, and open finds the same from the maps alone: what is born after the older
//! neighbour's era must be nobody else's, the rest must be at the same position there.
//!
//! # At one index, without a pause
//!
//! [`Chunks::take_snapshot`] cuts the overlay: the active layer, with everything up to the index, waits as a *cut* for
//! the checkpoint under way and is written back by one of its own; what is applied meanwhile goes to a new layer. Reads
//! look through all of them. A crash before that checkpoint loses nothing: the log has the entry and all before it, and
//! replaying it cuts at the same index again.
//!
//! A deletion takes effect with the next checkpoint at or above its index; a crash before it replays the deletion.
//!
//! What cannot be read is not freed: it is free at the next open, when nothing names it.

use std::collections::BTreeSet;

use bytes::Bytes;
use holdfast_id::GroupId;

use crate::bytes_at::{put, u32_at, u64_at};
use crate::chunk::commit::{Commit, Job};
use crate::chunk::header::{Counts, UNKNOWN};
use crate::chunk::layout::{Layout, Named, Place, SLOT_BLOCKS, SLOT_BYTES};
use crate::chunk::overlay::Layer;
use crate::chunk::page::{LEVEL_MAX, PageRef, Root};
use crate::chunk::{Chunks, Group, check_state};
use crate::group::{GroupState, POSITION_BYTES_MAX, StoreError};
use crate::superblock::COUNT_MAX;

/// Most snapshots of one group: their table fits a slot, and open looks at each.
pub const SNAPSHOTS_MAX: usize = 256;

const ENTRY_BYTES: usize = 160;
const POSITION: usize = 88;
const _: () = assert!(SNAPSHOTS_MAX * ENTRY_BYTES <= SLOT_BYTES && POSITION + POSITION_BYTES_MAX <= ENTRY_BYTES);

/// One entry of the table, little-endian:
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | log index, rising from entry to entry |
/// | 8 | 4 | era, rising from entry to entry |
/// | 12 | 4 | level of the root |
/// | 16 | 8 | place of the map's root; zero: empty map |
/// | 24 | 4 | crc32c of the root page |
/// | 28 | 4 | zero |
/// | 32 | 8 | slots the map names; all ones: not known |
/// | 40 | 8 | pages the map names; all ones: not known |
/// | 48 | 16 | hash of the map; means nothing while the counts are not known |
/// | 64 | 8 | place of the slot with the state |
/// | 72 | 4 | bytes of the state |
/// | 76 | 4 | crc32c of the state |
/// | 80 | 4 | bytes of the position |
/// | 84 | 4 | zero |
/// | 88 | 64 | position |
/// | 152 | 8 | zero |
///
/// The header that names the table has its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub index: u64,
    /// The highest birth of what it names.
    pub era: u32,
    pub root: Root,
    pub counts: Option<Counts>,
    /// As [`GroupState::position`] at its index.
    pub position: Bytes,
    /// As [`GroupState::state`] at its index, for whoever brings up another replica; kept in memory.
    pub state: Bytes,
    pub state_place: Place,
}

/// Where a group's table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableHome {
    pub place: Place,
    pub snapshots: u32,
    pub crc: u32,
}

/// A snapshot as its owner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub index: u64,
    /// See [`Chunks::map_hash`].
    pub hash: Option<u128>,
    /// Of the slots it names, whoever else does.
    pub allocated_bytes: Option<u64>,
}

/// A snapshot whose checkpoint has not begun.
#[derive(Debug)]
pub struct Cut {
    pub index: u64,
    pub wal_sequence: u64,
    pub state: GroupState,
    /// What was applied up to the index since the cut before, or since the last checkpoint began.
    pub layer: Layer,
}

impl TableHome {
    pub fn bytes(&self) -> usize {
        self.snapshots as usize * ENTRY_BYTES
    }
}

impl Snapshot {
    fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut entry = [0; ENTRY_BYTES];
        put(&mut entry, 0, self.index.to_le_bytes());
        put(&mut entry, 8, self.era.to_le_bytes());
        put(&mut entry, 12, u32::from(self.root.level).to_le_bytes());
        if let Some(page) = self.root.page {
            put(&mut entry, 16, page.place.0.to_le_bytes());
            put(&mut entry, 24, page.crc.to_le_bytes());
        }
        put(&mut entry, 32, self.counts.map_or(UNKNOWN, |counts| counts.slots).to_le_bytes());
        put(&mut entry, 40, self.counts.map_or(UNKNOWN, |counts| counts.pages).to_le_bytes());
        put(&mut entry, 48, self.counts.map_or(0, |counts| counts.hash).to_le_bytes());
        put(&mut entry, 64, self.state_place.0.to_le_bytes());
        put(&mut entry, 72, (self.state.len() as u32).to_le_bytes());
        put(&mut entry, 76, crc32c::crc32c(&self.state).to_le_bytes());
        put(&mut entry, 80, (self.position.len() as u32).to_le_bytes());
        entry[POSITION..][..self.position.len()].copy_from_slice(&self.position);
        entry
    }

    /// `read`: what lies in a slot.
    fn decode(layout: &Layout, entry: &[u8], read: &mut impl FnMut(Place) -> Option<Bytes>) -> Option<Snapshot> {
        let place = Place(u64_at(entry, 16));
        let page = (!place.is_none()).then_some(PageRef { place, crc: u32_at(entry, 24) });
        let (index, era, level) = (u64_at(entry, 0), u32_at(entry, 8), u32_at(entry, 12));
        let root_fits = page.is_none_or(|page| page.place == Place::LOST || layout.slot_of(page.place).is_some());
        if !root_fits || index > COUNT_MAX || era == 0 || level > u32::from(LEVEL_MAX) || u32_at(entry, 28) != 0 {
            return None;
        }
        let hash = u128::from_le_bytes(entry[48..64].try_into().ok()?);
        let counts = match (u64_at(entry, 32), u64_at(entry, 40)) {
            (UNKNOWN, _) | (_, UNKNOWN) => None,
            (slots, pages) => Some(Counts { slots, pages, hash }),
        };
        let (state_place, bytes, positions) = (Place(u64_at(entry, 64)), u32_at(entry, 72), u32_at(entry, 80) as usize);
        if !layout.is_slot(state_place) || bytes as usize > SLOT_BYTES || positions > POSITION_BYTES_MAX {
            return None;
        }
        let state = read(state_place).filter(|slot| slot.len() >= bytes as usize)?.slice(..bytes as usize);
        let root = Root { page, level: level as u8 };
        let position = Bytes::copy_from_slice(&entry[POSITION..][..positions]);
        (crc32c::crc32c(&state) == u32_at(entry, 76)).then_some(Snapshot {
            index,
            era,
            root,
            counts,
            position,
            state,
            state_place,
        })
    }
}

pub fn encode_table(snapshots: &[Snapshot]) -> Bytes {
    snapshots.iter().flat_map(Snapshot::encode).collect()
}

/// `None`: it or a state is not what was written, or breaks a rule. `read`: what lies in a slot.
pub fn decode_table(
    layout: &Layout,
    home: &TableHome,
    bytes: &[u8],
    mut read: impl FnMut(Place) -> Option<Bytes>,
) -> Option<Vec<Snapshot>> {
    let table = bytes.get(..home.bytes()).filter(|table| crc32c::crc32c(table) == home.crc)?;
    let snapshots = table.chunks_exact(ENTRY_BYTES).map(|entry| Snapshot::decode(layout, entry, &mut read));
    let snapshots = snapshots.collect::<Option<Vec<Snapshot>>>()?;
    let rises = snapshots.windows(2).all(|pair| pair[0].era < pair[1].era && pair[0].index < pair[1].index);
    rises.then_some(snapshots)
}

impl Group {
    /// Places born up to it are named by a snapshot.
    pub fn shared_to(&self) -> Option<u32> {
        self.snapshots.last().map(|snapshot| snapshot.era)
    }

    /// All that were taken and whose deletion is not durable, on the disk or not.
    pub fn snapshots_held(&self) -> impl Iterator<Item = u64> {
        let cuts = self.cuts.iter().map(|cut| cut.index);
        self.snapshots.iter().map(|snapshot| snapshot.index).chain(self.taking).chain(cuts)
    }

    /// Whether the snapshot is deleted as of an index.
    fn is_doomed(&self, snapshot: u64, index: u64) -> bool {
        self.doomed.get(&snapshot).is_some_and(|deleted| *deleted <= index)
    }

    /// The layers above the map that reads look through, the newest first, but for the mended one.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        let cuts = self.cuts.iter().rev().map(|cut| &cut.layer);
        std::iter::once(&self.active).chain(cuts).chain(self.frozen.as_deref())
    }
}

impl Chunks {
    /// Keeps the group's blocks as of `index`, the last applied entry, until [`Chunks::delete_snapshot`]. A checkpoint
    /// with `state` as of it, which may wait for one under way, makes it durable:
    /// [`CheckpointDone`](crate::group::StoreEvent::CheckpointDone) at the index follows. Other checkpoints are refused
    /// as `Busy` until then.
    ///
    /// # Panics
    /// Where entries above `index` were applied.
    pub fn take_snapshot(
        &mut self,
        group: GroupId,
        index: u64,
        wal_sequence: u64,
        state: GroupState,
    ) -> Result<(), StoreError> {
        self.check_running()?;
        check_state(&state)?;
        if state.state.len() > SLOT_BYTES {
            return Err(StoreError::TooLarge { what: "state with a snapshot", limit: SLOT_BYTES });
        }
        let found = self.groups.get_mut(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if found.damaged {
            return Err(StoreError::Damaged);
        }
        if found.installing {
            return Err(StoreError::Installing);
        }
        if found.snapshots_held().filter(|held| !found.is_doomed(*held, index)).count() >= SNAPSHOTS_MAX {
            return Err(StoreError::TooManySnapshots);
        }
        assert!(found.snapshots_held().all(|held| held < index), "{group} has a snapshot at {index} already");
        assert!(index >= found.applied, "a snapshot of {group} at {index} is behind {}", found.applied);
        // A layer is never cut short of what it was written back to: the mark is from before an earlier cut.
        assert!(found.header.write_back_to <= index, "{group} at {index} holds later blocks");
        if !found.wanted {
            self.unasked_bytes -= found.active.bytes();
        }
        found.applied = index;
        let layer = std::mem::take(&mut found.active);
        found.cuts.push_back(Cut { index, wal_sequence, state, layer });
        if !std::mem::replace(&mut found.committing, true) {
            self.waiting_cuts.insert(group);
        }
        self.advance();
        Ok(())
    }

    /// The snapshot is gone as of the entry at `index`: with the next checkpoint that passes it, which is asked for, and
    /// then what only it names is freed. One that is not there is none.
    pub fn delete_snapshot(&mut self, group: GroupId, snapshot: u64, index: u64) {
        let Some(found) = self.groups.get_mut(&group).filter(|found| !found.deleting && !found.damaged) else { return };
        if found.snapshots_held().any(|held| held == snapshot) {
            found.doomed.entry(snapshot).or_insert(index);
            self.want_checkpoint_for_doomed(group);
        }
    }

    /// Those on the disk, the oldest first.
    pub fn snapshots(&self, group: GroupId) -> Vec<SnapshotInfo> {
        let info = |snapshot: &Snapshot| SnapshotInfo {
            index: snapshot.index,
            hash: snapshot.counts.map(|counts| counts.hash),
            allocated_bytes: snapshot.counts.map(|counts| counts.slots * SLOT_BYTES as u64),
        };
        self.groups.get(&group).map_or(Vec::new(), |found| found.snapshots.iter().map(info).collect())
    }

    /// Position and state that the snapshot was taken with.
    pub fn snapshot_state(&self, group: GroupId, snapshot: u64) -> Option<(Bytes, Bytes)> {
        let held = self.groups.get(&group)?.snapshots.iter().find(|held| held.index == snapshot)?;
        Some((held.position.clone(), held.state.clone()))
    }

    pub(super) fn want_checkpoint_for_doomed(&mut self, group: GroupId) {
        let found = &self.groups[&group];
        if !found.doomed.is_empty() && !found.wanted && !found.committing {
            self.want_checkpoint(group);
        }
    }

    /// The group's checkpoint is done.
    pub(super) fn start_next_cut(&mut self, group: GroupId) {
        let found = self.groups.get_mut(&group).expect("a commit is of a group");
        if !found.cuts.is_empty() {
            found.committing = true;
            self.waiting_cuts.insert(group);
        }
    }

    /// Begins the checkpoints of cuts whose turn has come and for which there is space: the disk may be full until
    /// something else is done. Whether any has begun.
    pub(super) fn start_cuts(&mut self) -> bool {
        let waiting = std::mem::take(&mut self.waiting_cuts);
        let groups = waiting.len();
        self.waiting_cuts = waiting.into_iter().filter(|group| !self.start_cut(*group)).collect();
        self.waiting_cuts.len() < groups
    }

    fn start_cut(&mut self, group: GroupId) -> bool {
        let GroupState { state, position, .. } =
            self.groups[&group].cuts.front().expect("its turn has come").state.clone();
        let Ok((home, jobs)) = self.place_state(&state) else { return false };
        let snapshot_state = state;
        let found = self.groups.get_mut(&group).expect("it was found above");
        let cut = found.cuts.pop_front().expect("it was there above");
        let mut header = found.header.clone();
        header.index = cut.index;
        header.wal_sequence = cut.wal_sequence;
        header.hard_state = cut.state.hard_state.clone();
        header.position = cut.state.position.clone();
        header.state = home;
        let Cut { index, wal_sequence, state, layer } = cut;
        if let Err(refused) = self.queue_layer(group, header, jobs, layer, Some((position, snapshot_state))) {
            let (layer, error) = *refused;
            assert_eq!(error, StoreError::Full, "the group was looked at above");
            let found = self.groups.get_mut(&group).expect("it was found above");
            found.cuts.push_front(Cut { index, wal_sequence, state, layer });
            return false;
        }
        true
    }

    /// Takes the slots for what a checkpoint at `index` writes of snapshots: the table, and for a new one its state.
    pub(super) fn place_table(&mut self, group: GroupId, index: u64, adds: bool) -> Result<Vec<Place>, StoreError> {
        let found = &self.groups[&group];
        let kept = found.snapshots.iter().filter(|snapshot| !found.is_doomed(snapshot.index, index)).count();
        if !adds && (kept == found.snapshots.len() || kept == 0) {
            return Ok(Vec::new());
        }
        let slots = 1 + u64::from(adds);
        if self.available_blocks() < slots * SLOT_BLOCKS {
            return Err(StoreError::Full);
        }
        Ok((0..slots).map(|_| self.allocator.take_slot().expect("the free slots were counted above")).collect())
    }

    /// What the header will say of snapshots, once the map is planned.
    pub(super) fn plan_table(&mut self, commit: &mut Commit) {
        let found = &self.groups[&commit.header.group];
        let index = commit.header.index;
        let kept = found.snapshots.iter().filter(|snapshot| !found.is_doomed(snapshot.index, index));
        let mut snapshots: Vec<Snapshot> = kept.cloned().collect();
        let changed = snapshots.len() != found.snapshots.len() || commit.snapshot.is_some();
        if let Some((position, state)) = commit.snapshot.take() {
            let (era, root, counts) = (commit.header.era, commit.header.root, commit.header.counts);
            let state_place = commit.table.pop().expect("its state has a slot");
            commit.jobs.push_back(Job { place: state_place, data: state.clone() });
            snapshots.push(Snapshot { index, era, root, counts, position, state, state_place });
            commit.header.era += 1;
        }
        if !changed {
            return;
        }
        commit.header.table = (!snapshots.is_empty()).then(|| {
            let place = commit.table.pop().expect("the table has a slot");
            let data = encode_table(&snapshots);
            let home = TableHome { place, snapshots: snapshots.len() as u32, crc: crc32c::crc32c(&data) };
            commit.jobs.push_back(Job { place, data });
            home
        });
        commit.snapshots = Some(snapshots);
    }

    /// The header is durable: what only deleted snapshots name can go. What the commit itself gave up it has left to the
    /// snapshots that were there while it was planned.
    pub(super) fn put_snapshots(&mut self, group: GroupId, snapshots: Vec<Snapshot>) {
        let found = self.groups.get_mut(&group).expect("a commit is of a group");
        let (replica, root, index) = (found.header.replica, found.header.root, found.header.index);
        found.doomed.retain(|_, deleted| *deleted > index);
        let kept: BTreeSet<u64> = snapshots.iter().map(|snapshot| snapshot.index).collect();
        let mut former = std::mem::replace(&mut found.snapshots, snapshots);
        while let Some(at) = former.iter().position(|old| !kept.contains(&old.index)) {
            let gone = former.remove(at);
            let above = at.checked_sub(1).map_or(0, |older| former[older].era);
            let younger = former.get(at).map_or(root, |younger| younger.root);
            self.drop_difference(group, replica, gone.root, Some(younger), above);
            self.free_later(vec![Named::Slot(gone.state_place)]);
        }
    }

    /// All that the maps of a deleted group name: of each what the next younger one does not.
    pub(super) fn drop_maps(&mut self, group: &Group) {
        let (id, replica) = (group.header.group, group.header.replica);
        self.free_later(group.snapshots.iter().map(|held| Named::Slot(held.state_place)).collect());
        let roots: Vec<Root> = group.snapshots.iter().map(|held| held.root).chain([group.header.root]).collect();
        for (at, root) in roots.iter().enumerate() {
            self.drop_difference(id, replica, *root, roots.get(at + 1).copied(), 0);
        }
    }
}

/// What a table takes.
pub fn table_slot(home: Option<TableHome>) -> Option<Named> {
    home.map(|home| Named::Slot(home.place))
}
