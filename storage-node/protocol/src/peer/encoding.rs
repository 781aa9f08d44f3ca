//! Peer messages as bytes: `docs/protocols/peer.md`.

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_consensus::SupportEpoch;
use holdfast_id::{GroupId, ReplicaId};

use super::{PeerMessage, SlotCopy, kind};
use crate::wire::{DecodeError, Encoded, Reader, no_payload};

/// Bytes of a block, sixteen of which make a slot.
const BLOCK_BYTES: usize = 4096;
/// First slot number that no volume has: 2^40 blocks are the most a map can hold.
const SLOTS_MAX: u64 = (1 << 40) / 16;
/// Bytes before the replica layer's own meta in `Raft` and `Delta`.
pub(crate) const ADDRESS_BYTES: usize = GroupId::BYTES + 2 * 16;

impl PeerMessage {
    pub fn encode(&self) -> Encoded {
        let mut meta = BytesMut::with_capacity(32);
        let (kind, payload) = match self {
            PeerMessage::Heartbeat { sequence, boot, disk_stalled } => {
                meta.put_u64_le(*sequence);
                meta.put_u64_le(*boot);
                meta.put_u8(u8::from(*disk_stalled));
                (kind::HEARTBEAT, Bytes::new())
            }
            PeerMessage::HeartbeatReply { sequence, boot, support } => {
                meta.put_u64_le(*sequence);
                meta.put_u64_le(*boot);
                meta.put_u64_le(support.boot);
                meta.put_u64_le(support.count);
                (kind::HEARTBEAT_REPLY, Bytes::new())
            }
            PeerMessage::Raft { group, from, to, meta: inner, payload } => {
                put_addressed(&mut meta, *group, *from, *to, inner);
                (kind::RAFT, payload.clone())
            }
            PeerMessage::Control { body } => (kind::CONTROL, body.clone()),
            PeerMessage::Delta { group, from, to, meta: inner, payload } => {
                put_addressed(&mut meta, *group, *from, *to, inner);
                (kind::DELTA, payload.clone())
            }
            PeerMessage::RepairRequest { group, from, to, slot } => {
                put_addressed(&mut meta, *group, *from, *to, &Bytes::new());
                meta.put_u64_le(*slot);
                (kind::REPAIR_REQUEST, Bytes::new())
            }
            PeerMessage::RepairReply { group, from, to, slot, copy } => {
                put_addressed(&mut meta, *group, *from, *to, &Bytes::new());
                meta.put_u64_le(*slot);
                meta.put_u8(u8::from(copy.is_some()));
                if let Some(SlotCopy { index, present, bad, data: _ }) = copy {
                    meta.put_u64_le(*index);
                    meta.put_u16_le(*present);
                    meta.put_u16_le(*bad);
                }
                (kind::REPAIR_REPLY, copy.as_ref().map_or(Bytes::new(), |copy| copy.data.clone()))
            }
        };
        Encoded { kind, meta: meta.freeze(), payload }
    }

    pub fn decode(kind: u16, meta: Bytes, payload: Bytes) -> Result<PeerMessage, DecodeError> {
        match kind {
            kind::HEARTBEAT => {
                let mut reader = Reader::new("Heartbeat", &meta);
                let message = PeerMessage::Heartbeat {
                    sequence: reader.u64("sequence")?,
                    boot: reader.u64("boot")?,
                    disk_stalled: reader.flag("disk_stalled")?,
                };
                reader.end()?;
                no_payload("Heartbeat", &payload)?;
                Ok(message)
            }
            kind::HEARTBEAT_REPLY => {
                let mut reader = Reader::new("HeartbeatReply", &meta);
                let message = PeerMessage::HeartbeatReply {
                    sequence: reader.u64("sequence")?,
                    boot: reader.u64("boot")?,
                    support: SupportEpoch { boot: reader.u64("support.boot")?, count: reader.u64("support.count")? },
                };
                reader.end()?;
                no_payload("HeartbeatReply", &payload)?;
                Ok(message)
            }
            kind::RAFT => {
                let (group, from, to, meta) = read_addressed("Raft", &meta)?;
                Ok(PeerMessage::Raft { group, from, to, meta, payload })
            }
            kind::CONTROL => {
                Reader::new("Control", &meta).end()?;
                Ok(PeerMessage::Control { body: payload })
            }
            kind::DELTA => {
                let (group, from, to, meta) = read_addressed("Delta", &meta)?;
                Ok(PeerMessage::Delta { group, from, to, meta, payload })
            }
            kind::REPAIR_REQUEST => {
                let (group, from, to, meta) = read_addressed("RepairRequest", &meta)?;
                let mut reader = Reader::new("RepairRequest", &meta);
                let slot = read_slot(&mut reader)?;
                reader.end()?;
                no_payload("RepairRequest", &payload)?;
                Ok(PeerMessage::RepairRequest { group, from, to, slot })
            }
            kind::REPAIR_REPLY => {
                let (group, from, to, meta) = read_addressed("RepairReply", &meta)?;
                let mut reader = Reader::new("RepairReply", &meta);
                let slot = read_slot(&mut reader)?;
                if !reader.flag("told")? {
                    reader.end()?;
                    no_payload("RepairReply", &payload)?;
                    return Ok(PeerMessage::RepairReply { group, from, to, slot, copy: None });
                }
                let index = reader.u64("index")?;
                let (present, bad) = (reader.u16("present")?, reader.u16("bad")?);
                reader.end()?;
                let held = present & !bad;
                if payload.len() != held.count_ones() as usize * BLOCK_BYTES {
                    return Err(reader.value("present", u64::from(present)));
                }
                let copy = Some(SlotCopy { index, present, bad, data: payload });
                Ok(PeerMessage::RepairReply { group, from, to, slot, copy })
            }
            kind => Err(DecodeError::UnknownKind { kind }),
        }
    }
}

fn read_slot(reader: &mut Reader<'_>) -> Result<u64, DecodeError> {
    let slot = reader.u64("slot")?;
    if slot >= SLOTS_MAX {
        return Err(reader.value("slot", slot));
    }
    Ok(slot)
}

fn put_addressed(meta: &mut BytesMut, group: GroupId, from: ReplicaId, to: ReplicaId, inner: &Bytes) {
    meta.reserve(ADDRESS_BYTES + inner.len());
    meta.put_slice(&group.to_bytes());
    meta.put_slice(&from.to_bytes());
    meta.put_slice(&to.to_bytes());
    debug_assert_eq!(meta.len(), ADDRESS_BYTES);
    meta.put_slice(inner);
}

fn read_addressed(message: &'static str, meta: &Bytes) -> Result<(GroupId, ReplicaId, ReplicaId, Bytes), DecodeError> {
    let mut reader = Reader::new(message, meta);
    let group = reader.id("group", GroupId::from_bytes)?;
    let from = reader.id("from", ReplicaId::from_bytes)?;
    let to = reader.id("to", ReplicaId::from_bytes)?;
    Ok((group, from, to, reader.rest()))
}
