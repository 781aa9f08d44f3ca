//! What the log of a volume holds, and its encoding.
//!
//! A command is the header of a log entry; the data of a write travels beside it as the entry's payload. Drawings and
//! field tables: `docs/formats/volume-log.md`. Encoded entries are kept for ever in golden files.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_block::{REQUEST_BYTES_MAX, ZEROES_BYTES_MAX};
use holdfast_id::SnapshotId;
use holdfast_protocol::session::{Epoch, Formatted, Instance, Session, Stamp};

use crate::codec::{Reader, Short};
use crate::name::Name;
use crate::range::{BLOCK, BLOCK_U64};

/// Version of every kind below; a later version of a kind gets its own number there.
const VERSION: u8 = 1;

/// Blocks of one write: a request of 1 MiB that starts within a block touches one block more than 256.
pub const WRITE_BLOCKS_MAX: u32 = REQUEST_BYTES_MAX / BLOCK as u32 + 1;
/// Longest payload of an entry.
pub const PAYLOAD_BYTES_MAX: usize = WRITE_BLOCKS_MAX as usize * BLOCK;
/// Whole blocks of one zeroes or discard request.
pub const ZERO_BLOCKS_MAX: u64 = ZEROES_BYTES_MAX / BLOCK_U64;
/// Longest header: that of the longest write.
pub const HEADER_BYTES_MAX: usize = 4 + 32 + 12 + 4 * WRITE_BLOCKS_MAX as usize;
const _: () = assert!(HEADER_BYTES_MAX <= 64 << 10, "a log record's header has at most 64 KiB");

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Payload: `checksums.len()` blocks, 1 to [`WRITE_BLOCKS_MAX`].
    Write {
        stamp: Stamp,
        first_block: u64,
        /// Of each block of the payload, by `holdfast_block::checksum`.
        checksums: Arc<[u32]>,
    },
    /// Zeroes `[first_block, first_block + count)`, 1 to [`ZERO_BLOCKS_MAX`] blocks, and writes at most one block on
    /// each side: what remains of a block that the request covers in part. One entry, so the request stays atomic.
    /// Payload: the head block, if there is one, then the tail block, if there is one.
    Zero {
        stamp: Stamp,
        first_block: u64,
        count: u64,
        /// The space is given back.
        discard: bool,
        /// Checksum of the block before `first_block`.
        head: Option<u32>,
        /// Checksum of the block at `first_block + count`.
        tail: Option<u32>,
    },
    Attach {
        holder: Name,
        instance: Instance,
        take_over: bool,
    },
    OpenSession {
        epoch: Epoch,
        instance: Instance,
    },
    Detach {
        epoch: Epoch,
    },
    Resize {
        size_bytes: u64,
    },
    SetFormatted {
        epoch: Epoch,
        formatted: Formatted,
    },
    /// Keeps the blocks as of this entry.
    TakeSnapshot {
        snapshot: SnapshotId,
        name: Name,
    },
    DeleteSnapshot {
        snapshot: SnapshotId,
    },
}

/// The entry is not one this replica can apply. The replica stops: to skip an entry would let copies differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("kind {kind} version {version} is not known to this version of the software")]
    Unknown { kind: u8, version: u8 },
    #[error("the bytes end before the fields do")]
    Short,
    #[error("{count} bytes follow the last field")]
    Trailing { count: usize },
    #[error("{field} breaks its bound")]
    Invalid { field: &'static str },
    #[error("the payload has {actual} bytes, the command names {expected}")]
    PayloadLength { expected: usize, actual: usize },
}

impl From<Short> for DecodeError {
    fn from(Short: Short) -> Self {
        DecodeError::Short
    }
}

mod kind {
    pub const WRITE: u8 = 1;
    pub const ZERO: u8 = 2;
    pub const ATTACH: u8 = 3;
    pub const OPEN_SESSION: u8 = 4;
    pub const DETACH: u8 = 5;
    pub const RESIZE: u8 = 6;
    pub const SET_FORMATTED: u8 = 7;
    pub const TAKE_SNAPSHOT: u8 = 8;
    pub const DELETE_SNAPSHOT: u8 = 9;
}

const FLAG_DISCARD: u8 = 1;
const FLAG_HEAD: u8 = 2;
const FLAG_TAIL: u8 = 4;

impl Command {
    pub fn stamp(&self) -> Option<&Stamp> {
        match self {
            Command::Write { stamp, .. } | Command::Zero { stamp, .. } => Some(stamp),
            _ => None,
        }
    }

    /// Bytes of the payload that travels beside the header.
    pub fn payload_bytes(&self) -> usize {
        match self {
            Command::Write { checksums, .. } => checksums.len() * BLOCK,
            Command::Zero { head, tail, .. } => (usize::from(head.is_some()) + usize::from(tail.is_some())) * BLOCK,
            _ => 0,
        }
    }

    /// # Panics
    /// Where a count breaks its stated bound: the log must not hold what no replica can apply.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        match self {
            Command::Write { stamp, first_block, checksums } => {
                let count = u32::try_from(checksums.len()).unwrap_or(u32::MAX);
                assert!((1..=WRITE_BLOCKS_MAX).contains(&count), "blocks of a write");
                begin(&mut out, kind::WRITE);
                put_stamp(&mut out, stamp);
                out.put_u64_le(*first_block);
                out.put_u32_le(count);
                checksums.iter().for_each(|checksum| out.put_u32_le(*checksum));
            }
            Command::Zero { stamp, first_block, count, discard, head, tail } => {
                assert!(zero_range_fits(*first_block, *count, head.is_some()), "blocks of a zero");
                begin(&mut out, kind::ZERO);
                put_stamp(&mut out, stamp);
                out.put_u64_le(*first_block);
                out.put_u64_le(*count);
                let flag = |set: bool, flag: u8| if set { flag } else { 0 };
                out.put_u8(
                    flag(*discard, FLAG_DISCARD) | flag(head.is_some(), FLAG_HEAD) | flag(tail.is_some(), FLAG_TAIL),
                );
                out.put_bytes(0, 3);
                out.put_u32_le(head.unwrap_or(0));
                out.put_u32_le(tail.unwrap_or(0));
            }
            Command::Attach { holder, instance, take_over } => {
                begin(&mut out, kind::ATTACH);
                out.put_u128_le(instance.0);
                out.put_u8(u8::from(*take_over));
                put_name(&mut out, holder);
            }
            Command::OpenSession { epoch, instance } => {
                begin(&mut out, kind::OPEN_SESSION);
                out.put_u64_le(epoch.0);
                out.put_u128_le(instance.0);
            }
            Command::Detach { epoch } => {
                begin(&mut out, kind::DETACH);
                out.put_u64_le(epoch.0);
            }
            Command::Resize { size_bytes } => {
                begin(&mut out, kind::RESIZE);
                out.put_u64_le(*size_bytes);
            }
            Command::SetFormatted { epoch, formatted } => {
                begin(&mut out, kind::SET_FORMATTED);
                out.put_u64_le(epoch.0);
                out.put_u8(encode_formatted(*formatted));
            }
            Command::TakeSnapshot { snapshot, name } => {
                begin(&mut out, kind::TAKE_SNAPSHOT);
                out.put_slice(&snapshot.to_bytes());
                put_name(&mut out, name);
            }
            Command::DeleteSnapshot { snapshot } => {
                begin(&mut out, kind::DELETE_SNAPSHOT);
                out.put_slice(&snapshot.to_bytes());
            }
        }
        out.freeze()
    }

    pub fn decode(header: &[u8]) -> Result<Command, DecodeError> {
        let mut reader = Reader::new(header);
        let (kind, version, reserved) = (reader.u8()?, reader.u8()?, reader.u16()?);
        if version != VERSION {
            return Err(DecodeError::Unknown { kind, version });
        }
        let command = match kind {
            kind::WRITE => {
                let (stamp, first_block, count) = (read_stamp(&mut reader)?, reader.u64()?, reader.u32()?);
                if !(1..=WRITE_BLOCKS_MAX).contains(&count) || first_block.checked_add(u64::from(count)).is_none() {
                    return Err(DecodeError::Invalid { field: "blocks of a write" });
                }
                let checksums = (0..count).map(|_| reader.u32()).collect::<Result<Arc<[u32]>, Short>>()?;
                Command::Write { stamp, first_block, checksums }
            }
            kind::ZERO => {
                let (stamp, first_block, count) = (read_stamp(&mut reader)?, reader.u64()?, reader.u64()?);
                let (flags, pad) = (reader.u8()?, reader.array::<3>()?);
                let (head, tail) = (reader.u32()?, reader.u32()?);
                if flags & !(FLAG_DISCARD | FLAG_HEAD | FLAG_TAIL) != 0 || pad != [0; 3] {
                    return Err(DecodeError::Invalid { field: "flags of a zero" });
                }
                let edge = |flag: u8, checksum: u32| match (flags & flag != 0, checksum) {
                    (true, checksum) => Ok(Some(checksum)),
                    (false, 0) => Ok(None),
                    (false, _) => Err(DecodeError::Invalid { field: "checksum of an absent block" }),
                };
                let (head, tail) = (edge(FLAG_HEAD, head)?, edge(FLAG_TAIL, tail)?);
                if !zero_range_fits(first_block, count, head.is_some()) {
                    return Err(DecodeError::Invalid { field: "blocks of a zero" });
                }
                Command::Zero { stamp, first_block, count, discard: flags & FLAG_DISCARD != 0, head, tail }
            }
            kind::ATTACH => {
                let instance = Instance(reader.u128()?);
                let take_over = match reader.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(DecodeError::Invalid { field: "take-over" }),
                };
                Command::Attach { holder: read_name(&mut reader)?, instance, take_over }
            }
            kind::OPEN_SESSION => {
                Command::OpenSession { epoch: Epoch(reader.u64()?), instance: Instance(reader.u128()?) }
            }
            kind::DETACH => Command::Detach { epoch: Epoch(reader.u64()?) },
            kind::RESIZE => Command::Resize { size_bytes: reader.u64()? },
            kind::SET_FORMATTED => {
                Command::SetFormatted { epoch: Epoch(reader.u64()?), formatted: read_formatted(&mut reader)? }
            }
            kind::TAKE_SNAPSHOT => {
                Command::TakeSnapshot { snapshot: read_snapshot(&mut reader)?, name: read_name(&mut reader)? }
            }
            kind::DELETE_SNAPSHOT => Command::DeleteSnapshot { snapshot: read_snapshot(&mut reader)? },
            _ => return Err(DecodeError::Unknown { kind, version }),
        };
        if reserved != 0 {
            return Err(DecodeError::Invalid { field: "reserved bytes" });
        }
        match reader.rest() {
            0 => Ok(command),
            count => Err(DecodeError::Trailing { count }),
        }
    }
}

/// The head block must exist and the tail block's number must not overflow.
fn zero_range_fits(first_block: u64, count: u64, head: bool) -> bool {
    (1..=ZERO_BLOCKS_MAX).contains(&count)
        && first_block.checked_add(count + 1).is_some()
        && first_block >= u64::from(head)
}

fn begin(out: &mut BytesMut, kind: u8) {
    out.put_u8(kind);
    out.put_u8(VERSION);
    out.put_u16_le(0);
}

fn put_stamp(out: &mut BytesMut, stamp: &Stamp) {
    out.put_u64_le(stamp.epoch.0);
    out.put_u64_le(stamp.session.0);
    out.put_u64_le(stamp.sequence);
    out.put_u64_le(stamp.oldest);
}

fn read_stamp(reader: &mut Reader<'_>) -> Result<Stamp, Short> {
    Ok(Stamp {
        epoch: Epoch(reader.u64()?),
        session: Session(reader.u64()?),
        sequence: reader.u64()?,
        oldest: reader.u64()?,
    })
}

pub(crate) fn put_name(out: &mut BytesMut, name: &Name) {
    let length = u16::try_from(name.as_str().len()).expect("a name has at most 253 bytes");
    out.put_u16_le(length);
    out.put_slice(name.as_str().as_bytes());
}

pub(crate) fn read_name(reader: &mut Reader<'_>) -> Result<Name, DecodeError> {
    let length = reader.u16()?;
    let invalid = DecodeError::Invalid { field: "name" };
    let text = std::str::from_utf8(reader.bytes(usize::from(length))?).map_err(|_| invalid.clone())?;
    Name::new(text).map_err(|_| invalid)
}

pub(crate) fn read_snapshot(reader: &mut Reader<'_>) -> Result<SnapshotId, DecodeError> {
    SnapshotId::from_bytes(reader.array()?).ok_or(DecodeError::Invalid { field: "snapshot" })
}

pub(crate) fn encode_formatted(formatted: Formatted) -> u8 {
    match formatted {
        Formatted::None => 0,
        Formatted::Formatting => 1,
        Formatted::Formatted => 2,
    }
}

pub(crate) fn read_formatted(reader: &mut Reader<'_>) -> Result<Formatted, DecodeError> {
    match reader.u8()? {
        0 => Ok(Formatted::None),
        1 => Ok(Formatted::Formatting),
        2 => Ok(Formatted::Formatted),
        _ => Err(DecodeError::Invalid { field: "formatted" }),
    }
}
