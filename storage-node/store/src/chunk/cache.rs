//! Decoded map pages by place, the least recently used ones leave first.
//!
//! A page is never changed in place, so a cached one is right for as long as its place is not freed; whoever frees
//! a place calls [`PageCache::forget`]. Pages being written by a checkpoint are not here until they are written out.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::chunk::layout::Place;
use crate::chunk::page::Page;

#[derive(Debug)]
pub struct PageCache {
    pages_max: usize,
    pages: BTreeMap<Place, (u64, Arc<Page>)>,
    /// By the time of last use, which is unique.
    used: BTreeMap<u64, Place>,
    time: u64,
}

impl PageCache {
    pub fn new(pages_max: usize) -> PageCache {
        PageCache { pages_max: pages_max.max(1), pages: BTreeMap::new(), used: BTreeMap::new(), time: 0 }
    }

    pub fn get(&mut self, place: Place) -> Option<Arc<Page>> {
        let (used, page) = self.pages.get_mut(&place)?;
        self.used.remove(used);
        self.time += 1;
        *used = self.time;
        self.used.insert(self.time, place);
        Some(page.clone())
    }

    pub fn insert(&mut self, place: Place, page: Arc<Page>) {
        self.forget(place);
        while self.pages.len() >= self.pages_max {
            let (_, oldest) = self.used.pop_first().expect("every cached page has a time of use");
            self.pages.remove(&oldest);
        }
        self.time += 1;
        self.pages.insert(place, (self.time, page));
        self.used.insert(self.time, place);
    }

    pub fn forget(&mut self, place: Place) {
        if let Some((used, _)) = self.pages.remove(&place) {
            self.used.remove(&used);
        }
    }
}
