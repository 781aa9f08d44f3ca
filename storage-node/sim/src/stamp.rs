//! Blocks that say who wrote them: every written block of a run is unique and describes itself.

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_id::VolumeId;

use crate::prng::Prng;

pub const BLOCK_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"HFSTAMP1";
const HEADER_BYTES: usize = 8 + 16 + 8 + 8 + 8;
/// Smallest unit a volume is written in.
pub const SECTOR_BYTES: usize = 512;

const CHECKSUM_BYTES: usize = 4;

/// Numbers the mutations of a run; unique over all clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u64);

/// What a block says of itself:
///
/// ```text
/// 0       8         24      32      40     48                    n-4       n
/// | magic | volume  | write | block | salt | fill from the salt ... | check |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStamp {
    pub volume: VolumeId,
    pub write: WriteId,
    /// Where it belongs: a block that is found elsewhere was misdirected.
    pub block: u64,
    /// Of the run: blocks that an earlier run left behind are not taken for this one's.
    pub salt: u64,
}

/// What a block of a volume can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Zeroes,
    Stamp(BlockStamp),
}

/// The bytes are no whole block of this format: torn, corrupt or foreign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StampError {
    #[error("neither zeroes nor a stamped block")]
    Foreign,
    #[error("a stamped block whose bytes are not all its own")]
    Torn,
}

impl BlockStamp {
    /// The unit of `bytes` bytes, [`BLOCK_BYTES`] or [`SECTOR_BYTES`], that says this.
    pub fn to_unit(self, bytes: usize) -> Bytes {
        let mut block = BytesMut::with_capacity(bytes);
        block.put_slice(&MAGIC);
        block.put_slice(&self.volume.to_bytes());
        block.put_u64_le(self.write.0);
        block.put_u64_le(self.block);
        block.put_u64_le(self.salt);
        block.resize(bytes - CHECKSUM_BYTES, 0);
        let mut fill = Prng::new(self.salt).split("fill", self.write.0).split("block", self.block);
        fill.fill(&mut block[HEADER_BYTES..]);
        // As file systems end blocks of theirs; all such blocks have one and the same CRC-32C.
        let check = crc32c::crc32c(&block);
        block.put_u32_le(check);
        block.freeze()
    }
}

impl Content {
    /// # Panics
    /// Where `block` is not one block or sector.
    pub fn of(block: &[u8]) -> Result<Content, StampError> {
        assert!(block.len() == BLOCK_BYTES || block.len() == SECTOR_BYTES, "one block or sector");
        if block.iter().all(|byte| *byte == 0) {
            return Ok(Content::Zeroes);
        }
        // A block torn between old and new sectors may have lost its magic; any sector may tell the story.
        if block[..8] != MAGIC {
            return Err(StampError::Foreign);
        }
        let number = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
        let volume = VolumeId::from_bytes(block[8..24].try_into().expect("sixteen bytes")).ok_or(StampError::Torn)?;
        let stamp = BlockStamp { volume, write: WriteId(number(24)), block: number(32), salt: number(40) };
        if stamp.to_unit(block.len()) != block { Err(StampError::Torn) } else { Ok(Content::Stamp(stamp)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(write: u64, block: u64) -> BlockStamp {
        let volume = VolumeId::from_bytes([3; 16]).unwrap();
        BlockStamp { volume, write: WriteId(write), block, salt: 9 }
    }

    #[test]
    fn a_block_tells_its_stamp() {
        assert_eq!(Content::of(&stamp(1, 2).to_unit(BLOCK_BYTES)), Ok(Content::Stamp(stamp(1, 2))));
        assert_eq!(Content::of(&[0; BLOCK_BYTES]), Ok(Content::Zeroes));
        assert_eq!(Content::of(&[1; BLOCK_BYTES]), Err(StampError::Foreign));
    }

    #[test]
    fn no_mixture_of_two_blocks_passes() {
        let (one, two) = (stamp(1, 2).to_unit(BLOCK_BYTES), stamp(2, 2).to_unit(BLOCK_BYTES));
        for sectors in 1u32..255 {
            let mixed: Vec<u8> = (0..8)
                .flat_map(|s| {
                    let from = if sectors & (1 << s) == 0 { &one } else { &two };
                    from[s * 512..(s + 1) * 512].to_vec()
                })
                .collect();
            assert_eq!(Content::of(&mixed), Err(StampError::Torn), "{sectors:08b}");
        }
        let mut flipped = one.to_vec();
        flipped[2000] ^= 1;
        assert_eq!(Content::of(&flipped), Err(StampError::Torn));
    }
}
