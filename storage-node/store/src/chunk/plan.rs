//! What a checkpoint writes: a place for every changed slot, and a new page for every changed page of the map.
//!
//! Level by level, from the leaves up, so that a page is made when the places and checksums of its children are known.
//! All a plan does is take places and queue jobs; nothing it makes is found before the header is durable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use crate::chunk::Chunks;
use crate::chunk::commit::{Commit, CopyJob, Job};
use crate::chunk::header::Header;
use crate::chunk::layout::{Named, Place, SLOT_BLOCKS};
use crate::chunk::overlay::{Content, Layer, Piece};
use crate::chunk::page::{Child, FAN_OUT_BITS, LEAF_BLOCKS, Leaf, Page, PageId, PageRef, Root, SlotEntry};
use crate::chunk::walk::{Found, Waiter, Walk};

/// Planning pauses while more jobs than this wait to be submitted.
const JOBS_MAX: usize = 256;
/// Map pages looked up at the same time.
const WALKS_MAX: usize = 32;

/// Which pages of the new map have been made, level by level.
#[derive(Debug, Default)]
pub struct Plan {
    level: u8,
    /// Level of the new root.
    pub top: u8,
    pub todo: BTreeSet<u64>,
    walking: usize,
    /// New references to pages of the level below, and of this one. `None`: the page is gone.
    below: BTreeMap<u64, Option<Child>>,
    done: BTreeMap<u64, Option<Child>>,
    pub finished: bool,
}

impl Chunks {
    pub(super) fn walk_for_commit(&mut self, walk: Walk) {
        let mut commit = self.commit.take().expect("a walk of a commit is under way");
        commit.plan.walking -= 1;
        self.look_up(&mut commit, walk);
        self.commit = Some(commit);
    }

    pub(super) fn plan(&mut self, commit: &mut Commit) {
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
        let mut new = if level == 0 {
            let Some(leaf) = self.plan_leaf(commit, number, old.leaf()) else { return };
            let slots = (number * leaf.slots.len() as u64..).zip(&leaf.slots);
            let lost = slots.filter(|(_, entry)| entry.lost != 0).map(|(slot, _)| slot);
            self.tell_corrupt(commit.header.group, lost.collect());
            Page::Leaf(Box::new(leaf))
        } else {
            let mut inner = old.inner().clone();
            for (child, page) in commit.plan.below.range(number << FAN_OUT_BITS..(number + 1) << FAN_OUT_BITS) {
                inner.children[(child & 0xff) as usize] = *page;
            }
            Page::Inner(Box::new(inner))
        };
        if let Some(at) = old_at {
            let born = matches!(found, Found::Page { .. }).then(|| old.born());
            commit.free(Named::Page(at.place), born);
            commit.count(|counts| counts.pages -= 1);
        }
        if new.is_empty() {
            commit.plan.done.insert(number, None);
            return;
        }
        let Some(place) = self.allocator.take_page() else { return self.fail_for_space() };
        new.set_born(commit.header.era);
        let Header { group, replica, .. } = commit.header;
        let data = new.encode(&PageId { group, replica, level, number }, commit.header.generation);
        let page = PageRef { place, crc: crc32c::crc32c(&data) };
        commit.plan.done.insert(number, Some(Child { page, index: new.index() }));
        commit.taken.push(Named::Page(place));
        commit.count(|counts| counts.pages += 1);
        commit.jobs.push_back(Job { place, data: Bytes::from(data) });
        // Nobody finds it before the header is durable, by when it is written.
        self.cache.insert(place, Arc::new(new));
    }

    /// Gives every changed slot of a leaf its place and checksums. `None`: nothing changes.
    fn plan_leaf(&mut self, commit: &mut Commit, number: u64, old: &Leaf) -> Option<Leaf> {
        let group = &self.groups[&commit.header.group];
        let layer = group.frozen.clone().expect("what is planned is frozen");
        let mut leaf = old.clone();
        let first_slot = number * LEAF_BLOCKS / SLOT_BLOCKS;
        for (i, slot) in (first_slot..).take(leaf.slots.len()).enumerate() {
            if let Some(installed) = layer.installed(slot) {
                self.plan_installed(commit, &mut leaf, i, installed);
                let (before, after) = (old.slot_hash(number, i), leaf.slot_hash(number, i));
                commit.count(|counts| counts.hash = counts.hash.wrapping_sub(before).wrapping_add(after));
            }
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
        (leaf != *old || layer.rewrites(number)).then_some(leaf)
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
        // What was mended has an index from before, and may lie beside what changed since.
        entry.index = pieces.iter().map(|piece| piece.index).fold(entry.index, u64::max);
        entry.present = old.present & !zeroed | written;
        entry.lost &= !(zeroed | written);
        if entry.present == 0 {
            entry.place = Place::NONE;
        } else if let Some(home) = layer.home(slot) {
            // All sixteen blocks are changed here, and those written lie there: what goes on naming it is the map.
            assert_eq!(written | zeroed, u16::MAX, "a payload with a home covers its slot");
            entry.place = home;
            changed.clear();
            commit.adopted.insert(home);
            commit.taken.push(Named::Slot(home));
            commit.count(|counts| counts.slots += 1);
        } else if old.place.is_none() || written != 0 && (layer.has_mended(slot) || self.is_shared(commit, &old)) {
            let Some(place) = self.allocator.take_slot() else { return self.fail_for_space() };
            entry.place = place;
            commit.taken.push(Named::Slot(place));
            commit.count(|counts| counts.slots += 1);
        }
        if entry.place != old.place {
            entry.born = if entry.place.is_none() { 0 } else { commit.header.era };
        }
        let (kept, place) = (old.present & entry.present & !written, entry.place);
        if !old.place.is_none() && old.place != place {
            commit.free(Named::Slot(old.place), Some(old.born));
            commit.count(|counts| counts.slots -= 1);
        }
        if old.place != place && kept != 0 {
            let checksums = leaf.checksums[i * SLOT_BLOCKS as usize..][..SLOT_BLOCKS as usize].to_vec();
            commit.copies.push_back(CopyJob { slot, from: old.place, to: place, kept, checksums, changed });
        } else {
            let jobs = changed.into_iter().map(|(block, data)| Job { place: Place(place.0 + block), data });
            commit.jobs.extend(jobs);
        }
    }

    /// Whether a slot must not be overwritten although the group's own map names it: a snapshot or a frozen map does too.
    fn is_shared(&self, commit: &Commit, slot: &SlotEntry) -> bool {
        let latest = self.groups[&commit.header.group].freezes.last();
        commit.is_shared(slot.born) || latest.is_some_and(|freeze| !freeze.fresh.contains(&Named::Slot(slot.place)))
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

    pub(super) fn fail_for_space(&mut self) {
        // Promises are made before appends are accepted, so this is a promise that was not asked for.
        self.fail("a checkpoint found no space that was promised to it".to_owned());
    }
}

/// Lowest level of a root that covers a leaf.
pub fn level_for(leaf: u64) -> u8 {
    (0..).find(|level| leaf >> (FAN_OUT_BITS * u32::from(*level)) == 0).expect("a block number bounds the level")
}
