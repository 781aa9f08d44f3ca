//! The encoding of a volume's state, as checkpoints and rebuilds carry it.
//!
//! Equal states have equal bytes, so replicas are compared by their encoded states. Field table and drawing:
//! `docs/formats/volume-log.md`. What carries the state protects it with a checksum.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_block::Geometry;
use holdfast_id::{ID_BYTES, VolumeId};
use holdfast_planted::Bug;
use holdfast_protocol::session::{Epoch, Instance, Session};

use crate::codec::Reader;
use crate::command::{DecodeError, encode_formatted, put_name, read_formatted, read_name, read_snapshot};
use crate::name::NAME_BYTES_MAX;
use crate::volume::{Attachment, FORMER_INSTANCES_MAX, SNAPSHOTS_MAX, Snapshot, Volume};
use crate::window::{WORDS, Window};

/// Kinds of log commands are below 128: a state is never taken for a command.
const KIND: u8 = 128;
/// Without snapshots.
const VERSION: u8 = 1;
/// With a list of snapshots behind the rest.
const VERSION_SNAPSHOTS: u8 = 2;

const NAME_FIELD_BYTES_MAX: usize = 2 + NAME_BYTES_MAX;
const FIXED_BYTES: usize = 4 + ID_BYTES + 8 + 8 + 4 + 1 + 8 + 8 + 1 + 1;
const ATTACHMENT_BYTES_MAX: usize = NAME_FIELD_BYTES_MAX + 16 + 8 + 8 * WORDS;
/// Longest encoded state.
pub const STATE_BYTES_MAX: usize =
    FIXED_BYTES + NAME_FIELD_BYTES_MAX + 16 * FORMER_INSTANCES_MAX + ATTACHMENT_BYTES_MAX + SNAPSHOTS_BYTES_MAX;
const SNAPSHOTS_BYTES_MAX: usize = 1 + SNAPSHOTS_MAX * (ID_BYTES + 8 + 8 + NAME_FIELD_BYTES_MAX);
const _: () = assert!(STATE_BYTES_MAX == 19346, "the bound stated in docs/formats/volume-log.md");

impl Volume {
    pub fn encode_state(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(STATE_BYTES_MAX);
        out.put_u8(KIND);
        out.put_u8(if self.snapshots.is_empty() { VERSION } else { VERSION_SNAPSHOTS });
        out.put_u16_le(0);
        out.put_slice(&self.id.to_bytes());
        out.put_u64_le(self.applied);
        out.put_u64_le(self.geometry.size_bytes);
        out.put_u32_le(self.geometry.logical_block_bytes);
        out.put_u8(encode_formatted(self.formatted));
        out.put_u64_le(self.epoch.0);
        out.put_u64_le(self.session.0);
        out.put_u8(u8::try_from(self.former.len()).expect("at most 16 former instances"));
        out.put_u8(u8::from(self.attachment.is_some()));
        put_name(&mut out, &self.name);
        self.former.iter().for_each(|instance| out.put_u128_le(instance.0));
        if let Some(attachment) = &self.attachment {
            put_name(&mut out, &attachment.holder);
            out.put_u128_le(attachment.instance.0);
            if holdfast_planted::is(Bug::SessionLostInSnapshot) {
                out.put_u64_le(1);
                out.put_bytes(0, 8 * WORDS);
            } else {
                out.put_u64_le(attachment.window.oldest());
                attachment.window.words().iter().for_each(|word| out.put_u64_le(*word));
            }
        }
        if !self.snapshots.is_empty() {
            out.put_u8(u8::try_from(self.snapshots.len()).expect("at most 64 snapshots"));
            for snapshot in &self.snapshots {
                out.put_slice(&snapshot.id.to_bytes());
                out.put_u64_le(snapshot.index);
                out.put_u64_le(snapshot.size_bytes);
                put_name(&mut out, &snapshot.name);
            }
        }
        assert!(out.len() <= STATE_BYTES_MAX);
        out.freeze()
    }

    pub fn decode_state(bytes: &[u8]) -> Result<Volume, DecodeError> {
        let invalid = |field| DecodeError::Invalid { field };
        let mut reader = Reader::new(bytes);
        let (kind, version, reserved) = (reader.u8()?, reader.u8()?, reader.u16()?);
        if kind != KIND || !(VERSION..=VERSION_SNAPSHOTS).contains(&version) {
            return Err(DecodeError::Unknown { kind, version });
        }
        let id = VolumeId::from_bytes(reader.array()?).ok_or(invalid("volume"))?;
        let applied = reader.u64()?;
        let geometry = Geometry::new(reader.u64()?, reader.u32()?).ok_or(invalid("geometry"))?;
        let formatted = read_formatted(&mut reader)?;
        let (epoch, session) = (Epoch(reader.u64()?), Session(reader.u64()?));
        let (former_count, attached) = (usize::from(reader.u8()?), reader.u8()?);
        if reserved != 0 || former_count > FORMER_INSTANCES_MAX || attached > 1 {
            return Err(invalid("counts"));
        }
        if session.0 < epoch.0 || (attached == 1 && epoch.0 == 0) {
            return Err(invalid("epoch and session"));
        }
        let name = read_name(&mut reader)?;
        let former = (0..former_count).map(|_| reader.u128().map(Instance)).collect::<Result<VecDeque<_>, _>>()?;
        let attachment = if attached == 1 {
            let (holder, instance, oldest) = (read_name(&mut reader)?, Instance(reader.u128()?), reader.u64()?);
            let mut words = [0; WORDS];
            for word in &mut words {
                *word = reader.u64()?;
            }
            let window = Window::from_parts(oldest, words).ok_or(invalid("window"))?;
            Some(Attachment { holder, instance, window })
        } else {
            None
        };
        let mut snapshots: Vec<Snapshot> = Vec::new();
        if version == VERSION_SNAPSHOTS {
            let count = usize::from(reader.u8()?);
            for _ in 0..count {
                let (id, index, size_bytes) = (read_snapshot(&mut reader)?, reader.u64()?, reader.u64()?);
                let snapshot = Snapshot { id, index, size_bytes, name: read_name(&mut reader)? };
                let unlike = |held: &Snapshot| held.id != id && held.name != snapshot.name && held.index < index;
                if index > applied || !snapshots.iter().all(unlike) {
                    return Err(invalid("snapshots"));
                }
                snapshots.push(snapshot);
            }
            if count == 0 || count > SNAPSHOTS_MAX {
                return Err(invalid("count of snapshots"));
            }
        }
        match reader.rest() {
            0 => Ok(Volume { id, name, geometry, applied, formatted, epoch, session, attachment, former, snapshots }),
            count => Err(DecodeError::Trailing { count }),
        }
    }
}
