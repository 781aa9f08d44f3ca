//! Consensus messages as bytes: a header (`meta`) and the data of their entries (`payload`).
//!
//! A frame's meta is short, its payload long. So the header of an append's only entry stands in meta, and its data is
//! the payload, shared. Several entries are joined by a copy anyway: both their headers and their data are payload.

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_consensus::{
    APPEND_ENTRIES_MAX, AppendResult, Body, Entry, LogIndex, Message, MessageBody, Shortage, SupportEpoch, Term,
};

use crate::codec::{DecodeError, LogCommand, Reader, entry, put_entry_header, put_position};

const VOTE: u8 = 1;
const VOTE_REPLY: u8 = 2;
const APPEND: u8 = 3;
const APPEND_REPLY: u8 = 4;
const TRANSFER_NOW: u8 = 5;

const SUBMITTED: u8 = 0;
const MISMATCH: u8 = 1;
const PASSING_FULL: u8 = 2;
const DATA_FULL: u8 = 3;

/// Bytes of one entry's header, beyond any state machine's.
const ENTRY_HEADER_BYTES_MAX: usize = 64 << 10;

fn payload_of(entry: &Entry<LogCommand>) -> &Bytes {
    static EMPTY: Bytes = Bytes::new();
    match &entry.body {
        Body::Command(command) => &command.payload,
        Body::Noop | Body::Configuration(_) => &EMPTY,
    }
}

fn put_header(out: &mut BytesMut, entry: &Entry<LogCommand>) {
    let mut header = BytesMut::with_capacity(64);
    put_entry_header(&mut header, entry);
    out.put_u32_le(header.len() as u32);
    out.put_slice(&header);
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
            match entries.as_slice() {
                [] => {}
                [entry] => {
                    put_header(&mut out, entry);
                    payload = payload_of(entry).clone();
                }
                entries => {
                    let data: usize = entries.iter().map(|entry| payload_of(entry).len()).sum();
                    let mut joined = BytesMut::with_capacity(data + 96 * entries.len());
                    for entry in entries {
                        put_header(&mut joined, entry);
                        joined.put_u32_le(payload_of(entry).len() as u32);
                        joined.put_slice(payload_of(entry));
                    }
                    payload = joined.freeze();
                }
            }
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
                AppendResult::Full { last, of } => {
                    out.put_u8(if *of == Shortage::Passing { PASSING_FULL } else { DATA_FULL });
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
    let mut payload_used = false;
    let body = match kind {
        VOTE => MessageBody::Vote { pre: reader.flag()?, transfer: reader.flag()?, last: reader.position()? },
        VOTE_REPLY => MessageBody::VoteReply { pre: reader.flag()?, granted: reader.flag()? },
        APPEND => {
            let previous = reader.position()?;
            let commit = LogIndex(reader.u64()?);
            let round = reader.u64()?;
            let count = reader.count(APPEND_ENTRIES_MAX)?;
            if previous.index.0.checked_add(count as u64).is_none() {
                let (value, max) = (previous.index.0, u64::MAX - count as u64);
                return Err(DecodeError::Bound { what: "log index", value, max });
            }
            payload_used = count > 0;
            let mut entries = Vec::new();
            if count == 1 {
                let header_length = reader.count(ENTRY_HEADER_BYTES_MAX)?;
                let header = meta.slice_ref(reader.take(header_length)?);
                entries.push(entry(previous.index.next(), &header, payload.clone())?);
            } else {
                let mut joined = Reader::new("entries of an append", payload);
                for index in (previous.index.0 + 1..).take(count) {
                    let header_length = joined.count(ENTRY_HEADER_BYTES_MAX)?;
                    let header = payload.slice_ref(joined.take(header_length)?);
                    let length = joined.u32()? as usize;
                    let data = payload.slice_ref(joined.take(length)?);
                    entries.push(entry(LogIndex(index), &header, data)?);
                }
                joined.end()?;
            }
            MessageBody::Append { previous, commit, entries, round }
        }
        APPEND_REPLY => {
            let result = match reader.u8()? {
                SUBMITTED => AppendResult::Submitted(LogIndex(reader.u64()?)),
                MISMATCH => AppendResult::Mismatch { rejected: LogIndex(reader.u64()?), hint: reader.position()? },
                PASSING_FULL => AppendResult::Full { last: LogIndex(reader.u64()?), of: Shortage::Passing },
                DATA_FULL => AppendResult::Full { last: LogIndex(reader.u64()?), of: Shortage::Data },
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
    if !payload_used && !payload.is_empty() {
        return Err(DecodeError::Long { what: "payload of a consensus message", extra: payload.len() });
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
            reply(AppendResult::Full { last: LogIndex(2), of: Shortage::Passing }),
            reply(AppendResult::Full { last: LogIndex(2), of: Shortage::Data }),
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

    /// A frame takes 256 KiB of meta and 4 MiB + 64 KiB of payload.
    #[test]
    fn the_longest_append_fits_a_frame() {
        let command = LogCommand { header: Bytes::from(vec![7; 200]), payload: Bytes::new() };
        let entries = (1..=APPEND_ENTRIES_MAX as u64).map(|index| Entry {
            position: Position { term: Term(3), index: LogIndex(index) },
            body: Body::Command(command.clone()),
        });
        let previous = Position::default();
        let body = MessageBody::Append { previous, commit: LogIndex(0), entries: entries.collect(), round: 4 };
        let message = Message { term: Term(3), body };
        let (meta, payload) = encode(&message);
        assert!(meta.len() < 128 && payload.len() < 2 << 20, "{} and {} bytes", meta.len(), payload.len());
        assert_eq!(decode(&meta, &payload), Ok(message));
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
            let longer: Bytes = [&payload, b"x".as_slice()].concat().into();
            // Of a single entry everything is data; that it is too much is for the state machine to say.
            let single = matches!(&message.body, MessageBody::Append { entries, .. } if entries.len() == 1);
            assert_eq!(decode(&meta, &longer).is_ok(), single, "{message:?}");
            for length in 0..payload.len() {
                assert_eq!(decode(&meta, &payload.slice(..length)).is_ok(), single, "{message:?} cut to {length}");
            }
        }
    }
}
