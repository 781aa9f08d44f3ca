//! [`Replica`]: the order in which things become durable, applied and told.
//!
//! Invariants:
//! 1. A message leaves only after the write it depends on was reported flushed by the store.
//! 2. Entries are applied in log order, once, and only when committed *and* durable here.
//! 3. A checkpoint describes exactly the state at `applied`; the log is released only up to a durable checkpoint.
//! 4. A command that this build cannot read stops the replica; it is never skipped.
//! 5. While another replica's slots take the place of this one's, nothing is applied; see `rebuilding`.

mod rebuilding;

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use holdfast_consensus::liveness::pairs::Pairs;
use holdfast_consensus::{
    Body, Configuration, Effect, Entry, HardState, Liveness, LogIndex, Message, Options, Persist, PersistSequence,
    Position, ProgressState, Raft, Refusal, Restored, Shortage, Status, SupportEpoch, Term, Timestamp,
};
use holdfast_id::{GroupId, NodeId, ReplicaId};
use holdfast_planted::Bug;
use holdfast_store::chunk::blocks_for_payload;
use holdfast_store::device::BLOCK_BYTES;
use holdfast_store::group::{
    APPEND_BYTES_MAX, Append, AppendError, GroupState, Mutation, PayloadAt, RECORDS_MAX, Record, RecoveredGroup,
    StoreError,
};
use holdfast_store::store::{Room, Store};

use crate::change::{self, Change};
use crate::codec::{self, DecodeError, Directory, DurableState, LogCommand, Snapshot};
use crate::rebuild::message::RebuildMessage;
use crate::rebuild::{LOG_KEPT_BYTES_MAX, Permits};
use crate::replica::rebuilding::Rebuilds;
pub use crate::replica::rebuilding::{Answer, Fetch, RebuildCounters};

/// Log bytes a group keeps below its checkpoint for replicas that lag, unless the disk needs the space: a restart of a
/// busy volume's node is bridged by it, and it bounds the memory that the log's mirror takes.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// Replicas outside the configuration whose place is remembered: some leaders that came and went meanwhile.
const STRANGERS_MAX: usize = 8;
/// Applied bytes after which a checkpoint is taken though nobody asked: bounds replay at start.
const CHECKPOINT_BYTES: usize = 32 << 20;

/// Log bytes after which it is noted again how far the log is known to be committed. Without a leader nobody could say
/// it of what a start finds above the checkpoint, and a log that is full of it could take in no leader's first entry.
const NOTED_BYTES: usize = 1 << 20;

/// What is replicated. `apply` is total and deterministic: the same log gives the same state and outcomes everywhere.
pub trait StateMachine {
    type Outcome;
    type Error: std::error::Error;

    /// # Errors
    /// The command cannot be read by this build; the replica stops.
    fn apply(&mut self, index: LogIndex, command: &LogCommand) -> Result<Applied<Self::Outcome>, Self::Error>;

    /// Where applying the command writes its payload, if all of it goes to one place: the store then writes it once.
    fn payload_at(command: &LogCommand) -> Option<PayloadAt>;

    fn encode_state(&self) -> Bytes;

    /// Indices of the entries whose blocks are kept, rising.
    fn snapshots(&self) -> Vec<u64>;

    /// # Errors
    /// The state cannot be read by this build, and why.
    fn decode_state(state: &Bytes) -> Result<Self, String>
    where
        Self: Sized;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied<O> {
    pub outcome: O,
    /// Changes of the volume's blocks, visible to reads when `apply` has returned.
    pub mutations: Vec<Mutation>,
    /// Only without mutations.
    pub keeping: Option<Keeping>,
}

/// What an entry does to the blocks that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// As of this entry.
    Keep,
    /// Those of an earlier entry go.
    Drop { index: u64 },
}

/// What a replica borrows from its shard for the length of one call.
pub struct Context<'a> {
    pub now: Timestamp,
    pub pairs: &'a mut Pairs,
    pub store: &'a mut Store,
    pub permits: &'a mut Permits,
}

/// What the shard is to do or to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output<O> {
    Send {
        to: ReplicaId,
        message: Message<LogCommand>,
    },
    Applied {
        position: Position,
        outcome: O,
    },
    BecameLeader(Term),
    /// Everything older than this term is applied: requests may be served.
    Serving(Term),
    LostLeadership(Term),
    /// Everything a linearizable read must see is applied.
    ReadReady {
        token: u64,
    },
    ReadFailed {
        token: u64,
    },
    /// To the replica's node, with what it cannot do without.
    SendRebuild {
        to: ReplicaId,
        message: RebuildMessage,
    },
    /// `Replica::directory` is another than before.
    DirectoryChanged,
    /// Ask the store; [`Replica::on_fetched`] with the number has its answer.
    Fetch {
        request: u64,
        fetch: Fetch,
    },
    /// This replica can go no further and says why; it answers nothing any more.
    Stopped {
        reason: String,
    },
}

/// Why recovered bytes do not make a replica.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error("the {what} of group {group} cannot be read")]
    Decode { group: GroupId, what: &'static str, source: DecodeError },
}

struct View<'a> {
    pairs: &'a mut Pairs,
    directory: &'a Directory,
}

impl Liveness for View<'_> {
    fn supported_by(&self, peer: ReplicaId) -> Option<(SupportEpoch, Timestamp)> {
        self.directory.get(&peer).and_then(|node| self.pairs.supported_by(*node))
    }

    fn promised_to(&self, peer: ReplicaId) -> Timestamp {
        self.directory.get(&peer).map_or(Timestamp::ZERO, |node| self.pairs.promised_to(*node))
    }

    fn epoch_for(&self, peer: ReplicaId) -> SupportEpoch {
        self.directory.get(&peer).map_or(SupportEpoch::default(), |node| self.pairs.epoch_for(*node))
    }

    fn withdraw(&mut self, peer: ReplicaId) {
        if let Some(node) = self.directory.get(&peer) {
            self.pairs.withdraw(*node);
        }
    }
}

/// An append on its way to the disk, and the consensus write it completes.
struct InFlight {
    store_sequence: u64,
    persisted: PersistSequence,
}

pub struct Replica<S> {
    group: GroupId,
    id: ReplicaId,
    raft: Raft<LogCommand>,
    machine: S,
    /// Where the members of the configuration in force live, and the strangers.
    directory: Directory,
    directory_of: Configuration,
    /// Where replicas outside the configuration in force live, learned from what they sent: a leader that came in or
    /// went out by entries that are not here wants answers, and the end of its promises kept.
    strangers: Directory,
    directory_changed: bool,
    applied: Position,
    /// Known to be committed and durable here; everything up to it is applied at the next `settle`.
    apply_to: LogIndex,
    /// As of `applied`; the core's own may be ahead of it.
    configuration: Configuration,
    checkpointed: LogIndex,
    checkpoint_running: bool,
    checkpoint_due: bool,
    applied_bytes: usize,
    /// Appended since the hard state was.
    unnoted_bytes: usize,
    hard_state: HardState,
    /// Appends that the store did not take yet, for space, in order; tried again at every `settle`.
    refused: VecDeque<Append>,
    /// Room that what was proposed since the last append will need.
    proposed_blocks: u64,
    in_flight: VecDeque<InFlight>,
    store_sequence: u64,
    persisted: PersistSequence,
    held: VecDeque<(PersistSequence, ReplicaId, Message<LogCommand>)>,
    reads: Vec<(LogIndex, u64)>,
    serving_when_applied: Option<Term>,
    disk_failure: Option<String>,
    /// Leaders: a learner that has flushed this votes next. What was committed when it was last looked at, because
    /// under load the newest commit is always a little ahead of what is known of a learner.
    promotion_mark: Option<LogIndex>,
    stopped: bool,
    rebuilds: Rebuilds<S>,
    /// The next record begins the log anew: what the WAL may still hold of it lies behind a gap.
    restart_log: bool,
}

/// The state a new group starts from: the same bytes on every founding replica.
pub fn initial_state(configuration: Configuration, machine: Bytes) -> GroupState {
    GroupState {
        hard_state: codec::encode_hard_state(&DurableState {
            hard_state: HardState::default(),
            damaged: false,
            forgotten: Position::default(),
            committed: LogIndex(0),
        }),
        position: codec::encode_position(Position::default()),
        state: Snapshot { configuration, machine }.encode(),
    }
}

/// The state machine's bytes of a recovered group's checkpoint.
///
/// # Errors
/// The checkpoint was written by a newer or broken build.
pub fn machine_state(recovered: &RecoveredGroup) -> Result<Bytes, RestoreError> {
    Snapshot::decode(&recovered.checkpoint.state)
        .map(|snapshot| snapshot.machine)
        .map_err(|source| RestoreError::Decode { group: recovered.group, what: "checkpoint", source })
}

impl<S: StateMachine> Replica<S> {
    /// `machine` is the state machine as of the checkpoint, see [`machine_state`]. `options.id` is overwritten.
    ///
    /// # Errors
    /// Something durable was written by a newer or broken build.
    pub fn restore(
        recovered: RecoveredGroup,
        machine: S,
        mut options: Options,
        now: Timestamp,
    ) -> Result<Replica<S>, RestoreError> {
        let group = recovered.group;
        let failed = |what| move |source| RestoreError::Decode { group, what, source };
        let snapshot = Snapshot::decode(&recovered.checkpoint.state).map_err(failed("checkpoint"))?;
        let checkpoint = codec::decode_position(&recovered.checkpoint.position).map_err(failed("checkpoint"))?;
        assert_eq!(checkpoint.index.0, recovered.checkpoint_index, "a checkpoint's position names its index");
        let hard_state = recovered.hard_state.as_ref().unwrap_or(&recovered.checkpoint.hard_state);
        let DurableState { mut hard_state, damaged, forgotten, committed } =
            codec::hard_state(hard_state).map_err(failed("hard state"))?;
        let mut entries = Vec::with_capacity(recovered.records.len());
        for record in recovered.records {
            let entry = codec::entry(LogIndex(record.index), &record.header, record.payload);
            entries.push(entry.map_err(failed("log entry"))?);
        }
        // A state that was installed does not come of a log with another entry in its place.
        let stale =
            entries.iter().any(|entry| entry.position.index == checkpoint.index && entry.position != checkpoint);
        if stale {
            entries.clear();
        }
        let restart_log = entries.is_empty();
        // The oldest record kept below the checkpoint only lends its position: what precedes it has no known term.
        let base = match entries.first() {
            Some(first) if first.position.index <= checkpoint.index => entries.remove(0).position,
            _ => checkpoint,
        };
        let last = entries.last().map_or(base, |entry| entry.position);
        if (recovered.damage.is_some() || damaged) && last.term > hard_state.term {
            // The hard state that was durable before this entry is among what was damaged; to whom the vote of that
            // term went is not known, and none is given before an elected leader was followed.
            hard_state = HardState { term: last.term, vote: None };
        }
        options.id = recovered.replica;
        // What was written back in place was committed: its blocks are readable only once it is applied again.
        // Where the log lost them, they come from the leader once more.
        let committed = committed.max(LogIndex(recovered.committed_to)).min(last.index).max(checkpoint.index);
        let mut raft = Raft::new(
            options,
            Restored {
                hard_state,
                base,
                configuration: snapshot.configuration.clone(),
                entries,
                committed,
                may_vote: recovered.damage.is_none() && !damaged,
                forgotten,
            },
            now,
        );
        raft.set_installing(now, recovered.installing > 0);
        let mut replica = Replica {
            group,
            id: recovered.replica,
            raft,
            machine,
            directory: Directory::new(),
            directory_of: Configuration::default(),
            strangers: Directory::new(),
            directory_changed: false,
            applied: checkpoint,
            apply_to: committed,
            configuration: snapshot.configuration,
            checkpointed: checkpoint.index,
            checkpoint_running: false,
            checkpoint_due: false,
            applied_bytes: 0,
            unnoted_bytes: 0,
            disk_failure: None,
            hard_state,
            refused: VecDeque::new(),
            proposed_blocks: 0,
            in_flight: VecDeque::new(),
            store_sequence: 0,
            persisted: PersistSequence(0),
            held: VecDeque::new(),
            reads: Vec::new(),
            serving_when_applied: None,
            promotion_mark: None,
            stopped: false,
            rebuilds: Rebuilds::new(recovered.installing, now),
            restart_log,
        };
        replica.refresh_directory();
        Ok(replica)
    }

    pub fn group(&self) -> GroupId {
        self.group
    }

    pub fn id(&self) -> ReplicaId {
        self.id
    }

    pub fn machine(&self) -> &S {
        &self.machine
    }

    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.directory.get(&replica).copied()
    }

    pub fn applied(&self) -> Position {
        self.applied
    }

    pub fn term(&self) -> Term {
        self.raft.term()
    }

    pub fn leader(&self) -> Option<ReplicaId> {
        self.raft.leader()
    }

    pub fn checkpointed(&self) -> LogIndex {
        self.checkpointed
    }

    pub fn status(&self) -> Status {
        self.raft.status()
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        if self.stopped { None } else { self.raft.deadline().into_iter().chain(self.rebuilds.deadline()).min() }
    }

    /// The configuration in force: the last one appended, committed or not.
    pub fn configuration(&self) -> &Configuration {
        self.raft.configuration()
    }

    /// `node` is the one that the message came from.
    pub fn on_message(
        &mut self,
        context: &mut Context<'_>,
        node: NodeId,
        from: ReplicaId,
        message: Message<LogCommand>,
    ) {
        if !self.directory.contains_key(&from) {
            let leader = self.raft.leader();
            if self.strangers.len() >= STRANGERS_MAX {
                self.strangers.retain(|stranger, _| Some(*stranger) == leader);
            }
            self.strangers.insert(from, node);
            self.rebuild_directory();
        }
        self.call(context, |raft, now, view| raft.on_message(now, view, from, message));
    }

    pub fn on_deadline(&mut self, context: &mut Context<'_>) {
        self.call(context, |raft, now, view| raft.on_deadline(now, view));
        self.rebuilds.on_deadline(context.now);
    }

    /// The node is lost from sight: whoever of this group lives there is suspected.
    pub fn on_suspect(&mut self, context: &mut Context<'_>, node: NodeId) {
        for peer in self.peers_on(node) {
            self.call(context, |raft, now, view| raft.on_suspect(now, view, peer));
            self.stop_serving_rebuild(context, peer);
        }
    }

    pub fn on_peer_connected(&mut self, context: &mut Context<'_>, node: NodeId) {
        for peer in self.peers_on(node) {
            self.call(context, |raft, now, view| raft.on_peer_connected(now, view, peer));
        }
    }

    /// The store reports everything appended up to `store_sequence` durable.
    pub fn on_flushed(&mut self, context: &mut Context<'_>, store_sequence: u64) {
        let mut persisted = None;
        while self.in_flight.front().is_some_and(|append| append.store_sequence <= store_sequence) {
            persisted = self.in_flight.pop_front().map(|append| append.persisted);
        }
        let Some(persisted) = persisted else { return };
        self.persisted = persisted;
        self.call(context, |raft, now, view| raft.on_persisted(now, view, persisted));
    }

    /// The disk wants what this group holds of its log or memory back.
    pub fn on_checkpoint_wanted(&mut self) {
        self.checkpoint_due = true;
    }

    pub fn on_checkpoint_done(&mut self, context: &mut Context<'_>, index: u64) {
        self.checkpoint_running = false;
        if self.on_install_done(context, index) {
            return;
        }
        self.checkpointed = LogIndex(index);
        self.freeze_for_rebuilds(context);
        self.tell_checkpoint(context);
        let keep_from = self.kept_for_laggards(context.now);
        self.release_log(context, keep_from);
        // With three quarters of its log in use the disk needs the space for what is new: first what no rebuild needs.
        if log_pressed(context.store) {
            let pinned = self.rebuilds.pinned(context.now).unwrap_or(self.checkpointed);
            self.release_log(context, pinned.min(self.checkpointed));
        }
        if log_pressed(context.store) {
            self.release_log(context, self.checkpointed);
        }
    }

    /// # Errors
    /// This replica does not lead, or is not sure to.
    pub fn propose(&mut self, context: &mut Context<'_>, command: LogCommand) -> Result<Position, Refusal> {
        if self.stopped {
            return Err(Refusal::NotLeader { leader: None });
        }
        let blocks = blocks_for_payload(command.payload.len().div_ceil(BLOCK_BYTES) as u64);
        if blocks > 0 && self.raft.is_leader() {
            let room = context.store.room_for(self.proposed_blocks + blocks);
            if room == Room::Never || self.raft.lacks_room() {
                return Err(Refusal::NoRoom);
            }
            if room == Room::Later {
                return Err(Refusal::Busy);
            }
        }
        if !self.refused.is_empty() {
            return Err(Refusal::Busy); // The log is full here: nothing more is taken in before that is on it.
        }
        let mut result = Err(Refusal::NotLeader { leader: None });
        self.call(context, |raft, now, view| result = raft.propose(now, view, command));
        if result.is_ok() {
            self.proposed_blocks += blocks;
        }
        result.map(|index| Position { term: self.raft.term(), index })
    }

    /// Asks for a moment at which a linearizable read may be served: `Output::ReadReady` or `ReadFailed` with `token`.
    ///
    /// # Errors
    /// This replica does not lead.
    pub fn read(&mut self, context: &mut Context<'_>, token: u64) -> Result<(), Refusal> {
        if self.stopped {
            return Err(Refusal::NotLeader { leader: None });
        }
        let mut result = Ok(());
        self.call(context, |raft, now, view| result = raft.read_index(now, view, token));
        result
    }

    /// Brings the group, which this replica must lead, a step nearer to having exactly these voters. Asked again until
    /// it answers [`Change::Done`]; one change at a time, whoever asks.
    ///
    /// # Errors
    /// This replica does not lead, or is not sure to.
    pub fn change_configuration(&mut self, context: &mut Context<'_>, voters: &Directory) -> Result<Change, Refusal> {
        if self.stopped || !self.raft.is_leader() {
            return Err(Refusal::NotLeader { leader: self.raft.leader() });
        }
        if !self.raft.is_configuration_settled() {
            return Ok(Change::UnderWay);
        }
        let status = self.raft.status();
        let mark = self.promotion_mark.unwrap_or(status.committed);
        let behind = |member: ReplicaId| {
            if member == self.id {
                return 0;
            }
            let peer = status.peers.iter().find(|peer| peer.replica == member);
            let follows = peer.filter(|peer| peer.reachable && peer.state == ProgressState::Replicate);
            let missing = status.committed.0.saturating_sub(peer.map_or(0, |peer| peer.flushed.0));
            if follows.is_some_and(|peer| peer.flushed >= mark) { 0 } else { missing.max(1) }
        };
        match change::next_step(self.raft.configuration(), voters, behind) {
            change::Step::Nothing => Ok(Change::Done),
            change::Step::Wait { replica, behind } => {
                self.promotion_mark = Some(status.committed);
                Ok(Change::CatchingUp { replica, behind })
            }
            change::Step::Propose(configuration) => {
                self.promotion_mark = None;
                let mut result = Ok(LogIndex(0));
                self.call(context, |raft, now, view| result = raft.propose_configuration(now, view, configuration));
                result.map(|_| Change::UnderWay)
            }
        }
    }

    /// The disk hangs, or the process ends: hands the leadership, if it is here, to the reachable peer that has the most.
    /// Repeating is harmless.
    pub fn yield_leadership(&mut self, context: &mut Context<'_>) {
        let peers = self.raft.status().peers.into_iter().filter(|peer| peer.reachable);
        let Some(best) = peers.max_by_key(|peer| peer.flushed) else { return };
        // Refused where no peer is fit yet: asked again with the next heartbeat.
        self.call(context, |raft, now, view| {
            let _ = raft.transfer(now, view, best.replica);
        });
    }

    /// The disk failed: acknowledge nothing more, lead no more.
    pub fn on_disk_failed(&mut self, context: &mut Context<'_>, reason: &str) {
        self.call(context, |raft, now, view| raft.step_down(now, view));
        self.disk_failure = Some(reason.to_owned());
    }

    fn peers_on(&self, node: NodeId) -> Vec<ReplicaId> {
        let peers = self.directory.iter().filter(|(replica, home)| **home == node && **replica != self.id);
        peers.map(|(replica, _)| *replica).collect()
    }

    fn call(&mut self, context: &mut Context<'_>, call: impl FnOnce(&mut Raft<LogCommand>, Timestamp, &mut View<'_>)) {
        if !self.stopped {
            let mut view = View { pairs: context.pairs, directory: &self.directory };
            call(&mut self.raft, context.now, &mut view);
            self.refresh_directory();
        }
    }

    /// After whatever may have changed the configuration in force.
    fn refresh_directory(&mut self) {
        if *self.raft.configuration() != self.directory_of {
            self.directory_of.clone_from(self.raft.configuration());
            self.rebuild_directory();
        }
    }

    fn rebuild_directory(&mut self) {
        let configuration = &self.directory_of;
        // A leader that goes out leads on until that is committed: it is owed answers, and the promises made to it.
        let leader = self.raft.leader().and_then(|leader| Some((leader, *self.directory.get(&leader)?)));
        self.strangers.extend(leader);
        self.strangers.retain(|stranger, _| !configuration.is_member(*stranger));
        let members = configuration.members.iter().chain(&configuration.outgoing);
        self.directory = members.map(|member| (member.replica, member.node)).collect();
        self.directory.extend(self.strangers.iter().map(|(replica, node)| (*replica, *node)));
        self.directory_changed = true;
    }

    /// Carries out what the calls since the last one asked for. Called once per batch of events, so that what came
    /// together is written and sent together.
    pub fn settle(&mut self, context: &mut Context<'_>, outputs: &mut Vec<Output<S::Outcome>>) {
        if self.stopped {
            return;
        }
        self.give_log_up_if_pressed(context);
        self.retry_refused(context.store, outputs);
        self.apply(context.store, outputs);
        for effect in self.raft.take_effects() {
            if self.stopped {
                return;
            }
            self.carry_out(context, effect, outputs);
        }
        self.release_held(outputs);
        if std::mem::take(&mut self.directory_changed) {
            outputs.push(Output::DirectoryChanged);
        }
        if let Some(reason) = self.disk_failure.take() {
            return self.stop(reason, outputs);
        }
        self.drive_rebuilds(context, outputs);
        if (self.checkpoint_due || self.applied_bytes >= CHECKPOINT_BYTES) && !self.rebuilds.installing() {
            self.start_checkpoint(context.store, outputs);
        }
    }

    fn carry_out(
        &mut self,
        context: &mut Context<'_>,
        effect: Effect<LogCommand>,
        outputs: &mut Vec<Output<S::Outcome>>,
    ) {
        let store = &mut *context.store;
        match effect {
            Effect::Persist(persist) => self.append(store, persist, outputs),
            Effect::Send { to, message, after } => match after {
                Some(sequence) if sequence > self.persisted && !holdfast_planted::is(Bug::VoteNotFlushed) => {
                    self.held.push_back((sequence, to, message))
                }
                _ => outputs.push(Output::Send { to, message }),
            },
            Effect::Committed(index) => {
                self.apply_to = self.apply_to.max(index);
                self.apply(store, outputs);
            }
            Effect::BecameLeader(term) => outputs.push(Output::BecameLeader(term)),
            // Committed by the others may be before flushed, and so applied, here.
            Effect::Serving(term) if self.applied.term < term => self.serving_when_applied = Some(term),
            Effect::Serving(term) => outputs.push(Output::Serving(term)),
            Effect::LostLeadership(term) => {
                self.serving_when_applied = None;
                outputs.push(Output::LostLeadership(term));
            }
            Effect::ReadReady { token, index } if index <= self.applied.index => {
                outputs.push(Output::ReadReady { token });
            }
            Effect::ReadReady { token, index } => self.reads.push((index, token)),
            Effect::ReadFailed { token } => outputs.push(Output::ReadFailed { token }),
            Effect::NeedsDelta { peer } => self.rebuilds.on_needed(peer, context.now),
        }
    }

    fn append(&mut self, store: &mut Store, persist: Persist<LogCommand>, outputs: &mut Vec<Output<S::Outcome>>) {
        self.proposed_blocks = 0;
        if let Some(hard_state) = persist.hard_state {
            self.hard_state = hard_state;
        }
        let bytes = |entry: &Entry<LogCommand>| match &entry.body {
            Body::Command(command) => command.header.len() + command.payload.len(),
            Body::Noop | Body::Configuration(_) => 0,
        };
        self.unnoted_bytes += persist.entries.iter().map(bytes).sum::<usize>();
        let noted = persist.hard_state.is_some() || self.unnoted_bytes >= NOTED_BYTES;
        let hard_state = noted.then(|| self.encoded_hard_state());
        if noted {
            self.unnoted_bytes = 0;
        }
        let mut append = self.next_append();
        append.hard_state = hard_state;
        // Below the checkpoint nothing is truncated but a log that an installed state does not come of: all of it goes.
        let truncate_from = persist.truncate_from.map(|from| if from <= self.checkpointed { 1 } else { from.0 });
        let restart = self.restart_log && !persist.entries.is_empty();
        self.restart_log &= !restart;
        append.truncate_from = if restart { Some(1) } else { truncate_from };
        if let Some(from) = append.truncate_from {
            for refused in &mut self.refused {
                refused.records.retain(|record| record.index < from);
            }
            // By itself it is never refused for space, and what it truncates may hold the space that the records need.
            let next = self.next_append();
            self.refused.push_back(std::mem::replace(&mut append, next));
        }
        let mut bytes = 0;
        for record in persist.entries.iter().map(record::<S>) {
            let length = record.header.len() + record.payload.len();
            if bytes + length > APPEND_BYTES_MAX || append.records.len() == RECORDS_MAX {
                let next = self.next_append();
                self.refused.push_back(std::mem::replace(&mut append, next));
                bytes = 0;
            }
            bytes += length;
            append.records.push(record);
        }
        self.in_flight.push_back(InFlight { store_sequence: append.sequence, persisted: persist.sequence });
        self.refused.push_back(append);
        self.retry_refused(store, outputs);
    }

    fn encoded_hard_state(&self) -> Bytes {
        let damaged = !self.raft.may_vote();
        let forgotten = self.raft.forgotten();
        let committed = self.raft.committed();
        codec::encode_hard_state(&DurableState { hard_state: self.hard_state, damaged, forgotten, committed })
    }

    fn next_append(&mut self) -> Append {
        self.store_sequence += 1;
        Append {
            group: self.group,
            sequence: self.store_sequence,
            hard_state: None,
            truncate_from: None,
            records: Vec::new(),
        }
    }

    fn retry_refused(&mut self, store: &mut Store, outputs: &mut Vec<Output<S::Outcome>>) {
        while let Some(append) = self.refused.pop_front() {
            match store.append(append.clone()) {
                Ok(()) => {}
                Err(error @ (AppendError::Full | AppendError::NoSpace)) => {
                    self.refused.push_front(append);
                    let of = if error == AppendError::NoSpace && store.room_for(1) == Room::Never {
                        Shortage::Data
                    } else {
                        Shortage::Passing
                    };
                    return self.raft.set_full(Some(of));
                }
                Err(error) => return self.stop(error.to_string(), outputs),
            }
        }
        self.raft.set_full(self.rebuilds.installing().then_some(Shortage::Passing));
    }

    fn release_held(&mut self, outputs: &mut Vec<Output<S::Outcome>>) {
        while self.held.front().is_some_and(|(after, _, _)| *after <= self.persisted) {
            if let Some((_, to, message)) = self.held.pop_front() {
                outputs.push(Output::Send { to, message });
            }
        }
    }

    fn apply(&mut self, store: &mut Store, outputs: &mut Vec<Output<S::Outcome>>) {
        if self.rebuilds.installing() {
            return;
        }
        let mut late = None;
        while self.applied.index < self.apply_to {
            let index = self.applied.index.next();
            let entry = self.raft.entry(index).expect("a committed entry above the applied one is in the log").clone();
            let mut mutations = Vec::new();
            let mut keeping = None;
            match entry.body {
                Body::Noop => {}
                Body::Configuration(configuration) => self.configuration = configuration,
                Body::Command(command) => match self.machine.apply(index, &command) {
                    Ok(applied) => {
                        mutations = applied.mutations;
                        keeping = applied.keeping;
                        self.applied_bytes += command.header.len() + command.payload.len();
                        outputs.push(Output::Applied { position: entry.position, outcome: applied.outcome });
                    }
                    Err(error) => {
                        let reason =
                            format!("log entry {} of group {} cannot be applied: {error}", index.0, self.group);
                        return self.stop(reason, outputs);
                    }
                },
            }
            if !mutations.is_empty() {
                store.apply(self.group, index.0, mutations);
            }
            self.applied = entry.position;
            if holdfast_planted::is(Bug::SnapshotAfterBatch) && keeping == Some(Keeping::Keep) {
                late = keeping.take();
            }
            if self.applied.index == self.apply_to {
                keeping = keeping.or(late.take());
            }
            if let Some(keeping) = keeping
                && let Err(error) = self.keep(store, keeping)
            {
                return self.stop(error.to_string(), outputs);
            }
        }
        if let Some(term) = self.serving_when_applied.take_if(|term| *term <= self.applied.term) {
            outputs.push(Output::Serving(term));
        }
        let applied = self.applied.index;
        for (_, token) in self.reads.extract_if(.., |(index, _)| *index <= applied) {
            outputs.push(Output::ReadReady { token });
        }
    }

    /// What the entry applied last says of snapshots.
    fn keep(&mut self, store: &mut Store, keeping: Keeping) -> Result<(), StoreError> {
        let index = self.applied.index.0;
        match keeping {
            Keeping::Drop { index: snapshot } => {
                store.delete_snapshot(self.group, snapshot, index);
                Ok(())
            }
            Keeping::Keep => store.take_snapshot(self.group, index, self.group_state()),
        }
    }

    /// As of what was applied.
    fn group_state(&self) -> GroupState {
        let snapshot = Snapshot { configuration: self.configuration.clone(), machine: self.machine.encode_state() };
        GroupState {
            hard_state: self.encoded_hard_state(),
            position: codec::encode_position(self.applied),
            state: snapshot.encode(),
        }
    }

    fn start_checkpoint(&mut self, store: &mut Store, outputs: &mut Vec<Output<S::Outcome>>) {
        if self.checkpoint_running || self.stopped {
            return;
        }
        let state = self.group_state();
        let snapshot = state.state.clone();
        match store.checkpoint(self.group, self.applied.index.0, state) {
            Ok(()) => {
                self.rebuilds.note_checkpoint(self.applied, snapshot);
                self.checkpoint_running = true;
                self.checkpoint_due = false;
                self.applied_bytes = 0;
            }
            // No space for the write-back now: tried again with the next event, nothing is lost meanwhile.
            Err(StoreError::Full | StoreError::Busy) => {}
            Err(error) => self.stop(error.to_string(), outputs),
        }
    }

    /// The lowest index to compact to so that at most [`KEPT_BYTES_MAX`] of log stay below the checkpoint, or as much
    /// as rebuilds may keep.
    fn kept_for_laggards(&self, now: Timestamp) -> LogIndex {
        let base = self.raft.status().base.index;
        let pinned = self.rebuilds.pinned(now);
        let (mut index, mut bytes) = (self.checkpointed, 0);
        while index > base {
            let Some(entry) = self.raft.entry(index) else { break };
            if let Body::Command(command) = &entry.body {
                bytes += command.header.len() + command.payload.len();
            }
            let wanted = pinned.is_some_and(|pinned| index > pinned);
            if bytes > if wanted { LOG_KEPT_BYTES_MAX } else { KEPT_BYTES_MAX } {
                return index;
            }
            index = LogIndex(index.0 - 1);
        }
        base
    }

    fn release_log(&mut self, context: &mut Context<'_>, to: LogIndex) {
        if to > self.raft.status().base.index {
            self.raft.compact(to);
        }
        context.store.release(self.group, to.0);
    }

    fn stop(&mut self, reason: String, outputs: &mut Vec<Output<S::Outcome>>) {
        if !self.stopped {
            self.stopped = true;
            outputs.push(Output::Stopped { reason });
        }
    }
}

fn log_pressed(store: &Store) -> bool {
    let usage = store.usage();
    usage.wal_used >= usage.wal_total / 4 * 3
}

fn record<S: StateMachine>(entry: &Entry<LogCommand>) -> Record {
    let mut header = BytesMut::with_capacity(64);
    codec::put_entry_header(&mut header, entry);
    let (payload, at) = match &entry.body {
        Body::Command(command) => (command.payload.clone(), S::payload_at(command)),
        Body::Noop | Body::Configuration(_) => (Bytes::new(), None),
    };
    Record { index: entry.position.index.0, header: header.freeze(), payload, at }
}
