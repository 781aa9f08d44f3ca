//! The clock of one simulated machine against the time of the simulation.
//!
//! It stands for CLOCK_BOOTTIME: it never goes back, it counts the time a machine is suspended (a jump forward), and it
//! begins anew when the machine boots. It may run fast or slow by a bounded rate.

use std::time::Duration;

use holdfast_consensus::Timestamp;

/// Fastest drift the simulation gives: well beyond real oscillators (some 100 ppm), within what leases are made for
/// only as far as the cluster's own `drift_ppm` says so.
pub const DRIFT_PPM_MAX: i32 = 100_000;

const MILLION: i128 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// At this time of the simulation ...
    since: Timestamp,
    /// ... the clock showed this, and has run at the present rate from there.
    shown: Timestamp,
    drift_ppm: i32,
}

impl Clock {
    /// A clock that shows `shown` at `now`.
    pub fn new(now: Timestamp, shown: Timestamp, drift_ppm: i32) -> Clock {
        assert!(drift_ppm.abs() <= DRIFT_PPM_MAX, "a drift of {drift_ppm} ppm");
        Clock { since: now, shown, drift_ppm }
    }

    /// What the machine reads at the simulation's `now`, which must not lie before the last change of the clock.
    pub fn read(&self, now: Timestamp) -> Timestamp {
        assert!(now >= self.since, "the simulation's time goes forward");
        let passed = i128::from(now.0 - self.since.0);
        let shown = i128::from(self.shown.0) + passed * (MILLION + i128::from(self.drift_ppm)) / MILLION;
        Timestamp(u64::try_from(shown).unwrap_or(u64::MAX))
    }

    /// The first time of the simulation at which the machine reads `shown` or more; never before the last change.
    pub fn when(&self, shown: Timestamp) -> Timestamp {
        let ahead = i128::from(shown.0) - i128::from(self.shown.0);
        if ahead <= 0 {
            return self.since;
        }
        let rate = MILLION + i128::from(self.drift_ppm);
        let passed = (ahead * MILLION + rate - 1) / rate;
        Timestamp(u64::try_from(i128::from(self.since.0) + passed).unwrap_or(u64::MAX))
    }

    pub fn set_drift(&mut self, now: Timestamp, drift_ppm: i32) {
        *self = Clock::new(now, self.read(now), drift_ppm);
    }

    /// The machine was suspended, or its hypervisor stopped it: the clock went on.
    pub fn jump(&mut self, now: Timestamp, by: Duration) {
        *self = Clock::new(now, self.read(now) + by, self.drift_ppm);
    }

    /// The machine booted: the clock begins near 0 again, with no relation to what it showed before.
    pub fn reboot(&mut self, now: Timestamp, shown: Timestamp) {
        *self = Clock::new(now, shown, self.drift_ppm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prng::Prng;

    #[test]
    fn drift_jump_and_boot() {
        let second = Timestamp::ZERO + Duration::from_secs(1);
        let mut clock = Clock::new(Timestamp::ZERO, Timestamp(5), 200);
        assert_eq!(clock.read(second), Timestamp(5 + 1_000_200_000));
        clock.jump(second, Duration::from_secs(60));
        assert_eq!(clock.read(second), Timestamp(5 + 61_000_200_000));
        clock.set_drift(second, -1000);
        let two = second + Duration::from_secs(1);
        assert_eq!(clock.read(two), Timestamp(5 + 61_000_200_000 + 999_000_000));
        clock.reboot(two, Timestamp(77));
        assert_eq!(clock.read(two), Timestamp(77));
        assert_eq!(clock.when(Timestamp(3)), two);
    }

    #[test]
    fn a_deadline_is_met_at_the_first_moment_that_shows_it() {
        let mut prng = Prng::new(11);
        for _ in 0..2000 {
            let drift = i32::try_from(prng.below(2 * DRIFT_PPM_MAX as u64)).unwrap() - DRIFT_PPM_MAX;
            let start = Timestamp(prng.below(1 << 40) + 1);
            let clock = Clock::new(start, Timestamp(prng.below(1 << 40)), drift);
            let deadline = Timestamp(prng.below(1 << 42));
            let when = clock.when(deadline);
            assert!(clock.read(when) >= deadline);
            if when > start {
                assert!(clock.read(Timestamp(when.0 - 1)) < deadline, "{clock:?} {deadline:?}");
            }
        }
    }
}
