//! A disk that keeps what a real one promises and not a byte more, and a model of what the groups hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Mutex;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId, VolumeId};

use crate::chunk::layout::Named;
use crate::chunk::page::block_hash;
use crate::chunk::tests::payload::claim;
use crate::chunk::{Changes, CheckpointedGroup, Chunks, Frozen, Kept, Limits};
use crate::device::{BLOCK_BYTES, Device, Region, SECTOR_BYTES, check_range};
use crate::group::{GroupState, Mutation, ReadError, StoreEvent};
use crate::ops::{DeviceOp, OpId, OpIds};
use crate::wal::Extent;

pub const GROUPS_MAX: u32 = 6;

/// SplitMix64: the same seed gives the same run everywhere.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Bytes with writes on top that are not durable yet, in the order they were done.
pub struct Disk {
    image: Mutex<Image>,
}

#[derive(Clone)]
struct Image {
    durable: Vec<u8>,
    writes: Vec<Written>,
}

#[derive(Clone)]
struct Written {
    offset: usize,
    data: Vec<u8>,
    durable: bool,
}

impl Disk {
    pub fn new(bytes: usize) -> Disk {
        Disk { image: Mutex::new(Image { durable: vec![0xa5; bytes], writes: Vec::new() }) }
    }

    pub fn write(&self, offset: u64, data: &[u8], durable: bool) {
        let mut image = self.image.lock().unwrap();
        check_range(offset, data.len(), image.durable.len() as u64).unwrap();
        image.writes.push(Written { offset: offset as usize, data: data.to_vec(), durable });
        image.settle();
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let image = self.image.lock().unwrap();
        check_range(offset, length, image.durable.len() as u64).unwrap();
        let start = offset as usize;
        let mut data = image.durable[start..start + length].to_vec();
        for write in &image.writes {
            let (from, to) = (write.offset.max(start), (write.offset + write.data.len()).min(start + length));
            if from < to {
                data[from - start..to - start].copy_from_slice(&write.data[from - write.offset..to - write.offset]);
            }
        }
        data
    }

    /// The first `count` of the writes done are durable. Positions shift when older ones settle, so the caller passes
    /// how many there were from the end.
    fn flush_all_but(&self, later: usize) {
        let mut image = self.image.lock().unwrap();
        let count = image.writes.len().saturating_sub(later);
        for write in &mut image.writes[..count] {
            write.durable = true;
        }
        image.settle();
    }

    /// What a crash leaves: all that is durable, and of the rest any sectors.
    pub fn crashed(&self, in_flight: &[DeviceOp], random: &mut Random) -> Disk {
        let mut image = self.image.lock().unwrap().clone();
        for op in in_flight {
            if let DeviceOp::Write { offset, data, .. } = op {
                image.writes.push(Written { offset: *offset as usize, data: data.to_vec(), durable: false });
            }
        }
        // All, nothing, or each sector by itself.
        let style = random.below(4);
        for write in std::mem::take(&mut image.writes) {
            for (i, sector) in write.data.chunks(SECTOR_BYTES).enumerate() {
                if write.durable || style == 0 || style >= 2 && random.chance(50) {
                    let at = write.offset + i * SECTOR_BYTES;
                    image.durable[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        Disk { image: Mutex::new(image) }
    }

    /// Flips a bit of what is durable, and of what is not.
    pub fn rot(&self, offset: u64) {
        let mut block = self.read(offset, BLOCK_BYTES);
        block[100] ^= 4;
        self.write(offset, &block, true);
    }
}

impl Image {
    /// Writes that are durable, with none before them that is not, become part of the image.
    fn settle(&mut self) {
        let settled = self.writes.iter().take_while(|write| write.durable).count();
        for write in self.writes.drain(..settled) {
            self.durable[write.offset..write.offset + write.data.len()].copy_from_slice(&write.data);
        }
    }
}

impl Device for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.image.lock().unwrap().durable.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.read(offset, buffer.len()));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data, false);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flush_all_but(0);
        Ok(())
    }
}

/// An operation submitted and not completed. A flush covers what was done when it was submitted.
pub struct InFlight {
    pub op: DeviceOp,
    /// Writes done since it was submitted.
    later: usize,
}

/// What a block holds: zero, or 512 times the same number.
pub type Blocks = BTreeMap<u64, u64>;

#[derive(Clone)]
pub struct Entry {
    pub index: u64,
    pub mutations: Vec<Mutation>,
    /// Where its payload lies, if that is not in the log.
    pub placed: Vec<Extent>,
    pub snapshot: Option<Taking>,
}

/// What an entry does to the snapshots of its group.
#[derive(Clone)]
pub enum Taking {
    Take(GroupState),
    Delete(u64),
}

/// What the log of one group says.
#[derive(Clone)]
pub struct Model {
    pub replica: ReplicaId,
    pub entries: Vec<Entry>,
    /// As of the last entry.
    pub blocks: Blocks,
    /// That of the last checkpoint done, and of the one under way, with their indices.
    pub states: Vec<(u64, GroupState)>,
    pub created: bool,
    pub deleting: bool,
    pub frozen: Vec<Frozen>,
    /// Tombstones at or above it are kept.
    pub forgotten: u64,
}

impl Model {
    pub fn blocks_at(&self, index: u64) -> Blocks {
        let mut blocks = Blocks::new();
        for entry in self.entries.iter().take_while(|entry| entry.index <= index) {
            for mutation in &entry.mutations {
                change(&mut blocks, mutation);
            }
        }
        blocks
    }

    pub fn snapshots_at(&self, index: u64) -> Vec<u64> {
        let mut snapshots = Vec::new();
        for entry in self.entries.iter().take_while(|entry| entry.index <= index) {
            match &entry.snapshot {
                Some(Taking::Take(_)) => snapshots.push(entry.index),
                Some(Taking::Delete(gone)) => snapshots.retain(|snapshot| snapshot != gone),
                None => {}
            }
        }
        snapshots
    }

    pub fn last(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.index)
    }
}

fn change(blocks: &mut Blocks, mutation: &Mutation) {
    match mutation {
        Mutation::Write { first_block, data, .. } => {
            for (i, block) in data.chunks(BLOCK_BYTES).enumerate() {
                let number = u64::from_le_bytes(block[..8].try_into().unwrap());
                blocks.insert(first_block + i as u64, number);
            }
        }
        Mutation::Zero { first_block, count, .. } => {
            let gone: Vec<u64> = blocks.range(*first_block..first_block + count).map(|(block, _)| *block).collect();
            for block in gone {
                blocks.remove(&block);
            }
        }
    }
}

pub fn bytes_of(blocks: &Blocks, first: u64, count: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count as usize * BLOCK_BYTES);
    for block in first..first + u64::from(count) {
        fill(&mut bytes, blocks.get(&block).copied().unwrap_or(0));
    }
    bytes
}

fn fill(bytes: &mut Vec<u8>, number: u64) {
    let block: [u64; BLOCK_BYTES / 8] = [number.to_le(); BLOCK_BYTES / 8];
    block.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
}

/// The hash a map of these blocks has.
pub fn hash_of(blocks: &Blocks) -> u128 {
    let hashes = blocks.iter().map(|(block, number)| {
        let mut bytes = Vec::new();
        fill(&mut bytes, *number);
        block_hash(*block, holdfast_block::checksum(&bytes))
    });
    hashes.fold(0, u128::wrapping_add)
}

pub fn write(first_block: u64, numbers: &[u64]) -> Mutation {
    let mut data = Vec::with_capacity(numbers.len() * BLOCK_BYTES);
    numbers.iter().for_each(|number| fill(&mut data, *number));
    let checksums = data.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
    Mutation::Write { first_block, data: Bytes::from(data), checksums }
}

pub fn zero(first_block: u64, count: u64) -> Mutation {
    Mutation::Zero { first_block, count, discard: true }
}

pub fn group(number: u16) -> GroupId {
    GroupId { volume: VolumeId::from_bytes([7; 16]).unwrap(), shard: number }
}

pub fn replica(number: u8) -> ReplicaId {
    ReplicaId::from_bytes([number; 16]).unwrap()
}

pub fn state(tag: u64, bytes: usize) -> GroupState {
    GroupState {
        hard_state: Bytes::from(tag.to_le_bytes().to_vec()),
        position: Bytes::from(tag.to_be_bytes().to_vec()),
        state: Bytes::from(tag.to_le_bytes().into_iter().cycle().take(bytes).collect::<Vec<u8>>()),
    }
}

struct Expected {
    group: GroupId,
    first: u64,
    count: u32,
    /// As of the call.
    bytes: Vec<u8>,
}

/// Chunks on a disk, with everything they should hold.
pub struct Machine {
    pub disk: Disk,
    pub region: Region,
    pub limits: Limits,
    pub chunks: Chunks,
    pub in_flight: Vec<InFlight>,
    pub random: Random,
    pub models: BTreeMap<GroupId, Model>,
    expected: BTreeMap<u64, Expected>,
    next_token: u64,
    pub next_number: u64,
    pub wanted: Vec<GroupId>,
    pub failures: Vec<ReadError>,
    pub failed: bool,
}

impl Machine {
    pub fn new(seed: u64, slots: u64) -> Machine {
        let bytes = Chunks::region_bytes_min(GROUPS_MAX) + (slots.max(64) - 64) * 65536;
        let region = Region::new(8192, 8192 + bytes);
        let disk = Disk::new(region.end as usize);
        Chunks::format(&disk, region, GROUPS_MAX).unwrap();
        // Small enough that pages are dropped and read again.
        let limits = Limits { cached_pages: 3, ..Limits::default() };
        let (chunks, found) = Chunks::open(&disk, region, OpIds::chunks(), limits).unwrap();
        assert_eq!(found, []);
        Machine {
            disk,
            region,
            limits,
            chunks,
            in_flight: Vec::new(),
            random: Random(seed),
            models: BTreeMap::new(),
            expected: BTreeMap::new(),
            next_token: 0,
            next_number: 1,
            wanted: Vec::new(),
            failures: Vec::new(),
            failed: false,
        }
    }

    pub fn create(&mut self, id: GroupId, replica: ReplicaId, state: GroupState) {
        self.chunks.create_group(id, replica, state.clone()).unwrap();
        let states = vec![(0, state)];
        let (entries, blocks) = (Vec::new(), Blocks::new());
        let (frozen, forgotten) = (Vec::new(), 0);
        let model = Model { replica, entries, blocks, states, created: false, deleting: false, frozen, forgotten };
        self.models.insert(id, model);
    }

    pub fn apply(&mut self, id: GroupId, mutations: Vec<Mutation>) -> u64 {
        let model = self.models.get_mut(&id).unwrap();
        let index = model.last() + 1;
        for mutation in &mutations {
            change(&mut model.blocks, mutation);
        }
        model.entries.push(Entry { index, mutations: mutations.clone(), placed: Vec::new(), snapshot: None });
        self.chunks.apply(id, index, mutations);
        index
    }

    pub fn take_snapshot(&mut self, id: GroupId, state: GroupState) -> u64 {
        let index = self.change_snapshots(id, Taking::Take(state.clone()));
        self.models.get_mut(&id).unwrap().states.push((index, state.clone()));
        self.chunks.take_snapshot(id, index, index * 10, state).unwrap();
        index
    }

    pub fn delete_snapshot(&mut self, id: GroupId, snapshot: u64) {
        let index = self.change_snapshots(id, Taking::Delete(snapshot));
        self.chunks.delete_snapshot(id, snapshot, index);
    }

    fn change_snapshots(&mut self, id: GroupId, taking: Taking) -> u64 {
        let model = self.models.get_mut(&id).unwrap();
        let index = model.last() + 1;
        let (mutations, placed) = (Vec::new(), Vec::new());
        model.entries.push(Entry { index, mutations, placed, snapshot: Some(taking) });
        index
    }

    pub fn read_snapshot(&mut self, id: GroupId, snapshot: u64, first: u64, count: u32) {
        let bytes = bytes_of(&self.models[&id].blocks_at(snapshot), first, count);
        let token = self.expect(id, first, count, bytes);
        self.chunks.read_kept(id, Kept::Snapshot(snapshot), first, count, token);
        self.collect();
    }

    /// Those on the disk.
    pub fn snapshots(&self, id: GroupId) -> Vec<u64> {
        self.chunks.snapshots(id).iter().map(|snapshot| snapshot.index).collect()
    }

    pub fn checkpoint(&mut self, id: GroupId, state: GroupState) -> u64 {
        let model = self.models.get_mut(&id).unwrap();
        let index = model.last();
        self.chunks.checkpoint(id, index, index * 10, state.clone()).unwrap();
        model.states.push((index, state));
        index
    }

    pub fn numbers(&mut self, count: u64) -> Vec<u64> {
        let numbers = (self.next_number..self.next_number + count).collect();
        self.next_number += count;
        numbers
    }

    /// Asks for a read; its answer is checked when it comes.
    pub fn read(&mut self, id: GroupId, first: u64, count: u32) -> u64 {
        let bytes = bytes_of(&self.models[&id].blocks, first, count);
        self.read_expecting(id, first, count, bytes)
    }

    fn read_expecting(&mut self, id: GroupId, first: u64, count: u32, bytes: Vec<u8>) -> u64 {
        let token = self.expect(id, first, count, bytes);
        self.chunks.read(id, first, count, token);
        self.collect();
        token
    }

    fn expect(&mut self, group: GroupId, first: u64, count: u32, bytes: Vec<u8>) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.expected.insert(token, Expected { group, first, count, bytes });
        token
    }

    pub fn read_frozen(&mut self, id: GroupId, frozen: Frozen, first: u64, count: u32) {
        let bytes = bytes_of(&self.models[&id].blocks_at(frozen.index), first, count);
        let token = self.expect(id, first, count, bytes);
        self.chunks.read_kept(id, Kept::Frozen(frozen.id), first, count, token);
        self.collect();
    }

    /// All changes above an index, asked for piece by piece while everything else goes on.
    pub fn changes(&mut self, id: GroupId, frozen: Frozen, above: u64) -> Changes {
        let mut all = Changes { slots: Vec::new(), next_slot: Some(0) };
        while let Some(from) = all.next_slot {
            self.chunks.changed_since(id, Some(Kept::Frozen(frozen.id)), above, from, from);
            self.collect();
            let answer = loop {
                match self.chunks.take_changes().pop() {
                    Some(answer) => break answer,
                    None => self.complete_any(),
                }
            };
            assert_eq!(answer.token, from);
            let part = answer.result.unwrap();
            assert!(part.next_slot.is_none_or(|next| next > from));
            all.slots.extend(part.slots);
            all.next_slot = part.next_slot;
        }
        all
    }

    /// Takes what the chunks want done, and what they have to tell.
    pub fn collect(&mut self) {
        let ops = self.chunks.take_ops();
        self.submit(ops);
        // The harness writes payloads at once, so that nothing is on its way to them.
        let orphans = self.chunks.take_orphans();
        self.chunks.free_slots(orphans);
        for event in self.chunks.take_events() {
            self.on_event(event);
        }
    }

    pub fn submit(&mut self, ops: Vec<DeviceOp>) {
        for op in ops {
            assert!(!op.id().is_wal());
            self.in_flight.push(InFlight { op, later: 0 });
        }
    }

    fn on_event(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::GroupCreated { group, replica } => {
                let model = self.models.get_mut(&group).unwrap();
                assert_eq!(model.replica, replica);
                model.created = true;
            }
            StoreEvent::GroupDeleted { group, replica } => {
                assert_eq!(self.models.remove(&group).unwrap().replica, replica);
            }
            StoreEvent::CheckpointDone { group, index } => {
                let states = &mut self.models.get_mut(&group).unwrap().states;
                states.retain(|(at, _)| *at >= index);
                assert_eq!(states[0].0, index);
                // That of the checkpoint before may be of the same index.
                if let Some(later) = states.iter().rposition(|(at, _)| *at == index) {
                    states.drain(..later);
                }
                let model = &self.models[&group];
                assert_eq!(self.snapshots(group), model.snapshots_at(index), "as of {index}");
            }
            StoreEvent::CheckpointWanted { group } => self.wanted.push(group),
            StoreEvent::Read { token, result } => {
                let expected = self.expected.remove(&token).expect("one answer per read");
                match result {
                    Ok(bytes) => {
                        let Expected { group, first, count, bytes: wanted } = expected;
                        assert!(bytes == wanted, "blocks {first}+{count} of {group} read wrong");
                    }
                    Err(error) => self.failures.push(error),
                }
            }
            StoreEvent::Failed { .. } => self.failed = true,
            StoreEvent::Flushed { .. } => panic!("chunks flush no appends"),
        }
    }

    /// Completes one operation in flight, the n-th.
    pub fn complete(&mut self, n: usize) {
        let InFlight { op, later } = self.in_flight.remove(n);
        let id = op.id();
        let result = match op {
            DeviceOp::Read { offset, length, .. } => Bytes::from(self.disk.read(offset, length as usize)),
            DeviceOp::Write { offset, data, durable, .. } => {
                self.disk.write(offset, &data, durable);
                for other in &mut self.in_flight {
                    other.later += 1;
                }
                Bytes::new()
            }
            DeviceOp::Flush { .. } => {
                self.disk.flush_all_but(later);
                Bytes::new()
            }
        };
        self.finish(id, result);
    }

    fn finish(&mut self, id: OpId, result: Bytes) {
        self.chunks.on_completion(id, Ok(result));
        self.collect();
    }

    pub fn complete_any(&mut self) {
        if !self.in_flight.is_empty() {
            let n = self.random.below(self.in_flight.len() as u64) as usize;
            self.complete(n);
        }
    }

    /// Reads the whole of the first leaves as they are now.
    pub fn read_start(&mut self) {
        let groups: Vec<GroupId> = self.models.keys().copied().collect();
        for group in groups {
            self.read(group, 0, 256);
            self.read(group, 70_000 - 100, 256);
        }
    }

    /// Completes everything, in any order.
    pub fn settle(&mut self) {
        self.collect();
        while !self.in_flight.is_empty() {
            self.complete_any();
        }
        assert!(self.expected.is_empty(), "every read is answered");
    }

    /// What the running chunks hold as taken is what a fresh open finds named. Everything has to be settled.
    pub fn check_leaks(&mut self) {
        assert!(self.in_flight.is_empty() && self.chunks.commit.is_none() && self.chunks.commits.is_empty());
        assert!(self.chunks.frees.is_empty() && self.chunks.drops.is_empty() && self.chunks.waiting_cuts.is_empty());
        let (mut fresh, found) = Chunks::open(&self.disk, self.region, OpIds::chunks(), self.limits).unwrap();
        for found in &found {
            let entries = self.models[&found.group].entries.iter();
            entries.filter(|entry| entry.index > found.index).for_each(|entry| claim(&mut fresh, entry));
        }
        let mut taken = self.chunks.allocator.named();
        let dead: Vec<Named> =
            self.chunks.groups.values().flat_map(|group| &group.freezes).flat_map(|f| &f.dead).copied().collect();
        for named in dead {
            assert!(taken.remove(&named), "{named:?} is held by one frozen map and taken");
        }
        assert_eq!(taken, fresh.allocator.named());
        for found in found {
            let snapshots = fresh.snapshots(found.group);
            assert_eq!(snapshots, self.chunks.snapshots(found.group));
            for snapshot in snapshots {
                let blocks = self.models[&found.group].blocks_at(snapshot.index);
                assert_eq!(snapshot.hash, Some(hash_of(&blocks)), "snapshot {}", snapshot.index);
                let kept = fresh.snapshot_state(found.group, snapshot.index);
                assert_eq!(kept, self.chunks.snapshot_state(found.group, snapshot.index));
                let taken = self.models[&found.group].entries.iter().find(|entry| entry.index == snapshot.index);
                let Some(Taking::Take(state)) = taken.and_then(|entry| entry.snapshot.as_ref()) else {
                    panic!("never taken")
                };
                assert_eq!(kept, Some((state.position.clone(), state.state.clone())));
                let slots: BTreeSet<u64> = blocks.keys().map(|block| block / 16).collect();
                assert_eq!(snapshot.allocated_bytes, Some(slots.len() as u64 * 65536));
            }
            if let Some(hash) = found.map_hash {
                assert_eq!(hash, hash_of(&self.models[&found.group].blocks_at(found.index)));
                assert_eq!(self.chunks.map_hash(found.group), Some((found.index, hash)));
            }
        }
    }

    /// Closes and opens, with nothing replayed.
    pub fn reopen(&mut self) -> Vec<CheckpointedGroup> {
        self.in_flight.clear();
        self.expected.clear();
        let (chunks, found) = Chunks::open(&self.disk, self.region, OpIds::chunks(), self.limits).unwrap();
        self.chunks = chunks;
        found
    }

    /// Loses power. Everything applied comes back from the log, entry by entry, and reads right all the way.
    pub fn crash(&mut self) {
        let ops: Vec<DeviceOp> = self.in_flight.drain(..).map(|in_flight| in_flight.op).collect();
        self.disk = self.disk.crashed(&ops, &mut self.random);
        let found = self.reopen();
        assert_eq!(self.chunks.damaged_entries(), []);
        self.recover(found);
    }

    fn recover(&mut self, found: Vec<CheckpointedGroup>) {
        let found: BTreeMap<GroupId, CheckpointedGroup> = found.into_iter().map(|found| (found.group, found)).collect();
        for (id, found) in &found {
            let entries = self.models[id].entries.iter().filter(|entry| entry.index > found.index);
            entries.for_each(|entry| claim(&mut self.chunks, entry));
        }
        for (id, model) in std::mem::take(&mut self.models) {
            let Some(found) = found.get(&id) else {
                assert!(!model.created || model.deleting, "{id} is gone");
                continue;
            };
            assert_eq!(found.damage, None);
            assert_eq!(found.replica, model.replica);
            assert_eq!(found.wal_sequence, found.index * 10);
            let checkpoint = (found.index, found.state.clone());
            assert!(model.states.contains(&checkpoint), "the state is of the index");
            assert!(found.write_back_to <= model.last(), "what was written back was applied");
            assert_eq!(self.snapshots(id), model.snapshots_at(found.index));
            for snapshot in self.snapshots(id) {
                self.models.insert(id, model.clone());
                for first in [0, 256, 512, 256 * 256, 1 << 33] {
                    self.read_snapshot(id, snapshot, first, 256);
                }
                self.settle();
            }
            self.models.insert(id, Model { created: true, deleting: false, frozen: Vec::new(), ..model });
            self.replay(id, found);
        }
        assert!(found.keys().all(|id| self.models.contains_key(id)), "nobody else comes back");
    }

    fn replay(&mut self, id: GroupId, found: &CheckpointedGroup) {
        let model = self.models[&id].clone();
        let mut blocks = model.blocks_at(found.index);
        self.models.get_mut(&id).unwrap().states = vec![(found.index, found.state.clone())];
        let (first, count) = (self.random.below(600), 64);
        let check = |machine: &mut Machine, index: u64, blocks: &Blocks| {
            let before = machine.failures.len();
            machine.read_expecting(id, first, count, bytes_of(blocks, first, count));
            machine.settle();
            if index < found.write_back_to {
                assert_eq!(machine.failures.pop(), Some(ReadError::Behind { needed: found.write_back_to }));
            }
            assert_eq!(machine.failures.len(), before);
        };
        check(self, found.index, &blocks);
        for entry in model.entries.iter().filter(|entry| entry.index > found.index) {
            for mutation in &entry.mutations {
                change(&mut blocks, mutation);
            }
            self.chunks.hold(id, entry.index, &entry.placed);
            match &entry.snapshot {
                None => self.chunks.apply(id, entry.index, entry.mutations.clone()),
                Some(Taking::Take(state)) => {
                    self.models.get_mut(&id).unwrap().states.push((entry.index, state.clone()));
                    self.chunks.take_snapshot(id, entry.index, entry.index * 10, state.clone()).unwrap();
                }
                Some(Taking::Delete(snapshot)) => self.chunks.delete_snapshot(id, *snapshot, entry.index),
            }
            check(self, entry.index, &blocks);
        }
        // And all of it once.
        let last = model.blocks.last_key_value().map_or(0, |(block, _)| *block);
        for first in (0..=last).step_by(256).take(16) {
            self.read(id, first, 256);
        }
        self.settle();
        assert_eq!(self.failures, []);
    }
}
