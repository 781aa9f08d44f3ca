//! Where the bytes of a payload lie: a list of extents in the order of the payload.
//!
//! ```text
//! extent:  | tag u8 | 0 (3) | blocks u32 | byte of the device u64 | slots only: checksum u32 per block ... |
//! ```
//! Tags: 1 inline, the bytes follow the list; 2 slots, adjacent ones on the device; 3 zeroes, stored nowhere; 4 and 5
//! are kept for stripes and packed payloads. A record without a list has all of its payload inline.

use crate::bytes_at::{put, u32_at, u64_at};
use crate::device::BLOCK_BYTES;
use crate::group::PAYLOAD_BYTES_MAX;
use crate::ops::AlignedBuffer;

const EXTENT_BYTES: usize = 16;
const TAG_INLINE: u8 = 1;
const TAG_SLOTS: u8 = 2;
const TAG_ZERO: u8 = 3;
/// Blocks of the longest payload.
const BLOCKS_MAX: usize = PAYLOAD_BYTES_MAX / BLOCK_BYTES;
/// Longest list: each extent has a block at least.
pub(super) const EXTENTS_BYTES_MAX: usize = BLOCKS_MAX * (EXTENT_BYTES + 4);

/// A part of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    Inline {
        blocks: u32,
    },
    Slots {
        /// Byte of the device.
        offset: u64,
        /// `holdfast_block::checksum` of every block.
        checksums: Vec<u32>,
    },
    Zero {
        blocks: u32,
    },
}

impl Extent {
    pub fn bytes(&self) -> usize {
        let blocks = match self {
            Extent::Inline { blocks } | Extent::Zero { blocks } => *blocks as usize,
            Extent::Slots { checksums, .. } => checksums.len(),
        };
        blocks * BLOCK_BYTES
    }

    /// Bytes written to slots.
    pub fn bytes_in_slots(&self) -> usize {
        if matches!(self, Extent::Slots { .. }) { self.bytes() } else { 0 }
    }

    fn encoded_bytes(&self) -> usize {
        match self {
            Extent::Slots { checksums, .. } => EXTENT_BYTES + 4 * checksums.len(),
            Extent::Inline { .. } | Extent::Zero { .. } => EXTENT_BYTES,
        }
    }

    fn encode(&self, out: &mut AlignedBuffer) {
        let (tag, offset) = match self {
            Extent::Inline { .. } => (TAG_INLINE, 0),
            Extent::Slots { offset, .. } => (TAG_SLOTS, *offset),
            Extent::Zero { .. } => (TAG_ZERO, 0),
        };
        let mut fixed = [0; EXTENT_BYTES];
        fixed[0] = tag;
        // At most BLOCKS_MAX.
        put(&mut fixed, 4, ((self.bytes() / BLOCK_BYTES) as u32).to_le_bytes());
        put(&mut fixed, 8, offset.to_le_bytes());
        out.extend_from_slice(&fixed);
        if let Extent::Slots { checksums, .. } = self {
            checksums.iter().for_each(|checksum| out.extend_from_slice(&checksum.to_le_bytes()));
        }
    }
}

/// Bytes that a list adds to a record.
pub(super) fn encoded_bytes(extents: &[Extent]) -> usize {
    extents.iter().map(Extent::encoded_bytes).sum()
}

/// Bytes of the payload that stay in the record.
pub(super) fn inline_bytes(extents: &[Extent], payload: usize) -> usize {
    let inline = |extent: &Extent| if matches!(extent, Extent::Inline { .. }) { extent.bytes() } else { 0 };
    if extents.is_empty() { payload } else { extents.iter().map(inline).sum() }
}

pub(super) fn encode(extents: &[Extent], out: &mut AlignedBuffer) {
    extents.iter().for_each(|extent| extent.encode(out));
}

/// The list of a payload of so many bytes. The error is for people.
pub(super) fn decode(mut rest: &[u8], payload: usize) -> Result<Vec<Extent>, String> {
    let (mut extents, mut covered) = (Vec::new(), 0);
    while !rest.is_empty() {
        let fixed = rest.get(..EXTENT_BYTES).ok_or_else(|| format!("{} bytes of an extent", rest.len()))?;
        let (tag, blocks, offset) = (fixed[0], u32_at(fixed, 4), u64_at(fixed, 8));
        if blocks == 0 || blocks as usize > BLOCKS_MAX {
            return Err(format!("an extent of {blocks} blocks"));
        }
        rest = &rest[EXTENT_BYTES..];
        let extent = match tag {
            TAG_INLINE => Extent::Inline { blocks },
            TAG_ZERO => Extent::Zero { blocks },
            TAG_SLOTS => {
                let (checksums, after) =
                    rest.split_at_checked(4 * blocks as usize).ok_or("an extent without its checksums")?;
                rest = after;
                Extent::Slots { offset, checksums: checksums.chunks_exact(4).map(|sum| u32_at(sum, 0)).collect() }
            }
            _ => return Err(format!("an extent of unknown kind {tag}")),
        };
        covered += extent.bytes();
        extents.push(extent);
    }
    if !extents.is_empty() && covered != payload {
        return Err(format!("extents of {covered} bytes for a payload of {payload}"));
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_back_and_a_wrong_one_is_refused() {
        let extents = vec![
            Extent::Inline { blocks: 3 },
            Extent::Slots { offset: 0x12_3000, checksums: (0..32).collect() },
            Extent::Zero { blocks: 16 },
            Extent::Inline { blocks: 1 },
        ];
        let mut out = AlignedBuffer::with_capacity(0);
        encode(&extents, &mut out);
        let payload = 52 * BLOCK_BYTES;
        assert_eq!((out.len(), inline_bytes(&extents, payload)), (encoded_bytes(&extents), 4 * BLOCK_BYTES));
        assert_eq!(decode(&out, payload), Ok(extents));
        assert_eq!(decode(&[], payload), Ok(vec![]), "all of it is inline");
        for (bytes, reason) in [
            (out[..out.len() - 1].to_vec(), "15 bytes of an extent"),
            (out[..EXTENT_BYTES].to_vec(), "extents of 12288 bytes for a payload of 212992"),
            (out[EXTENT_BYTES..2 * EXTENT_BYTES].to_vec(), "an extent without its checksums"),
            ([&[4], &out[1..EXTENT_BYTES]].concat(), "an extent of unknown kind 4"),
            ([&out[..4], &[0; 12]].concat(), "an extent of 0 blocks"),
            ([&out[..4], &[255; 12]].concat(), "an extent of 4294967295 blocks"),
        ] {
            assert_eq!(decode(&bytes, payload), Err(reason.to_owned()));
        }
    }
}
