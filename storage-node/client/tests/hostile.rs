//! Nodes that answer anything: the client never panics, completes each request once, and hands out no bytes of a wrong
//! length.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use holdfast_block::{Error, Geometry, Operation, Request as BlockRequest, RequestId};
use holdfast_client::{Client, ClientEffect, ClientOptions, Mode};
use holdfast_consensus::{LogIndex, Position, Term, Timestamp};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Refusal, Reply, Request, Session};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const RUNS: u64 = 300;
const EVENTS: u32 = 400;

struct World {
    random: StdRng,
    nodes: [NodeId; 4],
    volume: VolumeId,
    /// The newest request sent, to answer nearly.
    sent: Option<(u64, u64)>,
}

impl World {
    fn near(&mut self, value: u64) -> u64 {
        match self.random.random_range(0..16) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => self.random.random(),
            3 => u64::MAX,
            _ => value,
        }
    }

    fn refusal(&mut self) -> Refusal {
        let epoch = Epoch(self.near(3));
        match self.random.random_range(0..4) {
            0 => Refusal::UnknownVolume,
            1 => Refusal::Held { holder: "other".into(), epoch },
            2 => Refusal::Stale { epoch },
            _ => Refusal::NotAllowed { reason: String::new() },
        }
    }

    fn reply(&mut self) -> Reply {
        let volume = self.volume;
        let epoch = Epoch(self.near(3));
        // A term from far ahead ends the run: what is lower is never believed again.
        let term = Term(if self.random.random_range(0..200) == 0 { self.near(5) } else { 5 });
        let size_bytes = [1u64 << 20, 2 << 20, 4096][self.random.random_range(0..3)];
        let geometry = Geometry::new(size_bytes, 512).unwrap();
        let formatted = Formatted::None;
        match self.random.random_range(0..40) {
            0..6 => {
                let session = Session(self.near(7));
                let instance = Instance(u128::from(self.random.random_range(0..8) != 0));
                Reply::Attached { volume, instance, epoch, session, geometry, formatted }
            }
            6 => Reply::Detached { volume, epoch },
            7 => Reply::FormattedSet { volume, epoch },
            8 if self.random.random_range(0..20) == 0 => {
                Reply::Refused { volume, instance: None, reason: self.refusal() }
            }
            9 => Reply::Resized { volume, geometry },
            10..14 => {
                let leader = self.nodes[self.random.random_range(0..4)];
                Reply::NotLeader { volume, term, leader: self.random.random::<bool>().then_some(leader) }
            }
            14..18 => Reply::Leading { volume, term },
            _ => {
                let (session, sequence) = self.sent.unwrap_or_default();
                let length = [0, 512, 4096][self.random.random_range(0..3)];
                let errors = [Error::Corrupt, Error::NoSpace, Error::OutOfRange];
                let result = match self.random.random_range(0..10) {
                    0 => Err(errors[self.random.random_range(0..3)]),
                    _ => Ok(Bytes::from(vec![0; length])),
                };
                let seen = Position { term, index: LogIndex(self.near(100)) };
                let (session, sequence) = (Session(self.near(session)), self.near(sequence));
                Reply::Io { volume, session, sequence, seen, result }
            }
        }
    }

    fn operation(&mut self) -> Operation {
        match self.random.random_range(0..4) {
            0 => Operation::Flush,
            1 => Operation::Write { offset: 0, data: Bytes::from_static(&[7; 512]) },
            2 => Operation::Discard { offset: 512, length: 512 },
            _ => Operation::Read { offset: 0, length: 4096 },
        }
    }
}

/// Answers that completed a request.
fn run(seed: u64) -> u64 {
    let node = |number: u8| NodeId::from_bytes([number; 16]).unwrap();
    let volume = VolumeId::from_bytes([9; 16]).unwrap();
    let nodes = [node(1), node(2), node(3), node(4)];
    let mut world = World { random: StdRng::seed_from_u64(seed), nodes, volume, sent: None };
    let mode =
        if seed.is_multiple_of(2) { Mode::Attach { take_over: false } } else { Mode::Resume { epoch: Epoch(3) } };
    let mut options = ClientOptions::new(volume, nodes[..3].to_vec(), "here".into(), Instance(1), mode);
    options.unavailable_after = seed.is_multiple_of(3).then_some(Duration::from_secs(1));
    let mut now = Timestamp(1_000_000_000);
    let mut client = Client::new(options, now);
    let mut waiting: BTreeMap<u64, Operation> = BTreeMap::new();
    let (mut next, mut answered) = (0, 0);
    for _ in 0..EVENTS {
        let from = nodes[world.random.random_range(0..4)];
        match world.random.random_range(0..16) {
            0 => client.on_connected(now, from),
            1 if world.random.random_range(0..4) == 0 => client.on_closed(now, from),
            2 => {
                now = client.deadline().map_or(now, |at| at.max(now)) + Duration::from_millis(1);
                client.on_deadline(now);
            }
            3 if world.random.random_range(0..100) == 0 => client.detach(now),
            4 => drop(client.set_formatted(now, Formatted::Formatting)),
            5..9 if client.can_submit() => {
                next += 1;
                let operation = world.operation();
                waiting.insert(next, operation.clone());
                client.submit(now, BlockRequest { id: RequestId(next), operation });
            }
            _ => {
                let reply = world.reply();
                let encoded = reply.encode();
                let reply = Reply::decode(encoded.kind, encoded.meta, encoded.payload).expect("what a node can send");
                client.on_reply(now, from, reply);
            }
        }
        for effect in client.take_effects() {
            match effect {
                ClientEffect::Send { to, request } => {
                    assert!(nodes[..3].contains(&to), "only replicas are spoken to");
                    if let Request::Io { stamp, .. } = request {
                        world.sent = Some((stamp.session.0, stamp.sequence));
                    }
                }
                ClientEffect::Complete(completion) => {
                    let operation = waiting.remove(&completion.id.0).expect("each request is completed once");
                    if let Ok(data) = completion.result {
                        answered += 1;
                        let expected = if let Operation::Read { length, .. } = operation { length } else { 0 };
                        assert_eq!(data.len(), expected as usize);
                    }
                }
                _ => {}
            }
        }
    }
    answered
}

#[test]
fn whatever_nodes_answer_each_request_is_completed_once() {
    let answered: u64 = (0..RUNS).map(run).sum();
    assert!(answered > 1000, "many were answered in earnest: {answered}");
}
