//! Received plaintext, cut into frames.
//!
//! Meta and payload of a frame are slices of the buffer its bytes arrived in: whoever keeps one keeps that buffer,
//! at most [`CHUNK_BYTES`] or the frame itself, whichever is larger.

use bytes::{Buf, Bytes, BytesMut};

use crate::frame::{Class, Frame, FrameError, HEADER_BYTES, Header, Limits};

/// Capacity of a fresh buffer: two full TLS records. Idle connections hold one of these.
const CHUNK_BYTES: usize = 32 << 10;

pub(crate) struct Inbox {
    buffer: BytesMut,
    /// Of the frame whose body is still incomplete; already cut off the buffer.
    header: Option<Header>,
    limits: Limits,
}

impl Inbox {
    pub fn new(limits: Limits) -> Inbox {
        Inbox { buffer: BytesMut::new(), header: None, limits }
    }

    /// Counts from the next header on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub fn extend(&mut self, bytes: &[u8]) {
        if self.buffer.capacity() - self.buffer.len() < bytes.len() {
            self.buffer.reserve(bytes.len().max(CHUNK_BYTES));
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// `None` where the next frame is still incomplete.
    pub fn next(&mut self) -> Result<Option<(Class, Frame)>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
                let header = Header::decode(bytes, self.limits)?;
                self.buffer.advance(HEADER_BYTES);
                self.header = Some(header);
                header
            }
        };
        if self.buffer.len() < header.body_bytes() {
            // One exact allocation for a long frame instead of growth by doubling; its length was checked.
            self.buffer.reserve(header.body_bytes() - self.buffer.len());
            return Ok(None);
        }
        self.header = None;
        let meta = self.cut(header.meta_length as usize);
        let payload = self.cut(header.payload_length as usize);
        Ok(Some((header.class, Frame { kind: header.kind, meta, payload })))
    }

    /// Everything that is in no frame yet.
    #[cfg(test)]
    pub fn take_bytes(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    /// An empty slice holds no buffer.
    fn cut(&mut self, length: usize) -> Bytes {
        if length == 0 { Bytes::new() } else { self.buffer.split_to(length).freeze() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wire(class: Class, frame: &Frame) -> Vec<u8> {
        [&Header::of(class, frame).encode()[..], &frame.meta, &frame.payload].concat()
    }

    fn frames() -> impl Strategy<Value = Vec<(Class, Frame)>> {
        let bytes = |max| proptest::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from);
        let frame = (0usize..3, any::<u16>(), bytes(200), bytes(70_000))
            .prop_map(|(class, kind, meta, payload)| (Class::ALL[class], Frame { kind, meta, payload }));
        proptest::collection::vec(frame, 0..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_survive_any_cutting(frames in frames(), cuts in proptest::collection::vec(1usize..20_000, 1..20)) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(class, frame)| wire(*class, frame)).collect();
            let mut inbox = Inbox::new(Limits::OPEN);
            let (mut received, mut rest) = (Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at(rest.len().min(*cut));
                inbox.extend(now);
                while let Some(frame) = inbox.next().expect("valid frames") {
                    received.push(frame);
                }
                rest = later;
            }
            prop_assert_eq!(received, frames);
        }

        #[test]
        fn any_bytes_never_panic_nor_reserve_more_than_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..500),
            honest in 0usize..16)
        {
            let mut start = Header { class: Class::Data, kind: 0x0100, meta_length: 7, payload_length: 9 }.encode();
            for (at, byte) in bytes.iter().take(HEADER_BYTES).enumerate().skip(honest) {
                start[at] = *byte;
            }
            let mut inbox = Inbox::new(Limits::OPEN);
            inbox.extend(&start);
            inbox.extend(&bytes);
            while let Ok(Some(_)) = inbox.next() {}
            let longest = crate::frame::META_BYTES_MAX + crate::frame::PAYLOAD_BYTES_MAX + CHUNK_BYTES;
            prop_assert!(inbox.buffer.capacity() <= longest);
        }
    }

    #[test]
    fn meta_and_payload_share_the_receive_buffer() {
        let frame = Frame { kind: 0x0100, meta: Bytes::from_static(b"meta"), payload: Bytes::from_static(b"payload") };
        let mut inbox = Inbox::new(Limits::OPEN);
        inbox.extend(&wire(Class::Data, &frame));
        let (_, received) = inbox.next().expect("valid").expect("complete");
        assert_eq!(received, frame);
        assert_eq!(received.meta.as_ptr().wrapping_add(4), received.payload.as_ptr());
    }
}
