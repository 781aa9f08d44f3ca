//! What one map of a group names and another does not: two maps walked side by side, passing by what they share.
//!
//! Also of a map with none beside it, which is all of it. What is found is freed page by page; a crash in between is no
//! matter, because open knows nothing of a map that no header names.

use holdfast_id::{GroupId, ReplicaId};

use crate::chunk::Chunks;
use crate::chunk::layout::{Named, Place};
use crate::chunk::page::{FAN_OUT, FAN_OUT_BITS, Leaf, Page, PageId, PageRef, Root};
use crate::chunk::walk::Waiter;

/// Pairs of pages looked at before other work has its turn.
const STEPS_MAX: usize = 64;

/// A map, or a part of one, by its highest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub level: u8,
    pub page: PageRef,
}

/// Two parts at the same position. One that is lower than the position lies under its first children.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub id: PageId,
    pub mine: Option<Part>,
    pub other: Option<Part>,
}

/// A walk on its way.
#[derive(Debug)]
pub struct Difference {
    group: GroupId,
    replica: ReplicaId,
    /// Places born up to it are named by an earlier map too.
    above: u32,
    /// Not looked at yet.
    pairs: Vec<Pair>,
    /// Its next page is being read.
    pub waiting: bool,
    /// What is freed after it was begun is not reused before it ends: the map beside it is not its own.
    pub serial: Option<u64>,
}

/// A page of a pair.
enum Looked {
    Page(std::sync::Arc<Page>),
    /// None there: the part lies lower, or there is no part.
    None,
    Lost,
    /// It is being read.
    Waits,
}

impl Part {
    pub fn of(root: Root) -> Option<Part> {
        root.page.map(|page| Part { level: root.level, page })
    }

    /// What of it lies under the i-th child of a position at `level`, where its page, if it has one there, is `page`.
    pub fn child(&self, level: u8, i: usize, page: Option<&Page>) -> Option<Part> {
        if self.level < level {
            return Some(*self).filter(|_| i == 0);
        }
        page?.inner().children[i].map(|child| Part { level: level - 1, page: child.page })
    }
}

impl Pair {
    /// The roots of two maps.
    pub fn of(group: GroupId, replica: ReplicaId, mine: Root, other: Root) -> Pair {
        let (mine, other) = (Part::of(mine), Part::of(other));
        let level = mine.iter().chain(&other).map(|part| part.level).max().unwrap_or(0);
        Pair { id: PageId { group, replica, level, number: 0 }, mine, other }
    }

    /// The pairs below, given the pages at this position.
    pub fn children(&self, mine: Option<&Page>, other: Option<&Page>) -> Vec<Pair> {
        let PageId { level, number, .. } = self.id;
        let child = |part: Option<Part>, i, page| part.and_then(|part| part.child(level, i, page));
        let pairs = (0..FAN_OUT).map(|i| Pair {
            id: PageId { level: level - 1, number: (number << FAN_OUT_BITS) + i as u64, ..self.id },
            mine: child(self.mine, i, mine),
            other: child(self.other, i, other),
        });
        pairs.filter(|pair| pair.mine != pair.other).collect()
    }

    /// The part's page at this position, if it has one.
    pub fn page_of(&self, part: Option<Part>) -> Option<PageRef> {
        part.filter(|part| part.level == self.id.level).map(|part| part.page)
    }
}

impl Chunks {
    /// Begins to free what `mine` names, `other` does not, and no earlier map: nothing born up to `above`.
    pub(super) fn drop_difference(
        &mut self,
        group: GroupId,
        replica: ReplicaId,
        mine: Root,
        other: Option<Root>,
        above: u32,
    ) {
        let pair = Pair::of(group, replica, mine, other.unwrap_or_default());
        if pair.mine == pair.other {
            return;
        }
        let serial = other.map(|_| self.next_read);
        self.next_read += 1;
        self.drops.push_back(Difference { group, replica, above, pairs: vec![pair], waiting: false, serial });
    }

    pub(super) fn advance_drops(&mut self) {
        for _ in 0..STEPS_MAX {
            let Some(drop) = self.drops.front_mut() else { return };
            if drop.waiting {
                return;
            }
            let above = drop.above;
            let Some(pair) = drop.pairs.pop() else {
                self.drops.pop_front();
                continue;
            };
            let mine = self.look(&pair, pair.mine);
            let other = if let Looked::Waits = mine { Looked::Waits } else { self.look(&pair, pair.other) };
            match (mine, other) {
                (Looked::Waits, _) | (_, Looked::Waits) => {
                    let drop = self.drops.front_mut().expect("it was there above");
                    drop.pairs.push(pair);
                    drop.waiting = true;
                    return;
                }
                // What the other map still names is not known.
                (_, Looked::Lost) => {}
                (Looked::Lost, _) => {
                    let page = pair.page_of(pair.mine).filter(|page| page.place != Place::LOST);
                    // Its birth is not known.
                    if let Some(page) = page.filter(|_| above == 0) {
                        self.drop_named(vec![Named::Page(page.place)]);
                    }
                }
                (mine, other) => self.drop_pair(&pair, mine.page(), other.page(), above),
            }
        }
    }

    fn look(&mut self, pair: &Pair, part: Option<Part>) -> Looked {
        match pair.page_of(part) {
            None => Looked::None,
            Some(at) if self.is_lost(at) => Looked::Lost,
            Some(at) => match self.cache.get(at.place) {
                Some(page) => Looked::Page(page),
                None => {
                    self.read_page(pair.id, at, Waiter::Drop);
                    Looked::Waits
                }
            },
        }
    }

    fn drop_pair(&mut self, pair: &Pair, mine: Option<&Page>, other: Option<&Page>, above: u32) {
        let mut named = Vec::new();
        if pair.id.level == 0 {
            named.extend(mine.into_iter().flat_map(|mine| slots_beside(mine.leaf(), other.map(Page::leaf), above)));
        } else {
            let drop = self.drops.front_mut().expect("the drop under way is the first");
            drop.pairs.extend(pair.children(mine, other).into_iter().filter(|pair| pair.mine.is_some()));
        }
        if let (Some(page), Some(at)) = (mine, pair.page_of(pair.mine))
            && page.born() > above
        {
            named.push(Named::Page(at.place));
        }
        self.drop_named(named);
    }

    fn drop_named(&mut self, named: Vec<Named>) {
        let drop = self.drops.front().expect("the drop under way is the first");
        let found = self.groups.get_mut(&drop.group).filter(|found| found.header.replica == drop.replica);
        let freed = match found {
            Some(found) => found.settle(Vec::new(), named),
            None => named,
        };
        self.free_later(freed);
    }
}

impl Looked {
    fn page(&self) -> Option<&Page> {
        if let Looked::Page(page) = self { Some(page) } else { None }
    }
}

/// The slots that a leaf names, another at its position does not, and none from before.
fn slots_beside(mine: &Leaf, other: Option<&Leaf>, above: u32) -> Vec<Named> {
    let other = |n: usize| other.map_or(Place::NONE, |other| other.slots[n].place);
    let slots = mine.slots.iter().enumerate().filter(|(_, slot)| !slot.place.is_none());
    slots
        .filter(|(n, slot)| slot.place != other(*n) && slot.born > above)
        .map(|(_, slot)| Named::Slot(slot.place))
        .collect()
}
