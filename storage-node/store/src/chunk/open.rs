//! Format and open: the only parts that block.
//!
//! Open scans the group table, and walks every map, because what no map names is free. It reads whole slabs, in the
//! order of their places: 64 KiB per sixteen pages, about 4 GiB per TiB of data.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId};

use crate::chunk::allocator::Allocator;
use crate::chunk::cache::PageCache;
use crate::chunk::difference::Pair;
use crate::chunk::header::{Copy, Counts, Header, StateHome};
use crate::chunk::layout::{Layout, Named, Place, SLOT_BYTES, SLOTS_MIN};
use crate::chunk::page::{Leaf, Page, PageId, PageRef, Root};
use crate::chunk::scrub::Scrub;
use crate::chunk::snapshot::{Snapshot, decode_table, table_slot};
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
            waiting_cuts: BTreeSet::new(),
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
        let (snapshots, mut reason) = match self.mark_group(device, &mut header)? {
            Ok(snapshots) => (snapshots, None),
            Err(reason) => (Vec::new(), Some(reason)),
        };
        let state = match read_state(device, &self.layout, &header)? {
            Some(state) => state,
            None => {
                reason.get_or_insert_with(|| "the state does not match its checksum".to_owned());
                Bytes::new()
            }
        };
        let mut group = Group::new(header);
        group.damaged = reason.is_some();
        group.snapshots = if group.damaged { Vec::new() } else { snapshots };
        group.installing = group.header.installing != 0;
        group.installing_to = group.header.installing;
        if let (true, Some(root)) = (group.damaged, &mut group.header.root.page) {
            // Two groups may claim its slots; neither reads nor frees them through this map.
            *root = PageRef::LOST;
        }
        if group.damaged {
            // Nor its table, which may not even have been looked at.
            group.header.table = None;
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

    /// Marks all a header leads to, and reads its table of snapshots. The inner error says that a map cannot be this
    /// group's, or that it is not what it was.
    fn mark_group(
        &mut self,
        device: &dyn Device,
        header: &mut Header,
    ) -> Result<Result<Vec<Snapshot>, String>, OpenError> {
        for named in state_slots(&header.state).into_iter().chain(table_slot(header.table)) {
            if self.allocator.mark(named).is_err() {
                return Ok(Err(claimed(named)));
            }
        }
        let mut snapshots = Vec::new();
        if let Some(home) = header.table {
            let table = read(device, self.layout.offset(home.place), home.bytes().next_multiple_of(BLOCK_BYTES));
            let state = |place| read(device, self.layout.offset(place), SLOT_BYTES).ok().map(Bytes::from);
            match table.ok().and_then(|table| decode_table(&self.layout, &home, &table, state)) {
                Some(found) => snapshots = found,
                None => return Ok(Err("the table of snapshots does not match its checksum".to_owned())),
            }
        }
        for snapshot in &snapshots {
            let named = Named::Slot(snapshot.state_place);
            if self.allocator.mark(named).is_err() {
                return Ok(Err(claimed(named)));
            }
        }
        let mut maps = Maps {
            group: header.group,
            replica: header.replica,
            older: Root::default(),
            era: 0,
            counts: Some(Counts::default()),
            whole: true,
        };
        for snapshot in &mut snapshots {
            if let Err(reason) = self.mark_map(device, &mut maps, snapshot.root, snapshot.era, &mut snapshot.counts)? {
                return Ok(Err(format!("snapshot {}: {reason}", snapshot.index)));
            }
        }
        if snapshots.last().is_some_and(|last| last.era >= header.era || last.index > header.index) {
            return Ok(Err("a snapshot is younger than the group".to_owned()));
        }
        let marked = self.mark_map(device, &mut maps, header.root, header.era, &mut header.counts)?;
        Ok(marked.map(|()| snapshots))
    }

    /// Marks what a map names beside the next older one of the group, and holds what it amounts to against `expected`.
    fn mark_map(
        &mut self,
        device: &dyn Device,
        maps: &mut Maps,
        root: Root,
        era: u32,
        expected: &mut Option<Counts>,
    ) -> Result<Result<(), String>, OpenError> {
        let mut counts = maps.counts.unwrap_or_default();
        let (mut mine, mut other) = (Slab::default(), Slab::default());
        let first = Pair::of(maps.group, maps.replica, root, maps.older);
        let mut level: Vec<Pair> = Some(first).filter(|pair| pair.mine != pair.other).into_iter().collect();
        while !level.is_empty() {
            level.sort_unstable_by_key(|pair| pair.mine.map(|part| part.page.place));
            let mut next = Vec::new();
            for pair in level {
                let older = match pair.page_of(pair.other) {
                    None => None,
                    Some(at) => match self.read_marked(device, &mut other, &pair.id, at) {
                        Some(page) => Some(page),
                        // Shared or not: what lies below cannot be told.
                        None => {
                            maps.whole = false;
                            None
                        }
                    },
                };
                let at = pair.page_of(pair.mine).filter(|at| at.place != Place::LOST);
                maps.whole &= pair.page_of(pair.mine).is_none_or(|at| at.place != Place::LOST);
                if let Some(at) = at {
                    if self.allocator.mark(Named::Page(at.place)).is_err() && maps.whole {
                        return Ok(Err(claimed(Named::Page(at.place))));
                    }
                    counts.pages += 1;
                }
                let page = at.and_then(|at| self.read_marked(device, &mut mine, &pair.id, at));
                if at.is_some() && page.is_none() {
                    self.counters.corrupt_pages += 1;
                    maps.whole = false;
                }
                if let Some(page) = page.as_ref().filter(|page| page.born() <= maps.era || page.born() > era) {
                    return Ok(Err(format!("a page born in era {} is not shared", page.born())));
                }
                counts.pages = counts.pages.saturating_sub(u64::from(older.is_some()));
                if pair.id.level > 0 {
                    next.extend(pair.children(page.as_ref(), older.as_ref()));
                    continue;
                }
                let leaves = (page.as_ref().map(Page::leaf), older.as_ref().map(Page::leaf));
                if let Err(reason) = self.mark_leaf(maps, era, pair.id.number, leaves, &mut counts) {
                    return Ok(Err(reason));
                }
            }
            level = next;
        }
        (maps.older, maps.era) = (root, era);
        maps.counts = maps.whole.then_some(counts);
        if maps.whole {
            if let Some(expected) = expected.filter(|expected| *expected != counts) {
                return Ok(Err(format!("the map holds {counts:?}, its header says {expected:?}")));
            }
            *expected = Some(counts);
        }
        Ok(Ok(()))
    }

    fn mark_leaf(
        &mut self,
        maps: &mut Maps,
        era: u32,
        number: u64,
        (mine, other): (Option<&Leaf>, Option<&Leaf>),
        counts: &mut Counts,
    ) -> Result<(), String> {
        let empty = Leaf::empty();
        let (mine, other) = (mine.unwrap_or(&empty), other.unwrap_or(&empty));
        maps.whole &= mine.slots.iter().all(|slot| slot.lost == 0);
        for (n, (slot, older)) in mine.slots.iter().zip(&other.slots).enumerate() {
            let (is, was) = (!slot.place.is_none(), !older.place.is_none());
            let fits = if slot.place == older.place {
                slot.born == older.born
            } else {
                !is || self.allocator.mark(Named::Slot(slot.place)).is_ok() && slot.born > maps.era && slot.born <= era
            };
            if !fits && maps.whole {
                return Err(claimed(Named::Slot(slot.place)));
            }
            counts.slots = (counts.slots + u64::from(is)).saturating_sub(u64::from(was));
            let (hash, former) = (mine.slot_hash(number, n), other.slot_hash(number, n));
            counts.hash = counts.hash.wrapping_add(hash).wrapping_sub(former);
        }
        Ok(())
    }

    fn read_marked(&mut self, device: &dyn Device, slab: &mut Slab, id: &PageId, at: PageRef) -> Option<Page> {
        let start = self.layout.slot_place(self.layout.slot_of(at.place)?);
        if slab.start != start {
            // A slab with an unreadable sector is read page by page below.
            *slab = Slab { start, data: read(device, self.layout.offset(start), SLOT_BYTES).unwrap_or_default() };
        }
        let within = (at.place.0 - start.0) as usize * BLOCK_BYTES;
        let block = match slab.data.get(within..within + BLOCK_BYTES) {
            Some(block) => Ok(block.to_vec()),
            None => read(device, self.layout.offset(at.place), BLOCK_BYTES),
        };
        let page = block.ok().and_then(|block| Page::decode(&self.layout, id, at.crc, &block).ok());
        if page.is_none() {
            self.bad_pages.insert(at.place);
        }
        page
    }
}

/// The maps of a group on their way in, the oldest first.
struct Maps {
    group: GroupId,
    replica: ReplicaId,
    /// The last one marked, and its era.
    older: Root,
    era: u32,
    /// What that one amounts to, while everything was readable.
    counts: Option<Counts>,
    whole: bool,
}

/// The slot read last: pages that were written together lie together.
#[derive(Default)]
struct Slab {
    start: Place,
    data: Vec<u8>,
}

fn claimed(named: Named) -> String {
    format!("{named:?} belongs to something else too")
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
