//! Bytes on their way out: small headers gathered, data by reference.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// Data at least this long is queued by reference; copying less is cheaper than a slice of its own.
const BY_REFERENCE_MIN: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Output {
    queue: VecDeque<Bytes>,
    /// The end of the stream, not yet in `queue`.
    tail: BytesMut,
    queued: usize,
}

impl Output {
    pub fn len(&self) -> usize {
        self.queued + self.tail.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where headers are written.
    pub fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    pub fn put_data(&mut self, data: Bytes) {
        if data.len() < BY_REFERENCE_MIN {
            self.tail.extend_from_slice(&data);
            return;
        }
        self.seal();
        self.queued += data.len();
        self.queue.push_back(data);
    }

    /// Fills `slices` from the front of the stream; returns how many it filled.
    pub fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.seal();
        let mut filled = 0;
        for (slice, data) in slices.iter_mut().zip(&self.queue) {
            *slice = IoSlice::new(data);
            filled += 1;
        }
        filled
    }

    /// Panics if more was sent than there is.
    pub fn advance(&mut self, mut sent: usize) {
        self.queued = self.queued.checked_sub(sent).expect("no more is sent than was queued");
        while sent > 0 {
            let front = self.queue.front_mut().expect("the queue holds what it counts");
            if front.len() > sent {
                front.advance(sent);
                return;
            }
            sent -= front.len();
            self.queue.pop_front();
        }
    }

    pub fn clear(&mut self) {
        *self = Output::default();
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            let data = self.tail.split().freeze();
            self.queued += data.len();
            self.queue.push_back(data);
        }
    }
}
