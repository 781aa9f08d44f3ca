//! From byte ranges of logical blocks to ranges of whole physical blocks.

use std::ops::Range;

use holdfast_block::PHYSICAL_BLOCK_BYTES;

/// [`PHYSICAL_BLOCK_BYTES`] for lengths in memory and on the device.
pub(crate) const BLOCK: usize = PHYSICAL_BLOCK_BYTES as usize;
pub(crate) const BLOCK_U64: u64 = PHYSICAL_BLOCK_BYTES as u64;

/// Physical blocks `[first, first + count)`, `count >= 1`; the end fits 52 bits because offsets are bytes in 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockRange {
    pub first: u64,
    pub count: u64,
}

impl BlockRange {
    /// The blocks that `[offset, offset + length)` touches. The length is not 0 and the end does not overflow:
    /// `Geometry::check` refused those.
    pub fn touching(offset: u64, length: u64) -> BlockRange {
        assert!(length > 0, "an empty range was refused before");
        let first = offset / BLOCK_U64;
        let last = (offset + (length - 1)) / BLOCK_U64;
        BlockRange { first, count: last - first + 1 }
    }

    pub fn end(self) -> u64 {
        self.first + self.count
    }

    pub fn overlaps(self, other: BlockRange) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// What to read for a client, and which of the bytes read are its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadRange {
    pub first_block: u64,
    pub count: u32,
    /// Within the `count * 4096` bytes read.
    pub trim: Range<usize>,
}

impl ReadRange {
    /// For a read that `Geometry::check` has passed (so at most 1 MiB, which touches at most 257 blocks).
    pub fn of(offset: u64, length: u32) -> ReadRange {
        let blocks = BlockRange::touching(offset, u64::from(length));
        let skip = (offset % BLOCK_U64) as usize;
        ReadRange {
            first_block: blocks.first,
            count: u32::try_from(blocks.count).expect("a length in 32 bits touches fewer than 2^32 blocks"),
            trim: skip..skip + length as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_widened_to_blocks_and_trimmed_back() {
        assert_eq!(ReadRange::of(0, 4096), ReadRange { first_block: 0, count: 1, trim: 0..4096 });
        assert_eq!(ReadRange::of(512, 512), ReadRange { first_block: 0, count: 1, trim: 512..1024 });
        assert_eq!(ReadRange::of(3584, 1024), ReadRange { first_block: 0, count: 2, trim: 3584..4608 });
        assert_eq!(
            ReadRange::of(8192 + 512, 1 << 20),
            ReadRange { first_block: 2, count: 257, trim: 512..512 + (1 << 20) }
        );
    }
}
