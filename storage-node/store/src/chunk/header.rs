//! The header of a group: the one block whose durable write makes a checkpoint.
//!
//! Each entry of the table has two; generation g lies in copy `g % 2`, so that writing one never endangers the other.
//! The valid one of the higher generation counts. An entry whose copies are both zero was never used.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `HFGROUP1` |
//! | 8 | 4 | version, 2 |
//! | 12 | 4 | crc32c of the block with this field zero |
//! | 16 | 18 | group |
//! | 34 | 2 | flags: 1 deleted |
//! | 36 | 4 | number of the entry in the table |
//! | 40 | 16 | replica |
//! | 56 | 8 | generation, from 1 |
//! | 64 | 8 | checkpoint index |
//! | 72 | 8 | WAL sequence: batches up to it hold no newer hard state of this group |
//! | 80 | 8 | write-back index: blocks changed by records up to it may already be overwritten; zero: none above the checkpoint |
//! | 88 | 8 | place of the map's root; zero: empty map |
//! | 96 | 4 | crc32c of the root page |
//! | 100 | 4 | level of the root |
//! | 104 | 8 | slots the map names; all ones: not known |
//! | 112 | 8 | pages the map names; all ones: not known |
//! | 120 | 2 | bytes of the hard state |
//! | 122 | 2 | bytes of the position |
//! | 124 | 4 | bytes of the state |
//! | 128 | 4 | crc32c of the state |
//! | 132 | 4 | slots of the state; zero: it is inline |
//! | 136 | 8 | tombstones below this index are forgotten |
//! | 144 | 16 | hash of the map; means nothing while the counts are not known |
//! | 160 | 256 | hard state |
//! | 416 | 64 | position |
//! | 480 | 8 | installing: the map is of no single index, a delta up to this one was being installed; zero: none |
//! | 488 | 4 | era: what the next checkpoint takes is born in it, from 1 |
//! | 492 | 4 | snapshots in the table |
//! | 496 | 8 | place of the table's slot; zero: no snapshots |
//! | 504 | 4 | crc32c of the table |
//! | 508 | 4 | zero |
//! | 512 | 3584 | the state, or the places u64 of its slots |

use bytes::Bytes;
use holdfast_id::{GroupId, ID_BYTES, ReplicaId};

use crate::bytes_at::{put, u16_at, u32_at, u64_at};
use crate::chunk::layout::{Layout, Place, SLOT_BYTES};
use crate::chunk::page::{LEVEL_MAX, PageRef, Root};
use crate::chunk::snapshot::{SNAPSHOTS_MAX, TableHome};
use crate::device::BLOCK_BYTES;
use crate::group::{HARD_STATE_BYTES_MAX, POSITION_BYTES_MAX, STATE_BYTES_MAX};
use crate::superblock::COUNT_MAX;

const MAGIC: [u8; 8] = *b"HFGROUP1";
const VERSION: u32 = 2;
const FLAG_DELETED: u16 = 1;
/// Stands for a count that is not known.
pub const UNKNOWN: u64 = u64::MAX;
const HARD_STATE: usize = 160;
const POSITION: usize = HARD_STATE + HARD_STATE_BYTES_MAX;
const INSTALLING: usize = POSITION + POSITION_BYTES_MAX;
const ERA: usize = INSTALLING + 8;
const TABLE: usize = ERA + 4;
const STATE: usize = TABLE + 20;

/// Longest state that lies in the header itself.
pub const INLINE_STATE_BYTES_MAX: usize = BLOCK_BYTES - STATE;
const STATE_SLOTS_MAX: usize = STATE_BYTES_MAX / SLOT_BYTES;

const _: () = assert!(POSITION == 416 && STATE == 512 && INLINE_STATE_BYTES_MAX == 3584);
const _: () = assert!(STATE_SLOTS_MAX * 8 <= INLINE_STATE_BYTES_MAX, "the longest state's slots fit the header");
const _: () = assert!(16 + GroupId::BYTES == 34 && 40 + ID_BYTES == 56);

/// What a map amounts to; open holds it against what it finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub slots: u64,
    pub pages: u64,
    /// Equal at equal checkpoint index on every replica.
    pub hash: u128,
}

/// Where the caller's state lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateHome {
    Inline(Bytes),
    Slots { places: Vec<Place>, bytes: u32, crc: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub deleted: bool,
    pub entry: u32,
    pub generation: u64,
    pub index: u64,
    pub wal_sequence: u64,
    pub write_back_to: u64,
    pub root: Root,
    /// What the map names. `None` once a page was lost, with what it named, until an open has counted again.
    pub counts: Option<Counts>,
    pub forget_below: u64,
    /// Above zero: slots hold the changes up to other indices than `index`, the highest of them at most this.
    pub installing: u64,
    pub era: u32,
    pub table: Option<TableHome>,
    pub hard_state: Bytes,
    pub position: Bytes,
    pub state: StateHome,
}

/// What one copy of an entry holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copy {
    Unused,
    Valid(Box<Header>),
    /// Torn or rotten.
    Invalid,
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..8].copy_from_slice(&MAGIC);
        put(&mut block, 8, VERSION.to_le_bytes());
        block[16..34].copy_from_slice(&self.group.to_bytes());
        put(&mut block, 34, (if self.deleted { FLAG_DELETED } else { 0 }).to_le_bytes());
        put(&mut block, 36, self.entry.to_le_bytes());
        block[40..56].copy_from_slice(&self.replica.to_bytes());
        put(&mut block, 56, self.generation.to_le_bytes());
        put(&mut block, 64, self.index.to_le_bytes());
        put(&mut block, 72, self.wal_sequence.to_le_bytes());
        put(&mut block, 80, self.write_back_to.to_le_bytes());
        if let Some(root) = self.root.page {
            put(&mut block, 88, root.place.0.to_le_bytes());
            put(&mut block, 96, root.crc.to_le_bytes());
        }
        put(&mut block, 100, u32::from(self.root.level).to_le_bytes());
        put(&mut block, 104, self.counts.map_or(UNKNOWN, |counts| counts.slots).to_le_bytes());
        put(&mut block, 112, self.counts.map_or(UNKNOWN, |counts| counts.pages).to_le_bytes());
        put(&mut block, 120, (self.hard_state.len() as u16).to_le_bytes());
        put(&mut block, 122, (self.position.len() as u16).to_le_bytes());
        put(&mut block, 136, self.forget_below.to_le_bytes());
        put(&mut block, INSTALLING, self.installing.to_le_bytes());
        put(&mut block, ERA, self.era.to_le_bytes());
        if let Some(table) = self.table {
            put(&mut block, TABLE, table.snapshots.to_le_bytes());
            put(&mut block, TABLE + 4, table.place.0.to_le_bytes());
            put(&mut block, TABLE + 12, table.crc.to_le_bytes());
        }
        block[144..HARD_STATE].copy_from_slice(&self.counts.map_or(0, |counts| counts.hash).to_le_bytes());
        block[HARD_STATE..][..self.hard_state.len()].copy_from_slice(&self.hard_state);
        block[POSITION..][..self.position.len()].copy_from_slice(&self.position);
        match &self.state {
            StateHome::Inline(state) => {
                put(&mut block, 124, (state.len() as u32).to_le_bytes());
                put(&mut block, 128, crc32c::crc32c(state).to_le_bytes());
                block[STATE..][..state.len()].copy_from_slice(state);
            }
            StateHome::Slots { places, bytes, crc } => {
                put(&mut block, 124, bytes.to_le_bytes());
                put(&mut block, 128, (*crc).to_le_bytes());
                put(&mut block, 132, (places.len() as u32).to_le_bytes());
                for (i, place) in places.iter().enumerate() {
                    put(&mut block, STATE + 8 * i, place.0.to_le_bytes());
                }
            }
        }
        let crc = crc32c::crc32c(&block);
        put(&mut block, 12, crc.to_le_bytes());
        block
    }

    /// `entry`: where it was read from; a header that belongs elsewhere is invalid here.
    pub fn decode(layout: &Layout, entry: u32, block: &[u8]) -> Copy {
        if block.iter().all(|byte| *byte == 0) {
            return Copy::Unused;
        }
        Self::decode_used(layout, entry, block).map_or(Copy::Invalid, |header| Copy::Valid(Box::new(header)))
    }

    fn decode_used(layout: &Layout, entry: u32, block: &[u8]) -> Option<Header> {
        let mut unsummed = block.to_vec();
        put(&mut unsummed, 12, 0u32.to_le_bytes());
        if block[..8] != MAGIC || u32_at(block, 12) != crc32c::crc32c(&unsummed) || u32_at(block, 8) != VERSION {
            return None;
        }
        let hash = u128::from_le_bytes(block[144..HARD_STATE].try_into().ok()?);
        let flags = u16_at(block, 34);
        let place = Place(u64_at(block, 88));
        let page = (!place.is_none()).then_some(PageRef { place, crc: u32_at(block, 96) });
        let level = u32_at(block, 100);
        let (hard_state, position) = (usize::from(u16_at(block, 120)), usize::from(u16_at(block, 122)));
        let root_fits = page.is_none_or(|page| page.place == Place::LOST || layout.slot_of(page.place).is_some());
        let counts = [56, 64, 72, 80, 136, INSTALLING].map(|at| u64_at(block, at));
        let (snapshots, place) = (u32_at(block, TABLE), Place(u64_at(block, TABLE + 4)));
        let table = (!place.is_none()).then_some(TableHome { place, snapshots, crc: u32_at(block, TABLE + 12) });
        let table_fits = if table.is_some() { layout.is_slot(place) } else { snapshots == 0 };
        let fits = flags & !FLAG_DELETED == 0
            && table_fits
            && snapshots as usize <= SNAPSHOTS_MAX
            && u32_at(block, ERA) != 0
            && counts.iter().all(|count| *count <= COUNT_MAX)
            && u32_at(block, 36) == entry
            && level <= u32::from(LEVEL_MAX)
            && root_fits
            && hard_state <= HARD_STATE_BYTES_MAX
            && position <= POSITION_BYTES_MAX;
        if !fits {
            return None;
        }
        Some(Header {
            group: GroupId::from_bytes(block[16..34].try_into().ok()?)?,
            replica: ReplicaId::from_bytes(block[40..56].try_into().ok()?)?,
            deleted: flags & FLAG_DELETED != 0,
            entry,
            generation: u64_at(block, 56),
            index: u64_at(block, 64),
            wal_sequence: u64_at(block, 72),
            write_back_to: u64_at(block, 80),
            root: Root { page, level: level as u8 },
            counts: match (u64_at(block, 104), u64_at(block, 112)) {
                (UNKNOWN, _) | (_, UNKNOWN) => None,
                (slots, pages) => Some(Counts { slots, pages, hash }),
            },
            forget_below: u64_at(block, 136),
            installing: u64_at(block, INSTALLING),
            era: u32_at(block, ERA),
            table,
            hard_state: Bytes::copy_from_slice(&block[HARD_STATE..][..hard_state]),
            position: Bytes::copy_from_slice(&block[POSITION..][..position]),
            state: Self::decode_state(layout, block)?,
        })
    }

    fn decode_state(layout: &Layout, block: &[u8]) -> Option<StateHome> {
        let (bytes, crc, slots) = (u32_at(block, 124), u32_at(block, 128), u32_at(block, 132) as usize);
        if slots == 0 {
            let state = block.get(STATE..)?.get(..bytes as usize)?;
            return (crc32c::crc32c(state) == crc).then(|| StateHome::Inline(Bytes::copy_from_slice(state)));
        }
        if slots > STATE_SLOTS_MAX || slots != (bytes as usize).div_ceil(SLOT_BYTES) {
            return None;
        }
        let places: Vec<Place> = (0..slots).map(|i| Place(u64_at(block, STATE + 8 * i))).collect();
        places.iter().all(|place| layout.is_slot(*place)).then_some(StateHome::Slots { places, bytes, crc })
    }
}
