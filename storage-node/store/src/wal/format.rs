//! Bytes of the WAL: batch header, table of groups, records, flushed mark. Drawn in `docs/formats/wal.md`.
//!
//! Encoding and decoding only; what a sequence of batches means is `recovery`'s.

use bytes::Bytes;
use holdfast_id::{DiskId, GroupId, ReplicaId};

use crate::bytes_at::{put, take, u16_at, u32_at, u64_at};
use crate::device::BLOCK_BYTES;
use crate::group::{HARD_STATE_BYTES_MAX, HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX};
use crate::superblock::{COUNT_MAX, MARKS};
use crate::wal::extents::{self, EXTENTS_BYTES_MAX, Extent};

const BATCH_MAGIC: [u8; 8] = *b"HFBATCH1";
const MARK_MAGIC: [u8; 8] = *b"HFMARK01";

/// Bytes of a batch's header; records follow.
pub(super) const BATCH_HEADER_BYTES: usize = 128;
/// Bytes before the header and payload of a record.
pub(super) const RECORD_HEADER_BYTES: usize = 24;
/// Bytes of one group in the table.
pub(super) const TABLE_ENTRY_BYTES: usize = 64;
/// Most groups in one batch; a record names its group by its place in the table.
pub(super) const GROUPS_MAX: usize = 1 << 14;
const _: () = assert!(GROUPS_MAX <= u16::MAX as usize + 1);

const CHECKED_FROM: usize = 12;
const FLAG_HARD_STATE: u16 = 1;
const FLAG_ANCHOR: u16 = 2;

/// Where and after what a batch was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BatchHeader {
    pub disk: DiskId,
    /// Which use of its segment; segment `generation % segments`.
    pub generation: u64,
    /// Rising over the life of the disk, with gaps after crashes.
    pub sequence: u64,
    /// Byte of the device the batch was written to: a copy elsewhere is no batch.
    pub offset: u64,
    /// Whole blocks.
    pub length: u32,
    /// Records end and the table starts here, from the start of the batch.
    pub table_offset: u32,
    pub groups: u32,
    pub table_checksum: u32,
    /// Of everything behind the header.
    pub body_checksum: u32,
    /// The last batch before this one; it was flushed when this one was written. 0: none.
    pub previous: u64,
    /// Batches before this one may be overwritten.
    pub oldest_sequence: u64,
    pub oldest_generation: u64,
    pub boot_epoch: u64,
}

impl BatchHeader {
    pub fn encode(&self, block: &mut [u8]) {
        let block = &mut block[..BATCH_HEADER_BYTES];
        block.fill(0);
        put(block, 0, BATCH_MAGIC);
        put(block, 12, self.body_checksum.to_le_bytes());
        put(block, 16, self.disk.to_bytes());
        put(block, 32, self.generation.to_le_bytes());
        put(block, 40, self.sequence.to_le_bytes());
        put(block, 48, self.offset.to_le_bytes());
        put(block, 56, self.length.to_le_bytes());
        put(block, 60, self.table_offset.to_le_bytes());
        put(block, 64, self.groups.to_le_bytes());
        put(block, 68, self.table_checksum.to_le_bytes());
        put(block, 72, self.previous.to_le_bytes());
        put(block, 80, self.oldest_sequence.to_le_bytes());
        put(block, 88, self.oldest_generation.to_le_bytes());
        put(block, 96, self.boot_epoch.to_le_bytes());
        let checksum = crc32c::crc32c(&block[CHECKED_FROM..]);
        put(block, 8, checksum.to_le_bytes());
    }

    /// `None` where the bytes are no whole header, or the batch would not fit `room` bytes.
    pub fn decode(block: &[u8], room: usize) -> Option<BatchHeader> {
        let block = block.get(..BATCH_HEADER_BYTES)?;
        if block[..8] != BATCH_MAGIC || crc32c::crc32c(&block[CHECKED_FROM..]) != u32_at(block, 8) {
            return None;
        }
        let header = BatchHeader {
            disk: DiskId::from_bytes(take(block, 16))?,
            generation: u64_at(block, 32),
            sequence: u64_at(block, 40),
            offset: u64_at(block, 48),
            length: u32_at(block, 56),
            table_offset: u32_at(block, 60),
            groups: u32_at(block, 64),
            table_checksum: u32_at(block, 68),
            body_checksum: u32_at(block, 12),
            previous: u64_at(block, 72),
            oldest_sequence: u64_at(block, 80),
            oldest_generation: u64_at(block, 88),
            boot_epoch: u64_at(block, 96),
        };
        let (length, table_offset) = (header.length as usize, header.table_offset as usize);
        let table_bytes = (header.groups as usize).checked_mul(TABLE_ENTRY_BYTES)?;
        let plausible = length.is_multiple_of(BLOCK_BYTES)
            && length <= room
            && header.groups as usize <= GROUPS_MAX
            && table_offset >= BATCH_HEADER_BYTES
            && table_offset.checked_add(table_bytes)? <= length
            && header.sequence <= COUNT_MAX
            && header.generation <= COUNT_MAX
            && header.previous < header.sequence
            && header.oldest_sequence <= header.sequence
            && header.oldest_generation <= header.generation;
        plausible.then_some(header)
    }

    pub fn table_range(&self) -> std::ops::Range<usize> {
        let start = self.table_offset as usize;
        start..start + self.groups as usize * TABLE_ENTRY_BYTES
    }
}

/// What a batch did to one group: enough to know what is lost where the batch is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TableEntry {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub hard_state: bool,
    /// Written by recovery: the log of this group ends before `truncate_from`, whatever unreadable batches held.
    pub anchor: bool,
    /// Lowest truncation in the batch; 0: none.
    pub truncate_from: u64,
    /// First record in the batch that no later truncation in it took; 0: none.
    pub first_index: u64,
    /// Last such record; 0: none.
    pub last_index: u64,
}

impl TableEntry {
    pub fn new(group: GroupId, replica: ReplicaId) -> TableEntry {
        TableEntry { group, replica, hard_state: false, anchor: false, truncate_from: 0, first_index: 0, last_index: 0 }
    }

    pub fn note_truncation(&mut self, from: u64) {
        self.truncate_from = if self.truncate_from == 0 { from } else { self.truncate_from.min(from) };
        if from <= self.first_index {
            (self.first_index, self.last_index) = (0, 0);
        } else {
            self.last_index = self.last_index.min(from - 1);
        }
    }

    pub fn note_record(&mut self, index: u64) {
        if self.first_index == 0 {
            self.first_index = index;
        }
        self.last_index = index;
    }

    pub fn encode(&self) -> [u8; TABLE_ENTRY_BYTES] {
        let mut bytes = [0; TABLE_ENTRY_BYTES];
        let hard_state = if self.hard_state { FLAG_HARD_STATE } else { 0 };
        let anchor = if self.anchor { FLAG_ANCHOR } else { 0 };
        put(&mut bytes, 0, self.group.to_bytes());
        put(&mut bytes, 18, (hard_state | anchor).to_le_bytes());
        put(&mut bytes, 24, self.replica.to_bytes());
        put(&mut bytes, 40, self.truncate_from.to_le_bytes());
        put(&mut bytes, 48, self.first_index.to_le_bytes());
        put(&mut bytes, 56, self.last_index.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<TableEntry> {
        let flags = u16_at(bytes, 18);
        let entry = TableEntry {
            group: GroupId::from_bytes(take(bytes, 0))?,
            replica: ReplicaId::from_bytes(take(bytes, 24))?,
            hard_state: flags & FLAG_HARD_STATE != 0,
            anchor: flags & FLAG_ANCHOR != 0,
            truncate_from: u64_at(bytes, 40),
            first_index: u64_at(bytes, 48),
            last_index: u64_at(bytes, 56),
        };
        let known = flags & !(FLAG_HARD_STATE | FLAG_ANCHOR) == 0;
        let counts = entry.first_index <= entry.last_index && entry.last_index.max(entry.truncate_from) <= COUNT_MAX;
        (known && counts).then_some(entry)
    }
}

/// The table of a batch; `None` where its checksum or an entry is bad.
pub(super) fn decode_table(header: &BatchHeader, batch: &[u8]) -> Option<Vec<TableEntry>> {
    let table = &batch[header.table_range()];
    if crc32c::crc32c(table) != header.table_checksum {
        return None;
    }
    table.chunks_exact(TABLE_ENTRY_BYTES).map(TableEntry::decode).collect()
}

/// One record; `slot` is its group's place in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WalRecord {
    HardState { slot: u16, bytes: Bytes },
    Truncate { slot: u16, from: u64 },
    Entry { slot: u16, index: u64, header: Bytes, payload: StoredPayload },
    Anchor { slot: u16, from: u64 },
}

/// A payload as a record has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StoredPayload {
    /// Of the whole payload.
    pub bytes: usize,
    /// Empty: all of it is inline.
    pub extents: Vec<Extent>,
    /// The bytes of the inline extents.
    pub inline: Bytes,
}

const KIND_HARD_STATE: u8 = 1;
const KIND_TRUNCATE: u8 = 2;
const KIND_ENTRY: u8 = 3;
const KIND_ANCHOR: u8 = 4;

/// The fixed part of a record; the header, the extents and the inline part of the payload follow.
pub(super) fn hard_state_header(slot: u16, bytes: usize) -> [u8; RECORD_HEADER_BYTES] {
    record_header(KIND_HARD_STATE, slot, [bytes, 0, 0], 0)
}

pub(super) fn truncate_header(slot: u16, from: u64) -> [u8; RECORD_HEADER_BYTES] {
    record_header(KIND_TRUNCATE, slot, [0; 3], from)
}

/// `lengths`: of the header, the payload and the extents.
pub(super) fn entry_header(slot: u16, lengths: [usize; 3], index: u64) -> [u8; RECORD_HEADER_BYTES] {
    record_header(KIND_ENTRY, slot, lengths, index)
}

pub(super) fn anchor_header(slot: u16, from: u64) -> [u8; RECORD_HEADER_BYTES] {
    record_header(KIND_ANCHOR, slot, [0; 3], from)
}

fn record_header(kind: u8, slot: u16, lengths: [usize; 3], index: u64) -> [u8; RECORD_HEADER_BYTES] {
    // Lengths are below their limits, which fit 32 bits.
    let mut bytes = [0; RECORD_HEADER_BYTES];
    bytes[0] = kind;
    put(&mut bytes, 2, slot.to_le_bytes());
    for (number, length) in lengths.into_iter().enumerate() {
        put(&mut bytes, 4 + 4 * number, (length as u32).to_le_bytes());
    }
    put(&mut bytes, 16, index.to_le_bytes());
    bytes
}

/// Takes the next record off `rest`, the records of a batch whose checksum is right. The error is for people.
pub(super) fn decode_record(rest: &mut Bytes, groups: usize) -> Result<WalRecord, String> {
    if rest.len() < RECORD_HEADER_BYTES {
        return Err(format!("{} bytes where a record should be", rest.len()));
    }
    let fixed = rest.split_to(RECORD_HEADER_BYTES);
    let (kind, slot, index) = (fixed[0], u16_at(&fixed, 2), u64_at(&fixed, 16));
    let [header, payload, list] = [4, 8, 12].map(|at| u32_at(&fixed, at) as usize);
    if usize::from(slot) >= groups {
        return Err(format!("a record of group {slot} of {groups}"));
    }
    if index > COUNT_MAX {
        return Err(format!("a record at index {index}"));
    }
    if header > HEADER_BYTES_MAX || payload > PAYLOAD_BYTES_MAX || list > EXTENTS_BYTES_MAX {
        return Err(format!("a record of {header} + {payload} + {list} bytes"));
    }
    if header + list > rest.len() {
        return Err(format!("a record of {header} + {list} bytes in {}", rest.len()));
    }
    let header = rest.split_to(header);
    let extents = extents::decode(&rest.split_to(list), payload)?;
    let inline = extents::inline_bytes(&extents, payload);
    if inline > rest.len() {
        return Err(format!("a payload of {inline} bytes in {}", rest.len()));
    }
    let payload = StoredPayload { bytes: payload, extents, inline: rest.split_to(inline) };
    match kind {
        KIND_HARD_STATE if header.len() <= HARD_STATE_BYTES_MAX => Ok(WalRecord::HardState { slot, bytes: header }),
        KIND_TRUNCATE => Ok(WalRecord::Truncate { slot, from: index }),
        KIND_ENTRY => Ok(WalRecord::Entry { slot, index, header, payload }),
        KIND_ANCHOR => Ok(WalRecord::Anchor { slot, from: index }),
        _ => Err(format!("a record of unknown kind {kind}")),
    }
}

/// What was flushed when the WAL was last idle, or had to reuse a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub disk: DiskId,
    /// Rising; the higher of the two valid marks counts.
    pub number: u64,
    /// The last flushed batch; 0: none.
    pub sequence: u64,
    pub generation: u64,
    /// Where the next batch goes in the segment of `generation`.
    pub end: u64,
    pub oldest_sequence: u64,
    pub oldest_generation: u64,
}

impl Mark {
    /// Marks alternate: a torn one leaves the one before.
    pub fn device_offset(&self) -> u64 {
        MARKS[(self.number % 2) as usize]
    }

    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        put(&mut block, 0, MARK_MAGIC);
        put(&mut block, 16, self.disk.to_bytes());
        put(&mut block, 32, self.number.to_le_bytes());
        put(&mut block, 40, self.sequence.to_le_bytes());
        put(&mut block, 48, self.generation.to_le_bytes());
        put(&mut block, 56, self.end.to_le_bytes());
        put(&mut block, 64, self.oldest_sequence.to_le_bytes());
        put(&mut block, 72, self.oldest_generation.to_le_bytes());
        let checksum = crc32c::crc32c(&block[CHECKED_FROM..]);
        put(&mut block, 8, checksum.to_le_bytes());
        block
    }

    pub fn decode(block: &[u8]) -> Option<Mark> {
        if block[..8] != MARK_MAGIC || crc32c::crc32c(&block[CHECKED_FROM..]) != u32_at(block, 8) {
            return None;
        }
        let mark = Mark {
            disk: DiskId::from_bytes(take(block, 16))?,
            number: u64_at(block, 32),
            sequence: u64_at(block, 40),
            generation: u64_at(block, 48),
            end: u64_at(block, 56),
            oldest_sequence: u64_at(block, 64),
            oldest_generation: u64_at(block, 72),
        };
        let counts = [mark.number, mark.sequence, mark.generation, mark.oldest_sequence, mark.oldest_generation];
        counts.iter().all(|count| *count <= COUNT_MAX).then_some(mark)
    }
}
