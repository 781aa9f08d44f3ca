//! Received plaintext, cut into frames.
//!
//! Meta and payload of a short frame are slices of the buffer its bytes arrived in: whoever keeps one keeps that
//! buffer, at most [`CHUNK_BYTES`] or the frame itself, whichever is larger. A long payload is gathered in memory of its
//! own, which begins where a page does: a disk takes it from there without another copy.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::frame::{Class, Frame, FrameError, HEADER_BYTES, Header, Limits};

/// Capacity of a fresh buffer: two full TLS records. Idle connections hold one of these.
const CHUNK_BYTES: usize = 32 << 10;
/// A payload from this length on has memory of its own: what alignment costs is a quarter of it at most.
const LONG_BYTES_MIN: usize = 32 << 10;
/// What direct I/O asks of an address.
const ALIGNMENT: usize = 4096;
/// Room behind a long payload, for the beginning of the next frame: one read takes both.
const AHEAD_BYTES: usize = 4 << 10;

pub(crate) struct Inbox {
    /// The frame under way: its header, or what follows that, but no byte of a long payload.
    buffer: BytesMut,
    /// Of the frame whose body is still incomplete; already cut off the buffer.
    header: Option<Header>,
    long: Option<Long>,
    ready: VecDeque<(Class, Frame)>,
    /// Came behind a frame of the greeting: only its reader knows what the next one may be.
    held: BytesMut,
    failure: Option<FrameError>,
    limits: Limits,
}

/// A frame whose payload is being gathered.
struct Long {
    class: Class,
    kind: u16,
    meta: Bytes,
    /// The payload is `[start, end)`; what is behind it came with the same read.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Long {
    fn new(header: Header, meta: Bytes) -> Long {
        let length = header.payload_length as usize;
        let mut bytes = Vec::with_capacity(ALIGNMENT + length + AHEAD_BYTES);
        let start = (bytes.as_ptr() as usize).next_multiple_of(ALIGNMENT) - bytes.as_ptr() as usize;
        bytes.resize(start, 0);
        Long { class: header.class, kind: header.kind, meta, bytes, start, end: start + length }
    }

    /// The frame, and what came behind it.
    fn finish(mut self) -> (Class, Frame, Vec<u8>) {
        let ahead = self.bytes.split_off(self.end);
        let payload = Bytes::from(self.bytes).slice(self.start..);
        (self.class, Frame { kind: self.kind, meta: self.meta, payload }, ahead)
    }
}

impl Inbox {
    pub fn new(limits: Limits) -> Inbox {
        Inbox {
            buffer: BytesMut::new(),
            header: None,
            long: None,
            ready: VecDeque::new(),
            held: BytesMut::new(),
            failure: None,
            limits,
        }
    }

    /// Counts from the next header on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub fn extend(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.failure.is_none() {
            if self.limits.is_greeting() && !self.ready.is_empty() {
                self.held.extend_from_slice(bytes);
                return;
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.missing()));
            match &mut self.long {
                Some(long) => long.bytes.extend_from_slice(now),
                None => {
                    if self.buffer.capacity() - self.buffer.len() < now.len() {
                        self.buffer.reserve(self.missing().max(CHUNK_BYTES));
                    }
                    self.buffer.extend_from_slice(now);
                }
            }
            self.advance();
            bytes = later;
        }
    }

    /// Where a long payload is under way: memory to read its next bytes to, as many as there is room for. Then
    /// [`Inbox::on_long_read`].
    pub fn long(&mut self) -> Option<&mut Vec<u8>> {
        self.long.as_mut().map(|long| &mut long.bytes)
    }

    pub fn on_long_read(&mut self) {
        if self.long.as_ref().is_some_and(|long| long.bytes.len() >= long.end) {
            let (class, frame, ahead) = self.long.take().expect("looked at").finish();
            self.ready.push_back((class, frame));
            self.extend(&ahead);
        }
    }

    /// `None` where the next frame is still incomplete.
    pub fn next(&mut self) -> Result<Option<(Class, Frame)>, FrameError> {
        if self.ready.is_empty() && !self.held.is_empty() {
            let held = std::mem::take(&mut self.held);
            self.extend(&held);
        }
        match (self.ready.pop_front(), &self.failure) {
            (Some(frame), _) => Ok(Some(frame)),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Ok(None),
        }
    }

    /// Bytes until something can be said of the frame under way; never zero.
    fn missing(&self) -> usize {
        match (&self.long, &self.header) {
            (Some(long), _) => long.end - long.bytes.len(),
            (None, None) => HEADER_BYTES - self.buffer.len(),
            (None, Some(header)) => buffered_bytes(header) - self.buffer.len(),
        }
    }

    /// Goes on as far as the bytes reach.
    fn advance(&mut self) {
        while self.missing() == 0 {
            if self.long.is_some() {
                return self.on_long_read();
            }
            let Some(header) = self.header else {
                let bytes = self.buffer.first_chunk::<HEADER_BYTES>().expect("no byte of it is missing");
                match Header::decode(bytes, self.limits) {
                    Ok(header) => self.header = Some(header),
                    Err(failure) => return self.failure = Some(failure),
                }
                self.buffer.advance(HEADER_BYTES);
                continue;
            };
            self.header = None;
            let meta = self.cut(header.meta_length as usize);
            if is_long(&header) {
                self.long = Some(Long::new(header, meta));
                return;
            }
            let payload = self.cut(header.payload_length as usize);
            self.ready.push_back((header.class, Frame { kind: header.kind, meta, payload }));
            return;
        }
    }

    /// An empty slice holds no buffer.
    fn cut(&mut self, length: usize) -> Bytes {
        if length == 0 { Bytes::new() } else { self.buffer.split_to(length).freeze() }
    }
}

fn is_long(header: &Header) -> bool {
    header.payload_length as usize >= LONG_BYTES_MIN
}

/// What of a frame's body goes through the buffer.
fn buffered_bytes(header: &Header) -> usize {
    if is_long(header) { header.meta_length as usize } else { header.body_bytes() }
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
                // As the bytes come from TLS, or straight from the socket.
                match inbox.long().filter(|_| *cut % 2 == 0) {
                    Some(long) => {
                        let room = (long.capacity() - long.len()).min(now.len());
                        long.extend_from_slice(&now[..room]);
                        inbox.on_long_read();
                        inbox.extend(&now[room..]);
                    }
                    None => inbox.extend(now),
                }
                while let Some((class, frame)) = inbox.next().expect("valid frames") {
                    let address = frame.payload.as_ptr() as usize;
                    prop_assert!(frame.payload.len() < LONG_BYTES_MIN || address.is_multiple_of(ALIGNMENT));
                    let frame = (class, frame);
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
            prop_assert!(inbox.buffer.capacity() <= crate::frame::META_BYTES_MAX + CHUNK_BYTES);
            let longest = crate::frame::PAYLOAD_BYTES_MAX + ALIGNMENT + AHEAD_BYTES;
            prop_assert!(inbox.long().is_none_or(|long| long.capacity() <= longest));
        }
    }

    #[test]
    fn what_follows_the_greeting_is_judged_by_the_limits_that_its_reader_sets() {
        let hello = Frame { kind: 1, meta: Bytes::from_static(b"hello"), payload: Bytes::new() };
        let long = Frame { kind: 0x0100, meta: Bytes::new(), payload: Bytes::from(vec![7; 100_000]) };
        let mut inbox = Inbox::new(Limits::GREETING);
        inbox.extend(&[wire(Class::Control, &hello), wire(Class::Data, &long)].concat());
        assert_eq!(inbox.next(), Ok(Some((Class::Control, hello))));
        inbox.set_limits(Limits::OPEN);
        assert_eq!(inbox.next(), Ok(Some((Class::Data, long.clone()))));
        let mut inbox = Inbox::new(Limits::GREETING);
        inbox.extend(&wire(Class::Data, &long));
        assert!(inbox.next().is_err());
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
