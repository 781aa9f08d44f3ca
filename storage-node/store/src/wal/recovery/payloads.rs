//! Finds the payloads that records have in slots, and tells a torn one from a lost one.
//!
//! A batch is durable with the payloads of its records, so above a group's checkpoint a payload that does not match its
//! checksums is damage; but in the last batch, where no mark says that it was flushed, it is torn: the group's log is cut
//! there, as it would be had the batch been torn there. At and below the checkpoint a slot may have been given away since:
//! such records are kept for others only, and where one is gone, so are those before it.

use crate::device::{BLOCK_BYTES, Device};
use crate::group::Record;
use crate::ops::AlignedBuffer;
use crate::wal::extents::Extent;
use crate::wal::format::StoredPayload;

/// Which parts of the disk are slots, and whose.
pub(crate) trait Slots {
    /// Whether `[offset, offset + bytes)` of the device are whole slots.
    fn are_slots(&self, offset: u64, bytes: usize) -> bool;
    /// Takes them for a record. False: one of them is something else's, and none was taken.
    fn claim(&mut self, offset: u64, bytes: usize) -> bool;
}

/// A record as the log has it.
#[derive(Debug)]
pub(super) struct StoredRecord {
    pub index: u64,
    pub header: bytes::Bytes,
    pub payload: StoredPayload,
    /// Of its batch.
    pub sequence: u64,
}

/// The records of a group with their payloads.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub records: Vec<Record>,
    /// The extents of those that have any, by index.
    pub placed: Vec<(u64, Vec<Extent>)>,
    /// The first record that was left out, and whether that is damage.
    pub cut: Option<Cut>,
    /// Payloads of the last batch: only a page cache may hold them.
    pub tail: Vec<(u64, AlignedBuffer)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Torn,
    Damaged,
}

/// What `resolve` needs to know of the disk.
pub(super) struct Source<'a> {
    pub device: &'a dyn Device,
    pub slots: &'a mut dyn Slots,
    /// The last batch of the log.
    pub last_sequence: u64,
    /// No mark says that the last batch was flushed.
    pub unmarked: bool,
    /// Bytes of payloads below checkpoints that may still be read: bounds memory, as the WAL does for inline ones.
    pub below_bytes: usize,
}

impl Source<'_> {
    /// Takes the slots of what it finds above `checkpoint`.
    pub fn resolve(&mut self, stored: Vec<StoredRecord>, checkpoint: u64) -> Resolved {
        let mut resolved = Resolved::default();
        let above = stored.partition_point(|record| record.index <= checkpoint);
        let mut kept = Vec::new();
        for record in stored[..above].iter().rev() {
            let in_slots: usize = record.payload.extents.iter().map(Extent::bytes_in_slots).sum();
            if in_slots > self.below_bytes {
                break;
            }
            self.below_bytes -= in_slots;
            let Some((found, _)) = self.read(record) else { break };
            kept.push((found, record));
        }
        for (found, record) in kept.into_iter().rev() {
            resolved.keep(found, record);
        }
        for record in &stored[above..] {
            let found = self.read(record).filter(|_| self.claim(&record.payload));
            let Some((found, written)) = found else {
                let torn = self.unmarked && record.sequence == self.last_sequence;
                resolved.cut = Some(if torn { Cut::Torn } else { Cut::Damaged });
                break;
            };
            if record.sequence == self.last_sequence {
                resolved.tail.extend(written);
            }
            resolved.keep(found, record);
        }
        resolved
    }

    /// A record with its payload, and what of it was in slots. `None`: that does not match its checksums.
    fn read(&self, stored: &StoredRecord) -> Option<(Record, Vec<(u64, AlignedBuffer)>)> {
        let StoredPayload { bytes, extents, inline } = &stored.payload;
        let (mut payload, mut inline_rest) = (AlignedBuffer::with_capacity(*bytes), &inline[..]);
        let mut written = Vec::new();
        for extent in extents {
            match extent {
                Extent::Inline { .. } => {
                    let (part, rest) = inline_rest.split_at(extent.bytes());
                    payload.extend_from_slice(part);
                    inline_rest = rest;
                }
                Extent::Zero { .. } => payload.extend_from_slice(&AlignedBuffer::zeroed(extent.bytes())),
                Extent::Slots { offset, checksums } => {
                    if !self.slots.are_slots(*offset, extent.bytes()) {
                        return None;
                    }
                    let mut buffer = AlignedBuffer::zeroed(extent.bytes());
                    self.device.read_at(*offset, &mut buffer).ok()?;
                    let mut blocks = buffer.chunks_exact(BLOCK_BYTES).zip(checksums);
                    if !blocks.all(|(block, checksum)| holdfast_block::checksum(block) == *checksum) {
                        return None;
                    }
                    payload.extend_from_slice(&buffer);
                    written.push((*offset, buffer));
                }
            }
        }
        let payload = if extents.is_empty() { inline.clone() } else { payload.into_bytes() };
        let record = Record { index: stored.index, header: stored.header.clone(), payload, at: None };
        Some((record, written))
    }

    fn claim(&mut self, payload: &StoredPayload) -> bool {
        payload.extents.iter().all(|extent| match extent {
            Extent::Slots { offset, .. } => self.slots.claim(*offset, extent.bytes()),
            Extent::Inline { .. } | Extent::Zero { .. } => true,
        })
    }
}

impl Resolved {
    fn keep(&mut self, found: Record, stored: &StoredRecord) {
        if !stored.payload.extents.is_empty() {
            self.placed.push((stored.index, stored.payload.extents.clone()));
        }
        self.records.push(found);
    }
}
