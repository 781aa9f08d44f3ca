//! The narrow waist between block protocols and volumes: requests, completions, geometry, limits.
//!
//! A front end (NBD, FUSE, NVMe/TCP) turns its wire commands into [`Request`]s; whoever serves a volume turns
//! them into [`Completion`]s. Neither side sees the other. No protocol word and no storage word belongs here.

use bytes::Bytes;
use twox_hash::XxHash3_64;

/// Unit in which volumes store, checksum and replicate, whatever the logical block size.
pub const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// A longer request is refused; front ends split before that. Requests up to this size are atomic.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// A longer write-zeroes or discard is refused; front ends split before that. It bounds the work of one log entry.
pub const ZEROES_BYTES_MAX: u64 = 64 << 20;
/// Largest volume: 64 TiB, so that a physical block number fits 34 bits and a map stays three levels deep.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// Of one physical block; what keeps it keeps it away from the block. Half of an XXH3 and no CRC: file systems end
/// blocks with a CRC-32C of the rest, and the CRC-32C of all of that is one number, whatever the block says.
pub fn checksum(block: &[u8]) -> u32 {
    let hash = XxHash3_64::oneshot(block);
    (hash ^ (hash >> 32)) as u32
}

/// Names a request within its front end's connection; chosen by the front end, echoed in the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What the device looks like to its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A multiple of [`PHYSICAL_BLOCK_BYTES`], at least one, at most [`VOLUME_BYTES_MAX`].
    pub size_bytes: u64,
    /// 512 or 4096; fixed for the life of the volume.
    pub logical_block_bytes: u32,
}

/// One command. Offsets and lengths are bytes, multiples of the logical block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Read {
        offset: u64,
        length: u32,
    },
    /// Acknowledged only when durable on a quorum, so `FUA` needs no word of its own.
    Write {
        offset: u64,
        data: Bytes,
    },
    /// At most [`ZEROES_BYTES_MAX`]: there is no payload. Reads back as zeroes.
    WriteZeroes {
        offset: u64,
        length: u64,
    },
    /// As `WriteZeroes`, and the space is given back.
    Discard {
        offset: u64,
        length: u64,
    },
    /// Completes after every write acknowledged before it is durable, which they are: it only confirms the session.
    Flush,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub id: RequestId,
    pub operation: Operation,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    pub id: RequestId,
    /// The bytes read; empty for every other operation.
    pub result: Result<Bytes, Error>,
}

/// Why a request failed, in the words every front end can map to its own status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Error {
    #[error("the range lies beyond the end of the device")]
    OutOfRange,
    #[error("offset or length is no multiple of the logical block size, or the length is zero")]
    Misaligned,
    #[error("the request is longer than 1 MiB, or zeroes more than 64 MiB")]
    TooLarge,
    #[error("the cluster has no space left for this write")]
    NoSpace,
    #[error("another attachment has taken the volume over; this device has failed for good")]
    Fenced,
    #[error("no replica holds an intact copy of this range")]
    Corrupt,
    #[error("the volume was not available within the configured time")]
    Unavailable,
}

impl Geometry {
    /// `None` where a field breaks its stated bound.
    pub fn new(size_bytes: u64, logical_block_bytes: u32) -> Option<Geometry> {
        let size_fits =
            (1..=VOLUME_BYTES_MAX).contains(&size_bytes) && size_bytes.is_multiple_of(u64::from(PHYSICAL_BLOCK_BYTES));
        let block_fits = matches!(logical_block_bytes, 512 | 4096);
        (size_fits && block_fits).then_some(Geometry { size_bytes, logical_block_bytes })
    }

    /// Checks alignment, size and range, in this order.
    pub fn check(&self, operation: &Operation) -> Result<(), Error> {
        let request_max = u64::from(REQUEST_BYTES_MAX);
        let (offset, length, length_max) = match operation {
            Operation::Flush => return Ok(()),
            Operation::Read { offset, length } => (*offset, u64::from(*length), request_max),
            Operation::Write { offset, data } => (*offset, data.len() as u64, request_max),
            Operation::WriteZeroes { offset, length } | Operation::Discard { offset, length } => {
                (*offset, *length, ZEROES_BYTES_MAX)
            }
        };
        let unit = u64::from(self.logical_block_bytes);
        if length == 0 || !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
            return Err(Error::Misaligned);
        }
        if length > length_max {
            return Err(Error::TooLarge);
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Error::OutOfRange),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_end_with_their_own_crc_are_told_apart() {
        let block = |fill: u8| {
            let mut block = vec![fill; PHYSICAL_BLOCK_BYTES as usize - 4];
            block.extend(crc32c::crc32c(&block).to_le_bytes());
            block
        };
        assert_eq!(crc32c::crc32c(&block(1)), crc32c::crc32c(&block(2)));
        assert_ne!(checksum(&block(1)), checksum(&block(2)));
    }

    /// It stands on disks: neither library nor processor may change it.
    #[test]
    fn the_checksum_is_as_documented() {
        let block: Vec<u8> = (0..PHYSICAL_BLOCK_BYTES).map(|at| at as u8).collect();
        assert_eq!([checksum(&block), checksum(&[0; PHYSICAL_BLOCK_BYTES as usize])], [3_972_853_094, 3_675_383_387]);
    }

    #[test]
    fn every_refusal_has_its_reason() {
        let geometry = Geometry::new(8192, 512).expect("valid");
        let read = |offset, length| geometry.check(&Operation::Read { offset, length });
        assert_eq!(read(0, 8192), Ok(()));
        assert_eq!(read(7680, 512), Ok(()));
        assert_eq!(read(7680, 1024), Err(Error::OutOfRange));
        assert_eq!(read(u64::MAX - 511, 512), Err(Error::OutOfRange));
        assert_eq!(read(1, 512), Err(Error::Misaligned));
        assert_eq!(read(0, 0), Err(Error::Misaligned));
        assert_eq!(read(0, (1 << 20) + 512), Err(Error::TooLarge));
        assert_eq!(geometry.check(&Operation::Discard { offset: 0, length: 8192 }), Ok(()));
        assert_eq!(geometry.check(&Operation::Flush), Ok(()));
        assert_eq!(Geometry::new(0, 512), None);
        assert_eq!(Geometry::new(4096, 1024), None);
        assert_eq!(Geometry::new(5120, 512), None);
    }
}
