//! Time as the state machines see it: a number that the rim samples.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

/// Nanoseconds on CLOCK_BOOTTIME of one machine; never compared between machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

impl Timestamp {
    pub const ZERO: Timestamp = Timestamp(0);

    /// Zero where `earlier` lies later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Timestamp;
    /// Saturates: a duration that long means never.
    fn add(self, duration: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000_000, self.0 % 1_000_000_000 / 1000)
    }
}

/// A wait that is no shorter than `duration` on any other clock, if each runs within `drift_ppm` of true time: longer
/// by twice the drift, and once more for the product of both.
pub fn with_drift(duration: Duration, drift_ppm: u32) -> Duration {
    duration + drift_of(duration, drift_ppm)
}

/// The counterpart: a wait that is no longer than `duration` on any other clock.
pub fn without_drift(duration: Duration, drift_ppm: u32) -> Duration {
    duration.saturating_sub(drift_of(duration, drift_ppm))
}

fn drift_of(duration: Duration, drift_ppm: u32) -> Duration {
    let nanos = duration.as_nanos() * 3 * u128::from(drift_ppm) / 1_000_000;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
