//! Finding pages of a map: from the root down, through the cache, with a page read at each miss.

use std::sync::Arc;

use bytes::Bytes;

use crate::chunk::layout::{Named, Place};
use crate::chunk::page::{FAN_OUT_BITS, Page, PageId, PageRef, Root};
use crate::chunk::{Chunks, Group, Pending};
use crate::device::BLOCK_BYTES;
use crate::ops::{DeviceError, DeviceOp};

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
        let oldest_drop = self.drops.iter().find_map(|drop| drop.serial).unwrap_or(self.next_read);
        let oldest = oldest_read.min(oldest_question).min(oldest_mend).min(oldest_drop);
        let oldest = oldest.min(self.scrub.oldest(self.next_read));
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
}
