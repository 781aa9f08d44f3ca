//! Random histories of several clients, leaders and replicas against a naive array of bytes.
//!
//! The world has one log (consensus is not the subject here), three replicas that apply it at their own pace, and a
//! leader with its admission. The oracle knows requests as the clients made them, in bytes, and replays them at their
//! log positions. After every applied entry a replica must hold the oracle's bytes and the very state bytes of the
//! first replica that got there.

#![allow(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use bytes::Bytes;
use holdfast_block::{Error, Geometry, Operation};
use holdfast_id::VolumeId;
use holdfast_protocol::session::{Epoch, Instance, Session, Stamp};
use holdfast_volume::admission::TICKETS_PER_STAMP_MAX;
use holdfast_volume::{Admission, AdmitError, Applied, Command, Mutation, Name, Outcome, Step, Volume, VolumeSpec};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const BLOCKS: usize = 6;
const SECTORS: usize = BLOCKS * BLOCK / SECTOR;
const REPLICAS: usize = 3;
const CLIENTS: usize = 3;

#[derive(Clone, Debug)]
enum Action {
    Attach {
        client: usize,
        take_over: bool,
    },
    OpenSession {
        client: usize,
    },
    Detach {
        client: usize,
    },
    Submit {
        client: usize,
        kind: Kind,
        sector: usize,
        sectors: usize,
    },
    /// A client sends a request again, or a copy of one arrives late, whatever became of it.
    Resend {
        nth: usize,
    },
    /// An entry that the early checks would have kept out gets into the log.
    LogStraggler {
        nth: usize,
    },
    AnswerRead {
        nth: usize,
        failed: bool,
    },
    Commit {
        entries: usize,
    },
    Apply {
        replica: usize,
        reply_lost: bool,
    },
    /// Part of what is not committed is lost.
    ChangeLeader {
        to: usize,
        keep: usize,
    },
    RefuseNext,
    Restart {
        replica: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Write,
    Zeroes,
    Discard,
}

fn action() -> impl Strategy<Value = Action> {
    let client = 0..CLIENTS;
    let kind = prop_oneof![4 => Just(Kind::Write), 1 => Just(Kind::Zeroes), 1 => Just(Kind::Discard)];
    let aligned = (0..BLOCKS, 1..4usize).prop_map(|(block, blocks)| (block * 8, blocks * 8));
    let range = prop_oneof![1 => aligned, 1 => (0..SECTORS, 1..28usize)];
    prop_oneof![
        3 => (client.clone(), any::<bool>()).prop_map(|(client, take_over)| Action::Attach { client, take_over }),
        1 => client.clone().prop_map(|client| Action::OpenSession { client }),
        1 => client.clone().prop_map(|client| Action::Detach { client }),
        16 => (client, kind, range).prop_map(|(client, kind, (sector, sectors))| Action::Submit {
            client,
            kind,
            sector,
            sectors: sectors.min(SECTORS - sector)
        }),
        3 => any::<usize>().prop_map(|nth| Action::Resend { nth }),
        3 => any::<usize>().prop_map(|nth| Action::LogStraggler { nth }),
        8 => (any::<usize>(), 0..20u8).prop_map(|(nth, n)| Action::AnswerRead { nth, failed: n == 0 }),
        10 => (1..4usize).prop_map(|entries| Action::Commit { entries }),
        24 => (0..REPLICAS, 0..5u8).prop_map(|(replica, n)| Action::Apply { replica, reply_lost: n == 0 }),
        1 => (0..REPLICAS, 0..4usize).prop_map(|(to, keep)| Action::ChangeLeader { to, keep }),
        1 => Just(Action::RefuseNext),
        2 => (0..REPLICAS).prop_map(|replica| Action::Restart { replica }),
    ]
}

fn history() -> impl Strategy<Value = Vec<Action>> {
    prop::collection::vec(action(), 1..250)
}

/// A request as its client made it.
#[derive(Clone)]
struct Sent {
    client: usize,
    stamp: Stamp,
    kind: Kind,
    start: usize,
    fill: Vec<u8>,
    answered: bool,
}

impl Sent {
    fn operation(&self) -> Operation {
        let (offset, length) = (self.start as u64, self.fill.len() as u64);
        match self.kind {
            Kind::Write => Operation::Write { offset, data: Bytes::from(self.fill.clone()) },
            Kind::Zeroes => Operation::WriteZeroes { offset, length },
            Kind::Discard => Operation::Discard { offset, length },
        }
    }

    fn overlaps_blocks_of(&self, other: &Sent) -> bool {
        let blocks = |sent: &Sent| sent.start / BLOCK..=(sent.start + sent.fill.len() - 1) / BLOCK;
        let (a, b) = (blocks(self), blocks(other));
        a.start() <= b.end() && b.start() <= a.end()
    }
}

#[derive(Default)]
struct Client {
    instance: Option<Instance>,
    /// Epoch and session, once granted and until fenced.
    session: Option<(Epoch, Session)>,
    next_sequence: u64,
}

#[derive(Clone)]
enum Meaning {
    Request { sent: usize },
    Attach { client: usize, instance: Instance },
    OpenSession { client: usize, instance: Instance },
    Detach { client: usize },
}

#[derive(Clone)]
struct LogEntry {
    header: Bytes,
    payload: Bytes,
    meaning: Meaning,
    /// Where the present leader proposed it on behalf of a request.
    ticket: Option<u64>,
}

struct Replica {
    volume: Volume,
    bytes: Vec<u8>,
    applied: usize,
}

/// What is true after the first `n` entries; one element per `n`.
struct Truth {
    bytes: Vec<u8>,
    state: Bytes,
    outcome: Option<Outcome>,
}

struct World {
    log: Vec<LogEntry>,
    committed: usize,
    replicas: Vec<Replica>,
    leader: usize,
    admission: Admission,
    clients: Vec<Client>,
    sent: Vec<Sent>,
    tickets: BTreeMap<u64, usize>,
    /// First tickets of this leadership in the order of admission, and those of them that were proposed.
    admitted: Vec<u64>,
    proposed: BTreeSet<u64>,
    finished: BTreeSet<u64>,
    /// Of all leaderships.
    completed: BTreeSet<u64>,
    reads: Vec<(u64, usize, usize, Option<Bytes>)>,
    next_ticket: u64,
    next_instance: u128,
    refuse_next: bool,
    truths: Vec<Truth>,
    // The oracle's own view of the last entry in `truths`.
    current: Option<(Epoch, Session)>,
    epochs: u64,
    sessions: u64,
    answers: BTreeMap<u128, (Epoch, Session)>,
    effective: BTreeMap<(Session, u64), usize>,
    marks: BTreeMap<Session, u64>,
}

type Check = Result<(), String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(what()) }
}

fn equal<T: PartialEq + Debug>(what: &str, actual: T, expected: T) -> Check {
    ensure(actual == expected, || format!("{what}: {actual:?} instead of {expected:?}"))
}

impl World {
    fn new() -> World {
        let spec = VolumeSpec {
            id: VolumeId::from_bytes([7; 16]).unwrap(),
            name: Name::new("data").unwrap(),
            geometry: Geometry::new((BLOCKS * BLOCK) as u64, 512).unwrap(),
        };
        let volume = Volume::new(spec);
        let bytes = vec![0; BLOCKS * BLOCK];
        World {
            log: Vec::new(),
            committed: 0,
            replicas: (0..REPLICAS)
                .map(|_| Replica { volume: volume.clone(), bytes: bytes.clone(), applied: 0 })
                .collect(),
            leader: 0,
            admission: Admission::new(),
            clients: (0..CLIENTS).map(|_| Client::default()).collect(),
            sent: Vec::new(),
            tickets: BTreeMap::new(),
            admitted: Vec::new(),
            proposed: BTreeSet::new(),
            finished: BTreeSet::new(),
            completed: BTreeSet::new(),
            reads: Vec::new(),
            next_ticket: 0,
            next_instance: 1,
            refuse_next: false,
            truths: vec![Truth { bytes, state: volume.encode_state(), outcome: None }],
            current: None,
            epochs: 0,
            sessions: 0,
            answers: BTreeMap::new(),
            effective: BTreeMap::new(),
            marks: BTreeMap::new(),
        }
    }

    fn step(&mut self, action: Action) -> Check {
        match action {
            Action::Attach { client, take_over } => {
                let pending = self.clients[client].session.is_none();
                let instance = match self.clients[client].instance {
                    Some(instance) if pending => instance,
                    _ => self.new_instance(),
                };
                self.clients[client] = Client { instance: Some(instance), ..Client::default() };
                let holder = Name::new(format!("client-{client}")).unwrap();
                self.propose(Command::Attach { holder, instance, take_over }, Meaning::Attach { client, instance });
            }
            Action::OpenSession { client } => {
                if let Some((epoch, _)) = self.clients[client].session {
                    let instance = self.new_instance();
                    self.clients[client] = Client { instance: Some(instance), ..Client::default() };
                    let command = Command::OpenSession { epoch, instance };
                    self.propose(command, Meaning::OpenSession { client, instance });
                }
            }
            Action::Detach { client } => {
                if let Some((epoch, _)) = self.clients[client].session {
                    self.propose(Command::Detach { epoch }, Meaning::Detach { client });
                }
            }
            Action::Submit { client, kind, sector, sectors } => {
                if let Some((epoch, session)) = self.clients[client].session {
                    let sequence = self.clients[client].next_sequence + 1;
                    self.clients[client].next_sequence = sequence;
                    let oldest = self
                        .sent
                        .iter()
                        .find(|sent| sent.client == client && sent.stamp.session == session && !sent.answered)
                        .map_or(sequence, |sent| sent.stamp.sequence);
                    let stamp = Stamp { epoch, session, sequence, oldest };
                    let tag = (self.sent.len() + 1).to_le_bytes();
                    let fill = match kind {
                        Kind::Write => tag.iter().copied().cycle().take(sectors * SECTOR).collect(),
                        Kind::Zeroes | Kind::Discard => vec![0; sectors * SECTOR],
                    };
                    self.sent.push(Sent { client, stamp, kind, start: sector * SECTOR, fill, answered: false });
                    self.admit(self.sent.len() - 1)?;
                }
            }
            Action::Resend { nth } => {
                if !self.sent.is_empty() {
                    self.admit(nth % self.sent.len())?;
                }
            }
            Action::LogStraggler { nth } => self.log_straggler(nth),
            Action::AnswerRead { nth, failed } => {
                if !self.reads.is_empty() {
                    let at = nth % self.reads.len();
                    self.answer_read(at, failed)?;
                }
            }
            Action::Commit { entries } => self.committed = self.log.len().min(self.committed + entries),
            Action::Apply { replica, reply_lost } => {
                if self.replicas[replica].applied < self.committed {
                    self.apply(replica, reply_lost)?;
                }
            }
            Action::ChangeLeader { to, keep } => self.change_leader(to, keep)?,
            Action::RefuseNext => self.refuse_next = true,
            Action::Restart { replica } => {
                let volume = &mut self.replicas[replica].volume;
                *volume = Volume::decode_state(&volume.encode_state()).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Everybody gets everything, and every client that is not fenced gets its answers.
    fn settle(&mut self) -> Check {
        for _ in 0..2 {
            loop {
                while !self.reads.is_empty() {
                    self.answer_read(0, false)?;
                }
                self.committed = self.log.len();
                for replica in 0..REPLICAS {
                    while self.replicas[replica].applied < self.committed {
                        self.apply(replica, false)?;
                    }
                }
                if self.committed == self.log.len() && self.reads.is_empty() {
                    break;
                }
            }
            ensure(self.admission.is_empty(), || format!("{} requests are stuck", self.admission.len()))?;
            self.change_leader((self.leader + 1) % REPLICAS, 0)?;
        }
        for sent in &self.sent {
            let live = self.clients[sent.client].session == Some((sent.stamp.epoch, sent.stamp.session));
            let current = self.current == Some((sent.stamp.epoch, sent.stamp.session));
            ensure(sent.answered || !live || !current, || format!("{:?} has no answer", sent.stamp))?;
        }
        Ok(())
    }

    fn new_instance(&mut self) -> Instance {
        self.next_instance += 1;
        Instance(self.next_instance)
    }

    fn propose(&mut self, command: Command, meaning: Meaning) {
        self.log.push(LogEntry { header: command.encode(), payload: Bytes::new(), meaning, ticket: None });
    }

    fn admit(&mut self, sent: usize) -> Check {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, sent);
        let Sent { stamp, .. } = self.sent[sent];
        let operation = self.sent[sent].operation();
        let before = self.admission.len();
        let volume = &self.replicas[self.leader].volume;
        let steps = match self.admission.admit(volume, ticket, stamp, operation) {
            Ok(steps) => steps,
            Err(AdmitError::Busy) => {
                // Only a stamp that as many tickets wait for already; the client will send it again.
                self.tickets.remove(&ticket);
                let waits = |(ticket, of): (&u64, &usize)| *of == sent && !self.completed.contains(ticket);
                let waiting = self.tickets.iter().filter(|pair| waits(*pair)).count();
                return ensure(waiting >= TICKETS_PER_STAMP_MAX, || format!("{stamp:?} refused behind {waiting}"));
            }
            Err(error) => return Err(format!("{stamp:?}: {error}")),
        };
        if self.admission.len() > before {
            self.admitted.push(ticket);
        }
        self.take(steps, false)
    }

    /// Only what changes nothing may bypass admission: of a session that is over, or applied before.
    fn log_straggler(&mut self, nth: usize) {
        let leader = &self.replicas[self.leader].volume;
        let harmless = |sent: &&Sent| {
            let Stamp { session, sequence, .. } = sent.stamp;
            sent.start.is_multiple_of(BLOCK)
                && sent.fill.len().is_multiple_of(BLOCK)
                && (session < leader.session() || self.effective.contains_key(&(session, sequence)))
        };
        let stragglers: Vec<Sent> = self.sent.iter().filter(harmless).cloned().collect();
        if stragglers.is_empty() {
            return;
        }
        let sent = &stragglers[nth % stragglers.len()];
        let checksums = sent.fill.chunks(BLOCK).map(holdfast_block::checksum).collect();
        let command = Command::Write { stamp: sent.stamp, first_block: (sent.start / BLOCK) as u64, checksums };
        let index = self.sent.iter().position(|other| other.stamp == sent.stamp).expect("it was sent");
        self.log.push(LogEntry {
            header: command.encode(),
            payload: Bytes::from(sent.fill.clone()),
            meaning: Meaning::Request { sent: index },
            ticket: None,
        });
    }

    fn answer_read(&mut self, at: usize, failed: bool) -> Check {
        let (read, first, count, early) = self.reads.remove(at);
        let late = || Bytes::copy_from_slice(&self.replicas[self.leader].bytes[first * BLOCK..(first + count) * BLOCK]);
        let result = if failed { Err(Error::Corrupt) } else { Ok(early.unwrap_or_else(late)) };
        let steps = self.admission.on_read(read, result);
        self.take(steps, false)
    }

    fn take(&mut self, steps: Vec<Step>, reply_lost: bool) -> Check {
        for step in steps {
            match step {
                Step::Propose { ticket, header, payload } => {
                    let sent = self.tickets[&ticket];
                    for earlier in self.admitted.iter().take_while(|earlier| **earlier != ticket) {
                        let open = !self.proposed.contains(earlier) && !self.finished.contains(earlier);
                        let overlaps = self.sent[self.tickets[earlier]].overlaps_blocks_of(&self.sent[sent]);
                        ensure(!open || !overlaps, || format!("ticket {ticket} overtakes {earlier}"))?;
                    }
                    if std::mem::take(&mut self.refuse_next) {
                        self.finished.insert(ticket);
                        let steps = self.admission.on_refused(ticket, Error::NoSpace);
                        self.take(steps, false)?;
                        continue;
                    }
                    ensure(self.proposed.insert(ticket), || format!("ticket {ticket} proposed twice"))?;
                    let meaning = Meaning::Request { sent };
                    self.log.push(LogEntry { header, payload, meaning, ticket: Some(ticket) });
                }
                Step::Read { read, first_block, count } => {
                    let (first, count) = (first_block as usize, count as usize);
                    let bytes = &self.replicas[self.leader].bytes[first * BLOCK..(first + count) * BLOCK];
                    let early = read.is_multiple_of(2).then(|| Bytes::copy_from_slice(bytes));
                    self.reads.push((read, first, count, early));
                }
                Step::Complete { ticket, result } => {
                    self.finished.insert(ticket);
                    ensure(self.completed.insert(ticket), || format!("ticket {ticket} completed twice"))?;
                    let sent = self.tickets[&ticket];
                    self.complete(sent, result, reply_lost)?;
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, sent: usize, result: Result<(), Error>, reply_lost: bool) -> Check {
        let Stamp { epoch, session, sequence, .. } = self.sent[sent].stamp;
        match result {
            Ok(()) => {
                let effects = self.effective.get(&(session, sequence)).copied().unwrap_or(0);
                equal("effects of an acknowledged write", effects, 1)?;
            }
            Err(Error::Fenced) => {
                ensure(self.current != Some((epoch, session)), || format!("{session:?} is open, but was fenced"))?;
                let client = &mut self.clients[self.sent[sent].client];
                if client.session == Some((epoch, session)) && !reply_lost {
                    *client = Client::default();
                }
            }
            Err(Error::Unavailable) => {
                let mark = self.marks.get(&session).copied().unwrap_or(1);
                ensure(sequence < mark, || format!("sequence {sequence} is not below the mark {mark}"))?;
            }
            // A read of an edge failed, or the log refused; a copy of the request may still succeed.
            Err(Error::Corrupt | Error::NoSpace) => {}
            Err(error) => return Err(format!("{:?}: {error}", self.sent[sent].stamp)),
        }
        self.sent[sent].answered |= !reply_lost;
        Ok(())
    }

    fn apply(&mut self, replica: usize, reply_lost: bool) -> Check {
        let at = self.replicas[replica].applied;
        let entry = self.log[at].clone();
        let Replica { volume, bytes, applied } = &mut self.replicas[replica];
        let Applied { outcome, mutations, .. } = volume
            .apply(at as u64 + 1, &entry.header, &entry.payload)
            .map_err(|error| format!("entry {at}: {error}"))?;
        *applied += 1;
        for mutation in mutations {
            match mutation {
                Mutation::Write { first_block, data, checksums } => {
                    equal("checksums", data.chunks(BLOCK).map(holdfast_block::checksum).collect(), checksums.to_vec())?;
                    let start = first_block as usize * BLOCK;
                    bytes[start..start + data.len()].copy_from_slice(&data);
                }
                Mutation::Zero { first_block, count, .. } => {
                    bytes[first_block as usize * BLOCK..][..count as usize * BLOCK].fill(0);
                }
            }
        }
        if self.truths.len() == at + 1 {
            let state = self.replicas[replica].volume.encode_state();
            self.foretell(&entry, &outcome, state)?;
        }
        let (truth, replica_now) = (&self.truths[at + 1], &self.replicas[replica]);
        equal("outcome", Some(&outcome), truth.outcome.as_ref())?;
        ensure(replica_now.bytes == truth.bytes, || format!("bytes of replica {replica} after entry {at}"))?;
        ensure(replica_now.volume.encode_state() == truth.state, || {
            format!("state of replica {replica} after entry {at}")
        })?;
        if replica != self.leader {
            return Ok(());
        }
        match entry.meaning {
            Meaning::Attach { client, instance } | Meaning::OpenSession { client, instance } => {
                if let (Outcome::Attached { epoch, session }, false) = (&outcome, reply_lost)
                    && self.clients[client].instance == Some(instance)
                    && self.clients[client].session.is_none()
                {
                    self.clients[client].session = Some((*epoch, *session));
                }
            }
            Meaning::Detach { client } => self.clients[client] = Client::default(),
            Meaning::Request { .. } => {}
        }
        if let Some(ticket) = entry.ticket {
            let steps = self.admission.on_applied(ticket, &outcome);
            self.take(steps, reply_lost)?;
        }
        Ok(())
    }

    /// The naive meaning of an entry at its position; only attachments take their numbers from the first outcome,
    /// after a check that they could be those.
    fn foretell(&mut self, entry: &LogEntry, outcome: &Outcome, state: Bytes) -> Check {
        let mut bytes = self.truths.last().expect("the empty log has a truth").bytes.clone();
        match entry.meaning {
            Meaning::Request { sent } => {
                let Sent { stamp, start, ref fill, .. } = self.sent[sent];
                let Stamp { epoch, session, sequence, oldest } = stamp;
                let expected = if self.current != Some((epoch, session)) {
                    Outcome::Fenced
                } else {
                    let mark = self.marks.entry(session).or_insert(1);
                    *mark = oldest.max(*mark);
                    if sequence < *mark {
                        Outcome::Forgotten
                    } else if self.effective.contains_key(&(session, sequence)) {
                        Outcome::Duplicate
                    } else {
                        bytes[start..start + fill.len()].copy_from_slice(fill);
                        *self.effective.entry((session, sequence)).or_insert(0) += 1;
                        Outcome::Done
                    }
                };
                equal("outcome of a request", outcome, &expected)?;
            }
            Meaning::Attach { instance, .. } | Meaning::OpenSession { instance, .. } => {
                let grows = u64::from(matches!(entry.meaning, Meaning::Attach { .. }));
                if let Outcome::Attached { epoch, session } = *outcome {
                    if let Some(answer) = self.answers.get(&instance.0) {
                        equal("answer to a repeated instance", (epoch, session), *answer)?;
                        equal("session of a repeated instance", Some((epoch, session)), self.current)?;
                    } else {
                        equal("epoch", epoch.0, self.epochs + grows)?;
                        equal("session", session.0, self.sessions + 1)?;
                        (self.epochs, self.sessions) = (epoch.0, session.0);
                        self.answers.insert(instance.0, (epoch, session));
                        self.current = Some((epoch, session));
                    }
                } else if self.current.is_none() && grows == 1 && !self.answers.contains_key(&instance.0) {
                    return Err(format!("a free volume refused: {outcome:?}"));
                }
            }
            Meaning::Detach { .. } => {
                if *outcome == Outcome::Detached {
                    self.current = None;
                }
            }
        }
        self.truths.push(Truth { bytes, state, outcome: Some(outcome.clone()) });
        Ok(())
    }

    /// What remains in the log is committed by the new leader's first entry, and applied there before it serves.
    fn change_leader(&mut self, to: usize, keep: usize) -> Check {
        self.admission.clear();
        // None of these may be completed by the next leader.
        self.completed.extend(self.tickets.keys());
        self.admitted.clear();
        self.proposed.clear();
        self.finished.clear();
        self.log.truncate(self.committed + keep);
        self.committed = self.log.len();
        for entry in &mut self.log {
            entry.ticket = None;
        }
        self.leader = to;
        while self.replicas[to].applied < self.committed {
            self.apply(to, false)?;
        }
        for client in 0..CLIENTS {
            for sent in 0..self.sent.len() {
                let session = Some((self.sent[sent].stamp.epoch, self.sent[sent].stamp.session));
                let waits = self.sent[sent].client == client && !self.sent[sent].answered;
                if waits && self.clients[client].session == session {
                    self.admit(sent)?;
                }
            }
        }
        Ok(())
    }
}

fn run(actions: Vec<Action>) -> Result<World, String> {
    let mut world = World::new();
    // Most histories begin with somebody attached, or their first steps would do nothing.
    world.step(Action::Attach { client: 0, take_over: false })?;
    world.committed = 1;
    world.apply(0, false)?;
    for action in actions {
        world.step(action)?;
    }
    world.settle()?;
    Ok(world)
}

proptest! {
    // PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.max(400),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn every_history_ends_like_the_naive_one(actions in history()) {
        run(actions).map_err(TestCaseError::fail)?;
    }
}

/// The histories would prove little if they did not come to what can go wrong.
#[test]
fn histories_come_to_every_outcome_and_shape() {
    let config = Config { cases: 100, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let seen = RefCell::new(BTreeMap::<String, usize>::new());
    TestRunner::new_with_rng(config, rng)
        .run(&history(), |actions| {
            let world = run(actions).map_err(TestCaseError::fail)?;
            let count = |what: &str| *seen.borrow_mut().entry(what.to_owned()).or_default() += 1;
            for (entry, truth) in world.log.iter().zip(&world.truths[1..]) {
                let outcome = format!("{:?}", truth.outcome.as_ref().expect("an entry has an outcome"));
                count(outcome.split(' ').next().expect("a word"));
                match Command::decode(&entry.header).expect("ours") {
                    Command::Zero { head: Some(_), tail: Some(_), .. } => count("zero with both edges"),
                    Command::Zero { discard: true, .. } => count("discard"),
                    Command::Write { .. } => count("write"),
                    _ => {}
                }
            }
            Ok(())
        })
        .expect("the histories hold");
    let seen = seen.into_inner();
    for what in [
        "Done",
        "Duplicate",
        "Forgotten",
        "Fenced",
        "Attached",
        "Held",
        "Stale",
        "Detached",
        "zero with both edges",
        "discard",
        "write",
    ] {
        assert!(seen.get(what).copied().unwrap_or(0) >= 10, "{what}: {seen:?}");
    }
}

/// Each planted bug must be found by the very test above, within as many cases.
#[cfg(feature = "planted")]
mod planted {
    use super::*;
    use holdfast_planted::{Bug, plant};
    use proptest::test_runner::TestError;

    fn found(bug: Bug) -> bool {
        let config = Config { cases: 400, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        plant(Some(bug));
        let result = TestRunner::new_with_rng(config, rng)
            .run(&history(), |actions| run(actions).map(drop).map_err(TestCaseError::fail));
        plant(None);
        matches!(result, Err(TestError::Fail(..)))
    }

    #[test]
    fn a_session_lost_in_a_snapshot_is_found() {
        assert!(found(Bug::SessionLostInSnapshot));
    }

    #[test]
    fn a_fence_only_at_admission_is_found() {
        assert!(found(Bug::FenceOnlyAtAdmission));
    }

    #[test]
    fn a_duplicate_that_takes_effect_is_found() {
        assert!(found(Bug::DuplicateApplied));
    }

    #[test]
    fn a_read_before_earlier_writes_are_applied_is_found() {
        assert!(found(Bug::ReadBeforeApplied));
    }

    #[test]
    fn a_write_that_overtakes_a_read_modify_write_is_found() {
        assert!(found(Bug::OvertakesReadModifyWrite));
    }
}
