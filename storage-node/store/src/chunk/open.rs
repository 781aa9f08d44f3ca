//! Format and open: the only parts that block.
//!
//! Open scans the group table, and walks every map, because what no map names is free. It reads whole slabs, in the
//! order of their places: 64 KiB per sixteen pages, about 4 GiB per TiB of data.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use bytes::Bytes;

use crate::chunk::allocator::Allocator;
use crate::chunk::cache::PageCache;
use crate::chunk::header::{Copy, Counts, Header, StateHome};
use crate::chunk::layout::{Layout, Named, Place, SLOT_BYTES, SLOTS_MIN};
use crate::chunk::page::{FAN_OUT_BITS, Page, PageId, PageRef};
use crate::chunk::scrub::Scrub;
use crate::chunk::space::state_slots;
use crate::chunk::{CheckpointedGroup, Chunks, Counters, Group, Limits};
use crate::device::{BLOCK_BYTES, Device, Region};
use crate::group::{Damage, GroupState, OpenError};
use crate::ops::{AlignedBuffer, OpIds};

/// Bytes read or written at once while the table is scanned or cleared.
const TABLE_CHUNK_BYTES: u64 = 1 << 20;

impl Chunks {
    /// Bytes of the smallest region for so many groups.
    pub const fn region_bytes_min(groups_max: u32) -> u64 {
        Layout::bytes_min(groups_max)
    }

    /// Writes an empty group table for `groups_max` groups, then the region's header, and flushes both.
    pub fn format(device: &dyn Device, region: Region, groups_max: u32) -> io::Result<()> {
        let layout = Layout::new(region, groups_max).ok_or_else(|| {
            let reason = format!("the region needs {SLOTS_MIN} slots beside the table of {groups_max} groups");
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        layout.check_fits(device.len()?)?;
        // Headers of an earlier format would be found again: all of the table is cleared before the region is valid.
        let end = layout.offset(Place(layout.slots_start));
        let mut offset = region.start;
        while offset < end {
            let length = TABLE_CHUNK_BYTES.min(end - offset);
            device.write_at(offset, &AlignedBuffer::zeroed(length as usize))?;
            offset += length;
        }
        device.flush()?;
        device.write_at(region.start, &AlignedBuffer::padded(&layout.encode()))?;
        device.flush()
    }

    /// Reads what `format` and the checkpoints since have left. The region is the one given to `format`.
    pub fn open(
        device: &dyn Device,
        region: Region,
        ids: OpIds,
        limits: Limits,
    ) -> Result<(Chunks, Vec<CheckpointedGroup>), OpenError> {
        let device_bytes = device.len()?;
        if region.end > device_bytes {
            return Err(OpenError::TooSmall { actual_bytes: device_bytes, needed_bytes: region.end });
        }
        let layout = Layout::decode(region, &read(device, region.start, BLOCK_BYTES)?)?;
        let table = Table::scan(device, &layout)?;
        let mut chunks = Chunks {
            layout,
            limits,
            ids,
            groups: BTreeMap::new(),
            entries: table.unused,
            damaged_entries: table.damaged,
            allocator: Allocator::new(layout),
            reserved_blocks: 0,
            promised_blocks: 0,
            held_slots: 0,
            unasked_bytes: 0,
            cache: PageCache::new(limits.cached_pages),
            bad_pages: BTreeSet::new(),
            page_reads: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_read: 0,
            commit: None,
            commits: VecDeque::new(),
            frees: VecDeque::new(),
            drops: VecDeque::new(),
            orphans: Vec::new(),
            next_frozen: 0,
            questions: BTreeMap::new(),
            changes: Vec::new(),
            mends: BTreeMap::new(),
            mended_bytes: 0,
            repair_events: Vec::new(),
            scrub: Scrub::default(),
            pending: BTreeMap::new(),
            ops: Vec::new(),
            events: Vec::new(),
            counters: Counters::default(),
            failed: false,
        };
        let mut found = Vec::new();
        for (header, _) in table.headers {
            // A group found twice was not made by this program: `create_group` refuses it.
            if chunks.groups.contains_key(&header.group) {
                return Err(OpenError::Damaged {
                    what: "the group table",
                    offset: layout.header_offset(header.entry, header.generation),
                    reason: format!("group {} has two entries", header.group),
                });
            }
            found.push(chunks.open_group(device, header)?);
        }
        Ok((chunks, found))
    }

    fn open_group(&mut self, device: &dyn Device, mut header: Header) -> Result<CheckpointedGroup, OpenError> {
        let mut reason = self.mark_map(device, &mut header)?.err();
        let state = match read_state(device, &self.layout, &header)? {
            Some(state) => state,
            None => {
                reason.get_or_insert_with(|| "the state does not match its checksum".to_owned());
                Bytes::new()
            }
        };
        let mut group = Group::new(header);
        group.damaged = reason.is_some();
        group.installing = group.header.installing != 0;
        group.installing_to = group.header.installing;
        if let (true, Some(root)) = (group.damaged, &mut group.header.root.page) {
            // Two groups may claim its slots; neither reads nor frees them through this map.
            *root = PageRef::LOST;
        }
        let header = &group.header;
        let checkpointed = CheckpointedGroup {
            group: header.group,
            replica: header.replica,
            index: header.index,
            wal_sequence: header.wal_sequence,
            write_back_to: header.write_back_to,
            installing: header.installing,
            state: GroupState { hard_state: header.hard_state.clone(), position: header.position.clone(), state },
            map_hash: header.counts.filter(|_| header.installing == 0).map(|counts| counts.hash),
            damage: reason.map(|reason| Damage::Checkpoint { reason }),
        };
        self.groups.insert(header.group, group);
        Ok(checkpointed)
    }

    /// Marks all a header leads to. The inner error says that the map cannot be this group's.
    fn mark_map(&mut self, device: &dyn Device, header: &mut Header) -> Result<Result<(), String>, OpenError> {
        let claimed = |named| format!("{named:?} belongs to another group too");
        for named in state_slots(&header.state) {
            if self.allocator.mark(named).is_err() {
                return Ok(Err(claimed(named)));
            }
        }
        let id = PageId { group: header.group, replica: header.replica, level: header.root.level, number: 0 };
        let mut level: Vec<(PageId, PageRef)> = header.root.page.map(|page| (id, page)).into_iter().collect();
        let (mut counts, mut all_read) = (Counts::default(), true);
        while !level.is_empty() {
            all_read &= level.iter().all(|(_, at)| at.place != Place::LOST);
            level.retain(|(_, at)| at.place != Place::LOST);
            level.sort_unstable_by_key(|(_, at)| at.place);
            let mut next = Vec::new();
            let mut slab = (u64::MAX, Vec::new());
            for (id, at) in level {
                if self.allocator.mark(Named::Page(at.place)).is_err() {
                    return Ok(Err(claimed(Named::Page(at.place))));
                }
                counts.pages += 1;
                let slot = self.layout.slot_of(at.place).expect("decoding checked the place");
                let start = self.layout.slot_place(slot);
                if slab.0 != slot {
                    // A slab with an unreadable sector is read page by page below.
                    slab = (slot, read(device, self.layout.offset(start), SLOT_BYTES).unwrap_or_default());
                }
                let within = (at.place.0 - start.0) as usize * BLOCK_BYTES;
                let alone = match slab.1.get(within..within + BLOCK_BYTES) {
                    Some(block) => Ok(block.to_vec()),
                    None => read(device, self.layout.offset(at.place), BLOCK_BYTES),
                };
                let page = alone.ok().and_then(|block| Page::decode(&self.layout, &id, at.crc, &block).ok());
                match page {
                    None => {
                        self.counters.corrupt_pages += 1;
                        self.bad_pages.insert(at.place);
                        all_read = false;
                    }
                    Some(Page::Inner(inner)) => {
                        for (i, child) in inner.children.iter().enumerate() {
                            let number = (id.number << FAN_OUT_BITS) + i as u64;
                            next.extend(child.map(|child| (PageId { level: id.level - 1, number, ..id }, child.page)));
                        }
                    }
                    Some(Page::Leaf(leaf)) => {
                        all_read &= leaf.slots.iter().all(|slot| slot.lost == 0);
                        for (n, slot) in leaf.slots.iter().enumerate().filter(|(_, slot)| !slot.place.is_none()) {
                            if self.allocator.mark(Named::Slot(slot.place)).is_err() {
                                return Ok(Err(claimed(Named::Slot(slot.place))));
                            }
                            counts.slots += 1;
                            counts.hash = counts.hash.wrapping_add(leaf.slot_hash(id.number, n));
                        }
                    }
                }
            }
            level = next;
        }
        if all_read {
            if let Some(expected) = header.counts.filter(|expected| *expected != counts) {
                return Ok(Err(format!("the map holds {counts:?}, its header says {expected:?}")));
            }
            header.counts = Some(counts);
        }
        Ok(Ok(()))
    }
}

/// The group table as found.
struct Table {
    /// The headers in force, the surest first: one whose other copy is invalid may be older than the latest, and then
    /// names places that others have come by since.
    headers: Vec<(Header, bool)>,
    unused: BTreeMap<u32, u64>,
    damaged: Vec<u32>,
}

impl Table {
    fn scan(device: &dyn Device, layout: &Layout) -> Result<Table, OpenError> {
        let mut table = Table { headers: Vec::new(), unused: BTreeMap::new(), damaged: Vec::new() };
        let (start, end) = (layout.offset(Place(1)), layout.offset(Place(1 + 2 * u64::from(layout.groups_max))));
        let mut entry = 0;
        let mut offset = start;
        while offset < end {
            let length = TABLE_CHUNK_BYTES.min(end - offset);
            let chunk = read(device, offset, length as usize)?;
            for copies in chunk.chunks_exact(2 * BLOCK_BYTES) {
                let (even, odd) = copies.split_at(BLOCK_BYTES);
                table.add(entry, Header::decode(layout, entry, even), Header::decode(layout, entry, odd));
                entry += 1;
            }
            offset += length;
        }
        table.headers.sort_by_key(|(_, unsure)| *unsure);
        Ok(table)
    }

    fn add(&mut self, entry: u32, even: Copy, odd: Copy) {
        let (header, unsure) = match (even, odd) {
            (Copy::Valid(a), Copy::Valid(b)) => (if a.generation > b.generation { a } else { b }, false),
            (Copy::Valid(only), other) | (other, Copy::Valid(only)) => (only, other == Copy::Invalid),
            // A creation writes the second copy only when the first is durable: this one never was.
            (Copy::Unused, _) | (_, Copy::Unused) => {
                self.unused.insert(entry, 0);
                return;
            }
            (Copy::Invalid, Copy::Invalid) => {
                self.damaged.push(entry);
                return;
            }
        };
        if header.deleted {
            self.unused.insert(entry, header.generation);
        } else {
            self.headers.push((*header, unsure));
        }
    }
}

fn read(device: &dyn Device, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut buffer = AlignedBuffer::zeroed(length);
    device.read_at(offset, &mut buffer)?;
    Ok(buffer.to_vec())
}

/// `None` where it does not match its checksum.
fn read_state(device: &dyn Device, layout: &Layout, header: &Header) -> Result<Option<Bytes>, OpenError> {
    match &header.state {
        StateHome::Inline(state) => Ok(Some(state.clone())),
        StateHome::Slots { places, bytes, crc } => {
            let mut state = Vec::with_capacity(places.len() * SLOT_BYTES);
            for place in places {
                match read(device, layout.offset(*place), SLOT_BYTES) {
                    Ok(slot) => state.extend_from_slice(&slot),
                    Err(_) => return Ok(None),
                }
            }
            state.truncate(*bytes as usize);
            Ok((crc32c::crc32c(&state) == *crc).then(|| Bytes::from(state)))
        }
    }
}
