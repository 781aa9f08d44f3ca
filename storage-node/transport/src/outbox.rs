//! Frames that wait to be written: one queue per class, bounded in bytes, most urgent first.
//!
//! A frame that has begun is finished before another one starts; so an urgent frame waits for at most one other, or, on
//! a socket that takes them as they lie, for a few short ones that are written with it.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::frame::{Class, Frame, HEADER_BYTES, Header};
use crate::outgoing::OUTGOING_BYTES;

/// Bytes that may wait per connection and class. A frame is always taken by an empty queue, however long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBytes {
    pub control: usize,
    pub data: usize,
    pub bulk: usize,
}

impl Default for QueueBytes {
    /// Enough for a second of heartbeats and votes, sixteen of the longest requests, and two of the longest frames.
    fn default() -> QueueBytes {
        QueueBytes { control: 4 << 20, data: 16 << 20, bulk: 8 << 20 }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    /// Of the frames in here and of the begun one if it came from here.
    bytes: usize,
    bytes_max: usize,
    /// A frame was refused since the queue was last below half.
    refused: bool,
}

struct Begun {
    class: Class,
    header: [u8; HEADER_BYTES],
    frame: Frame,
    taken: usize,
}

impl Begun {
    /// What of its parts is not taken, in order; empty ones among them.
    fn rest(&self) -> [&[u8]; 3] {
        let mut taken = self.taken;
        [&self.header[..], &self.frame.meta, &self.frame.payload].map(|part| {
            let (_, rest) = part.split_at(taken.min(part.len()));
            taken = taken.saturating_sub(part.len());
            rest
        })
    }
}

pub(crate) struct Outbox {
    queues: [Queue; 3],
    /// In the order in which they go out; only of the first a part may be taken.
    begun: VecDeque<Begun>,
    /// Goes out when everything else has; nothing is taken after it.
    last: Option<Frame>,
}

impl Outbox {
    pub fn new(limits: QueueBytes) -> Outbox {
        let queue = |bytes_max| Queue { bytes_max, ..Queue::default() };
        Outbox {
            queues: [queue(limits.control), queue(limits.data), queue(limits.bulk)],
            begun: VecDeque::new(),
            last: None,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.last.is_none() && self.queues.iter().all(|queue| queue.frames.is_empty())
    }

    pub fn push(&mut self, class: Class, frame: Frame) -> Result<(), Full> {
        let queue = &mut self.queues[class.index()];
        let bytes = frame.wire_bytes();
        if queue.bytes > 0 && queue.bytes + bytes > queue.bytes_max {
            queue.refused = true;
            return Err(Full);
        }
        queue.bytes += bytes;
        queue.frames.push_back(frame);
        Ok(())
    }

    /// The farewell; of several the first stays.
    pub fn push_last(&mut self, frame: Frame) {
        self.last.get_or_insert(frame);
    }

    /// Forgets what waits, except the frame that has begun: the peer could not find the next one otherwise.
    pub fn forget(&mut self) {
        self.begun.retain(|begun| begun.taken > 0);
        for queue in &mut self.queues {
            queue.frames.clear();
        }
    }

    /// The next bytes to write; `None` where nothing waits.
    pub fn front(&mut self) -> Option<&[u8]> {
        if self.begun.is_empty() {
            self.begin_next()?;
        }
        self.begun.front()?.rest().into_iter().find(|part| !part.is_empty())
    }

    /// As many of the next pieces as fit into `slices`, of short frames several; returns how many.
    pub fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut bytes: usize = self.begun.iter().map(|begun| begun.frame.wire_bytes()).sum();
        while bytes < OUTGOING_BYTES && self.begun.len() < slices.len() {
            match self.begin_next() {
                Some(begun) => bytes += begun,
                None => break,
            }
        }
        let pieces = self.begun.iter().flat_map(Begun::rest).filter(|piece| !piece.is_empty());
        let mut filled = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
            filled += 1;
        }
        filled
    }

    /// Its bytes.
    fn begin_next(&mut self) -> Option<usize> {
        let (class, frame) = self.take_next()?;
        let bytes = frame.wire_bytes();
        self.begun.push_back(Begun { class, header: Header::of(class, &frame).encode(), frame, taken: 0 });
        Some(bytes)
    }

    fn take_next(&mut self) -> Option<(Class, Frame)> {
        for class in Class::ALL {
            if let Some(frame) = self.queues[class.index()].frames.pop_front() {
                return Some((class, frame));
            }
        }
        self.last.take().map(|frame| (Class::Control, frame))
    }

    /// `count` bytes of [`Outbox::front`] or [`Outbox::slices`] are on their way.
    pub fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let begun = self.begun.front_mut().expect("the bytes that are taken were given out");
            let bytes = begun.frame.wire_bytes();
            let taken = count.min(bytes - begun.taken);
            begun.taken += taken;
            count -= taken;
            if begun.taken == bytes {
                let queue = &mut self.queues[begun.class.index()];
                // The farewell was never counted.
                queue.bytes = queue.bytes.saturating_sub(bytes);
                self.begun.pop_front();
            }
        }
    }

    /// Whether a queue that refused a frame has room for more than a trickle again; told once.
    pub fn take_writable(&mut self) -> bool {
        let mut writable = false;
        for queue in &mut self.queues {
            if queue.refused && queue.bytes <= queue.bytes_max / 2 {
                queue.refused = false;
                writable = true;
            }
        }
        writable
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::frame::Limits;
    use crate::inbox::Inbox;

    fn frame(kind: u16, payload_bytes: usize) -> Frame {
        Frame { kind, meta: Bytes::from_static(b"m"), payload: Bytes::from(vec![kind as u8; payload_bytes]) }
    }

    fn drain(outbox: &mut Outbox, step: usize) -> Vec<u16> {
        let mut inbox = Inbox::new(Limits::OPEN);
        while let Some(bytes) = outbox.front() {
            let count = bytes.len().min(step);
            inbox.extend(&bytes[..count]);
            outbox.advance(count);
        }
        let mut kinds = Vec::new();
        while let Some((_, received)) = inbox.next().expect("whole frames") {
            assert!(received.payload.iter().all(|byte| *byte == received.kind as u8));
            kinds.push(received.kind);
        }
        kinds
    }

    #[test]
    fn urgent_frames_overtake_but_do_not_interrupt() {
        let mut outbox = Outbox::new(QueueBytes::default());
        outbox.push(Class::Bulk, frame(1, 100)).expect("room");
        outbox.front().expect("a frame waits");
        outbox.advance(3);
        outbox.push_last(frame(9, 0));
        outbox.push(Class::Bulk, frame(2, 100)).expect("room");
        outbox.push(Class::Data, frame(3, 0)).expect("room");
        outbox.push(Class::Control, frame(4, 100)).expect("room");
        outbox.push(Class::Data, frame(5, 100)).expect("room");
        let mut inbox = Inbox::new(Limits::OPEN);
        inbox.extend(&Header::of(Class::Bulk, &frame(1, 100)).encode()[..3]);
        while let Some(bytes) = outbox.front() {
            let count = bytes.len().min(7);
            inbox.extend(&bytes[..count]);
            outbox.advance(count);
        }
        let mut kinds = Vec::new();
        while let Some((_, frame)) = inbox.next().expect("whole frames") {
            kinds.push(frame.kind);
        }
        assert_eq!(kinds, [1, 4, 3, 5, 2, 9]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_full_queue_refuses_until_it_is_half_empty() {
        let mut outbox = Outbox::new(QueueBytes { control: 1000, data: 1000, bulk: 10 });
        let size = frame(1, 183).wire_bytes();
        assert_eq!(size, 200);
        for _ in 0..5 {
            outbox.push(Class::Data, frame(1, 183)).expect("room");
        }
        assert!(!outbox.take_writable());
        assert_eq!(outbox.push(Class::Data, frame(1, 0)), Err(Full));
        // The bound is per class, and an empty queue takes any frame.
        outbox.push(Class::Control, frame(2, 0)).expect("room");
        outbox.push(Class::Bulk, frame(3, 5000)).expect("an empty queue takes any frame");
        assert_eq!(outbox.push(Class::Bulk, frame(3, 0)), Err(Full));
        let take_frame = |outbox: &mut Outbox| loop {
            let count = outbox.front().expect("frames wait").len();
            outbox.advance(count);
            if outbox.begun.is_empty() {
                break;
            }
        };
        take_frame(&mut outbox);
        for _ in 0..2 {
            take_frame(&mut outbox);
            assert!(!outbox.take_writable());
        }
        take_frame(&mut outbox);
        assert!(outbox.take_writable(), "two of five frames are left");
        assert!(!outbox.take_writable(), "told once");
        assert_eq!(drain(&mut outbox, 64), [1, 1, 3]);
        assert!(outbox.take_writable(), "the bulk queue had refused a frame too");
    }

    #[test]
    fn pieces_are_given_out_as_they_lie_several_short_frames_at_once() {
        let mut outbox = Outbox::new(QueueBytes::default());
        let frames: Vec<Frame> = (1..=40).map(|kind| frame(kind, usize::from(kind) * 997 % 9000)).collect();
        for frame in &frames {
            outbox.push(Class::Data, frame.clone()).expect("room");
        }
        outbox.push(Class::Data, frame(41, 1 << 20)).expect("room");
        let mut bytes = Vec::new();
        let mut calls = 0;
        loop {
            let mut slices = [IoSlice::new(&[]); 32];
            let filled = outbox.slices(&mut slices);
            if filled == 0 {
                break;
            }
            let given: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).collect();
            // As a socket would take them.
            let taken = given.len().min(50_001);
            bytes.extend_from_slice(&given[..taken]);
            outbox.advance(taken);
            calls += 1;
        }
        let frames = frames.into_iter().chain([frame(41, 1 << 20)]);
        let expected: Vec<u8> = frames
            .flat_map(|frame| [&Header::of(Class::Data, &frame).encode()[..], &frame.meta, &frame.payload].concat())
            .collect();
        assert!(bytes == expected && outbox.is_empty());
        assert!(calls < 40, "{calls} calls");
    }

    #[test]
    fn forgetting_keeps_the_frame_that_has_begun() {
        let mut outbox = Outbox::new(QueueBytes::default());
        outbox.push(Class::Data, frame(1, 50)).expect("room");
        outbox.push(Class::Data, frame(2, 50)).expect("room");
        let head = outbox.front().expect("a frame waits").to_vec();
        outbox.advance(head.len());
        outbox.forget();
        outbox.push_last(frame(9, 0));
        let mut inbox = Inbox::new(Limits::OPEN);
        inbox.extend(&head);
        while let Some(bytes) = outbox.front() {
            let count = bytes.len();
            inbox.extend(bytes);
            outbox.advance(count);
        }
        let kinds: Vec<u16> =
            std::iter::from_fn(|| inbox.next().expect("whole frames")).map(|(_, frame)| frame.kind).collect();
        assert_eq!(kinds, [1, 9]);
    }
}
