//! Consensus messages as bytes: a header (`meta`) and the data of their entries (`payload`).

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_consensus::{AppendResult, Body, Entry, LogIndex, Message, MessageBody, SupportEpoch, Term};

use crate::codec::{DecodeError, LogCommand, Reader, entry, put_entry_header, put_position};

const VOTE: u8 = 1;
const VOTE_REPLY: u8 = 2;
const APPEND: u8 = 3;
const APPEND_REPLY: u8 = 4;
const TRANSFER_NOW: u8 = 5;

const SUBMITTED: u8 = 0;
const MISMATCH: u8 = 1;
const FULL: u8 = 2;

/// Entries one append may carry; the window in bytes is consensus' own.
const ENTRIES_MAX: usize = 4096;
/// Bytes of one entry's header, beyond any state machine's.
const ENTRY_HEADER_BYTES_MAX: usize = 64 << 10;

fn payload_of(entry: &Entry<LogCommand>) -> &Bytes {
    static EMPTY: Bytes = Bytes::new();
    match &entry.body {
        Body::Command(command) => &command.payload,
        Body::Noop | Body::Configuration(_) => &EMPTY,
    }
}

/// Several payloads in one message are joined by a copy; the usual one is shared.
fn join(entries: &[Entry<LogCommand>]) -> Bytes {
    let mut filled = entries.iter().map(payload_of).filter(|payload| !payload.is_empty());
    let Some(first) = filled.next() else { return Bytes::new() };
    let Some(second) = filled.next() else { return first.clone() };
    let mut out = BytesMut::with_capacity(entries.iter().map(|entry| payload_of(entry).len()).sum());
    for payload in [first, second].into_iter().chain(filled) {
        out.put_slice(payload);
    }
    out.freeze()
}

pub fn encode(message: &Message<LogCommand>) -> (Bytes, Bytes) {
    let mut out = BytesMut::with_capacity(128);
    let mut payload = Bytes::new();
    let kind = match &message.body {
        MessageBody::Vote { .. } => VOTE,
        MessageBody::VoteReply { .. } => VOTE_REPLY,
        MessageBody::Append { .. } => APPEND,
        MessageBody::AppendReply { .. } => APPEND_REPLY,
        MessageBody::TransferNow => TRANSFER_NOW,
    };
    out.put_u8(kind);
    out.put_u64_le(message.term.0);
    match &message.body {
        MessageBody::Vote { pre, last, transfer } => {
            out.put_u8(u8::from(*pre));
            out.put_u8(u8::from(*transfer));
            put_position(&mut out, *last);
        }
        MessageBody::VoteReply { pre, granted } => {
            out.put_u8(u8::from(*pre));
            out.put_u8(u8::from(*granted));
        }
        MessageBody::Append { previous, commit, entries, round } => {
            put_position(&mut out, *previous);
            out.put_u64_le(commit.0);
            out.put_u64_le(*round);
            out.put_u32_le(entries.len() as u32);
            for entry in entries {
                let mut header = BytesMut::with_capacity(64);
                put_entry_header(&mut header, entry);
                out.put_u32_le(header.len() as u32);
                out.put_u32_le(payload_of(entry).len() as u32);
                out.put_slice(&header);
            }
            payload = join(entries);
        }
        MessageBody::AppendReply { result, flushed, round, support } => {
            match result {
                AppendResult::Submitted(index) => {
                    out.put_u8(SUBMITTED);
                    out.put_u64_le(index.0);
                }
                AppendResult::Mismatch { rejected, hint } => {
                    out.put_u8(MISMATCH);
                    out.put_u64_le(rejected.0);
                    put_position(&mut out, *hint);
                }
                AppendResult::Full { last } => {
                    out.put_u8(FULL);
                    out.put_u64_le(last.0);
                }
            }
            out.put_u64_le(flushed.0);
            out.put_u64_le(*round);
            out.put_u64_le(support.boot);
            out.put_u64_le(support.count);
        }
        MessageBody::TransferNow => {}
    }
    (out.freeze(), payload)
}

/// # Errors
/// Whatever the sender sent: nothing is believed, nothing is allocated before its bound is checked.
pub fn decode(meta: &Bytes, payload: &Bytes) -> Result<Message<LogCommand>, DecodeError> {
    let mut reader = Reader::new("consensus message", meta);
    let kind = reader.u8()?;
    let term = Term(reader.u64()?);
    let mut used = 0;
    let body = match kind {
        VOTE => MessageBody::Vote { pre: reader.flag()?, transfer: reader.flag()?, last: reader.position()? },
        VOTE_REPLY => MessageBody::VoteReply { pre: reader.flag()?, granted: reader.flag()? },
        APPEND => {
            let previous = reader.position()?;
            let commit = LogIndex(reader.u64()?);
            let round = reader.u64()?;
            let count = reader.count(ENTRIES_MAX)?;
            let mut entries = Vec::new();
            let mut index = previous.index;
            for _ in 0..count {
                let header_length = reader.count(ENTRY_HEADER_BYTES_MAX)?;
                let length = reader.u32()? as usize;
                let header = meta.slice_ref(reader.take(header_length)?);
                if payload.len() - used < length {
                    let missing = length - (payload.len() - used);
                    return Err(DecodeError::Short { what: "payload of a consensus message", missing });
                }
                index = LogIndex(index.0.checked_add(1).ok_or(DecodeError::Bound {
                    what: "log index",
                    value: u64::MAX,
                    max: u64::MAX - 1,
                })?);
                entries.push(entry(index, &header, payload.slice(used..used + length))?);
                used += length;
            }
            MessageBody::Append { previous, commit, entries, round }
        }
        APPEND_REPLY => {
            let result = match reader.u8()? {
                SUBMITTED => AppendResult::Submitted(LogIndex(reader.u64()?)),
                MISMATCH => AppendResult::Mismatch { rejected: LogIndex(reader.u64()?), hint: reader.position()? },
                FULL => AppendResult::Full { last: LogIndex(reader.u64()?) },
                found => return Err(DecodeError::Kind { what: "append result", found }),
            };
            let flushed = LogIndex(reader.u64()?);
            let round = reader.u64()?;
            let support = SupportEpoch { boot: reader.u64()?, count: reader.u64()? };
            MessageBody::AppendReply { result, flushed, round, support }
        }
        TRANSFER_NOW => MessageBody::TransferNow,
        found => return Err(DecodeError::Kind { what: "consensus message", found }),
    };
    reader.end()?;
    if used != payload.len() {
        return Err(DecodeError::Long { what: "payload of a consensus message", extra: payload.len() - used });
    }
    Ok(Message { term, body })
}

#[cfg(test)]
mod tests {
    use holdfast_consensus::Position;

    use super::*;

    fn messages() -> Vec<Message<LogCommand>> {
        let position = Position { term: Term(2), index: LogIndex(8) };
        let write = |index: u64, data: &'static [u8]| Entry {
            position: Position { term: Term(3), index: LogIndex(index) },
            body: Body::Command(LogCommand { header: Bytes::from_static(b"h"), payload: Bytes::from_static(data) }),
        };
        let append = |entries| MessageBody::Append { previous: position, commit: LogIndex(7), entries, round: 4 };
        let support = SupportEpoch { boot: 5, count: 6 };
        let reply = |result| MessageBody::AppendReply { result, flushed: LogIndex(3), round: 1, support };
        [
            MessageBody::Vote { pre: true, last: position, transfer: false },
            MessageBody::VoteReply { pre: false, granted: true },
            append(vec![]),
            append(vec![write(9, b"one")]),
            append(vec![write(9, b"one"), write(10, b""), write(11, b"three")]),
            reply(AppendResult::Submitted(LogIndex(9))),
            reply(AppendResult::Mismatch { rejected: LogIndex(9), hint: position }),
            reply(AppendResult::Full { last: LogIndex(2) }),
            MessageBody::TransferNow,
        ]
        .map(|body| Message { term: Term(3), body })
        .into()
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
            assert!(decode(&meta, &[payload, Bytes::from_static(b"x")].concat().into()).is_err());
        }
    }
}
