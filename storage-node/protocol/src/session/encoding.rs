//! Requests and replies as bytes: `docs/protocols/session.md`.

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_block::{Error, Geometry, Operation};
use holdfast_consensus::{LogIndex, Position, Term};
use holdfast_id::{NodeId, VolumeId};

use super::kind;
use super::{Epoch, Formatted, HOLDER_BYTES_MAX, Instance, REASON_BYTES_MAX, Refusal, Reply, Request, Session, Stamp};
use crate::wire::{DecodeError, Encoded, Reader, no_payload, put_text};

impl Request {
    /// # Panics
    /// If `holder` is longer than [`HOLDER_BYTES_MAX`]; whoever names itself checks that first.
    pub fn encode(&self) -> Encoded {
        let mut meta = BytesMut::with_capacity(96);
        let mut payload = Bytes::new();
        let kind = match self {
            Request::Attach { volume, holder, instance, take_over } => {
                put_volume(&mut meta, *volume);
                meta.put_u128_le(instance.0);
                meta.put_u8(u8::from(*take_over));
                put_holder(&mut meta, holder);
                kind::ATTACH
            }
            Request::OpenSession { volume, epoch, instance } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(epoch.0);
                meta.put_u128_le(instance.0);
                kind::OPEN_SESSION
            }
            Request::Detach { volume, epoch } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(epoch.0);
                kind::DETACH
            }
            Request::SetFormatted { volume, epoch, formatted } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(epoch.0);
                meta.put_u8(formatted_code(*formatted));
                kind::SET_FORMATTED
            }
            Request::Io { volume, stamp, seen, operation } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(stamp.epoch.0);
                meta.put_u64_le(stamp.session.0);
                meta.put_u64_le(stamp.sequence);
                meta.put_u64_le(stamp.oldest);
                put_position(&mut meta, *seen);
                match operation {
                    Operation::Read { offset, length } => {
                        meta.put_u64_le(*offset);
                        meta.put_u32_le(*length);
                        kind::READ
                    }
                    Operation::Write { offset, data } => {
                        meta.put_u64_le(*offset);
                        payload = data.clone();
                        kind::WRITE
                    }
                    Operation::WriteZeroes { offset, length } => {
                        meta.put_u64_le(*offset);
                        meta.put_u64_le(*length);
                        kind::WRITE_ZEROES
                    }
                    Operation::Discard { offset, length } => {
                        meta.put_u64_le(*offset);
                        meta.put_u64_le(*length);
                        kind::DISCARD
                    }
                    Operation::Flush => kind::FLUSH,
                }
            }
        };
        Encoded { kind, meta: meta.freeze(), payload }
    }

    /// Checks the encoding only: whether a range fits the volume is the volume's to say.
    pub fn decode(kind: u16, meta: Bytes, payload: Bytes) -> Result<Request, DecodeError> {
        let message = kind::request_name(kind).ok_or(DecodeError::UnknownKind { kind })?;
        let mut reader = Reader::new(message, &meta);
        let volume = reader.id("volume", VolumeId::from_bytes)?;
        let reader = &mut reader;
        let request = match kind {
            kind::ATTACH => {
                let instance = Instance(reader.u128("instance")?);
                let take_over = reader.flag("take_over")?;
                let holder = reader.text("holder", HOLDER_BYTES_MAX)?;
                Request::Attach { volume, holder, instance, take_over }
            }
            kind::OPEN_SESSION => {
                let epoch = Epoch(reader.u64("epoch")?);
                Request::OpenSession { volume, epoch, instance: Instance(reader.u128("instance")?) }
            }
            kind::DETACH => Request::Detach { volume, epoch: Epoch(reader.u64("epoch")?) },
            kind::SET_FORMATTED => {
                let epoch = Epoch(reader.u64("epoch")?);
                Request::SetFormatted { volume, epoch, formatted: read_formatted(reader)? }
            }
            _ => {
                let stamp = Stamp {
                    epoch: Epoch(reader.u64("epoch")?),
                    session: Session(reader.u64("session")?),
                    sequence: reader.u64("sequence")?,
                    oldest: reader.u64("oldest")?,
                };
                let seen = read_position(reader)?;
                let operation = match kind {
                    kind::READ => Operation::Read { offset: reader.u64("offset")?, length: reader.u32("length")? },
                    kind::WRITE => Operation::Write { offset: reader.u64("offset")?, data: payload.clone() },
                    kind::WRITE_ZEROES => {
                        Operation::WriteZeroes { offset: reader.u64("offset")?, length: reader.u64("length")? }
                    }
                    kind::DISCARD => {
                        Operation::Discard { offset: reader.u64("offset")?, length: reader.u64("length")? }
                    }
                    kind::FLUSH => Operation::Flush,
                    _ => return Err(DecodeError::UnknownKind { kind }),
                };
                Request::Io { volume, stamp, seen, operation }
            }
        };
        reader.end()?;
        if kind != kind::WRITE {
            no_payload(message, &payload)?;
        }
        Ok(request)
    }
}

impl Reply {
    /// A [`Refusal::NotAllowed`] reason longer than [`REASON_BYTES_MAX`] is cut.
    ///
    /// # Panics
    /// If the holder in [`Refusal::Held`] is longer than [`HOLDER_BYTES_MAX`]: it came in through a request.
    pub fn encode(&self) -> Encoded {
        let mut meta = BytesMut::with_capacity(96);
        let mut payload = Bytes::new();
        let kind = match self {
            Reply::Attached { volume, instance, epoch, session, geometry, formatted } => {
                put_volume(&mut meta, *volume);
                meta.put_u128_le(instance.0);
                meta.put_u64_le(epoch.0);
                meta.put_u64_le(session.0);
                put_geometry(&mut meta, *geometry);
                meta.put_u8(formatted_code(*formatted));
                kind::ATTACHED
            }
            Reply::Detached { volume, epoch } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(epoch.0);
                kind::DETACHED
            }
            Reply::FormattedSet { volume, epoch } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(epoch.0);
                kind::FORMATTED_SET
            }
            Reply::Refused { volume, instance, reason } => {
                put_volume(&mut meta, *volume);
                meta.put_u8(u8::from(instance.is_some()));
                meta.put_u128_le(instance.map_or(0, |instance| instance.0));
                put_refusal(&mut meta, reason);
                kind::REFUSED
            }
            Reply::NotLeader { volume, term, leader } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(term.0);
                meta.put_slice(&leader.map_or([0; 16], NodeId::to_bytes));
                kind::NOT_LEADER
            }
            Reply::Leading { volume, term } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(term.0);
                kind::LEADING
            }
            Reply::Replicas { volume, term, replicas } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(term.0);
                assert!((1..=REPLICAS_MAX).contains(&replicas.len()), "a volume has {} replicas", replicas.len());
                meta.put_u8(replicas.len() as u8);
                for (node, address) in replicas {
                    meta.put_slice(&node.to_bytes());
                    put_text(&mut meta, &address[..address.floor_char_boundary(ADDRESS_BYTES_MAX)]);
                }
                kind::REPLICAS
            }
            Reply::Io { volume, session, sequence, seen, result } => {
                put_volume(&mut meta, *volume);
                meta.put_u64_le(session.0);
                meta.put_u64_le(*sequence);
                put_position(&mut meta, *seen);
                match result {
                    Ok(data) => {
                        meta.put_u8(STATUS_OK);
                        payload = data.clone();
                    }
                    Err(error) => meta.put_u8(error_code(*error)),
                }
                kind::IO_DONE
            }
            Reply::Resized { volume, geometry } => {
                put_volume(&mut meta, *volume);
                put_geometry(&mut meta, *geometry);
                kind::RESIZED
            }
        };
        Encoded { kind, meta: meta.freeze(), payload }
    }

    pub fn decode(kind: u16, meta: Bytes, payload: Bytes) -> Result<Reply, DecodeError> {
        let message = kind::reply_name(kind).ok_or(DecodeError::UnknownKind { kind })?;
        let mut reader = Reader::new(message, &meta);
        let volume = reader.id("volume", VolumeId::from_bytes)?;
        let reply = match kind {
            kind::ATTACHED => Reply::Attached {
                volume,
                instance: Instance(reader.u128("instance")?),
                epoch: Epoch(reader.u64("epoch")?),
                session: Session(reader.u64("session")?),
                geometry: read_geometry(&mut reader)?,
                formatted: read_formatted(&mut reader)?,
            },
            kind::DETACHED => Reply::Detached { volume, epoch: Epoch(reader.u64("epoch")?) },
            kind::FORMATTED_SET => Reply::FormattedSet { volume, epoch: Epoch(reader.u64("epoch")?) },
            kind::REFUSED => {
                let instance = read_instance(&mut reader)?;
                Reply::Refused { volume, instance, reason: read_refusal(&mut reader)? }
            }
            kind::NOT_LEADER => Reply::NotLeader {
                volume,
                term: Term(reader.u64("term")?),
                leader: NodeId::from_bytes(reader.array("leader")?),
            },
            kind::LEADING => Reply::Leading { volume, term: Term(reader.u64("term")?) },
            kind::REPLICAS => {
                let term = Term(reader.u64("term")?);
                let count = usize::from(reader.u8("replicas")?);
                if !(1..=REPLICAS_MAX).contains(&count) {
                    return Err(reader.value("replicas", count as u64));
                }
                let mut replicas = Vec::with_capacity(count);
                for _ in 0..count {
                    let node = reader.id("node", NodeId::from_bytes)?;
                    replicas.push((node, reader.text("address", ADDRESS_BYTES_MAX)?));
                }
                Reply::Replicas { volume, term, replicas }
            }
            kind::IO_DONE => {
                let session = Session(reader.u64("session")?);
                let sequence = reader.u64("sequence")?;
                let seen = read_position(&mut reader)?;
                let result = match reader.u8("status")? {
                    STATUS_OK => Ok(payload),
                    code => {
                        let error = error_from(code).ok_or_else(|| reader.value("status", u64::from(code)))?;
                        no_payload(message, &payload)?;
                        Err(error)
                    }
                };
                reader.end()?;
                return Ok(Reply::Io { volume, session, sequence, seen, result });
            }
            kind::RESIZED => Reply::Resized { volume, geometry: read_geometry(&mut reader)? },
            _ => return Err(DecodeError::UnknownKind { kind }),
        };
        reader.end()?;
        no_payload(message, &payload)?;
        Ok(reply)
    }
}

fn put_volume(meta: &mut BytesMut, volume: VolumeId) {
    meta.put_slice(&volume.to_bytes());
}

fn put_position(meta: &mut BytesMut, position: Position) {
    meta.put_u64_le(position.term.0);
    meta.put_u64_le(position.index.0);
}

fn read_position(reader: &mut Reader<'_>) -> Result<Position, DecodeError> {
    Ok(Position { term: Term(reader.u64("seen.term")?), index: LogIndex(reader.u64("seen.index")?) })
}

fn put_geometry(meta: &mut BytesMut, geometry: Geometry) {
    meta.put_u64_le(geometry.size_bytes);
    meta.put_u32_le(geometry.logical_block_bytes);
}

fn read_geometry(reader: &mut Reader<'_>) -> Result<Geometry, DecodeError> {
    let size_bytes = reader.u64("size_bytes")?;
    let logical_block_bytes = reader.u32("logical_block_bytes")?;
    Geometry::new(size_bytes, logical_block_bytes).ok_or_else(|| match logical_block_bytes {
        512 | 4096 => reader.value("size_bytes", size_bytes),
        other => reader.value("logical_block_bytes", u64::from(other)),
    })
}

fn put_holder(meta: &mut BytesMut, holder: &str) {
    assert!(holder.len() <= HOLDER_BYTES_MAX, "the holder's name has {} bytes", holder.len());
    put_text(meta, holder);
}

fn read_instance(reader: &mut Reader<'_>) -> Result<Option<Instance>, DecodeError> {
    let present = reader.flag("instance present")?;
    match (present, reader.u128("instance")?) {
        (true, value) => Ok(Some(Instance(value))),
        (false, 0) => Ok(None),
        (false, value) => Err(reader.value("instance", value as u64)),
    }
}

const FORMATTED_NONE: u8 = 0;
const FORMATTED_FORMATTING: u8 = 1;
const FORMATTED_FORMATTED: u8 = 2;

fn formatted_code(formatted: Formatted) -> u8 {
    match formatted {
        Formatted::None => FORMATTED_NONE,
        Formatted::Formatting => FORMATTED_FORMATTING,
        Formatted::Formatted => FORMATTED_FORMATTED,
    }
}

fn read_formatted(reader: &mut Reader<'_>) -> Result<Formatted, DecodeError> {
    match reader.u8("formatted")? {
        FORMATTED_NONE => Ok(Formatted::None),
        FORMATTED_FORMATTING => Ok(Formatted::Formatting),
        FORMATTED_FORMATTED => Ok(Formatted::Formatted),
        other => Err(reader.value("formatted", u64::from(other))),
    }
}

const REFUSAL_UNKNOWN_VOLUME: u8 = 1;
const REFUSAL_HELD: u8 = 2;
const REFUSAL_STALE: u8 = 3;
const REFUSAL_NOT_ALLOWED: u8 = 4;

fn put_refusal(meta: &mut BytesMut, reason: &Refusal) {
    match reason {
        Refusal::UnknownVolume => meta.put_u8(REFUSAL_UNKNOWN_VOLUME),
        Refusal::Held { holder, epoch } => {
            meta.put_u8(REFUSAL_HELD);
            meta.put_u64_le(epoch.0);
            put_holder(meta, holder);
        }
        Refusal::Stale { epoch } => {
            meta.put_u8(REFUSAL_STALE);
            meta.put_u64_le(epoch.0);
        }
        Refusal::NotAllowed { reason } => {
            meta.put_u8(REFUSAL_NOT_ALLOWED);
            put_text(meta, &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)]);
        }
    }
}

fn read_refusal(reader: &mut Reader<'_>) -> Result<Refusal, DecodeError> {
    match reader.u8("reason")? {
        REFUSAL_UNKNOWN_VOLUME => Ok(Refusal::UnknownVolume),
        REFUSAL_HELD => {
            let epoch = Epoch(reader.u64("epoch")?);
            Ok(Refusal::Held { holder: reader.text("holder", HOLDER_BYTES_MAX)?, epoch })
        }
        REFUSAL_STALE => Ok(Refusal::Stale { epoch: Epoch(reader.u64("epoch")?) }),
        REFUSAL_NOT_ALLOWED => Ok(Refusal::NotAllowed { reason: reader.text("text", REASON_BYTES_MAX)? }),
        other => Err(reader.value("reason", u64::from(other))),
    }
}

/// Both sides of a joint change of members.
const REPLICAS_MAX: usize = 32;
/// A DNS name and a port.
const ADDRESS_BYTES_MAX: usize = 261;

const STATUS_OK: u8 = 0;

fn error_code(error: Error) -> u8 {
    match error {
        Error::OutOfRange => 1,
        Error::Misaligned => 2,
        Error::TooLarge => 3,
        Error::NoSpace => 4,
        Error::Fenced => 5,
        Error::Corrupt => 6,
        Error::Unavailable => 7,
    }
}

fn error_from(code: u8) -> Option<Error> {
    Some(match code {
        1 => Error::OutOfRange,
        2 => Error::Misaligned,
        3 => Error::TooLarge,
        4 => Error::NoSpace,
        5 => Error::Fenced,
        6 => Error::Corrupt,
        7 => Error::Unavailable,
        _ => return None,
    })
}
