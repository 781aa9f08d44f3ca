//! Map pages: one block each, never changed in place, named and checksummed by the parent.
//!
//! ```text
//!      0        4       6     7     8            32      40          48        64
//!      | magic  | vers. | lvl | wid | group, born| number| generation| replica | body ...
//! leaf (level 0), body:
//!     64   16 x { place u64, last-changed index u64, present u16, lost u16, born u32 }
//!    448   256 x checksum u32 (crc32c of the block; zero where the block is not present)
//!   1472   zero
//! inner (level >= 1), body:
//!     64   256 x { place u40, index u48, crc32c of the page u32 }
//!   3904   zero
//! ```
//! `born`, of a page at 28 and of each slot, is the era of the group in which its place was taken; zero where a slot has
//! no place. It says which snapshots name the place too; see `snapshot`.
//!
//! A child's `index` is at least the last-changed index of every slot below it, so that whoever looks for changes
//! since some index passes by whole subtrees. A place of all ones is a page that was lost.
//!
//! `wid` is the width of the per-block metadata in bytes, 4 now; up to 14 fit a leaf. All numbers are little-endian,
//! identifiers big-endian as everywhere. `number` counts pages of the same level: leaf n covers blocks
//! `[256 n, 256 (n + 1))`, an inner page n the pages `[256 n, 256 (n + 1))` of the level below.

use holdfast_id::{GroupId, ID_BYTES, ReplicaId};

use crate::bytes_at::{put, u16_at, u32_at, u64_at};
use crate::chunk::layout::{GROUPS_MAX, Layout, Place, SLOT_BLOCKS, SLOTS_MAX};
use crate::device::BLOCK_BYTES;

/// Slots a leaf covers.
pub const LEAF_SLOTS: usize = 16;
/// Blocks a leaf covers: 1 MiB.
pub const LEAF_BLOCKS: u64 = LEAF_SLOTS as u64 * SLOT_BLOCKS;
/// Children of an inner page.
pub const FAN_OUT: usize = 256;
/// `log2` of [`FAN_OUT`].
pub const FAN_OUT_BITS: u32 = 8;
/// Highest level of a root: covers 2^40 blocks, far above the largest volume of 2^34.
pub const LEVEL_MAX: u8 = 4;
/// Log indices stay below it: 48 bits last for 89 years of 100,000 entries a second.
pub const INDEX_MAX: u64 = (1 << 48) - 1;
/// First block number no map can hold.
pub const BLOCKS_MAX: u64 = LEAF_BLOCKS << (FAN_OUT_BITS * LEVEL_MAX as u32);

const LEAF_MAGIC: [u8; 4] = *b"HFLF";
const INNER_MAGIC: [u8; 4] = *b"HFIN";
const VERSION: u16 = 2;
const WIDTH: u8 = 4;
const BORN: usize = 28;
const BODY: usize = 64;
const SLOT_ENTRY_BYTES: usize = 24;
const CHECKSUMS: usize = BODY + LEAF_SLOTS * SLOT_ENTRY_BYTES;
const LEAF_END: usize = CHECKSUMS + LEAF_BLOCKS as usize * WIDTH as usize;
const CHILD_BYTES: usize = 15;
/// A lost child's place, in the 40 bits a place has in an inner page.
const LOST_PLACE: u64 = (1 << 40) - 1;
const INNER_END: usize = BODY + FAN_OUT * CHILD_BYTES;

const _: () = assert!(CHECKSUMS == 448 && LEAF_END == 1472 && INNER_END == 3904);
const _: () = assert!(LEAF_END <= BLOCK_BYTES && INNER_END <= BLOCK_BYTES);
const _: () = assert!(CHECKSUMS + LEAF_BLOCKS as usize * 14 <= BLOCK_BYTES, "fourteen bytes per block fit");
const _: () = assert!(FAN_OUT == 1 << FAN_OUT_BITS && SLOT_BLOCKS == 16, "a slot's blocks fit a u16 mask");
const _: () = assert!(8 + GroupId::BYTES <= BORN && BORN + 4 <= 32 && 48 + ID_BYTES == BODY);
const _: () = assert!((SLOTS_MAX + 1) * SLOT_BLOCKS + 2 * GROUPS_MAX as u64 + 16 < LOST_PLACE, "places fit 40 bits");
const _: () = assert!(BLOCKS_MAX >= 1 << 34, "the largest volume fits");

/// Which page of which map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageId {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub level: u8,
    pub number: u64,
}

/// How a parent names a page. A `place` of [`Place::LOST`] names nothing readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef {
    pub place: Place,
    pub crc: u32,
}

impl PageRef {
    pub const LOST: PageRef = PageRef { place: Place::LOST, crc: 0 };
}

impl Child {
    /// Whoever looks for changes looks here too.
    pub const LOST: Child = Child { page: PageRef::LOST, index: INDEX_MAX };
}

/// A group's map: its root and the root's level. No root: nothing was ever written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Root {
    pub page: Option<PageRef>,
    pub level: u8,
}

impl Root {
    /// Whether a page of the level can lie below this root.
    pub fn covers(&self, level: u8, number: u64) -> bool {
        self.page.is_some() && level <= self.level && number >> (FAN_OUT_BITS * u32::from(self.level - level)) == 0
    }
}

/// Sixteen blocks of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotEntry {
    /// [`Place::NONE`] exactly where no block is present.
    pub place: Place,
    /// Log index that last changed a block; zero: never changed, or the tombstone was forgotten.
    pub index: u64,
    /// Bit i: block i lies at `place + i`. Others read as zeroes, unless lost.
    pub present: u16,
    /// Bit i: what block i held is unknown. Reads of it fail until it is overwritten.
    pub lost: u16,
    /// Era in which the place was taken; zero exactly where there is none.
    pub born: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Era in which the page's own place was taken; zero: it has none yet.
    pub born: u32,
    pub slots: [SlotEntry; LEAF_SLOTS],
    pub checksums: [u32; LEAF_BLOCKS as usize],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    /// As of a leaf.
    pub born: u32,
    pub children: [Option<Child>; FAN_OUT],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    pub page: PageRef,
    /// At least the last-changed index of every slot below.
    pub index: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    Leaf(Box<Leaf>),
    Inner(Box<Inner>),
}

/// Why a page cannot be used; all of them mean that what it said is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    #[error("the checksum does not match")]
    Checksum,
    #[error("it is another page")]
    Identity,
    #[error("its version is unknown")]
    Version,
    #[error("a field breaks its bound")]
    Field,
}

impl Leaf {
    pub fn empty() -> Leaf {
        Leaf { born: 0, slots: [SlotEntry::default(); LEAF_SLOTS], checksums: [0; LEAF_BLOCKS as usize] }
    }

    /// Stands in for a leaf that cannot be read.
    pub fn lost() -> Leaf {
        let mut leaf = Leaf::empty();
        for slot in &mut leaf.slots {
            slot.lost = u16::MAX;
        }
        leaf
    }

    /// What a slot of this leaf, the n-th, adds to the hash of the map.
    pub fn slot_hash(&self, number: u64, n: usize) -> u128 {
        let blocks = (0..SLOT_BLOCKS as usize).filter(|block| self.slots[n].present & (1 << block) != 0);
        let within = blocks.map(|block| n * SLOT_BLOCKS as usize + block);
        within.fold(0, |sum, i| sum.wrapping_add(block_hash(number * LEAF_BLOCKS + i as u64, self.checksums[i])))
    }

    fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| *slot == SlotEntry::default())
    }
}

impl Inner {
    pub fn empty() -> Inner {
        Inner { born: 0, children: [None; FAN_OUT] }
    }

    /// Stands in for an inner page that cannot be read.
    pub fn lost() -> Inner {
        Inner { born: 0, children: [Some(Child::LOST); FAN_OUT] }
    }
}

impl Page {
    pub fn empty(level: u8) -> Page {
        if level == 0 { Page::Leaf(Box::new(Leaf::empty())) } else { Page::Inner(Box::new(Inner::empty())) }
    }

    pub fn lost(level: u8) -> Page {
        if level == 0 { Page::Leaf(Box::new(Leaf::lost())) } else { Page::Inner(Box::new(Inner::lost())) }
    }

    /// Whether the parent need not name it.
    pub fn is_empty(&self) -> bool {
        match self {
            Page::Leaf(leaf) => leaf.is_empty(),
            Page::Inner(inner) => inner.children.iter().all(Option::is_none),
        }
    }

    pub fn born(&self) -> u32 {
        match self {
            Page::Leaf(leaf) => leaf.born,
            Page::Inner(inner) => inner.born,
        }
    }

    pub fn set_born(&mut self, era: u32) {
        match self {
            Page::Leaf(leaf) => leaf.born = era,
            Page::Inner(inner) => inner.born = era,
        }
    }

    /// The newest change below, for the parent to note.
    pub fn index(&self) -> u64 {
        match self {
            Page::Leaf(leaf) if leaf.slots.iter().any(|slot| slot.lost != 0) => INDEX_MAX,
            Page::Leaf(leaf) => leaf.slots.iter().map(|slot| slot.index).max().unwrap_or(0),
            Page::Inner(inner) => inner.children.iter().flatten().map(|child| child.index).max().unwrap_or(0),
        }
    }

    /// # Panics
    /// Where the kind of page is not that of the level: the caller looked it up under that level.
    pub fn leaf(&self) -> &Leaf {
        match self {
            Page::Leaf(leaf) => leaf,
            Page::Inner(_) => panic!("a page of level 0 is a leaf"),
        }
    }

    /// # Panics
    /// As [`Page::leaf`].
    pub fn inner(&self) -> &Inner {
        match self {
            Page::Inner(inner) => inner,
            Page::Leaf(_) => panic!("a page above level 0 is an inner page"),
        }
    }

    pub fn encode(&self, id: &PageId, generation: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..4].copy_from_slice(if id.level == 0 { &LEAF_MAGIC } else { &INNER_MAGIC });
        put(&mut block, 4, VERSION.to_le_bytes());
        block[6] = id.level;
        block[7] = WIDTH;
        block[8..8 + GroupId::BYTES].copy_from_slice(&id.group.to_bytes());
        put(&mut block, BORN, self.born().to_le_bytes());
        put(&mut block, 32, id.number.to_le_bytes());
        put(&mut block, 40, generation.to_le_bytes());
        block[48..BODY].copy_from_slice(&id.replica.to_bytes());
        match self {
            Page::Leaf(leaf) => {
                assert_eq!(id.level, 0, "leaves are level 0");
                for (i, slot) in leaf.slots.iter().enumerate() {
                    assert_eq!(slot.place.is_none(), slot.present == 0, "a place exactly where a block is present");
                    assert_eq!(slot.place.is_none(), slot.born == 0, "a place was taken in some era");
                    let at = BODY + i * SLOT_ENTRY_BYTES;
                    put(&mut block, at, slot.place.0.to_le_bytes());
                    put(&mut block, at + 8, slot.index.to_le_bytes());
                    put(&mut block, at + 16, slot.present.to_le_bytes());
                    put(&mut block, at + 18, slot.lost.to_le_bytes());
                    put(&mut block, at + 20, slot.born.to_le_bytes());
                }
                for (i, checksum) in leaf.checksums.iter().enumerate() {
                    put(&mut block, CHECKSUMS + i * 4, checksum.to_le_bytes());
                }
            }
            Page::Inner(inner) => {
                assert!((1..=LEVEL_MAX).contains(&id.level), "inner pages are above level 0");
                for (i, child) in inner.children.iter().enumerate() {
                    if let Some(child) = child {
                        let place = if child.page.place == Place::LOST { LOST_PLACE } else { child.page.place.0 };
                        assert!(place <= LOST_PLACE && child.index <= INDEX_MAX, "{child:?} does not fit");
                        let at = BODY + i * CHILD_BYTES;
                        block[at..at + 5].copy_from_slice(&place.to_le_bytes()[..5]);
                        block[at + 5..at + 11].copy_from_slice(&child.index.to_le_bytes()[..6]);
                        put(&mut block, at + 11, child.page.crc.to_le_bytes());
                    }
                }
            }
        }
        block
    }

    /// Checks everything a page can be checked for alone: its checksum as the parent has it, that it is the page
    /// looked for, and that every place lies where such a thing can lie.
    pub fn decode(layout: &Layout, id: &PageId, crc: u32, block: &[u8]) -> Result<Page, PageError> {
        if crc32c::crc32c(block) != crc {
            return Err(PageError::Checksum);
        }
        let magic = if id.level == 0 { LEAF_MAGIC } else { INNER_MAGIC };
        let identity = block[..4] == magic
            && block[6] == id.level
            && block[8..8 + GroupId::BYTES] == id.group.to_bytes()
            && u64_at(block, 32) == id.number
            && block[48..BODY] == id.replica.to_bytes();
        if !identity {
            return Err(PageError::Identity);
        }
        if u16_at(block, 4) != VERSION || block[7] != WIDTH {
            return Err(PageError::Version);
        }
        if id.level == 0 { Self::decode_leaf(layout, block) } else { Self::decode_inner(layout, block) }
    }

    fn decode_leaf(layout: &Layout, block: &[u8]) -> Result<Page, PageError> {
        let mut leaf = Box::new(Leaf { born: u32_at(block, BORN), ..Leaf::empty() });
        for (i, slot) in leaf.slots.iter_mut().enumerate() {
            let at = BODY + i * SLOT_ENTRY_BYTES;
            *slot = SlotEntry {
                place: Place(u64_at(block, at)),
                index: u64_at(block, at + 8),
                present: u16_at(block, at + 16),
                lost: u16_at(block, at + 18),
                born: u32_at(block, at + 20),
            };
            let placed = slot.present != 0;
            let fits = placed != slot.place.is_none() && placed == (slot.born != 0);
            if !fits || placed && !layout.is_slot(slot.place) || slot.present & slot.lost != 0 {
                return Err(PageError::Field);
            }
        }
        for (i, checksum) in leaf.checksums.iter_mut().enumerate() {
            *checksum = u32_at(block, CHECKSUMS + i * 4);
        }
        Ok(Page::Leaf(leaf))
    }

    fn decode_inner(layout: &Layout, block: &[u8]) -> Result<Page, PageError> {
        let mut inner = Box::new(Inner { born: u32_at(block, BORN), ..Inner::empty() });
        for (i, child) in inner.children.iter_mut().enumerate() {
            let at = BODY + i * CHILD_BYTES;
            let place = match u64_at(block, at) & LOST_PLACE {
                0 => continue,
                LOST_PLACE => Place::LOST,
                place if layout.slot_of(Place(place)).is_some() => Place(place),
                _ => return Err(PageError::Field),
            };
            let page = PageRef { place, crc: u32_at(block, at + 11) };
            *child = Some(Child { page, index: u64_at(block, at + 5) & INDEX_MAX });
        }
        Ok(Page::Inner(inner))
    }
}

/// The hash of a map is the sum of these over all present blocks: it depends on what the blocks hold alone, not on
/// where they lie or when they were written back, so replicas compare it; and a checkpoint keeps it up to date with
/// the blocks it changes. It tells accidents apart, not adversaries.
pub fn block_hash(block: u64, checksum: u32) -> u128 {
    let lane = |salt: u64| mix(block ^ mix(u64::from(checksum) ^ salt));
    u128::from(lane(0x243f_6a88_85a3_08d3)) << 64 | u128::from(lane(0x1319_8a2e_0370_7344))
}

/// The finaliser of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
