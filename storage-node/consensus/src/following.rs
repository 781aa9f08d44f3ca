//! A replica under a leader: taking entries, telling how far it is.
//!
//! An append is answered when its entries are flushed, several by one answer; at once where the leader waits for the
//! word itself: probes, rounds, and anything that brings nothing new. Only `matched`, what this leader's own appends
//! proved to be in its log, is ever told to it.

use holdfast_id::ReplicaId;

use crate::effect::Effect;
use crate::entry::{Body, Command, Entry, LogIndex, Position, Term};
use crate::liveness::{Liveness, SupportEpoch};
use crate::message::{AppendResult, MessageBody};
use crate::raft::{Raft, State};

/// One append as it came.
pub(crate) struct Offer<C> {
    pub(crate) previous: Position,
    pub(crate) commit: LogIndex,
    pub(crate) entries: Vec<Entry<C>>,
    pub(crate) round: u64,
}

impl<C: Command> Offer<C> {
    /// The last index it speaks of; `None` if the offer contradicts itself or `term`.
    fn checked_last(&self, term: Term) -> Option<LogIndex> {
        let mut last = self.previous;
        for entry in &self.entries {
            let follows = last.index.0.checked_add(1) == Some(entry.position.index.0);
            if !follows || entry.position.term < last.term {
                return None;
            }
            if let Body::Configuration(configuration) = &entry.body {
                configuration.validate().ok()?;
            }
            last = entry.position;
        }
        (last.term <= term && last.index.0 < u64::MAX).then_some(last.index)
    }
}

impl<C: Command> Raft<C> {
    pub(crate) fn on_append(&mut self, liveness: &mut dyn Liveness, from: ReplicaId, term: Term, offer: Offer<C>) {
        if term < self.term() {
            // Tells a leader of the past that it is one. It learns of no promise by this.
            let result = AppendResult::Mismatch { rejected: offer.previous.index, hint: self.log.last() };
            let support = SupportEpoch::default();
            self.send(from, MessageBody::AppendReply { result, flushed: LogIndex(0), round: 0, support });
            return;
        }
        let rival = term == self.term() && self.leader.is_some_and(|leader| leader != from);
        let Some(offered_last) = offer.checked_last(term).filter(|_| !rival) else {
            return;
        };
        // A leader that renounced is not trusted to wake this replica again, late appends of it or not.
        if term > self.term() || !self.leader_renounced {
            self.become_follower(liveness, term, Some(from));
        }
        self.heard_of = self.heard_of.max(offered_last);
        let asked = offer.round > self.round_heard || offer.entries.is_empty();
        self.round_heard = self.round_heard.max(offer.round);
        let commit = offer.commit;
        match self.take_offer(offer, offered_last) {
            Taken::Not => {}
            Taken::Refused(result) => self.reply_append(liveness, from, result),
            Taken::Known => {
                self.on_commit_heard(commit);
                self.reply_append(liveness, from, AppendResult::Submitted(self.matched));
            }
            Taken::New => {
                self.on_commit_heard(commit);
                if asked {
                    self.reply_append(liveness, from, AppendResult::Submitted(self.matched));
                }
            }
        }
    }

    /// More is durable than before.
    pub(crate) fn on_flushed(&mut self, liveness: &mut dyn Liveness) {
        self.announce();
        if let Some(leader) = self.leader
            && self.matched > LogIndex(0)
        {
            self.reply_append(liveness, leader, AppendResult::Submitted(self.matched));
        }
    }

    /// Nothing is told to a leader that is not followed any more: the reply carries an epoch, and an epoch is a promise.
    pub(crate) fn reply_append(&mut self, liveness: &mut dyn Liveness, to: ReplicaId, result: AppendResult) {
        if !self.guard.is_some_and(|guard| guard.leader == to && guard.until.is_none()) {
            return;
        }
        let flushed = self.log.flushed().min(self.matched);
        let support = liveness.epoch_for(to);
        self.send(to, MessageBody::AppendReply { result, flushed, round: self.round_heard, support });
    }

    /// Tells what is committed and durable here, and draws the consequences.
    pub(crate) fn announce(&mut self) {
        let index = self.committed.min(self.log.flushed());
        if index > self.announced {
            self.announced = index;
            self.effects.push(Effect::Committed(index));
        }
        if !self.is_leader() {
            self.maybe_heal();
            self.maybe_leaderless();
        }
    }

    fn take_offer(&mut self, mut offer: Offer<C>, offered_last: LogIndex) -> Taken {
        let base = self.log.base();
        if offer.previous.index < base.index {
            // What lies below the base is committed; the offer meets this log at the base or not at all.
            let skipped = usize::try_from(base.index.0 - offer.previous.index.0).unwrap_or(usize::MAX);
            match offer.entries.get(skipped - 1) {
                Some(entry) if entry.position == base => offer.entries.drain(..skipped),
                _ => {
                    let rejected = offer.previous.index;
                    return Taken::Refused(AppendResult::Mismatch { rejected, hint: base });
                }
            };
            offer.previous = base;
        }
        if self.log.term_at(offer.previous.index) != Some(offer.previous.term) {
            let hint = self.log.last_at_or_before(offer.previous.index, offer.previous.term).unwrap_or(base);
            return Taken::Refused(AppendResult::Mismatch { rejected: offer.previous.index, hint });
        }
        let known = offer
            .entries
            .iter()
            .take_while(|entry| self.log.term_at(entry.position.index) == Some(entry.position.term))
            .count();
        let fresh = offer.entries.split_off(known);
        let Some(first) = fresh.first() else {
            self.matched = self.matched.max(offered_last);
            return Taken::Known;
        };
        if let Some(of) = self.full {
            return Taken::Refused(AppendResult::Full { last: self.log.last().index, of });
        }
        let first = first.position.index;
        if first <= self.committed.max(self.matched) {
            // No leader contradicts what is committed, or itself.
            return Taken::Not;
        }
        self.log.truncate_from(first);
        for entry in fresh {
            self.log.append(entry);
        }
        self.matched = self.matched.max(offered_last);
        Taken::New
    }

    fn on_commit_heard(&mut self, commit: LogIndex) {
        self.committed = self.committed.max(commit.min(self.matched));
        self.announce();
    }

    /// A damaged replica counts as whole again when it has, durably, all that its leader was heard of to have, up to
    /// something committed in the leader's own term.
    fn maybe_heal(&mut self) {
        let caught_up = self.log.flushed().min(self.matched) >= self.heard_of;
        if !self.may_vote && self.leader.is_some() && caught_up && self.log.term_at(self.announced) == Some(self.term())
        {
            self.may_vote = true;
        }
    }

    /// A leader steps down when a configuration that it appended commits and gives it no vote; having heard of that
    /// commit from it, this replica knows that it did. A configuration of an older term proves nothing: a later one
    /// that is not here yet may have brought this leader in.
    fn maybe_leaderless(&mut self) {
        let configuration = self.log.configuration();
        let index = self.log.configuration_index();
        let own_term = self.log.term_at(index) == Some(self.term());
        let decided = own_term && !configuration.is_joint() && index <= self.committed;
        let gone = self.leader.is_some_and(|leader| !configuration.is_voter(leader));
        if decided && gone && !self.leader_renounced {
            self.leader_renounced = true;
            self.guard = None;
            if matches!(self.state, State::Follower) {
                self.arm_election(self.now);
            }
        }
    }
}

enum Taken {
    /// Not answerable: it contradicts what a leader may say.
    Not,
    Refused(AppendResult),
    /// Nothing new in it, but a match.
    Known,
    New,
}
