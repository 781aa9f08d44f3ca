//! Finds batches and marks in the bytes of the ring, without an opinion on which of them count.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;

use crate::device::{BLOCK_BYTES, Device};
use crate::ops::AlignedBuffer;
use crate::superblock::{MARKS, Superblock};
use crate::wal::format::{BATCH_HEADER_BYTES, BatchHeader, Mark, TableEntry, decode_table};

/// A batch whose header is whole.
pub(super) struct Found {
    pub header: BatchHeader,
    /// `None` where the table is damaged.
    pub table: Option<Vec<TableEntry>>,
    /// The checksum of everything behind the header is right.
    pub whole: bool,
    pub bytes: Bytes,
}

pub(super) struct Scan {
    /// By sequence. Of two with one sequence the whole one counts, then the later generation.
    pub found: BTreeMap<u64, Found>,
    pub marks: [Option<Mark>; 2],
    /// Blocks the device could not read.
    pub unreadable: Vec<u64>,
    wal_start: u64,
    segment_bytes: u64,
}

impl Scan {
    pub fn read(device: &dyn Device, superblock: &Superblock) -> io::Result<Scan> {
        let segment_bytes = superblock.wal_segment_bytes;
        let wal_start = superblock.wal.start;
        let mut scan =
            Scan { found: BTreeMap::new(), marks: [None, None], unreadable: Vec::new(), wal_start, segment_bytes };
        for (slot, offset) in MARKS.into_iter().enumerate() {
            let block = scan.read_range(device, offset, BLOCK_BYTES)?;
            scan.marks[slot] =
                Mark::decode(&block).filter(|mark| mark.disk == superblock.disk && mark.end <= segment_bytes);
        }
        for segment in 0..superblock.segments() {
            scan.read_segment(device, superblock, segment)?;
        }
        Ok(scan)
    }

    /// The newer of the valid marks.
    pub fn mark(&self) -> Option<&Mark> {
        self.marks.iter().flatten().max_by_key(|mark| mark.number)
    }

    pub fn sequence_seen_max(&self) -> u64 {
        let found = self.found.last_key_value().map_or(0, |(sequence, _)| *sequence);
        found.max(self.mark().map_or(0, |mark| mark.sequence))
    }

    pub fn offset_in_segment(&self, header: &BatchHeader) -> u64 {
        (header.offset - self.wal_start) % self.segment_bytes
    }

    fn read_segment(&mut self, device: &dyn Device, superblock: &Superblock, segment: u64) -> io::Result<()> {
        let start = superblock.wal.start + segment * superblock.wal_segment_bytes;
        let bytes = self.read_range(device, start, superblock.wal_segment_bytes as usize)?.into_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let header = BatchHeader::decode(&bytes[at..], bytes.len() - at).filter(|header| {
                header.disk == superblock.disk
                    && header.offset == start + at as u64
                    && header.generation % superblock.segments() == segment
            });
            let Some(header) = header else {
                // The next batch, if there is one behind bad bytes, starts at some block.
                at += BLOCK_BYTES;
                continue;
            };
            let length = header.length as usize;
            self.add(header, bytes.slice(at..at + length));
            at += length;
        }
        Ok(())
    }

    fn add(&mut self, header: BatchHeader, bytes: Bytes) {
        let whole = crc32c::crc32c(&bytes[BATCH_HEADER_BYTES..]) == header.body_checksum;
        let found = Found { table: decode_table(&header, &bytes), whole, header, bytes };
        let rank = |found: &Found| (found.whole, found.header.generation);
        match self.found.entry(found.header.sequence) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(found);
            }
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                if rank(&found) > rank(entry.get()) {
                    entry.insert(found);
                }
            }
        }
    }

    /// Reads a range, block by block where it cannot be read at once; unreadable blocks are zeroes, which are no
    /// batch. A device of which nothing can be read is an error.
    fn read_range(&mut self, device: &dyn Device, offset: u64, length: usize) -> io::Result<AlignedBuffer> {
        let mut buffer = AlignedBuffer::zeroed(length);
        let Err(whole_error) = device.read_at(offset, &mut buffer) else { return Ok(buffer) };
        let mut readable = 0;
        for (number, block) in buffer.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let at = offset + (number * BLOCK_BYTES) as u64;
            if device.read_at(at, block).is_ok() {
                readable += 1;
            } else {
                block.fill(0);
                self.unreadable.push(at);
            }
        }
        // One block alone may be lost; a mark has a twin.
        if readable == 0 && length > BLOCK_BYTES { Err(whole_error) } else { Ok(buffer) }
    }
}
