//! The frame header: sixteen bytes before every meta and payload.
//!
//! ```text
//!  0     2         3       4      6          8             12               16
//!  +-----+---------+-------+------+----------+-------------+----------------+------------+---------------+
//!  | HF  | version | class | kind | reserved | meta length | payload length | meta ...   | payload ...   |
//!  +-----+---------+-------+------+----------+-------------+----------------+------------+---------------+
//! ```
//! Numbers are little-endian. Lengths are checked before anything is allocated for them.

use bytes::Bytes;

pub const HEADER_BYTES: usize = 16;
/// Longest meta: the entry headers of one append, with room.
pub const META_BYTES_MAX: usize = 256 << 10;
/// Longest payload: 4 MiB of data, and slack for what a layer above puts around it.
pub const PAYLOAD_BYTES_MAX: usize = (4 << 20) + (64 << 10);
/// Longest meta of the transport's own frames; nothing longer is taken before the greeting is over.
pub(crate) const OWN_META_BYTES_MAX: usize = 1024;
/// Kinds below are the transport's own; the layers above number theirs from here on.
pub const KIND_MIN: u16 = 0x0100;
pub(crate) const KIND_HELLO: u16 = 0x0001;
pub(crate) const KIND_CLOSE: u16 = 0x0002;

const MAGIC: [u8; 2] = *b"HF";
const FRAME_VERSION: u8 = 1;

/// Where several frames wait on one connection, a more urgent class goes first, frame by frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Heartbeats, votes, control.
    Control,
    /// What an application waits for.
    Data,
    /// Rebuilds and other background traffic.
    Bulk,
}

impl Class {
    /// Most urgent first.
    pub(crate) const ALL: [Class; 3] = [Class::Control, Class::Data, Class::Bulk];

    pub(crate) fn index(self) -> usize {
        match self {
            Class::Control => 0,
            Class::Data => 1,
            Class::Bulk => 2,
        }
    }
}

/// What the layers above exchange. `payload` is apart from `meta` so that bulk data is never copied to build a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u16,
    pub meta: Bytes,
    pub payload: Bytes,
}

impl Frame {
    /// Bytes on the wire before encryption.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.meta.len() + self.payload.len()
    }
}

/// Why received bytes are no frame; the connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the bytes {found:02x?} do not begin a frame")]
    Magic { found: [u8; 2] },
    #[error("frame version {found} is unknown, this build knows {FRAME_VERSION}")]
    Version { found: u8 },
    #[error("traffic class {found} does not exist")]
    Class { found: u8 },
    #[error("the reserved field holds {found}")]
    Reserved { found: u16 },
    #[error("meta of {length} bytes is longer than {max}")]
    MetaTooLong { length: u32, max: usize },
    #[error("payload of {length} bytes is longer than {max}")]
    PayloadTooLong { length: u32, max: usize },
    #[error("frame kind {kind:#06x} has no place here")]
    UnexpectedKind { kind: u16 },
    #[error("a frame of the transport itself is malformed")]
    Malformed,
}

/// What lengths a header may announce at this point of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub meta_bytes_max: usize,
    pub payload_bytes_max: usize,
}

impl Limits {
    /// Until the greeting is over.
    pub const GREETING: Limits = Limits { meta_bytes_max: OWN_META_BYTES_MAX, payload_bytes_max: 0 };
    pub const OPEN: Limits = Limits { meta_bytes_max: META_BYTES_MAX, payload_bytes_max: PAYLOAD_BYTES_MAX };

    pub fn is_greeting(self) -> bool {
        self.payload_bytes_max == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub class: Class,
    pub kind: u16,
    pub meta_length: u32,
    pub payload_length: u32,
}

impl Header {
    /// # Panics
    /// If a length breaks [`Limits::OPEN`]; `Transport::send` refuses such frames.
    pub fn of(class: Class, frame: &Frame) -> Header {
        assert!(frame.meta.len() <= META_BYTES_MAX && frame.payload.len() <= PAYLOAD_BYTES_MAX);
        Header {
            class,
            kind: frame.kind,
            meta_length: frame.meta.len() as u32,
            payload_length: frame.payload.len() as u32,
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC);
        bytes[2] = FRAME_VERSION;
        bytes[3] = self.class.index() as u8;
        bytes[4..6].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.meta_length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_length.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES], limits: Limits) -> Result<Header, FrameError> {
        let [m0, m1, version, class, k0, k1, r0, r1, l0, l1, l2, l3, p0, p1, p2, p3] = *bytes;
        if [m0, m1] != MAGIC {
            return Err(FrameError::Magic { found: [m0, m1] });
        }
        if version != FRAME_VERSION {
            return Err(FrameError::Version { found: version });
        }
        let class = *Class::ALL.get(usize::from(class)).ok_or(FrameError::Class { found: class })?;
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::Reserved { found: reserved });
        }
        let meta_length = u32::from_le_bytes([l0, l1, l2, l3]);
        if meta_length as usize > limits.meta_bytes_max {
            return Err(FrameError::MetaTooLong { length: meta_length, max: limits.meta_bytes_max });
        }
        let payload_length = u32::from_le_bytes([p0, p1, p2, p3]);
        if payload_length as usize > limits.payload_bytes_max {
            return Err(FrameError::PayloadTooLong { length: payload_length, max: limits.payload_bytes_max });
        }
        Ok(Header { class, kind: u16::from_le_bytes([k0, k1]), meta_length, payload_length })
    }

    pub fn body_bytes(&self) -> usize {
        self.meta_length as usize + self.payload_length as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_these_bytes() {
        let header = Header { class: Class::Bulk, kind: 0x0102, meta_length: 0x0304, payload_length: 0x0005_0607 };
        let bytes = [b'H', b'F', 1, 2, 2, 1, 0, 0, 4, 3, 0, 0, 7, 6, 5, 0];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::decode(&bytes, Limits::OPEN), Ok(header));
    }

    #[test]
    fn every_refusal_has_its_reason() {
        let good = Header { class: Class::Control, kind: 0x0100, meta_length: 0, payload_length: 0 }.encode();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Header::decode(&bytes, Limits::OPEN)
        };
        assert_eq!(with(0, b'G'), Err(FrameError::Magic { found: *b"GF" }));
        assert_eq!(with(2, 2), Err(FrameError::Version { found: 2 }));
        assert_eq!(with(3, 3), Err(FrameError::Class { found: 3 }));
        assert_eq!(with(7, 1), Err(FrameError::Reserved { found: 256 }));
        assert_eq!(with(11, 1), Err(FrameError::MetaTooLong { length: 1 << 24, max: META_BYTES_MAX }));
        assert_eq!(with(15, 1), Err(FrameError::PayloadTooLong { length: 1 << 24, max: PAYLOAD_BYTES_MAX }));
        let longest = Header {
            class: Class::Data,
            kind: 0x0100,
            meta_length: META_BYTES_MAX as u32,
            payload_length: PAYLOAD_BYTES_MAX as u32,
        };
        assert_eq!(Header::decode(&longest.encode(), Limits::OPEN), Ok(longest));
        assert!(Header::decode(&longest.encode(), Limits::GREETING).is_err());
    }
}
