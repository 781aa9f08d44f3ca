//! Clients that say what no client of ours would, and messages between nodes that were changed on the way: a shard
//! refuses, and goes on serving those that behave.
//!
//! Everything here passed the decoders, which have tests of their own.

use std::time::Duration;

use bytes::Bytes;
use holdfast_block::Operation;
use holdfast_consensus::{LogIndex, Position, Term};
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{Epoch, Formatted, Instance, Reply, Request, Session, Stamp};
use holdfast_shard::{ClientId, Event};

use crate::world::{Cluster, VOLUME_BYTES};

const REQUESTS: u32 = 20_000;
/// Runs with changed messages; a hundred were searched when this was written.
const SEEDS: u64 = 8;
const HONEST: ClientId = ClientId(1);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// One of those that are near to something, or anything.
    fn near(&mut self, values: &[u64]) -> u64 {
        let value = values[self.below(values.len() as u64) as usize];
        match self.below(32) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => self.next(),
            3 => u64::MAX - self.below(3),
            4 => self.below(3),
            _ => value,
        }
    }
}

/// What the hostile ones have heard, to stay near it.
#[derive(Default)]
struct Heard {
    epoch: u64,
    session: u64,
    sequence: u64,
    seen: Position,
    /// Requests that were done as asked.
    done: u64,
}

impl Heard {
    fn note(&mut self, replies: &[(ClientId, Reply)]) {
        for (_, reply) in replies {
            match reply {
                Reply::Attached { epoch, session, .. } => {
                    (self.epoch, self.session, self.sequence) = (epoch.0, session.0, 0);
                }
                Reply::Io { seen, result, .. } => {
                    self.seen = *seen;
                    self.done += u64::from(result.is_ok());
                }
                _ => {}
            }
        }
    }

    fn request(&mut self, random: &mut Random, cluster: &Cluster) -> Request {
        let volume = cluster.volume;
        let epoch = Epoch(random.near(&[self.epoch]));
        let instance = Instance(u128::from(if random.below(4) == 0 { random.below(4) } else { random.next() }));
        match random.below(32) {
            0 => {
                let holder = "h".repeat(random.below(257) as usize);
                Request::Attach { volume, holder, instance, take_over: random.below(2) == 0 }
            }
            1 => Request::OpenSession { volume, epoch, instance },
            2 => Request::Detach { volume, epoch },
            3 => Request::SetFormatted { volume, epoch, formatted: Formatted::Formatting },
            _ => {
                self.sequence += random.below(2);
                let oldest = [self.sequence.saturating_sub(5), self.sequence, 1];
                let stamp = Stamp {
                    epoch,
                    session: Session(random.near(&[self.session])),
                    sequence: random.near(&[self.sequence, self.sequence + 1023, 1 << 63]),
                    oldest: random.near(&oldest),
                };
                let seen = Position {
                    term: Term(random.near(&[self.seen.term.0])),
                    index: LogIndex(random.near(&[self.seen.index.0])),
                };
                Request::Io { volume, stamp, seen, operation: operation(random) }
            }
        }
    }
}

fn operation(random: &mut Random) -> Operation {
    let offset = random.near(&[0, 512, 4096, 65536, VOLUME_BYTES, VOLUME_BYTES - 512]);
    let length = random.near(&[512, 4096, 1 << 20, 64 << 20, VOLUME_BYTES]);
    match random.below(6) {
        0 => Operation::Read { offset, length: length as u32 },
        1 => Operation::WriteZeroes { offset, length },
        2 => Operation::Discard { offset, length },
        3 => Operation::Flush,
        _ => {
            let length = [0, 1, 512, 1024, 4096, 8192 + 512, 1 << 20, (1 << 20) + 512][random.below(8) as usize];
            Operation::Write { offset, data: Bytes::from(vec![random.next() as u8; length]) }
        }
    }
}

/// A client that behaves attaches, writes, and reads what it wrote.
fn serves(cluster: &mut Cluster, byte: u8) {
    let volume = cluster.volume;
    let instance = Instance(1000 + u128::from(byte));
    let data = Bytes::from(vec![byte; 8192]);
    cluster.run_until("a leader", |cluster| cluster.leader().is_some());
    let leader = cluster.leader().unwrap();
    cluster.replies.clear();
    let attach = Request::Attach { volume, holder: "honest".into(), instance, take_over: true };
    cluster.request(leader, HONEST, attach);
    let mut attached = None;
    cluster.run_until("an attachment", |cluster| {
        attached = cluster.replies.iter().find_map(|(client, reply)| match reply {
            Reply::Attached { epoch, session, .. } if *client == HONEST => Some((*epoch, *session)),
            _ => None,
        });
        attached.is_some()
    });
    let (epoch, session) = attached.unwrap();
    let write = Operation::Write { offset: 4096, data: data.clone() };
    let read = Operation::Read { offset: 4096, length: 8192 };
    for (sequence, operation, expected) in [(1, write, Bytes::new()), (1 << 63 | 2, read, data)] {
        let stamp = Stamp { epoch, session, sequence, oldest: 1 };
        let seen = Position::default();
        cluster.request(leader, HONEST, Request::Io { volume, stamp, seen, operation });
        let answered = |cluster: &Cluster| {
            cluster.replies.iter().any(|(client, reply)| {
                let of_it = matches!(reply, Reply::Io { sequence: answered, result: Ok(data), .. }
                    if *answered == sequence && *data == expected);
                *client == HONEST && of_it
            })
        };
        cluster.run_until("an answer", answered);
    }
}

#[test]
fn clients_that_say_anything_change_nothing_for_others() {
    let mut cluster = Cluster::new();
    serves(&mut cluster, 1);
    let mut random = Random(1);
    let mut heard = Heard::default();
    for number in 0..REQUESTS {
        heard.note(&std::mem::take(&mut cluster.replies));
        let to = random.below(3) as usize;
        let to = if random.below(4) == 0 { to } else { cluster.leader().unwrap_or(to) };
        let client = ClientId(2 + random.below(6));
        let request = heard.request(&mut random, &cluster);
        cluster.request(to, client, request);
        if random.below(16) == 0 {
            cluster.step(to, vec![Event::ClientClosed(client)]);
        }
        if random.below(8) == 0 {
            cluster.pass(Duration::from_millis(1));
        }
        if number % 5000 == 4999 {
            serves(&mut cluster, number as u8);
            cluster.restart();
            serves(&mut cluster, !(number as u8));
        }
    }
    assert!(
        heard.epoch > 100 && heard.done > 500,
        "they got somewhere: {} attachments, {} done",
        heard.epoch,
        heard.done
    );
}

/// Whoever has a node's certificate is trusted with the data. Still, what it says wrongly costs the answer to it, not
/// the process: a node of another build may have a bug.
#[test]
fn messages_of_nodes_that_were_changed_on_the_way_end_nobody() {
    for seed in 0..SEEDS {
        let mut cluster = Cluster::new();
        serves(&mut cluster, 1);
        let mut random = Random(seed);
        let mut rounds = Random(seed + 1000);
        cluster.on_the_way = Box::new(move |message| {
            if random.below(6) != 0 {
                return Some(message);
            }
            let encoded = message.encode();
            let mut meta = encoded.meta.to_vec();
            for _ in 0..1 + random.below(3) {
                if !meta.is_empty() {
                    let at = random.below(meta.len() as u64) as usize;
                    meta[at] = random.next() as u8;
                }
            }
            if random.below(8) == 0 {
                meta.truncate(random.below(meta.len() as u64 + 1) as usize);
            }
            PeerMessage::decode(encoded.kind, Bytes::from(meta), encoded.payload).ok()
        });
        let mut heard = Heard::default();
        for _ in 0..500 {
            heard.note(&std::mem::take(&mut cluster.replies));
            let to = cluster.leader().unwrap_or(0);
            let request = heard.request(&mut rounds, &cluster);
            cluster.request(to, ClientId(2), request);
            cluster.pass(Duration::from_millis(5));
        }
    }
}
