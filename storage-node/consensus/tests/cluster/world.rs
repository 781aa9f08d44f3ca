//! A cluster under random faults in virtual time, and what must hold at every step.
//!
//! Faults: loss, duplication, reordering, partitions, crashes that lose unflushed writes, damaged logs, closed
//! connections, clocks that drift within the bound. Everything follows from the seed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_consensus::liveness::pairs::PairEvent;
use holdfast_consensus::{
    Body, Effect, Entry, LogIndex, Message, Position, ProgressState, Raft, Standing, SupportEpoch, Term, Timestamp,
};

use super::{DRIFT_PPM, Disk, Node, Number, configuration, node, number, replica};

/// Steps between two looks at whole logs, which are long; what they look for does not go away.
const WHOLE_LOG_EVERY: u64 = 29;

pub const NODES: [u8; 5] = [1, 2, 3, 4, 5];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    ElectionSafety,
    LeaderAppendOnly,
    LogMatching,
    LeaderCompleteness,
    StateMachineSafety,
    /// At most one replica holds a lease, and nobody is elected while another holds one.
    LeaseSafety,
    /// A read's index covers everything committed anywhere before it was asked for.
    LinearizableReads,
}

pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }
    /// xorshift64*; uniform enough in `[0, bound)`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

#[derive(Clone, Copy)]
struct Clock {
    offset: u64,
    ppm: i64,
}

impl Clock {
    fn local(self, now: u64) -> Timestamp {
        Timestamp(self.offset + now.saturating_add_signed(now as i64 / 1_000_000 * self.ppm))
    }
    /// The first true time at which the clock shows `local` or later.
    fn at(self, local: Timestamp) -> u64 {
        let shown = local.0.saturating_sub(self.offset);
        let mut now = shown.saturating_add_signed(-(shown as i64 / 1_000_000 * self.ppm));
        while self.local(now) < local {
            now += 1_000;
        }
        now
    }
}

#[derive(Clone)]
enum Packet {
    Raft(Message<Number>),
    Heartbeat { sequence: u64, boot: u64 },
    Reply { sequence: u64, support: SupportEpoch },
}

#[derive(Clone)]
enum Event {
    Packet { from: u8, to: u8, packet: Packet },
    Written { at: u8, boot: u64 },
    Start { at: u8 },
    Delta { to: u8 },
    Act,
}

pub struct World {
    pub property: Property,
    dice: Dice,
    seed: u64,
    pub now: u64,
    clocks: BTreeMap<u8, Clock>,
    pub nodes: BTreeMap<u8, Node>,
    down: BTreeMap<u8, Disk>,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    faulty: bool,
    loss_percent: u64,
    /// Whether logs may lose flushed entries; a group of two voters cannot go on without either.
    pub damage: bool,
    /// Pairs that cannot talk, in this direction.
    cut: BTreeSet<(u8, u8)>,
    proposed: u64,
    /// What each term's leader is.
    elected: BTreeMap<Term, u8>,
    /// Every entry that any replica was told to be committed.
    pub committed: BTreeMap<LogIndex, Entry<Number>>,
    /// The term in which that was first told; no earlier than the leader's who committed it.
    committed_in: BTreeMap<LogIndex, Term>,
    applied: BTreeMap<u8, LogIndex>,
    /// What a read must cover, by token.
    reads: BTreeMap<u64, LogIndex>,
    pub reads_served: u64,
    checks: u64,
    /// Logs of current leaders as last seen, by position.
    leaders_logs: BTreeMap<u8, (Term, Vec<Position>)>,
}

impl World {
    pub fn new(seed: u64, property: Property) -> World {
        let mut dice = Dice::new(seed);
        let mut world = World {
            property,
            seed,
            now: 0,
            clocks: BTreeMap::new(),
            nodes: BTreeMap::new(),
            down: BTreeMap::new(),
            queue: BTreeMap::new(),
            queued: 0,
            faulty: true,
            loss_percent: dice.pick(&[0, 1, 5, 20]),
            damage: true,
            cut: BTreeSet::new(),
            proposed: 0,
            elected: BTreeMap::new(),
            committed: BTreeMap::new(),
            committed_in: BTreeMap::new(),
            applied: BTreeMap::new(),
            reads: BTreeMap::new(),
            reads_served: 0,
            checks: 0,
            leaders_logs: BTreeMap::new(),
            dice,
        };
        for n in NODES {
            let ppm = world.dice.below(u64::from(2 * DRIFT_PPM) + 1) as i64 - i64::from(DRIFT_PPM);
            let offset = world.dice.below(1_000_000_000_000);
            world.clocks.insert(n, Clock { offset, ppm });
            let started = Node::start(n, Disk::empty(configuration(&[1, 2, 3], &[])), &NODES, seed, world.local(n));
            world.nodes.insert(n, started);
        }
        world.after(Duration::from_millis(5), Event::Act);
        world
    }

    pub fn local(&self, n: u8) -> Timestamp {
        self.clocks[&n].local(self.now)
    }

    /// Runs for `time` of virtual time.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + time.as_nanos() as u64;
        while self.step(end) {}
        self.now = end;
    }

    /// Ends all faults and brings everybody back.
    pub fn heal(&mut self) {
        self.faulty = false;
        self.cut.clear();
        for n in self.down.keys().copied().collect::<Vec<_>>() {
            self.start(n);
        }
    }

    fn step(&mut self, end: u64) -> bool {
        let queued = self.queue.first_key_value().map(|((at, _), _)| *at);
        let wake = self
            .nodes
            .iter()
            .flat_map(|(n, node)| {
                [node.raft.deadline(), node.pairs.deadline()]
                    .into_iter()
                    .flatten()
                    .map(|at| (self.clocks[n].at(at), *n))
            })
            .min();
        match (queued, wake) {
            (Some(at), wake) if wake.is_none_or(|(wake, _)| at <= wake) && at <= end => {
                let ((at, _), event) = self.queue.pop_first().expect("looked at");
                self.now = self.now.max(at);
                self.handle(event);
            }
            (_, Some((at, n))) if at <= end => {
                self.now = self.now.max(at);
                self.wake(n);
            }
            _ => return false,
        }
        true
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Packet { from, to, packet } => {
                if self.nodes.contains_key(&to) && !self.cut.contains(&(from, to)) {
                    self.deliver(from, to, packet);
                }
            }
            Event::Written { at, boot } => {
                let now = self.local(at);
                if let Some(node) = self.nodes.get_mut(&at)
                    && node.disk.boot == boot
                    && !node.writing.is_empty()
                {
                    let count = 1 + self.dice.below(node.writing.len() as u64) as usize;
                    let freed = node.persist(now, count);
                    freed.into_iter().for_each(|sent| self.send(at, number(sent.to), Packet::Raft(sent.message)));
                    self.settle(at);
                }
            }
            Event::Start { at } => {
                if self.down.contains_key(&at) {
                    self.start(at);
                }
            }
            Event::Delta { to } => self.install_delta(to),
            Event::Act => {
                let next = Duration::from_micros(self.dice.below(20_000));
                self.after(next, Event::Act);
                if self.faulty {
                    self.act();
                }
            }
        }
    }

    fn wake(&mut self, n: u8) {
        let now = self.local(n);
        let node = self.nodes.get_mut(&n).expect("up");
        let boot = node.disk.boot;
        let due = node.pairs.on_deadline(now);
        if node.raft.deadline().is_some_and(|at| at <= now) {
            node.call(|raft, liveness| raft.on_deadline(now, liveness));
            assert!(node.raft.is_leader() || node.raft.deadline().is_none_or(|at| at > now), "a deadline passes once");
        }
        for heartbeat in due {
            let packet = Packet::Heartbeat { sequence: heartbeat.sequence, boot };
            self.send(n, heartbeat.to.to_bytes()[0], packet);
        }
        self.settle(n);
        let node = &self.nodes[&n];
        assert!(node.raft.deadline().is_none_or(|at| at > now), "seed {}: node {n} spins", self.seed);
    }

    fn deliver(&mut self, from: u8, to: u8, packet: Packet) {
        let now = self.local(to);
        let receiver = self.nodes.get_mut(&to).expect("up");
        match packet {
            Packet::Raft(message) => {
                receiver.call(|raft, liveness| raft.on_message(now, liveness, replica(from), message));
            }
            Packet::Heartbeat { sequence, boot } => {
                if let Some(support) = receiver.pairs.on_heartbeat(now, node(from), boot, false) {
                    self.send(to, from, Packet::Reply { sequence, support });
                }
            }
            Packet::Reply { sequence, support } => receiver.pairs.on_reply(node(from), sequence, support),
        }
        self.settle(to);
    }

    /// Takes what the last event left, and checks.
    fn settle(&mut self, n: u8) {
        let now = self.local(n);
        let node = self.nodes.get_mut(&n).expect("up");
        for event in node.pairs.take_events() {
            match event {
                PairEvent::Suspected(peer) => {
                    let peer = replica(peer.to_bytes()[0]);
                    node.call(|raft, liveness| raft.on_suspect(now, liveness, peer));
                }
                PairEvent::SupportChanged(peer) => {
                    let peer = replica(peer.to_bytes()[0]);
                    node.call(|raft, liveness| raft.on_peer_connected(now, liveness, peer));
                }
            }
        }
        let writing = node.writing.len();
        let (sent, rest) = node.take();
        let (boot, wrote) = (node.disk.boot, node.writing.len() > writing);
        if wrote {
            let longest_us = if self.dice.one_in(50) { 100_000 } else { 3_000 };
            let delay = Duration::from_micros(50 + self.dice.below(longest_us));
            self.after(delay, Event::Written { at: n, boot });
        }
        for sent in sent {
            self.send(n, number(sent.to), Packet::Raft(sent.message));
        }
        for effect in rest {
            self.carry_out(n, effect);
        }
        self.check(n);
    }

    fn carry_out(&mut self, n: u8, effect: Effect<Number>) {
        let seed = self.seed;
        match effect {
            Effect::BecameLeader(term) => self.check_elected(n, term),
            Effect::Committed(index) => self.apply(n, index),
            Effect::ReadReady { token, index } => {
                let covers = self.reads.remove(&token).expect("asked for once");
                self.reads_served += 1;
                if self.property == Property::LinearizableReads {
                    assert!(index >= covers, "seed {seed}: read on {n} at {index:?} misses {covers:?}");
                }
            }
            Effect::ReadFailed { token } => assert!(self.reads.remove(&token).is_some()),
            Effect::NeedsDelta { peer } => {
                let delay = Duration::from_millis(self.dice.below(50));
                self.after(delay, Event::Delta { to: number(peer) });
            }
            Effect::Serving(_) | Effect::LostLeadership(_) => {}
            Effect::Persist(_) | Effect::Send { .. } => unreachable!("taken by the node"),
        }
    }

    fn apply(&mut self, n: u8, index: LogIndex) {
        let node = &self.nodes[&n];
        let durable = node.disk.entries.last().map_or(node.disk.base, |entry| entry.position).index;
        assert!(index <= durable, "seed {}: {n} was told {index:?}, durable is {durable:?}", self.seed);
        let from = self.applied.get(&n).copied().unwrap_or_default().max(node.raft.status().base.index);
        for at in from.0 + 1..=index.0 {
            let entry = node.raft.entry(LogIndex(at)).expect("committed entries are in memory").clone();
            self.committed_in.entry(LogIndex(at)).or_insert(node.raft.term());
            let known = self.committed.entry(LogIndex(at)).or_insert_with(|| entry.clone());
            if self.property == Property::StateMachineSafety {
                assert_eq!(*known, entry, "seed {}: node {n} at {at}", self.seed);
            }
        }
        self.applied.insert(n, index);
    }

    fn check_elected(&mut self, n: u8, term: Term) {
        let seed = self.seed;
        let other = self.elected.insert(term, n);
        if self.property == Property::ElectionSafety {
            assert!(other.is_none_or(|other| other == n), "seed {seed}: {other:?} and {n} lead {term:?}");
        }
        if self.property == Property::LeaderCompleteness {
            let raft = &self.nodes[&n].raft;
            let base = raft.status().base.index;
            // A late leader of an old term owes nothing to what later terms committed.
            let owed = |index: &LogIndex| *index > base && self.committed_in[index] < term;
            for (index, entry) in self.committed.iter().filter(|(index, _)| owed(index)) {
                assert_eq!(raft.entry(*index), Some(entry), "seed {seed}: the leader of {term:?} lacks it");
            }
        }
        if self.property == Property::LeaseSafety {
            // A late leader of an old term can earn no lease, so it does not matter to a later one's.
            for (other, node) in self.nodes.iter().filter(|(_, node)| node.raft.term() < term) {
                let until = node.raft.status().lease_until;
                assert!(
                    until.is_none_or(|until| until <= self.local(*other)),
                    "seed {seed}: {n} leads {term:?} under the lease of {other}"
                );
            }
        }
    }

    fn check(&mut self, n: u8) {
        let seed = self.seed;
        self.checks += 1;
        let whole_logs = matches!(self.property, Property::LeaderAppendOnly | Property::LogMatching);
        if whole_logs && !self.checks.is_multiple_of(WHOLE_LOG_EVERY) {
            return;
        }
        match self.property {
            Property::LeaderAppendOnly => {
                let status = self.nodes[&n].raft.status();
                if status.standing != Standing::Leader {
                    self.leaders_logs.remove(&n);
                    return;
                }
                let log: Vec<Position> = positions(&self.nodes[&n].raft);
                if let Some((term, before)) = self.leaders_logs.get(&n)
                    && *term == status.term
                {
                    let base = status.base.index;
                    let kept = before.iter().filter(|position| position.index > base);
                    assert!(kept.eq(log.iter().take(before.iter().filter(|p| p.index > base).count())), "seed {seed}");
                }
                self.leaders_logs.insert(n, (status.term, log));
            }
            Property::LogMatching => {
                let mine = &self.nodes[&n].raft;
                for (_, other) in self.nodes.iter().filter(|(other, _)| **other != n) {
                    let last = mine.status().last.index.min(other.raft.status().last.index);
                    let base = mine.status().base.index.max(other.raft.status().base.index);
                    let mut same = false;
                    for index in (base.0 + 1..=last.0).rev().map(LogIndex) {
                        let (a, b) = (mine.entry(index), other.raft.entry(index));
                        let meets = a.map(|e| e.position) == b.map(|e| e.position);
                        assert!(!same || meets, "seed {seed}: logs part below a match");
                        assert!(!meets || a == b, "seed {seed}: two entries with one name");
                        same |= meets;
                    }
                }
            }
            Property::LeaseSafety => {
                let holds =
                    |n: &u8, node: &Node| node.raft.status().lease_until.is_some_and(|until| until > self.local(*n));
                let holders: Vec<u8> = self.nodes.iter().filter(|(n, node)| holds(n, node)).map(|(n, _)| *n).collect();
                assert!(holders.len() <= 1, "seed {seed}: leases of {holders:?}");
            }
            _ => {}
        }
    }

    fn act(&mut self) {
        let n = self.dice.pick(&NODES);
        let leader = self.nodes.iter().find(|(_, node)| node.raft.is_leader()).map(|(n, _)| *n);
        let at = if self.dice.one_in(3) { n } else { leader.unwrap_or(n) };
        let now = self.local(at);
        match self.dice.below(100) {
            0..50 => {
                for _ in 0..1 + self.dice.below(8) {
                    self.proposed += 1;
                    let value = Number(self.proposed);
                    if let Some(node) = self.nodes.get_mut(&at) {
                        let _ = node.call(|raft, liveness| raft.propose(now, liveness, value));
                    }
                }
            }
            50..65 => {
                self.proposed += 1;
                let token = self.proposed;
                let covers = self.committed.keys().last().copied().unwrap_or_default();
                if let Some(node) = self.nodes.get_mut(&at)
                    && node.call(|raft, liveness| raft.read_index(now, liveness, token)).is_ok()
                {
                    self.reads.insert(token, covers);
                }
            }
            65..69 => {
                let to = replica(self.dice.pick(&NODES));
                if let Some(node) = self.nodes.get_mut(&at) {
                    let _ = node.call(|raft, liveness| raft.transfer(now, liveness, to));
                }
            }
            69..73 => {
                let new = match self.dice.below(6) {
                    0 => configuration(&[1, 2, 3], &[]),
                    1 => configuration(&[1, 2, 3], &[4]),
                    2 => configuration(&[2, 3, 4], &[]),
                    3 => configuration(&[3, 4, 5], &[1]),
                    4 => configuration(&[1, 2, 3, 4, 5], &[]),
                    _ => configuration(&[1, 5], &[]),
                };
                if let Some(node) = self.nodes.get_mut(&at) {
                    let _ = node.call(|raft, liveness| raft.propose_configuration(now, liveness, new));
                }
            }
            73..78 => {
                if let Some(node) = self.nodes.get_mut(&at) {
                    let applied = self.applied.get(&at).copied().unwrap_or_default();
                    if applied > node.raft.status().base.index && node.raft.position_at(applied).is_some() {
                        node.compact(applied);
                    }
                }
            }
            78..84 => self.crash(n),
            84..88 => {
                let other = self.dice.pick(&NODES);
                self.cut.insert((n, other));
                if self.dice.one_in(2) {
                    self.cut.insert((other, n));
                }
            }
            88..91 => NODES.iter().filter(|other| **other != n).for_each(|other| {
                self.cut.extend([(n, *other), (*other, n)]);
            }),
            91..97 => self.cut.clear(),
            97..99 => {
                let other = node(self.dice.pick(&NODES));
                if let Some(node) = self.nodes.get_mut(&n) {
                    node.pairs.on_closed(other);
                }
            }
            _ => {
                // The process stands still for a while: nothing it has to do happens in time.
                let pause = self.dice.below(500_000_000);
                let late = self.now + pause;
                let mine: Vec<_> = self
                    .queue
                    .iter()
                    .filter(|(key, event)| key.0 < late && event.is_at(n))
                    .map(|(key, _)| *key)
                    .collect();
                for key in mine {
                    let event = self.queue.remove(&key).expect("listed");
                    self.queued += 1;
                    self.queue.insert((late, self.queued), event);
                }
            }
        }
        for n in [at, n] {
            if self.nodes.contains_key(&n) {
                self.settle(n);
            }
        }
    }

    fn crash(&mut self, n: u8) {
        let Some(node) = self.nodes.remove(&n) else { return };
        let kept = self.dice.below(node.writing.len() as u64 + 1) as usize;
        let mut disk = node.crash(kept);
        let whole =
            self.nodes.values().all(|node| node.raft.status().may_vote) && self.down.values().all(|disk| !disk.damaged);
        if self.damage && whole && !disk.entries.is_empty() && self.dice.one_in(10) {
            disk.damaged = true;
            let left = self.dice.below(disk.entries.len() as u64) as usize;
            disk.entries.truncate(left);
        }
        self.leaders_logs.remove(&n);
        self.down.insert(n, disk);
        let delay = Duration::from_millis(self.dice.below(1000));
        self.after(delay, Event::Start { at: n });
    }

    fn start(&mut self, n: u8) {
        let disk = self.down.remove(&n).expect("down");
        self.applied.insert(n, disk.base.index);
        let node = Node::start(n, disk, &NODES, self.seed, self.local(n));
        self.nodes.insert(n, node);
        self.settle(n);
    }

    /// As the store's delta does: the state of some replica that has applied more becomes the base.
    fn install_delta(&mut self, to: u8) {
        let now = self.local(to);
        let source = self
            .nodes
            .iter()
            .filter(|(n, _)| **n != to)
            .filter_map(|(n, node)| {
                let applied = *self.applied.get(n)?;
                Some((node.raft.position_at(applied)?, node.raft.configuration_at(applied)?.clone()))
            })
            .max_by_key(|(base, _)| base.index);
        let (Some((base, configuration)), Some(node)) = (source, self.nodes.get_mut(&to)) else { return };
        if base.index <= node.raft.committed() {
            return;
        }
        // The store flushes the log's steps under way before the delta counts.
        let freed = node.persist(now, node.writing.len());
        node.call(|raft, liveness| raft.on_delta_installed(now, liveness, base, configuration.clone()));
        let follows = node.disk.entries.iter().any(|entry| entry.position == base);
        if !follows {
            node.disk.entries.clear();
        }
        node.disk.compact(base, configuration);
        self.applied.insert(to, base.index);
        freed.into_iter().for_each(|sent| self.send(to, number(sent.to), Packet::Raft(sent.message)));
        self.settle(to);
    }

    fn send(&mut self, from: u8, to: u8, packet: Packet) {
        if self.faulty && self.dice.below(100) < self.loss_percent {
            return;
        }
        let copies = if self.faulty && self.dice.one_in(20) { 2 } else { 1 };
        for _ in 0..copies {
            let delay =
                if self.faulty && self.dice.one_in(20) { self.dice.below(400_000) } else { self.dice.below(2_000) };
            let event = Event::Packet { from, to, packet: packet.clone() };
            self.after(Duration::from_micros(50 + delay), event);
        }
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now + delay.as_nanos() as u64, self.queued), event);
    }

    /// After `heal` and some time: one leader serves, everybody in its configuration is level, and everybody sleeps.
    pub fn assert_settled(&self) {
        let seed = self.seed;
        let leaders: Vec<_> = self.nodes.iter().filter(|(_, node)| node.raft.status().serving).collect();
        assert_eq!(leaders.len(), 1, "seed {seed}: {:?}", self.statuses());
        let (leader, node) = leaders[0];
        let status = node.raft.status();
        assert!(!node.raft.configuration().is_joint(), "seed {seed}");
        assert_eq!(status.committed, status.last.index, "seed {seed}: {:?}", self.statuses());
        for peer in &status.peers {
            let behind = &self.nodes[&number(peer.replica)].raft.status();
            assert_eq!(peer.state, ProgressState::Replicate, "seed {seed}: {leader} {:?}", self.statuses());
            assert_eq!((behind.committed, behind.last), (status.committed, status.last), "seed {seed}");
            assert_eq!(self.nodes[&number(peer.replica)].raft.deadline(), None, "seed {seed}: {peer:?}");
        }
        assert_eq!(node.raft.deadline(), None, "seed {seed}: the leader does not sleep");
    }

    fn statuses(&self) -> Vec<holdfast_consensus::Status> {
        self.nodes.values().map(|node| node.raft.status()).collect()
    }

    /// Proposes on whoever leads; panics if nobody takes it.
    pub fn must_propose(&mut self) {
        let (n, leads) =
            self.nodes.iter().find(|(_, node)| node.raft.status().serving).map_or((0, false), |(n, _)| (*n, true));
        assert!(leads, "seed {}: nobody serves: {:?}", self.seed, self.statuses());
        let now = self.local(n);
        let seed = self.seed;
        self.proposed += 1;
        let value = Number(self.proposed);
        let node = self.nodes.get_mut(&n).expect("up");
        let taken = node.call(|raft, liveness| raft.propose(now, liveness, value));
        assert!(taken.is_ok(), "seed {seed}: {taken:?}");
        self.settle(n);
    }

    /// How often a leader was elected.
    pub fn elections(&self) -> usize {
        self.elected.len()
    }

    pub fn commands_committed(&self) -> usize {
        self.committed.values().filter(|entry| matches!(entry.body, Body::Command(_))).count()
    }
}

impl Event {
    fn is_at(&self, n: u8) -> bool {
        matches!(self, Event::Packet { to, .. } if *to == n) || matches!(self, Event::Written { at, .. } if *at == n)
    }
}

fn positions(raft: &Raft<Number>) -> Vec<Position> {
    let status = raft.status();
    (status.base.index.0 + 1..=status.last.index.0).filter_map(|index| raft.position_at(LogIndex(index))).collect()
}
