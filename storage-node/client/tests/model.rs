//! The client against a model of its volume: three nodes, one log, leaders that die, step down or stall, answers that
//! are lost, messages that arrive twice.
//!
//! Oracle: every completed write is in the log exactly once, in an order that real time allows; every read returned a
//! state of the log between its submission and its completion; once a leader stays, everything completes soon.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use holdfast_block::{Geometry, Operation, Request as BlockRequest, RequestId};
use holdfast_client::{Client, ClientEffect, ClientOptions, Mode, Phase};
use holdfast_consensus::{LogIndex, Position, Term, Timestamp};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Reply, Request, SESSION_WINDOW, Session, Stamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const NODES: usize = 3;
const BLOCKS: u64 = 6;
const REQUESTS: u64 = 150;
const DISTURBANCES: u32 = 12;
const MS: u64 = 1_000_000;
/// From the last disturbance to the last completion: the longest wait of a resend is 16 s, plus what travels.
const SETTLE_MAX: Duration = Duration::from_secs(17);

#[derive(Debug)]
enum Event {
    ToServer { node: usize, connection: u64, request: Request },
    ToClient { node: usize, connection: u64, reply: Reply },
    Commit { term: u64 },
    Elect,
    Disturb,
    Connect { node: usize },
    Resume { node: usize },
}

#[derive(Clone, Debug)]
struct Proposal {
    node: usize,
    connection: u64,
    request: Request,
}

struct World {
    random: StdRng,
    now: u64,
    events: BTreeMap<(u64, u64), Event>,
    event_next: u64,
    volume: VolumeId,
    ids: Vec<NodeId>,
    // Connections: a number that changes with every new one; messages of an older one are lost.
    connection: [u64; NODES],
    up: [bool; NODES],
    introduced: [bool; NODES],
    stopped: [bool; NODES],
    arrives: [[u64; NODES]; 2],
    disturbances: u32,
    // The group.
    term: u64,
    leader: Option<usize>,
    proposals: VecDeque<Proposal>,
    index: u64,
    // The volume.
    attached: Option<(Instance, Epoch, Session)>,
    epochs: u64,
    answered: BTreeSet<u64>,
    low: u64,
    /// (block, value) in the order of the log; a position in it stands for a state.
    log: Vec<(u64, u64)>,
    // The workload.
    client: Client,
    submitted: BTreeMap<u64, (u64, usize, Operation)>,
    completed_at: BTreeMap<u64, u64>,
    submitted_at: BTreeMap<u64, u64>,
    operations_sent: BTreeMap<u64, Operation>,
    sent_count: u64,
}

fn value_of(data: &Bytes) -> u64 {
    u64::from_le_bytes(data[..].try_into().expect("eight bytes"))
}

impl World {
    fn new(seed: u64) -> World {
        let ids: Vec<NodeId> = (1..=NODES as u8).map(|n| NodeId::from_bytes([n; 16]).unwrap()).collect();
        let volume = VolumeId::from_bytes([9; 16]).unwrap();
        let mode = Mode::Attach { take_over: false };
        let mut options = ClientOptions::new(volume, ids.clone(), "model".into(), Instance(u128::from(seed) + 1), mode);
        options.window = 16;
        let mut world = World {
            random: StdRng::seed_from_u64(seed),
            now: 0,
            events: BTreeMap::new(),
            event_next: 0,
            volume,
            ids,
            connection: [0; NODES],
            up: [false; NODES],
            introduced: [false; NODES],
            stopped: [false; NODES],
            arrives: [[0; NODES]; 2],
            disturbances: DISTURBANCES,
            term: 0,
            leader: None,
            proposals: VecDeque::new(),
            index: 0,
            attached: None,
            epochs: 0,
            answered: BTreeSet::new(),
            low: 1,
            log: Vec::new(),
            client: Client::new(options, Timestamp(0)),
            submitted: BTreeMap::new(),
            completed_at: BTreeMap::new(),
            submitted_at: BTreeMap::new(),
            operations_sent: BTreeMap::new(),
            sent_count: 0,
        };
        world.after(0, Event::Elect);
        for node in 0..NODES {
            let wait = world.random.random_range(0..20 * MS);
            world.after(wait, Event::Connect { node });
        }
        let wait = world.random.random_range(0..100 * MS);
        world.after(wait, Event::Disturb);
        world
    }

    fn after(&mut self, wait: u64, event: Event) {
        self.event_next += 1;
        self.events.insert((self.now + wait, self.event_next), event);
    }

    fn calm(&self) -> bool {
        self.disturbances == 0
    }

    /// One direction of one connection delivers in order.
    fn travel(&mut self, direction: usize, node: usize) -> u64 {
        let wait = self.random.random_range(MS / 20..2 * MS);
        let at = (self.now + wait).max(self.arrives[direction][node] + 1);
        self.arrives[direction][node] = at;
        at - self.now
    }

    fn reply(&mut self, node: usize, connection: u64, reply: Reply) {
        if !self.calm() && self.random.random_bool(0.05) {
            return;
        }
        let wait = self.travel(1, node);
        if !self.calm() && self.random.random_bool(0.05) {
            let late = wait + self.random.random_range(0..100 * MS);
            self.after(late, Event::ToClient { node, connection, reply: reply.clone() });
        }
        self.after(wait, Event::ToClient { node, connection, reply });
    }

    fn run_effects(&mut self) {
        for effect in self.client.take_effects() {
            match effect {
                ClientEffect::Send { to, request } => {
                    let node = self.ids.iter().position(|id| *id == to).expect("a replica");
                    assert!(self.up[node], "sent to a node without a connection");
                    self.sent_count += 1;
                    if let Request::Io { stamp, operation, .. } = &request
                        && stamp.sequence < 1 << 63
                    {
                        assert!(stamp.sequence < stamp.oldest + SESSION_WINDOW);
                        let first = self.operations_sent.entry(stamp.sequence).or_insert_with(|| operation.clone());
                        assert_eq!(first, operation, "a sequence keeps its operation");
                    }
                    let connection = self.connection[node];
                    let wait = self.travel(0, node);
                    if !self.calm() && self.random.random_bool(0.05) {
                        let late = wait + self.random.random_range(0..300 * MS);
                        self.after(late, Event::ToServer { node, connection, request: request.clone() });
                    }
                    self.after(wait, Event::ToServer { node, connection, request });
                }
                ClientEffect::Complete(completion) => {
                    let id = completion.id.0;
                    let (_, states_before, operation) = self.submitted.remove(&id).expect("completed once");
                    self.completed_at.insert(id, self.now);
                    let data = completion.result.expect("nothing fails here");
                    if let Operation::Read { offset, .. } = operation {
                        let got = value_of(&data);
                        let legal = (states_before..=self.log.len()).any(|states| self.read(offset, states) == got);
                        assert!(legal, "read of block {offset} returned {got}, which no state allows");
                    }
                }
                ClientEffect::Attached { epoch, session, .. } => {
                    assert_eq!(self.attached.map(|(_, epoch, session)| (epoch, session)), Some((epoch, session)));
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    fn read(&self, block: u64, states: usize) -> u64 {
        self.log[..states].iter().rev().find(|(at, _)| *at == block).map_or(0, |(_, value)| *value)
    }

    fn submit_some(&mut self) {
        // Spread over all disturbances and the calm after them.
        let allowed = REQUESTS * u64::from(DISTURBANCES + 1 - self.disturbances) / u64::from(DISTURBANCES + 1);
        while (self.submitted_at.len() as u64) < allowed && self.client.can_submit() && self.random.random_bool(0.6) {
            let id = self.submitted_at.len() as u64 + 1;
            let offset = self.random.random_range(0..BLOCKS);
            let operation = match self.random.random_range(0..10) {
                0..6 => Operation::Write { offset, data: Bytes::copy_from_slice(&id.to_le_bytes()) },
                6..9 => Operation::Read { offset, length: 8 },
                _ => Operation::Flush,
            };
            self.submitted.insert(id, (self.now, self.log.len(), operation.clone()));
            self.submitted_at.insert(id, self.now);
            self.client.submit(Timestamp(self.now), BlockRequest { id: RequestId(id), operation });
            self.run_effects();
        }
    }

    fn position(&self) -> Position {
        Position { term: Term(self.term), index: LogIndex(self.index) }
    }

    fn on_request(&mut self, node: usize, connection: u64, request: Request) {
        if self.stopped[node] || self.connection[node] != connection || !self.up[node] {
            return;
        }
        self.introduced[node] = true;
        if self.leader != Some(node) {
            let leader = self.leader.filter(|_| self.random.random_bool(0.7)).map(|leader| self.ids[leader]);
            let term = Term(self.term);
            self.reply(node, connection, Reply::NotLeader { volume: self.volume, term, leader });
            return;
        }
        if let Request::Io { stamp, seen, operation, .. } = &request {
            assert!(*seen <= self.position(), "the client has seen what is not");
            let block = match operation {
                Operation::Write { .. } => None,
                Operation::Read { offset, .. } => {
                    Some(Bytes::copy_from_slice(&self.read(*offset, self.log.len()).to_le_bytes()))
                }
                _ => Some(Bytes::new()),
            };
            if let Some(data) = block {
                assert!(stamp.sequence >= 1 << 63);
                self.answer(node, connection, *stamp, data);
                return;
            }
        }
        self.proposals.push_back(Proposal { node, connection, request });
        let wait = self.random.random_range(MS / 10..5 * MS);
        let term = self.term;
        self.after(wait, Event::Commit { term });
    }

    fn answer(&mut self, node: usize, connection: u64, stamp: Stamp, data: Bytes) {
        let reply = Reply::Io {
            volume: self.volume,
            session: stamp.session,
            sequence: stamp.sequence,
            seen: self.position(),
            result: Ok(data),
        };
        self.reply(node, connection, reply);
    }

    fn apply(&mut self, proposal: Proposal, answered: bool) {
        self.index += 1;
        let Proposal { node, connection, request } = proposal;
        match request {
            Request::Attach { instance, .. } => {
                if self.attached.is_none_or(|(held, _, _)| held != instance) {
                    self.epochs += 1;
                    self.attached = Some((instance, Epoch(self.epochs), Session(self.epochs)));
                }
                let (_, epoch, session) = self.attached.expect("just attached");
                let geometry = Geometry::new(1 << 20, 512).unwrap();
                let formatted = Formatted::None;
                let volume = self.volume;
                if answered {
                    let reply = Reply::Attached { volume, instance, epoch, session, geometry, formatted };
                    self.reply(node, connection, reply);
                }
            }
            Request::Io { stamp, operation: Operation::Write { offset, data }, .. } => {
                let (_, epoch, session) = self.attached.expect("a session");
                assert_eq!((stamp.epoch, stamp.session), (epoch, session));
                self.low = self.low.max(stamp.oldest);
                self.answered = self.answered.split_off(&self.low);
                let forgotten = stamp.sequence < self.low;
                if !forgotten && self.answered.insert(stamp.sequence) {
                    self.log.push((offset, value_of(&data)));
                }
                if answered && !forgotten {
                    self.answer(node, connection, stamp, Bytes::new());
                }
            }
            other => panic!("nothing proposes {other:?}"),
        }
    }

    fn lose_leader(&mut self) {
        // Any prefix of the proposals may have reached a quorum; its answers died with the leader.
        let survive = self.random.random_range(0..=self.proposals.len());
        for proposal in self.proposals.drain(..).take(survive).collect::<Vec<_>>() {
            self.apply(proposal, false);
        }
        self.leader = None;
        let wait = self.random.random_range(MS..400 * MS);
        self.after(wait, Event::Elect);
    }

    fn close(&mut self, node: usize) {
        if self.up[node] {
            self.up[node] = false;
            self.connection[node] += 1;
            self.introduced[node] = false;
            self.client.on_closed(Timestamp(self.now), self.ids[node]);
            let wait = self.random.random_range(0..200 * MS);
            self.after(wait, Event::Connect { node });
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::ToServer { node, connection, request } => self.on_request(node, connection, request),
            Event::ToClient { node, connection, reply } => {
                if self.up[node] && self.connection[node] == connection {
                    self.client.on_reply(Timestamp(self.now), self.ids[node], reply);
                }
            }
            Event::Commit { term } => {
                if self.term == term
                    && let Some(leader) = self.leader
                    && !self.stopped[leader]
                    && let Some(proposal) = self.proposals.pop_front()
                {
                    self.apply(proposal, true);
                }
            }
            Event::Elect => {
                let candidates: Vec<usize> = (0..NODES).filter(|node| !self.stopped[*node]).collect();
                if candidates.len() < 2 {
                    self.after(50 * MS, Event::Elect);
                    return;
                }
                let node = candidates[self.random.random_range(0..candidates.len())];
                self.term += 1;
                self.index += 1;
                self.leader = Some(node);
                if self.up[node] && self.introduced[node] && (self.calm() || self.random.random_bool(0.7)) {
                    let reply = Reply::Leading { volume: self.volume, term: Term(self.term) };
                    self.reply(node, self.connection[node], reply);
                }
            }
            Event::Disturb => {
                self.disturbances -= 1;
                match (self.random.random_range(0..4), self.leader) {
                    (0, Some(leader)) => {
                        self.lose_leader();
                        self.close(leader);
                    }
                    (1, Some(_)) => self.lose_leader(),
                    (2, Some(leader)) => {
                        self.stopped[leader] = true;
                        self.lose_leader();
                        let wait = self.random.random_range(0..1500 * MS);
                        self.after(wait, Event::Resume { node: leader });
                    }
                    _ => {
                        let node = self.random.random_range(0..NODES);
                        self.close(node);
                    }
                }
                if self.disturbances > 0 {
                    let wait = self.random.random_range(0..600 * MS);
                    self.after(wait, Event::Disturb);
                }
            }
            Event::Connect { node } => {
                self.up[node] = true;
                self.client.on_connected(Timestamp(self.now), self.ids[node]);
            }
            Event::Resume { node } => self.stopped[node] = false,
        }
        self.run_effects();
        self.submit_some();
    }

    fn run(&mut self) {
        let mut calm_since = None;
        loop {
            let done = self.submitted_at.len() == REQUESTS as usize && self.submitted.is_empty();
            if done && self.calm() && self.client.deadline().is_none() {
                break;
            }
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let deadline = self.client.deadline().map(|deadline| deadline.0.max(self.now));
            let Some(next) = event.into_iter().chain(deadline).min() else {
                assert!(self.submitted.is_empty(), "nothing will happen any more, and requests wait");
                self.submit_some();
                continue;
            };
            self.now = next;
            if self.calm() && self.leader.is_some() && self.stopped == [false; NODES] && self.up == [true; NODES] {
                let since = *calm_since.get_or_insert(self.now);
                assert!(self.now - since <= SETTLE_MAX.as_nanos() as u64, "requests hang: {:?}", self.client.status());
            } else {
                calm_since = None;
            }
            assert!(self.sent_count < 200_000, "the client storms");
            if deadline.is_some_and(|deadline| deadline <= next) {
                self.client.on_deadline(Timestamp(self.now));
                let later = self.client.deadline().is_none_or(|deadline| deadline.0 > self.now);
                assert!(later, "a deadline that was served must lie in the future");
                self.run_effects();
                self.submit_some();
            } else {
                let (_, event) = self.events.pop_first().expect("it was just seen");
                self.step(event);
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.client.status().phase, Phase::Serving);
        let mut place = BTreeMap::new();
        for (position, (_, value)) in self.log.iter().enumerate() {
            assert_eq!(place.insert(*value, position), None, "write {value} took effect twice");
        }
        let is_write = |id: &u64| {
            self.operations_sent.values().any(|op| matches!(op, Operation::Write { data, .. } if value_of(data) == *id))
        };
        let writes: Vec<u64> = self.completed_at.keys().copied().filter(is_write).collect();
        assert_eq!(writes.len(), place.len(), "every write completed, each is in the log");
        assert!(writes.len() > 50, "the workload writes");
        for first in &writes {
            for second in &writes {
                if self.completed_at[first] < self.submitted_at[second] {
                    assert!(place[first] < place[second], "write {second} began after {first} ended, and precedes it");
                }
            }
        }
    }
}

#[test]
fn every_write_takes_effect_once_and_nothing_hangs_through_leader_changes() {
    for seed in 0..400 {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run();
            world.check();
        });
        if let Err(panic) = outcome {
            eprintln!("failed with seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut world = World::new(seed);
        world.run();
        (world.now, world.sent_count, world.log)
    };
    assert_eq!(run(7), run(7));
}
