//! Which mutations of a session have taken effect: a low-water mark and a bitmap above it.
//!
//! The client names in every stamp the oldest sequence it has no answer for. The mark follows the highest one seen,
//! and what lies below it is forgotten, so the state stays bounded however long the session lives.
//!
//! Invariant: only sequences in `[oldest, oldest + SESSION_WINDOW)` can have a bit set. A sequence's bit is at
//! `sequence % SESSION_WINDOW`, so equal windows have equal words.

use holdfast_protocol::session::{SESSION_WINDOW, Stamp};

pub(crate) const WORDS: usize = (SESSION_WINDOW / 64) as usize;
const _: () = assert!(SESSION_WINDOW.is_multiple_of(64));

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    oldest: u64,
    applied: [u64; WORDS],
}

/// What the window knows of a stamp's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Has not taken effect, and may.
    New,
    /// Has taken effect.
    Applied,
    /// Below the mark: the client has had its answer, or has given up on it. Whether it took effect is forgotten; it
    /// must not take effect now, because later writes of the session may lie over it.
    Forgotten,
}

impl Window {
    pub(crate) fn new() -> Window {
        Window { oldest: 1, applied: [0; WORDS] }
    }

    /// `None` where the mark is 0 or so high that the window would not end below 2^63 (the top bit marks reads).
    pub(crate) fn from_parts(oldest: u64, applied: [u64; WORDS]) -> Option<Window> {
        (1..=SEQUENCE_MAX).contains(&oldest).then_some(Window { oldest, applied })
    }

    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    pub(crate) fn words(&self) -> &[u64; WORDS] {
        &self.applied
    }

    /// The stamp must be [`well_formed`].
    pub fn known(&self, stamp: &Stamp) -> Known {
        if stamp.sequence < self.oldest {
            return Known::Forgotten;
        }
        // A sequence beyond this window lies in the window its own stamp moves to, above everything recorded.
        let recorded = stamp.sequence - self.oldest < SESSION_WINDOW && self.bit(stamp.sequence);
        if recorded { Known::Applied } else { Known::New }
    }

    /// Moves the mark to the stamp's `oldest`, if that is higher, and forgets what falls below.
    pub(crate) fn advance(&mut self, stamp: &Stamp) {
        assert!(well_formed(stamp), "apply refuses a malformed stamp first");
        if stamp.oldest <= self.oldest {
            return;
        }
        if stamp.oldest - self.oldest >= SESSION_WINDOW {
            self.applied = [0; WORDS];
        } else {
            for sequence in self.oldest..stamp.oldest {
                let (word, mask) = place(sequence);
                self.applied[word] &= !mask;
            }
        }
        self.oldest = stamp.oldest;
    }

    /// Records that the stamp's sequence took effect; after [`Window::advance`] with the same stamp.
    pub(crate) fn record(&mut self, stamp: &Stamp) {
        assert!(self.oldest <= stamp.sequence && stamp.sequence - self.oldest < SESSION_WINDOW, "outside the window");
        let (word, mask) = place(stamp.sequence);
        self.applied[word] |= mask;
    }

    fn bit(&self, sequence: u64) -> bool {
        let (word, mask) = place(sequence);
        self.applied[word] & mask != 0
    }
}

/// Highest sequence of a mutation: the top bit belongs to reads and flushes, and additions below must not overflow.
pub const SEQUENCE_MAX: u64 = (1 << 63) - 1 - SESSION_WINDOW;

/// Whether `1 <= oldest <= sequence < oldest + SESSION_WINDOW` and the sequence is that of a mutation. With a
/// well-formed stamp a sequence is never beyond the window once its own `oldest` has moved the mark.
pub fn well_formed(stamp: &Stamp) -> bool {
    1 <= stamp.oldest
        && stamp.oldest <= stamp.sequence
        && stamp.sequence - stamp.oldest < SESSION_WINDOW
        && stamp.sequence <= SEQUENCE_MAX
}

fn place(sequence: u64) -> (usize, u64) {
    let bit = sequence % SESSION_WINDOW;
    ((bit / 64) as usize, 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_protocol::session::{Epoch, Session};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn stamp(sequence: u64, oldest: u64) -> Stamp {
        Stamp { epoch: Epoch(1), session: Session(1), sequence, oldest }
    }

    #[test]
    fn bounds_of_a_stamp() {
        for (sequence, oldest, fine) in [
            (1, 1, true),
            (1024, 1, true),
            (1025, 1, false),
            (0, 0, false),
            (1, 0, false),
            (1, 2, false),
            (SEQUENCE_MAX, SEQUENCE_MAX, true),
            (SEQUENCE_MAX + 1, SEQUENCE_MAX, false),
            (u64::MAX, u64::MAX, false),
        ] {
            assert_eq!(well_formed(&stamp(sequence, oldest)), fine, "{sequence} {oldest}");
        }
    }

    proptest! {
        /// The naive twin keeps every applied sequence for ever.
        #[test]
        fn agrees_with_a_set_without_bounds(steps in prop::collection::vec((0u64..3000, 0u64..1024), 1..300)) {
            let (mut window, mut set, mut mark) = (Window::new(), BTreeSet::new(), 1);
            for (oldest, ahead) in steps {
                let stamp = stamp(oldest + 1 + ahead, oldest + 1);
                window.advance(&stamp);
                mark = mark.max(stamp.oldest);
                let expected = if stamp.sequence < mark {
                    Known::Forgotten
                } else if set.contains(&stamp.sequence) {
                    Known::Applied
                } else {
                    Known::New
                };
                prop_assert_eq!(window.known(&stamp), expected);
                if expected == Known::New {
                    window.record(&stamp);
                    set.insert(stamp.sequence);
                }
                prop_assert_eq!(window.words().iter().map(|w| w.count_ones() as usize).sum::<usize>(),
                    set.range(mark..).count());
            }
        }
    }
}
