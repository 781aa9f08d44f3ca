//! The naive oracle: what every group was told to hold after each of its appends, and what its blocks read as.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};

use crate::chunk::Kept;
use crate::device::memory::MemoryDevice;
use crate::device::{BLOCK_BYTES, Device};
use crate::group::{
    Append, AppendError, GroupState, Mutation, OUT_OF_PLACE_BYTES_MIN, PayloadAt, Record, RecoveredGroup, StoreEvent,
};
use crate::ops::{DeviceOp, OpId};
use crate::store::Store;
use crate::superblock::FormatOptions;

/// One group as it is after a number of appends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    pub records: Vec<Record>,
    pub hard_state: u64,
}

/// How a group was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The last append of which something is there.
    pub append: usize,
    /// The last record.
    pub last: u64,
    pub checkpoint: u64,
}

/// Blocks that runs write to: a few slots, so that payloads meet in them.
const BLOCKS: u32 = 96;

/// What is known of one group.
#[derive(Clone, Debug)]
pub struct GroupModel {
    /// After each append, by its sequence.
    pub states: Vec<Log>,
    /// The highest sequence told to be flushed.
    pub flushed: usize,
    /// The highest index told to be checkpointed.
    pub checkpointed: u64,
    pub released: u64,
    /// Index of the last record applied to the running store.
    applied: u64,
    /// Taken, with the index of their deletion.
    snapshots: BTreeMap<u64, Option<u64>>,
}

pub fn group(number: u8) -> GroupId {
    GroupId::first(VolumeId::from_bytes([number; 16]).unwrap())
}

pub fn replica(number: u8) -> ReplicaId {
    ReplicaId::from_bytes([number; 16]).unwrap()
}

pub fn options() -> FormatOptions {
    let cluster = ClusterId::from_bytes([1; 16]).unwrap();
    let node = NodeId::from_bytes([2; 16]).unwrap();
    let disk = DiskId::from_bytes([3; 16]).unwrap();
    FormatOptions {
        wal_segment_bytes: 64 << 10,
        wal_segments: 4,
        groups_max: 4,
        ..FormatOptions::new(cluster, node, disk)
    }
}

fn hard_state(number: u64) -> Bytes {
    number.to_le_bytes().to_vec().into()
}

/// What differs between any two blocks of a run.
fn payload(number: u64, blocks: usize) -> Bytes {
    let block = |block: u64| [number, block].map(u64::to_le_bytes).concat().repeat(BLOCK_BYTES / 16);
    (0..blocks as u64).flat_map(block).collect::<Vec<u8>>().into()
}

fn mutation(record: &Record) -> Mutation {
    let PayloadAt { first_block, checksums } = record.at.clone().expect("the model's records have a place");
    Mutation::Write { first_block, data: record.payload.clone(), checksums }
}

/// What the blocks hold after the records up to `index`.
fn blocks_at(log: &Log, index: u64) -> Vec<u8> {
    let mut blocks = vec![0; BLOCKS as usize * BLOCK_BYTES];
    for record in log.records.iter().filter(|record| record.index <= index && !record.payload.is_empty()) {
        let at = record.at.as_ref().expect("the model's records have a place");
        let start = at.first_block as usize * BLOCK_BYTES;
        blocks[start..start + record.payload.len()].copy_from_slice(&record.payload);
    }
    blocks
}

fn state(number: u64) -> GroupState {
    GroupState { hard_state: hard_state(number), position: Bytes::new(), state: Bytes::new() }
}

/// A store, its disk, and the model of what it was told.
pub struct Run {
    pub device: MemoryDevice,
    store: Store,
    in_flight: Vec<DeviceOp>,
    pub groups: BTreeMap<u8, GroupModel>,
    /// Rises over the whole run: makes every record and hard state unlike any other.
    counter: u64,
}

impl Run {
    pub fn new(groups: u8) -> Run {
        Self::on(MemoryDevice::new(8 << 20), groups)
    }

    pub fn on(device: MemoryDevice, groups: u8) -> Run {
        Store::format(&device, &options()).unwrap();
        let (store, _) = Store::open(&device).unwrap();
        let mut run = Run { device, store, in_flight: Vec::new(), groups: BTreeMap::new(), counter: 0 };
        for number in 1..=groups {
            run.store.create_group(group(number), replica(number), state(0)).unwrap();
            while run.step(|_| {}) {}
            let model = GroupModel {
                states: vec![Log::default()],
                flushed: 0,
                checkpointed: 0,
                released: 0,
                applied: 0,
                snapshots: BTreeMap::new(),
            };
            run.groups.insert(number, model);
        }
        run
    }

    /// Appends `payloads.len()` records of so many blocks each, somewhere. Those of a slot's length and more cover one.
    pub fn append(&mut self, number: u8, truncated: u64, with_hard_state: bool, payloads: &[usize]) -> bool {
        let place = |blocks: usize| match blocks {
            16.. => (self.counter % 3 * 16 + 16).saturating_sub(blocks as u64 % 16 / 2),
            _ => self.counter * 5 % 48,
        };
        let payloads: Vec<(u64, usize)> = payloads.iter().map(|blocks| (place(*blocks), *blocks)).collect();
        self.append_at(number, truncated, with_hard_state, &payloads)
    }

    /// Appends records, each with its first block and their number, after a truncation of the last `truncated` records
    /// as far as they lie above the checkpoint.
    pub fn append_at(&mut self, number: u8, truncated: u64, with_hard_state: bool, payloads: &[(u64, usize)]) -> bool {
        self.counter += 1;
        let model = self.groups.get_mut(&number).unwrap();
        let mut log = model.states.last().unwrap().clone();
        let last = log.records.last().map_or(0, |record| record.index);
        let from = (last + 1).saturating_sub(truncated).max(model.checkpointed + 1);
        let truncate_from = (from <= last).then_some(from);
        log.records.retain(|record| record.index < from.max(1));
        let next = from.min(last + 1);
        let mut records = Vec::new();
        for (index, (first_block, blocks)) in (next..).zip(payloads.iter().copied()) {
            let header = Bytes::from(format!("{number}.{index}.{}", self.counter));
            let payload = payload(self.counter << 8 | index, blocks);
            let checksums: Arc<[u32]> = payload.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
            records.push(Record { index, header, payload, at: Some(PayloadAt { first_block, checksums }) });
        }
        log.records.extend(records.iter().cloned());
        let hard_state = with_hard_state.then(|| hard_state(self.counter));
        if with_hard_state {
            log.hard_state = self.counter;
        }
        let sequence = model.states.len() as u64;
        match self.store.append(Append { group: group(number), sequence, hard_state, truncate_from, records }) {
            Ok(()) => {
                model.states.push(log);
                true
            }
            Err(AppendError::Full | AppendError::NoSpace | AppendError::TooLarge { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Applies and checkpoints what is flushed, and releases all but the last `kept` records below the checkpoint.
    pub fn checkpoint(&mut self, number: u8, kept: u64) {
        self.checkpoint_observed(number, kept, |_| {});
    }

    pub fn checkpoint_observed(&mut self, number: u8, kept: u64, observe: impl FnMut(&Run)) {
        self.write_back_observed(number, kept, false, observe);
    }

    /// As a checkpoint, and keeps the blocks.
    pub fn snapshot_observed(&mut self, number: u8, observe: impl FnMut(&Run)) {
        self.write_back_observed(number, 0, true, observe);
    }

    /// As of the last record flushed, with the next checkpoint that passes it.
    pub fn delete_snapshot(&mut self, number: u8, n: usize) {
        let model = self.groups.get_mut(&number).unwrap();
        let index = model.states[model.flushed].records.last().map_or(0, |record| record.index);
        let Some((snapshot, deleted)) = model.snapshots.iter_mut().filter(|(_, deleted)| deleted.is_none()).nth(n)
        else {
            return;
        };
        if index > model.checkpointed {
            *deleted = Some(index);
            self.store.delete_snapshot(group(number), *snapshot, index);
        }
    }

    fn write_back_observed(&mut self, number: u8, kept: u64, snapshot: bool, mut observe: impl FnMut(&Run)) {
        let model = self.groups.get_mut(&number).unwrap();
        let flushed = &model.states[model.flushed];
        let index = flushed.records.last().map_or(0, |record| record.index);
        // Entries that a later append takes back were not committed.
        let stays = model.states[model.flushed..].iter().all(|log| log.records.starts_with(&flushed.records));
        if !stays || index <= model.checkpointed {
            return;
        }
        let newest = model.states.last().unwrap().hard_state;
        for record in flushed.records.iter().filter(|record| record.index > model.applied) {
            let mutations = if record.payload.is_empty() { Vec::new() } else { vec![mutation(record)] };
            self.store.apply(group(number), record.index, mutations);
        }
        model.applied = index;
        if snapshot {
            model.snapshots.insert(index, None);
            self.store.take_snapshot(group(number), index, state(newest)).unwrap();
        }
        if snapshot || self.store.checkpoint(group(number), index, state(newest)).is_ok() {
            model.released = model.released.max(index.saturating_sub(kept));
            while self.groups[&number].checkpointed < index {
                assert!(self.step(&mut observe), "a checkpoint ends");
            }
            self.store.release(group(number), index.saturating_sub(kept));
        }
    }

    pub fn slots_free(&self) -> u64 {
        let usage = self.store.usage();
        (usage.data_total - usage.data_used) / (64 << 10)
    }

    pub fn idle(&mut self) {
        if self.store.wants_idle() {
            self.store.on_idle();
        }
    }

    /// Performs one operation; `observe` sees the disk after each write and each flush. False: there is none.
    pub fn step(&mut self, mut observe: impl FnMut(&Run)) -> bool {
        self.in_flight.extend(self.store.take_ops());
        if self.in_flight.is_empty() {
            self.take_events();
            return false;
        }
        let op = self.in_flight.remove(0);
        let id = op.id();
        match op {
            DeviceOp::Read { offset, length, .. } => {
                let mut buffer = vec![0; length as usize];
                self.device.read_at(offset, &mut buffer).unwrap();
                return self.complete(id, buffer.into(), observe);
            }
            DeviceOp::Write { offset, data, durable, .. } => {
                self.take_events();
                // What lies between: the write has begun and may be torn.
                self.device.write_at(offset, &data).unwrap();
                observe(self);
                if durable {
                    self.device.write_durable_at(offset, &data).unwrap();
                }
            }
            DeviceOp::Flush { .. } => self.device.flush().unwrap(),
        }
        self.complete(id, Bytes::new(), observe)
    }

    /// A write, if one is to do, reaches the disk, but neither becomes durable nor completes. A crash must follow.
    pub fn begin_step(&mut self) {
        self.in_flight.extend(self.store.take_ops());
        self.take_events();
        for op in self.in_flight.drain(..) {
            if let DeviceOp::Write { offset, data, .. } = op {
                self.device.write_at(offset, &data).unwrap();
            }
        }
    }

    fn complete(&mut self, id: OpId, result: Bytes, mut observe: impl FnMut(&Run)) -> bool {
        observe(self);
        self.store.on_completion(id, Ok(result));
        self.take_events();
        observe(self);
        true
    }

    fn take_events(&mut self) {
        for event in self.store.take_events() {
            let number = |group: GroupId| group.volume.to_bytes()[0];
            match event {
                StoreEvent::Flushed { group, sequence } => {
                    let model = self.groups.get_mut(&number(group)).unwrap();
                    assert!(sequence as usize > model.flushed, "flushed is told in order, once");
                    model.flushed = sequence as usize;
                }
                StoreEvent::CheckpointDone { group, index } => {
                    self.groups.get_mut(&number(group)).unwrap().checkpointed = index;
                }
                StoreEvent::Failed { reason } => panic!("{reason}"),
                _ => {}
            }
        }
    }

    /// Opens `device` as it is after a crash, and says which of its appends every group holds, or what is wrong.
    pub fn recover(&self, device: &dyn Device) -> Result<(Store, BTreeMap<u8, Held>), String> {
        let (store, recovered) = Store::open(device).map_err(|error| format!("the disk does not open: {error}"))?;
        let mut held = BTreeMap::new();
        for (number, model) in &self.groups {
            let found = recovered.iter().find(|found| found.group == group(*number));
            let found = found.ok_or_else(|| format!("group {number} is gone"))?;
            if let Some(damage) = &found.damage {
                // What a test without bit rot prints when it fails.
                println!(
                    "group {number}: {damage:?}, checkpoint {}, {} records",
                    found.checkpoint_index,
                    found.records.len()
                );
            } else {
                let found_as = model.check(found).map_err(|reason| format!("group {number}: {reason}"))?;
                held.insert(*number, found_as);
            }
        }
        Ok((store, held))
    }

    /// Applies what was recovered, as the owner of the groups would, and reads all their blocks.
    pub fn check_blocks(
        &self,
        store: &mut Store,
        device: &dyn Device,
        held: &BTreeMap<u8, Held>,
    ) -> Result<(), String> {
        for (number, held) in held {
            let model = &self.groups[number];
            let log = &model.states[held.append];
            let above = log.records.iter().filter(|record| (held.checkpoint + 1..=held.last).contains(&record.index));
            for record in above.filter(|record| !record.payload.is_empty()) {
                store.apply(group(*number), record.index, vec![mutation(record)]);
            }
            let found: Vec<u64> = store.snapshots(group(*number)).iter().map(|snapshot| snapshot.index).collect();
            let at = held.checkpoint;
            let kept =
                model.snapshots.iter().filter(|(taken, deleted)| **taken <= at && deleted.is_none_or(|d| d > at));
            let expected: Vec<u64> = kept.map(|(taken, _)| *taken).collect();
            if found != expected {
                return Err(format!("group {number} has the snapshots {found:?}, not {expected:?}, after {held:?}"));
            }
            for index in found.into_iter().map(Some).chain([None]) {
                match index {
                    Some(index) => store.read_kept(group(*number), Kept::Snapshot(index), 0, BLOCKS, 1),
                    None => store.read(group(*number), 0, BLOCKS, 1),
                }
                let answer = loop {
                    for op in store.take_ops() {
                        let DeviceOp::Read { id, offset, length, .. } = op else {
                            panic!("{op:?} while nothing changes")
                        };
                        let mut buffer = vec![0; length as usize];
                        device.read_at(offset, &mut buffer).unwrap();
                        store.on_completion(id, Ok(buffer.into()));
                    }
                    let answered =
                        |event| if let StoreEvent::Read { result, .. } = event { Some(result) } else { None };
                    if let Some(result) = store.take_events().into_iter().find_map(answered) {
                        break result;
                    }
                };
                match answer {
                    Ok(blocks) if blocks == blocks_at(log, index.unwrap_or(held.last)) => {}
                    Ok(_) => return Err(format!("group {number} reads wrong at {index:?} after {held:?}")),
                    Err(error) => {
                        return Err(format!("group {number} cannot be read at {index:?} after {held:?}: {error}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Goes on with what a crash left.
    pub fn restart(&mut self, device: MemoryDevice) -> Result<(), String> {
        let look = device.fork();
        let (mut store, held) = self.recover(&look)?;
        self.check_blocks(&mut store, &look, &held)?;
        let (store, held) = self.recover(&device)?;
        if held.len() != self.groups.len() {
            return Err("damage after a crash without bit rot".to_owned());
        }
        for (number, Held { append, last, checkpoint }) in held {
            let model = self.groups.get_mut(&number).unwrap();
            // Sequences start again; what the crash took was never there.
            let mut log = model.states[append].clone();
            log.records.retain(|record| record.index <= last);
            model.states = vec![log];
            model.flushed = 0;
            model.applied = checkpoint;
            // What the log says above it is not taken or deleted again here.
            model.snapshots.retain(|taken, _| *taken <= checkpoint);
            model.snapshots.values_mut().for_each(|deleted| *deleted = deleted.filter(|at| *at <= checkpoint));
        }
        self.device = device;
        self.store = store;
        self.in_flight.clear();
        for (number, model) in &mut self.groups {
            let last = model.states[0].records.last().map_or(0, |record| record.index);
            let appended = self.store.last_appended(group(*number));
            if appended != Some(last) {
                return Err(format!("group {number} continues {appended:?}, not {last}"));
            }
        }
        Ok(())
    }
}

impl GroupModel {
    /// Which append `found` is the state after: one not before the last that was told to be flushed. Of what was not
    /// flushed the end may be missing, from a record on whose payload is not in the log.
    fn check(&self, found: &RecoveredGroup) -> Result<Held, String> {
        if found.checkpoint_index < self.checkpointed {
            return Err(format!("checkpoint {} after {}", found.checkpoint_index, self.checkpointed));
        }
        let number = |bytes: &Bytes| u64::from_le_bytes(bytes[..].try_into().unwrap());
        let checkpointed = number(&found.checkpoint.hard_state);
        let newest = found.hard_state.as_ref().map_or(checkpointed, number);
        let flushed = &self.states[self.flushed].records;
        let same = |a: &Record, b: &Record| (a.index, &a.header, &a.payload) == (b.index, &b.header, &b.payload);
        let found_last = found.records.last().map_or(found.checkpoint_index, |record| record.index);
        let matches = |log: &Log| {
            let first = found.records.first().map_or(found.checkpoint_index + 1, |record| record.index);
            let last = log.records.last().map_or(0, |record| record.index);
            let (kept, torn): (Vec<&Record>, Vec<&Record>) =
                log.records.iter().filter(|record| record.index >= first).partition(|r| r.index <= found_last);
            let flushed_and_kept = flushed.iter().zip(&log.records).take_while(|(a, b)| same(a, b)).count() as u64;
            let is_tear = torn.first().is_none_or(|r| r.index > flushed_and_kept && is_long(r));
            let hard_state_fits = newest == log.hard_state || newest == checkpointed && newest >= log.hard_state;
            // Below the checkpoint slots are given away, and what cannot be found again takes what precedes it along.
            let given_away = |index| log.records.iter().any(|record| record.index == index && is_long(record));
            let reaches_down = first <= self.released + 1
                || given_away(first - 1)
                || found.records.is_empty() && last <= self.released;
            kept.len() == found.records.len()
                && kept.iter().zip(&found.records).all(|(a, b)| same(a, b))
                && is_tear
                && first <= found.checkpoint_index + 1
                && found.checkpoint_index <= last
                && reaches_down
                && hard_state_fits
        };
        let held = (self.flushed..self.states.len()).rev().find(|append| matches(&self.states[*append]));
        let held = held.map(|append| Held { append, last: found_last, checkpoint: found.checkpoint_index });
        held.ok_or_else(|| {
            let indexes: Vec<u64> = found.records.iter().map(|record| record.index).collect();
            let flushed = &self.states[self.flushed];
            format!(
                "records {indexes:?}, hard state {newest}, checkpoint {} after records to {:?}, hard state {}, were flushed",
                found.checkpoint_index,
                flushed.records.last().map(|record| record.index),
                flushed.hard_state,
            )
        })
    }
}

/// Whether the payload, which then covers a slot, does not lie in the log.
fn is_long(record: &Record) -> bool {
    record.payload.len() >= OUT_OF_PLACE_BYTES_MIN
}
