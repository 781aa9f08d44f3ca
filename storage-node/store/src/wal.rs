//! The write-ahead log of one disk, shared by all its groups.
//!
//! A ring of segments, filled with batches in the order of their sequence. While one batch is written, appends of
//! all groups gather in the next: one durable write per batch, and never two batches in flight, so that whatever a
//! crash leaves, every batch before the last was durable. That is what tells a torn tail from damage.
//!
//! A long payload does not lie in its batch: the chunks gave it slots, and its record names them. Those writes go out
//! at once, and a batch that has any is made durable by a flush that follows all of them; see [`payload`].
//!
//! Use `generation` of the ring lies in segment `generation % segments`. The oldest generation that some group needs
//! is named in every batch and in the two marks; a segment is overwritten only after a durable batch or mark says
//! that its old batches are not needed any more. The marks are written when the WAL is idle, too: then a bad last
//! batch is known to have been whole.
//!
//! The store drives it. It does not know checkpoints but by index and batch sequence, and never reads at run time.

mod batch;
mod extents;
mod format;
mod groups;
mod payload;
mod recovery;

use std::collections::VecDeque;

use holdfast_id::{DiskId, GroupId, ReplicaId};
use holdfast_planted::Bug;

use self::batch::{Batch, encoded_bytes};
pub(crate) use self::extents::Extent;
use self::format::{BatchHeader, Mark};
use self::groups::Groups;
use self::payload::PayloadWrites;
pub(crate) use self::recovery::{GroupBase, Inspection, RecoveredLog, Slots, Stretch, inspect};
use crate::device::{BLOCK_BYTES, Device, Region};
use crate::group::{
    APPEND_BYTES_MAX, Append, AppendError, HARD_STATE_BYTES_MAX, HEADER_BYTES_MAX, OpenError, PAYLOAD_BYTES_MAX,
    RECORDS_MAX, StoreEvent,
};
use crate::ops::{AlignedBuffer, DeviceError, DeviceOp, OpId, OpIds};
use crate::superblock::{MARKS, Superblock};

/// A batch is closed before it grows beyond this, or half a segment. It bounds the latency of the next batch.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// First allocation of a batch; later ones start with the size of the batch before.
const BATCH_CAPACITY_MIN: usize = 64 << 10;

/// The WAL of an open disk.
pub(crate) struct Wal {
    disk: DiskId,
    boot_epoch: u64,
    region: Region,
    segment_bytes: u64,
    segments: u64,
    groups: Groups,
    ids: OpIds,
    /// Takes appends.
    open: Option<Batch>,
    /// Closed, placed, waiting for the one before.
    queue: VecDeque<Placed>,
    in_flight: Option<InFlight>,
    payloads: PayloadWrites,
    next_sequence: u64,
    /// Where the next closed batch goes if it fits.
    head: Place,
    /// The last durable batch and where it ends.
    flushed_sequence: u64,
    flushed: Place,
    /// First batch of every generation in use, ascending.
    first_sequences: VecDeque<(u64, u64)>,
    /// What the newest durable batch or mark says: older generations may be overwritten.
    durable_oldest_generation: u64,
    /// The last durable mark.
    marked_number: u64,
    marked_sequence: u64,
    /// Size of the last batch: the next is allocated with as much.
    batch_capacity: usize,
    /// Recovery found batches of which nothing is known, not even whose they were.
    lost_batches: bool,
    events: Vec<StoreEvent>,
    failed: bool,
}

/// A place in the ring: the byte `offset` of the segment that `generation` uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    generation: u64,
    offset: u64,
}

struct Placed {
    batch: Batch,
    place: Place,
    length: u64,
}

enum InFlight {
    Batch { id: OpId, batch: Placed, oldest_generation: u64, stage: Stage },
    Mark { id: OpId, mark: Mark },
}

/// How far a batch in flight is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Without payloads in slots: its write is durable by itself.
    Durable,
    Writing,
    /// Waits for payload writes.
    Written,
    Flushing,
}

impl Wal {
    /// Zero-fills the segments, so that no write at run time changes the metadata of a file below.
    pub(crate) fn format(device: &dyn Device, superblock: &Superblock) -> std::io::Result<()> {
        const STRIDE: usize = 1 << 20;
        let zeroes = AlignedBuffer::zeroed(STRIDE);
        let mut offset = superblock.wal.start;
        while offset < superblock.wal.end {
            let length = (superblock.wal.end - offset).min(STRIDE as u64);
            device.write_at(offset, &zeroes[..length as usize])?;
            offset += length;
        }
        for mark in MARKS {
            device.write_at(mark, &zeroes[..BLOCK_BYTES])?;
        }
        device.flush()
    }

    /// Reads the log, makes its tail durable, and notes damage that was not noted before.
    pub(crate) fn open(
        device: &dyn Device,
        superblock: &Superblock,
        bases: &[GroupBase],
        slots: &mut dyn Slots,
    ) -> Result<(Wal, Vec<RecoveredLog>), OpenError> {
        recovery::open(device, superblock, bases, slots)
    }

    pub(crate) fn bytes_total(&self) -> u64 {
        self.region.bytes()
    }

    /// Bytes of the segments that cannot be overwritten, and of the payloads that their records have elsewhere: those
    /// cost the memory and the time of recovery that they would cost here.
    pub(crate) fn bytes_used(&self) -> u64 {
        let segments = (self.head.generation - self.oldest_generation() + 1).min(self.segments);
        (segments * self.segment_bytes + self.groups.slot_bytes()).min(self.bytes_total())
    }

    /// Every batch up to it is durable, with its payloads.
    pub(crate) fn flushed_sequence(&self) -> u64 {
        self.flushed_sequence
    }

    /// Payload writes that are asked for from now on have this number and higher ones.
    pub(crate) fn next_payload_write(&self) -> u64 {
        self.payloads.next_number()
    }

    /// Whether every payload write with a lower number has completed.
    pub(crate) fn payloads_written_below(&self, number: u64) -> bool {
        self.payloads.completed_below(number)
    }

    /// The mark is behind what is flushed, and nothing is in flight: call [`Wal::on_idle`] soon.
    pub(crate) fn wants_idle(&self) -> bool {
        !self.failed && self.in_flight.is_none() && self.marked_sequence < self.flushed_sequence
    }

    /// Index of the last record appended, flushed or not.
    pub(crate) fn last_appended(&self, group: GroupId) -> Option<u64> {
        self.groups.get(group).map(|log| log.last_appended)
    }

    pub(crate) fn on_completion(&mut self, id: OpId, result: Result<(), DeviceError>) {
        let of_payload = self.payloads.complete(id);
        let in_flight = if of_payload { None } else { self.in_flight.take() };
        if self.failed {
            return;
        }
        if let Err(error) = result {
            self.fail(&error.to_string());
            return;
        }
        if of_payload {
            return;
        }
        match in_flight.expect("a completion follows its operation") {
            InFlight::Batch { id: submitted, batch, oldest_generation, stage } => {
                assert_eq!(id, submitted, "one operation is in flight");
                if stage == Stage::Writing {
                    self.in_flight = Some(InFlight::Batch { id, batch, oldest_generation, stage: Stage::Written });
                    return;
                }
                assert_ne!(stage, Stage::Written, "what waits for payloads has no operation in flight");
                self.on_batch_durable(&batch, oldest_generation);
                if !holdfast_planted::is(Bug::AcknowledgeBeforeFlush) {
                    self.tell_flushed(&batch.batch);
                }
            }
            InFlight::Mark { id: submitted, mark } => {
                assert_eq!(id, submitted, "one operation is in flight");
                self.on_mark_durable(&mark);
            }
        }
    }

    /// Nothing was appended for a while: writes the mark where it is behind.
    pub(crate) fn on_idle(&mut self) -> Option<DeviceOp> {
        self.wants_idle().then(|| self.submit_mark())
    }

    /// Takes part in no batch any more; what is queued is written and told no more.
    pub(crate) fn fail(&mut self, reason: &str) {
        if !self.failed {
            self.failed = true;
            self.open = None;
            self.queue.clear();
            self.payloads.clear_queue();
            self.events.push(StoreEvent::Failed { reason: reason.to_owned() });
        }
    }

    /// A durable group without records.
    pub(crate) fn add_group(&mut self, group: GroupId, replica: ReplicaId) {
        self.groups.insert(group, replica, 0, 0);
        if self.lost_batches {
            // A later recovery would take the lost batches for this group's too, and its log for ended there.
            self.anchor_in_open(group, replica, 1);
        }
    }

    pub(crate) fn remove_group(&mut self, group: GroupId) {
        self.groups.remove(group);
    }

    /// `placed`: for each record where its payload goes. The answer is the sequence of the batch it is in.
    ///
    /// # Panics
    /// Where the records do not continue the group's log.
    pub(crate) fn append(&mut self, append: &Append, placed: &[Vec<Extent>]) -> Result<u64, AppendError> {
        assert_eq!(append.records.len(), placed.len(), "each record has its extents");
        if self.failed {
            return Err(AppendError::Failed);
        }
        let log = self.groups.get(append.group).ok_or(AppendError::UnknownGroup)?;
        let replica = log.replica;
        let last = last_after(append, log.last_appended, log.checkpoint_index);
        let bytes = self.check_limits(append, placed)?;
        let slot_bytes: usize = placed.iter().flatten().map(Extent::bytes_in_slots).sum();
        if !self.groups.has_room_for(slot_bytes as u64, self.region.bytes()) {
            self.ask_for_checkpoints();
            return Err(AppendError::Full);
        }
        let closes = self.open.as_ref().is_some_and(|open| {
            let new_group = !open.holds(append.group) && !open.has_room_for_a_group();
            let with_payloads = open.length_with(bytes) + open.slot_bytes + slot_bytes;
            new_group || open.length_with(bytes) > self.batch_bytes_max() || with_payloads > BATCH_BYTES_MAX
        });
        let place = self.place_with(bytes, closes);
        if !self.may_use(place, append) {
            self.ask_for_checkpoints();
            return Err(AppendError::Full);
        }
        if closes {
            self.close_open();
        }
        let batch = self.open_batch(bytes);
        batch.append(append, placed, replica);
        let sequence = batch.sequence;
        self.groups.get_mut(append.group).expect("looked up above").last_appended = last;
        if let Some(from) = append.truncate_from {
            self.groups.forget_payloads(append.group, from);
        }
        for (record, placed) in append.records.iter().zip(placed) {
            self.groups.note_payload(append.group, record.index, placed);
            let mut at = 0;
            for extent in placed {
                if let Extent::Slots { offset, .. } = extent {
                    self.payloads.push(sequence, *offset, record.payload.slice(at..at + extent.bytes()));
                }
                at += extent.bytes();
            }
        }
        Ok(sequence)
    }

    /// Batches up to the returned one hold no hard state that the group appends after this call.
    pub(crate) fn checkpoint_sequence(&mut self, group: GroupId) -> u64 {
        if self.open.as_ref().is_some_and(|open| open.holds(group)) {
            self.close_open();
        }
        match &self.open {
            Some(open) => open.sequence - 1,
            None => self.next_sequence - 1,
        }
    }

    /// A checkpoint that was given `sequence` by [`Wal::checkpoint_sequence`] is durable.
    pub(crate) fn on_checkpoint(&mut self, group: GroupId, index: u64, sequence: u64) {
        self.groups.on_checkpoint(group, index, sequence);
    }

    pub(crate) fn release(&mut self, group: GroupId, to: u64) {
        self.groups.release(group, to);
    }

    /// Writes of payloads; call again after each completion and each append.
    pub(crate) fn take_payload_ops(&mut self) -> Vec<DeviceOp> {
        if self.failed { Vec::new() } else { self.payloads.take_ops(&mut self.ids) }
    }

    /// Of the log itself at most one operation is in flight; call again after each completion and each append.
    pub(crate) fn take_ops(&mut self) -> Option<DeviceOp> {
        if self.failed {
            return None;
        }
        if self.in_flight.is_some() {
            return self.flush_written();
        }
        if self.queue.is_empty() {
            self.close_open();
        }
        let generation = self.queue.front()?.place.generation;
        if generation >= self.durable_oldest_generation + self.segments {
            // The segment is released, but no durable word says so yet; or it is not, and a release has to come first.
            return (self.oldest_generation() > self.durable_oldest_generation).then(|| self.submit_mark());
        }
        Some(self.submit_batch())
    }

    pub(crate) fn take_events(&mut self) -> Vec<StoreEvent> {
        std::mem::take(&mut self.events)
    }

    fn anchor_in_open(&mut self, group: GroupId, replica: ReplicaId, from: u64) {
        self.batch_for_one_record().anchor(group, replica, from);
    }

    fn batch_for_one_record(&mut self) -> &mut Batch {
        let full = self.open.as_ref().is_some_and(|open| {
            !open.has_room_for_a_group() || open.length_with(batch::ANCHOR_BYTES) > self.batch_bytes_max()
        });
        if full {
            self.close_open();
        }
        self.open_batch(batch::ANCHOR_BYTES)
    }

    fn open_batch(&mut self, bytes: usize) -> &mut Batch {
        self.open.get_or_insert_with(|| {
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            Batch::new(sequence, self.batch_capacity.max(bytes + BLOCK_BYTES))
        })
    }

    /// The log of `group` ends before `from`: what came later was torn.
    fn truncate_in_open(&mut self, group: GroupId, replica: ReplicaId, from: u64) {
        self.batch_for_one_record().truncate(group, replica, from);
    }

    fn check_limits(&self, append: &Append, placed: &[Vec<Extent>]) -> Result<usize, AppendError> {
        let limit = |fits: bool, what, limit| if fits { Ok(()) } else { Err(AppendError::TooLarge { what, limit }) };
        limit(append.records.len() <= RECORDS_MAX, "records", RECORDS_MAX)?;
        let hard_state = append.hard_state.as_ref().map_or(0, |bytes| bytes.len());
        limit(hard_state <= HARD_STATE_BYTES_MAX, "bytes of hard state", HARD_STATE_BYTES_MAX)?;
        let mut data = 0;
        for record in &append.records {
            limit(record.header.len() <= HEADER_BYTES_MAX, "bytes of a record's header", HEADER_BYTES_MAX)?;
            limit(record.payload.len() <= PAYLOAD_BYTES_MAX, "bytes of a record's payload", PAYLOAD_BYTES_MAX)?;
            data += record.header.len() + record.payload.len();
        }
        limit(data <= APPEND_BYTES_MAX, "bytes of an append", APPEND_BYTES_MAX)?;
        let bytes = encoded_bytes(append, placed);
        let most = self.batch_bytes_max() - format::BATCH_HEADER_BYTES;
        limit(bytes <= most, "bytes of an append on a disk with these segments", most)?;
        Ok(bytes)
    }

    fn batch_bytes_max(&self) -> usize {
        BATCH_BYTES_MAX.min(self.segment_bytes as usize / 2)
    }

    /// Where the batch that takes `bytes` more would lie, `closes`: in a new batch behind the open one.
    fn place_with(&self, bytes: usize, closes: bool) -> Place {
        let (start, length) = match &self.open {
            Some(open) if closes => {
                (self.behind(self.head, open.length_with(0) as u64), format::BATCH_HEADER_BYTES + bytes)
            }
            Some(open) => (self.head, open.length_with(bytes)),
            None => (self.head, format::BATCH_HEADER_BYTES + bytes),
        };
        self.behind(start, length.next_multiple_of(BLOCK_BYTES) as u64)
    }

    /// The end of a batch of `length` placed at `head`, or at the start of the next segment.
    fn behind(&self, head: Place, length: u64) -> Place {
        if head.offset + length <= self.segment_bytes {
            Place { generation: head.generation, offset: head.offset + length }
        } else {
            Place { generation: head.generation + 1, offset: length }
        }
    }

    /// Data leaves the last free segment to the rest: records without any may fill half of it, because a leader whose
    /// log is full of what it may not yet take for committed needs its first entry on the disk to get on; hard states
    /// a quarter more; the last quarter is recovery's.
    fn may_use(&self, end: Place, append: &Append) -> bool {
        let last = self.oldest_generation() + self.segments - 1;
        let quarters = match append.records.as_slice() {
            [] => 3,
            records if records.iter().all(|record| record.payload.is_empty()) => 2,
            _ => 0,
        };
        end.generation < last || end.generation == last && end.offset <= self.segment_bytes / 4 * quarters
    }

    /// The oldest generation with something some group needs; the last flushed batch's where there is none.
    fn oldest_generation(&self) -> u64 {
        self.groups.oldest_pin().map_or(self.flushed.generation, |pin| pin.min(self.flushed.generation))
    }

    fn first_sequence(&self, generation: u64) -> Option<u64> {
        self.first_sequences.iter().find(|(known, _)| *known >= generation).map(|(_, sequence)| *sequence)
    }

    /// Once more than half of the ring is in use, whoever holds what lies further back is asked.
    fn ask_for_checkpoints(&mut self) {
        if let Some(generation) = self.head.generation.checked_sub(self.segments / 2) {
            let groups = self.groups.ask_for_checkpoints(generation);
            self.events.extend(groups.into_iter().map(|group| StoreEvent::CheckpointWanted { group }));
        }
        if self.groups.slot_bytes() > self.bytes_total() / 4 * 3 {
            let group = self.groups.ask_for_payloads();
            self.events.extend(group.map(|group| StoreEvent::CheckpointWanted { group }));
        }
    }

    fn close_open(&mut self) {
        let Some(mut batch) = self.open.take() else { return };
        let length = batch.close() as u64;
        let end = self.behind(self.head, length);
        let rolled = end.generation != self.head.generation;
        let slot_bytes = batch.slot_bytes;
        let place = Place { generation: end.generation, offset: end.offset - length };
        self.head = end;
        self.batch_capacity = (length as usize).max(BATCH_CAPACITY_MIN);
        self.queue.push_back(Placed { batch, place, length });
        if rolled || slot_bytes > 0 {
            self.ask_for_checkpoints();
        }
    }

    fn submit_batch(&mut self) -> DeviceOp {
        let mut placed = self.queue.pop_front().expect("the caller looked at the front");
        if self.first_sequences.back().is_none_or(|(generation, _)| *generation < placed.place.generation) {
            self.first_sequences.push_back((placed.place.generation, placed.batch.sequence));
        }
        let oldest_generation = self.oldest_generation();
        let (offset, data) = self.finish(&mut placed, oldest_generation);
        let id = self.ids.take();
        if holdfast_planted::is(Bug::AcknowledgeBeforeFlush) {
            self.tell_flushed(&placed.batch);
        }
        let flushed_later = placed.batch.slot_bytes > 0 && !holdfast_planted::is(Bug::SkipPayloadFlush);
        let stage = if flushed_later { Stage::Writing } else { Stage::Durable };
        self.in_flight = Some(InFlight::Batch { id, batch: placed, oldest_generation, stage });
        let durable = stage == Stage::Durable && !holdfast_planted::is(Bug::SkipWalFlush);
        DeviceOp::Write { id, offset, data: data.into(), durable }
    }

    /// The flush of a batch whose write, and those of its payloads, have completed.
    fn flush_written(&mut self) -> Option<DeviceOp> {
        match &mut self.in_flight {
            Some(InFlight::Batch { id, batch, stage: stage @ Stage::Written, .. })
                if !self.payloads.pending(batch.batch.sequence) =>
            {
                *id = self.ids.take();
                *stage = Stage::Flushing;
                Some(DeviceOp::Flush { id: *id })
            }
            _ => None,
        }
    }

    /// The device offset and bytes of a placed batch.
    fn finish(&self, placed: &mut Placed, oldest_generation: u64) -> (u64, AlignedBuffer) {
        let offset = self.device_offset(placed.place);
        let header = BatchHeader {
            disk: self.disk,
            generation: placed.place.generation,
            sequence: 0,
            offset,
            length: 0,
            table_offset: 0,
            groups: 0,
            table_checksum: 0,
            body_checksum: 0,
            previous: self.flushed_sequence,
            oldest_sequence: self.first_sequence(oldest_generation).unwrap_or(placed.batch.sequence),
            oldest_generation,
            boot_epoch: self.boot_epoch,
        };
        (offset, placed.batch.finish(header))
    }

    fn device_offset(&self, place: Place) -> u64 {
        self.region.start + place.generation % self.segments * self.segment_bytes + place.offset
    }

    fn on_batch_durable(&mut self, placed: &Placed, oldest_generation: u64) {
        self.flushed_sequence = placed.batch.sequence;
        self.flushed = Place { offset: placed.place.offset + placed.length, ..placed.place };
        self.durable_oldest_generation = self.durable_oldest_generation.max(oldest_generation);
        for entry in &placed.batch.table {
            self.groups.on_durable(entry, placed.place.generation, placed.batch.sequence);
        }
        self.forget_released();
    }

    fn tell_flushed(&mut self, batch: &Batch) {
        for (entry, sequence) in batch.table.iter().zip(&batch.appended) {
            let known = self.groups.get(entry.group).is_some_and(|log| log.replica == entry.replica);
            if let (true, Some(sequence)) = (known, *sequence) {
                self.events.push(StoreEvent::Flushed { group: entry.group, sequence });
            }
        }
    }

    fn submit_mark(&mut self) -> DeviceOp {
        let oldest_generation = self.oldest_generation();
        let mark = Mark {
            disk: self.disk,
            number: self.marked_number + 1,
            sequence: self.flushed_sequence,
            generation: self.flushed.generation,
            end: self.flushed.offset,
            oldest_sequence: self.first_sequence(oldest_generation).unwrap_or(self.flushed_sequence),
            oldest_generation,
        };
        let id = self.ids.take();
        let data = AlignedBuffer::padded(&mark.encode()).into();
        let offset = mark.device_offset();
        self.in_flight = Some(InFlight::Mark { id, mark });
        DeviceOp::Write { id, offset, data, durable: !holdfast_planted::is(Bug::SkipWalFlush) }
    }

    fn on_mark_durable(&mut self, mark: &Mark) {
        self.marked_number = mark.number;
        self.marked_sequence = mark.sequence;
        self.durable_oldest_generation = self.durable_oldest_generation.max(mark.oldest_generation);
        self.forget_released();
    }

    fn forget_released(&mut self) {
        while self.first_sequences.front().is_some_and(|(generation, _)| *generation < self.durable_oldest_generation) {
            self.first_sequences.pop_front();
        }
    }
}

/// The index of the last record after `append`.
fn last_after(append: &Append, last_appended: u64, checkpoint_index: u64) -> u64 {
    let mut last = last_appended;
    if let Some(from) = append.truncate_from {
        // Below the checkpoint: of a log that an installed state does not come of.
        last = last.min(from - 1).max(checkpoint_index);
    }
    for record in &append.records {
        assert_eq!(record.index, last + 1, "{}: records are contiguous", append.group);
        last = record.index;
    }
    last
}

#[cfg(test)]
mod tests;
