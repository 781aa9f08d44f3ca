//! The requests that are not completed, in the order of their submission, with their sequence numbers.

use std::collections::BTreeMap;

use holdfast_block::{Operation, Request};
use holdfast_consensus::Timestamp;
use holdfast_protocol::session::SESSION_WINDOW;

/// Sequences of reads and flushes have this bit: they name the answer, the replicas do not record them.
pub(crate) const UNRECORDED: u64 = 1 << 63;

#[derive(Debug)]
pub(crate) struct Pending {
    pub request: Request,
    pub sequence: u64,
    pub submitted: Timestamp,
    /// When it was last sent to the present leader; `None` where it was not.
    pub sent: Option<Timestamp>,
    /// Times it was sent to the present leader.
    pub sends: u32,
}

/// Invariant: `by_sequence` maps every pending request's sequence to its key in `by_order`, and nothing else.
#[derive(Debug)]
pub(crate) struct Outstanding {
    by_order: BTreeMap<u64, Pending>,
    by_sequence: BTreeMap<u64, u64>,
    order_next: u64,
    mutation_next: u64,
    unrecorded_next: u64,
}

impl Outstanding {
    pub fn new() -> Outstanding {
        Outstanding {
            by_order: BTreeMap::new(),
            by_sequence: BTreeMap::new(),
            order_next: 0,
            mutation_next: 1,
            unrecorded_next: UNRECORDED,
        }
    }

    pub fn len(&self) -> u64 {
        self.by_order.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.by_order.is_empty()
    }

    /// The lowest mutation sequence without an answer; the next one to come where all are answered.
    pub fn oldest(&self) -> u64 {
        match self.by_sequence.first_key_value() {
            Some((sequence, _)) if *sequence < UNRECORDED => *sequence,
            _ => self.mutation_next,
        }
    }

    /// Whether one more mutation fits the window that the replicas keep.
    pub fn window_open(&self) -> bool {
        self.mutation_next < self.oldest() + SESSION_WINDOW
    }

    /// Submission time of the request that has waited longest.
    pub fn waiting_since(&self) -> Option<Timestamp> {
        self.by_order.values().next().map(|pending| pending.submitted)
    }

    /// Whether a sequence with [`UNRECORDED`] was ever given out.
    pub fn was_issued(&self, sequence: u64) -> bool {
        (UNRECORDED..self.unrecorded_next).contains(&sequence)
    }

    /// A sequence for a message that is no request of the user.
    pub fn unrecorded(&mut self) -> u64 {
        let sequence = self.unrecorded_next;
        self.unrecorded_next += 1;
        sequence
    }

    /// Returns the key of the new request.
    pub fn insert(&mut self, now: Timestamp, request: Request) -> u64 {
        let sequence = match request.operation {
            Operation::Read { .. } | Operation::Flush => self.unrecorded(),
            Operation::Write { .. } | Operation::WriteZeroes { .. } | Operation::Discard { .. } => {
                let sequence = self.mutation_next;
                self.mutation_next += 1;
                sequence
            }
        };
        let order = self.order_next;
        self.order_next += 1;
        self.by_sequence.insert(sequence, order);
        self.by_order.insert(order, Pending { request, sequence, submitted: now, sent: None, sends: 0 });
        order
    }

    pub fn remove(&mut self, sequence: u64) -> Option<Pending> {
        let order = self.by_sequence.remove(&sequence)?;
        Some(self.by_order.remove(&order).expect("every sequence leads to its pending request"))
    }

    /// Removes the request that was submitted first.
    pub fn remove_first(&mut self) -> Option<Pending> {
        let (_, pending) = self.by_order.pop_first()?;
        self.by_sequence.remove(&pending.sequence);
        Some(pending)
    }

    pub fn get_mut(&mut self, order: u64) -> Option<&mut Pending> {
        self.by_order.get_mut(&order)
    }

    /// In the order of submission.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Pending)> {
        self.by_order.iter().map(|(order, pending)| (*order, pending))
    }

    /// Forgets what was sent: a new leader has seen none of it.
    pub fn mark_unsent(&mut self) {
        for pending in self.by_order.values_mut() {
            pending.sent = None;
            pending.sends = 0;
        }
    }

    /// Empties the table, in the order of submission.
    pub fn drain(&mut self) -> impl Iterator<Item = Pending> + use<> {
        self.by_sequence.clear();
        std::mem::take(&mut self.by_order).into_values()
    }
}
