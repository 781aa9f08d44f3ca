//! Who leads: candidacies, votes, and the guard that keeps a lease true.
//!
//! A lease is safe because every vote that could end it passes the voter's guard. A leader counts a peer's promise only
//! in the epoch that the peer told in a reply of the leader's own term; such a reply is only sent while following, so
//! from then on the peer's guard holds until the promise is over, and a peer that stops following raises the epoch.
//! A replica that started again does not know what it promised and gives no vote for one lease. `transfer` passes
//! both, because it says that the leader of the term before has given up its lease for good; candidates set it for
//! the one term directly after that leader's only, and leaders of older terms were outlived by that leader's election.

use std::collections::BTreeSet;

use holdfast_id::ReplicaId;
use holdfast_planted::Bug;

use crate::effect::Effect;
use crate::entry::{Body, Command, Entry, LogIndex, Position, Term};
use crate::leading::Leading;
use crate::liveness::Liveness;
use crate::message::MessageBody;
use crate::raft::{Raft, State};
use crate::time::Timestamp;

/// Waits between candidacies double from half a lease up to this many half leases.
const ELECTION_BACKOFF_MAX: u32 = 8;

/// Leases without a word from the leader after which a follower that is asked for its vote doubts it. An idle leader is
/// silent by right, so the question alone is no reason; nor is silence.
const SILENCE_LEASES: u32 = 4;

#[derive(Debug)]
pub(crate) struct Ballot {
    granted: BTreeSet<ReplicaId>,
    rejected: BTreeSet<ReplicaId>,
}

impl Ballot {
    fn new() -> Ballot {
        Ballot { granted: BTreeSet::new(), rejected: BTreeSet::new() }
    }
}

impl<C: Command> Raft<C> {
    pub(crate) fn on_vote(
        &mut self,
        liveness: &mut dyn Liveness,
        from: ReplicaId,
        term: Term,
        pre: bool,
        last: Position,
        transfer: bool,
    ) {
        if self.is_leader() && (pre || self.lease_holds(liveness)) {
            // Somebody does not hear its leader.
            self.remind(from);
            return;
        }
        if term < self.term() || (pre && term == self.term()) {
            self.send(from, MessageBody::VoteReply { pre, granted: false });
            return;
        }
        if pre && self.guard.is_some_and(|guard| guard.leader == from && guard.until.is_none()) {
            // Who leads asks nobody. It may not be elected again: it has started anew, and its log may be the shorter.
            self.doubt_leader(liveness);
        }
        if !self.may_vote {
            return;
        }
        if !transfer && self.vote_allowed_at(liveness, from) > self.now {
            self.maybe_doubt_leader(liveness, from);
            return;
        }
        let up_to_date = last >= self.log.last().max(self.forgotten);
        if pre {
            let answered = if up_to_date { term } else { self.term() };
            self.send_in_term(from, answered, MessageBody::VoteReply { pre, granted: up_to_date });
            return;
        }
        if term > self.term() {
            self.become_follower(liveness, term, None);
            if transfer {
                self.guard = None;
            }
        }
        let free = self.leader.is_none() && self.hard_state.vote.is_none_or(|vote| vote == from);
        let granted = free && up_to_date;
        if granted && self.hard_state.vote.is_none() {
            let mut hard_state = self.hard_state;
            hard_state.vote = Some(from);
            self.save_hard_state(hard_state);
            self.leave_candidacy();
            self.arm_election_again();
        }
        self.send(from, MessageBody::VoteReply { pre, granted });
    }

    pub(crate) fn on_vote_reply(
        &mut self,
        liveness: &mut dyn Liveness,
        from: ReplicaId,
        term: Term,
        pre: bool,
        granted: bool,
    ) {
        let asked = Term(self.term().0 + u64::from(pre));
        let answered = if pre && granted { asked } else { self.term() };
        if term > answered {
            // A grant of a pre-vote names the term asked for, which nobody may have entered.
            if !(pre && granted) {
                self.become_follower(liveness, term, None);
            }
            return;
        }
        if term < answered {
            return;
        }
        match &mut self.state {
            State::PreCandidate(ballot) if pre => ballot.count(from, granted),
            State::Candidate(ballot) if !pre => ballot.count(from, granted),
            _ => return,
        }
        self.count_votes(liveness);
    }

    pub(crate) fn on_transfer_now(&mut self, liveness: &mut dyn Liveness, from: ReplicaId, term: Term) {
        let from_leader =
            term > self.term() || (term == self.term() && self.leader.is_none_or(|leader| leader == from));
        if !from_leader || self.is_leader() {
            return;
        }
        if term > self.term() {
            self.become_follower(liveness, term, None);
        }
        self.leader_renounced = true;
        if !matches!(self.state, State::Candidate(_)) && self.can_stand() {
            self.stand(liveness, true);
        }
    }

    pub(crate) fn on_election_deadline(&mut self, liveness: &mut dyn Liveness) {
        self.election_at = None;
        if !self.can_stand() {
            return;
        }
        let allowed = self.vote_allowed_at(liveness, self.options.id);
        if allowed > self.now && !self.leader_renounced {
            self.arm_election(allowed);
            return;
        }
        let mut ballot = Ballot::new();
        ballot.granted.insert(self.options.id);
        assert!(!self.is_leader(), "a leader steps down before it stands");
        self.state = State::PreCandidate(ballot);
        self.ask_for_votes(true, self.leader_renounced);
        self.arm_election_again();
        self.election_tries = self.election_tries.saturating_add(1);
        self.count_votes(liveness);
    }

    /// A candidate's vote for itself counts once it is durable.
    pub(crate) fn count_own_vote(&mut self, liveness: &mut dyn Liveness) {
        let durable = self.hard_state_sequence <= self.log.persisted();
        let own = self.options.id;
        if let State::Candidate(ballot) = &mut self.state
            && durable
        {
            ballot.count(own, true);
            self.count_votes(liveness);
        }
    }

    /// Whether this replica may ever ask for votes as things are; promises aside. One that is about to leave may: if it
    /// alone has the entry that says so, and its vote is needed without, nobody else can be elected.
    pub(crate) fn can_stand(&self) -> bool {
        let index = self.log.configuration_index();
        let before = LogIndex(index.0.saturating_sub(1));
        let leaving = index > self.committed && self.log.configuration_at(before).is_voter(self.options.id);
        let whole = self.may_vote && self.log.last() >= self.forgotten;
        let able = whole && !self.failed && !self.installing;
        able && (self.configuration().is_voter(self.options.id) || leaving)
    }

    /// An election starts at `at` or a jitter later, if no leader is heard before.
    pub(crate) fn arm_election(&mut self, at: Timestamp) {
        let jitter = self.random.below(self.options.election_jitter);
        self.election_at = self.can_stand().then(|| at.max(self.now) + jitter);
    }

    /// As after a candidacy, successful or not: leaves time for the winner.
    pub(crate) fn arm_election_again(&mut self) {
        let backoff = (1 << self.election_tries.min(16)).min(ELECTION_BACKOFF_MAX);
        self.arm_election(self.now + self.options.lease / 2 * backoff);
    }

    /// When a vote for `candidate` breaks no promise: at once for the very leader it was made to.
    fn vote_allowed_at(&self, liveness: &dyn Liveness, candidate: ReplicaId) -> Timestamp {
        let promised = match &self.guard {
            Some(guard) if guard.leader != candidate => {
                guard.until.unwrap_or_else(|| liveness.promised_to(guard.leader))
            }
            _ => Timestamp::ZERO,
        };
        if holdfast_planted::is(Bug::BootedVoterVotes) {
            return promised;
        }
        promised.max(self.boot_wait_until)
    }

    /// The leader's node lives, yet somebody looks for a leader: the replica on it may have gone. A leader that is there
    /// answers to the new epoch with an append.
    fn maybe_doubt_leader(&mut self, liveness: &mut dyn Liveness, asking: ReplicaId) {
        let silent = self.now.since(self.leader_heard_at) >= self.options.lease * SILENCE_LEASES;
        let follows = self.guard.is_some_and(|guard| guard.until.is_none());
        if silent && follows && self.configuration().is_voter(asking) {
            self.doubt_leader(liveness);
        }
    }

    /// A real candidacy, for the next term.
    fn stand(&mut self, liveness: &mut dyn Liveness, transfer: bool) {
        self.stop_following(liveness);
        if transfer {
            self.guard = None;
        }
        self.leave_candidacy();
        self.enter_term(Term(self.term().0 + 1), Some(self.options.id));
        self.state = State::Candidate(Ballot::new());
        self.ask_for_votes(false, transfer);
        self.arm_election_again();
    }

    fn leave_candidacy(&mut self) {
        assert!(!self.is_leader(), "a leader steps down before it stands");
        self.state = State::Follower;
    }

    fn ask_for_votes(&mut self, pre: bool, transfer: bool) {
        let last = self.log.last();
        let term = Term(self.term().0 + u64::from(pre));
        for voter in self.others(|configuration, replica| configuration.is_voter(replica)) {
            self.send_in_term(voter, term, MessageBody::Vote { pre, last, transfer });
        }
    }

    fn count_votes(&mut self, liveness: &mut dyn Liveness) {
        let (pre, ballot) = match &self.state {
            State::PreCandidate(ballot) => (true, ballot),
            State::Candidate(ballot) => (false, ballot),
            State::Follower | State::Leader(_) => return,
        };
        let configuration = self.configuration();
        if configuration.agreed(|voter| ballot.granted.contains(&voter)) {
            if pre {
                let transfer = self.leader_renounced;
                self.stand(liveness, transfer);
            } else {
                self.become_leader(liveness);
            }
        } else if !configuration.agreed(|voter| !ballot.rejected.contains(&voter)) {
            // Lost for this time; the next one is armed.
            self.state = State::Follower;
        }
    }

    fn become_leader(&mut self, liveness: &mut dyn Liveness) {
        let term = self.term();
        let next = self.log.last().index.next();
        assert!(self.leader.is_none() && self.hard_state.vote == Some(self.options.id));
        self.leader = Some(self.options.id);
        self.guard = None;
        self.election_at = None;
        self.election_tries = 0;
        let uncommitted = self.log.bytes_between(self.committed, self.log.last().index);
        self.state = State::Leader(Box::new(Leading::new(next, uncommitted, self.now + self.quorum_patience())));
        self.update_peers();
        self.effects.push(Effect::BecameLeader(term));
        self.append(Body::Noop);
        self.advance_commit(liveness);
    }

    pub(crate) fn append(&mut self, body: Body<C>) -> LogIndex {
        let index = self.log.last().index.next();
        self.log.append(Entry { position: Position { term: self.term(), index }, body });
        index
    }
}

impl Ballot {
    fn count(&mut self, voter: ReplicaId, granted: bool) {
        if granted {
            self.granted.insert(voter)
        } else {
            self.rejected.insert(voter)
        };
    }
}
