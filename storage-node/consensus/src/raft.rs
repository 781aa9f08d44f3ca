//! The core of one replica of one group: Raft with pre-vote, node-pair leases and separate submitted/flushed progress.
//!
//! Not a driver: it owns no disk, socket or clock. Whoever owns those calls `on_*` with the time, then takes and
//! carries out the effects. Entries proposed within one batch of events leave in one `Persist` and one append per
//! peer, so the effects should be taken once per batch.
//!
//! Invariants:
//! 1. Term and vote are durable before any message that speaks of them leaves; a replica counts its own vote when
//!    it is durable, and its own entries when they are flushed.
//! 2. While this replica follows a leader, and from then until `guard` ends, it gives no vote to anybody else.
//!    When it stops following, the support for that leader's node is withdrawn at once, so that what is promised
//!    later proves nothing to that leader, and the guard ends at what was promised by then.
//! 3. `announced <= committed`, `announced <= flushed`.
//! 4. Where an answer is due, a deadline stands. An idle leader, and a follower that trusts its leader, have none.

use std::time::Duration;

use holdfast_id::ReplicaId;

use crate::effect::{Effect, PersistSequence};
use crate::election::Ballot;
use crate::entry::{Command, Configuration, Entry, HardState, LogIndex, Position, Term};
use crate::following::Offer;
use crate::leading::Leading;
use crate::liveness::Liveness;
use crate::log::Log;
use crate::message::{AppendResult, Message, MessageBody, Shortage};
use crate::random::Random;
use crate::status::{PeerStatus, Standing, Status};
use crate::time::{Timestamp, with_drift};

/// Terms at and above this are not believed: nobody gets there by elections.
const TERM_LIMIT: Term = Term(1 << 62);

#[derive(Clone, Debug)]
pub struct Options {
    pub id: ReplicaId,
    /// How long one heartbeat's promise lasts; 300 ms.
    pub lease: Duration,
    /// How far the clock of any node may run from true time, in millionths.
    pub drift_ppm: u32,
    /// Elections start within this after they may.
    pub election_jitter: Duration,
    /// Bytes of one append; one larger entry still goes alone.
    pub append_bytes_max: usize,
    /// Bytes sent to one peer and not yet submitted there; exceeded by less than one append.
    pub inflight_bytes_max: usize,
    pub seed: u64,
}

/// What a replica finds at its start; all of it durable.
#[derive(Clone, Debug)]
pub struct Restored<C> {
    pub hard_state: HardState,
    pub base: Position,
    /// As of `base`.
    pub configuration: Configuration,
    /// Contiguous from directly after `base`.
    pub entries: Vec<Entry<C>>,
    /// Within `[base.index, last]`; the checkpoint's index, for example.
    pub committed: LogIndex,
    /// False: damaged, neither votes nor stands before it caught up with an elected leader.
    pub may_vote: bool,
    /// See [`Raft::forgotten`].
    pub forgotten: Position,
}

#[derive(Debug)]
pub(crate) enum State {
    Follower,
    PreCandidate(Ballot),
    Candidate(Ballot),
    Leader(Box<Leading>),
}

/// Whom this replica must not help to replace, and until when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard {
    pub(crate) leader: ReplicaId,
    /// `None`: as long as this node promises to the leader's; it follows.
    pub(crate) until: Option<Timestamp>,
}

/// A leader that stopped and cannot stand again asks others to, until it hears of a later term.
#[derive(Debug)]
pub(crate) struct Retiring {
    pub(crate) successors: Vec<ReplicaId>,
    pub(crate) asked: usize,
    pub(crate) next_at: Timestamp,
}

#[derive(Debug)]
pub struct Raft<C> {
    pub(crate) options: Options,
    pub(crate) random: Random,
    pub(crate) log: Log<C>,
    pub(crate) hard_state: HardState,
    /// The step that makes `hard_state` durable.
    pub(crate) hard_state_sequence: PersistSequence,
    pub(crate) committed: LogIndex,
    /// The highest index told in `Effect::Committed`.
    pub(crate) announced: LogIndex,
    pub(crate) state: State,
    pub(crate) leader: Option<ReplicaId>,
    pub(crate) guard: Option<Guard>,
    /// When the followed leader was last heard.
    pub(crate) leader_heard_at: Timestamp,
    /// The leader of this term said, by message or by a committed configuration, that it leads no more.
    pub(crate) leader_renounced: bool,
    /// Followers: the highest index known to match the leader's log in this term.
    pub(crate) matched: LogIndex,
    /// Followers: the highest round heard of in this term.
    pub(crate) round_heard: u64,
    /// Followers: the highest index of the leader's log heard of in this term.
    pub(crate) heard_of: LogIndex,
    pub(crate) boot_wait_until: Timestamp,
    pub(crate) may_vote: bool,
    pub(crate) forgotten: Position,
    pub(crate) failed: bool,
    pub(crate) full: Option<Shortage>,
    pub(crate) installing: bool,
    pub(crate) election_at: Option<Timestamp>,
    pub(crate) election_tries: u32,
    pub(crate) retiring: Option<Retiring>,
    /// The time of the newest event.
    pub(crate) now: Timestamp,
    pub(crate) effects: Vec<Effect<C>>,
}

impl<C: Command> Raft<C> {
    /// Starts as a follower. No vote is given for one lease from `now` on: an earlier life may have promised.
    ///
    /// Panics if `restored` contradicts itself.
    pub fn new(options: Options, restored: Restored<C>, now: Timestamp) -> Raft<C> {
        restored.configuration.validate().expect("the driver restores legal configurations");
        let log = Log::new(restored.base, restored.configuration, restored.entries);
        assert!(restored.base.index <= restored.committed && restored.committed <= log.last().index);
        let own_entries = log.last().term <= restored.hard_state.term.max(restored.base.term);
        assert!(own_entries, "the term was durable before its entries");
        let mut raft = Raft {
            random: Random::new(options.seed),
            boot_wait_until: now + with_drift(options.lease, options.drift_ppm),
            log,
            hard_state: restored.hard_state,
            hard_state_sequence: PersistSequence(0),
            committed: restored.committed,
            announced: restored.committed,
            state: State::Follower,
            leader: None,
            guard: None,
            leader_heard_at: now,
            leader_renounced: false,
            matched: LogIndex(0),
            round_heard: 0,
            heard_of: LogIndex(0),
            may_vote: restored.may_vote,
            forgotten: restored.forgotten,
            failed: false,
            full: None,
            installing: false,
            election_at: None,
            election_tries: 0,
            retiring: None,
            now,
            effects: Vec::new(),
            options,
        };
        if raft.hard_state.term < restored.base.term {
            // An installed base outlived the crash that its term did not; no vote was given in a term not reached.
            raft.save_hard_state(HardState { term: restored.base.term, vote: None });
        }
        raft.arm_election(raft.boot_wait_until);
        raft
    }

    pub fn id(&self) -> ReplicaId {
        self.options.id
    }

    pub fn term(&self) -> Term {
        self.hard_state.term
    }

    pub fn leader(&self) -> Option<ReplicaId> {
        self.leader
    }

    pub fn is_leader(&self) -> bool {
        matches!(self.state, State::Leader(_))
    }

    /// False while damage keeps this replica from voting and standing: it has not caught up with an elected leader yet.
    pub fn may_vote(&self) -> bool {
        self.may_vote
    }

    /// Where a log ended that was given up. The driver keeps it with the hard state: until the log is there again it
    /// stands in for it wherever candidates are judged, this replica among them.
    pub fn forgotten(&self) -> Position {
        self.forgotten
    }

    pub fn committed(&self) -> LogIndex {
        self.committed
    }

    /// The configuration in force: the last one appended.
    pub fn configuration(&self) -> &Configuration {
        self.log.configuration()
    }

    /// Committed and not joint: the next change may start.
    pub fn is_configuration_settled(&self) -> bool {
        !self.configuration().is_joint() && self.log.configuration_index() <= self.committed
    }

    /// The configuration as of `index`, for a checkpoint there; `None` below the base.
    pub fn configuration_at(&self, index: LogIndex) -> Option<&Configuration> {
        (index >= self.log.base().index).then(|| self.log.configuration_at(index))
    }

    pub fn entry(&self, index: LogIndex) -> Option<&Entry<C>> {
        self.log.entry(index)
    }

    /// The base's position too; `None` outside `[base, last]`.
    pub fn position_at(&self, index: LogIndex) -> Option<Position> {
        self.log.position_at(index)
    }

    /// When `on_deadline` wants to be called; `None`: asleep until another event.
    pub fn deadline(&self) -> Option<Timestamp> {
        let leading = match &self.state {
            State::Leader(leading) => leading.deadline(),
            _ => None,
        };
        let retiring = self.retiring.as_ref().map(|retiring| retiring.next_at);
        [self.election_at, leading, retiring].into_iter().flatten().min()
    }

    pub fn status(&self) -> Status {
        let (standing, serving, lease_until, peers) = match &self.state {
            State::Follower => (Standing::Follower, false, None, Vec::new()),
            State::PreCandidate(_) => (Standing::PreCandidate, false, None, Vec::new()),
            State::Candidate(_) => (Standing::Candidate, false, None, Vec::new()),
            State::Leader(leading) => {
                let peers = leading.peers.iter().map(|(replica, progress)| PeerStatus {
                    replica: *replica,
                    state: progress.state,
                    next: progress.next,
                    submitted: progress.submitted,
                    flushed: progress.flushed,
                    reachable: progress.reachable,
                    epoch: progress.epoch,
                });
                (Standing::Leader, leading.serving, leading.lease_until, peers.collect())
            }
        };
        Status {
            id: self.options.id,
            standing,
            term: self.hard_state.term,
            vote: self.hard_state.vote,
            leader: self.leader,
            base: self.log.base(),
            last: self.log.last(),
            flushed: self.log.flushed(),
            committed: self.committed,
            may_vote: self.may_vote,
            serving,
            lease_until,
            peers,
        }
    }

    pub fn on_message(&mut self, now: Timestamp, liveness: &mut dyn Liveness, from: ReplicaId, message: Message<C>) {
        self.now = now;
        let Message { term, body } = message;
        if from == self.options.id || term >= TERM_LIMIT {
            return;
        }
        if self.failed {
            if term > self.hard_state.term {
                self.retiring = None;
            }
            return;
        }
        match body {
            MessageBody::Vote { pre, last, transfer } => self.on_vote(liveness, from, term, pre, last, transfer),
            MessageBody::VoteReply { pre, granted } => self.on_vote_reply(liveness, from, term, pre, granted),
            MessageBody::Append { previous, commit, entries, round } => {
                self.on_append(liveness, from, term, Offer { previous, commit, entries, round });
            }
            MessageBody::AppendReply { result, flushed, round, support } => {
                if term > self.hard_state.term {
                    self.become_follower(liveness, term, None);
                } else if term == self.hard_state.term {
                    self.on_append_reply(liveness, from, result, flushed, round, support);
                }
            }
            MessageBody::TransferNow => self.on_transfer_now(liveness, from, term),
        }
    }

    /// Everything up to and with `sequence` is durable.
    pub fn on_persisted(&mut self, now: Timestamp, liveness: &mut dyn Liveness, sequence: PersistSequence) {
        self.now = now;
        let flushed = self.log.flushed();
        self.log.on_persisted(sequence);
        let news = self.log.flushed() > flushed;
        match &self.state {
            State::Candidate(_) => self.count_own_vote(liveness),
            State::Leader(_) => self.advance_commit(liveness),
            State::Follower | State::PreCandidate(_) => {}
        }
        if news && !self.is_leader() {
            self.on_flushed(liveness);
        }
    }

    pub fn on_deadline(&mut self, now: Timestamp, liveness: &mut dyn Liveness) {
        self.now = now;
        if self.is_leader() {
            self.on_leader_deadline(liveness);
        } else if self.election_at.is_some_and(|at| at <= now) {
            self.on_election_deadline(liveness);
        }
        if self.retiring.as_ref().is_some_and(|retiring| retiring.next_at <= now) {
            self.ask_successor();
        }
    }

    /// The peer's node may be gone: its heartbeats stopped, its connection closed, it started again or its disk
    /// stalls. Only a suspicion: no promise ends by it.
    pub fn on_suspect(&mut self, now: Timestamp, liveness: &mut dyn Liveness, peer: ReplicaId) {
        self.now = now;
        if self.is_leader() {
            self.on_follower_suspected(peer);
        } else if self.guard.is_some_and(|guard| guard.leader == peer && guard.until.is_none()) {
            self.doubt_leader(liveness);
        }
    }

    /// The peer's node is connected, its heartbeats are answered again, or its support epoch for this node changed.
    pub fn on_peer_connected(&mut self, now: Timestamp, _liveness: &mut dyn Liveness, peer: ReplicaId) {
        self.now = now;
        if self.is_leader() {
            self.on_follower_connected(peer);
        } else if self.election_tries > 0 && self.election_at.is_some() && self.configuration().is_voter(peer) {
            // It asked in vain so far; now there may be one more to ask.
            self.election_tries = 0;
            self.arm_election(now);
        }
    }

    /// Lead no more and never stand or vote again: the disk failed.
    pub fn step_down(&mut self, now: Timestamp, liveness: &mut dyn Liveness) {
        self.now = now;
        self.failed = true;
        if self.is_leader() {
            self.retire(liveness);
        } else if !matches!(self.state, State::Follower) {
            self.state = State::Follower;
        }
        self.election_at = None;
    }

    /// While full, entries offered by a leader are declined; this replica lags.
    pub fn set_full(&mut self, full: Option<Shortage>) {
        self.full = full;
    }

    /// Whether so many voters have no room for data that what is proposed now might never be committed. False where
    /// this replica does not lead.
    pub fn lacks_room(&self) -> bool {
        let State::Leader(leading) = &self.state else { return false };
        let has_room = |replica: ReplicaId| match leading.peers.get(&replica) {
            Some(progress) => !progress.full,
            None => self.full != Some(Shortage::Data),
        };
        !self.configuration().agreed(has_room)
    }

    /// While another replica's state takes the place of this one's, nothing can be applied: this replica does not stand
    /// for election. It votes, by its log, which is whole.
    ///
    /// Panics if it leads.
    pub fn set_installing(&mut self, now: Timestamp, installing: bool) {
        self.now = now;
        if self.installing == installing {
            return;
        }
        assert!(!self.is_leader(), "a leader has what its log says");
        self.installing = installing;
        let follows = self.guard.is_some_and(|guard| guard.until.is_none());
        if installing {
            self.state = State::Follower;
            self.election_at = None;
        } else if !follows {
            self.arm_election_again();
        }
    }

    /// The log goes, while the state that takes its place is on its way, for what it holds up. Its end is remembered: a
    /// vote asks for no more of the log than that, so whoever lacks what was promised here gets none.
    ///
    /// Panics unless it is being installed.
    pub fn forget_log(&mut self, now: Timestamp) {
        self.now = now;
        assert!(self.installing, "only a log that is to be replaced is given up");
        let base = self.log.base().index;
        self.forgotten = self.forgotten.max(self.log.last());
        self.log.truncate_from(base.next());
        self.committed = base;
        self.announced = base;
        self.matched = LogIndex(0);
        self.save_hard_state(self.hard_state);
    }

    /// Entries up to and with `to` leave memory.
    ///
    /// Panics unless `to` was told in `Effect::Committed` or restored as committed.
    pub fn compact(&mut self, to: LogIndex) {
        assert!(to <= self.announced, "only what is committed and durable here is compacted");
        self.log.compact(to);
    }

    /// The state up to `base` was installed, durably, from another replica; `base` is committed.
    pub fn on_delta_installed(
        &mut self,
        now: Timestamp,
        liveness: &mut dyn Liveness,
        base: Position,
        configuration: Configuration,
    ) {
        self.now = now;
        configuration.validate().expect("the driver installs legal configurations");
        if base.index <= self.committed {
            return;
        }
        if base.term > self.hard_state.term {
            self.become_follower(liveness, base.term, None);
        }
        if self.is_leader() {
            // Elected, or outlived, while the delta was on its way; the install moves what is applied under it.
            self.become_follower(liveness, self.term(), None);
        }
        self.log.install(base, configuration);
        self.committed = base.index;
        self.announced = base.index;
        // Committed by whom is not known here, so the leader has to find the match itself.
        self.matched = LogIndex(0);
        if let Some(leader) = self.leader {
            let rejected = self.heard_of.max(base.index.next());
            self.reply_append(liveness, leader, AppendResult::Mismatch { rejected, hint: base });
        }
    }

    /// What is to be done since the last call, in order: one `Persist` at most, first.
    pub fn take_effects(&mut self) -> Vec<Effect<C>> {
        self.replicate();
        let rest = std::mem::take(&mut self.effects);
        match self.log.take_persist() {
            Some(persist) => std::iter::once(Effect::Persist(persist)).chain(rest).collect(),
            None => rest,
        }
    }

    /// Moves to `term`, to follow `leader` if it is known; steps down from whatever this was.
    pub(crate) fn become_follower(&mut self, liveness: &mut dyn Liveness, term: Term, leader: Option<ReplicaId>) {
        assert!(term >= self.hard_state.term, "terms never fall");
        if let State::Leader(leading) = std::mem::replace(&mut self.state, State::Follower) {
            let led = self.hard_state.term;
            self.lost_leadership(*leading, led);
            // It leads this term no more, whatever comes.
            self.leader_renounced = true;
        }
        if term > self.hard_state.term {
            self.stop_following(liveness);
            self.enter_term(term, None);
        }
        self.leader = leader;
        if let Some(leader) = leader {
            self.guard = Some(Guard { leader, until: None });
            self.leader_heard_at = self.now;
            self.election_at = None;
            self.election_tries = 0;
        } else {
            self.arm_election_again();
        }
    }

    /// Only together with `stop_following`.
    pub(crate) fn enter_term(&mut self, term: Term, vote: Option<ReplicaId>) {
        assert!(term > self.hard_state.term);
        self.leader = None;
        self.leader_renounced = false;
        self.matched = LogIndex(0);
        self.round_heard = 0;
        self.heard_of = LogIndex(0);
        self.retiring = None;
        self.save_hard_state(HardState { term, vote });
    }

    pub(crate) fn save_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
        self.hard_state_sequence = self.log.save_hard_state(hard_state);
    }

    /// Invariant 2: the leader followed so far learns of no promise made from here on.
    pub(crate) fn stop_following(&mut self, liveness: &mut dyn Liveness) {
        if let Some(guard) = &mut self.guard
            && guard.until.is_none()
        {
            guard.until = Some(liveness.promised_to(guard.leader));
            liveness.withdraw(guard.leader);
        }
    }

    /// Stands when what was promised so far is over, unless the leader is heard before.
    pub(crate) fn doubt_leader(&mut self, liveness: &mut dyn Liveness) {
        self.stop_following(liveness);
        let until = self.guard.and_then(|guard| guard.until).unwrap_or(self.now);
        self.arm_election(until);
    }

    pub(crate) fn send(&mut self, to: ReplicaId, body: MessageBody<C>) {
        self.send_in_term(to, self.hard_state.term, body);
    }

    /// Held back until the current term and vote are durable.
    pub(crate) fn send_in_term(&mut self, to: ReplicaId, term: Term, body: MessageBody<C>) {
        let after = (self.hard_state_sequence > self.log.persisted()).then_some(self.hard_state_sequence);
        self.effects.push(Effect::Send { to, message: Message { term, body }, after });
    }
}
