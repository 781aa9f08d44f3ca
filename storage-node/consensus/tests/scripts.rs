//! Scripts with expected output, in `testdata`: each reads as a story of one behaviour.
//!
//! Time passes only by `tick`; heartbeats are answered at once between nodes that are not cut off. Messages wait for
//! `deliver`, writes for `persist`; `stabilize` does both until nothing is left. A script is written anew with
//! `REWRITE=1`.
//!
//! Positions are printed as term/index. One clock serves all nodes here; drift is the random tests' matter.

mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

use cluster::{Disk, Node, Number, configuration, node, number, replica};
use datadriven::{TestCase, walk};
use holdfast_consensus::liveness::pairs::PairEvent;
use holdfast_consensus::{
    AppendResult, Body, Configuration, Effect, Entry, HardState, LogIndex, Member, Message, MessageBody, Position,
    Role, Shortage, Term, Timestamp,
};

/// One step of `tick`.
const STEP: Duration = Duration::from_millis(1);
/// With this seed node 3 stands first, then node 1.
const SEED: u64 = 35;
/// Rounds of `stabilize`; more means that two replicas keep each other busy.
const ROUNDS_MAX: usize = 100;

#[derive(Default)]
struct Script {
    now: Timestamp,
    nodes: BTreeMap<u8, Node>,
    down: BTreeMap<u8, Disk>,
    network: Vec<(u8, u8, Message<Number>)>,
    cut: BTreeSet<u8>,
    out: String,
}

#[test]
fn scripts() {
    walk("tests/testdata", |file| {
        let mut script = Script::default();
        file.run(|case| {
            script.command(case);
            let out = std::mem::take(&mut script.out);
            if out.is_empty() { "ok\n".to_string() } else { out }
        });
    });
}

fn arg<T>(case: &mut TestCase, name: &str) -> T
where
    T: FromStr,
    T::Err: Error + Send + Sync + 'static,
{
    case.take_arg(name).expect("the argument stands there and parses")
}

fn optional<T>(case: &mut TestCase, name: &str) -> Option<T>
where
    T: FromStr,
    T::Err: Error + Send + Sync + 'static,
{
    case.try_take_arg(name).expect("parses")
}

fn list(case: &mut TestCase, name: &str) -> Vec<u8> {
    case.try_take_args(name).expect("parses").unwrap_or_default()
}

impl Script {
    fn command(&mut self, case: &mut TestCase) {
        let directive = case.directive.clone();
        match directive.as_str() {
            "add-nodes" => self.add_nodes(case),
            "tick" => {
                let ms: u64 = arg(case, "ms");
                let run = case.take_flag("run").expect("flag");
                self.tick(Duration::from_millis(ms), run);
            }
            "deliver" | "drop" => {
                let (from, to) = (optional(case, "from"), optional(case, "to"));
                self.deliver(from, to, directive == "drop");
            }
            "persist" => {
                let n = arg(case, "node");
                let count = optional(case, "count").unwrap_or(self.nodes[&n].writing.len());
                self.persist(n, count);
            }
            "stabilize" => self.stabilize(&list(case, "nodes")),
            "propose" => {
                let (n, value) = (arg(case, "node"), arg(case, "value"));
                let now = self.now;
                let result = self.at(n).call(|raft, liveness| raft.propose(now, liveness, Number(value)));
                self.told(n, result.map(|index| format!("index {}", index.0)));
            }
            "change" => {
                let n = arg(case, "node");
                let mut new = configuration(&list(case, "voters"), &list(case, "learners"));
                new.min_data = optional(case, "min-data").unwrap_or(1);
                let now = self.now;
                let result = self.at(n).call(|raft, liveness| raft.propose_configuration(now, liveness, new));
                self.told(n, result.map(|index| format!("index {}", index.0)));
            }
            "read" => {
                let (n, token, now) = (arg(case, "node"), arg(case, "token"), self.now);
                let result = self.at(n).call(|raft, liveness| raft.read_index(now, liveness, token));
                self.told(n, result.map(|()| String::new()));
            }
            "transfer" => {
                let (n, to, now): (u8, u8, _) = (arg(case, "node"), arg(case, "to"), self.now);
                let result = self.at(n).call(|raft, liveness| raft.transfer(now, liveness, replica(to)));
                self.told(n, result.map(|()| String::new()));
            }
            "suspect" => {
                let (n, peer): (u8, u8) = (arg(case, "node"), arg(case, "peer"));
                self.at(n).pairs.on_closed(node(peer));
                self.settle(n);
            }
            "step-down" => {
                let (n, now) = (arg(case, "node"), self.now);
                self.at(n).call(|raft, liveness| raft.step_down(now, liveness));
                self.settle(n);
            }
            "full" => {
                let (n, full): (_, bool) = (arg(case, "node"), arg(case, "is"));
                self.at(n).raft.set_full(full.then_some(Shortage::Data));
            }
            "isolate" => {
                self.cut.insert(arg(case, "node"));
            }
            "heal" => self.cut.clear(),
            "crash" => {
                let n = arg(case, "node");
                let mut disk = self.nodes.remove(&n).expect("up").crash(0);
                if let Some(last) = optional(case, "damaged-after") {
                    disk.damaged = true;
                    disk.entries.retain(|entry| entry.position.index <= LogIndex(last));
                }
                self.network.retain(|(from, to, _)| *from != n && *to != n);
                self.down.insert(n, disk);
            }
            "start" => {
                let n = arg(case, "node");
                let disk = self.down.remove(&n).expect("down");
                self.start(n, disk);
            }
            "compact" => {
                let (n, to) = (arg(case, "node"), arg(case, "to"));
                self.at(n).compact(LogIndex(to));
            }
            "delta" => {
                let (n, from, now): (u8, u8, _) = (arg(case, "node"), arg(case, "from"), self.now);
                let source = &self.nodes[&from].raft;
                let base = source.position_at(source.committed()).expect("in the log");
                let configuration = source.configuration_at(base.index).expect("in the log").clone();
                let node = self.at(n);
                node.disk.entries.clear();
                node.disk.compact(base, configuration.clone());
                node.call(|raft, liveness| raft.on_delta_installed(now, liveness, base, configuration));
                self.settle(n);
            }
            "status" => {
                let all: Vec<u8> = self.nodes.keys().copied().collect();
                let nodes = list(case, "nodes");
                for n in if nodes.is_empty() { all } else { nodes } {
                    self.status(n);
                }
            }
            "log" => {
                let n: u8 = arg(case, "node");
                let status = self.nodes[&n].raft.status();
                for index in status.base.index.0 + 1..=status.last.index.0 {
                    let entry = self.nodes[&n].raft.entry(LogIndex(index)).expect("in the log").clone();
                    writeln!(self.out, "{}", describe_entry(&entry)).expect("string");
                }
            }
            "promises" => {
                let n: u8 = arg(case, "node");
                let pairs = &self.nodes[&n].pairs;
                for other in self.nodes.keys().filter(|other| **other != n) {
                    let left = |at: Timestamp| at.since(self.now).as_millis();
                    let supported = pairs.supported_by(node(*other)).map_or(0, |(_, until)| left(until));
                    let epoch = pairs.epoch_for(node(*other));
                    let promised = left(pairs.promised_to(node(*other)));
                    writeln!(
                        self.out,
                        "{n} to {other}: {promised} ms in epoch {}.{}; from {other}: {supported} ms",
                        epoch.boot, epoch.count
                    )
                    .expect("string");
                }
            }
            other => panic!("no such command: {other}"),
        }
        case.expect_empty().expect("every argument is known");
    }

    /// `log` gives the terms of the entries that every node starts with, unless `log-<n>` gives that node's own.
    fn add_nodes(&mut self, case: &mut TestCase) {
        let (voters, learners) = (list(case, "voters"), list(case, "learners"));
        let spare = list(case, "spare");
        let common: Vec<u64> = case.try_take_args("log").expect("parses").unwrap_or_default();
        let min_data: Option<u8> = optional(case, "min-data");
        for n in voters.iter().chain(&learners).chain(&spare) {
            let own: Option<Vec<u64>> = case.try_take_args(&format!("log-{n}")).expect("parses");
            let mut initial = configuration(&voters, &learners);
            initial.min_data = min_data.unwrap_or(1);
            let mut disk = Disk::empty(initial);
            for (index, term) in (1..).zip(own.as_ref().unwrap_or(&common)) {
                let position = Position { term: Term(*term), index: LogIndex(index) };
                disk.entries.push(Entry { position, body: Body::Command(Number(index)) });
                disk.hard_state = HardState { term: Term(*term), vote: None };
            }
            self.down.insert(*n, disk);
        }
        for n in self.down.keys().copied().collect::<Vec<_>>() {
            let disk = self.down.remove(&n).expect("listed");
            self.start(n, disk);
        }
    }

    fn start(&mut self, n: u8, disk: Disk) {
        let node = Node::start(n, disk, &[1, 2, 3, 4, 5], SEED, self.now);
        self.nodes.insert(n, node);
        self.settle(n);
    }

    fn at(&mut self, n: u8) -> &mut Node {
        self.nodes.get_mut(&n).expect("up")
    }

    fn told(&mut self, n: u8, result: Result<String, holdfast_consensus::Refusal>) {
        match result {
            Ok(text) if text.is_empty() => {}
            Ok(text) => writeln!(self.out, "{n}: {text}").expect("string"),
            Err(refusal) => writeln!(self.out, "{n}: refused: {refusal}").expect("string"),
        }
        self.settle(n);
    }

    fn tick(&mut self, time: Duration, run: bool) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.now + STEP;
            let now = self.now;
            for n in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.beat(n);
            }
            for n in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.settle(n);
                if self.nodes[&n].raft.deadline().is_some_and(|at| at <= now) {
                    self.at(n).call(|raft, liveness| raft.on_deadline(now, liveness));
                    self.settle(n);
                }
            }
            if run {
                self.stabilize(&[]);
            }
        }
    }

    /// The heartbeats of `n` that are due, answered within the step.
    fn beat(&mut self, n: u8) {
        let now = self.now;
        let boot = self.nodes[&n].disk.boot;
        for due in self.at(n).pairs.on_deadline(now) {
            let to = due.to.to_bytes()[0];
            if self.cut.contains(&n) || self.cut.contains(&to) {
                continue;
            }
            let Some(other) = self.nodes.get_mut(&to) else { continue };
            if let Some(support) = other.pairs.on_heartbeat(now, node(n), boot, false) {
                self.at(n).pairs.on_reply(node(to), due.sequence, support);
            }
        }
    }

    fn deliver(&mut self, from: Option<u8>, to: Option<u8>, lose: bool) {
        let chosen = |f: u8, t: u8| from.is_none_or(|from| from == f) && to.is_none_or(|to| to == t);
        let (now_due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.network).into_iter().partition(|(f, t, _)| chosen(*f, *t));
        self.network = later;
        for (from, to, message) in now_due {
            if lose || self.cut.contains(&from) || self.cut.contains(&to) {
                continue;
            }
            let now = self.now;
            if let Some(node) = self.nodes.get_mut(&to) {
                node.call(|raft, liveness| raft.on_message(now, liveness, replica(from), message));
                self.settle(to);
            }
        }
    }

    fn persist(&mut self, n: u8, count: usize) {
        let now = self.now;
        let freed = self.at(n).persist(now, count);
        freed.into_iter().for_each(|sent| self.leave(n, number(sent.to), sent.message));
        self.settle(n);
    }

    fn stabilize(&mut self, only: &[u8]) {
        let wanted = |n: &u8| only.is_empty() || only.contains(n);
        for _ in 0..ROUNDS_MAX {
            let writing: Vec<u8> =
                self.nodes.iter().filter(|(n, node)| wanted(n) && !node.writing.is_empty()).map(|(n, _)| *n).collect();
            for n in &writing {
                let count = self.nodes[n].writing.len();
                self.persist(*n, count);
            }
            let inside = self.network.iter().any(|(from, to, _)| wanted(from) && wanted(to));
            if writing.is_empty() && !inside {
                return;
            }
            let (due, rest) =
                std::mem::take(&mut self.network).into_iter().partition(|(f, t, _)| wanted(f) && wanted(t));
            self.network = due;
            self.deliver(None, None, false);
            self.network.splice(0..0, rest);
        }
        panic!("not stable:\n{}", self.out);
    }

    fn settle(&mut self, n: u8) {
        let now = self.now;
        let node = self.at(n);
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
        let (sent, rest) = node.take();
        for effect in rest {
            let text = match effect {
                Effect::Committed(index) => format!("Committed {}", index.0),
                Effect::BecameLeader(term) => format!("BecameLeader {}", term.0),
                Effect::Serving(term) => format!("Serving {}", term.0),
                Effect::LostLeadership(term) => format!("LostLeadership {}", term.0),
                Effect::ReadReady { token, index } => format!("ReadReady {token} at {}", index.0),
                Effect::ReadFailed { token } => format!("ReadFailed {token}"),
                Effect::NeedsDelta { peer } => format!("NeedsDelta {}", number(peer)),
                Effect::Persist(_) | Effect::Send { .. } => unreachable!("taken by the node"),
            };
            writeln!(self.out, "{n}: {text}").expect("string");
        }
        sent.into_iter().for_each(|sent| self.leave(n, number(sent.to), sent.message));
    }

    fn leave(&mut self, from: u8, to: u8, message: Message<Number>) {
        let cut = self.cut.contains(&from) || self.cut.contains(&to);
        writeln!(self.out, "{from}->{to} {}{}", describe(&message), if cut { " (cut)" } else { "" }).expect("string");
        if !cut {
            self.network.push((from, to, message));
        }
    }

    fn status(&mut self, n: u8) {
        let node = &self.nodes[&n];
        let status = node.raft.status();
        let wakes = node
            .raft
            .deadline()
            .map_or("sleeps".to_string(), |at| format!("wakes in {} ms", at.since(self.now).as_millis()));
        writeln!(
            self.out,
            "{n}: {:?} term {} leader {} last {} flushed {} committed {} base {} {}{}{wakes}",
            status.standing,
            status.term.0,
            status.leader.map_or("-".to_string(), |leader| number(leader).to_string()),
            position(status.last),
            status.flushed.0,
            status.committed.0,
            position(status.base),
            if status.may_vote { "" } else { "damaged " },
            match status.lease_until {
                Some(Timestamp(u64::MAX)) => "leased for ever ".to_string(),
                Some(until) if until > self.now => format!("leased for {} ms ", until.since(self.now).as_millis()),
                _ => String::new(),
            },
        )
        .expect("string");
        for peer in status.peers {
            writeln!(
                self.out,
                "   {}: {:?} next {} submitted {} flushed {}{}",
                number(peer.replica),
                peer.state,
                peer.next.0,
                peer.submitted.0,
                peer.flushed.0,
                if peer.reachable { "" } else { " unreachable" }
            )
            .expect("string");
        }
    }
}

fn position(position: Position) -> String {
    format!("{}/{}", position.term.0, position.index.0)
}

fn members(members: &[Member]) -> String {
    let each = members
        .iter()
        .map(|member| format!("{}{}", number(member.replica), if member.role == Role::Learner { "L" } else { "" }));
    each.collect::<Vec<_>>().join(",")
}

fn describe_configuration(configuration: &Configuration) -> String {
    if configuration.is_joint() {
        format!("({})&&({})", members(&configuration.members), members(&configuration.outgoing))
    } else {
        format!("({})", members(&configuration.members))
    }
}

fn describe_entry(entry: &Entry<Number>) -> String {
    let body = match &entry.body {
        Body::Noop => "noop".to_string(),
        Body::Command(Number(value)) => format!("command {value}"),
        Body::Configuration(configuration) => describe_configuration(configuration),
    };
    format!("{} {body}", position(entry.position))
}

fn describe(message: &Message<Number>) -> String {
    let term = message.term.0;
    let ask = |pre: bool, transfer: bool| {
        format!("{}{}", if pre { "pre" } else { "" }, if transfer { "transfer" } else { "" })
    };
    let body = match &message.body {
        MessageBody::Vote { pre, last, transfer } => format!("Vote({}) last {}", ask(*pre, *transfer), position(*last)),
        MessageBody::VoteReply { pre, granted } => {
            format!("VoteReply({}) {}", ask(*pre, false), if *granted { "granted" } else { "rejected" })
        }
        MessageBody::Append { previous, commit, entries, round } => {
            let entries: Vec<String> = entries.iter().map(describe_entry).collect();
            format!("Append after {} commit {} round {round} [{}]", position(*previous), commit.0, entries.join(", "))
        }
        MessageBody::AppendReply { result, flushed, round, support } => {
            let result = match result {
                AppendResult::Submitted(index) => format!("submitted {}", index.0),
                AppendResult::Mismatch { rejected, hint } => {
                    format!("mismatch at {} hint {}", rejected.0, position(*hint))
                }
                AppendResult::Full { last, .. } => format!("full at {}", last.0),
            };
            format!("AppendReply {result} flushed {} round {round} epoch {}.{}", flushed.0, support.boot, support.count)
        }
        MessageBody::TransferNow => "TransferNow".to_string(),
    };
    format!("t{term} {body}")
}
