//! The one source of randomness of a simulation: xoshiro256++, seeded through SplitMix64.
//!
//! It is written out here because a seed must give the same run with every version of every library. Not for secrets.
//! A generator is split by name, not by drawing: what one part of the simulation draws does not change what another
//! part gets, so a run stays recognisable when a fault or a workload is added to it.

use std::time::Duration;

/// One part in a million, the unit of every probability.
pub const MILLION: u32 = 1_000_000;

#[derive(Clone, Debug)]
pub struct Prng {
    /// What the generator was made from; children are made from it too.
    seed: u64,
    state: [u64; 4],
}

impl Prng {
    pub fn new(seed: u64) -> Prng {
        let mut mixer = seed;
        Prng { seed, state: std::array::from_fn(|_| split_mix(&mut mixer)) }
    }

    /// The child of this name and number: the same one however much was drawn from the parent.
    pub fn split(&self, name: &str, number: u64) -> Prng {
        // FNV-1a over the name, then mixed with the seed and the number; names only have to differ from each other.
        let name = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let mut mixer = self.seed;
        for part in [name, number] {
            mixer = split_mix(&mut mixer) ^ part;
        }
        Prng::new(split_mix(&mut mixer))
    }

    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// Uniform in `[0, bound)`.
    ///
    /// # Panics
    /// Where the bound is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing lies below 0");
        // The high half of a product is uniform once the few low halves that would favour some results are refused.
        let refused = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= refused {
                return (product >> 64) as u64;
            }
        }
    }

    /// Uniform in `[low, high]`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        assert!(low <= high, "an empty interval");
        match (high - low).checked_add(1) {
            Some(width) => low + self.below(width),
            None => self.next_u64(),
        }
    }

    /// Uniform in `[low, high]`, to the nanosecond.
    pub fn duration(&mut self, low: Duration, high: Duration) -> Duration {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.between(nanos(low), nanos(high)))
    }

    /// True in `ppm` of a million draws.
    pub fn chance(&mut self, ppm: u32) -> bool {
        self.below(u64::from(MILLION)) < u64::from(ppm)
    }

    /// # Panics
    /// Where there is nothing to pick from.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed in a bug report must mean the same run for ever.
    #[test]
    fn the_sequence_of_a_seed_never_changes() {
        // The first outputs of SplitMix64 from 0, as its authors publish them.
        let mut state = 0;
        assert_eq!(split_mix(&mut state), 0xe220_a839_7b1d_cdaf);
        assert_eq!(split_mix(&mut state), 0x6e78_9e6a_a1b9_65f4);
        // xoshiro256++ from the state 1, 2, 3, 4.
        let mut prng = Prng { seed: 0, state: [1, 2, 3, 4] };
        let drawn: Vec<u64> = (0..4).map(|_| prng.next_u64()).collect();
        assert_eq!(drawn, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
    }

    #[test]
    fn a_child_does_not_depend_on_what_was_drawn() {
        let mut parent = Prng::new(7);
        let before = parent.split("network", 1).next_u64();
        parent.next_u64();
        assert_eq!(parent.split("network", 1).next_u64(), before);
        assert_ne!(parent.split("network", 2).next_u64(), before);
        assert_ne!(parent.split("disk", 1).next_u64(), before);
        assert_ne!(Prng::new(8).split("network", 1).next_u64(), before);
    }

    #[test]
    fn draws_stay_within_their_bounds_and_reach_them() {
        let mut prng = Prng::new(1);
        let mut counts = [0u32; 6];
        for _ in 0..6000 {
            counts[prng.between(10, 15) as usize - 10] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
        assert!((0..100).all(|_| !prng.chance(0) && prng.chance(MILLION)));
        let hits = (0..10_000).filter(|_| prng.chance(250_000)).count();
        assert!((2300..2700).contains(&hits), "{hits}");
        let mut items: Vec<u32> = (0..50).collect();
        prng.shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
        assert_eq!(prng.between(3, 3), 3);
        prng.between(0, u64::MAX);
    }
}
