//! Rebuilds as a [`Replica`] carries them out: as leader for its peers, and of itself.
//!
//! Of itself: from an accepted offer to its end nothing is applied; what was applied goes into a checkpoint first, and
//! that is the base. Once a slot of another replica is in, there is no way back but an install: over restarts, leaders
//! and aborted rebuilds the replica votes by its log, takes no new entries, does not stand, and asks whoever leads for
//! a rebuild. The end is one durable header of the store; only then state machine, log and configuration move.
//!
//! For peers: a checkpoint is made, frozen and offered, and the log above it kept. All of it ends with the leadership.
//!
//! A group's snapshots come first, the oldest before the next, each as a rebuild of its own: its map and the state it
//! was taken with are offered like a checkpoint's, and whoever takes that state keeps the map as a snapshot, because the
//! state says that there is one at its index. Who has applied its entry answers that nothing is to be done. At the end of
//! the last rebuild the store holds its snapshots against those that the state names: a replica without one of them does
//! not become whole.
//!
//! Beside that, every replica tells the leader where its checkpoint is, and the leader tells all how far all are: up to
//! there nobody's rebuild begins, and tombstones may go. A word that is lost is made up for by the next checkpoint's.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::{LogIndex, Position, ProgressState, Shortage, Timestamp};
use holdfast_id::ReplicaId;
use holdfast_planted::Bug;
use holdfast_store::chunk::{Changes, INDEX_MAX, Kept};
use holdfast_store::group::{GroupState, InstallError, InstalledSlot, ReadError, StoreError};

use crate::codec::{self, Snapshot};
use crate::rebuild::message::RebuildMessage;
use crate::rebuild::receiver::{GiveUp, Offer, Receiver, ReceiverAction};
use crate::rebuild::sender::{Sender, SenderAction};
use crate::rebuild::{HURRY, LOG_KEPT_FOR, RETRY_AFTER, RebuildId, RebuildPhase, RebuildProgress, SILENCE_MAX};
use crate::replica::{Context, Output, Replica, StateMachine};

/// The longest hurry is [`HURRY`] doubled so often.
const HURRIES_MAX: u32 = 4;

/// What a rebuild asks of the store; the shard gives it a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// `None`: of the last checkpoint.
    Changes {
        kept: Option<Kept>,
        above: u64,
        from_slot: u64,
    },
    Slot {
        kept: Kept,
        slot: u64,
    },
}

/// What the store answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Changes(Result<Changes, ReadError>),
    Slot(Result<Bytes, ReadError>),
}

/// What this replica went through, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebuildCounters {
    pub installed: u64,
    /// Those of them that brought a snapshot.
    pub snapshots: u64,
    pub given_up: u64,
    /// The map was not the sender's at the end: slots had to be compared from the beginning.
    pub hash_mismatches: u64,
}

/// A peer that needs a rebuild, and how far it is.
#[derive(Debug)]
enum Served {
    /// `asked`: by itself, so that it is not for the log to say whether it needs one.
    Waiting {
        at: Timestamp,
        asked: bool,
    },
    /// Has its permit, and every snapshot up to an index; the next checkpoint is for it.
    Preparing {
        above: u64,
    },
    Sending(Box<Sender>),
    Sent {
        index: LogIndex,
        until: Timestamp,
        /// Until it follows the log: when to see whether it does.
        look_at: Option<Timestamp>,
        progress: RebuildProgress,
    },
}

/// Rebuilds of one peer in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Streak {
    rebuilds: u32,
    /// The last came to nothing: so may the next, and nobody is held back for it.
    failed: bool,
}

impl Streak {
    /// Whether clients make way for a rebuild that lasts so long already.
    fn is_hurried_after(self, lasts: Duration) -> bool {
        !self.failed && lasts < HURRY * (1 << self.rebuilds.min(HURRIES_MAX))
    }
}

/// A state whose header is on its way to the disk.
struct Pending<S> {
    offer: Offer,
    snapshot: Snapshot,
    machine: S,
}

/// The rebuilds of one replica.
pub(super) struct Rebuilds<S> {
    served: BTreeMap<ReplicaId, Served>,
    /// Peers that had rebuilds and do not follow the log yet.
    streaks: BTreeMap<ReplicaId, Streak>,
    next_number: u64,
    next_request: u64,
    /// Questions to the store: for a peer, or for this replica's own rebuild.
    requests: BTreeMap<u64, Option<ReplicaId>>,
    /// Of the checkpoint under way, while a peer is being prepared.
    checkpoint: Option<(Position, Bytes)>,
    /// Accepted; begins when everything applied is in a checkpoint.
    accepted: Option<Offer>,
    receiver: Option<Receiver>,
    pending: Option<Box<Pending<S>>>,
    /// Slots of another replica are here, none above this index.
    installing_to: u64,
    uncommitted: bool,
    commit_running: bool,
    /// When the leader is asked for a rebuild, or what could not be begun is tried again.
    again_at: Option<Timestamp>,
    replies: Vec<(ReplicaId, RebuildMessage)>,
    /// Where the others' checkpoints are, at least.
    checkpoints: BTreeMap<ReplicaId, LogIndex>,
    forgotten_below: LogIndex,
    counters: RebuildCounters,
}

impl<S> Rebuilds<S> {
    /// `installing_to`: as found on the disk.
    pub fn new(installing_to: u64, now: Timestamp) -> Rebuilds<S> {
        Rebuilds {
            served: BTreeMap::new(),
            streaks: BTreeMap::new(),
            next_number: 0,
            next_request: 0,
            requests: BTreeMap::new(),
            checkpoint: None,
            accepted: None,
            receiver: None,
            pending: None,
            installing_to,
            uncommitted: false,
            commit_running: false,
            again_at: (installing_to > 0).then_some(now),
            replies: Vec::new(),
            checkpoints: BTreeMap::new(),
            forgotten_below: LogIndex(0),
            counters: RebuildCounters::default(),
        }
    }

    /// Whether the state here is, or is about to be, of no single index.
    pub fn installing(&self) -> bool {
        self.installing_to > 0 || self.accepted.is_some() || self.receiver.is_some() || self.pending.is_some()
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        let served = self.served.values().filter_map(|served| match served {
            Served::Waiting { at, .. } => Some(*at),
            Served::Sending(sender) => Some(sender.deadline()),
            Served::Sent { look_at, .. } => *look_at,
            Served::Preparing { .. } => None,
        });
        let receiver = self.receiver.as_ref().filter(|_| self.pending.is_none()).and_then(Receiver::deadline);
        served.chain(receiver).chain(self.again_at).min()
    }

    pub fn on_deadline(&mut self, now: Timestamp) {
        for served in self.served.values_mut() {
            if let Served::Sending(sender) = served {
                sender.on_deadline(now);
            }
        }
        if let Some(receiver) = self.receiver.as_mut().filter(|_| self.pending.is_none()) {
            receiver.on_deadline(now);
        }
    }

    /// The leader's log does not reach back to what the peer needs.
    pub fn on_needed(&mut self, peer: ReplicaId, now: Timestamp) {
        let served = self.served.entry(peer).or_insert(Served::Waiting { at: now, asked: false });
        if let Served::Sent { .. } = served {
            *served = Served::Waiting { at: now, asked: false };
        }
    }

    /// A checkpoint of this state was begun.
    pub fn note_checkpoint(&mut self, position: Position, state: Bytes) {
        let wanted = self.served.values().any(|served| matches!(served, Served::Preparing { .. }));
        self.checkpoint = wanted.then_some((position, state));
    }

    /// The log above it is to be kept for a rebuild.
    pub fn pinned(&self, now: Timestamp) -> Option<LogIndex> {
        let indices = self.served.values().filter_map(|served| match served {
            // Above a snapshot the log may be long gone, and the next rebuild begins there.
            Served::Sending(sender) if matches!(sender.kept, Kept::Frozen(_)) => Some(sender.position.index),
            Served::Sent { index, until, .. } if *until > now => Some(*index),
            _ => None,
        });
        indices.min()
    }

    fn request(&mut self, of: Option<ReplicaId>) -> u64 {
        self.next_request += 1;
        self.requests.insert(self.next_request, of);
        self.next_request
    }
}

impl<S: StateMachine> Replica<S> {
    /// How the rebuilds that this replica serves, or served last, go on.
    pub fn rebuilds(&self) -> Vec<(ReplicaId, RebuildProgress)> {
        let progress = |served: &Served| match served {
            Served::Waiting { .. } | Served::Preparing { .. } => RebuildProgress::default(),
            Served::Sending(sender) => sender.progress,
            Served::Sent { progress, .. } => *progress,
        };
        self.rebuilds.served.iter().map(|(peer, served)| (*peer, progress(served))).collect()
    }

    /// Whether this replica is being rebuilt itself: it applies nothing meanwhile.
    pub fn installing(&self) -> bool {
        self.rebuilds.installing()
    }

    pub fn rebuild_counters(&self) -> RebuildCounters {
        self.rebuilds.counters
    }

    pub fn on_rebuild_message(&mut self, context: &mut Context<'_>, from: ReplicaId, message: RebuildMessage) {
        if self.stopped {
            return;
        }
        match &message {
            RebuildMessage::Want => self.on_want(context, from),
            RebuildMessage::Checkpointed { index } => self.on_checkpointed(from, LogIndex(*index)),
            RebuildMessage::Forget { below } => self.on_forget(context, from, LogIndex(*below)),
            RebuildMessage::Offer { id, position, hash, state_bytes } => {
                let (id, position, hash, state_bytes) = (*id, *position, *hash, *state_bytes);
                self.on_offer(context, Offer { id, from, position, hash, state_bytes });
            }
            RebuildMessage::AskChanges { id, .. }
            | RebuildMessage::AskSlot { id, .. }
            | RebuildMessage::AskState { id, .. }
            | RebuildMessage::Done { id } => self.on_asked(context, from, *id, &message),
            RebuildMessage::Abort { id } => {
                self.on_asked(context, from, *id, &message);
                self.on_told(context, from, *id, message);
            }
            RebuildMessage::Changes { id, .. } | RebuildMessage::Slot { id, .. } | RebuildMessage::State { id, .. } => {
                self.on_told(context, from, *id, message)
            }
        }
    }

    /// The store's answer to a [`Fetch`].
    pub fn on_fetched(&mut self, context: &mut Context<'_>, request: u64, answer: Answer) {
        let Some(of) = self.rebuilds.requests.remove(&request) else { return };
        match (of, answer) {
            (None, Answer::Changes(result)) => {
                if let Some(receiver) = &mut self.rebuilds.receiver {
                    receiver.on_own(context.now, result);
                }
            }
            (Some(peer), answer) => {
                let Some(Served::Sending(sender)) = self.rebuilds.served.get_mut(&peer) else { return };
                match answer {
                    Answer::Changes(result) => sender.on_changes(request, result),
                    Answer::Slot(result) => sender.on_slot(request, result),
                }
            }
            (None, Answer::Slot(_)) => {}
        }
    }

    /// A peer that cannot apply asks for help. What is under way for it it knows nothing of.
    fn on_want(&mut self, context: &mut Context<'_>, from: ReplicaId) {
        if !self.raft.is_leader() || !self.configuration.replicas().any(|replica| replica == from) {
            return;
        }
        match self.rebuilds.served.get(&from) {
            Some(Served::Sending(sender)) if !sender.heard() => {}
            Some(Served::Waiting { asked: true, .. } | Served::Preparing { .. }) => {}
            _ => {
                self.stop_serving_rebuild(context, from);
                self.rebuilds.served.insert(from, Served::Waiting { at: context.now, asked: true });
            }
        }
    }

    fn on_asked(&mut self, context: &mut Context<'_>, from: ReplicaId, id: RebuildId, message: &RebuildMessage) {
        match self.rebuilds.served.get_mut(&from) {
            Some(Served::Sending(sender)) if sender.id() == id => {
                self.rebuilds.next_request += 1;
                sender.on_message(context.now, message, self.rebuilds.next_request);
            }
            _ if matches!(message, RebuildMessage::Done { .. } | RebuildMessage::Abort { .. }) => {}
            _ => self.rebuilds.replies.push((from, RebuildMessage::Abort { id })),
        }
    }

    fn on_told(&mut self, context: &mut Context<'_>, from: ReplicaId, id: RebuildId, message: RebuildMessage) {
        let receiver = self.rebuilds.receiver.as_mut().filter(|_| self.rebuilds.pending.is_none());
        if let Some(receiver) = receiver.filter(|receiver| receiver.offer.id == id && receiver.offer.from == from) {
            receiver.on_message(context.now, message);
        }
    }

    fn on_offer(&mut self, context: &mut Context<'_>, offer: Offer) {
        let led = self.raft.leader() == Some(offer.from) && self.raft.term() == offer.id.term && !self.raft.is_leader();
        let sane = offer.position.index.0 < INDEX_MAX && offer.state_bytes > 0;
        let rebuilds = &mut self.rebuilds;
        let known = rebuilds.receiver.as_ref().map(|receiver| receiver.offer).or(rebuilds.accepted);
        if !led || !sane || rebuilds.pending.is_some() || known.is_some_and(|known| known.id == offer.id) {
            return; // Offered again until it is answered.
        }
        if !rebuilds.installing() && offer.position.index <= self.applied.index {
            // The log was enough after all, or the word that this is installed was lost.
            return rebuilds.replies.push((offer.from, RebuildMessage::Done { id: offer.id }));
        }
        let index = offer.position.index;
        if index < self.checkpointed || index == self.checkpointed && self.machine.snapshots().contains(&index.0) {
            // The base here comes of this snapshot or of a later state. Another offer follows.
            return rebuilds.replies.push((offer.from, RebuildMessage::Done { id: offer.id }));
        }
        rebuilds.receiver = None;
        rebuilds.accepted = Some(offer);
        rebuilds.again_at = None;
        self.raft.set_installing(context.now, true);
        self.raft.set_full(Some(Shortage::Passing));
    }

    /// Whether the checkpoint that is done belongs to a rebuild of this replica.
    pub(super) fn on_install_done(&mut self, context: &mut Context<'_>, index: u64) -> bool {
        if std::mem::take(&mut self.rebuilds.commit_running) {
            if let Some(receiver) = &mut self.rebuilds.receiver {
                receiver.on_committed(context.now);
            }
            return true;
        }
        let Some(pending) = self.rebuilds.pending.take() else { return false };
        assert_eq!(index, pending.offer.position.index.0, "the header that ended the install");
        self.on_installed(context, *pending);
        true
    }

    /// The state of another replica is durable here: everything in memory follows.
    fn on_installed(&mut self, context: &mut Context<'_>, pending: Pending<S>) {
        let Pending { offer, snapshot, machine } = pending;
        let position = offer.position;
        let follows = self.raft.position_at(position.index) == Some(position);
        if !holdfast_planted::is(Bug::StateLeftOutOfDelta) {
            self.machine = machine;
        }
        self.configuration = snapshot.configuration.clone();
        self.applied = position;
        self.checkpointed = position.index;
        self.applied_bytes = 0;
        self.apply_to = if follows { self.apply_to.max(position.index) } else { position.index };
        let rebuilds = &mut self.rebuilds;
        rebuilds.receiver = None;
        rebuilds.installing_to = 0;
        rebuilds.again_at = None;
        rebuilds.counters.installed += 1;
        rebuilds.counters.snapshots += u64::from(self.machine.snapshots().contains(&position.index.0));
        rebuilds.replies.push((offer.from, RebuildMessage::Done { id: offer.id }));
        self.restart_log = !follows;
        for append in &mut self.refused {
            // They were to continue a log that is no more, or lie below what is installed.
            append.records.retain(|record| follows && record.index > position.index.0);
            append.truncate_from = append.truncate_from.filter(|from| follows && *from > position.index.0);
        }
        self.raft.set_full((!self.refused.is_empty()).then_some(Shortage::Passing));
        self.raft.set_installing(context.now, false);
        let configuration = snapshot.configuration;
        self.call(context, |raft, now, view| raft.on_delta_installed(now, view, position, configuration));
        context.store.release(self.group, position.index.0);
        self.tell_checkpoint(context);
    }

    /// The checkpoint that peers were prepared for is done: its map is frozen for each, and offered.
    pub(super) fn freeze_for_rebuilds(&mut self, context: &mut Context<'_>) {
        let Some((position, state)) = self.rebuilds.checkpoint.take() else { return };
        let term = self.raft.term();
        for peer in self.rebuilds.peers(|served| matches!(served, Served::Preparing { .. })) {
            let again = Served::Waiting { at: context.now + RETRY_AFTER, asked: true };
            let above = match self.rebuilds.served.get(&peer) {
                Some(Served::Preparing { above }) => *above,
                _ => 0,
            };
            // Taken since: the state names it, so it comes first.
            if context.store.snapshots(self.group).iter().any(|snapshot| snapshot.index > above) {
                let next = self.serve_next_map(context, peer, above);
                self.rebuilds.served.insert(peer, next);
                continue;
            }
            let next = match context.store.freeze(self.group) {
                Ok(frozen) => match frozen.hash {
                    Some(hash) => {
                        assert_eq!(frozen.index, position.index.0, "the last checkpoint is frozen");
                        self.rebuilds.next_number += 1;
                        let id = RebuildId { term, number: self.rebuilds.next_number };
                        let state = state.clone();
                        let kept = Kept::Frozen(frozen.id);
                        Served::Sending(Box::new(Sender::new(id, kept, position, hash, state, context.now)))
                    }
                    None => {
                        // Parts of the map are lost here: nobody could say that the copy is whole.
                        context.store.thaw(self.group, frozen.id);
                        Served::Waiting { at: context.now + SILENCE_MAX, asked: true }
                    }
                },
                Err(_) => again,
            };
            if !matches!(next, Served::Sending(_)) {
                context.permits.give_back(self.group, peer);
            }
            self.rebuilds.served.insert(peer, next);
        }
    }

    /// A checkpoint was made here: whoever leads hears of it, or draws the sum of what it heard.
    pub(super) fn tell_checkpoint(&mut self, context: &mut Context<'_>) {
        if !self.raft.is_leader() {
            let message = RebuildMessage::Checkpointed { index: self.checkpointed.0 };
            let leader = self.raft.leader().filter(|leader| *leader != self.id);
            return self.rebuilds.replies.extend(leader.map(|leader| (leader, message)));
        }
        let own = (self.id, self.checkpointed);
        let known = |replica| if replica == own.0 { own.1 } else { self.rebuilds.checkpoint_of(replica) };
        let least = self.configuration.replicas().map(known).min().unwrap_or_default();
        // One that is not in effect yet may name more.
        let settled = self.raft.configuration() == &self.configuration;
        if settled && least > self.rebuilds.forgotten_below {
            self.rebuilds.forgotten_below = least;
            context.store.forget_tombstones(self.group, least.0);
            let peers = self.directory.keys().filter(|replica| **replica != self.id);
            let forget = |replica: &ReplicaId| (*replica, RebuildMessage::Forget { below: least.0 });
            self.rebuilds.replies.extend(peers.map(forget));
        }
    }

    fn on_checkpointed(&mut self, from: ReplicaId, index: LogIndex) {
        if self.directory.contains_key(&from) {
            let known = self.rebuilds.checkpoints.entry(from).or_default();
            *known = index.max(*known);
        }
    }

    fn on_forget(&mut self, context: &mut Context<'_>, from: ReplicaId, below: LogIndex) {
        if self.directory.contains_key(&from) && below <= self.checkpointed {
            context.store.forget_tombstones(self.group, below.0);
        }
    }

    /// The peer is gone, or its rebuild is of no use to it any more.
    pub(super) fn stop_serving_rebuild(&mut self, context: &mut Context<'_>, peer: ReplicaId) {
        match self.rebuilds.served.remove(&peer) {
            Some(Served::Sending(sender)) => {
                if let Kept::Frozen(frozen) = sender.kept {
                    context.store.thaw(self.group, frozen);
                }
                context.permits.give_back(self.group, peer);
            }
            Some(Served::Preparing { .. }) => context.permits.give_back(self.group, peer),
            Some(sent @ Served::Sent { .. }) => {
                self.rebuilds.served.insert(peer, sent);
            }
            Some(Served::Waiting { .. }) | None => {}
        }
    }

    /// Carries out what the events since the last call asked for.
    pub(super) fn drive_rebuilds(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        self.serve(context, outputs);
        self.prepare_own(context, outputs);
        self.advance_own(context, outputs);
        self.ask_leader(context.now, outputs);
        for (to, message) in std::mem::take(&mut self.rebuilds.replies) {
            outputs.push(Output::SendRebuild { to, message });
        }
    }

    fn serve(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        if self.rebuilds.served.is_empty() {
            return;
        }
        if !self.raft.is_leader() {
            for peer in self.rebuilds.peers(|_| true) {
                self.stop_serving_rebuild(context, peer);
            }
            self.rebuilds.served.clear();
            self.rebuilds.streaks.clear();
            return;
        }
        let now = context.now;
        for peer in self.rebuilds.peers(|served| matches!(served, Served::Sent { look_at: Some(at), .. } if *at <= now))
        {
            self.look_after(context, peer);
        }
        for peer in self.rebuilds.peers(|served| matches!(served, Served::Waiting { at, .. } if *at <= now)) {
            self.begin_serving(context, peer);
        }
        let preparing = self.rebuilds.served.values().any(|served| matches!(served, Served::Preparing { .. }));
        if preparing && self.rebuilds.checkpoint.is_none() {
            self.start_checkpoint(context.store, outputs);
            // Refused for space, or another one is under way: then this one is next.
            self.rebuilds.again_at = (!self.checkpoint_running).then_some(now + RETRY_AFTER);
        }
        for peer in self.rebuilds.peers(|served| matches!(served, Served::Sending(_))) {
            self.advance_sender(context, peer, outputs);
        }
    }

    fn begin_serving(&mut self, context: &mut Context<'_>, peer: ReplicaId) {
        let Some(Served::Waiting { asked, .. }) = self.rebuilds.served.get(&peer) else { return };
        let asked = *asked;
        let status = self.raft.status();
        let progress = status.peers.iter().find(|progress| progress.replica == peer);
        let needs = progress
            .is_some_and(|progress| progress.reachable && (asked || progress.state == ProgressState::NeedsDelta));
        let next = if !needs {
            // It is told again when it is there again and still behind.
            self.rebuilds.served.remove(&peer);
            self.rebuilds.streaks.remove(&peer);
            return;
        } else if context.permits.take(self.group, peer) {
            self.serve_next_map(context, peer, 0)
        } else {
            Served::Waiting { at: context.now + RETRY_AFTER, asked }
        };
        self.rebuilds.served.insert(peer, next);
    }

    /// Offers the oldest snapshot above an index, or where there is none, what a checkpoint is made for. The peer has its
    /// permit.
    fn serve_next_map(&mut self, context: &mut Context<'_>, peer: ReplicaId, above: u64) -> Served {
        let mut snapshots = context.store.snapshots(self.group).into_iter();
        let Some(next) = snapshots.find(|snapshot| snapshot.index > above) else { return Served::Preparing { above } };
        let kept = context.store.snapshot_state(self.group, next.index);
        let kept = kept.and_then(|(position, state)| Some((codec::decode_position(&position).ok()?, state)));
        let (Some(hash), Some((position, state))) = (next.hash, kept) else {
            // Parts of it are lost here: nobody could say that the copy is whole.
            context.permits.give_back(self.group, peer);
            return Served::Waiting { at: context.now + SILENCE_MAX, asked: true };
        };
        self.rebuilds.next_number += 1;
        let id = RebuildId { term: self.raft.term(), number: self.rebuilds.next_number };
        let kept = Kept::Snapshot(next.index);
        Served::Sending(Box::new(Sender::new(id, kept, position, hash, state, context.now)))
    }

    /// The log may have been released past what a peer was given, by the disk's need of space.
    fn look_after(&mut self, context: &mut Context<'_>, peer: ReplicaId) {
        let status = self.raft.status();
        let state = status.peers.iter().find(|progress| progress.replica == peer).map(|progress| progress.state);
        let Some(served) = self.rebuilds.served.get_mut(&peer) else { return };
        match (state, &mut *served) {
            (Some(ProgressState::NeedsDelta), _) => *served = Served::Waiting { at: context.now, asked: false },
            (Some(ProgressState::Probe), Served::Sent { look_at, .. }) => *look_at = Some(context.now + RETRY_AFTER),
            (_, Served::Sent { look_at, .. }) => {
                *look_at = None;
                self.rebuilds.streaks.remove(&peer);
            }
            _ => {}
        }
    }

    fn advance_sender(&mut self, context: &mut Context<'_>, peer: ReplicaId, outputs: &mut Vec<Output<S::Outcome>>) {
        let Some(Served::Sending(sender)) = self.rebuilds.served.get_mut(&peer) else { return };
        let (kept, index, progress) = (sender.kept, sender.position.index, sender.progress);
        let (heard, lasts) = (sender.heard(), context.now.since(sender.began()));
        let streak = self.rebuilds.streaks.get(&peer).copied().unwrap_or_default();
        let hurry = streak.is_hurried_after(lasts) && self.raft.configuration().is_voter(peer);
        for action in sender.take_actions() {
            match action {
                SenderAction::Send(message) => {
                    if hurry && (heard || lasts.is_zero()) {
                        self.raft.pace(context.now, 0);
                    } else if streak.rebuilds > 0
                        && let RebuildMessage::Slot { slot, .. } = &message
                    {
                        // What changed during the last was more than the log above it holds: so it would be each time.
                        self.raft.pace(context.now, slot.data.len());
                    }
                    outputs.push(Output::SendRebuild { to: peer, message });
                }
                SenderAction::Changes { request, above, from_slot } => {
                    self.rebuilds.requests.insert(request, Some(peer));
                    let fetch = Fetch::Changes { kept: Some(kept), above, from_slot };
                    outputs.push(Output::Fetch { request, fetch });
                }
                SenderAction::Slot { request, slot } => {
                    self.rebuilds.requests.insert(request, Some(peer));
                    outputs.push(Output::Fetch { request, fetch: Fetch::Slot { kept, slot } });
                }
                SenderAction::End { done: true } if matches!(kept, Kept::Snapshot(_)) => {
                    let next = self.serve_next_map(context, peer, index.0);
                    self.rebuilds.served.insert(peer, next);
                    return;
                }
                SenderAction::End { done } => {
                    self.stop_serving_rebuild(context, peer);
                    let progress = RebuildProgress { phase: RebuildPhase::Done, ..progress };
                    let rebuilds = streak.rebuilds.saturating_add(u32::from(done));
                    self.rebuilds.streaks.insert(peer, Streak { rebuilds, failed: !done });
                    let next = if done {
                        let (until, look_at) = (context.now + LOG_KEPT_FOR, Some(context.now + RETRY_AFTER));
                        Served::Sent { index, until, look_at, progress }
                    } else {
                        Served::Waiting { at: context.now + RETRY_AFTER, asked: false }
                    };
                    self.rebuilds.served.insert(peer, next);
                    return;
                }
            }
        }
    }

    /// An accepted offer begins once everything applied, or installed before, is in the map on the disk.
    fn prepare_own(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        let Some(offer) = self.rebuilds.accepted else { return };
        if self.checkpoint_running || self.rebuilds.commit_running {
            return;
        }
        if self.rebuilds.uncommitted {
            return self.commit_own(context, outputs);
        }
        if self.applied.index > self.checkpointed {
            self.start_checkpoint(context.store, outputs);
            self.rebuilds.again_at = (!self.checkpoint_running).then_some(context.now + RETRY_AFTER);
            return;
        }
        self.rebuilds.again_at = None;
        self.rebuilds.accepted = None;
        let receiver = Receiver::new(offer, self.checkpointed.0, self.rebuilds.installing_to, context.now);
        self.rebuilds.receiver = Some(receiver);
    }

    fn advance_own(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        let term = self.raft.term();
        if self.rebuilds.accepted.take_if(|offer| offer.id.term < term).is_some() {
            self.rebuilds.again_at = Some(context.now);
            self.resume_if_untouched(context);
        }
        if let Some(receiver) = self.rebuilds.receiver.as_mut().filter(|receiver| receiver.offer.id.term < term) {
            receiver.give_up(GiveUp::Deposed);
        }
        while let Some(receiver) = &mut self.rebuilds.receiver {
            let actions = receiver.take_actions();
            if actions.is_empty() {
                return;
            }
            for action in actions {
                if self.stopped || self.rebuilds.receiver.is_none() {
                    return;
                }
                self.carry_out_own(context, action, outputs);
            }
        }
    }

    fn carry_out_own(
        &mut self,
        context: &mut Context<'_>,
        action: ReceiverAction,
        outputs: &mut Vec<Output<S::Outcome>>,
    ) {
        let Some(receiver) = &mut self.rebuilds.receiver else { return };
        let offer = receiver.offer;
        match action {
            ReceiverAction::Send(message) => outputs.push(Output::SendRebuild { to: offer.from, message }),
            ReceiverAction::Own { above, from_slot } => {
                let request = self.rebuilds.request(None);
                let fetch = Fetch::Changes { kept: None, above, from_slot };
                outputs.push(Output::Fetch { request, fetch });
            }
            ReceiverAction::Install(slot) => self.install(context, slot, outputs),
            ReceiverAction::Commit if self.rebuilds.uncommitted => self.commit_own(context, outputs),
            ReceiverAction::Commit => receiver.on_committed(context.now),
            ReceiverAction::Finish { state } => self.finish_own(context, offer, &state, outputs),
            ReceiverAction::GiveUp { reason } => {
                self.rebuilds.receiver = None;
                self.rebuilds.counters.given_up += 1;
                self.rebuilds.replies.push((offer.from, RebuildMessage::Abort { id: offer.id }));
                let wait = if reason == GiveUp::Deposed { Duration::ZERO } else { RETRY_AFTER };
                self.rebuilds.again_at = Some(context.now + wait);
                self.resume_if_untouched(context);
            }
        }
    }

    fn install(&mut self, context: &mut Context<'_>, slot: InstalledSlot, outputs: &mut Vec<Output<S::Outcome>>) {
        let Some(receiver) = &mut self.rebuilds.receiver else { return };
        let towards = receiver.offer.position.index.0;
        match context.store.install(self.group, towards, slot.clone()) {
            Ok(()) => {
                self.rebuilds.installing_to = self.rebuilds.installing_to.max(towards);
                self.rebuilds.uncommitted = true;
            }
            Err(StoreError::Full | StoreError::Busy) => receiver.on_full(context.now, slot),
            Err(error) => self.stop(error.to_string(), outputs),
        }
    }

    fn commit_own(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        let hard_state = self.encoded_hard_state();
        match context.store.commit_install(self.group, hard_state) {
            Ok(()) => {
                self.rebuilds.uncommitted = false;
                self.rebuilds.commit_running = true;
                self.checkpoint_due = false;
            }
            Err(error) => self.stop(error.to_string(), outputs),
        }
    }

    fn finish_own(
        &mut self,
        context: &mut Context<'_>,
        offer: Offer,
        state: &Bytes,
        outputs: &mut Vec<Output<S::Outcome>>,
    ) {
        let hard_state = self.encoded_hard_state();
        let Some(receiver) = &mut self.rebuilds.receiver else { return };
        let decoded = Snapshot::decode(state).map_err(|error| error.to_string()).and_then(|snapshot| {
            snapshot.configuration.validate().map_err(|error| error.to_string())?;
            S::decode_state(&snapshot.machine).map(|machine| (snapshot, machine))
        });
        let Ok((snapshot, machine)) = decoded else { return receiver.give_up(GiveUp::State) };
        let snapshots = machine.snapshots();
        let group_state =
            GroupState { hard_state, position: codec::encode_position(offer.position), state: state.clone() };
        match context.store.finish_install(self.group, offer.position.index.0, group_state, offer.hash, &snapshots) {
            Ok(()) => {
                self.checkpoint_running = true;
                self.rebuilds.pending = Some(Box::new(Pending { offer, snapshot, machine }));
            }
            Err(InstallError::Hash { .. }) => {
                self.rebuilds.counters.hash_mismatches += 1;
                receiver.on_hash_mismatch(context.now);
            }
            Err(InstallError::MapLost) => receiver.on_map_lost(context.now),
            Err(InstallError::Snapshots { .. }) => receiver.give_up(GiveUp::Snapshots),
            Err(InstallError::Store(StoreError::Full | StoreError::Busy)) => receiver.on_finish_refused(context.now),
            Err(InstallError::Store(error)) => self.stop(error.to_string(), outputs),
        }
    }

    /// While this replica is between two states its log is pinned, and with it the whole disk's. Where the disk needs the
    /// space, the log goes: what comes in its place was committed without it. Its end stays, and this replica votes by that.
    pub(super) fn give_log_up_if_pressed(&mut self, context: &mut Context<'_>) {
        if self.rebuilds.installing_to == 0 || !self.checkpoint_due {
            return;
        }
        let usage = context.store.usage();
        let pressed = usage.wal_used >= usage.wal_total / 4 * 3;
        if pressed && self.rebuilds.pending.is_none() && self.raft.status().last.index > self.checkpointed {
            self.checkpoint_due = false;
            self.raft.forget_log(context.now);
            self.apply_to = self.applied.index;
            self.restart_log = true;
        }
    }

    /// Where no slot came in, the replica is what it was.
    fn resume_if_untouched(&mut self, context: &mut Context<'_>) {
        if !self.rebuilds.installing() {
            self.rebuilds.again_at = None;
            self.raft.set_installing(context.now, false);
            self.raft.set_full((!self.refused.is_empty()).then_some(Shortage::Passing));
        }
    }

    /// Asks for the rebuild without which this replica cannot go on, and drops what a former leader offered.
    fn ask_leader(&mut self, now: Timestamp, outputs: &mut Vec<Output<S::Outcome>>) {
        let rebuilds = &mut self.rebuilds;
        if rebuilds.again_at.is_none_or(|at| at > now) {
            return;
        }
        rebuilds.again_at = None;
        if rebuilds.installing_to == 0 || rebuilds.accepted.is_some() || rebuilds.receiver.is_some() {
            return;
        }
        rebuilds.again_at = Some(now + RETRY_AFTER);
        if let Some(leader) = self.raft.leader().filter(|leader| *leader != self.id) {
            outputs.push(Output::SendRebuild { to: leader, message: RebuildMessage::Want });
        }
    }
}

impl<S> Rebuilds<S> {
    fn checkpoint_of(&self, replica: ReplicaId) -> LogIndex {
        self.checkpoints.get(&replica).copied().unwrap_or_default()
    }

    fn peers(&self, select: impl Fn(&Served) -> bool) -> Vec<ReplicaId> {
        self.served.iter().filter(|(_, served)| select(served)).map(|(peer, _)| *peer).collect()
    }
}
