//! The network between simulated machines: messages that take time, get lost, doubled, overtaken or cut off.
//!
//! What it is: a queue of messages in flight, one direction of one pair of nodes being a link with its own options.
//! What it is not: connections. Whoever wants "the connection closed" to follow from loss builds it above. Who drives
//! it: the simulation's loop, `send` and then `deliver` whenever `next_delivery` is due.
//!
//! Invariants: on a link that does not reorder, messages arrive in the order of sending. The same calls with the same
//! generator give the same deliveries.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_consensus::Timestamp;

use crate::latency::Latency;
use crate::prng::Prng;

/// Messages in flight; what is sent beyond is lost, as in a full buffer.
pub const IN_FLIGHT_MAX: usize = 1 << 18;

/// How one direction between two nodes behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub latency: Latency,
    /// A message takes `bytes * 1 s / bytes_per_second` of the link, one after the other; `None`: no time.
    pub bytes_per_second: Option<u64>,
    pub loss_ppm: u32,
    /// The message arrives once more, later.
    pub duplicate_ppm: u32,
    /// The message may overtake those sent before it, and be overtaken.
    pub reorder_ppm: u32,
}

impl Link {
    /// Loses and reorders nothing.
    pub const fn good(latency: Latency) -> Link {
        Link { latency, bytes_per_second: None, loss_ppm: 0, duplicate_ppm: 0, reorder_ppm: 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery<N, M> {
    pub from: N,
    pub to: N,
    pub message: M,
}

/// What happened so far; a run whose faults are all zero has shown nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Statistics {
    pub sent: u64,
    pub delivered: u64,
    pub lost: u64,
    pub duplicated: u64,
    /// Allowed to overtake; whether one did depends on what else was in flight.
    pub reordered: u64,
    /// Sent or arriving while the link was cut.
    pub cut: u64,
}

#[derive(Debug)]
pub struct Network<N, M> {
    prng: Prng,
    default: Link,
    links: BTreeMap<(N, N), Link>,
    cut: BTreeSet<(N, N)>,
    /// When the link is free to carry the next message, and when the last ordered message arrives.
    busy: BTreeMap<(N, N), (Timestamp, Timestamp)>,
    /// By arrival, then by order of sending.
    in_flight: BTreeMap<(Timestamp, u64), Delivery<N, M>>,
    next: u64,
    statistics: Statistics,
}

impl<N: Ord + Copy, M: Clone> Network<N, M> {
    pub fn new(prng: Prng, default: Link) -> Network<N, M> {
        Network {
            prng,
            default,
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            busy: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            next: 0,
            statistics: Statistics::default(),
        }
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub fn is_cut(&self, from: N, to: N) -> bool {
        self.cut.contains(&(from, to))
    }

    /// When the next message arrives.
    pub fn next_delivery(&self) -> Option<Timestamp> {
        self.in_flight.first_key_value().map(|((at, _), _)| *at)
    }

    pub fn send(&mut self, now: Timestamp, from: N, to: N, bytes: usize, message: M) {
        self.statistics.sent += 1;
        let link = self.link(from, to);
        if self.is_cut(from, to) {
            self.statistics.cut += 1;
            return;
        }
        if self.prng.chance(link.loss_ppm) || self.in_flight.len() >= IN_FLIGHT_MAX {
            self.statistics.lost += 1;
            return;
        }
        let (free, last) = self.busy.get(&(from, to)).copied().unwrap_or_default();
        let transmission = link.bytes_per_second.map_or(Duration::ZERO, |rate| {
            let nanos = bytes as u128 * 1_000_000_000 / u128::from(rate.max(1));
            Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        });
        let free = free.max(now) + transmission;
        let mut arrival = free + link.latency.draw(&mut self.prng);
        let mut last_arrival = last;
        if self.prng.chance(link.reorder_ppm) {
            self.statistics.reordered += 1;
        } else {
            arrival = arrival.max(last);
            last_arrival = arrival;
        }
        self.busy.insert((from, to), (free, last_arrival));
        if self.prng.chance(link.duplicate_ppm) {
            self.statistics.duplicated += 1;
            let again = arrival + link.latency.draw(&mut self.prng);
            self.fly(again, Delivery { from, to, message: message.clone() });
        }
        self.fly(arrival, Delivery { from, to, message });
    }

    /// The next message that has arrived by `now`. What arrives over a link that is cut by then is lost.
    pub fn deliver(&mut self, now: Timestamp) -> Option<Delivery<N, M>> {
        loop {
            let first = self.in_flight.first_entry()?;
            if first.key().0 > now {
                return None;
            }
            let delivery = first.remove();
            if self.cut.contains(&(delivery.from, delivery.to)) {
                self.statistics.cut += 1;
                continue;
            }
            self.statistics.delivered += 1;
            return Some(delivery);
        }
    }

    pub fn set_link(&mut self, from: N, to: N, link: Link) {
        self.links.insert((from, to), link);
    }

    /// From now on nothing gets from `from` to `to`; the other way is not touched.
    pub fn cut(&mut self, from: N, to: N) {
        self.cut.insert((from, to));
    }

    /// Nothing passes between the two sides, in either direction.
    pub fn partition(&mut self, one: &[N], other: &[N]) {
        for &a in one {
            for &b in other {
                self.cut.extend([(a, b), (b, a)]);
            }
        }
    }

    pub fn mend(&mut self, from: N, to: N) {
        self.cut.remove(&(from, to));
    }

    /// Every link is whole and as at the beginning.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.links.clear();
    }

    /// The node's machine is gone: what is in flight from or to it is lost.
    pub fn forget(&mut self, node: N) {
        let before = self.in_flight.len();
        self.in_flight.retain(|_, delivery| delivery.from != node && delivery.to != node);
        self.statistics.lost += (before - self.in_flight.len()) as u64;
        self.busy.retain(|(from, to), _| *from != node && *to != node);
    }

    fn link(&self, from: N, to: N) -> Link {
        self.links.get(&(from, to)).copied().unwrap_or(self.default)
    }

    fn fly(&mut self, arrival: Timestamp, delivery: Delivery<N, M>) {
        self.in_flight.insert((arrival, self.next), delivery);
        self.next += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prng::MILLION;

    const LATENCY: Latency = Latency::uniform(Duration::from_micros(50), Duration::from_micros(500));

    fn at(micros: u64) -> Timestamp {
        Timestamp::ZERO + Duration::from_micros(micros)
    }

    fn drain(network: &mut Network<u8, u32>) -> Vec<(Timestamp, u32)> {
        let mut arrived = Vec::new();
        while let Some(when) = network.next_delivery() {
            while let Some(delivery) = network.deliver(when) {
                arrived.push((when, delivery.message));
            }
        }
        arrived
    }

    fn run(seed: u64, link: Link) -> (Vec<(Timestamp, u32)>, Statistics) {
        let mut network = Network::new(Prng::new(seed), link);
        for message in 0..1000 {
            network.send(at(u64::from(message) * 10), 1, 2, 100, message);
        }
        (drain(&mut network), network.statistics())
    }

    fn messages(arrived: &[(Timestamp, u32)]) -> Vec<u32> {
        arrived.iter().map(|(_, message)| *message).collect()
    }

    #[test]
    fn a_good_link_keeps_everything_in_order_and_takes_its_time() {
        let (arrived, statistics) = run(1, Link::good(LATENCY));
        assert_eq!(messages(&arrived), (0..1000).collect::<Vec<_>>());
        for (when, message) in arrived {
            let sent = at(u64::from(message) * 10);
            assert!(when >= sent + LATENCY.low && when <= sent + LATENCY.high + Duration::from_micros(500));
        }
        assert_eq!((statistics.sent, statistics.delivered, statistics.lost), (1000, 1000, 0));
    }

    #[test]
    fn a_bad_link_loses_doubles_and_reorders_as_often_as_stated() {
        let bad = Link { loss_ppm: 100_000, duplicate_ppm: 50_000, reorder_ppm: 300_000, ..Link::good(LATENCY) };
        let (arrived, statistics) = run(2, bad);
        let mut sorted = messages(&arrived);
        assert!(!sorted.is_sorted(), "something was overtaken");
        sorted.sort_unstable();
        assert!(sorted.windows(2).any(|pair| pair[0] == pair[1]), "something arrived twice");
        assert!((60..140).contains(&statistics.lost), "{statistics:?}");
        assert!((25..75).contains(&statistics.duplicated), "{statistics:?}");
        assert!((200..350).contains(&statistics.reordered), "{statistics:?}");
        assert_eq!(statistics.delivered, 1000 - statistics.lost + statistics.duplicated);
    }

    #[test]
    fn the_same_seed_gives_the_same_deliveries() {
        let bad = Link { loss_ppm: 100_000, duplicate_ppm: 50_000, reorder_ppm: 300_000, ..Link::good(LATENCY) };
        assert_eq!(run(3, bad), run(3, bad));
        assert_ne!(run(3, bad), run(4, bad));
    }

    #[test]
    fn a_cut_is_one_way_and_takes_what_is_in_flight() {
        let mut network: Network<u8, u32> = Network::new(Prng::new(1), Link::good(LATENCY));
        network.send(at(0), 1, 2, 0, 10);
        network.send(at(0), 2, 1, 0, 11);
        network.cut(1, 2);
        network.send(at(1), 1, 2, 0, 12);
        assert_eq!(messages(&drain(&mut network)), [11]);
        assert_eq!(network.statistics().cut, 2);
        network.mend(1, 2);
        network.send(at(2000), 1, 2, 0, 13);
        assert_eq!(messages(&drain(&mut network)), [13]);
        network.partition(&[1], &[2, 3]);
        assert!(network.is_cut(1, 3) && network.is_cut(3, 1) && !network.is_cut(2, 3));
        network.heal();
        assert!(!network.is_cut(1, 2));
    }

    #[test]
    fn a_slow_link_carries_one_message_after_the_other() {
        let slow = Link { bytes_per_second: Some(1_000_000), ..Link::good(Latency::constant(Duration::ZERO)) };
        let mut network: Network<u8, u32> = Network::new(Prng::new(1), Link::good(LATENCY));
        network.set_link(1, 2, slow);
        network.send(at(0), 1, 2, 1000, 1);
        network.send(at(0), 1, 2, 500, 2);
        assert_eq!(drain(&mut network), [(at(1000), 1), (at(1500), 2)]);
    }

    #[test]
    fn a_forgotten_node_gets_and_has_sent_nothing() {
        let mut network: Network<u8, u32> = Network::new(Prng::new(1), Link::good(LATENCY));
        network.send(at(0), 1, 2, 0, 1);
        network.send(at(0), 2, 3, 0, 2);
        network.send(at(0), 1, 3, 0, 3);
        network.forget(2);
        assert_eq!(messages(&drain(&mut network)), [3]);
        let always = Link { loss_ppm: MILLION, ..Link::good(LATENCY) };
        network.set_link(1, 3, always);
        network.send(at(0), 1, 3, 0, 4);
        assert_eq!(network.in_flight(), 0);
    }
}
