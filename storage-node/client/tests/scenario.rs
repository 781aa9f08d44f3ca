//! What the client sends and reports, event by event.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::time::Duration;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Geometry, Operation, Request as BlockRequest, RequestId};
use holdfast_client::{Client, ClientEffect, ClientOptions, Mode, Phase};
use holdfast_consensus::{LogIndex, Position, Term, Timestamp};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Refusal, Reply, Request, SESSION_WINDOW, Session};

const A: u8 = 1;
const B: u8 = 2;
const C: u8 = 3;
const UNRECORDED: u64 = 1 << 63;
const INSTANCE: Instance = Instance(77);
const EPOCH: Epoch = Epoch(4);
const SESSION: Session = Session(6);

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 16]).unwrap()
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([9; 16]).unwrap()
}

fn options(mode: Mode) -> ClientOptions {
    ClientOptions::new(volume(), vec![node(A), node(B), node(C)], "host".into(), INSTANCE, mode)
}

struct Bench {
    client: Client,
    now: Timestamp,
}

impl Bench {
    fn start(options: ClientOptions) -> Bench {
        let mut bench = Bench { client: Client::new(options, Timestamp::ZERO), now: Timestamp::ZERO };
        for n in [A, B, C] {
            bench.client.on_connected(bench.now, node(n));
        }
        bench
    }

    /// A session that A serves in term 5.
    fn serving() -> Bench {
        Bench::serving_with(options(Mode::Attach { take_over: false }))
    }

    fn serving_with(options: ClientOptions) -> Bench {
        let mut bench = Bench::start(options);
        bench.reply(A, attached());
        bench.reply(A, Reply::Leading { volume: volume(), term: Term(5) });
        bench.effects();
        bench
    }

    fn effects(&mut self) -> Vec<ClientEffect> {
        self.client.take_effects()
    }

    fn reply(&mut self, from: u8, reply: Reply) {
        self.client.on_reply(self.now, node(from), reply);
    }

    fn write(&mut self, id: u64) {
        let operation = Operation::Write { offset: id * 512, data: Bytes::from(vec![id as u8; 512]) };
        self.client.submit(self.now, BlockRequest { id: RequestId(id), operation });
    }

    fn read(&mut self, id: u64) {
        let operation = Operation::Read { offset: 0, length: 512 };
        self.client.submit(self.now, BlockRequest { id: RequestId(id), operation });
    }

    /// (node, sequence) of every I/O that was sent, flushes that only ask left out.
    fn sent(&mut self) -> Vec<(u8, u64)> {
        self.effects()
            .into_iter()
            .filter_map(|effect| match effect {
                ClientEffect::Send { to, request: Request::Io { stamp, operation, .. } }
                    if operation != Operation::Flush =>
                {
                    Some((to.to_bytes()[0], stamp.sequence))
                }
                _ => None,
            })
            .collect()
    }

    fn advance(&mut self, wait: Duration) {
        self.now = self.now + wait;
        self.client.on_deadline(self.now);
    }
}

fn attached() -> Reply {
    Reply::Attached {
        volume: volume(),
        instance: INSTANCE,
        epoch: EPOCH,
        session: SESSION,
        geometry: Geometry::new(1 << 20, 512).unwrap(),
        formatted: Formatted::None,
    }
}

fn answer(sequence: u64, term: u64, result: Result<Bytes, Error>) -> Reply {
    let seen = Position { term: Term(term), index: LogIndex(100 + sequence % 1000) };
    Reply::Io { volume: volume(), session: SESSION, sequence, seen, result }
}

fn done(term: u64, sequence: u64) -> Reply {
    answer(sequence, term, Ok(Bytes::new()))
}

fn not_leader(term: u64, leader: Option<u8>) -> Reply {
    Reply::NotLeader { volume: volume(), term: Term(term), leader: leader.map(node) }
}

fn leading(term: u64) -> Reply {
    Reply::Leading { volume: volume(), term: Term(term) }
}

fn completions(effects: &[ClientEffect]) -> Vec<(u64, Result<usize, Error>)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            ClientEffect::Complete(Completion { id, result }) => {
                Some((id.0, result.as_ref().map(Bytes::len).map_err(|error| *error)))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_opening_request_goes_to_every_replica_that_is_connected() {
    let mut bench = Bench::start(options(Mode::Attach { take_over: true }));
    let attach = Request::Attach { volume: volume(), holder: "host".into(), instance: INSTANCE, take_over: true };
    let effects = bench.effects();
    for n in [A, B, C] {
        assert!(effects.contains(&ClientEffect::Send { to: node(n), request: attach.clone() }));
    }
    bench.reply(B, attached());
    bench.reply(A, attached());
    let told = bench.effects().into_iter().filter(|effect| matches!(effect, ClientEffect::Attached { .. })).count();
    assert_eq!(told, 1, "a second answer tells nothing new");
}

#[test]
fn an_answer_to_another_instance_opens_nothing() {
    let mut bench = Bench::start(options(Mode::Attach { take_over: false }));
    let Reply::Attached { volume, epoch, session, geometry, formatted, .. } = attached() else { unreachable!() };
    bench.reply(A, Reply::Attached { volume, instance: Instance(1), epoch, session, geometry, formatted });
    let reason = Refusal::Held { holder: "other".into(), epoch };
    bench.reply(A, Reply::Refused { volume, instance: Some(Instance(1)), reason });
    assert_eq!(bench.client.status().phase, Phase::Opening);
}

#[test]
fn requests_wait_for_the_session_and_then_go_out_in_order() {
    let mut bench = Bench::start(options(Mode::Resume { epoch: EPOCH }));
    bench.write(1);
    bench.read(2);
    bench.write(3);
    assert_eq!(bench.sent(), []);
    bench.reply(B, attached());
    let sent = bench.sent();
    assert_eq!(sent.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [B, B, B]);
    assert_eq!((sent[0].1, sent[2].1), (1, 2), "mutations count from 1");
    assert!(sent[1].1 >= UNRECORDED, "a read takes no number of the mutations");
}

#[test]
fn a_new_leader_gets_what_is_unanswered_in_order_with_the_same_numbers() {
    let mut bench = Bench::serving();
    for id in 1..=4 {
        bench.write(id);
    }
    assert_eq!(bench.sent(), [(A, 1), (A, 2), (A, 3), (A, 4)]);
    bench.reply(A, done(5, 2));
    bench.effects();
    bench.reply(C, leading(6));
    assert_eq!(bench.sent(), [(C, 1), (C, 3), (C, 4)]);
    bench.reply(B, leading(5));
    assert_eq!(bench.sent(), [], "an announcement of a lower term is old");
}

#[test]
fn a_hint_is_followed_at_once_and_once_per_term() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    bench.reply(A, not_leader(6, Some(B)));
    assert_eq!(bench.sent(), [(B, 1)]);
    bench.reply(B, not_leader(6, None));
    bench.reply(A, not_leader(6, Some(B)));
    assert_eq!(bench.sent(), [], "the same hint again sends no data");
    bench.reply(A, not_leader(7, Some(C)));
    assert_eq!(bench.sent(), [(C, 1)]);
}

#[test]
fn a_hint_to_a_node_without_a_connection_is_followed_when_it_connects() {
    let mut bench = Bench::serving();
    bench.client.on_closed(bench.now, node(B));
    bench.write(1);
    bench.effects();
    bench.reply(A, not_leader(6, Some(B)));
    assert_eq!(bench.sent(), []);
    bench.client.on_connected(bench.now, node(B));
    assert_eq!(bench.sent(), [(B, 1)]);
}

#[test]
fn an_answer_of_a_lower_term_changes_nothing() {
    let mut bench = Bench::serving();
    bench.read(1);
    let sent = bench.sent();
    bench.reply(B, leading(6));
    bench.effects();
    bench.reply(A, answer(sent[0].1, 5, Ok(Bytes::from(vec![0; 512]))));
    assert_eq!(completions(&bench.effects()), []);
    bench.reply(B, answer(sent[0].1, 6, Ok(Bytes::from(vec![1; 512]))));
    assert_eq!(completions(&bench.effects()), [(1, Ok(512))]);
    bench.reply(B, answer(sent[0].1, 6, Ok(Bytes::from(vec![1; 512]))));
    assert_eq!(completions(&bench.effects()), [], "a second answer completes nothing");
}

#[test]
fn what_was_seen_is_told_with_every_request() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.reply(A, done(5, 1));
    bench.effects();
    bench.read(2);
    let seen = bench.effects().into_iter().find_map(|effect| match effect {
        ClientEffect::Send { request: Request::Io { seen, .. }, .. } => Some(seen),
        _ => None,
    });
    assert_eq!(seen, Some(Position { term: Term(5), index: LogIndex(101) }));
}

#[test]
fn fenced_is_for_good() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.read(2);
    bench.reply(A, answer(1, 5, Err(Error::Fenced)));
    let effects = bench.effects();
    assert_eq!(completions(&effects), [(1, Err(Error::Fenced)), (2, Err(Error::Fenced))]);
    assert_eq!(effects.iter().filter(|effect| **effect == ClientEffect::Fenced).count(), 1);
    bench.reply(B, leading(9));
    bench.write(3);
    assert_eq!(completions(&bench.effects()), [(3, Err(Error::Fenced))]);
    assert_eq!(bench.client.deadline(), None);
}

#[test]
fn another_sessions_fencing_is_not_ours() {
    let mut bench = Bench::serving();
    bench.write(1);
    let seen = Position { term: Term(5), index: LogIndex(9) };
    let (sequence, result) = (1, Err(Error::Fenced));
    bench.reply(A, Reply::Io { volume: volume(), session: Session(5), sequence, seen, result });
    bench.reply(A, answer(99, 5, Err(Error::Fenced)));
    assert_eq!(bench.client.status().phase, Phase::Serving);
    assert_eq!(bench.client.status().outstanding, 1);
}

#[test]
fn a_question_that_is_answered_with_fenced_fences() {
    let mut bench = Bench::serving();
    bench.client.on_closed(bench.now, node(B));
    bench.client.on_connected(bench.now, node(B));
    let asked = bench.effects().into_iter().find_map(|effect| match effect {
        ClientEffect::Send { request: Request::Io { stamp, .. }, .. } => Some(stamp.sequence),
        _ => None,
    });
    bench.reply(B, answer(asked.expect("a new connection is introduced"), 6, Err(Error::Fenced)));
    assert_eq!(bench.client.status().phase, Phase::Fenced);
}

#[test]
fn the_window_ends_at_the_oldest_mutation_without_an_answer() {
    let mut bench = Bench::serving();
    bench.write(1);
    for id in 2..=SESSION_WINDOW {
        bench.write(id);
        bench.reply(A, done(5, id));
    }
    assert_eq!(bench.client.status().outstanding, 1);
    assert!(!bench.client.can_submit(), "one more would lie outside the window");
    bench.reply(A, done(5, 1));
    assert!(bench.client.can_submit());
    bench.effects();
    bench.write(SESSION_WINDOW + 1);
    assert_eq!(bench.sent(), [(A, SESSION_WINDOW + 1)]);
}

#[test]
fn the_configured_window_counts_every_request() {
    let mut options = options(Mode::Attach { take_over: false });
    options.window = 2;
    let mut bench = Bench::serving_with(options);
    bench.read(1);
    bench.write(2);
    assert!(!bench.client.can_submit());
}

#[test]
fn an_idle_volume_has_no_deadline() {
    let mut bench = Bench::serving();
    assert_eq!(bench.client.deadline(), None);
    bench.write(1);
    assert!(bench.client.deadline().is_some());
    bench.reply(A, done(5, 1));
    assert_eq!(bench.client.deadline(), None);
    bench.client.on_closed(bench.now, node(A));
    assert_eq!(bench.client.deadline(), None, "a lost leader is looked for when there is something to ask it");
}

#[test]
fn with_no_connection_there_is_nothing_to_wake_up_for() {
    let mut bench = Bench::serving();
    bench.write(1);
    for n in [A, B, C] {
        bench.client.on_closed(bench.now, node(n));
    }
    bench.advance(Duration::from_secs(60));
    assert_eq!(bench.client.deadline(), None);
    bench.effects();
    bench.client.on_connected(bench.now, node(C));
    assert!(!bench.effects().is_empty(), "the first connection is asked at once");
}

/// The leader dies; another is elected 400 ms later and its announcement is lost.
#[test]
fn a_silent_failover_is_found_within_an_eighth_of_its_length() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    bench.client.on_closed(bench.now, node(A));
    let (start, elected, mut rounds) = (bench.now, bench.now + Duration::from_millis(400), 0);
    let found = loop {
        let questions: Vec<(u8, u64)> = bench
            .effects()
            .into_iter()
            .filter_map(|effect| match effect {
                ClientEffect::Send { to, request: Request::Io { stamp, .. } } => {
                    Some((to.to_bytes()[0], stamp.sequence))
                }
                _ => None,
            })
            .collect();
        for (to, sequence) in questions {
            rounds += 1;
            if to == B && bench.now >= elected {
                bench.reply(B, done(6, sequence));
            } else {
                bench.reply(to, not_leader(5, Some(A)));
            }
        }
        if bench.client.status().leader == Some(node(B)) {
            break bench.now;
        }
        bench.now = bench.client.deadline().expect("a search has a next round");
        bench.client.on_deadline(bench.now);
    };
    assert!(found.since(elected) <= Duration::from_millis(400 / 8 * 5 / 4), "{:?}", found.since(start));
    assert!(rounds < 120, "{rounds} questions");
    assert_eq!(bench.sent(), [(B, 1)]);
}

#[test]
fn a_leader_that_answers_nothing_is_doubted_but_kept() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    bench.advance(ClientOptions::QUIET - Duration::from_nanos(1));
    assert_eq!(bench.effects(), []);
    bench.advance(Duration::from_nanos(1));
    assert_eq!(bench.effects().len(), 3, "every replica is asked");
    assert_eq!(bench.client.status().leader, Some(node(A)));
    bench.reply(C, not_leader(5, Some(A)));
    assert_eq!(bench.effects(), [], "the known leader is no news");
    bench.reply(C, leading(6));
    assert_eq!(bench.sent(), [(C, 1)]);
}

#[test]
fn a_lost_answer_is_asked_for_again_ever_more_slowly() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    let mut waits = Vec::new();
    let mut last = bench.now;
    while waits.len() < 5 {
        bench.now = bench.client.deadline().expect("a request waits");
        bench.client.on_deadline(bench.now);
        if !bench.sent().is_empty() {
            waits.push(bench.now.since(last).as_secs());
            last = bench.now;
        }
    }
    assert_eq!(waits, [2, 4, 8, 16, 16]);
}

#[test]
fn detach_waits_for_what_is_outstanding() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.client.detach(bench.now);
    bench.write(2);
    let detach = ClientEffect::Send { to: node(A), request: Request::Detach { volume: volume(), epoch: EPOCH } };
    let effects = bench.effects();
    assert!(!effects.contains(&detach));
    assert_eq!(completions(&effects), [(2, Err(Error::Unavailable))], "no new requests");
    bench.reply(A, done(5, 1));
    assert!(bench.effects().contains(&detach));
    bench.reply(A, Reply::Detached { volume: volume(), epoch: EPOCH });
    assert_eq!(bench.effects(), [ClientEffect::Detached]);
    assert_eq!(bench.client.deadline(), None);
}

#[test]
fn a_detach_whose_answer_was_lost_ends_as_detached() {
    let mut bench = Bench::serving();
    bench.client.detach(bench.now);
    bench.reply(B, leading(6));
    bench.effects();
    bench.reply(B, Reply::Refused { volume: volume(), instance: None, reason: Refusal::Stale { epoch: EPOCH } });
    assert_eq!(bench.effects(), [ClientEffect::Detached]);
}

#[test]
fn detach_before_the_session_is_open_still_gives_the_epoch_back() {
    let mut bench = Bench::start(options(Mode::Attach { take_over: false }));
    bench.client.detach(bench.now);
    bench.effects();
    bench.reply(A, attached());
    let detach = ClientEffect::Send { to: node(A), request: Request::Detach { volume: volume(), epoch: EPOCH } };
    assert!(bench.effects().contains(&detach));
}

#[test]
fn a_live_holder_refuses_the_attachment() {
    let mut bench = Bench::start(options(Mode::Attach { take_over: false }));
    bench.write(1);
    bench.effects();
    let reason = Refusal::Held { holder: "other".into(), epoch: Epoch(3) };
    bench.reply(A, Reply::Refused { volume: volume(), instance: Some(INSTANCE), reason: reason.clone() });
    let effects = bench.effects();
    assert_eq!(completions(&effects), [(1, Err(Error::Unavailable))]);
    assert!(effects.contains(&ClientEffect::Refused(reason)));
}

#[test]
fn resuming_an_epoch_that_is_over_is_fenced() {
    let mut bench = Bench::start(options(Mode::Resume { epoch: EPOCH }));
    bench.write(1);
    bench.effects();
    let reason = Refusal::Stale { epoch: EPOCH };
    bench.reply(A, Reply::Refused { volume: volume(), instance: Some(INSTANCE), reason });
    assert_eq!(completions(&bench.effects()), [(1, Err(Error::Fenced))]);
    bench.write(2);
    assert_eq!(completions(&bench.effects()), [(2, Err(Error::Fenced))]);
}

#[test]
fn an_unknown_volume_is_believed_when_every_replica_says_so() {
    let mut bench = Bench::start(options(Mode::Attach { take_over: false }));
    for (n, phase) in [(A, Phase::Opening), (B, Phase::Opening), (C, Phase::Refused)] {
        let reason = Refusal::UnknownVolume;
        bench.reply(n, Reply::Refused { volume: volume(), instance: Some(INSTANCE), reason });
        assert_eq!(bench.client.status().phase, phase);
    }
}

#[test]
fn a_leader_whose_replica_was_taken_away_is_left_at_once() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    bench.reply(A, Reply::Refused { volume: volume(), instance: None, reason: Refusal::UnknownVolume });
    assert_eq!(bench.client.status().leader, None);
    bench.advance(Duration::from_millis(2));
    assert_eq!(bench.effects().len(), 3, "every replica is asked, long before the quiet time");
    bench.reply(B, leading(6));
    assert_eq!(bench.sent(), [(B, 1)]);
}

#[test]
fn a_write_that_is_given_up_falls_below_the_window() {
    let mut options = options(Mode::Attach { take_over: false });
    options.unavailable_after = Some(Duration::from_secs(5));
    let mut bench = Bench::serving_with(options);
    bench.write(1);
    bench.effects();
    bench.advance(Duration::from_secs(5));
    assert_eq!(completions(&bench.effects()), [(1, Err(Error::Unavailable))]);
    bench.write(2);
    let oldest = bench.effects().into_iter().find_map(|effect| match effect {
        ClientEffect::Send { request: Request::Io { stamp, .. }, .. } => Some(stamp.oldest),
        _ => None,
    });
    assert_eq!(oldest, Some(2), "a late copy of the first write must not follow the second");
}

#[test]
fn the_format_mark_is_resent_to_a_new_leader_and_told_once() {
    let mut bench = Bench::serving();
    bench.client.set_formatted(bench.now, Formatted::Formatting).unwrap();
    assert!(bench.client.set_formatted(bench.now, Formatted::Formatted).is_err(), "one at a time");
    bench.effects();
    bench.reply(B, leading(6));
    let request = Request::SetFormatted { volume: volume(), epoch: EPOCH, formatted: Formatted::Formatting };
    assert!(bench.effects().contains(&ClientEffect::Send { to: node(B), request }));
    bench.reply(B, Reply::FormattedSet { volume: volume(), epoch: EPOCH });
    bench.reply(B, Reply::FormattedSet { volume: volume(), epoch: EPOCH });
    assert_eq!(bench.effects(), [ClientEffect::FormattedSet(Formatted::Formatting)]);
}

#[test]
fn growth_is_told_once() {
    let mut bench = Bench::serving();
    let geometry = Geometry::new(2 << 20, 512).unwrap();
    bench.reply(A, Reply::Resized { volume: volume(), geometry });
    bench.reply(A, Reply::Resized { volume: volume(), geometry });
    assert_eq!(bench.effects(), [ClientEffect::Resized(geometry)]);
}

#[test]
fn a_read_answered_with_another_length_is_corrupt() {
    let mut bench = Bench::serving();
    bench.read(1);
    let sequence = bench.sent()[0].1;
    bench.reply(A, answer(sequence, 5, Ok(Bytes::from(vec![0; 100]))));
    assert_eq!(completions(&bench.effects()), [(1, Err(Error::Corrupt))]);
}

#[test]
fn a_stranger_is_not_believed() {
    let mut bench = Bench::serving();
    bench.write(1);
    bench.effects();
    bench.reply(8, leading(50));
    bench.reply(8, done(50, 1));
    bench.reply(A, not_leader(6, Some(8)));
    assert_eq!(completions(&bench.effects()), []);
    assert_ne!(bench.client.status().leader, Some(node(8)));
}

/// All copies but one moved while this client was away: the one that stayed does not lead, and knows where the others are.
#[test]
fn a_leader_that_this_client_was_not_told_of_is_found_by_a_replica_that_stayed() {
    const D: u8 = 4;
    let replicas = |term, nodes: &[u8]| {
        let replicas = nodes.iter().map(|n| (node(*n), format!("node-{n}:7000"))).collect();
        Reply::Replicas { volume: volume(), term: Term(term), replicas }
    };
    let mut bench = Bench::start(options(Mode::Attach { take_over: false }));
    bench.effects();
    bench.reply(C, not_leader(6, Some(D)));
    bench.reply(C, replicas(0, &[C, D]));
    assert!(bench.effects().contains(&ClientEffect::MoreReplicas(vec![(node(D), "node-4:7000".to_owned())])));
    bench.reply(C, replicas(0, &[C, D]));
    assert!(!bench.effects().iter().any(|effect| matches!(effect, ClientEffect::MoreReplicas(_))), "it is no news");
    bench.client.on_connected(bench.now, node(D));
    bench.advance(Duration::from_secs(2));
    let asked = |effect: &ClientEffect| matches!(effect, ClientEffect::Send { to, request: Request::Attach { .. } } if *to == node(D));
    assert!(bench.effects().iter().any(asked));
    bench.reply(D, replicas(6, &[C, D]));
    assert!(bench.effects().iter().any(|effect| matches!(effect, ClientEffect::Replicas(told) if told.len() == 2)));
    bench.reply(D, attached());
    bench.reply(A, replicas(0, &[A, B]));
    assert!(
        !bench.effects().iter().any(|effect| matches!(effect, ClientEffect::MoreReplicas(_))),
        "the leader says better"
    );
}
