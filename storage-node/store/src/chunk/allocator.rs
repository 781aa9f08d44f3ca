//! Which slots and pages are taken, in memory only.
//!
//! Nothing of it is on the disk: open marks what the headers and maps name, and the rest is free. Who frees something
//! has made sure that no durable header, no frozen map and no read in flight leads to it.

use std::collections::{BTreeMap, BTreeSet};

use crate::chunk::layout::{Layout, Named, Place, SLOT_BLOCKS};

#[derive(Debug)]
pub struct Allocator {
    layout: Layout,
    /// One bit per slot, set: taken, by data, a state or a slab.
    taken: Vec<u64>,
    free_slots: u64,
    /// Where the search for a free slot goes on: next fit keeps what is written together together.
    cursor: u64,
    /// Slots cut into pages, with a bit per taken page; never zero.
    slabs: BTreeMap<u64, u16>,
    /// Slabs with a free page.
    open_slabs: BTreeSet<u64>,
}

/// Two things claim the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken(pub Named);

impl Allocator {
    pub fn new(layout: Layout) -> Allocator {
        Allocator {
            layout,
            taken: vec![0; layout.slots.div_ceil(64) as usize],
            free_slots: layout.slots,
            cursor: 0,
            slabs: BTreeMap::new(),
            open_slabs: BTreeSet::new(),
        }
    }

    pub fn free_slots(&self) -> u64 {
        self.free_slots
    }

    /// Everything taken, for the leak check.
    #[cfg(test)]
    pub fn named(&self) -> BTreeSet<Named> {
        let mut named = BTreeSet::new();
        for slot in (0..self.layout.slots).filter(|slot| self.is_taken(*slot)) {
            let place = self.layout.slot_place(slot);
            match self.slabs.get(&slot) {
                None => {
                    named.insert(Named::Slot(place));
                }
                Some(pages) => {
                    let taken = (0..SLOT_BLOCKS).filter(|page| pages & (1 << page) != 0);
                    named.extend(taken.map(|page| Named::Page(Place(place.0 + page))));
                }
            }
        }
        named
    }

    pub fn take_slot(&mut self) -> Option<Place> {
        let slot = self.find_free()?;
        self.take(slot);
        self.cursor = slot + 1;
        Some(self.layout.slot_place(slot))
    }

    pub fn take_page(&mut self) -> Option<Place> {
        let slab = match self.open_slabs.first() {
            Some(slab) => *slab,
            None => {
                let place = self.take_slot()?;
                let slot = self.layout.slot_of(place).expect("the allocator hands out slots");
                self.slabs.insert(slot, 0);
                self.open_slabs.insert(slot);
                slot
            }
        };
        let pages = self.slabs.get_mut(&slab).expect("open slabs are slabs");
        let page = u64::from(pages.trailing_ones());
        *pages |= 1 << page;
        if *pages == u16::MAX {
            self.open_slabs.remove(&slab);
        }
        Some(Place(self.layout.slot_place(slab).0 + page))
    }

    /// Marks what a map or header found at open names.
    pub fn mark(&mut self, named: Named) -> Result<(), Taken> {
        match named {
            Named::Slot(place) => {
                let slot = self.layout.slot_of(place).ok_or(Taken(named))?;
                if self.is_taken(slot) {
                    return Err(Taken(named));
                }
                self.take(slot);
            }
            Named::Page(place) => {
                let slot = self.layout.slot_of(place).ok_or(Taken(named))?;
                let bit = 1 << ((place.0 - self.layout.slots_start) % SLOT_BLOCKS);
                if !self.is_taken(slot) {
                    self.take(slot);
                    self.slabs.insert(slot, 0);
                    self.open_slabs.insert(slot);
                }
                let pages = self.slabs.get_mut(&slot).filter(|pages| **pages & bit == 0).ok_or(Taken(named))?;
                *pages |= bit;
                if *pages == u16::MAX {
                    self.open_slabs.remove(&slot);
                }
            }
        }
        Ok(())
    }

    /// # Panics
    /// Where it is not taken: freeing twice would hand one slot to two owners.
    pub fn free(&mut self, named: Named) {
        let (Named::Slot(place) | Named::Page(place)) = named;
        let slot = self.layout.slot_of(place).expect("only slots are freed");
        match named {
            Named::Slot(_) => {
                assert!(!self.slabs.contains_key(&slot), "{named:?} is a slab");
                self.release(slot);
            }
            Named::Page(_) => {
                let bit = 1 << ((place.0 - self.layout.slots_start) % SLOT_BLOCKS);
                let pages = self.slabs.get_mut(&slot).expect("pages lie in slabs");
                assert!(*pages & bit != 0, "{named:?} is freed twice");
                *pages &= !bit;
                self.open_slabs.insert(slot);
                if *pages == 0 {
                    self.slabs.remove(&slot);
                    self.open_slabs.remove(&slot);
                    self.release(slot);
                }
            }
        }
    }

    fn is_taken(&self, slot: u64) -> bool {
        self.taken[(slot / 64) as usize] & (1 << (slot % 64)) != 0
    }

    fn take(&mut self, slot: u64) {
        self.taken[(slot / 64) as usize] |= 1 << (slot % 64);
        self.free_slots -= 1;
    }

    fn release(&mut self, slot: u64) {
        assert!(self.is_taken(slot), "slot {slot} is freed twice");
        self.taken[(slot / 64) as usize] &= !(1 << (slot % 64));
        self.free_slots += 1;
    }

    fn find_free(&self) -> Option<u64> {
        if self.free_slots == 0 {
            return None;
        }
        self.find_free_from(self.cursor).or_else(|| self.find_free_from(0))
    }

    fn find_free_from(&self, start: u64) -> Option<u64> {
        let first_word = (start / 64) as usize;
        for (word, bits) in self.taken.iter().enumerate().skip(first_word) {
            // Slots below the start count as taken.
            let below = if word == first_word { (1u64 << (start % 64)) - 1 } else { 0 };
            let free = !(bits | below);
            if free != 0 {
                let slot = word as u64 * 64 + u64::from(free.trailing_zeros());
                return (slot < self.layout.slots).then_some(slot);
            }
        }
        None
    }
}
