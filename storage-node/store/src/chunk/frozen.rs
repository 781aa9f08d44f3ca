//! Frozen maps: a checkpoint kept readable while later ones are made, for rebuilds.
//!
//! A freeze keeps no list of what its map names. It keeps what the group has taken since (`fresh`): whatever the
//! group's map drops and is not in there was there at the freeze, is named by it, and goes to its `dead` list instead
//! of the allocator. So a freeze costs memory for the changes since, never for the size of the map, and counts of
//! references follow from the maps alone. Freezes end with the process; open frees what only they named.

use std::collections::BTreeSet;
use std::sync::Arc;

use holdfast_id::{GroupId, ReplicaId};

use crate::chunk::layout::Named;
use crate::chunk::page::{Child, FAN_OUT_BITS, INDEX_MAX, LEAF_BLOCKS, LEAF_SLOTS, Page, PageId, Root};
use crate::chunk::read::Purpose;
use crate::chunk::walk::Waiter;
use crate::chunk::{Chunks, Group};
use crate::group::{ReadError, StoreError, StoreEvent};

/// Most freezes of one group at a time.
pub const FREEZES_MAX: usize = 4;
/// Most changes in one answer: about 128 KiB of memory.
pub const CHANGES_MAX: usize = 1024;
/// Pages one question looks at before it answers with what it has.
const STEPS_MAX: usize = 256;

/// Names a frozen map; never reused while the disk is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrozenId(u64);

/// A map beside the group's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Frozen(FrozenId),
    /// By its index.
    Snapshot(u64),
}

/// What is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    pub id: FrozenId,
    pub index: u64,
    /// See [`Chunks::map_hash`].
    pub hash: Option<u128>,
}

#[derive(Debug)]
pub struct Freeze {
    pub frozen: Frozen,
    pub root: Root,
    /// Taken by the group since, until the next freeze.
    pub fresh: BTreeSet<Named>,
    /// Named by this freeze and by nothing later.
    pub dead: Vec<Named>,
}

/// A slot that changed above the index asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotChange {
    /// It covers blocks `[16 slot, 16 (slot + 1))`.
    pub slot: u64,
    pub index: u64,
    /// Bit i: block `16 slot + i` holds data; the others are zero.
    pub present: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Rising by slot.
    pub slots: Vec<SlotChange>,
    /// Where to ask on; `None`: that was all.
    pub next_slot: Option<u64>,
}

/// The answer to [`Chunks::changed_since`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesAnswer {
    pub token: u64,
    /// Lost parts of a frozen map are `Corrupt`: what changed there is not known.
    pub result: Result<Changes, ReadError>,
}

/// A question under way: a walk in slot order that passes by what did not change.
#[derive(Debug)]
pub struct Question {
    token: u64,
    above: u64,
    from_slot: u64,
    /// Slots that are lost are told.
    tells_lost: bool,
    /// To look at; the next one is the last.
    pages: Vec<(PageId, Child)>,
    slots: Vec<SlotChange>,
    steps: usize,
}

impl Chunks {
    /// Keeps the group's last checkpoint readable until [`Chunks::thaw`]. `Busy` while a checkpoint is under way, a delta
    /// is being installed, or too many are frozen; and after a write-back that was cut short until a checkpoint passes it, because the slots of
    /// the last checkpoint then hold later changes too.
    pub fn freeze(&mut self, group: GroupId) -> Result<Frozen, StoreError> {
        self.check_running()?;
        let id = FrozenId(self.next_frozen);
        let found = self.groups.get_mut(&group).filter(|found| !found.deleting).ok_or(StoreError::UnknownGroup)?;
        if found.damaged {
            return Err(StoreError::Damaged);
        }
        let unsettled = found.installing || found.header.write_back_to > found.header.index;
        if found.committing || unsettled || found.freezes.len() == FREEZES_MAX {
            return Err(StoreError::Busy);
        }
        self.next_frozen += 1;
        let hash = found.header.counts.map(|counts| counts.hash);
        let frozen = Frozen { id, index: found.header.index, hash };
        let root = found.header.root;
        found.freezes.push(Freeze { frozen, root, fresh: BTreeSet::new(), dead: Vec::new() });
        Ok(frozen)
    }

    /// Gives back what only this frozen map holds. What was asked of it before is still answered.
    pub fn thaw(&mut self, group: GroupId, id: FrozenId) {
        let Some(found) = self.groups.get_mut(&group) else { return };
        let Some(position) = found.freezes.iter().position(|freeze| freeze.frozen.id == id) else { return };
        let Freeze { fresh, dead, .. } = found.freezes.remove(position);
        let earlier = position.checked_sub(1).map(|earlier| &mut found.freezes[earlier]);
        let freed = match earlier {
            None => dead,
            Some(earlier) => {
                let freed = bury(earlier, dead);
                earlier.fresh.extend(fresh);
                freed
            }
        };
        self.free_later(freed);
        // A checkpoint that is planned on may now overwrite slots that reads of the frozen map are still to fetch.
        let commits = self.commit.iter_mut().chain(&mut self.commits);
        commits.filter(|commit| commit.group() == group).for_each(|commit| commit.wait_for_reads_below(self.next_read));
        self.advance();
    }

    /// Asks which slots of a kept map (`None`: of the last checkpoint), from `from_slot` on, changed above an index;
    /// [`Chunks::take_changes`] has the answer later. Tombstones are told as slots without present blocks. Of the last
    /// checkpoint also what is lost is told, as slots that changed at [`INDEX_MAX`], where no other map's did: whoever
    /// compares takes the other's.
    pub fn changed_since(&mut self, group: GroupId, kept: Option<Kept>, above: u64, from_slot: u64, token: u64) {
        let (replica, root) = match self.kept_root(group, kept) {
            Ok(found) => found,
            Err(error) => return self.changes.push(ChangesAnswer { token, result: Err(error) }),
        };
        let page_id = PageId { group, replica, level: root.level, number: 0 };
        let root = root.page.map(|page| (page_id, Child { page, index: u64::MAX }));
        let pages = root.into_iter().collect();
        let serial = self.next_read;
        self.next_read += 1;
        let tells_lost = kept.is_none();
        let question = Question { token, above, from_slot, tells_lost, pages, slots: Vec::new(), steps: 0 };
        self.questions.insert(serial, question);
        self.advance_question(serial);
        self.advance();
    }

    pub fn take_changes(&mut self) -> Vec<ChangesAnswer> {
        std::mem::take(&mut self.changes)
    }

    /// As [`Chunks::read`], of a kept map. One that was thawed or deleted is as unknown as its group would be, and so is a
    /// snapshot whose checkpoint is not done.
    pub fn read_kept(&mut self, group: GroupId, kept: Kept, first_block: u64, count: u32, token: u64) {
        match self.kept_root(group, Some(kept)) {
            Ok((_, root)) => {
                self.start_map_read(
                    group,
                    root,
                    first_block,
                    u64::from(count),
                    Vec::new(),
                    Purpose::Bytes { token, cached: false },
                );
                self.advance();
            }
            Err(error) => self.events.push(StoreEvent::Read { token, result: Err(error) }),
        }
    }

    fn kept_root(&self, group: GroupId, kept: Option<Kept>) -> Result<(ReplicaId, Root), ReadError> {
        if self.failed {
            return Err(ReadError::Failed);
        }
        let found = self.groups.get(&group).filter(|found| !found.deleting).ok_or(ReadError::UnknownGroup)?;
        let root = match kept {
            None => Some(found.header.root),
            Some(Kept::Frozen(id)) => {
                found.freezes.iter().find(|freeze| freeze.frozen.id == id).map(|freeze| freeze.root)
            }
            Some(Kept::Snapshot(index)) => {
                found.snapshots.iter().find(|snapshot| snapshot.index == index).map(|snapshot| snapshot.root)
            }
        };
        Ok((found.header.replica, root.ok_or(ReadError::UnknownGroup)?))
    }

    pub(super) fn advance_question(&mut self, serial: u64) {
        let mut question = self.questions.remove(&serial).expect("a question waits until it is answered");
        while let Some((id, child)) = question.pages.last().copied() {
            if question.slots.len() + LEAF_SLOTS > CHANGES_MAX || question.steps == STEPS_MAX {
                break;
            }
            let lost = self.is_lost(child.page);
            let page = self.cache.get(child.page.place).filter(|_| !lost);
            if !lost && page.is_none() {
                self.questions.insert(serial, question);
                self.read_page(id, child.page, Waiter::Question { serial });
                return;
            }
            question.pages.pop();
            question.steps += 1;
            let page = page.or_else(|| question.tells_lost.then(|| Arc::new(Page::lost(id.level))));
            let Some(page) = page else {
                let blocks = LEAF_BLOCKS << (FAN_OUT_BITS * u32::from(id.level));
                let count = u32::try_from(blocks).unwrap_or(u32::MAX);
                let result = Err(ReadError::Corrupt { first_block: id.number * blocks, count });
                self.changes.push(ChangesAnswer { token: question.token, result });
                return;
            };
            if let Err(error) = question.look_at(id, &page) {
                self.changes.push(ChangesAnswer { token: question.token, result: Err(error) });
                return;
            }
        }
        let next_slot = question.pages.last().map(|(id, _)| id.first_slot().max(question.from_slot));
        let result = Ok(Changes { slots: question.slots, next_slot });
        self.changes.push(ChangesAnswer { token: question.token, result });
    }
}

impl Question {
    pub fn into_failed(self) -> ChangesAnswer {
        ChangesAnswer { token: self.token, result: Err(ReadError::Failed) }
    }

    fn look_at(&mut self, id: PageId, page: &Page) -> Result<(), ReadError> {
        match page {
            Page::Inner(inner) => {
                for (i, child) in inner.children.iter().enumerate().rev() {
                    let below = PageId { level: id.level - 1, number: (id.number << FAN_OUT_BITS) + i as u64, ..id };
                    let wanted = child.filter(|child| child.index > self.above && below.end_slot() > self.from_slot);
                    self.pages.extend(wanted.map(|child| (below, child)));
                }
            }
            Page::Leaf(leaf) => {
                for (slot, entry) in (id.first_slot()..).zip(&leaf.slots) {
                    if slot < self.from_slot {
                        continue;
                    }
                    if entry.lost != 0 && self.tells_lost {
                        self.slots.push(SlotChange { slot, index: INDEX_MAX, present: 0 });
                        continue;
                    }
                    if entry.lost != 0 {
                        let first = u64::from(entry.lost.trailing_zeros());
                        let count = (entry.lost >> first).trailing_ones();
                        return Err(ReadError::Corrupt { first_block: slot * 16 + first, count });
                    }
                    if entry.index > self.above {
                        self.slots.push(SlotChange { slot, index: entry.index, present: entry.present });
                    }
                }
            }
        }
        Ok(())
    }
}

impl PageId {
    /// Slots `[first_slot, end_slot)` lie below the page.
    fn first_slot(&self) -> u64 {
        (self.number * LEAF_SLOTS as u64) << (FAN_OUT_BITS * u32::from(self.level))
    }

    fn end_slot(&self) -> u64 {
        ((self.number + 1) * LEAF_SLOTS as u64) << (FAN_OUT_BITS * u32::from(self.level))
    }
}

impl Group {
    /// Takes in what a checkpoint has named and no longer names; gives back what nobody names now.
    pub fn settle(&mut self, taken: Vec<Named>, freed: Vec<Named>) -> Vec<Named> {
        let Some(latest) = self.freezes.last_mut() else { return freed };
        let freed = bury(latest, freed);
        latest.fresh.extend(taken);
        freed
    }
}

/// Sorts out what dies after a freeze: what came after it can go, the rest it still names.
fn bury(freeze: &mut Freeze, dying: Vec<Named>) -> Vec<Named> {
    let (free, dead): (Vec<Named>, Vec<Named>) = dying.into_iter().partition(|named| freeze.fresh.remove(named));
    freeze.dead.extend(dead);
    free
}
