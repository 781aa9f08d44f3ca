//! The bytes of the protocol, big-endian, and nothing about their meaning.

use bytes::{Buf, BufMut, BytesMut};

/// `NBDMAGIC`, the first eight bytes of every server.
pub(crate) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before every option.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string the protocol allows ("Protocol phases").
pub(crate) const STRING_BYTES_MAX: usize = 4096;
/// Zeroes after the answer to `EXPORT_NAME`, unless both sides do without.
pub(crate) const EXPORT_NAME_ZEROES: usize = 124;

/// Flags of the server's greeting; the client answers with the same bits.
pub(crate) mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

pub(crate) mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

pub(crate) mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
}

pub(crate) mod option_code {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod reply_code {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

pub(crate) mod info_code {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

pub(crate) mod command_code {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

pub(crate) mod chunk {
    pub const FLAG_DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// "Error values"; the protocol's own numbers, whatever the machine's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Errno {
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
}

pub(crate) const OPTION_HEADER_BYTES: usize = 16;
pub(crate) const REQUEST_HEADER_BYTES: usize = 28;
pub(crate) const OFFSET_DATA_OVERHEAD: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub option: u32,
    pub length: u32,
}

impl OptionHeader {
    /// `None` where the magic is wrong. Panics unless [`OPTION_HEADER_BYTES`] are there.
    pub fn decode(mut bytes: &[u8]) -> Option<OptionHeader> {
        let magic = bytes.get_u64();
        let header = OptionHeader { option: bytes.get_u32(), length: bytes.get_u32() };
        (magic == OPTION_MAGIC).then_some(header)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    /// The client's name of the request; opaque.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl RequestHeader {
    /// `None` where the magic is wrong. Panics unless [`REQUEST_HEADER_BYTES`] are there.
    pub fn decode(mut bytes: &[u8]) -> Option<RequestHeader> {
        let magic = bytes.get_u32();
        let header = RequestHeader {
            flags: bytes.get_u16(),
            command: bytes.get_u16(),
            cookie: bytes.get_u64(),
            offset: bytes.get_u64(),
            length: bytes.get_u32(),
        };
        (magic == REQUEST_MAGIC).then_some(header)
    }
}

pub(crate) fn put_greeting(out: &mut BytesMut) {
    out.put_u64(MAGIC);
    out.put_u64(OPTION_MAGIC);
    out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
}

pub(crate) fn put_option_reply(out: &mut BytesMut, option: u32, reply: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(u32::try_from(data.len()).expect("option replies are a few hundred bytes"));
    out.put_slice(data);
}

pub(crate) fn put_simple_reply(out: &mut BytesMut, error: Option<Errno>, cookie: u64) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error.map_or(0, |error| error as u32));
    out.put_u64(cookie);
}

/// The header of a structured chunk; `length` bytes of payload follow.
pub(crate) fn put_chunk(out: &mut BytesMut, flags: u16, kind: u16, cookie: u64, length: u32) {
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(length);
}

/// A final error chunk with a message for a person.
pub(crate) fn put_error_chunk(out: &mut BytesMut, error: Errno, message: &str, cookie: u64) {
    let message = &message.as_bytes()[..message.len().min(STRING_BYTES_MAX)];
    let length = message.len() as u16;
    put_chunk(out, chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + u32::from(length));
    out.put_u32(error as u32);
    out.put_u16(length);
    out.put_slice(message);
}
