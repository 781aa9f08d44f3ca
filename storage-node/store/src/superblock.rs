//! The superblock: what a disk says about itself, in two copies.
//!
//! A change writes copy 0, flushes, writes copy 1, flushes: whatever tears, one copy stays whole. The valid copy of
//! the higher generation counts. Drawn with its fields in `docs/formats/superblock.md`.

use std::io;

use holdfast_id::{ClusterId, DiskId, ID_BYTES, NodeId};

use crate::bytes_at::{put, take, u32_at, u64_at};
use crate::chunk::{Chunks, GROUPS_MAX};
use crate::device::{BLOCK_BYTES, Device, Region};
use crate::group::{FormatError, OpenError};
use crate::ops::AlignedBuffer;

/// First bytes of every superblock.
const MAGIC: [u8; 8] = *b"HOLDFAST";
/// Written by this program. A reader looks at the feature bits, not at this; it is for people.
pub const VERSION: u32 = 1;
/// Features a program must know to read the disk.
const INCOMPAT_KNOWN: u64 = 0;
/// Features a program must know to write the disk.
const RO_COMPAT_KNOWN: u64 = 0;
/// Where the two copies are.
const COPIES: [u64; 2] = [0, 32 << 10];
/// No epoch, generation, sequence or index of a disk comes near it at a million a second for a hundred thousand years;
/// what is beyond it was not written by a store, and counting on from it would overflow.
pub(crate) const COUNT_MAX: u64 = 1 << 62;
/// Where the two flushed marks of the WAL are; see [`crate::wal`].
pub(crate) const MARKS: [u64; 2] = [128 << 10, 192 << 10];
/// Everything before the WAL. Space for what later versions keep outside the regions.
pub(crate) const HEAD_BYTES: u64 = 1 << 20;

const CHECKSUM_AT: usize = 8;
const CHECKED_FROM: usize = 12;
const VERSION_AT: usize = 12;
const INCOMPAT_AT: usize = 16;
const RO_COMPAT_AT: usize = 24;
const CLUSTER_AT: usize = 32;
const NODE_AT: usize = 48;
const DISK_AT: usize = 64;
const LANES_AT: usize = 80;
const CLEAN_AT: usize = 84;
const BOOT_EPOCH_AT: usize = 88;
const GENERATION_AT: usize = 96;
const DEVICE_BYTES_AT: usize = 104;
const WAL_START_AT: usize = 112;
const WAL_END_AT: usize = 120;
const SEGMENT_BYTES_AT: usize = 128;
const CHUNKS_START_AT: usize = 136;
const CHUNKS_END_AT: usize = 144;
const FIELDS_END: usize = 152;

const _: () = assert!(CHECKED_FROM == CHECKSUM_AT + 4 && VERSION_AT == CHECKED_FROM);
const _: () =
    assert!(NODE_AT == CLUSTER_AT + ID_BYTES && DISK_AT == NODE_AT + ID_BYTES && LANES_AT == DISK_AT + ID_BYTES);
const _: () = assert!(FIELDS_END == CHUNKS_END_AT + 8 && FIELDS_END <= BLOCK_BYTES);
const _: () = assert!(COPIES[1] + BLOCK_BYTES as u64 <= MARKS[0] && MARKS[1] + BLOCK_BYTES as u64 <= HEAD_BYTES);

/// Smallest and largest size of a WAL segment.
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// Fewest segments: one being written, one in reserve, two so that writing and checkpointing overlap.
const SEGMENTS_MIN: u64 = 4;
const SEGMENTS_MAX: u64 = 1 << 16;
/// What `format` is told.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub disk: DiskId,
    /// Bytes of one WAL segment, whole blocks, 64 KiB to 256 MiB. An append takes at most half a segment.
    pub wal_segment_bytes: u64,
    /// At least 4.
    pub wal_segments: u64,
    /// Most groups the disk will hold; each takes 8 KiB of it, used or not.
    pub groups_max: u32,
    /// The first boot is one more. Peers take a lower boot epoch for an earlier life of the node, so a node that comes
    /// back with a new disk needs a higher one than it ever had.
    pub boot_epoch: u64,
}

impl FormatOptions {
    /// The sizes for a disk in use; a WAL of 128 MiB holds a tenth of a second of a fast disk's writes.
    pub fn new(cluster: ClusterId, node: NodeId, disk: DiskId) -> FormatOptions {
        FormatOptions {
            cluster,
            node,
            disk,
            wal_segment_bytes: 8 << 20,
            wal_segments: 16,
            groups_max: 4096,
            boot_epoch: 0,
        }
    }
}

/// The decoded superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub version: u32,
    pub incompat: u64,
    pub ro_compat: u64,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub disk: DiskId,
    /// Independent WALs of this disk; always 1 so far.
    pub lanes: u32,
    /// The store was closed in order; nothing depends on it but what the operator is told.
    pub clean: bool,
    /// Raised durably by every open, before anything is told to a peer.
    pub boot_epoch: u64,
    /// Raised by every write of the superblock.
    pub generation: u64,
    /// The device's size when it was formatted; a device may grow, never shrink.
    pub device_bytes: u64,
    pub wal: Region,
    pub wal_segment_bytes: u64,
    pub chunks: Region,
}

/// What a superblock copy holds.
enum Copy {
    Valid(Superblock),
    /// Ours by its magic, but damaged.
    Damaged,
    /// All zeroes.
    Empty,
    Foreign,
}

impl Superblock {
    /// Lays the regions out. Writes nothing.
    pub(crate) fn lay_out(device_bytes: u64, options: &FormatOptions) -> Result<Superblock, FormatError> {
        let block = BLOCK_BYTES as u64;
        let segment = options.wal_segment_bytes;
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment) || !segment.is_multiple_of(block) {
            let expected = format!("a multiple of {block} from {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX}");
            return Err(FormatError::InvalidOption { option: "wal_segment_bytes", expected });
        }
        if !(SEGMENTS_MIN..=SEGMENTS_MAX).contains(&options.wal_segments) {
            let expected = format!("from {SEGMENTS_MIN} to {SEGMENTS_MAX}");
            return Err(FormatError::InvalidOption { option: "wal_segments", expected });
        }
        if !(1..=GROUPS_MAX).contains(&options.groups_max) {
            return Err(FormatError::InvalidOption {
                option: "groups_max",
                expected: format!("from 1 to {GROUPS_MAX}"),
            });
        }
        let wal = Region::new(HEAD_BYTES, HEAD_BYTES + segment * options.wal_segments);
        let device_bytes = device_bytes - device_bytes % block;
        let needed_bytes = wal.end + Chunks::region_bytes_min(options.groups_max);
        if device_bytes < needed_bytes {
            return Err(FormatError::TooSmall { actual_bytes: device_bytes, needed_bytes });
        }
        Ok(Superblock {
            version: VERSION,
            incompat: 0,
            ro_compat: 0,
            cluster: options.cluster,
            node: options.node,
            disk: options.disk,
            lanes: 1,
            clean: true,
            boot_epoch: options.boot_epoch,
            generation: 1,
            device_bytes,
            wal,
            wal_segment_bytes: segment,
            chunks: Region::new(wal.end, device_bytes),
        })
    }

    /// Refuses a device that holds anything in its head: a store, a file system, a partition table.
    pub(crate) fn check_blank(&self, device: &dyn Device) -> Result<(), FormatError> {
        match Self::read(device) {
            Ok(Some(found)) => {
                return Err(FormatError::AlreadyFormatted { disk: found.disk, cluster: found.cluster });
            }
            Err(OpenError::Io(error)) => return Err(FormatError::Io(error)),
            Err(_) => return Err(FormatError::Foreign),
            Ok(None) => {}
        }
        let mut head = AlignedBuffer::zeroed(self.wal.start as usize);
        device.read_at(0, &mut head)?;
        if head.iter().any(|byte| *byte != 0) { Err(FormatError::Foreign) } else { Ok(()) }
    }

    /// `None` where both copies are blank. Checks features and size.
    pub(crate) fn read(device: &dyn Device) -> Result<Option<Superblock>, OpenError> {
        let actual_bytes = device.len()?;
        if actual_bytes < COPIES[1] + BLOCK_BYTES as u64 {
            return Err(OpenError::TooSmall { actual_bytes, needed_bytes: HEAD_BYTES });
        }
        let copies = [Self::read_copy(device, 0)?, Self::read_copy(device, 1)?];
        let best = match copies {
            [Copy::Valid(a), Copy::Valid(b)] => {
                if a.generation >= b.generation {
                    a
                } else {
                    b
                }
            }
            [Copy::Valid(one), _] | [_, Copy::Valid(one)] => one,
            [Copy::Damaged, _] | [_, Copy::Damaged] => return Err(OpenError::SuperblockDamaged),
            [Copy::Empty, Copy::Empty] => return Ok(None),
            [Copy::Foreign, _] | [_, Copy::Foreign] => return Err(OpenError::Foreign),
        };
        let unknown_bits = best.incompat & !INCOMPAT_KNOWN;
        if unknown_bits != 0 {
            return Err(OpenError::NewerFormat { unknown_bits });
        }
        if actual_bytes < best.device_bytes {
            return Err(OpenError::TooSmall { actual_bytes, needed_bytes: best.device_bytes });
        }
        Ok(Some(best))
    }

    /// Refuses to write a disk with features this program would break.
    pub(crate) fn check_writable(&self) -> Result<(), OpenError> {
        match self.ro_compat & !RO_COMPAT_KNOWN {
            0 => Ok(()),
            unknown_bits => Err(OpenError::NewerFormat { unknown_bits }),
        }
    }

    /// Which of the two copies are whole; for the offline checker.
    pub(crate) fn whole_copies(device: &dyn Device) -> io::Result<[bool; 2]> {
        Ok([0, 1].map(|copy| matches!(Self::read_copy(device, copy), Ok(Copy::Valid(_)))))
    }

    /// Writes both copies, one durable before the other is touched.
    pub(crate) fn write(&self, device: &dyn Device) -> io::Result<()> {
        let block = AlignedBuffer::padded(&self.encode());
        // The copy that was written last before may be torn: it goes first, the other stays whole meanwhile.
        let first = match Self::whole_copies(device)? {
            [true, false] => 1,
            [false, true] => 0,
            _ => (self.generation % 2) as usize,
        };
        for copy in [COPIES[first], COPIES[1 - first]] {
            device.write_at(copy, &block)?;
            device.flush()?;
        }
        Ok(())
    }

    pub(crate) fn segments(&self) -> u64 {
        self.wal.bytes() / self.wal_segment_bytes
    }

    fn read_copy(device: &dyn Device, copy: usize) -> io::Result<Copy> {
        let mut block = AlignedBuffer::zeroed(BLOCK_BYTES);
        device.read_at(COPIES[copy], &mut block)?;
        Ok(Self::decode(&block))
    }

    fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        put(&mut block, 0, MAGIC);
        put(&mut block, VERSION_AT, self.version.to_le_bytes());
        put(&mut block, INCOMPAT_AT, self.incompat.to_le_bytes());
        put(&mut block, RO_COMPAT_AT, self.ro_compat.to_le_bytes());
        put(&mut block, CLUSTER_AT, self.cluster.to_bytes());
        put(&mut block, NODE_AT, self.node.to_bytes());
        put(&mut block, DISK_AT, self.disk.to_bytes());
        put(&mut block, LANES_AT, self.lanes.to_le_bytes());
        put(&mut block, CLEAN_AT, u32::from(self.clean).to_le_bytes());
        put(&mut block, BOOT_EPOCH_AT, self.boot_epoch.to_le_bytes());
        put(&mut block, GENERATION_AT, self.generation.to_le_bytes());
        put(&mut block, DEVICE_BYTES_AT, self.device_bytes.to_le_bytes());
        put(&mut block, WAL_START_AT, self.wal.start.to_le_bytes());
        put(&mut block, WAL_END_AT, self.wal.end.to_le_bytes());
        put(&mut block, SEGMENT_BYTES_AT, self.wal_segment_bytes.to_le_bytes());
        put(&mut block, CHUNKS_START_AT, self.chunks.start.to_le_bytes());
        put(&mut block, CHUNKS_END_AT, self.chunks.end.to_le_bytes());
        let checksum = crc32c::crc32c(&block[CHECKED_FROM..]);
        put(&mut block, CHECKSUM_AT, checksum.to_le_bytes());
        block
    }

    fn decode(block: &[u8]) -> Copy {
        if block[..MAGIC.len()] != MAGIC {
            return if block.iter().all(|byte| *byte == 0) { Copy::Empty } else { Copy::Foreign };
        }
        if crc32c::crc32c(&block[CHECKED_FROM..]) != u32_at(block, CHECKSUM_AT) {
            return Copy::Damaged;
        }
        Self::decode_fields(block).map_or(Copy::Damaged, Copy::Valid)
    }

    /// `None` where the fields contradict each other, whatever the checksum says.
    fn decode_fields(block: &[u8]) -> Option<Superblock> {
        let region = |start_at, end_at| {
            let (start, end) = (u64_at(block, start_at), u64_at(block, end_at));
            let aligned = start.is_multiple_of(BLOCK_BYTES as u64) && end.is_multiple_of(BLOCK_BYTES as u64);
            (start <= end && aligned).then_some(Region { start, end })
        };
        let found = Superblock {
            version: u32_at(block, VERSION_AT),
            incompat: u64_at(block, INCOMPAT_AT),
            ro_compat: u64_at(block, RO_COMPAT_AT),
            cluster: ClusterId::from_bytes(take(block, CLUSTER_AT))?,
            node: NodeId::from_bytes(take(block, NODE_AT))?,
            disk: DiskId::from_bytes(take(block, DISK_AT))?,
            lanes: u32_at(block, LANES_AT),
            clean: u32_at(block, CLEAN_AT) != 0,
            boot_epoch: u64_at(block, BOOT_EPOCH_AT),
            generation: u64_at(block, GENERATION_AT),
            device_bytes: u64_at(block, DEVICE_BYTES_AT),
            wal: region(WAL_START_AT, WAL_END_AT)?,
            wal_segment_bytes: u64_at(block, SEGMENT_BYTES_AT),
            chunks: region(CHUNKS_START_AT, CHUNKS_END_AT)?,
        };
        // A newer format may lay its regions out differently; it is refused by its feature bits, not here.
        if found.incompat & !INCOMPAT_KNOWN != 0 {
            return Some(found);
        }
        let segment = found.wal_segment_bytes;
        let plausible = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment)
            && segment.is_multiple_of(BLOCK_BYTES as u64)
            && found.wal.bytes().is_multiple_of(segment)
            && (SEGMENTS_MIN..=SEGMENTS_MAX).contains(&found.segments())
            && found.wal.start >= HEAD_BYTES
            && found.chunks.start >= found.wal.end
            && found.chunks.end <= found.device_bytes
            && found.boot_epoch.max(found.generation) <= COUNT_MAX
            && found.lanes == 1;
        plausible.then_some(found)
    }
}

#[cfg(test)]
mod tests;
