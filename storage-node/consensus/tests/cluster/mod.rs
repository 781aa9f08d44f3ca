//! One replica with a disk that keeps only what was flushed, and a random cluster of them.
//!
//! Liveness is the real `Pairs`, one per node, over the same lossy network as the messages.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod world;

use std::collections::VecDeque;
use std::time::Duration;

use holdfast_consensus::liveness::pairs::{PairOptions, Pairs};
use holdfast_consensus::{
    Command, Configuration, Effect, Entry, HardState, Liveness, LogIndex, Member, Message, Options, Persist,
    PersistSequence, Position, Raft, Restored, Role, SupportEpoch, Timestamp,
};
use holdfast_id::{NodeId, ReplicaId};

pub const LEASE: Duration = Duration::from_millis(300);
pub const HEARTBEAT: Duration = Duration::from_millis(100);
pub const JITTER: Duration = Duration::from_millis(50);
pub const DRIFT_PPM: u32 = 1000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Number(pub u64);

/// A MiB and more is a command of that many bytes.
impl Command for Number {
    fn size_bytes(&self) -> usize {
        if self.0 < 1 << 20 { 8 } else { self.0 as usize }
    }
}

pub fn replica(n: u8) -> ReplicaId {
    ReplicaId::from_bytes([n; 16]).expect("not zero")
}

pub fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 16]).expect("not zero")
}

pub fn number(replica: ReplicaId) -> u8 {
    replica.to_bytes()[0]
}

pub fn configuration(voters: &[u8], learners: &[u8]) -> Configuration {
    let mut members: Vec<Member> = voters
        .iter()
        .map(|n| Member { replica: replica(*n), node: node(*n), role: Role::Voter })
        .chain(learners.iter().map(|n| Member { replica: replica(*n), node: node(*n), role: Role::Learner }))
        .collect();
    members.sort();
    Configuration { members, outgoing: vec![], min_data: 1 }
}

/// Node `n` carries replica `n`.
pub struct View<'a>(pub &'a mut Pairs);

impl Liveness for View<'_> {
    fn supported_by(&self, peer: ReplicaId) -> Option<(SupportEpoch, Timestamp)> {
        self.0.supported_by(node(number(peer)))
    }
    fn promised_to(&self, peer: ReplicaId) -> Timestamp {
        self.0.promised_to(node(number(peer)))
    }
    fn epoch_for(&self, peer: ReplicaId) -> SupportEpoch {
        self.0.epoch_for(node(number(peer)))
    }
    fn withdraw(&mut self, peer: ReplicaId) {
        self.0.withdraw(node(number(peer)));
    }
}

/// What survives a crash.
#[derive(Clone, Debug)]
pub struct Disk {
    pub hard_state: HardState,
    pub base: Position,
    pub configuration: Configuration,
    pub entries: Vec<Entry<Number>>,
    pub boot: u64,
    pub damaged: bool,
    pub forgotten: Position,
}

impl Disk {
    pub fn empty(configuration: Configuration) -> Disk {
        Disk {
            hard_state: HardState::default(),
            base: Position::default(),
            configuration,
            entries: vec![],
            boot: 0,
            damaged: false,
            forgotten: Position::default(),
        }
    }

    fn write(&mut self, step: &Persist<Number>) {
        if let Some(hard_state) = step.hard_state {
            assert!(hard_state.term >= self.hard_state.term);
            self.hard_state = hard_state;
        }
        if let Some(from) = step.truncate_from {
            self.entries.retain(|entry| entry.position.index < from);
        }
        for entry in &step.entries {
            if entry.position.index > self.base.index {
                let last = self.entries.last().map_or(self.base, |last| last.position);
                assert_eq!(entry.position.index, last.index.next(), "the steps of one replica follow each other");
                self.entries.push(entry.clone());
            }
        }
    }

    pub fn compact(&mut self, base: Position, configuration: Configuration) {
        self.entries.retain(|entry| entry.position.index > base.index);
        self.base = base;
        self.configuration = configuration;
    }
}

#[derive(Clone, Debug)]
pub struct Sent {
    pub to: ReplicaId,
    pub message: Message<Number>,
}

pub struct Node {
    pub raft: Raft<Number>,
    pub pairs: Pairs,
    pub disk: Disk,
    /// Handed to the disk, not durable.
    pub writing: VecDeque<Persist<Number>>,
    durable: PersistSequence,
    held: Vec<(PersistSequence, Sent)>,
}

impl Node {
    pub fn start(n: u8, mut disk: Disk, others: &[u8], seed: u64, now: Timestamp) -> Node {
        disk.boot += 1;
        let options = Options {
            id: replica(n),
            lease: LEASE,
            drift_ppm: DRIFT_PPM,
            election_jitter: JITTER,
            append_bytes_max: 3 * (64 + 8),
            inflight_bytes_max: 10 * (64 + 8),
            seed: seed.wrapping_mul(31).wrapping_add(u64::from(n)).wrapping_add(disk.boot << 32),
        };
        let restored = Restored {
            hard_state: disk.hard_state,
            base: disk.base,
            configuration: disk.configuration.clone(),
            entries: disk.entries.clone(),
            committed: disk.base.index,
            may_vote: !disk.damaged,
            forgotten: disk.forgotten,
        };
        let mut pairs = Pairs::new(PairOptions {
            node: node(n),
            heartbeat: HEARTBEAT,
            lease: LEASE,
            drift_ppm: DRIFT_PPM,
            boot: disk.boot,
        });
        others.iter().filter(|other| **other != n).for_each(|other| pairs.watch(now, node(*other)));
        Node {
            raft: Raft::new(options, restored, now),
            pairs,
            disk,
            writing: VecDeque::new(),
            durable: PersistSequence(0),
            held: vec![],
        }
    }

    pub fn call<T>(&mut self, call: impl FnOnce(&mut Raft<Number>, &mut dyn Liveness) -> T) -> T {
        call(&mut self.raft, &mut View(&mut self.pairs))
    }

    /// What leaves now, and what else there is to do; writes are queued and sends held back as they ask.
    pub fn take(&mut self) -> (Vec<Sent>, Vec<Effect<Number>>) {
        let (mut sent, mut rest) = (vec![], vec![]);
        for effect in self.raft.take_effects() {
            match effect {
                Effect::Persist(step) => self.writing.push_back(step),
                Effect::Send { to, message, after } => match after {
                    Some(after) if after > self.durable => self.held.push((after, Sent { to, message })),
                    _ => sent.push(Sent { to, message }),
                },
                other => rest.push(other),
            }
        }
        (sent, rest)
    }

    /// Makes the oldest `count` steps durable, and tells the core.
    pub fn persist(&mut self, now: Timestamp, count: usize) -> Vec<Sent> {
        for step in self.writing.drain(..count) {
            self.disk.write(&step);
            self.durable = step.sequence;
        }
        let durable = self.durable;
        let (free, held) = std::mem::take(&mut self.held).into_iter().partition(|(after, _)| *after <= durable);
        self.held = held;
        if durable > PersistSequence(0) {
            self.call(|raft, liveness| raft.on_persisted(now, liveness, durable));
        }
        free.into_iter().map(|(_, sent)| sent).collect()
    }

    /// What a crash leaves: the first `kept` of the writes under way made it, nobody knows.
    pub fn crash(mut self, kept: usize) -> Disk {
        for step in self.writing.drain(..kept) {
            self.disk.write(&step);
        }
        self.disk.damaged = !self.raft.status().may_vote;
        self.disk.forgotten = self.raft.forgotten();
        self.disk
    }

    pub fn compact(&mut self, to: LogIndex) {
        let base = self.raft.position_at(to).expect("in the log");
        let configuration = self.raft.configuration_at(to).expect("in the log").clone();
        self.raft.compact(to);
        self.disk.compact(base, configuration);
    }
}
