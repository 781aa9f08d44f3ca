//! What every message's encoding is made of: the three parts, the reader, the writer and the reasons to refuse.
//!
//! Numbers are little-endian. Identifiers are their 16 bytes as `holdfast_id` gives them. A flag is one byte, 0 or 1.
//! A text is a u16 byte count and UTF-8. Every byte of meta belongs to a field: a shorter or longer one is refused,
//! as is every value without a meaning, so that one message has exactly one encoding.

use bytes::{BufMut, Bytes, BytesMut};

/// A message ready to be framed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub kind: u16,
    /// The fields, tens of bytes as a rule.
    pub meta: Bytes,
    /// User data, shared with whoever gave it.
    pub payload: Bytes,
}

/// Why received parts are no message. The connection they came from is closed: its peer is broken or hostile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("message kind {kind:#06x} is unknown here")]
    UnknownKind { kind: u16 },
    #[error("{message}: meta ends inside the field {field}: {missing} bytes are missing")]
    Short { message: &'static str, field: &'static str, missing: usize },
    #[error("{message}: {extra} bytes of meta follow the last field")]
    Trailing { message: &'static str, extra: usize },
    #[error("{message}: carries no payload, but {length} bytes came")]
    UnexpectedPayload { message: &'static str, length: usize },
    #[error("{message}: the field {field} must not hold {value}")]
    Value { message: &'static str, field: &'static str, value: u64 },
    #[error("{message}: the identifier {field} is zero")]
    ZeroId { message: &'static str, field: &'static str },
    #[error("{message}: the text {field} is {length} bytes long, at most {max} are allowed")]
    LongText { message: &'static str, field: &'static str, length: usize, max: usize },
    #[error("{message}: the text {field} is not UTF-8")]
    NotUtf8 { message: &'static str, field: &'static str },
}

/// Takes fields off the front of a meta; every failure names the message and the field.
pub(crate) struct Reader<'a> {
    message: &'static str,
    meta: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(message: &'static str, meta: &'a Bytes) -> Reader<'a> {
        Reader { message, meta, at: 0 }
    }

    fn take(&mut self, field: &'static str, length: usize) -> Result<&'a [u8], DecodeError> {
        let rest = &self.meta[self.at..];
        match rest.get(..length) {
            Some(bytes) => {
                self.at += length;
                Ok(bytes)
            }
            None => Err(DecodeError::Short { message: self.message, field, missing: length - rest.len() }),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        Ok(self.take(field, N)?.try_into().expect("take returns exactly the length asked for"))
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self, field: &'static str) -> Result<u128, DecodeError> {
        self.array(field).map(u128::from_le_bytes)
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.value(field, u64::from(other))),
        }
    }

    /// An identifier that must be present.
    pub(crate) fn id<const N: usize, T>(
        &mut self,
        field: &'static str,
        from_bytes: impl FnOnce([u8; N]) -> Option<T>,
    ) -> Result<T, DecodeError> {
        let bytes = self.array(field)?;
        from_bytes(bytes).ok_or(DecodeError::ZeroId { message: self.message, field })
    }

    pub(crate) fn text(&mut self, field: &'static str, max: usize) -> Result<String, DecodeError> {
        let length = usize::from(self.u16(field)?);
        if length > max {
            return Err(DecodeError::LongText { message: self.message, field, length, max });
        }
        let bytes = self.take(field, length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8 { message: self.message, field })?;
        Ok(text.to_owned())
    }

    /// Everything that is left, shared and not copied.
    pub(crate) fn rest(self) -> Bytes {
        self.meta.slice(self.at..)
    }

    pub(crate) fn value(&self, field: &'static str, value: u64) -> DecodeError {
        DecodeError::Value { message: self.message, field, value }
    }

    /// To be called after the last field.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.meta.len() - self.at {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing { message: self.message, extra }),
        }
    }
}

/// For the messages that carry none.
pub(crate) fn no_payload(message: &'static str, payload: &Bytes) -> Result<(), DecodeError> {
    match payload.len() {
        0 => Ok(()),
        length => Err(DecodeError::UnexpectedPayload { message, length }),
    }
}

/// # Panics
/// If `text` is longer than 65535 bytes; callers hold to smaller limits of their own.
pub(crate) fn put_text(meta: &mut BytesMut, text: &str) {
    meta.put_u16_le(u16::try_from(text.len()).expect("texts are bounded before they are encoded"));
    meta.put_slice(text.as_bytes());
}
