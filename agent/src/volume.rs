//! One volume on this machine: its client, its record, its socket and the connections of its users.

use std::collections::BTreeMap;

use holdfast_block::{Completion, Geometry, Operation, RequestId};
use holdfast_client::{Client, ClientEffect, ClientOptions, Mode, Phase};
use holdfast_consensus::Timestamp;
use holdfast_id::NodeId;
use holdfast_nbd::Export;
use holdfast_protocol::session::{Epoch, Instance, Refusal, Reply};
use mio::{Interest, Registry, Token};

use crate::config::{AttachMode, VolumeSpec};
use crate::control::{Code, Failure, VolumeState, VolumeStatus};
use crate::gap::Gap;
use crate::nbd::{NbdConnection, Turn};
use crate::peers::Peers;
use crate::record::{Record, Recorded, Recorder};
use crate::socket::{ServerSocket, SocketError};

/// Connections one device serves at once; the next ones are closed at once.
pub(crate) const CONNECTIONS_MAX: usize = 64;
/// Data of requests that the volume has not answered; no more requests are taken above it. Sixty-four of the longest.
const BYTES_OUTSTANDING_MAX: u64 = 64 << 20;

/// What the driver of a volume lends it.
pub(crate) struct Context<'a> {
    pub now: Timestamp,
    pub peers: &'a mut Peers,
    pub recorder: &'a Recorder,
    pub registry: &'a Registry,
    /// False while the agent ends: nothing new is taken.
    pub takes_input: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Opening,
    /// The epoch is ours; its record is not durable yet.
    Recording,
    Serving,
    Fenced,
    Refused,
    Failed,
    /// The record is about to go, then the volume does.
    Forgetting,
    Gone,
}

/// Where a completion goes.
struct Route {
    slot: usize,
    serial: u64,
    id: RequestId,
    bytes: u64,
}

pub(crate) struct Volume {
    pub spec: VolumeSpec,
    /// First of the tokens of its socket (the first itself) and its connections (the next ones).
    token_base: usize,
    /// `None` where the record says fenced: such a volume asks nobody anything.
    client: Option<Client>,
    stage: Stage,
    detaching: bool,
    reason: Option<String>,
    record: Option<Record>,
    socket: Option<ServerSocket>,
    acceptable: bool,
    connections: BTreeMap<usize, NbdConnection>,
    serial_next: u64,
    routes: BTreeMap<u64, Route>,
    route_next: u64,
    bytes_outstanding: u64,
    /// The slot whose turn it is to submit.
    turn: usize,
    geometry: Option<Geometry>,
    gap: Gap,
}

impl Volume {
    /// Binds the socket and begins to attach, or to resume what is recorded.
    pub fn start(
        spec: VolumeSpec,
        holder: &str,
        record: Option<Record>,
        instance: Instance,
        token_base: usize,
        context: &mut Context<'_>,
    ) -> Result<Volume, SocketError> {
        let mode = match (record, spec.mode) {
            (Some(record), _) => Mode::Resume { epoch: Epoch(record.epoch) },
            (None, AttachMode::Attach) => Mode::Attach { take_over: false },
            (None, AttachMode::TakeOver) => Mode::Attach { take_over: true },
            (None, AttachMode::Resume { epoch }) => Mode::Resume { epoch: Epoch(epoch) },
        };
        let fenced = record.is_some_and(|record| record.fenced);
        let mut volume = Volume {
            token_base,
            client: None,
            stage: if fenced { Stage::Fenced } else { Stage::Opening },
            detaching: false,
            reason: fenced.then(|| "it was fenced before the agent restarted".into()),
            record,
            socket: None,
            acceptable: true,
            connections: BTreeMap::new(),
            serial_next: 0,
            routes: BTreeMap::new(),
            route_next: 0,
            bytes_outstanding: 0,
            turn: 0,
            geometry: None,
            gap: Gap::default(),
            spec,
        };
        if fenced {
            return Ok(volume);
        }
        let mut socket = ServerSocket::bind(&volume.spec.nbd_socket)?;
        let registered = context.registry.register(&mut socket.listener, Token(token_base), Interest::READABLE);
        registered.map_err(|source| SocketError::Io { path: volume.spec.nbd_socket.clone(), source })?;
        volume.socket = Some(socket);
        let nodes: Vec<NodeId> = volume.spec.nodes.iter().map(|entry| entry.node).collect();
        let mut options = ClientOptions::new(volume.spec.volume, nodes, holder.to_owned(), instance, mode);
        options.unavailable_after = volume.spec.unavailable_after_ms.map(std::time::Duration::from_millis);
        let mut client = Client::new(options, context.now);
        for entry in &volume.spec.nodes {
            context.peers.add(context.now, entry);
            if context.peers.is_connected(entry.node) {
                client.on_connected(context.now, entry.node);
            }
        }
        volume.client = Some(client);
        Ok(volume)
    }

    pub fn is_gone(&self) -> bool {
        self.stage == Stage::Gone
    }

    /// What a restart would find.
    pub fn record(&self) -> Option<Record> {
        self.record
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.routes.len()
    }

    pub fn state(&self) -> VolumeState {
        match self.stage {
            Stage::Fenced => VolumeState::Fenced,
            Stage::Refused => VolumeState::Refused,
            Stage::Failed => VolumeState::Failed,
            Stage::Forgetting | Stage::Gone => VolumeState::Detaching,
            Stage::Opening | Stage::Recording | Stage::Serving if self.detaching => VolumeState::Detaching,
            Stage::Opening | Stage::Recording => VolumeState::Attaching,
            Stage::Serving => VolumeState::Attached,
        }
    }

    pub fn status(&self, now: Timestamp, peers: &Peers) -> VolumeStatus {
        let client = self.client.as_ref().map(Client::status);
        let nodes: Vec<_> = self.spec.nodes.iter().map(|entry| peers.status(entry)).collect();
        let waiting = client.as_ref().and_then(|client| client.waiting_since).map(|since| now.since(since));
        let reason = self.reason.clone().or_else(|| {
            let client = client.as_ref()?;
            if matches!(client.phase, Phase::Opening | Phase::Serving | Phase::Detaching) {
                if nodes.iter().all(|node| !node.connected) {
                    return Some("no node is connected".into());
                }
                if client.leader.is_none() && (client.phase == Phase::Opening || waiting.is_some()) {
                    let refusal = client.refusal.as_ref().map(Refusal::to_string);
                    return Some(refusal.unwrap_or_else(|| "no connected node leads the volume".into()));
                }
            }
            None
        });
        let epoch = client.as_ref().and_then(|client| client.epoch).map(|epoch| epoch.0);
        VolumeStatus {
            volume: self.spec.volume,
            state: self.state(),
            reason,
            epoch: epoch.or(self.record.map(|record| record.epoch)),
            session: client.as_ref().and_then(|client| client.session).map(|session| session.0),
            leader: client.as_ref().and_then(|client| client.leader),
            term: client.as_ref().map_or(0, |client| client.term.0),
            outstanding: self.routes.len() as u64,
            waiting_ms: waiting.map_or(0, |waiting| waiting.as_millis() as u64),
            longest_gap_ms: self.gap.longest(now).as_millis() as u64,
            connections: self.connections.len(),
            size_bytes: self.geometry.map(|geometry| geometry.size_bytes),
            nbd_socket: self.spec.nbd_socket.clone(),
            nodes,
        }
    }

    /// Why it is not attached, as an answer to whoever wanted it to be; `None` while that is open.
    pub fn attach_outcome(&self) -> Option<Result<(), Failure>> {
        let failed = |code| {
            let message = self.reason.clone().unwrap_or_else(|| "it is being detached".into());
            Some(Err(Failure { code, message }))
        };
        match self.state() {
            VolumeState::Attaching => None,
            VolumeState::Attached => Some(Ok(())),
            VolumeState::Fenced => failed(Code::Fenced),
            VolumeState::Refused => failed(Code::Refused),
            VolumeState::Failed | VolumeState::Detaching => failed(Code::Failed),
        }
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        let client = self.client.as_ref().and_then(Client::deadline);
        self.connections.values().filter_map(NbdConnection::deadline).chain(client).min()
    }

    pub fn on_connected(&mut self, now: Timestamp, node: NodeId) {
        if let Some(client) = &mut self.client {
            client.on_connected(now, node);
        }
    }

    pub fn on_closed(&mut self, now: Timestamp, node: NodeId) {
        if let Some(client) = &mut self.client {
            client.on_closed(now, node);
        }
    }

    pub fn on_reply(&mut self, now: Timestamp, from: NodeId, reply: Reply) {
        if let Some(client) = &mut self.client {
            client.on_reply(now, from, reply);
        }
    }

    pub fn on_deadline(&mut self, now: Timestamp) {
        if let Some(client) = self.client.as_mut().filter(|client| client.deadline().is_some_and(|at| at <= now)) {
            client.on_deadline(now);
        }
    }

    /// An event of its socket (slot 0) or of one of its connections.
    pub fn on_ready(&mut self, slot: usize, event: &mio::event::Event) {
        if slot == 0 {
            self.acceptable = true;
        } else if let Some(connection) = self.connections.get_mut(&slot) {
            connection.on_ready(event);
        }
    }

    pub fn on_recorded(&mut self, now: Timestamp, recorded: Recorded) {
        match (recorded.result, recorded.record) {
            (Ok(()), record) => {
                self.record = record;
                match (self.stage, record) {
                    (Stage::Forgetting, None) => self.stage = Stage::Gone,
                    (Stage::Recording, Some(Record { fenced: false, .. })) => self.stage = Stage::Serving,
                    _ => {}
                }
            }
            (Err(error), record) => {
                let reason = match std::error::Error::source(&error) {
                    Some(source) => format!("{error}: {source}"),
                    None => error.to_string(),
                };
                tracing::error!(volume = %self.spec.volume, %reason, "the attachment record could not be changed");
                match (self.stage, record) {
                    (Stage::Recording, Some(_)) => {
                        // An epoch that a restart would not find again is better given back.
                        self.reason = Some(reason);
                        self.detaching = true;
                        if let Some(client) = &mut self.client {
                            client.detach(now);
                        }
                    }
                    (Stage::Forgetting, None) => {
                        self.reason = Some(reason);
                        self.stage = Stage::Failed;
                    }
                    // A fenced volume that is resumed after a restart is fenced again by the cluster.
                    _ => {}
                }
            }
        }
    }

    /// Gives the epoch back, or lets go of what has none. Refused while a client uses the device, unless `force`.
    pub fn detach(&mut self, now: Timestamp, force: bool, recorder: &Recorder) -> Result<(), Failure> {
        let users = self.connections.values().filter(|connection| connection.session.is_transmitting()).count();
        match self.stage {
            Stage::Opening | Stage::Recording | Stage::Serving if users > 0 && !force => {
                let message = format!("{users} connections use the device");
                return Err(Failure { code: Code::InUse, message });
            }
            Stage::Opening | Stage::Recording | Stage::Serving => {
                self.detaching = true;
                if let Some(client) = &mut self.client {
                    client.detach(now);
                }
            }
            Stage::Fenced | Stage::Refused | Stage::Failed => self.forget(recorder),
            Stage::Forgetting | Stage::Gone => {}
        }
        Ok(())
    }

    /// Lets everything happen that can; true where there is more to do at once.
    pub fn pump(&mut self, context: &mut Context<'_>) -> bool {
        loop {
            let mut progress = self.run_effects(context);
            // An effect may just have opened the device to those who wait at its door.
            if context.takes_input && self.stage == Stage::Serving {
                self.accept(context);
            }
            let mut more = false;
            let now = context.now;
            self.connections.retain(|_, connection| match connection.turn(now, context.takes_input) {
                Turn::Waits => true,
                Turn::MoreInput => {
                    more = true;
                    true
                }
                Turn::Ended(reason) => {
                    if let Some(reason) = reason {
                        tracing::warn!(volume = %self.spec.volume, %reason, "a client of the device is dropped");
                    }
                    false
                }
            });
            if context.takes_input {
                progress |= self.submit(now);
            }
            if !progress {
                return more;
            }
        }
    }

    /// Lets go of the nodes; to be called when the volume is gone.
    pub fn release(&mut self, peers: &mut Peers) {
        if self.client.take().is_some() {
            self.spec.nodes.iter().for_each(|entry| peers.remove(entry.node));
        }
    }

    fn accept(&mut self, context: &mut Context<'_>) {
        let (Some(socket), Some(geometry)) = (&self.socket, self.geometry) else { return };
        while self.acceptable {
            let mut stream = match socket.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.acceptable = false;
                    return;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Out of file descriptors, as a rule; the next event of the socket tries again.
                    tracing::error!(volume = %self.spec.volume, %error, "cannot accept a client of the device");
                    self.acceptable = false;
                    return;
                }
            };
            let Some(slot) = (1..=CONNECTIONS_MAX).find(|slot| !self.connections.contains_key(slot)) else {
                tracing::warn!(volume = %self.spec.volume, "more than {CONNECTIONS_MAX} clients of one device");
                continue;
            };
            let both = Interest::READABLE | Interest::WRITABLE;
            if let Err(error) = context.registry.register(&mut stream, Token(self.token_base + slot), both) {
                tracing::error!(volume = %self.spec.volume, %error, "cannot serve a client of the device");
                continue;
            }
            let export = Export::new(self.spec.volume.to_string(), geometry).expect("an identifier is a short name");
            self.serial_next += 1;
            let connection = NbdConnection::new(stream, self.serial_next, export, context.now);
            self.connections.insert(slot, connection);
        }
    }

    /// Moves requests from the sessions to the client, one connection after the other; true where there was any.
    fn submit(&mut self, now: Timestamp) -> bool {
        let Some(client) = &mut self.client else { return false };
        let mut any = false;
        let mut idle = 0;
        while idle < self.connections.len() && client.can_submit() && self.bytes_outstanding < BYTES_OUTSTANDING_MAX {
            let next = self.connections.range_mut(self.turn + 1..).next().map(|(slot, _)| *slot);
            let slot = next.or_else(|| self.connections.keys().next().copied()).unwrap_or_default();
            self.turn = slot;
            let Some(connection) = self.connections.get_mut(&slot) else { break };
            let Some(mut request) = connection.session.poll_request() else {
                idle += 1;
                continue;
            };
            (idle, any) = (0, true);
            let bytes = match &request.operation {
                Operation::Read { length, .. } => u64::from(*length),
                Operation::Write { data, .. } => data.len() as u64,
                Operation::WriteZeroes { .. } | Operation::Discard { .. } | Operation::Flush => 0,
            };
            self.route_next += 1;
            let route = Route { slot, serial: connection.serial, id: request.id, bytes };
            self.routes.insert(self.route_next, route);
            self.bytes_outstanding += bytes;
            self.gap.on_submit(now);
            request.id = RequestId(self.route_next);
            client.submit(now, request);
        }
        any
    }

    fn run_effects(&mut self, context: &mut Context<'_>) -> bool {
        let Some(client) = &mut self.client else { return false };
        let effects = client.take_effects();
        let any = !effects.is_empty();
        for effect in effects {
            match effect {
                ClientEffect::Send { to, request } => context.peers.send(context.now, to, &request),
                ClientEffect::Complete(completion) => self.on_complete(context.now, completion),
                ClientEffect::Attached { epoch, geometry, .. } => self.on_attached(epoch, geometry, context.recorder),
                ClientEffect::Refused(Refusal::Stale { epoch }) => {
                    self.record = self.record.or(Some(Record { epoch: epoch.0, fenced: false }));
                    self.on_fenced(Refusal::Stale { epoch }.to_string(), context.recorder);
                }
                ClientEffect::Refused(refusal) => {
                    tracing::warn!(volume = %self.spec.volume, reason = %refusal, "refused");
                    self.reason = Some(refusal.to_string());
                    self.stage = Stage::Refused;
                    self.socket = None;
                    if self.detaching {
                        self.forget(context.recorder);
                    }
                }
                ClientEffect::Fenced => {
                    self.on_fenced("another attachment has taken the volume over".into(), context.recorder);
                }
                ClientEffect::Detached => {
                    tracing::info!(volume = %self.spec.volume, "detached");
                    self.forget(context.recorder);
                }
                ClientEffect::Resized(geometry) => {
                    self.geometry = Some(geometry);
                    self.connections.values_mut().for_each(|connection| connection.session.on_resized(geometry));
                }
                ClientEffect::FormattedSet(_) => {}
            }
        }
        any
    }

    fn on_complete(&mut self, now: Timestamp, completion: Completion) {
        let route = self.routes.remove(&completion.id.0).expect("the client completes what was submitted, once");
        self.bytes_outstanding -= route.bytes;
        self.gap.on_complete(now);
        // The connection may be gone, and another one in its slot.
        if let Some(connection) = self.connections.get_mut(&route.slot)
            && connection.serial == route.serial
        {
            connection.session.on_completion(Completion { id: route.id, result: completion.result });
        }
    }

    fn on_attached(&mut self, epoch: Epoch, geometry: Geometry, recorder: &Recorder) {
        tracing::info!(volume = %self.spec.volume, epoch = epoch.0, size_bytes = geometry.size_bytes, "attached");
        self.geometry = Some(geometry);
        if self.detaching {
            return;
        }
        let record = Record { epoch: epoch.0, fenced: false };
        if self.record == Some(record) {
            self.stage = Stage::Serving;
        } else {
            self.stage = Stage::Recording;
            recorder.start(self.spec.volume, Some(record));
        }
    }

    fn on_fenced(&mut self, reason: String, recorder: &Recorder) {
        tracing::error!(volume = %self.spec.volume, %reason, "fenced: the device fails for good");
        self.reason = Some(reason);
        self.stage = Stage::Fenced;
        // Who is connected sees every request fail; nobody else need begin.
        self.socket = None;
        if self.detaching {
            self.forget(recorder);
            return;
        }
        let epoch = self.client.as_ref().and_then(|client| client.status().epoch).map(|epoch| epoch.0);
        if let Some(epoch) = epoch.or(self.record.map(|record| record.epoch)) {
            recorder.start(self.spec.volume, Some(Record { epoch, fenced: true }));
        }
    }

    fn forget(&mut self, recorder: &Recorder) {
        self.stage = Stage::Forgetting;
        self.detaching = true;
        self.socket = None;
        recorder.start(self.spec.volume, None);
    }
}
