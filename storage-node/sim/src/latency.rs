//! How long something takes: mostly within a band, sometimes far beyond it.

use std::time::Duration;

use crate::prng::{MILLION, Prng};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    pub low: Duration,
    pub high: Duration,
    /// In so many of a million draws the result lies in `[high, tail_high]` instead of `[low, high]`.
    pub tail_ppm: u32,
    pub tail_high: Duration,
}

impl Latency {
    /// Always the same.
    pub const fn constant(duration: Duration) -> Latency {
        Latency { low: duration, high: duration, tail_ppm: 0, tail_high: duration }
    }

    pub const fn uniform(low: Duration, high: Duration) -> Latency {
        Latency { low, high, tail_ppm: 0, tail_high: high }
    }

    pub const fn with_tail(self, ppm: u32, high: Duration) -> Latency {
        assert!(ppm <= MILLION);
        Latency { tail_ppm: ppm, tail_high: high, ..self }
    }

    pub fn draw(&self, prng: &mut Prng) -> Duration {
        if prng.chance(self.tail_ppm) {
            prng.duration(self.high, self.tail_high)
        } else {
            prng.duration(self.low, self.high)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_as_rare_as_stated() {
        let (low, high, tail) = (Duration::from_micros(50), Duration::from_micros(200), Duration::from_millis(80));
        let latency = Latency::uniform(low, high).with_tail(20_000, tail);
        let mut prng = Prng::new(3);
        let drawn: Vec<Duration> = (0..10_000).map(|_| latency.draw(&mut prng)).collect();
        assert!(drawn.iter().all(|d| (low..=tail).contains(d)));
        let beyond = drawn.iter().filter(|d| **d > high).count();
        assert!((150..250).contains(&beyond), "{beyond}");
        assert_eq!(Latency::constant(high).draw(&mut prng), high);
    }
}
