//! [`VolumeGroup`]: one volume's replica and, while it leads, the requests in its care.
//!
//! Invariants:
//! 1. A mutation is answered only with the outcome of its own log entry, applied here.
//! 2. A read is answered only with committed state at a moment at which this replica provably led.
//! 3. Losing the leadership answers `NotLeader` to every open request and forgets it: its fate is the next leader's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use holdfast_block::{Error, Operation};
use holdfast_consensus::{LogIndex, Position, Refusal, Term};
use holdfast_id::{NodeId, SnapshotId, VolumeId};
use holdfast_protocol::session::{self, Epoch, Instance, Reply, Request, Session, Stamp};
use holdfast_replica::{LogCommand, Output, Replica};
use holdfast_store::group::ReadError;
use holdfast_volume::{Admission, AdmitError, Command, Name, Outcome, ReadRange, Step};

use crate::access::{self, ClientRole, Denial};
use crate::admin::{AdminError, AdminReply, AttachVolume};
use crate::attaching::{Attaching, Decision, Order};
use crate::core::{ClientId, Core, NotLeader, ReadPurpose, ReplicaNodes};
use crate::machine::VolumeMachine;

/// Who asked, and how to find the request in the answer.
#[derive(Clone, Debug)]
struct Asker {
    client: ClientId,
    session: Session,
    sequence: u64,
}

/// A log entry whose outcome somebody waits for.
enum Proposal {
    /// A write, by its ticket in the admission.
    Io(u64),
    Attachment {
        client: ClientId,
        request: Request,
    },
    Resize {
        token: u64,
    },
    /// Of the control API.
    Order {
        token: u64,
        order: Order,
    },
}

/// A read of a client on its way: first the right to serve it, then the bytes.
struct ClientRead {
    asker: Asker,
    stamp: Stamp,
    /// `None` for a flush, which needs the first half only.
    range: Option<ReadRange>,
}

pub(crate) struct VolumeGroup {
    pub(crate) replica: Replica<VolumeMachine>,
    admission: Admission,
    serving: Option<Term>,
    /// Never used twice, also not over a lost leadership.
    next_ticket: u64,
    tickets: BTreeMap<u64, Asker>,
    proposals: BTreeMap<LogIndex, (Term, Proposal)>,
    /// Proposals that consensus could not take yet, in order; bounded by the admission's own limits and the clients'.
    backlog: VecDeque<(LogCommand, Proposal)>,
    reads: BTreeMap<u64, ClientRead>,
    /// Attachments asked for by the control API that wait for the right to look at the state.
    attaching: BTreeMap<u64, Attaching>,
    /// Connections that have asked for this volume: they hear when this node begins to serve it.
    clients: BTreeSet<ClientId>,
    stopped: Option<String>,
}

impl VolumeGroup {
    pub(crate) fn new(replica: Replica<VolumeMachine>) -> VolumeGroup {
        VolumeGroup {
            replica,
            admission: Admission::new(),
            serving: None,
            next_ticket: 0,
            tickets: BTreeMap::new(),
            proposals: BTreeMap::new(),
            backlog: VecDeque::new(),
            reads: BTreeMap::new(),
            attaching: BTreeMap::new(),
            clients: BTreeSet::new(),
            stopped: None,
        }
    }

    pub(crate) fn volume(&self) -> VolumeId {
        self.replica.group().volume
    }

    pub(crate) fn serving(&self) -> bool {
        self.serving.is_some()
    }

    pub(crate) fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// The volume is gone for good: whoever waits hears that this node has no replica of it.
    pub(crate) fn on_deleted(&mut self, core: &mut Core) {
        self.serving = None;
        self.forget_requests(core);
        let volume = self.volume();
        for client in std::mem::take(&mut self.clients) {
            let reason = session::Refusal::UnknownVolume;
            core.effects.clients.push((client, Reply::Refused { volume, instance: None, reason }));
        }
    }

    pub(crate) fn on_client_closed(&mut self, client: ClientId) {
        self.clients.remove(&client);
        // What is in the log stays in the log; only nobody waits for it any more.
        self.tickets.retain(|_, asker| asker.client != client);
        self.reads.retain(|_, read| read.asker.client != client);
    }

    pub(crate) fn on_client(&mut self, core: &mut Core, client: ClientId, role: &ClientRole, request: Request) {
        let new = self.clients.insert(client);
        // One that looks for the leader may look in the wrong places.
        if new || self.serving.is_none() {
            self.tell_replicas(core, client);
        }
        if self.serving.is_none() {
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
            return;
        }
        if let Err(denial) = access::judge(role, &self.replica.machine().volume, &request) {
            return self.deny(core, client, &request, &denial);
        }
        match request {
            Request::Io { stamp, seen, operation, .. } => self.on_io(core, client, stamp, seen, operation),
            request => self.on_attachment(core, client, request),
        }
    }

    fn deny(&self, core: &mut Core, client: ClientId, request: &Request, denial: &Denial) {
        let instance = match request {
            // Its answer has no room for a reason, and whoever asks for another's attachment has none of its own here.
            Request::Io { stamp, .. } => {
                let asker = Asker { client, session: stamp.session, sequence: stamp.sequence };
                return self.answer(core, &asker, Err(Error::Fenced));
            }
            Request::Attach { instance, .. } | Request::OpenSession { instance, .. } => Some(*instance),
            Request::Detach { .. } | Request::SetFormatted { .. } => None,
        };
        let reason = session::Refusal::NotAllowed { reason: denial.to_string() };
        core.effects.clients.push((client, Reply::Refused { volume: self.volume(), instance, reason }));
    }

    /// Members may have moved since the client learned where they are.
    fn tell_replicas(&self, core: &mut Core, client: ClientId) {
        let term = self.serving.unwrap_or_default();
        let mut nodes: Vec<NodeId> = {
            let configuration = self.replica.configuration();
            configuration.members.iter().chain(&configuration.outgoing).map(|member| member.node).collect()
        };
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() {
            return; // A new copy, which has not heard of its group.
        }
        core.effects.replicas.push((client, ReplicaNodes { volume: self.volume(), term, nodes }));
    }

    fn on_io(&mut self, core: &mut Core, client: ClientId, stamp: Stamp, seen: Position, operation: Operation) {
        let asker = Asker { client, session: stamp.session, sequence: stamp.sequence };
        if seen.term > self.replica.term() {
            // The client has met a later leader: this one is deposed and does not know yet.
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
            return;
        }
        if let Err(error) = self.replica.machine().volume.geometry().check(&operation) {
            return self.answer(core, &asker, Err(error));
        }
        match operation {
            Operation::Read { offset, length } => {
                let range = Some(ReadRange::of(offset, length));
                self.start_read(core, ClientRead { asker, stamp, range });
            }
            Operation::Flush => self.start_read(core, ClientRead { asker, stamp, range: None }),
            operation => {
                self.next_ticket += 1;
                let ticket = self.next_ticket;
                match self.admission.admit(&self.replica.machine().volume, ticket, stamp, operation) {
                    Ok(steps) => {
                        self.tickets.insert(ticket, asker);
                        self.run_steps(core, steps);
                    }
                    // The client resends what it has no answer for; by then there is room.
                    Err(AdmitError::Busy) => {}
                    // No honest client does this: it hears nothing and its connection's owner sees no progress.
                    Err(AdmitError::MalformedStamp | AdmitError::NotAMutation) => {
                        self.answer(core, &asker, Err(Error::Misaligned));
                    }
                }
            }
        }
    }

    fn start_read(&mut self, core: &mut Core, read: ClientRead) {
        let token = core.next_token();
        let client = read.asker.client;
        self.reads.insert(token, read);
        if self.replica.read(&mut core.context(), token).is_err() {
            self.reads.remove(&token);
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
        }
    }

    fn on_attachment(&mut self, core: &mut Core, client: ClientId, request: Request) {
        let command = match &request {
            Request::Attach { holder, instance, take_over, .. } => match Name::new(holder.clone()) {
                Ok(holder) => Command::Attach { holder, instance: *instance, take_over: *take_over },
                Err(error) => {
                    let reason = session::Refusal::NotAllowed { reason: error.to_string() };
                    let reply = Reply::Refused { volume: self.volume(), instance: Some(*instance), reason };
                    core.effects.clients.push((client, reply));
                    return;
                }
            },
            Request::OpenSession { epoch, instance, .. } => Command::OpenSession { epoch: *epoch, instance: *instance },
            Request::Detach { epoch, .. } => Command::Detach { epoch: *epoch },
            Request::SetFormatted { epoch, formatted, .. } => {
                Command::SetFormatted { epoch: *epoch, formatted: *formatted }
            }
            Request::Io { .. } => unreachable!("requests for I/O have their own way"),
        };
        let command = LogCommand { header: command.encode(), payload: Bytes::new() };
        self.propose(core, command, Proposal::Attachment { client, request });
    }

    /// Proposes a command that no client asked for; `token` comes back with its fate.
    pub(crate) fn propose_resize(&mut self, core: &mut Core, size_bytes: u64, token: u64) {
        let command = Command::Resize { size_bytes };
        let command = LogCommand { header: command.encode(), payload: Bytes::new() };
        self.propose(core, command, Proposal::Resize { token });
    }

    /// Attachments of the control API follow one another: what one came to is known before the next is judged.
    fn attachment_under_way(&self) -> bool {
        let proposed = self.proposals.values().map(|(_, proposal)| proposal);
        let waiting = self.backlog.iter().map(|(_, proposal)| proposal);
        proposed.chain(waiting).any(|proposal| match proposal {
            Proposal::Order { order, .. } => order.is_attachment(),
            Proposal::Attachment { .. } => true,
            Proposal::Io(_) | Proposal::Resize { .. } => false,
        })
    }

    /// The right to look at the state comes as [`VolumeGroup::on_attach_ready`], or the loss of the leadership.
    pub(crate) fn on_attach(&mut self, core: &mut Core, token: u64, attach: AttachVolume) {
        let holder = match Name::new(attach.holder) {
            Ok(holder) => holder,
            Err(error) => return fail(core, token, AdminError::Holder { reason: error.to_string() }),
        };
        if self.serving.is_none() {
            return fail(core, token, self.led_elsewhere());
        }
        let read = core.next_token();
        let (instance, take_over) = (attach.instance, attach.take_over);
        self.attaching.insert(read, Attaching { token, holder, instance, take_over });
        if self.replica.read(&mut core.context(), read).is_err() {
            self.attaching.remove(&read);
            fail(core, token, self.led_elsewhere());
        }
    }

    fn on_attach_ready(&mut self, core: &mut Core, attaching: Attaching) {
        let token = attaching.token;
        if self.attachment_under_way() {
            return fail(core, token, AdminError::AttachmentUnderWay);
        }
        match attaching.decide(&self.replica.machine().volume) {
            Decision::Answer(reply) => core.effects.admin.push((token, reply)),
            Decision::Propose(command) => self.propose_order(core, token, &command, Order::Attach),
        }
    }

    pub(crate) fn on_detach(&mut self, core: &mut Core, token: u64, epoch: Epoch) {
        if self.serving.is_none() {
            return fail(core, token, self.led_elsewhere());
        }
        if self.attachment_under_way() {
            return fail(core, token, AdminError::AttachmentUnderWay);
        }
        self.propose_order(core, token, &Command::Detach { epoch }, Order::Detach { epoch });
    }

    pub(crate) fn on_take_snapshot(&mut self, core: &mut Core, token: u64, snapshot: SnapshotId, name: String) {
        match Name::new(name) {
            Ok(name) => self.on_snapshot_order(core, token, &Command::TakeSnapshot { snapshot, name }),
            Err(error) => fail(core, token, AdminError::SnapshotName { reason: error.to_string() }),
        }
    }

    pub(crate) fn on_delete_snapshot(&mut self, core: &mut Core, token: u64, snapshot: SnapshotId) {
        self.on_snapshot_order(core, token, &Command::DeleteSnapshot { snapshot });
    }

    fn on_snapshot_order(&mut self, core: &mut Core, token: u64, command: &Command) {
        if self.serving.is_none() {
            return fail(core, token, self.led_elsewhere());
        }
        self.propose_order(core, token, command, Order::Snapshot);
    }

    fn propose_order(&mut self, core: &mut Core, token: u64, command: &Command, order: Order) {
        let command = LogCommand { header: command.encode(), payload: Bytes::new() };
        self.propose(core, command, Proposal::Order { token, order });
    }

    fn led_elsewhere(&self) -> AdminError {
        AdminError::NotLeader { leader: self.leader_elsewhere() }
    }

    fn propose(&mut self, core: &mut Core, command: LogCommand, proposal: Proposal) {
        self.backlog.push_back((command, proposal));
        self.work_off_backlog(core);
    }

    fn work_off_backlog(&mut self, core: &mut Core) {
        while let Some((command, proposal)) = self.backlog.pop_front() {
            match self.replica.propose(&mut core.context(), command.clone()) {
                Ok(position) => {
                    self.proposals.insert(position.index, (position.term, proposal));
                }
                // Worth another try when the next message or completion arrives; order is kept.
                Err(Refusal::NoLease | Refusal::Busy | Refusal::Transferring) => {
                    self.backlog.push_front((command, proposal));
                    return;
                }
                Err(Refusal::NoRoom) => {
                    if let Proposal::Io(ticket) = proposal {
                        let steps = self.admission.on_refused(ticket, Error::NoSpace);
                        self.run_steps(core, steps);
                    }
                }
                Err(_) => {
                    self.backlog.push_front((command, proposal));
                    return self.forget_requests(core);
                }
            }
        }
    }

    fn run_steps(&mut self, core: &mut Core, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Propose { ticket, header, payload } => {
                    self.propose(core, LogCommand { header, payload }, Proposal::Io(ticket));
                }
                Step::Read { read, first_block, count } => {
                    let purpose = ReadPurpose::Edges { read };
                    core.read(self.replica.group(), first_block, count, purpose);
                }
                Step::Complete { ticket, result } => {
                    if let Some(asker) = self.tickets.remove(&ticket) {
                        self.answer(core, &asker, result.map(|()| Bytes::new()));
                    }
                }
            }
        }
    }

    /// Carries out what this step's events asked of the replica, until it asks for nothing more.
    pub(crate) fn settle(&mut self, core: &mut Core) {
        // Once: a proposal that waits for the lease makes the replica ask for it each time it is tried.
        self.work_off_backlog(core);
        loop {
            let mut outputs = Vec::new();
            self.replica.settle(&mut core.context(), &mut outputs);
            if outputs.is_empty() {
                return;
            }
            for output in outputs {
                self.on_output(core, output);
            }
        }
    }

    pub(crate) fn on_output(&mut self, core: &mut Core, output: Output<Outcome>) {
        let group = self.replica.group();
        match output {
            Output::Send { to, message } => {
                if let Some(node) = self.replica.node_of(to) {
                    core.send_raft(node, group, self.replica.id(), to, &message);
                }
            }
            Output::Applied { position, outcome } => self.on_applied(core, position, &outcome),
            Output::BecameLeader(_) => {
                core.elected_in_joint_change += u64::from(self.replica.configuration().is_joint());
            }
            Output::DirectoryChanged if self.serving.is_none() => core.members_changed = true,
            Output::DirectoryChanged => {
                core.members_changed = true;
                let clients: Vec<ClientId> = self.clients.iter().copied().collect();
                clients.into_iter().for_each(|client| self.tell_replicas(core, client));
            }
            Output::SendRebuild { to, message } => {
                if let Some(node) = self.replica.node_of(to) {
                    core.send_rebuild(node, group, self.replica.id(), to, &message);
                }
            }
            Output::Fetch { request, fetch } => core.fetch(group, request, fetch),
            Output::Serving(term) => {
                self.serving = Some(term);
                let geometry = self.replica.machine().volume.geometry();
                for client in &self.clients {
                    let reply = Reply::Leading { volume: group.volume, term };
                    core.effects.clients.push((*client, reply));
                    self.tell_replicas(core, *client);
                    // The leader before may not have come to tell it.
                    core.effects.clients.push((*client, Reply::Resized { volume: group.volume, geometry }));
                }
            }
            Output::LostLeadership(_) => {
                self.serving = None;
                self.forget_requests(core);
            }
            Output::ReadReady { token } => self.on_read_ready(core, token),
            Output::ReadFailed { token } => {
                if let Some(read) = self.reads.remove(&token) {
                    let reply = self.not_leader();
                    core.effects.clients.push((read.asker.client, reply));
                } else if let Some(attaching) = self.attaching.remove(&token) {
                    fail(core, attaching.token, self.led_elsewhere());
                }
            }
            Output::Stopped { reason } => {
                self.stopped = Some(reason);
                self.serving = None;
                self.forget_requests(core);
            }
        }
    }

    fn on_applied(&mut self, core: &mut Core, position: Position, outcome: &Outcome) {
        // A follower may be ahead of the leader, which would refuse what its clients then ask for.
        if *outcome == Outcome::Resized && self.serving.is_some() {
            let geometry = self.replica.machine().volume.geometry();
            for client in &self.clients {
                core.effects.clients.push((*client, Reply::Resized { volume: self.volume(), geometry }));
            }
        }
        let Some((term, proposal)) = self.proposals.remove(&position.index) else { return };
        if term != position.term {
            return; // Another leader's entry took the place; who asked was told when the leadership was lost.
        }
        match proposal {
            Proposal::Io(ticket) => {
                let steps = self.admission.on_applied(ticket, outcome);
                self.run_steps(core, steps);
            }
            Proposal::Attachment { client, request } => {
                let reply = self.attachment_reply(&request, outcome);
                core.effects.clients.push((client, reply));
            }
            Proposal::Resize { token } => core.resized.push((token, Ok(()))),
            Proposal::Order { token, order } => core.effects.admin.push((token, order.reply(outcome))),
        }
    }

    fn on_read_ready(&mut self, core: &mut Core, token: u64) {
        if let Some(attaching) = self.attaching.remove(&token) {
            return self.on_attach_ready(core, attaching);
        }
        let Some(read) = self.reads.get(&token) else { return };
        if !self.replica.machine().volume.serves(read.stamp.epoch, read.stamp.session) {
            let asker = read.asker.clone();
            self.reads.remove(&token);
            return self.answer(core, &asker, Err(Error::Fenced));
        }
        match &read.range {
            Some(range) => {
                let (first_block, count) = (range.first_block, range.count);
                let purpose = ReadPurpose::Client { token };
                core.read(self.replica.group(), first_block, count, purpose);
            }
            None => {
                let asker = read.asker.clone();
                self.reads.remove(&token);
                self.answer(core, &asker, Ok(Bytes::new()));
            }
        }
    }

    pub(crate) fn on_store_read(&mut self, core: &mut Core, purpose: ReadPurpose, result: Result<Bytes, ReadError>) {
        let result = result.map_err(|error| match error {
            ReadError::Corrupt { .. } => Error::Corrupt,
            _ => Error::Unavailable,
        });
        match purpose {
            ReadPurpose::Edges { read } => {
                let steps = self.admission.on_read(read, result);
                self.run_steps(core, steps);
            }
            ReadPurpose::Rebuild { .. } => unreachable!("answered to the replica itself"),
            ReadPurpose::Client { token } => {
                let Some(read) = self.reads.remove(&token) else { return };
                let range = read.range.expect("only reads of a range reach the store");
                self.answer(core, &read.asker, result.map(|bytes| bytes.slice(range.trim)));
            }
        }
    }

    fn answer(&self, core: &mut Core, asker: &Asker, result: Result<Bytes, Error>) {
        let reply = Reply::Io {
            volume: self.volume(),
            session: asker.session,
            sequence: asker.sequence,
            seen: Position { term: self.replica.term(), index: self.replica.applied().index },
            result,
        };
        core.effects.clients.push((asker.client, reply));
    }

    fn not_leader(&self) -> Reply {
        Reply::NotLeader { volume: self.volume(), term: self.replica.term(), leader: self.leader_elsewhere() }
    }

    fn leader_elsewhere(&self) -> Option<NodeId> {
        let elsewhere = self.replica.leader().filter(|leader| *leader != self.replica.id());
        elsewhere.and_then(|leader| self.replica.node_of(leader))
    }

    fn forget_requests(&mut self, core: &mut Core) {
        self.admission.clear();
        let mut askers: BTreeSet<ClientId> =
            std::mem::take(&mut self.tickets).into_values().map(|a| a.client).collect();
        askers.extend(std::mem::take(&mut self.reads).into_values().map(|read| read.asker.client));
        let proposals = std::mem::take(&mut self.proposals).into_values().map(|(_, proposal)| proposal);
        let backlog = std::mem::take(&mut self.backlog).into_iter().map(|(_, proposal)| proposal);
        for proposal in proposals.chain(backlog) {
            match proposal {
                Proposal::Io(_) => {}
                Proposal::Attachment { client, .. } => {
                    askers.insert(client);
                }
                Proposal::Resize { token } => core.resized.push((token, Err(NotLeader))),
                Proposal::Order { token, .. } => fail(core, token, self.led_elsewhere()),
            }
        }
        for attaching in std::mem::take(&mut self.attaching).into_values() {
            fail(core, attaching.token, self.led_elsewhere());
        }
        for client in askers {
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
        }
    }

    /// The one mapping from the outcome of an attachment's log entry to what its asker hears.
    fn attachment_reply(&self, request: &Request, outcome: &Outcome) -> Reply {
        let volume = self.volume();
        let instance: Option<Instance> = match request {
            Request::Attach { instance, .. } | Request::OpenSession { instance, .. } => Some(*instance),
            _ => None,
        };
        let state = &self.replica.machine().volume;
        match (request, outcome) {
            (_, Outcome::Attached { epoch, session }) => Reply::Attached {
                volume,
                instance: instance.expect("only an attach or an opened session attaches"),
                epoch: *epoch,
                session: *session,
                geometry: state.geometry(),
                formatted: state.formatted(),
            },
            (Request::Detach { epoch, .. }, Outcome::Detached) => Reply::Detached { volume, epoch: *epoch },
            (Request::SetFormatted { epoch, .. }, Outcome::FormattedSet) => {
                Reply::FormattedSet { volume, epoch: *epoch }
            }
            (_, Outcome::Held { holder, epoch }) => {
                let reason = session::Refusal::Held { holder: holder.to_string(), epoch: *epoch };
                Reply::Refused { volume, instance, reason }
            }
            (_, Outcome::FormattedRefused { formatted }) => {
                let reason = format!("the volume is {formatted:?} already; it only goes forward");
                Reply::Refused { volume, instance, reason: session::Refusal::NotAllowed { reason } }
            }
            _ => {
                // The one that was asked for: whoever hears it knows that it is the one meant.
                let epoch = match request {
                    Request::OpenSession { epoch, .. }
                    | Request::Detach { epoch, .. }
                    | Request::SetFormatted { epoch, .. } => *epoch,
                    Request::Attach { .. } | Request::Io { .. } => state.epoch(),
                };
                Reply::Refused { volume, instance, reason: session::Refusal::Stale { epoch } }
            }
        }
    }
}

fn fail(core: &mut Core, token: u64, error: AdminError) {
    core.effects.admin.push((token, AdminReply::Failed(error)));
}
