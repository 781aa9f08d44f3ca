//! Where things lie in the region, and the words for places.
//!
//! ```text
//! block 0        1                      1 + 2 * groups      rounded up to a whole slot
//!       | region | group table          | unused            | slot | slot | slot | ...
//!       | header | entry 0: A B, 1: A B |                   | 64 KiB each
//! ```
//! A slot holds sixteen blocks of one group's data, or a slab of sixteen map pages of any groups, or a part of a
//! state too long for its group's header. Nothing on the disk says which: the headers and maps that name it do.

use std::io;

use crate::bytes_at::{put, u32_at, u64_at};
use crate::device::{BLOCK_BYTES, Region};
use crate::group::OpenError;

/// Blocks of a slot.
pub const SLOT_BLOCKS: u64 = 16;
pub const SLOT_BYTES: usize = SLOT_BLOCKS as usize * BLOCK_BYTES;
/// Most groups of one disk; the table takes 8 KiB for each.
pub const GROUPS_MAX: u32 = 1 << 16;
/// Fewest slots worth a region: below that the reserve is most of it.
pub const SLOTS_MIN: u64 = 64;
/// Most slots of one disk (64 TiB): bounds the allocator's memory, one bit each.
pub const SLOTS_MAX: u64 = 1 << 30;

const MAGIC: [u8; 8] = *b"HFCHUNKS";
const VERSION: u32 = 2;

/// A block of the region, counted from its start; zero, the region's header, stands for "nowhere".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place(pub u64);

impl Place {
    pub const NONE: Place = Place(0);
    /// Stands in a map for a page that could not be read when its parent was rewritten: everything below is lost.
    pub const LOST: Place = Place(u64::MAX);

    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Place({:#x})", self.0)
    }
}

/// What a map or header names, and the allocator hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Named {
    Slot(Place),
    Page(Place),
}

/// The shape of a region, fixed by its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub region: Region,
    pub groups_max: u32,
    /// First block of the first slot; a multiple of [`SLOT_BLOCKS`].
    pub slots_start: u64,
    pub slots: u64,
}

impl Layout {
    /// `None` where the region holds fewer than [`SLOTS_MIN`] slots or the table breaks its limit.
    pub fn new(region: Region, groups_max: u32) -> Option<Layout> {
        if groups_max == 0 || groups_max > GROUPS_MAX {
            return None;
        }
        let slots_start = (1 + 2 * u64::from(groups_max)).next_multiple_of(SLOT_BLOCKS);
        let blocks = region.bytes() / BLOCK_BYTES as u64;
        let slots = (blocks.checked_sub(slots_start)? / SLOT_BLOCKS).min(SLOTS_MAX);
        (slots >= SLOTS_MIN).then_some(Layout { region, groups_max, slots_start, slots })
    }

    /// Bytes of the smallest region for so many groups.
    pub const fn bytes_min(groups_max: u32) -> u64 {
        let slots_start = (1 + 2 * groups_max as u64).next_multiple_of(SLOT_BLOCKS);
        (slots_start + SLOTS_MIN * SLOT_BLOCKS) * BLOCK_BYTES as u64
    }

    /// Byte of the device where a place starts.
    pub fn offset(&self, place: Place) -> u64 {
        self.region.start + place.0 * BLOCK_BYTES as u64
    }

    /// The place that starts at a byte of the device; `None` where none does.
    pub fn place_at(&self, offset: u64) -> Option<Place> {
        let within = offset.checked_sub(self.region.start).filter(|_| offset < self.region.end)?;
        within.is_multiple_of(BLOCK_BYTES as u64).then_some(Place(within / BLOCK_BYTES as u64))
    }

    /// Byte of the device where one of the two headers of a table entry lies. Headers alternate by generation.
    pub fn header_offset(&self, entry: u32, generation: u64) -> u64 {
        assert!(entry < self.groups_max);
        self.offset(Place(1 + 2 * u64::from(entry) + generation % 2))
    }

    pub fn slot_place(&self, slot: u64) -> Place {
        assert!(slot < self.slots);
        Place(self.slots_start + slot * SLOT_BLOCKS)
    }

    /// The slot a place lies in; `None` for places outside the slots.
    pub fn slot_of(&self, place: Place) -> Option<u64> {
        let slot = place.0.checked_sub(self.slots_start)? / SLOT_BLOCKS;
        (slot < self.slots).then_some(slot)
    }

    /// Whether the place is the first block of a slot.
    pub fn is_slot(&self, place: Place) -> bool {
        place.0.is_multiple_of(SLOT_BLOCKS) && self.slot_of(place).is_some()
    }

    /// The region's header. Offsets: 0 magic (8), 8 version u32, 12 crc32c of the block with this field zero,
    /// 16 groups u32, 20 zero, 24 start u64, 32 end u64 (bytes of the device); the rest is zero.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..8].copy_from_slice(&MAGIC);
        put(&mut block, 8, VERSION.to_le_bytes());
        put(&mut block, 16, self.groups_max.to_le_bytes());
        put(&mut block, 24, self.region.start.to_le_bytes());
        put(&mut block, 32, self.region.end.to_le_bytes());
        let crc = crc32c::crc32c(&block);
        put(&mut block, 12, crc.to_le_bytes());
        block
    }

    pub fn decode(region: Region, block: &[u8]) -> Result<Layout, OpenError> {
        let damaged = |reason: &str| OpenError::Damaged {
            what: "the header of the chunk region",
            offset: region.start,
            reason: reason.to_owned(),
        };
        let mut unsummed = block.to_vec();
        put(&mut unsummed, 12, 0u32.to_le_bytes());
        if block[..8] != MAGIC {
            return Err(damaged("no magic"));
        }
        if crc32c::crc32c(&unsummed) != u32_at(block, 12) {
            return Err(damaged("checksum"));
        }
        if u32_at(block, 8) != VERSION {
            return Err(damaged("unknown version"));
        }
        if (u64_at(block, 24), u64_at(block, 32)) != (region.start, region.end) {
            return Err(damaged("it belongs to another region"));
        }
        Layout::new(region, u32_at(block, 16)).ok_or_else(|| damaged("impossible sizes"))
    }

    pub fn check_fits(&self, device_bytes: u64) -> io::Result<()> {
        if self.region.end > device_bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the region ends beyond the device"));
        }
        Ok(())
    }
}
