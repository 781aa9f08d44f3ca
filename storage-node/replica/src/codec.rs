//! How log entries and the state beside them are written on disk and on the wire.
//!
//! All integers are little-endian. An entry is a header (what it is) and a payload (the volume's data), so that data
//! is moved by reference and never re-encoded. Drawn in `docs/formats/replica.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use holdfast_consensus::{Body, Configuration, Entry, HardState, LogIndex, Member, Position, Role, Term};
use holdfast_id::{ID_BYTES, NodeId, ReplicaId};

/// Layout of entry headers and group state written by this build; the only one so far.
const VERSION: u8 = 1;
/// More replicas of one group than anybody can configure; bounds what a decoder believes.
pub(crate) const MEMBERS_MAX: usize = 32;

const KIND_NOOP: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_CONFIGURATION: u8 = 2;

/// A command as the log holds it: the state machine's own header and the data it names. Clones share the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogCommand {
    pub header: Bytes,
    pub payload: Bytes,
}

impl holdfast_consensus::Command for LogCommand {
    fn size_bytes(&self) -> usize {
        self.header.len() + self.payload.len()
    }
}

/// Why stored or received bytes are not what they should be. Stored ones passed their checksum: a newer or broken
/// build wrote them, and the replica must stop rather than skip.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{what} ends {missing} bytes early")]
    Short { what: &'static str, missing: usize },
    #[error("{what} has {extra} bytes too many")]
    Long { what: &'static str, extra: usize },
    #[error("{what} has layout version {found}; this build knows up to {VERSION}")]
    Version { what: &'static str, found: u8 },
    #[error("{what} has the unknown kind {found}")]
    Kind { what: &'static str, found: u8 },
    #[error("{what} breaks its bound: {value} > {max}")]
    Bound { what: &'static str, value: u64, max: u64 },
    #[error("{what} holds an identifier of all zeroes")]
    NoIdentifier { what: &'static str },
}

/// A cursor that refuses to read past the end.
pub(crate) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, rest: &'a [u8]) -> Self {
        Reader { what, rest }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        if self.rest.len() < length {
            return Err(DecodeError::Short { what: self.what, missing: length - self.rest.len() });
        }
        let (head, rest) = self.rest.split_at(length);
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(self.take(4)?.get_u32_le())
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(self.take(8)?.get_u64_le())
    }

    pub(crate) fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(DecodeError::Kind { what: self.what, found }),
        }
    }

    pub(crate) fn position(&mut self) -> Result<Position, DecodeError> {
        Ok(Position { term: Term(self.u64()?), index: LogIndex(self.u64()?) })
    }

    pub(crate) fn id(&mut self) -> Result<[u8; ID_BYTES], DecodeError> {
        Ok(self.take(ID_BYTES)?.try_into().expect("took exactly that many bytes"))
    }

    pub(crate) fn replica(&mut self) -> Result<ReplicaId, DecodeError> {
        ReplicaId::from_bytes(self.id()?).ok_or(DecodeError::NoIdentifier { what: self.what })
    }

    pub(crate) fn node(&mut self) -> Result<NodeId, DecodeError> {
        NodeId::from_bytes(self.id()?).ok_or(DecodeError::NoIdentifier { what: self.what })
    }

    pub(crate) fn count(&mut self, max: usize) -> Result<usize, DecodeError> {
        let value = self.u32()? as usize;
        if value > max {
            return Err(DecodeError::Bound { what: self.what, value: value as u64, max: max as u64 });
        }
        Ok(value)
    }

    pub(crate) fn version(&mut self) -> Result<(), DecodeError> {
        match self.u8()? {
            VERSION => Ok(()),
            found => Err(DecodeError::Version { what: self.what, found }),
        }
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Long { what: self.what, extra: self.rest.len() }) }
    }
}

pub(crate) fn put_position(out: &mut BytesMut, position: Position) {
    out.put_u64_le(position.term.0);
    out.put_u64_le(position.index.0);
}

fn put_members(out: &mut BytesMut, members: &[Member]) {
    out.put_u32_le(members.len() as u32);
    for member in members {
        out.put_slice(&member.replica.to_bytes());
        out.put_slice(&member.node.to_bytes());
        out.put_u8(match member.role {
            Role::Voter => 0,
            Role::Learner => 1,
            Role::Witness => 2,
        });
    }
}

fn members(reader: &mut Reader<'_>) -> Result<Vec<Member>, DecodeError> {
    let count = reader.count(MEMBERS_MAX)?;
    let mut members = Vec::with_capacity(count);
    for _ in 0..count {
        let (replica, node) = (reader.replica()?, reader.node()?);
        let role = match reader.u8()? {
            0 => Role::Voter,
            1 => Role::Learner,
            2 => Role::Witness,
            found => return Err(DecodeError::Kind { what: "role", found }),
        };
        members.push(Member { replica, node, role });
    }
    Ok(members)
}

pub(crate) fn put_configuration(out: &mut BytesMut, configuration: &Configuration) {
    out.put_u8(configuration.min_data);
    put_members(out, &configuration.members);
    put_members(out, &configuration.outgoing);
}

pub(crate) fn configuration(reader: &mut Reader<'_>) -> Result<Configuration, DecodeError> {
    let min_data = reader.u8()?;
    Ok(Configuration { min_data, members: members(reader)?, outgoing: members(reader)? })
}

/// Appends the header of an entry: version, kind, term, then what the kind needs. The index travels beside it.
pub(crate) fn put_entry_header(out: &mut BytesMut, entry: &Entry<LogCommand>) {
    out.put_u8(VERSION);
    let kind = match &entry.body {
        Body::Noop => KIND_NOOP,
        Body::Command(_) => KIND_COMMAND,
        Body::Configuration(_) => KIND_CONFIGURATION,
    };
    out.put_u8(kind);
    out.put_u64_le(entry.position.term.0);
    match &entry.body {
        Body::Noop => {}
        Body::Command(command) => out.put_slice(&command.header),
        Body::Configuration(configuration) => put_configuration(out, configuration),
    }
}

/// `header` is shared, not copied.
pub(crate) fn entry(index: LogIndex, header: &Bytes, payload: Bytes) -> Result<Entry<LogCommand>, DecodeError> {
    const FIXED: usize = 1 + 1 + 8;
    let mut reader = Reader::new("log entry", header);
    reader.version()?;
    let kind = reader.u8()?;
    let term = Term(reader.u64()?);
    if kind != KIND_COMMAND && !payload.is_empty() {
        return Err(DecodeError::Long { what: "payload of a log entry", extra: payload.len() });
    }
    let body = match kind {
        KIND_NOOP => {
            reader.end()?;
            Body::Noop
        }
        KIND_COMMAND => Body::Command(LogCommand { header: header.slice(FIXED..), payload }),
        KIND_CONFIGURATION => {
            let configuration = configuration(&mut reader)?;
            reader.end()?;
            Body::Configuration(configuration)
        }
        found => return Err(DecodeError::Kind { what: "log entry", found }),
    };
    Ok(Entry { position: Position { term, index }, body })
}

/// What of consensus is durable beside the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DurableState {
    pub hard_state: HardState,
    /// The log lost what it had promised, and this replica has not caught up with an elected leader since.
    pub damaged: bool,
    /// Where a log ended that was given up.
    pub forgotten: Position,
    /// At least up to here the group's log is committed, whatever of it is here.
    pub committed: LogIndex,
}

pub(crate) fn encode_hard_state(state: &DurableState) -> Bytes {
    let DurableState { hard_state: state, damaged, forgotten, committed } = state;
    let mut out = BytesMut::with_capacity(1 + 1 + 16 + 8 + 8 + 1 + ID_BYTES);
    out.put_u8(VERSION);
    out.put_u8(u8::from(*damaged));
    put_position(&mut out, *forgotten);
    out.put_u64_le(committed.0);
    out.put_u64_le(state.term.0);
    out.put_u8(u8::from(state.vote.is_some()));
    if let Some(vote) = state.vote {
        out.put_slice(&vote.to_bytes());
    }
    out.freeze()
}

pub(crate) fn hard_state(bytes: &[u8]) -> Result<DurableState, DecodeError> {
    let mut reader = Reader::new("hard state", bytes);
    reader.version()?;
    let damaged = reader.flag()?;
    let forgotten = reader.position()?;
    let committed = LogIndex(reader.u64()?);
    let term = Term(reader.u64()?);
    let vote = if reader.flag()? { Some(reader.replica()?) } else { None };
    reader.end()?;
    Ok(DurableState { hard_state: HardState { term, vote }, damaged, forgotten, committed })
}

pub(crate) fn encode_position(position: Position) -> Bytes {
    let mut out = BytesMut::with_capacity(16);
    put_position(&mut out, position);
    out.freeze()
}

pub(crate) fn decode_position(bytes: &[u8]) -> Result<Position, DecodeError> {
    let mut reader = Reader::new("position", bytes);
    let position = reader.position()?;
    reader.end()?;
    Ok(position)
}

/// Where each replica of the group lives.
pub type Directory = std::collections::BTreeMap<ReplicaId, NodeId>;

/// The opaque state of a checkpoint: who takes part and where they live, and the state machine's own bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub configuration: Configuration,
    pub machine: Bytes,
}

impl Snapshot {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(256 + self.machine.len());
        out.put_u8(VERSION);
        put_configuration(&mut out, &self.configuration);
        out.put_slice(&self.machine);
        out.freeze()
    }

    pub(crate) fn decode(bytes: &Bytes) -> Result<Snapshot, DecodeError> {
        let mut reader = Reader::new("group state", bytes);
        reader.version()?;
        let configuration = configuration(&mut reader)?;
        let machine = bytes.slice_ref(reader.rest());
        Ok(Snapshot { configuration, machine })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(n: u8) -> ReplicaId {
        ReplicaId::from_bytes([n; 16]).expect("not zero")
    }

    fn node(n: u8) -> NodeId {
        NodeId::from_bytes([n; 16]).expect("not zero")
    }

    /// As drawn in `docs/formats/replica.md`; kept for ever.
    #[test]
    fn a_configuration_is_these_bytes() {
        let configuration = Configuration {
            members: vec![
                Member { replica: replica(1), node: node(9), role: Role::Voter },
                Member { replica: replica(2), node: node(8), role: Role::Learner },
            ],
            outgoing: vec![Member { replica: replica(1), node: node(9), role: Role::Voter }],
            min_data: 1,
        };
        let mut out = BytesMut::new();
        put_configuration(&mut out, &configuration);
        let voter = [&[1; 16][..], &[9; 16], &[0]].concat();
        let learner = [&[2; 16][..], &[8; 16], &[1]].concat();
        let expected = [&[1, 2, 0, 0, 0][..], &voter, &learner, &[1, 0, 0, 0], &voter].concat();
        assert_eq!(out, expected);
    }

    #[test]
    fn entries_round_trip_and_every_truncation_is_an_error() {
        let configuration = Configuration {
            members: vec![Member { replica: replica(1), node: node(8), role: Role::Voter }],
            outgoing: vec![Member { replica: replica(2), node: node(9), role: Role::Learner }],
            min_data: 1,
        };
        let command = LogCommand { header: Bytes::from_static(b"head"), payload: Bytes::from_static(b"data") };
        for body in [Body::Noop, Body::Command(command), Body::Configuration(configuration)] {
            let position = Position { term: Term(3), index: LogIndex(9) };
            let original = Entry { position, body };
            let mut out = BytesMut::new();
            put_entry_header(&mut out, &original);
            let header = out.freeze();
            let payload = match &original.body {
                Body::Command(command) => command.payload.clone(),
                _ => Bytes::new(),
            };
            assert_eq!(entry(LogIndex(9), &header, payload.clone()), Ok(original.clone()));
            let fixed = if matches!(original.body, Body::Command(_)) { 10 } else { header.len() };
            for length in 0..fixed {
                assert!(entry(LogIndex(9), &header.slice(..length), payload.clone()).is_err(), "{length}");
            }
        }
    }

    #[test]
    fn state_round_trips() {
        for (vote, damaged) in [(None, true), (Some(replica(7)), false)] {
            let forgotten = Position { term: Term(4), index: LogIndex(30) };
            let hard_state = HardState { term: Term(5), vote };
            let state = DurableState { hard_state, damaged, forgotten, committed: LogIndex(20) };
            assert_eq!(super::hard_state(&encode_hard_state(&state)), Ok(state));
        }
        let snapshot = Snapshot {
            configuration: Configuration { members: vec![], outgoing: vec![], min_data: 1 },
            machine: Bytes::from_static(b"machine"),
        };
        assert_eq!(Snapshot::decode(&snapshot.encode()), Ok(snapshot));
    }
}
