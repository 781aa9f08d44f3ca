//! A batch being filled: what many groups append while the batch before it is written.

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId};

use super::extents::{self, Extent};
use super::format::{
    BATCH_HEADER_BYTES, BatchHeader, GROUPS_MAX, RECORD_HEADER_BYTES, TABLE_ENTRY_BYTES, TableEntry, anchor_header,
    entry_header, hard_state_header, truncate_header,
};
use crate::device::BLOCK_BYTES;
use crate::group::{Append, Record};
use crate::ops::AlignedBuffer;

/// Bytes that an anchor, or a truncation alone, adds to a batch.
pub(super) const ANCHOR_BYTES: usize = RECORD_HEADER_BYTES + TABLE_ENTRY_BYTES;

pub(super) struct Batch {
    pub sequence: u64,
    /// Header room, records; after `close` the table and padding.
    buffer: AlignedBuffer,
    pub table: Vec<TableEntry>,
    /// Beside `table`: the last append of the group's caller in this batch, if there is one.
    pub appended: Vec<Option<u64>>,
    slots: BTreeMap<GroupId, u16>,
    table_offset: usize,
    /// Bytes of its records' payloads that lie in slots.
    pub slot_bytes: usize,
}

/// Bytes that `append` adds to a batch, its table entry included. `placed`: the extents of each record's payload.
pub(super) fn encoded_bytes(append: &Append, placed: &[Vec<Extent>]) -> usize {
    let hard_state = append.hard_state.as_ref().map_or(0, |bytes| RECORD_HEADER_BYTES + bytes.len());
    let truncation = append.truncate_from.map_or(0, |_| RECORD_HEADER_BYTES);
    let record = |(record, placed): (&Record, &Vec<Extent>)| {
        let payload = extents::encoded_bytes(placed) + extents::inline_bytes(placed, record.payload.len());
        RECORD_HEADER_BYTES + record.header.len() + payload
    };
    hard_state + truncation + append.records.iter().zip(placed).map(record).sum::<usize>() + TABLE_ENTRY_BYTES
}

impl Batch {
    pub fn new(sequence: u64, capacity: usize) -> Batch {
        let mut buffer = AlignedBuffer::with_capacity(capacity);
        buffer.extend_from_slice(&[0; BATCH_HEADER_BYTES]);
        Batch {
            sequence,
            buffer,
            table: Vec::new(),
            appended: Vec::new(),
            slots: BTreeMap::new(),
            table_offset: 0,
            slot_bytes: 0,
        }
    }

    /// Length on disk if `extra` more bytes were added.
    pub fn length_with(&self, extra: usize) -> usize {
        (self.buffer.len() + self.table.len() * TABLE_ENTRY_BYTES + extra).next_multiple_of(BLOCK_BYTES)
    }

    pub fn has_room_for_a_group(&self) -> bool {
        self.table.len() < GROUPS_MAX
    }

    pub fn holds(&self, group: GroupId) -> bool {
        self.slots.contains_key(&group)
    }

    pub fn append(&mut self, append: &Append, placed: &[Vec<Extent>], replica: ReplicaId) {
        let slot = self.slot(append.group, replica);
        self.appended[usize::from(slot)] = Some(append.sequence);
        if let Some(bytes) = &append.hard_state {
            self.table[usize::from(slot)].hard_state = true;
            self.buffer.extend_from_slice(&hard_state_header(slot, bytes.len()));
            self.buffer.extend_from_slice(bytes);
        }
        if let Some(from) = append.truncate_from {
            self.table[usize::from(slot)].note_truncation(from);
            self.buffer.extend_from_slice(&truncate_header(slot, from));
        }
        for (Record { index, header, payload, .. }, placed) in append.records.iter().zip(placed) {
            self.table[usize::from(slot)].note_record(*index);
            let lengths = [header.len(), payload.len(), extents::encoded_bytes(placed)];
            self.buffer.extend_from_slice(&entry_header(slot, lengths, *index));
            self.buffer.extend_from_slice(header);
            extents::encode(placed, &mut self.buffer);
            if placed.is_empty() {
                self.buffer.extend_from_slice(payload);
            }
            let mut at = 0;
            for extent in placed {
                if matches!(extent, Extent::Inline { .. }) {
                    self.buffer.extend_from_slice(&payload[at..at + extent.bytes()]);
                }
                at += extent.bytes();
                self.slot_bytes += extent.bytes_in_slots();
            }
        }
    }

    /// The log of `group` ends before `from`, and damage before this batch has been told.
    pub fn anchor(&mut self, group: GroupId, replica: ReplicaId, from: u64) {
        let slot = self.slot(group, replica);
        let entry = &mut self.table[usize::from(slot)];
        entry.anchor = true;
        entry.note_truncation(from);
        self.buffer.extend_from_slice(&anchor_header(slot, from));
    }

    /// Records from `from` on were never durable.
    pub fn truncate(&mut self, group: GroupId, replica: ReplicaId, from: u64) {
        let slot = self.slot(group, replica);
        self.table[usize::from(slot)].note_truncation(from);
        self.buffer.extend_from_slice(&truncate_header(slot, from));
    }

    fn slot(&mut self, group: GroupId, replica: ReplicaId) -> u16 {
        *self.slots.entry(group).or_insert_with(|| {
            assert!(self.table.len() < GROUPS_MAX, "the caller closes a batch of {GROUPS_MAX} groups");
            self.table.push(TableEntry::new(group, replica));
            self.appended.push(None);
            (self.table.len() - 1) as u16
        })
    }

    /// Appends the table and the padding: the length is final.
    pub fn close(&mut self) -> usize {
        self.table_offset = self.buffer.len();
        for entry in &self.table {
            self.buffer.extend_from_slice(&entry.encode());
        }
        self.buffer.pad_to_block();
        self.buffer.len()
    }

    /// Completes `header` with what the batch knows, writes it in front and hands the bytes over.
    pub fn finish(&mut self, mut header: BatchHeader) -> AlignedBuffer {
        let mut buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::with_capacity(0));
        header.sequence = self.sequence;
        header.length = u32::try_from(buffer.len()).expect("a batch is no longer than a segment");
        header.table_offset = u32::try_from(self.table_offset).expect("the table lies within the batch");
        header.groups = u32::try_from(self.table.len()).expect("a batch has at most GROUPS_MAX groups");
        header.table_checksum = crc32c::crc32c(&buffer[header.table_range()]);
        header.body_checksum = crc32c::crc32c(&buffer[BATCH_HEADER_BYTES..]);
        header.encode(&mut buffer);
        buffer
    }
}

/// The records of a whole batch, as a view.
pub(super) fn records_of(header: &BatchHeader, batch: &Bytes) -> Bytes {
    batch.slice(BATCH_HEADER_BYTES..header.table_offset as usize)
}
