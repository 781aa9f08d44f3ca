//! One test for every numbered step of Figure 2 of "In Search of an Understandable Consensus Algorithm", in its order,
//! named after the box and the step, with the section that explains it.
//!
//! Heartbeats of leaders are the business of `liveness`; timeouts are waits after the last promise to the leader's node.

mod cluster;

use std::time::Duration;

use cluster::{Disk, LEASE, Node, Number, configuration, number, replica};
use holdfast_consensus::{
    AppendResult, Body, Effect, Entry, HardState, LogIndex, Message, MessageBody, Position, Standing, SupportEpoch,
    Term, Timestamp,
};

/// Replica 1 of a group of `voters`, and what it says; everybody else is the test.
struct Bench {
    node: Node,
    now: Timestamp,
    told: Vec<Effect<Number>>,
}

impl Bench {
    /// A replica whose log has entries of these terms, past its boot wait.
    fn new(voters: &[u8], terms: &[u64], term: u64) -> Bench {
        let mut disk = Disk::empty(configuration(voters, &[]));
        disk.hard_state = HardState { term: Term(term), vote: None };
        disk.entries = entries(1, terms);
        let node = Node::start(1, disk, &[], 1, Timestamp::ZERO);
        let mut bench = Bench { node, now: Timestamp::ZERO + LEASE + LEASE / 10, told: vec![] };
        bench.take();
        bench
    }

    fn leader(voters: &[u8], terms: &[u64], term: u64) -> Bench {
        let mut bench = Bench::new(voters, terms, term - 1);
        if voters.len() > 1 {
            bench = Bench::candidate(voters, terms, term - 1);
        } else {
            bench.time_out();
            bench.flush();
        }
        for voter in &voters[1..=voters.len() / 2] {
            bench.hear(*voter, term, MessageBody::VoteReply { pre: false, granted: true });
        }
        assert_eq!(bench.standing(), Standing::Leader);
        bench.flush();
        bench
    }

    fn candidate(voters: &[u8], terms: &[u64], term: u64) -> Bench {
        let mut bench = Bench::new(voters, terms, term);
        bench.time_out();
        for voter in &voters[1..] {
            bench.hear(*voter, term + 1, MessageBody::VoteReply { pre: true, granted: true });
        }
        bench.flush();
        assert_eq!(bench.standing(), Standing::Candidate);
        bench
    }

    /// Passes a message in; what leaves before anything is flushed.
    fn hear(&mut self, from: u8, term: u64, body: MessageBody<Number>) -> Vec<(u8, Message<Number>)> {
        let now = self.now;
        let message = Message { term: Term(term), body };
        self.node.call(|raft, liveness| raft.on_message(now, liveness, replica(from), message));
        self.take()
    }

    /// As `hear`, and what leaves when everything is flushed.
    fn answer(&mut self, from: u8, term: u64, body: MessageBody<Number>) -> Vec<(u8, Message<Number>)> {
        let mut sent = self.hear(from, term, body);
        sent.extend(self.flush());
        sent
    }

    fn append(
        &mut self,
        term: u64,
        previous: (u64, u64),
        commit: u64,
        entries: Vec<Entry<Number>>,
    ) -> Option<(AppendResult, u64)> {
        let previous = Position { term: Term(previous.0), index: LogIndex(previous.1) };
        let body = MessageBody::Append { previous, commit: LogIndex(commit), entries, round: 1 };
        let sent = self.answer(2, term, body);
        sent.into_iter().rev().find_map(|(to, message)| match message.body {
            MessageBody::AppendReply { result, .. } if to == 2 => Some((result, message.term.0)),
            _ => None,
        })
    }

    fn vote(&mut self, from: u8, term: u64, last: (u64, u64)) -> Option<bool> {
        let last = Position { term: Term(last.0), index: LogIndex(last.1) };
        let sent = self.answer(from, term, MessageBody::Vote { pre: false, last, transfer: false });
        sent.into_iter().find_map(|(to, message)| match message.body {
            MessageBody::VoteReply { granted, .. } if to == from => Some(granted),
            _ => None,
        })
    }

    fn acknowledge(&mut self, from: u8, term: u64, submitted: u64, flushed: u64) {
        let body = MessageBody::AppendReply {
            result: AppendResult::Submitted(LogIndex(submitted)),
            flushed: LogIndex(flushed),
            round: 0,
            support: SupportEpoch { boot: 1, count: 0 },
        };
        self.hear(from, term, body);
    }

    fn flush(&mut self) -> Vec<(u8, Message<Number>)> {
        let count = self.node.writing.len();
        let mut sent: Vec<_> =
            self.node.persist(self.now, count).into_iter().map(|sent| (number(sent.to), sent.message)).collect();
        sent.extend(self.take());
        sent
    }

    fn time_out(&mut self) -> Vec<(u8, Message<Number>)> {
        self.now = self.node.raft.deadline().expect("awake");
        let now = self.now;
        self.node.call(|raft, liveness| raft.on_deadline(now, liveness));
        self.take()
    }

    fn take(&mut self) -> Vec<(u8, Message<Number>)> {
        let (sent, told) = self.node.take();
        self.told.extend(told);
        sent.into_iter().map(|sent| (number(sent.to), sent.message)).collect()
    }

    fn standing(&self) -> Standing {
        self.node.raft.status().standing
    }

    fn terms(&self) -> Vec<u64> {
        let last = self.node.raft.status().last.index.0;
        (1..=last).map(|index| self.node.raft.position_at(LogIndex(index)).expect("in the log").term.0).collect()
    }

    fn committed(&self) -> u64 {
        self.node.raft.committed().0
    }
}

fn entries(first: u64, terms: &[u64]) -> Vec<Entry<Number>> {
    let position = |(index, term): (u64, &u64)| Position { term: Term(*term), index: LogIndex(index) };
    (first..).zip(terms).map(|at| Entry { position: position(at), body: Body::Command(Number(at.0)) }).collect()
}

#[test]
fn state_term_and_vote_are_durable_before_the_answer_section_5_1() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    let last = Position::default();
    let sent = bench.hear(2, 1, MessageBody::Vote { pre: false, last, transfer: false });
    assert_eq!(sent, vec![], "nothing leaves before the vote is flushed");
    let sent = bench.flush();
    assert_eq!(bench.node.disk.hard_state, HardState { term: Term(1), vote: Some(replica(2)) });
    assert!(matches!(sent[0].1.body, MessageBody::VoteReply { granted: true, .. }));
}

#[test]
fn append_entries_1_refuses_an_older_term_section_5_1() {
    let mut bench = Bench::new(&[1, 2, 3], &[1], 3);
    let (result, term) = bench.append(2, (1, 1), 1, entries(2, &[2])).expect("answered");
    assert!(matches!(result, AppendResult::Mismatch { .. }));
    assert_eq!(term, 3);
    assert_eq!(bench.terms(), [1]);
}

#[test]
fn append_entries_2_refuses_where_the_previous_entry_does_not_match_section_5_3() {
    for (log, previous) in [(&[1, 1][..], (2, 2)), (&[1], (1, 2)), (&[], (1, 1))] {
        let mut bench = Bench::new(&[1, 2, 3], log, 2);
        let (result, _) = bench.append(2, previous, 0, entries(previous.1 + 1, &[2])).expect("answered");
        assert!(matches!(result, AppendResult::Mismatch { rejected, .. } if rejected.0 == previous.1), "{result:?}");
        assert_eq!(bench.terms(), log);
    }
}

#[test]
fn append_entries_3_a_conflict_removes_the_entry_and_all_that_follow_section_5_3() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 1, 1, 1], 1);
    let (result, _) = bench.append(2, (1, 1), 0, entries(2, &[2])).expect("answered");
    assert_eq!(result, AppendResult::Submitted(LogIndex(2)));
    assert_eq!(bench.terms(), [1, 2]);
    assert_eq!(bench.node.disk.entries.len(), 2, "on disk too");
}

#[test]
fn append_entries_3_no_conflict_removes_nothing_section_5_3() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 1, 1], 1);
    // An old append that arrives late must not cut off what came after it.
    bench.append(1, (1, 1), 0, entries(2, &[1])).expect("answered");
    assert_eq!(bench.terms(), [1, 1, 1]);
}

#[test]
fn append_entries_4_appends_what_is_not_in_the_log() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 1], 1);
    let (result, _) = bench.append(2, (1, 1), 0, entries(2, &[1, 2, 2])).expect("answered");
    assert_eq!(result, AppendResult::Submitted(LogIndex(4)));
    assert_eq!(bench.terms(), [1, 1, 2, 2]);
}

#[test]
fn append_entries_5_commits_up_to_the_last_entry_the_leader_spoke_of() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 1, 1, 1], 1);
    // Entries 3 and 4 may differ from the leader's; the append proves only up to 2.
    bench.append(2, (1, 1), 4, entries(2, &[1])).expect("answered");
    assert_eq!(bench.committed(), 2);
    bench.append(2, (1, 2), 3, entries(3, &[1, 1])).expect("answered");
    assert_eq!(bench.committed(), 3);
    bench.append(2, (1, 4), 1, vec![]).expect("answered");
    assert_eq!(bench.committed(), 3, "the commit index never falls");
}

#[test]
fn request_vote_1_refuses_an_older_term_section_5_1() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 3);
    assert_eq!(bench.vote(2, 2, (9, 9)), Some(false));
    assert_eq!(bench.node.raft.term(), Term(3));
}

#[test]
fn request_vote_2_one_vote_per_term_section_5_2() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    assert_eq!(bench.vote(2, 1, (0, 0)), Some(true));
    assert_eq!(bench.vote(3, 1, (0, 0)), Some(false));
    assert_eq!(bench.vote(2, 1, (0, 0)), Some(true), "the same candidate, whose answer was lost");
    assert_eq!(bench.vote(3, 2, (0, 0)), Some(true), "the next term");
}

#[test]
fn request_vote_2_the_candidates_log_must_be_up_to_date_section_5_4_1() {
    for (last, granted) in [((1, 9), false), ((2, 1), false), ((2, 2), true), ((2, 3), true), ((3, 1), true)] {
        let mut bench = Bench::new(&[1, 2, 3], &[1, 2], 3);
        assert_eq!(bench.vote(2, 4, last), Some(granted), "{last:?}");
    }
}

#[test]
fn all_servers_1_applies_what_is_committed_section_5_3() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    bench.append(1, (0, 0), 2, entries(1, &[1, 1, 1])).expect("answered");
    assert_eq!(bench.told, vec![Effect::Committed(LogIndex(2))]);
}

#[test]
fn all_servers_2_a_higher_term_makes_a_follower_section_5_1() {
    type Make = fn() -> Bench;
    let makes: [Make; 3] = [
        || Bench::new(&[1, 2, 3], &[], 0),
        || Bench::candidate(&[1, 2, 3], &[], 0),
        || Bench::leader(&[1, 2, 3], &[], 1),
    ];
    for make in makes {
        for body in [
            MessageBody::Vote { pre: false, last: Position::default(), transfer: false },
            MessageBody::VoteReply { pre: false, granted: false },
            MessageBody::Append { previous: Position::default(), commit: LogIndex(0), entries: vec![], round: 0 },
            MessageBody::AppendReply {
                result: AppendResult::Submitted(LogIndex(0)),
                flushed: LogIndex(0),
                round: 0,
                support: SupportEpoch::default(),
            },
        ] {
            let mut bench = make();
            bench.hear(2, 9, body.clone());
            assert_eq!((bench.standing(), bench.node.raft.term()), (Standing::Follower, Term(9)), "{body:?}");
        }
        // A question changes nothing.
        let mut bench = make();
        let before = (bench.standing(), bench.node.raft.term());
        bench.hear(2, 9, MessageBody::Vote { pre: true, last: Position::default(), transfer: false });
        assert_eq!((bench.standing(), bench.node.raft.term()), before);
    }
}

#[test]
fn followers_1_answer_candidates_and_leaders_section_5_2() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    assert!(bench.vote(2, 1, (0, 0)).is_some());
    assert!(bench.append(1, (0, 0), 0, vec![]).is_some());
}

#[test]
fn followers_2_stand_when_no_leader_is_heard_section_5_2() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    let sent = bench.time_out();
    assert_eq!(bench.standing(), Standing::PreCandidate);
    assert_eq!(sent.iter().map(|(to, message)| (*to, message.term.0)).collect::<Vec<_>>(), [(2, 1), (3, 1)]);
    // A leader, once heard, is trusted until its node is suspected.
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    bench.append(1, (0, 0), 0, vec![]);
    assert_eq!(bench.node.raft.deadline(), None);
    let now = bench.now;
    bench.node.call(|raft, liveness| raft.on_suspect(now, liveness, replica(2)));
    bench.time_out();
    assert_eq!(bench.standing(), Standing::PreCandidate);
}

#[test]
fn candidates_1_raise_the_term_vote_for_themselves_and_ask_all_section_5_2() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 4);
    bench.time_out();
    let unflushed = bench.hear(2, 5, MessageBody::VoteReply { pre: true, granted: true });
    assert_eq!(unflushed, vec![]);
    let sent = bench.flush();
    assert_eq!(bench.node.disk.hard_state, HardState { term: Term(5), vote: Some(replica(1)) });
    let vote =
        |message: &Message<Number>| matches!(message.body, MessageBody::Vote { pre: false, .. }) && message.term.0 == 5;
    assert_eq!(sent.iter().map(|(to, message)| (*to, vote(message))).collect::<Vec<_>>(), [(2, true), (3, true)]);
    assert!(bench.node.raft.deadline().is_some_and(|at| at > bench.now));
}

#[test]
fn candidates_2_a_majority_makes_a_leader_section_5_2() {
    let voters = [1, 2, 3, 4, 5];
    let granted = MessageBody::VoteReply { pre: false, granted: true };
    let mut bench = Bench::candidate(&voters, &[], 0);
    bench.hear(2, 1, granted.clone());
    bench.hear(2, 1, granted.clone());
    bench.hear(9, 1, granted.clone());
    assert_eq!(bench.standing(), Standing::Candidate, "two of five, one twice, and one without a vote");
    bench.hear(3, 1, granted);
    assert_eq!(bench.standing(), Standing::Leader);

    let refused = MessageBody::VoteReply { pre: false, granted: false };
    let mut bench = Bench::candidate(&voters, &[], 0);
    for voter in [2, 3, 4] {
        bench.hear(voter, 1, refused.clone());
    }
    assert_eq!(bench.standing(), Standing::Follower);
}

#[test]
fn candidates_2_the_own_vote_counts_when_it_is_flushed_section_5_1() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    bench.time_out();
    bench.hear(2, 1, MessageBody::VoteReply { pre: true, granted: true });
    bench.hear(2, 1, MessageBody::VoteReply { pre: false, granted: true });
    assert_eq!(bench.standing(), Standing::Candidate);
    bench.flush();
    assert_eq!(bench.standing(), Standing::Leader);
}

#[test]
fn candidates_3_follow_a_leader_of_their_term_section_5_2() {
    let mut bench = Bench::candidate(&[1, 2, 3], &[], 0);
    bench.append(1, (0, 0), 0, vec![]).expect("answered");
    assert_eq!((bench.standing(), bench.node.raft.leader()), (Standing::Follower, Some(replica(2))));
}

#[test]
fn candidates_4_stand_again_after_a_wait_section_5_2() {
    let mut bench = Bench::candidate(&[1, 2, 3], &[], 0);
    let asked_at = bench.now;
    let sent = bench.time_out();
    assert!(bench.now > asked_at + Duration::from_millis(100));
    assert!(
        sent.iter().all(|(_, m)| m.term.0 == 2 && matches!(m.body, MessageBody::Vote { pre: true, .. })),
        "{sent:?}"
    );
    assert_eq!(sent.len(), 2);
}

#[test]
fn leaders_1_speak_to_all_upon_election_section_5_2() {
    let mut bench = Bench::candidate(&[1, 2, 3], &[1], 1);
    let sent = bench.hear(2, 2, MessageBody::VoteReply { pre: false, granted: true });
    let append = |message: &Message<Number>| {
        matches!(&message.body, MessageBody::Append { previous, entries, .. }
            if *previous == Position { term: Term(1), index: LogIndex(1) } && entries.is_empty())
    };
    assert_eq!(sent.iter().map(|(to, message)| (*to, append(message))).collect::<Vec<_>>(), [(2, true), (3, true)]);
}

#[test]
fn leaders_2_append_a_command_and_tell_its_commit_section_5_3() {
    // A lease needs promises, which this bench has not; a group of one needs none.
    let mut bench = Bench::leader(&[1], &[], 1);
    let now = bench.now;
    let index = bench.node.call(|raft, liveness| raft.propose(now, liveness, Number(7)));
    assert_eq!(index, Ok(LogIndex(2)));
    bench.take();
    assert!(!bench.told.contains(&Effect::Committed(LogIndex(2))), "not before it is flushed");
    bench.flush();
    assert!(bench.told.contains(&Effect::Committed(LogIndex(2))));
}

#[test]
fn leaders_3_send_what_is_missing_from_next_on_section_5_3() {
    let mut bench = Bench::leader(&[1, 2, 3], &[1], 2);
    let body = MessageBody::AppendReply {
        result: AppendResult::Submitted(LogIndex(1)),
        flushed: LogIndex(1),
        round: 0,
        support: SupportEpoch::default(),
    };
    let sent = bench.hear(2, 2, body);
    assert!(matches!(&sent[..], [(2, Message { body: MessageBody::Append { previous, entries, .. }, .. })]
        if previous.index.0 == 1 && entries.len() == 1));
    let peer = bench.node.raft.status().peers[0];
    assert_eq!((peer.next.0, peer.submitted.0), (3, 1));
    // Success moves both words.
    bench.acknowledge(2, 2, 2, 2);
    let peer = bench.node.raft.status().peers[0];
    assert_eq!((peer.next.0, peer.submitted.0, peer.flushed.0), (3, 2, 2));
}

#[test]
fn leaders_3_step_back_on_a_mismatch_section_5_3() {
    let mut bench = Bench::leader(&[1, 2, 3], &[1, 1, 3], 4);
    let refuse = |rejected: u64, hint: (u64, u64)| MessageBody::AppendReply {
        result: AppendResult::Mismatch {
            rejected: LogIndex(rejected),
            hint: Position { term: Term(hint.0), index: LogIndex(hint.1) },
        },
        flushed: LogIndex(0),
        round: 0,
        support: SupportEpoch::default(),
    };
    let sent = bench.hear(2, 4, refuse(3, (2, 3)));
    let previous = |sent: &[(u8, Message<Number>)]| match &sent[0].1.body {
        MessageBody::Append { previous, .. } => previous.index.0,
        other => panic!("{other:?}"),
    };
    assert_eq!(previous(&sent), 2, "skips its own entry of term 3, which the peer cannot have at or below term 2");
    let sent = bench.hear(2, 4, refuse(2, (0, 0)));
    assert_eq!(previous(&sent), 0);
}

#[test]
fn leaders_4_commit_what_a_majority_flushed_section_5_3() {
    let mut bench = Bench::leader(&[1, 2, 3, 4, 5], &[], 1);
    bench.acknowledge(2, 1, 1, 1);
    assert_eq!(bench.committed(), 0);
    bench.acknowledge(3, 1, 1, 0);
    assert_eq!(bench.committed(), 0, "submitted is not flushed");
    bench.acknowledge(3, 1, 1, 1);
    assert_eq!(bench.committed(), 1);
}

#[test]
fn leaders_4_commit_older_terms_only_under_an_own_entry_section_5_4_2() {
    let mut bench = Bench::leader(&[1, 2, 3], &[1, 2], 4);
    bench.acknowledge(2, 4, 2, 2);
    assert_eq!(bench.committed(), 0, "Figure 8: an entry of term 2 on a majority can still be overwritten");
    bench.acknowledge(2, 4, 3, 3);
    assert_eq!(bench.committed(), 3);
}

// What is ours: a replica whose state is being replaced by another's, beside the steps above.

#[test]
fn a_replica_that_is_being_installed_votes_by_its_log_and_does_not_stand() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 2], 3);
    let now = bench.now;
    bench.node.raft.set_installing(now, true);
    assert_eq!(bench.node.raft.deadline(), None, "it does not stand");
    bench.hear(2, 3, MessageBody::TransferNow);
    assert_eq!(bench.standing(), Standing::Follower, "not when asked to either");
    assert_eq!(bench.vote(2, 4, (1, 9)), Some(false), "its log is longer");
    assert_eq!(bench.vote(3, 5, (2, 2)), Some(true));
    bench.node.raft.set_installing(now, false);
    bench.time_out();
    assert_eq!(bench.standing(), Standing::PreCandidate);
}

/// Two copies whose votes count are then enough, as ever: nobody waits for a third to come back.
#[test]
fn a_log_that_was_given_up_is_voted_by_and_not_stood_with() {
    let mut bench = Bench::new(&[1, 2, 3], &[1, 2], 3);
    let now = bench.now;
    bench.node.raft.set_installing(now, true);
    bench.node.raft.forget_log(now);
    bench.flush();
    assert_eq!(bench.terms(), vec![]);
    assert_eq!(bench.vote(2, 4, (1, 9)), Some(false), "it may lack what was promised here");
    assert_eq!(bench.vote(2, 5, (2, 2)), Some(true));
    // The state at 1 is installed: not all of what was promised yet.
    let base = Position { term: Term(1), index: LogIndex(1) };
    bench.node.disk.compact(base, configuration(&[1, 2, 3], &[]));
    bench.node.raft.set_installing(now, false);
    bench.node.call(|raft, liveness| raft.on_delta_installed(now, liveness, base, configuration(&[1, 2, 3], &[])));
    assert_eq!(bench.node.raft.deadline(), None, "it does not stand: it lacks what it promised itself");
    assert_eq!(bench.append(5, (1, 1), 1, entries(2, &[2])), Some((AppendResult::Submitted(LogIndex(2)), 5)));
    bench.hear(2, 5, MessageBody::TransferNow);
    assert_eq!(bench.standing(), Standing::Candidate);
}

/// A message of the leader's life before may have come after the suspicion that its restart raised.
#[test]
fn a_followed_leader_that_asks_for_votes_is_followed_no_more() {
    let mut bench = Bench::new(&[1, 2, 3], &[], 0);
    assert_eq!(bench.append(1, (0, 0), 0, entries(1, &[1, 1])), Some((AppendResult::Submitted(LogIndex(2)), 1)));
    assert_eq!(bench.node.raft.deadline(), None, "it follows, and sleeps");
    let last = Position { term: Term(1), index: LogIndex(1) };
    let sent = bench.answer(2, 2, MessageBody::Vote { pre: true, last, transfer: false });
    assert!(sent.iter().any(|(_, m)| m.body == MessageBody::VoteReply { pre: true, granted: false }), "{sent:?}");
    bench.time_out();
    assert_eq!(bench.standing(), Standing::PreCandidate);
}
