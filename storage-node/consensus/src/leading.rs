//! A replica that leads: replication, commit, lease, reads, transfer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use holdfast_id::ReplicaId;
use holdfast_planted::Bug;

use crate::configuration::ConfigurationError;
use crate::effect::Effect;
use crate::entry::{Body, Command, Configuration, LogIndex, Term};
use crate::liveness::{Liveness, SupportEpoch};
use crate::log::entry_bytes;
use crate::message::{AppendResult, MessageBody, Shortage};
use crate::pace::{FAR_BYTES_MAX, LAG_BYTES_MAX, Pace};
use crate::progress::{Progress, ProgressState};
use crate::raft::{Raft, Retiring, State};
use crate::refusal::Refusal;
use crate::time::Timestamp;

/// A commit is told to idle followers after this wait, so that under load the next append tells it.
const COMMIT_NOTICE_DELAY: Duration = Duration::from_millis(2);
/// Proposals beyond this many bytes not yet committed are refused.
const UNCOMMITTED_BYTES_MAX: usize = 64 << 20;
/// Reads that wait for a round; more are refused.
const READS_PENDING_MAX: usize = 4096;
/// Leases that a leader goes on trying to reach a quorum before it steps down.
const QUORUM_PATIENCE_LEASES: u32 = 4;
/// Leases that a transfer may take.
const TRANSFER_LEASES: u32 = 2;
/// An answer that is due is asked for again after half a lease, then less and less often up to this many half leases.
const RESEND_BACKOFF_MAX: u32 = 8;

#[derive(Debug)]
pub(crate) struct Leading {
    /// The first entry of this term.
    pub(crate) first: LogIndex,
    pub(crate) serving: bool,
    /// Every other member.
    pub(crate) peers: BTreeMap<ReplicaId, Progress>,
    /// The newest round sent; appends of a round are sent after everything that asked for it.
    round: u64,
    round_wanted: bool,
    reads: VecDeque<PendingRead>,
    transfer: Option<Transfer>,
    /// The lease was given up for this term: somebody may be elected without waiting for it.
    renounced: bool,
    /// As of the last look.
    pub(crate) lease_until: Option<Timestamp>,
    /// Steps down here unless it holds a lease by then.
    check_quorum_at: Option<Timestamp>,
    notice_at: Option<Timestamp>,
    uncommitted_bytes: usize,
    pace: Pace,
}

#[derive(Debug)]
struct PendingRead {
    token: u64,
    index: LogIndex,
    round: u64,
}

#[derive(Debug)]
struct Transfer {
    to: ReplicaId,
    until: Timestamp,
    told: bool,
}

impl Leading {
    pub(crate) fn new(first: LogIndex, uncommitted_bytes: usize, check_quorum_at: Timestamp) -> Leading {
        Leading {
            first,
            serving: false,
            peers: BTreeMap::new(),
            round: 0,
            round_wanted: false,
            reads: VecDeque::new(),
            transfer: None,
            renounced: false,
            lease_until: None,
            check_quorum_at: Some(check_quorum_at),
            notice_at: None,
            uncommitted_bytes,
            pace: Pace::default(),
        }
    }

    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        let transfer = self.transfer.as_ref().map(|transfer| transfer.until);
        let own = [self.check_quorum_at, self.notice_at, transfer, self.pace.deadline()].into_iter().flatten();
        own.chain(self.peers.values().filter_map(|progress| progress.resend_at)).min()
    }
}

impl<C: Command> Raft<C> {
    /// Appends a command. The index is the entry's if this replica goes on to lead until it is committed.
    pub fn propose(&mut self, now: Timestamp, liveness: &mut dyn Liveness, command: C) -> Result<LogIndex, Refusal> {
        self.now = now;
        self.must_lead(liveness)?;
        if let State::Leader(leading) = &mut self.state
            && !leading.pace.admits(now)
        {
            return Err(Refusal::Busy);
        }
        let index = self.append(Body::Command(command));
        let bytes = self.log.entry(index).map_or(0, entry_bytes);
        if let State::Leader(leading) = &mut self.state {
            leading.uncommitted_bytes += bytes;
            leading.pace.on_taken(now, bytes);
        }
        Ok(index)
    }

    /// A peer that is brought up beside the log goes on and would not catch up without help: commands are taken in at
    /// half the rate of these bytes, or hardly at all where there are none.
    pub fn pace(&mut self, now: Timestamp, bytes: usize) {
        if let State::Leader(leading) = &mut self.state {
            leading.pace.on_progress(now, bytes);
        }
    }

    /// Starts a joint change to `new`, whose `outgoing` must be empty; the change is finished by the leader itself.
    pub fn propose_configuration(
        &mut self,
        now: Timestamp,
        liveness: &mut dyn Liveness,
        new: Configuration,
    ) -> Result<LogIndex, Refusal> {
        self.now = now;
        self.must_lead(liveness)?;
        new.validate()?;
        let current = self.configuration();
        if new.is_joint() {
            return Err(ConfigurationError::Joint.into());
        }
        let State::Leader(leading) = &self.state else { unreachable!("leads") };
        let pending = self.log.configuration_index() > self.committed || current.is_joint();
        if pending || self.committed < leading.first {
            return Err(Refusal::ConfigurationPending);
        }
        if new == *current {
            return Err(ConfigurationError::Unchanged.into());
        }
        let joint = Configuration { outgoing: current.members.clone(), ..new };
        let index = self.append(Body::Configuration(joint));
        self.update_peers();
        Ok(index)
    }

    /// Asks for an index that covers every write acknowledged before: `ReadReady` at once under a lease, else after a
    /// round in which a quorum confirmed this leader.
    pub fn read_index(&mut self, now: Timestamp, liveness: &mut dyn Liveness, token: u64) -> Result<(), Refusal> {
        self.now = now;
        if !self.is_leader() {
            return Err(Refusal::NotLeader { leader: self.leader });
        }
        let lease = self.lease_holds(liveness) || holdfast_planted::is(Bug::LeaseNotChecked);
        let committed = self.committed;
        if !lease {
            self.seek_quorum();
        }
        let State::Leader(leading) = &mut self.state else { unreachable!("leads") };
        // Everything older than this term is below its first entry, committed or not.
        let index = committed.max(leading.first);
        if lease {
            self.effects.push(Effect::ReadReady { token, index });
            return Ok(());
        }
        if leading.reads.len() >= READS_PENDING_MAX {
            return Err(Refusal::Busy);
        }
        leading.reads.push_back(PendingRead { token, index, round: leading.round + 1 });
        self.complete_reads();
        Ok(())
    }

    /// Hands leadership to `to` once it has every entry. Proposals are refused until that happened, or failed: then
    /// this leader stands again, for its old lease is gone for good.
    pub fn transfer(&mut self, now: Timestamp, liveness: &mut dyn Liveness, to: ReplicaId) -> Result<(), Refusal> {
        self.now = now;
        let _ = liveness;
        let fit = self.configuration().is_voter(to);
        let until = now + self.options.lease * TRANSFER_LEASES;
        let leader = self.leader;
        let State::Leader(leading) = &mut self.state else {
            return Err(Refusal::NotLeader { leader });
        };
        if leading.transfer.is_some() {
            return Err(Refusal::Transferring);
        }
        let near = leading
            .peers
            .get(&to)
            .is_some_and(|progress| progress.reachable && progress.state == ProgressState::Replicate);
        if !fit || !near {
            return Err(Refusal::UnfitTarget);
        }
        leading.transfer = Some(Transfer { to, until, told: false });
        self.maybe_tell_successor();
        Ok(())
    }

    pub(crate) fn on_append_reply(
        &mut self,
        liveness: &mut dyn Liveness,
        from: ReplicaId,
        result: AppendResult,
        flushed: LogIndex,
        round: u64,
        support: SupportEpoch,
    ) {
        let last = self.log.last().index;
        let (log, now) = (&self.log, self.now);
        let (first, most) = resend_waits(self.options.lease);
        let State::Leader(leading) = &mut self.state else { return };
        let leading_round = leading.round;
        let Some(progress) = leading.peers.get_mut(&from) else { return };
        let nonsense = matches!(result, AppendResult::Submitted(index) if index > last || flushed > index);
        let older_life = progress.epoch.is_some_and(|epoch| support.boot < epoch.boot);
        if nonsense || older_life || flushed > last || round > leading_round {
            return;
        }
        if progress.epoch.is_some_and(|epoch| support.boot > epoch.boot) {
            progress.restart();
        }
        let mut caught_up = false;
        progress.epoch = progress.epoch.max(Some(support));
        progress.round_acknowledged = progress.round_acknowledged.max(round);
        progress.reachable = true;
        match result {
            AppendResult::Submitted(index) => {
                progress.full = false;
                let before = progress.flushed;
                progress.on_submitted(index, flushed);
                // One that keeps up has been sent everything.
                if progress.next > last {
                    caught_up = std::mem::take(&mut progress.lags);
                } else if progress.flushed > before && log.bytes_reach(progress.next, LAG_BYTES_MAX) {
                    progress.lags = true;
                    let far = log.bytes_reach(progress.next, FAR_BYTES_MAX);
                    leading.pace.on_lagging(now, if far { 0 } else { log.bytes_between(before, progress.flushed) });
                }
            }
            AppendResult::Mismatch { rejected, hint } => {
                // A hint above says that the peer's base is there: its log begins later than it was asked for.
                let stale = (rejected <= progress.flushed && hint.index <= rejected)
                    || (progress.state == ProgressState::Probe && rejected.next() != progress.next);
                match log.last_at_or_before(hint.index, hint.term) {
                    _ if stale => {}
                    Some(meeting) => progress.on_mismatch(meeting.index, now, first, most),
                    None => progress.on_hint_below_base(hint.index, log.base().index),
                }
            }
            AppendResult::Full { last, of } => {
                progress.full = of == Shortage::Data;
                progress.probe(last.min(log.last().index).next());
                progress.retry_later(now, first, most);
            }
        }
        progress.rearm(false, now, first, most);
        if caught_up && !leading.peers.values().any(|progress| progress.lags) {
            leading.pace.on_caught_up();
        }
        self.advance_commit(liveness);
        self.complete_reads();
        self.maybe_tell_successor();
    }

    pub(crate) fn on_leader_deadline(&mut self, liveness: &mut dyn Liveness) {
        let now = self.now;
        let lease = self.lease_holds(liveness);
        let State::Leader(leading) = &mut self.state else { return };
        for progress in leading.peers.values_mut() {
            if progress.resend_at.is_some_and(|at| at <= now) {
                progress.on_silence();
            }
        }
        let check = leading.check_quorum_at.is_some_and(|at| at <= now);
        if check {
            leading.check_quorum_at = None;
        }
        leading.pace.on_deadline(now);
        let transfer = leading.transfer.as_ref().filter(|transfer| transfer.until <= now).map(|transfer| transfer.told);
        match transfer {
            Some(true) => {
                // The target may still be elected with the lease renounced, so this term can have no lease again;
                // the next one can, and only one of the two gets it.
                self.become_follower(liveness, self.term(), None);
                self.on_election_deadline(liveness);
            }
            Some(false) => leading.transfer = None,
            None if check && !lease => self.become_follower(liveness, self.term(), None),
            None => {}
        }
    }

    pub(crate) fn on_follower_suspected(&mut self, peer: ReplicaId) {
        let State::Leader(leading) = &mut self.state else { return };
        if let Some(progress) = leading.peers.get_mut(&peer) {
            progress.probe(progress.submitted.next());
            progress.reachable = false;
            self.await_quorum();
        }
    }

    pub(crate) fn on_follower_connected(&mut self, peer: ReplicaId) {
        let State::Leader(leading) = &mut self.state else { return };
        if let Some(progress) = leading.peers.get_mut(&peer) {
            progress.reachable = true;
            progress.delta_raised = false;
            progress.on_heard();
            progress.probe(progress.submitted.next());
        }
    }

    /// An append to one that seems not to hear this leader.
    pub(crate) fn remind(&mut self, peer: ReplicaId) {
        let State::Leader(leading) = &mut self.state else { return };
        if let Some(progress) = leading.peers.get_mut(&peer)
            && (progress.resend_at.is_none() || !progress.reachable)
        {
            progress.reachable = true;
            progress.probe(progress.submitted.next());
        }
    }

    /// Whether nobody else can have been elected by now.
    pub(crate) fn lease_holds(&mut self, liveness: &dyn Liveness) -> bool {
        let own = self.options.id;
        let State::Leader(leading) = &mut self.state else { return false };
        let until = self.log.configuration().agreed(|voter| {
            if voter == own {
                return Timestamp(u64::MAX);
            }
            let told = leading.peers.get(&voter).and_then(|progress| progress.epoch);
            match liveness.supported_by(voter) {
                Some((epoch, until)) if told == Some(epoch) => until,
                _ => Timestamp::ZERO,
            }
        });
        leading.lease_until = (!leading.renounced && until > self.now).then_some(until);
        leading.lease_until.is_some()
    }

    pub(crate) fn quorum_patience(&self) -> Duration {
        self.options.lease * QUORUM_PATIENCE_LEASES
    }

    /// After a configuration was appended: follow whoever is in it.
    pub(crate) fn update_peers(&mut self) {
        let others = self.others(|_, _| true);
        let next = self.log.last().index.next();
        let State::Leader(leading) = &mut self.state else { return };
        leading.peers.retain(|replica, _| others.contains(replica));
        for replica in others {
            leading.peers.entry(replica).or_insert_with(|| Progress::new(next));
        }
    }

    /// The other replicas in the configuration in force that pass `select`, each once.
    pub(crate) fn others(&self, select: impl Fn(&Configuration, ReplicaId) -> bool) -> Vec<ReplicaId> {
        let configuration = self.log.configuration();
        let mut others: Vec<ReplicaId> = configuration
            .replicas()
            .filter(|replica| *replica != self.options.id && select(configuration, *replica))
            .collect();
        others.sort_unstable();
        others.dedup();
        others
    }

    pub(crate) fn advance_commit(&mut self, liveness: &mut dyn Liveness) {
        let own = self.options.id;
        let State::Leader(leading) = &mut self.state else { return };
        let flushed = |voter: ReplicaId| {
            if voter == own {
                self.log.flushed()
            } else {
                let progress = leading.peers.get(&voter);
                let submitted = holdfast_planted::is(Bug::SubmittedCountsAsFlushed);
                progress.map_or(LogIndex(0), |progress| if submitted { progress.submitted } else { progress.flushed })
            }
        };
        let configuration = self.log.configuration();
        let mut index = configuration.agreed(flushed).min(configuration.copied(flushed));
        if holdfast_planted::is(Bug::CommittedAlone) {
            index = flushed(own);
        }
        // Raft section 5.4.2: entries of older terms commit only under one of this term.
        if index > self.committed && index >= leading.first {
            let newly = self.log.bytes_between(self.committed, index);
            leading.uncommitted_bytes = leading.uncommitted_bytes.saturating_sub(newly);
            self.committed = index;
            leading.notice_at = leading.notice_at.or(Some(self.now + COMMIT_NOTICE_DELAY));
        }
        self.announce();
        self.after_commit(liveness);
    }

    fn after_commit(&mut self, liveness: &mut dyn Liveness) {
        let (term, announced) = (self.term(), self.announced);
        let State::Leader(leading) = &mut self.state else { return };
        if !leading.serving && announced >= leading.first {
            leading.serving = true;
            self.effects.push(Effect::Serving(term));
        }
        if self.committed < leading.first || self.log.configuration_index() > self.committed {
            return;
        }
        let configuration = self.log.configuration();
        if configuration.is_joint() {
            let decided = Configuration { outgoing: Vec::new(), ..configuration.clone() };
            self.append(Body::Configuration(decided));
            self.update_peers();
        } else if !configuration.is_voter(self.options.id) {
            self.retire(liveness);
        }
    }

    /// Stops leading without a chance to stand again, and asks others to.
    pub(crate) fn retire(&mut self, liveness: &mut dyn Liveness) {
        if let State::Leader(leading) = &mut self.state {
            leading.notice_at = Some(self.now);
        }
        self.replicate();
        let State::Leader(leading) = &self.state else { return };
        let mut successors: Vec<(LogIndex, ReplicaId)> = leading
            .peers
            .iter()
            .filter(|(replica, _)| self.log.configuration().is_voter(**replica))
            .map(|(replica, progress)| (progress.submitted, *replica))
            .collect();
        successors.sort_by(|a, b| b.cmp(a));
        self.become_follower(liveness, self.term(), None);
        if !successors.is_empty() {
            let successors = successors.into_iter().map(|(_, replica)| replica).collect();
            self.retiring = Some(Retiring { successors, asked: 0, next_at: self.now });
            self.ask_successor();
        }
    }

    pub(crate) fn ask_successor(&mut self) {
        let (first, most) = resend_waits(self.options.lease);
        let Some(retiring) = &mut self.retiring else { return };
        let to = retiring.successors[retiring.asked % retiring.successors.len()];
        let wait = first.saturating_mul(1 << retiring.asked.min(8)).min(most);
        retiring.asked += 1;
        retiring.next_at = self.now + wait;
        self.send(to, MessageBody::TransferNow);
    }

    /// Tells what ended with leadership of `term`.
    pub(crate) fn lost_leadership(&mut self, leading: Leading, term: Term) {
        self.effects.push(Effect::LostLeadership(term));
        for read in leading.reads {
            self.effects.push(Effect::ReadFailed { token: read.token });
        }
    }

    /// Fills every peer's window and sends what else is due.
    pub(crate) fn replicate(&mut self) {
        let State::Leader(leading) = &mut self.state else { return };
        let (first, most) = resend_waits(self.options.lease);
        let notice = leading.notice_at.is_some_and(|at| at <= self.now);
        if notice {
            leading.notice_at = None;
        }
        if std::mem::take(&mut leading.round_wanted) {
            leading.round += 1;
            leading.peers.values_mut().for_each(|progress| progress.round_due = leading.round);
        }
        let mut out = Vec::new();
        for (peer, progress) in &mut leading.peers {
            if !progress.reachable {
                progress.resend_at = None;
                continue;
            }
            if LogIndex(progress.next.0 - 1) < self.log.base().index {
                progress.lags_behind_base(self.log.base().index);
            }
            if progress.state == ProgressState::NeedsDelta && !std::mem::replace(&mut progress.delta_raised, true) {
                self.effects.push(Effect::NeedsDelta { peer: *peer });
            }
            let mut sent = false;
            if progress.state == ProgressState::Replicate {
                while progress.next <= self.log.last().index && progress.window_open(self.options.inflight_bytes_max) {
                    let previous = LogIndex(progress.next.0 - 1);
                    let (entries, bytes) = self.log.slice(progress.next, self.options.append_bytes_max);
                    progress.on_sent(LogIndex(previous.0 + entries.len() as u64), bytes);
                    out.push((*peer, previous, entries, progress.round_due));
                    sent = true;
                }
            }
            let probe = progress.state != ProgressState::Replicate && progress.resend_at.is_none();
            let tell = notice && progress.commit_sent < self.committed;
            let ask = progress.round_due > progress.round_sent;
            if !sent && (probe || tell || ask) {
                if !ask {
                    leading.round += 1;
                    progress.round_due = leading.round;
                }
                // At the match where it is known: an append that overtakes others must not look like a gap.
                let known = progress.state == ProgressState::Replicate && progress.submitted >= self.log.base().index;
                let previous = if known { progress.submitted } else { LogIndex(progress.next.0 - 1) };
                out.push((*peer, previous, Vec::new(), progress.round_due));
                sent = true;
            }
            if sent {
                progress.commit_sent = self.committed;
                progress.round_sent = progress.round_due;
            }
            progress.rearm(sent, self.now, first, most);
        }
        if leading.peers.values().all(|p| !p.reachable || p.commit_sent >= self.committed) {
            leading.notice_at = None;
        }
        for (peer, previous, entries, round) in out {
            let previous = self.log.position_at(previous).expect("replication starts within the log");
            let commit = self.committed;
            self.send(peer, MessageBody::Append { previous, commit, entries, round });
        }
    }

    fn complete_reads(&mut self) {
        let own = self.options.id;
        let State::Leader(leading) = &mut self.state else { return };
        let confirmed = self.log.configuration().agreed(|voter| {
            if voter == own {
                return u64::MAX;
            }
            leading.peers.get(&voter).map_or(0, |progress| progress.round_acknowledged)
        });
        while leading.reads.front().is_some_and(|read| read.round <= confirmed) {
            let PendingRead { token, index, .. } = leading.reads.pop_front().expect("looked at");
            self.effects.push(Effect::ReadReady { token, index });
        }
    }

    fn maybe_tell_successor(&mut self) {
        let last = self.log.last().index;
        let State::Leader(leading) = &mut self.state else { return };
        let Some(transfer) = &mut leading.transfer else { return };
        let to = transfer.to;
        match leading.peers.get(&to) {
            None => leading.transfer = None,
            Some(progress) if !transfer.told && progress.submitted == last => {
                transfer.told = true;
                leading.renounced = true;
                leading.lease_until = None;
                self.send(to, MessageBody::TransferNow);
            }
            Some(_) => {}
        }
    }

    fn must_lead(&mut self, liveness: &mut dyn Liveness) -> Result<(), Refusal> {
        let leader = self.leader;
        let State::Leader(leading) = &self.state else {
            return Err(Refusal::NotLeader { leader });
        };
        if leading.transfer.is_some() {
            return Err(Refusal::Transferring);
        }
        if leading.uncommitted_bytes >= UNCOMMITTED_BYTES_MAX {
            return Err(Refusal::Busy);
        }
        if !self.lease_holds(liveness) {
            self.seek_quorum();
            return Err(Refusal::NoLease);
        }
        Ok(())
    }

    /// A round renews the epochs that the lease stands on, and confirms reads.
    fn seek_quorum(&mut self) {
        self.await_quorum();
        if let State::Leader(leading) = &mut self.state {
            leading.round_wanted = true;
        }
    }

    fn await_quorum(&mut self) {
        let at = self.now + self.quorum_patience();
        if let State::Leader(leading) = &mut self.state {
            leading.check_quorum_at = leading.check_quorum_at.or(Some(at));
        }
    }
}

/// The first and the longest wait for an answer.
fn resend_waits(lease: Duration) -> (Duration, Duration) {
    (lease / 2, lease / 2 * RESEND_BACKOFF_MAX)
}
