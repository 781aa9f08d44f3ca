//! [`VolumeGroup`]: one volume's replica and, while it leads, the requests in its care.
//!
//! Invariants:
//! 1. A mutation is answered only with the outcome of its own log entry, applied here.
//! 2. A read is answered only with committed state at a moment at which this replica provably led.
//! 3. Losing the leadership answers `NotLeader` to every open request and forgets it: its fate is the next leader's.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use holdfast_block::{Error, Operation};
use holdfast_consensus::raft::Refusal;
use holdfast_consensus::{LogIndex, Message, Position, Term};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{self, Instance, Reply, Request, Session, Stamp};
use holdfast_replica::{LogCommand, Output, Replica};
use holdfast_store::ReadError;
use holdfast_volume::{Admission, BlockRange, Command, Outcome, Step};

use crate::core::{ClientId, Core, ReadPurpose};
use crate::machine::VolumeMachine;

type Outputs = Vec<Output<Outcome>>;

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
    Attachment { client: ClientId, request: Request },
}

/// A read of a client on its way: first the right to serve it, then the bytes.
struct ClientRead {
    asker: Asker,
    stamp: Stamp,
    /// `None` for a flush, which needs the first half only.
    range: Option<BlockRange>,
}

pub(crate) struct VolumeGroup {
    pub(crate) replica: Replica<VolumeMachine>,
    admission: Admission,
    serving: Option<Term>,
    next_ticket: u64,
    tickets: BTreeMap<u64, Asker>,
    proposals: BTreeMap<LogIndex, (Term, Proposal)>,
    reads: BTreeMap<u64, ClientRead>,
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
            reads: BTreeMap::new(),
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

    pub(crate) fn on_client_closed(&mut self, client: ClientId) {
        self.clients.remove(&client);
        // What is in the log stays in the log; only nobody waits for it any more.
        self.tickets.retain(|_, asker| asker.client != client);
        self.reads.retain(|_, read| read.asker.client != client);
    }

    pub(crate) fn on_client(&mut self, core: &mut Core, client: ClientId, request: Request) {
        self.clients.insert(client);
        if self.serving.is_none() {
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
            return;
        }
        match request {
            Request::Io { stamp, seen, operation, .. } => self.on_io(core, client, stamp, seen, operation),
            request => self.on_attachment(core, client, request),
        }
    }

    fn on_io(&mut self, core: &mut Core, client: ClientId, stamp: Stamp, seen: Position, operation: Operation) {
        let asker = Asker { client, session: stamp.session, sequence: stamp.sequence };
        if seen.term > self.replica.status().term {
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
                let range = BlockRange::covering(offset, length);
                self.start_read(core, ClientRead { asker, stamp, range: Some(range) });
            }
            Operation::Flush => self.start_read(core, ClientRead { asker, stamp, range: None }),
            operation => {
                self.next_ticket += 1;
                let ticket = self.next_ticket;
                self.tickets.insert(ticket, asker);
                let steps = self.admission.admit(&self.replica.machine().volume, ticket, stamp, operation);
                self.run_steps(core, steps);
            }
        }
    }

    fn start_read(&mut self, core: &mut Core, read: ClientRead) {
        let token = core.next_token();
        let client = read.asker.client;
        self.reads.insert(token, read);
        let mut outputs = Outputs::new();
        let result = self.replica.read(&mut core.context(), token, &mut outputs);
        if result.is_err() {
            self.reads.remove(&token);
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
        }
        self.run_outputs(core, outputs);
    }

    fn on_attachment(&mut self, core: &mut Core, client: ClientId, request: Request) {
        let command = match &request {
            Request::Attach { holder, instance, take_over, .. } => {
                Command::Attach { holder: holder.clone(), instance: *instance, take_over: *take_over }
            }
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

    fn propose(&mut self, core: &mut Core, command: LogCommand, proposal: Proposal) {
        let mut outputs = Outputs::new();
        match self.replica.propose(&mut core.context(), command, &mut outputs) {
            Ok(position) => {
                // A group of one may have applied it already: its output is still in `outputs`.
                self.proposals.insert(position.index, (position.term, proposal));
            }
            Err(refusal) => self.on_refused(core, &proposal, &refusal),
        }
        self.run_outputs(core, outputs);
    }

    fn on_refused(&mut self, core: &mut Core, proposal: &Proposal, _refusal: &Refusal) {
        let client = match proposal {
            Proposal::Attachment { client, .. } => Some(*client),
            Proposal::Io(ticket) => self.tickets.get(ticket).map(|asker| asker.client),
        };
        if let Some(client) = client {
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
        }
        // What the admission ordered behind this one relies on it: all of it is asked again.
        self.forget_requests(core);
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

    pub(crate) fn run_outputs(&mut self, core: &mut Core, outputs: Outputs) {
        let group = self.replica.group();
        core.touched.insert(group);
        for output in outputs {
            match output {
                Output::Send { to, message } => self.send(core, to, &message),
                Output::Applied { position, outcome } => self.on_applied(core, position, outcome),
                Output::BecameLeader(_) => {}
                Output::Serving(term) => {
                    self.serving = Some(term);
                    for client in &self.clients {
                        let reply = Reply::Leading { volume: group.volume, term };
                        core.effects.clients.push((*client, reply));
                    }
                    core.changed.insert(group);
                }
                Output::LostLeadership(_) => {
                    self.serving = None;
                    self.forget_requests(core);
                    core.changed.insert(group);
                }
                Output::ReadReady { token } => self.on_read_ready(core, token),
                Output::ReadFailed { token } => {
                    if let Some(read) = self.reads.remove(&token) {
                        let reply = self.not_leader();
                        core.effects.clients.push((read.asker.client, reply));
                    }
                }
                Output::NeedsDelta { .. } => {
                    core.changed.insert(group);
                }
                Output::Stopped { reason } => {
                    self.stopped = Some(reason);
                    self.serving = None;
                    self.forget_requests(core);
                    core.changed.insert(group);
                }
            }
        }
    }

    fn send(&self, core: &mut Core, to: holdfast_id::ReplicaId, message: &Message<LogCommand>) {
        if let Some(node) = self.replica.node_of(to) {
            core.send_raft(node, self.replica.group(), self.replica.id(), to, message);
        }
    }

    fn on_applied(&mut self, core: &mut Core, position: Position, outcome: Outcome) {
        if let Outcome::Resized { geometry } = &outcome {
            for client in &self.clients {
                let reply = Reply::Resized { volume: self.volume(), geometry: *geometry };
                core.effects.clients.push((*client, reply));
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
                let reply = attachment_reply(self.volume(), request, outcome);
                core.effects.clients.push((client, reply));
            }
        }
    }

    fn on_read_ready(&mut self, core: &mut Core, token: u64) {
        let Some(read) = self.reads.get(&token) else { return };
        if !self.replica.machine().volume.holds(read.stamp.epoch, read.stamp.session) {
            let asker = read.asker.clone();
            self.reads.remove(&token);
            return self.answer(core, &asker, Err(Error::Fenced));
        }
        match read.range {
            Some(range) => {
                let purpose = ReadPurpose::Client { token };
                core.read(self.replica.group(), range.first_block, range.count, purpose);
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
            ReadPurpose::Client { token } => {
                let Some(read) = self.reads.remove(&token) else { return };
                let range = read.range.expect("only reads of a range reach the store");
                self.answer(core, &read.asker, result.map(|bytes| range.trim(&bytes)));
            }
        }
    }

    fn answer(&self, core: &mut Core, asker: &Asker, result: Result<Bytes, Error>) {
        let status = self.replica.status();
        let reply = Reply::Io {
            volume: self.volume(),
            session: asker.session,
            sequence: asker.sequence,
            seen: Position { term: status.term, index: self.replica.applied().index },
            result,
        };
        core.effects.clients.push((asker.client, reply));
    }

    fn not_leader(&self) -> Reply {
        let status = self.replica.status();
        let elsewhere = status.leader.filter(|leader| *leader != self.replica.id());
        let leader: Option<NodeId> = elsewhere.and_then(|leader| self.replica.node_of(leader));
        Reply::NotLeader { volume: self.volume(), term: status.term, leader }
    }

    fn forget_requests(&mut self, core: &mut Core) {
        self.admission.clear();
        let mut askers: BTreeSet<ClientId> = std::mem::take(&mut self.tickets).into_values().map(|a| a.client).collect();
        askers.extend(std::mem::take(&mut self.reads).into_values().map(|read| read.asker.client));
        for (_, proposal) in std::mem::take(&mut self.proposals).into_values() {
            if let Proposal::Attachment { client, .. } = proposal {
                askers.insert(client);
            }
        }
        for client in askers {
            let reply = self.not_leader();
            core.effects.clients.push((client, reply));
        }
    }
}

/// The one mapping from the outcome of an attachment's log entry to what its asker hears.
fn attachment_reply(volume: VolumeId, request: Request, outcome: Outcome) -> Reply {
    let instance: Option<Instance> = match &request {
        Request::Attach { instance, .. } | Request::OpenSession { instance, .. } => Some(*instance),
        _ => None,
    };
    match outcome {
        Outcome::Attached { epoch, session, geometry, formatted } => Reply::Attached {
            volume,
            instance: instance.expect("only an attach or an opened session attaches"),
            epoch,
            session,
            geometry,
            formatted,
        },
        Outcome::Detached { epoch } => Reply::Detached { volume, epoch },
        Outcome::FormattedSet { epoch } => Reply::FormattedSet { volume, epoch },
        Outcome::Held { holder, epoch } => {
            Reply::Refused { volume, instance, reason: session::Refusal::Held { holder, epoch } }
        }
        _ => {
            let epoch = match request {
                Request::OpenSession { epoch, .. } | Request::Detach { epoch, .. } => epoch,
                Request::SetFormatted { epoch, .. } => epoch,
                Request::Attach { .. } | Request::Io { .. } => session::Epoch(0),
            };
            Reply::Refused { volume, instance, reason: session::Refusal::Stale { epoch } }
        }
    }
}
