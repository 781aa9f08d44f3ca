//! What the two sides of a rebuild say, as bytes: a header (`meta`) and data (`payload`).
//!
//! All integers are little-endian. Nothing is believed before its bound is checked; what a field may mean beside that
//! is for `sender` and `receiver` to check.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use holdfast_consensus::{Position, Term};
use holdfast_store::chunk::{CHANGES_MAX, Changes, SLOT_NUMBERS_MAX, SlotChange};
use holdfast_store::device::BLOCK_BYTES;
use holdfast_store::group::{InstalledSlot, STATE_BYTES_MAX};

use crate::codec::{DecodeError, Reader, put_position};
use crate::rebuild::{RebuildId, STATE_CHUNK_BYTES};

const WANT: u8 = 1;
const OFFER: u8 = 2;
const ASK_CHANGES: u8 = 3;
const CHANGES: u8 = 4;
const ASK_SLOT: u8 = 5;
const SLOT: u8 = 6;
const ASK_STATE: u8 = 7;
const STATE: u8 = 8;
const DONE: u8 = 9;
const ABORT: u8 = 10;
const CHECKPOINTED: u8 = 11;
const FORGET: u8 = 12;

/// Bytes of one change in a payload: slot, index, present.
const CHANGE_BYTES: usize = 18;
/// Stands for "that was all".
const NO_SLOT: u64 = u64::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RebuildMessage {
    /// To the leader: this replica is between two states and needs a rebuild to get out.
    Want,
    /// To the receiver: the state at `position` is frozen here. `hash` is that of its map, `state_bytes` the length of
    /// the configuration and machine state at it.
    Offer {
        id: RebuildId,
        position: Position,
        hash: u128,
        state_bytes: u32,
    },
    AskChanges {
        id: RebuildId,
        above: u64,
        from_slot: u64,
    },
    /// The slots from `from_slot` on that changed above `above`.
    Changes {
        id: RebuildId,
        above: u64,
        from_slot: u64,
        changes: Changes,
    },
    /// As it was listed.
    AskSlot {
        id: RebuildId,
        change: SlotChange,
    },
    Slot {
        id: RebuildId,
        slot: InstalledSlot,
    },
    AskState {
        id: RebuildId,
        offset: u32,
    },
    State {
        id: RebuildId,
        offset: u32,
        bytes: Bytes,
    },
    /// The receiver has the state at the offered position, durably.
    Done {
        id: RebuildId,
    },
    /// The sender knows of no such rebuild any more, or the receiver wants it no longer.
    Abort {
        id: RebuildId,
    },
    /// To the leader: the checkpoint here, whatever comes, is at or above this index.
    Checkpointed {
        index: u64,
    },
    /// To a follower: every replica's checkpoint is at or above this index, so nobody asks for tombstones below it.
    Forget {
        below: u64,
    },
}

impl RebuildMessage {
    /// `None`: it is about none in particular.
    pub fn id(&self) -> Option<RebuildId> {
        match self {
            RebuildMessage::Want | RebuildMessage::Checkpointed { .. } | RebuildMessage::Forget { .. } => None,
            RebuildMessage::Offer { id, .. }
            | RebuildMessage::AskChanges { id, .. }
            | RebuildMessage::Changes { id, .. }
            | RebuildMessage::AskSlot { id, .. }
            | RebuildMessage::Slot { id, .. }
            | RebuildMessage::AskState { id, .. }
            | RebuildMessage::State { id, .. }
            | RebuildMessage::Done { id }
            | RebuildMessage::Abort { id } => Some(*id),
        }
    }
}

pub fn encode(message: &RebuildMessage) -> (Bytes, Bytes) {
    let mut out = BytesMut::with_capacity(128);
    let mut payload = Bytes::new();
    out.put_u8(match message {
        RebuildMessage::Want => WANT,
        RebuildMessage::Offer { .. } => OFFER,
        RebuildMessage::AskChanges { .. } => ASK_CHANGES,
        RebuildMessage::Changes { .. } => CHANGES,
        RebuildMessage::AskSlot { .. } => ASK_SLOT,
        RebuildMessage::Slot { .. } => SLOT,
        RebuildMessage::AskState { .. } => ASK_STATE,
        RebuildMessage::State { .. } => STATE,
        RebuildMessage::Done { .. } => DONE,
        RebuildMessage::Abort { .. } => ABORT,
        RebuildMessage::Checkpointed { .. } => CHECKPOINTED,
        RebuildMessage::Forget { .. } => FORGET,
    });
    if let Some(id) = message.id() {
        out.put_u64_le(id.term.0);
        out.put_u64_le(id.number);
    }
    match message {
        RebuildMessage::Want | RebuildMessage::Done { .. } | RebuildMessage::Abort { .. } => {}
        RebuildMessage::Offer { position, hash, state_bytes, .. } => {
            put_position(&mut out, *position);
            out.put_u128_le(*hash);
            out.put_u32_le(*state_bytes);
        }
        RebuildMessage::AskChanges { above, from_slot, .. } => {
            out.put_u64_le(*above);
            out.put_u64_le(*from_slot);
        }
        RebuildMessage::Changes { above, from_slot, changes, .. } => {
            out.put_u64_le(*above);
            out.put_u64_le(*from_slot);
            out.put_u64_le(changes.next_slot.unwrap_or(NO_SLOT));
            let mut list = BytesMut::with_capacity(changes.slots.len() * CHANGE_BYTES);
            changes.slots.iter().for_each(|change| put_change(&mut list, change));
            payload = list.freeze();
        }
        RebuildMessage::AskSlot { change, .. } => put_change(&mut out, change),
        RebuildMessage::Slot { slot, .. } => {
            let InstalledSlot { slot, index, present, data, checksums } = slot;
            put_change(&mut out, &SlotChange { slot: *slot, index: *index, present: *present });
            checksums.iter().for_each(|checksum| out.put_u32_le(*checksum));
            payload = data.clone();
        }
        RebuildMessage::Checkpointed { index } => out.put_u64_le(*index),
        RebuildMessage::Forget { below } => out.put_u64_le(*below),
        RebuildMessage::AskState { offset, .. } => out.put_u32_le(*offset),
        RebuildMessage::State { offset, bytes, .. } => {
            out.put_u32_le(*offset);
            payload = bytes.clone();
        }
    }
    (out.freeze(), payload)
}

/// # Errors
/// Whatever the sender sent: nothing is believed, nothing is allocated before its bound is checked.
pub fn decode(meta: &Bytes, payload: &Bytes) -> Result<RebuildMessage, DecodeError> {
    let mut reader = Reader::new("rebuild message", meta);
    let kind = reader.u8()?;
    let mut taken = 0;
    let message = match kind {
        WANT => RebuildMessage::Want,
        OFFER => {
            let (id, position) = (id(&mut reader)?, reader.position()?);
            let hash = reader.take(16)?.get_u128_le();
            let state_bytes = bounded(u64::from(reader.u32()?), STATE_BYTES_MAX as u64)? as u32;
            RebuildMessage::Offer { id, position, hash, state_bytes }
        }
        ASK_CHANGES => {
            RebuildMessage::AskChanges { id: id(&mut reader)?, above: reader.u64()?, from_slot: slot(&mut reader)? }
        }
        CHANGES => {
            let (id, above, from_slot) = (id(&mut reader)?, reader.u64()?, slot(&mut reader)?);
            let next_slot = match reader.u64()? {
                NO_SLOT => None,
                next => Some(bounded(next, SLOT_NUMBERS_MAX - 1)?),
            };
            bounded(payload.len() as u64, (CHANGES_MAX * CHANGE_BYTES) as u64)?;
            let mut list = Reader::new("changes of a rebuild message", payload);
            let mut slots = Vec::with_capacity(payload.len() / CHANGE_BYTES);
            for _ in 0..payload.len().div_ceil(CHANGE_BYTES) {
                slots.push(change(&mut list)?);
            }
            taken = payload.len();
            RebuildMessage::Changes { id, above, from_slot, changes: Changes { slots, next_slot } }
        }
        ASK_SLOT => RebuildMessage::AskSlot { id: id(&mut reader)?, change: change(&mut reader)? },
        SLOT => {
            let (id, SlotChange { slot, index, present }) = (id(&mut reader)?, change(&mut reader)?);
            let blocks = present.count_ones() as usize;
            let checksums = (0..blocks).map(|_| reader.u32()).collect::<Result<_, _>>()?;
            taken = blocks * BLOCK_BYTES;
            if payload.len() < taken {
                let missing = taken - payload.len();
                return Err(DecodeError::Short { what: "payload of a rebuild message", missing });
            }
            let data = payload.slice(..taken);
            RebuildMessage::Slot { id, slot: InstalledSlot { slot, index, present, data, checksums } }
        }
        ASK_STATE => RebuildMessage::AskState { id: id(&mut reader)?, offset: reader.u32()? },
        STATE => {
            let (id, offset) = (id(&mut reader)?, reader.u32()?);
            taken = bounded(payload.len() as u64, STATE_CHUNK_BYTES as u64)? as usize;
            RebuildMessage::State { id, offset, bytes: payload.clone() }
        }
        DONE => RebuildMessage::Done { id: id(&mut reader)? },
        ABORT => RebuildMessage::Abort { id: id(&mut reader)? },
        CHECKPOINTED => RebuildMessage::Checkpointed { index: reader.u64()? },
        FORGET => RebuildMessage::Forget { below: reader.u64()? },
        found => return Err(DecodeError::Kind { what: "rebuild message", found }),
    };
    reader.end()?;
    if taken != payload.len() {
        return Err(DecodeError::Long { what: "payload of a rebuild message", extra: payload.len() - taken });
    }
    Ok(message)
}

fn put_change(out: &mut BytesMut, change: &SlotChange) {
    out.put_u64_le(change.slot);
    out.put_u64_le(change.index);
    out.put_u16_le(change.present);
}

fn id(reader: &mut Reader<'_>) -> Result<RebuildId, DecodeError> {
    Ok(RebuildId { term: Term(reader.u64()?), number: reader.u64()? })
}

fn slot(reader: &mut Reader<'_>) -> Result<u64, DecodeError> {
    bounded(reader.u64()?, SLOT_NUMBERS_MAX - 1)
}

fn change(reader: &mut Reader<'_>) -> Result<SlotChange, DecodeError> {
    let (slot, index) = (slot(reader)?, reader.u64()?);
    Ok(SlotChange { slot, index, present: reader.take(2)?.get_u16_le() })
}

fn bounded(value: u64, max: u64) -> Result<u64, DecodeError> {
    if value > max {
        return Err(DecodeError::Bound { what: "rebuild message", value, max });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use holdfast_consensus::LogIndex;

    use super::*;

    fn messages() -> Vec<RebuildMessage> {
        let id = RebuildId { term: Term(3), number: 4 };
        let change = SlotChange { slot: 9, index: 70, present: 0b101 };
        let gone = SlotChange { slot: 11, index: 71, present: 0 };
        let changes = Changes { slots: vec![change.clone(), gone], next_slot: Some(30) };
        let data = Bytes::from(vec![7; 2 * BLOCK_BYTES]);
        let slot = InstalledSlot { slot: 9, index: 70, present: 0b101, data, checksums: [1, 2].into() };
        let position = Position { term: Term(2), index: LogIndex(80) };
        vec![
            RebuildMessage::Want,
            RebuildMessage::Offer { id, position, hash: 1 << 100, state_bytes: 500 },
            RebuildMessage::AskChanges { id, above: 5, from_slot: 6 },
            RebuildMessage::Changes { id, above: 5, from_slot: 6, changes },
            RebuildMessage::Changes { id, above: 5, from_slot: 6, changes: Changes { slots: vec![], next_slot: None } },
            RebuildMessage::AskSlot { id, change },
            RebuildMessage::Slot { id, slot },
            RebuildMessage::AskState { id, offset: 8 },
            RebuildMessage::State { id, offset: 8, bytes: Bytes::from_static(b"state") },
            RebuildMessage::Done { id },
            RebuildMessage::Abort { id },
            RebuildMessage::Checkpointed { index: 9 },
            RebuildMessage::Forget { below: 9 },
        ]
    }

    #[test]
    fn every_message_round_trips() {
        for message in messages() {
            let (meta, payload) = encode(&message);
            assert_eq!(decode(&meta, &payload), Ok(message));
        }
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_survived() {
        for message in messages() {
            let (meta, payload) = encode(&message);
            for length in 0..meta.len() {
                assert!(decode(&meta.slice(..length), &payload).is_err(), "{message:?} cut to {length}");
            }
            for at in 0..meta.len() {
                let mut hostile = meta.to_vec();
                hostile[at] ^= 0xff;
                let _ = decode(&hostile.into(), &payload);
            }
            let longer = decode(&meta, &[payload.clone(), Bytes::from_static(b"x")].concat().into());
            assert!(longer.is_err() || matches!(message, RebuildMessage::State { .. }), "{message:?}");
            if let Some(shorter) = payload.len().checked_sub(1)
                && !matches!(message, RebuildMessage::State { .. })
            {
                assert!(decode(&meta, &payload.slice(..shorter)).is_err(), "{message:?}");
            }
        }
    }

    #[test]
    fn nothing_beyond_its_bound_is_taken() {
        let id = RebuildId { term: Term(3), number: 4 };
        let slots = vec![SlotChange { slot: 9, index: 70, present: 0 }; CHANGES_MAX + 1];
        let changes = Changes { slots, next_slot: None };
        let beyond = [
            RebuildMessage::Changes { id, above: 0, from_slot: 0, changes },
            RebuildMessage::AskChanges { id, above: 0, from_slot: SLOT_NUMBERS_MAX },
            RebuildMessage::AskSlot { id, change: SlotChange { slot: u64::MAX, index: 1, present: 0 } },
            RebuildMessage::State { id, offset: 0, bytes: vec![0; STATE_CHUNK_BYTES + 1].into() },
            RebuildMessage::Offer {
                id,
                position: Position::default(),
                hash: 0,
                state_bytes: STATE_BYTES_MAX as u32 + 1,
            },
        ];
        for message in beyond {
            let (meta, payload) = encode(&message);
            assert!(matches!(decode(&meta, &payload), Err(DecodeError::Bound { .. })), "{message:?}");
        }
    }
}
