//! The longest time in which requests were outstanding and none was completed.

use std::time::Duration;

use holdfast_consensus::Timestamp;

#[derive(Debug, Default)]
pub(crate) struct Gap {
    outstanding: u64,
    /// The last completion, or the submission that ended a time without requests.
    last: Timestamp,
    longest: Duration,
}

impl Gap {
    /// The running gap counts.
    pub fn longest(&self, now: Timestamp) -> Duration {
        if self.outstanding == 0 { self.longest } else { self.longest.max(now.since(self.last)) }
    }

    pub fn on_submit(&mut self, now: Timestamp) {
        if self.outstanding == 0 {
            self.last = now;
        }
        self.outstanding += 1;
    }

    /// Panics if nothing is outstanding.
    pub fn on_complete(&mut self, now: Timestamp) {
        self.longest = self.longest(now);
        self.last = now;
        self.outstanding = self.outstanding.checked_sub(1).expect("what completes was submitted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_no_gap_and_a_running_gap_counts() {
        let at = |ms: u64| Timestamp(ms * 1_000_000);
        let ms = Duration::from_millis;
        let mut gap = Gap::default();
        assert_eq!(gap.longest(at(1000)), ms(0));
        gap.on_submit(at(1000));
        gap.on_submit(at(1100));
        gap.on_complete(at(1130));
        assert_eq!(gap.longest(at(1130)), ms(130), "from the first submission");
        assert_eq!(gap.longest(at(1430)), ms(300), "still waiting for the second");
        gap.on_complete(at(1230));
        gap.on_submit(at(9000));
        gap.on_complete(at(9001));
        assert_eq!(gap.longest(at(99_999)), ms(130));
    }
}
