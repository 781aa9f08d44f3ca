//! Finding pages of a map: from the root down, through the cache, with a page read at each miss.

use std::sync::Arc;

use bytes::Bytes;

use crate::chunk::layout::{Named, Place};
use crate::chunk::page::{FAN_OUT_BITS, Page, PageId, PageRef, Root};
use crate::chunk::{Chunks, Group, Pending};
use crate::device::BLOCK_BYTES;
use crate::ops::{DeviceError, DeviceOp};

/// Pages of a deleted map looked at before other work has its turn.
const DROP_STEPS_MAX: usize = 64;

/// A way from a root to a page. It keeps where it has come to, so that a small cache slows it but never stops it.
#[derive(Clone, Debug)]
pub struct Walk {
    /// The page `at` names.
    id: PageId,
    at: PageRef,
    pub level: u8,
    pub number: u64,
}

/// Where a walk ended.
#[derive(Debug)]
pub enum Found {
    Page {
        at: PageRef,
        page: Arc<Page>,
    },
    /// No page: nothing below it was ever written.
    Absent,
    /// It, or one above it, cannot be read. `at`: where it itself lies, if that is known.
    Lost {
        at: Option<PageRef>,
    },
}

/// Who goes on when a page has arrived.
#[derive(Debug)]
pub enum Waiter {
    Read { read: u64, walk: Walk },
    Commit { walk: Walk },
    Question { serial: u64 },
    Mend { serial: u64, walk: Walk },
    Scrub,
    Drop,
}

#[derive(Debug)]
pub struct PageRead {
    id: PageId,
    crc: u32,
    waiters: Vec<Waiter>,
}

/// A deleted map on its way back to the allocator.
#[derive(Debug)]
pub struct MapDrop {
    /// Pages not looked at yet.
    pub pages: Vec<(PageId, PageRef)>,
    /// Its first page is being read.
    pub waiting: bool,
}

impl Walk {
    /// `None`: the map does not reach so far.
    pub fn new(group: &Group, root: Root, level: u8, number: u64) -> Option<Walk> {
        let (group, replica) = (group.header.group, group.header.replica);
        let at = root.page.filter(|_| root.covers(level, number))?;
        Some(Walk { id: PageId { group, replica, level: root.level, number: 0 }, at, level, number })
    }
}

impl Chunks {
    /// Goes on with a walk. `None`: it waits for a page, and `waiter` with it.
    pub(super) fn find(&mut self, mut walk: Walk, waiter: impl FnOnce(Walk) -> Waiter) -> Option<Found> {
        loop {
            if self.is_lost(walk.at) {
                let itself = walk.id.level == walk.level && walk.at.place != Place::LOST;
                return Some(Found::Lost { at: itself.then_some(walk.at) });
            }
            let Some(page) = self.cache.get(walk.at.place) else {
                self.read_page(walk.id, walk.at, waiter(walk));
                return None;
            };
            if walk.id.level == walk.level {
                return Some(Found::Page { at: walk.at, page });
            }
            let level = walk.id.level - 1;
            let number = walk.number >> (FAN_OUT_BITS * u32::from(level - walk.level));
            let Some(child) = page.inner().children[(number & 0xff) as usize] else { return Some(Found::Absent) };
            walk.id = PageId { level, number, ..walk.id };
            walk.at = child.page;
        }
    }

    pub(super) fn is_lost(&self, at: PageRef) -> bool {
        at.place == Place::LOST || self.bad_pages.contains(&at.place)
    }

    pub(super) fn read_page(&mut self, id: PageId, at: PageRef, waiter: Waiter) {
        if let Some(read) = self.page_reads.get_mut(&at.place) {
            assert_eq!((read.id, read.crc), (id, at.crc), "a place has one meaning while it is named");
            read.waiters.push(waiter);
            return;
        }
        self.page_reads.insert(at.place, PageRead { id, crc: at.crc, waiters: vec![waiter] });
        let op = self.ids.take();
        self.pending.insert(op, Pending::Page(at.place));
        let offset = self.layout.offset(at.place);
        self.ops.push(DeviceOp::Read { id: op, offset, length: BLOCK_BYTES as u32, cached: false });
    }

    pub(super) fn on_page(&mut self, place: Place, result: Result<Bytes, DeviceError>) {
        let read = self.page_reads.remove(&place).expect("a page read in flight is noted");
        let page = match result {
            Ok(block) => Page::decode(&self.layout, &read.id, read.crc, &block).ok(),
            Err(_) => {
                self.counters.read_errors += 1;
                None
            }
        };
        match page {
            Some(page) => self.cache.insert(place, Arc::new(page)),
            None => {
                self.counters.corrupt_pages += 1;
                self.bad_pages.insert(place);
            }
        }
        for waiter in read.waiters {
            match waiter {
                Waiter::Read { read, walk } => self.walk_for_read(read, walk),
                Waiter::Commit { walk } => self.walk_for_commit(walk),
                Waiter::Question { serial } => self.advance_question(serial),
                Waiter::Mend { serial, walk } => self.walk_for_mend(serial, walk),
                Waiter::Scrub => self.on_scrub_page(),
                Waiter::Drop => self.drops.front_mut().expect("a drop waits until it is done").waiting = false,
            }
        }
    }

    /// Takes deleted maps apart, a bounded number of pages at a time. What they name is freed page by page; a crash
    /// in between is no matter, because open knows nothing of a deleted group's map.
    pub(super) fn advance_drops(&mut self) {
        for _ in 0..DROP_STEPS_MAX {
            let Some(drop) = self.drops.front_mut() else { return };
            if drop.waiting {
                return;
            }
            let Some((id, at)) = drop.pages.pop() else {
                self.drops.pop_front();
                continue;
            };
            if at.place == Place::LOST {
                continue;
            }
            if !self.bad_pages.contains(&at.place) {
                let Some(page) = self.cache.get(at.place) else {
                    let drop = self.drops.front_mut().expect("it was there above");
                    drop.pages.push((id, at));
                    drop.waiting = true;
                    self.read_page(id, at, Waiter::Drop);
                    return;
                };
                self.drop_page(id, &page);
            }
            self.free_later(vec![Named::Page(at.place)]);
        }
    }

    fn drop_page(&mut self, id: PageId, page: &Page) {
        match page {
            Page::Leaf(leaf) => {
                let slots = leaf.slots.iter().filter(|slot| !slot.place.is_none());
                let freed = slots.map(|slot| Named::Slot(slot.place)).collect();
                self.free_later(freed);
            }
            Page::Inner(inner) => {
                let drop = self.drops.front_mut().expect("the drop under way is the first");
                for (i, child) in inner.children.iter().enumerate() {
                    let number = (id.number << FAN_OUT_BITS) + i as u64;
                    drop.pages.extend(child.map(|child| (PageId { level: id.level - 1, number, ..id }, child.page)));
                }
            }
        }
    }

    /// Frees once every read and question begun before now has finished.
    pub(super) fn free_later(&mut self, named: Vec<Named>) {
        if !named.is_empty() {
            self.frees.push_back((self.next_read, named));
        }
    }

    pub(super) fn settle_frees(&mut self) {
        let oldest_read = self.reads.first_key_value().map_or(self.next_read, |(serial, _)| *serial);
        let oldest_question = self.questions.first_key_value().map_or(self.next_read, |(serial, _)| *serial);
        let oldest_mend = self.mends.first_key_value().map_or(self.next_read, |(serial, _)| *serial);
        let oldest = oldest_read.min(oldest_question).min(oldest_mend).min(self.scrub.oldest(self.next_read));
        while let Some((barrier, _)) = self.frees.front() {
            if *barrier > oldest {
                return;
            }
            let (_, freed) = self.frees.pop_front().expect("it was there above");
            for named in freed {
                if let Named::Page(place) = named {
                    self.cache.forget(place);
                    self.bad_pages.remove(&place);
                }
                self.allocator.free(named);
            }
        }
    }

    /// Queues the map of a group that is no more.
    pub(super) fn drop_map(&mut self, group: &Group) {
        let Root { page, level } = group.header.root;
        let (group, replica) = (group.header.group, group.header.replica);
        let root = page.map(|page| (PageId { group, replica, level, number: 0 }, page));
        self.drops.push_back(MapDrop { pages: root.into_iter().collect(), waiting: false });
    }
}
