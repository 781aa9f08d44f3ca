//! Payloads on their way to their slots, and which batches wait for them.
//!
//! A payload write starts as soon as its append is accepted, beside whatever batch is in flight. A batch is durable
//! only after a flush that was submitted when its own write and every payload write of its records had completed:
//! one flush for all of them, and the only one where payloads are in a batch.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::ops::{DeviceOp, OpId, OpIds, WriteBytes};

/// Payload writes in flight; the rest waits, so that reads have their share of the disk.
const WRITES_MAX: usize = 32;

#[derive(Default)]
pub(super) struct PayloadWrites {
    queue: VecDeque<(Waiting, u64, Bytes)>,
    in_flight: BTreeMap<OpId, Waiting>,
    next_number: u64,
}

#[derive(Clone, Copy)]
struct Waiting {
    /// Rises from write to write.
    number: u64,
    /// The batch of its record. Rises too.
    sequence: u64,
}

impl PayloadWrites {
    pub fn push(&mut self, sequence: u64, offset: u64, data: Bytes) {
        self.queue.push_back((Waiting { number: self.next_number, sequence }, offset, data));
        self.next_number += 1;
    }

    pub fn take_ops(&mut self, ids: &mut OpIds) -> Vec<DeviceOp> {
        let mut ops = Vec::new();
        while self.in_flight.len() < WRITES_MAX
            && let Some((waiting, offset, data)) = self.queue.pop_front()
        {
            let id = ids.take();
            self.in_flight.insert(id, waiting);
            ops.push(DeviceOp::Write { id, offset, data: WriteBytes::aligned(data), durable: false });
        }
        ops
    }

    /// Whether it was one of these.
    pub fn complete(&mut self, id: OpId) -> bool {
        self.in_flight.remove(&id).is_some()
    }

    /// Whether a write of a batch up to `sequence` has not completed.
    pub fn pending(&self, sequence: u64) -> bool {
        self.unfinished().any(|waiting| waiting.sequence <= sequence)
    }

    /// The number of the next write.
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Whether every write with a lower number has completed.
    pub fn completed_below(&self, number: u64) -> bool {
        self.unfinished().all(|waiting| waiting.number >= number)
    }

    pub fn clear_queue(&mut self) {
        self.queue.clear();
    }

    /// Those in flight, and the first in the queue, which precedes the rest of it.
    fn unfinished(&self) -> impl Iterator<Item = &Waiting> {
        self.in_flight.values().chain(self.queue.front().map(|(waiting, _, _)| waiting))
    }
}
