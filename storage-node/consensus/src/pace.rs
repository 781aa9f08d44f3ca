//! [`Pace`]: how much a leader takes in while a peer is brought up that would otherwise never get there.
//!
//! A peer that needs more than the leader keeps has to gain on the writes of clients. While it makes progress, clients
//! get half of what it gains, or none of that where it is to be quick, and [`FLOOR`] in any case: what is missing shrinks
//! with every byte. Without progress nothing is held back, so a peer that is gone, or stuck, slows nobody down.

use std::time::Duration;

use crate::time::Timestamp;

/// Bytes of the log not sent to a peer, beyond the window in flight, from which on proposals are paced. One that keeps
/// up has been sent everything.
pub(crate) const LAG_BYTES_MAX: usize = 4 << 20;
/// From here on clients get the floor alone: what is missing is gone within a second at any rate worth the name.
pub(crate) const FAR_BYTES_MAX: usize = 32 << 20;
/// Proposals are paced until a peer has made no progress for so long: a checkpoint or the end of a rebuild takes as
/// long on a busy disk.
const PATIENCE: Duration = Duration::from_secs(1);
/// Of the bytes a peer gains, the part that may be proposed.
const SHARE: u64 = 2;
/// Taken at once after a calm moment.
const CREDIT_MAX: i64 = 4 << 20;
/// Always granted, in bytes per millisecond: a rebuild that is slower than this is not worth a volume's standstill.
const FLOOR: u64 = 16 << 10;
/// A refused proposal is worth another try after this; and what is gained is added up for as long.
const RETRY_AFTER: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Below zero by less than one proposal.
    credit: i64,
    /// When the credit last rose.
    earned_at: Timestamp,
    /// The clients' part of what was gained since.
    gained: u64,
    /// Proposals are paced until then, for a peer that is brought up beside the log.
    until: Timestamp,
    /// The same for peers that the log brings up; over as soon as none of them lags.
    lagging_until: Timestamp,
    /// Somebody was refused and may try again then.
    retry_at: Option<Timestamp>,
}

impl Pace {
    /// A peer that is brought up beside the log goes on, and `bytes` more of it count for clients.
    pub(crate) fn on_progress(&mut self, now: Timestamp, bytes: usize) {
        self.gain(now, bytes);
        self.until = now + PATIENCE;
    }

    /// The same for a peer that lags behind in the log.
    pub(crate) fn on_lagging(&mut self, now: Timestamp, bytes: usize) {
        self.gain(now, bytes);
        self.lagging_until = now + PATIENCE;
    }

    /// No peer lags behind in the log any more.
    pub(crate) fn on_caught_up(&mut self) {
        self.lagging_until = Timestamp::default();
    }

    fn gain(&mut self, now: Timestamp, bytes: usize) {
        if !self.paces(now) {
            (self.credit, self.earned_at, self.gained) = (CREDIT_MAX, now, 0);
        }
        self.gained = self.gained.saturating_add(bytes as u64 / SHARE);
    }

    fn paces(&self, now: Timestamp) -> bool {
        now < self.until.max(self.lagging_until)
    }

    pub(crate) fn admits(&mut self, now: Timestamp) -> bool {
        if !self.paces(now) {
            return true;
        }
        let waited = now.since(self.earned_at);
        if waited >= RETRY_AFTER {
            let floor = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX).saturating_mul(FLOOR);
            let earned = i64::try_from(self.gained.max(floor)).unwrap_or(i64::MAX);
            self.credit = self.credit.saturating_add(earned).min(CREDIT_MAX);
            (self.earned_at, self.gained) = (now, 0);
        }
        if self.credit <= 0 {
            self.retry_at = Some(now + RETRY_AFTER);
        }
        self.credit > 0
    }

    pub(crate) fn on_taken(&mut self, now: Timestamp, bytes: usize) {
        if self.paces(now) {
            self.credit = self.credit.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        self.retry_at
    }

    pub(crate) fn on_deadline(&mut self, now: Timestamp) {
        self.retry_at = self.retry_at.filter(|at| *at > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp(1_000_000_000 + milliseconds * 1_000_000)
    }

    /// Bytes taken in proposals of 64 KiB each time there is credit, once a millisecond.
    fn taken(pace: &mut Pace, from: u64, to: u64, gained_each: usize) -> usize {
        let mut taken = 0;
        for now in (from..to).map(at) {
            if gained_each > 0 {
                pace.on_progress(now, gained_each);
            }
            while pace.admits(now) && pace.paces(now) {
                pace.on_taken(now, 64 << 10);
                taken += 64 << 10;
            }
        }
        taken
    }

    #[test]
    fn clients_get_half_of_what_the_peer_gains_or_the_floor() {
        for (gained, granted) in [(128 << 10, 64 << 10), (1, FLOOR as usize)] {
            let bytes = taken(&mut Pace::default(), 0, 1000, gained);
            let expected = CREDIT_MAX as usize + 1000 * granted;
            assert!(bytes.abs_diff(expected) < 1 << 20, "{bytes} of {expected}");
        }
    }

    #[test]
    fn nobody_waits_for_a_peer_without_progress() {
        let mut pace = Pace::default();
        assert!(pace.admits(at(0)), "nothing is paced at first");
        taken(&mut pace, 0, 100, 1);
        assert!(!pace.admits(at(99)) && pace.deadline() == Some(at(99) + RETRY_AFTER));
        pace.on_deadline(at(99) + RETRY_AFTER);
        assert_eq!(pace.deadline(), None);
        assert!(pace.admits(at(99) + PATIENCE));
        pace.on_taken(at(99) + PATIENCE, usize::MAX);
        assert!(pace.admits(at(99) + PATIENCE), "what is not paced costs no credit");
    }
    #[test]
    fn nobody_waits_for_a_peer_that_has_caught_up() {
        let mut pace = Pace::default();
        pace.on_lagging(at(0), 1);
        pace.on_taken(at(0), 8 << 20);
        assert!(!pace.admits(at(1)));
        pace.on_progress(at(1), 1);
        pace.on_caught_up();
        assert!(!pace.admits(at(2)), "another is brought up beside the log");
        let mut pace = Pace::default();
        pace.on_lagging(at(0), 1);
        pace.on_taken(at(0), 8 << 20);
        pace.on_caught_up();
        assert!(pace.admits(at(1)));
    }
}
