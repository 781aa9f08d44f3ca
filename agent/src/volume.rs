//! One volume on this machine: its client, its record, its socket and the connections of its users.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_block::{Completion, Error, Geometry, Operation, Request, RequestId};
use holdfast_client::{Client, ClientEffect, ClientOptions, Mode, Phase};
use holdfast_consensus::Timestamp;
use holdfast_id::NodeId;
use holdfast_nbd::Export;
use holdfast_protocol::session::{Epoch, Formatted, Instance, Refusal, Reply};
use mio::{Interest, Registry, Token};
use serde::{Deserialize, Serialize};

use crate::config::{AttachMode, NodeAddress, VolumeSpec};
use crate::control::{Code, Failure, VolumeState, VolumeStatus};
use crate::device::{self, Device, Devices, KEEPER_RETRY, OpenError, Outcome};
use crate::gap::Gap;
use crate::loop_device::{DeviceError, Removal};
use crate::nbd::{NbdConnection, Turn};
use crate::peers::Peers;
use crate::record::{Record, Recorded, Recorder};
use crate::socket::{ServerSocket, SocketError};

/// Connections one device serves at once; the next ones are closed at once.
pub(crate) const CONNECTIONS_MAX: usize = 64;
/// Data of requests that the volume has not answered; no more requests are taken above it. Sixty-four of the longest.
const BYTES_OUTSTANDING_MAX: u64 = 64 << 20;
/// Requests read from one device before other volumes have their turn.
const DEVICE_TURNS_MAX: usize = 64;
/// Between two looks whether a fenced device is still used.
const RELEASE_EVERY: Duration = Duration::from_secs(5);
/// The device's own slot; a volume with a device has no socket.
const DEVICE_SLOT: usize = 0;

/// What the driver of a volume lends it.
pub(crate) struct Context<'a> {
    pub now: Timestamp,
    pub peers: &'a mut Peers,
    pub recorder: &'a Recorder,
    pub registry: &'a Registry,
    /// `None` where this agent has no devices.
    pub devices: Option<&'a mut Devices>,
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

/// What the keeper holds beside a device's descriptor: all that the next agent needs to serve it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceNote {
    pub epoch: u64,
    /// As it was when the device was made.
    pub size_bytes: u64,
    pub logical_block_bytes: u32,
    pub spec: VolumeSpec,
}

/// Where a completion goes.
struct Route {
    slot: usize,
    serial: u64,
    id: RequestId,
    bytes: u64,
}

/// What was taken from users since the process began.
#[derive(Default)]
struct Totals {
    requests: u64,
    read_bytes: u64,
    written_bytes: u64,
}

pub(crate) struct Volume {
    pub spec: VolumeSpec,
    /// First of the tokens of its socket (the first itself) and its connections (the next ones).
    token_base: usize,
    /// `None` where the record says fenced: such a volume asks nobody anything.
    client: Option<Client>,
    stage: Stage,
    detaching: bool,
    /// The last command to detach leaves the epoch at the cluster.
    keeps_epoch: bool,
    reason: Option<String>,
    record: Option<Record>,
    socket: Option<ServerSocket>,
    acceptable: bool,
    connections: BTreeMap<usize, NbdConnection>,
    serial_next: u64,
    routes: BTreeMap<u64, Route>,
    route_next: u64,
    bytes_outstanding: u64,
    totals: Totals,
    /// The slot whose turn it is to submit.
    turn: usize,
    geometry: Option<Geometry>,
    gap: Gap,
    device: Option<Device>,
    /// Why there is no device, and will be none until the volume is detached.
    device_failure: Option<String>,
    /// When a device that waits for its keeper is tried again, and what it waits for.
    device_waits: Option<(Timestamp, String)>,
    /// When it is looked whether a fenced device is still used; `None` while the epoch is ours.
    release_at: Option<Timestamp>,
    /// Why the last command to detach was not followed.
    detach_refusal: Option<Failure>,
    formatted: Option<Formatted>,
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
        // Epochs only grow: what is recorded is over where a later one was taken for this machine.
        let record = record.filter(|record| !matches!(spec.mode, AttachMode::Resume { epoch } if epoch > record.epoch));
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
            keeps_epoch: false,
            reason: fenced.then(|| "it was fenced before the agent restarted".into()),
            record,
            socket: None,
            acceptable: true,
            connections: BTreeMap::new(),
            serial_next: 0,
            routes: BTreeMap::new(),
            route_next: 0,
            bytes_outstanding: 0,
            totals: Totals::default(),
            turn: 0,
            geometry: None,
            gap: Gap::default(),
            device: None,
            device_failure: None,
            device_waits: None,
            release_at: fenced.then_some(context.now),
            detach_refusal: None,
            formatted: None,
            spec,
        };
        if fenced {
            return Ok(volume);
        }
        if let Some(path) = &volume.spec.nbd_socket {
            let mut socket = ServerSocket::bind(path)?;
            let registered = context.registry.register(&mut socket.listener, Token(token_base), Interest::READABLE);
            registered.map_err(|source| SocketError::Io { path: path.clone(), source })?;
            volume.socket = Some(socket);
        }
        let nodes: Vec<NodeId> = volume.spec.nodes.iter().map(|entry| entry.node).collect();
        let mut options = ClientOptions::new(volume.spec.volume, nodes, holder.to_owned(), instance, mode);
        options.unavailable_after = volume.spec.unavailable_after_ms.map(Duration::from_millis);
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

    /// The epoch that is ours, was, or is asked for; `None` while a new one is.
    pub fn epoch(&self) -> Option<u64> {
        let asked = match self.spec.mode {
            AttachMode::Resume { epoch } => Some(epoch),
            AttachMode::Attach | AttachMode::TakeOver => None,
        };
        let epoch = self.client.as_ref().and_then(|client| client.status().epoch).map(|epoch| epoch.0);
        epoch.or(self.record.map(|record| record.epoch)).or(asked)
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.routes.len()
    }

    pub fn state(&self) -> VolumeState {
        match self.stage {
            Stage::Refused => VolumeState::Refused,
            Stage::Failed => VolumeState::Failed,
            Stage::Forgetting | Stage::Gone => VolumeState::Detaching,
            _ if self.device.as_ref().is_some_and(Device::is_removing) => VolumeState::Detaching,
            Stage::Fenced => VolumeState::Fenced,
            Stage::Opening | Stage::Recording | Stage::Serving if self.detaching => VolumeState::Detaching,
            Stage::Serving if self.device_failure.is_some() => VolumeState::Failed,
            Stage::Serving if self.spec.device && self.device_path().is_none() => VolumeState::Attaching,
            Stage::Opening | Stage::Recording => VolumeState::Attaching,
            Stage::Serving => VolumeState::Attached,
        }
    }

    pub fn status(&self, now: Timestamp, peers: &Peers) -> VolumeStatus {
        let client = self.client.as_ref().map(Client::status);
        let nodes: Vec<_> = self.spec.nodes.iter().map(|entry| peers.status(entry)).collect();
        let waiting = client.as_ref().and_then(|client| client.waiting_since).map(|since| now.since(since));
        let waits = || self.device_waits.as_ref().map(|(_, reason)| reason.clone());
        let reason = self.reason.clone().or_else(|| self.device_failure.clone()).or_else(waits).or_else(|| {
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
        VolumeStatus {
            volume: self.spec.volume,
            state: self.state(),
            reason,
            epoch: self.epoch(),
            session: client.as_ref().and_then(|client| client.session).map(|session| session.0),
            leader: client.as_ref().and_then(|client| client.leader),
            term: client.as_ref().map_or(0, |client| client.term.0),
            outstanding: self.routes.len() as u64,
            waiting_ms: waiting.map_or(0, |waiting| waiting.as_millis() as u64),
            longest_gap_ms: self.gap.longest(now).as_millis() as u64,
            connections: self.connections.len(),
            requests: self.totals.requests,
            read_bytes: self.totals.read_bytes,
            written_bytes: self.totals.written_bytes,
            size_bytes: self.geometry.map(|geometry| geometry.size_bytes),
            nbd_socket: self.spec.nbd_socket.clone(),
            device: self.device_path(),
            formatted: self.formatted.map(Into::into),
            nodes,
        }
    }

    /// Why it is not attached, as an answer to whoever wanted it to be; `None` while that is open.
    pub fn attach_outcome(&self) -> Option<Result<(), Failure>> {
        let failed = |code| {
            let reason = self.reason.clone().or_else(|| self.device_failure.clone());
            let message = reason.unwrap_or_else(|| "it is being detached".into());
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
        let release_at = self.release_at.filter(|_| self.device.is_some());
        let client = client.into_iter().chain(self.device_waits.as_ref().map(|(at, _)| *at)).chain(release_at);
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
            if let Some(device) = &mut self.device {
                device.on_ready();
            }
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

    /// Gives the epoch back unless it is to be kept, or lets go of what has none. Refused while a client uses the
    /// device, unless `force`.
    ///
    /// A device goes first; [`Volume::on_device`] goes on after it.
    pub fn detach(&mut self, force: bool, keep: bool, context: &mut Context<'_>) -> Result<(), Failure> {
        self.detach_refusal = None;
        self.keeps_epoch = keep;
        if let (Some(device), Some(devices)) = (&mut self.device, context.devices.as_deref_mut()) {
            if device.is_making() {
                return Err(Failure { code: Code::InUse, message: "its device is being made".into() });
            }
            // A fenced device fails whatever its users do: there is nothing to write out and nobody to wait for.
            let force = force || self.stage == Stage::Fenced;
            let removal = if force { Removal::Force } else { Removal::Orderly };
            return device
                .remove(removal, devices)
                .map_err(|error| Failure { code: Code::Failed, message: format!("cannot start a thread: {error}") });
        }
        self.give_back(force, context)
    }

    fn give_back(&mut self, force: bool, context: &mut Context<'_>) -> Result<(), Failure> {
        let users = self.connections.values().filter(|connection| connection.session.is_transmitting()).count();
        match self.stage {
            Stage::Opening | Stage::Recording | Stage::Serving if users > 0 && !force => {
                let message = format!("{users} connections use the device");
                return Err(Failure { code: Code::InUse, message });
            }
            // What it had written is answered, for the device is gone; the session ends when the next one opens.
            Stage::Opening | Stage::Recording | Stage::Serving if self.keeps_epoch => {
                self.let_go(context.peers);
                self.forget(context.recorder);
            }
            Stage::Opening | Stage::Recording | Stage::Serving => {
                self.detaching = true;
                if let Some(client) = &mut self.client {
                    client.detach(context.now);
                }
            }
            Stage::Fenced | Stage::Refused | Stage::Failed => self.forget(context.recorder),
            Stage::Forgetting | Stage::Gone => {}
        }
        Ok(())
    }

    /// Lets everything happen that can; true where there is more to do at once.
    pub fn pump(&mut self, context: &mut Context<'_>) -> bool {
        loop {
            let mut progress = self.run_effects(context);
            if self.wants_device(context.now) && context.takes_input {
                self.start_device(context);
            }
            self.release_fenced(context);
            // An effect may just have opened the device to those who wait at its door.
            if context.takes_input && self.stage == Stage::Serving {
                self.accept(context);
            }
            let (read, mut more) = self.serve_device(context);
            progress |= read;
            let now = context.now;
            self.connections.retain(|slot, connection| {
                let mut turn = connection.turn(now, context.takes_input);
                if let Err(error) = connection.watch(context.registry, Token(self.token_base + slot)) {
                    turn = Turn::Ended(Some(error.to_string()));
                }
                more |= turn == Turn::MoreInput;
                let Turn::Ended(reason) = turn else { return true };
                if let Some(reason) = reason {
                    tracing::warn!(volume = %self.spec.volume, %reason, "a client of the device is dropped");
                }
                false
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
    pub fn let_go(&mut self, peers: &mut Peers) {
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
            let token = Token(self.token_base + slot);
            if let Err(error) = context.registry.register(&mut stream, token, Interest::READABLE) {
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
        let mut any = false;
        let mut idle = 0;
        while idle < self.connections.len()
            && self.client.as_ref().is_some_and(Client::can_submit)
            && self.bytes_outstanding < BYTES_OUTSTANDING_MAX
        {
            let next = self.connections.range_mut(self.turn + 1..).next().map(|(slot, _)| *slot);
            let slot = next.or_else(|| self.connections.keys().next().copied()).unwrap_or_default();
            self.turn = slot;
            let Some(connection) = self.connections.get_mut(&slot) else { break };
            let Some(request) = connection.session.poll_request() else {
                idle += 1;
                continue;
            };
            (idle, any) = (0, true);
            let serial = connection.serial;
            self.forward(now, slot, serial, request);
        }
        any
    }

    /// Where the volume is to be a device and is ready for it.
    fn wants_device(&self, now: Timestamp) -> bool {
        let due = self.device_waits.as_ref().is_none_or(|(at, _)| *at <= now);
        let ready = self.stage == Stage::Serving && !self.detaching && due;
        self.spec.device && ready && self.device.is_none() && self.device_failure.is_none()
    }

    fn start_device(&mut self, context: &mut Context<'_>) {
        let geometry = self.geometry.expect("a volume is served once its geometry is known");
        let epoch = self.record.expect("a volume is served once its epoch is recorded").epoch;
        let Some(devices) = context.devices.as_deref_mut() else {
            self.device_failure = Some("this agent has no keeper, and so no devices".into());
            return;
        };
        let note = self.note();
        let watch = (context.registry, Token(self.token_base));
        let started = Device::start(self.spec.volume, epoch, geometry, note, devices, watch);
        self.device_waits = None;
        match started {
            Ok(device) => self.device = Some(device),
            // Its pod comes again by itself.
            Err(error @ OpenError::Keeper(_)) if devices.keeper.is_external() => {
                tracing::warn!(volume = %self.spec.volume, error = error.text(), "the device waits for the keeper");
                self.device_waits = Some((context.now + KEEPER_RETRY, error.text()));
            }
            Err(error) => {
                tracing::error!(volume = %self.spec.volume, error = error.text(), "the device cannot be made");
                self.device_failure = Some(error.text());
                self.keeper_forgets(context);
            }
        }
    }

    pub fn is_fenced(&self) -> bool {
        self.stage == Stage::Fenced
    }

    /// Looks at once whether the fenced device can go; false where there is none.
    pub fn release(&mut self, now: Timestamp) -> bool {
        self.release_at = Some(now);
        self.device.is_some()
    }

    /// A device whose epoch is lost goes once nobody uses it: its users have to let go of it by themselves.
    fn release_fenced(&mut self, context: &mut Context<'_>) {
        if self.stage != Stage::Fenced || self.release_at.is_none_or(|at| at > context.now) {
            return;
        }
        let (Some(device), Some(devices)) = (&mut self.device, context.devices.as_deref()) else { return };
        self.release_at = Some(context.now + RELEASE_EVERY);
        if let Err(error) = device.remove(Removal::Unused, devices) {
            tracing::error!(volume = %self.spec.volume, %error, "cannot start a thread");
        }
    }

    /// For the next agent.
    pub fn note(&self) -> serde_json::Value {
        let geometry = self.geometry.expect("a volume with a device has a geometry");
        let note = DeviceNote {
            epoch: self.record.expect("a volume with a device has a record").epoch,
            size_bytes: geometry.size_bytes,
            logical_block_bytes: geometry.logical_block_bytes,
            spec: self.spec.clone(),
        };
        serde_json::to_value(note).expect("a note has text keys")
    }

    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    fn device_path(&self) -> Option<std::path::PathBuf> {
        self.device.as_ref().and_then(Device::path)
    }

    /// Serves what an earlier agent has left.
    pub fn adopt(&mut self, device: Device, geometry: Geometry, registry: &Registry) -> std::io::Result<()> {
        device.register(registry, Token(self.token_base))?;
        self.geometry = Some(geometry);
        self.device = Some(device);
        Ok(())
    }

    pub fn detach_refusal(&self) -> Option<Failure> {
        self.detach_refusal.clone()
    }

    /// A thread has made the device, or ended it.
    pub fn on_device(&mut self, outcome: Outcome, context: &mut Context<'_>) {
        let Some(device) = &mut self.device else { return };
        match outcome {
            Outcome::Made(Ok(number)) => {
                device.on_made(number);
                let path = crate::loop_device::path(number);
                tracing::info!(volume = %self.spec.volume, device = %path.display(), "the device is there");
            }
            Outcome::Made(Err(error)) => {
                tracing::error!(volume = %self.spec.volume, error = error.text(), "the device cannot be made");
                self.device_failure = Some(error.text());
                self.drop_device(context);
            }
            Outcome::Removed(Ok(())) => {
                self.drop_device(context);
                // Nobody can use it any more, so nobody is in the way.
                if let Err(failure) = self.give_back(true, context) {
                    self.detach_refusal = Some(failure);
                }
            }
            Outcome::Removed(Err(error)) => {
                device.on_kept();
                let code = if matches!(error, DeviceError::InUse(_)) { Code::InUse } else { Code::Failed };
                self.detach_refusal = Some(Failure { code, message: error.text() });
            }
        }
    }

    /// Closes the descriptor here and at the keeper, which ends the file system.
    fn drop_device(&mut self, context: &mut Context<'_>) {
        if let Some(device) = self.device.take() {
            device.deregister(context.registry);
        }
        self.keeper_forgets(context);
    }

    fn keeper_forgets(&self, context: &mut Context<'_>) {
        if let Some(devices) = context.devices.as_deref_mut()
            && let Err(error) = devices.keeper.drop_entry(self.spec.volume)
        {
            tracing::warn!(volume = %self.spec.volume, %error, "the keeper does not let go of a device");
        }
    }

    pub fn set_formatted(&mut self, now: Timestamp, formatted: Formatted) -> Result<(), Failure> {
        if self.formatted == Some(formatted) {
            return Ok(());
        }
        let busy =
            || Failure { code: Code::Pending, message: "another change is on its way, or it is not attached".into() };
        let client = self.client.as_mut().ok_or_else(busy)?;
        client.set_formatted(now, formatted).map_err(|_| busy())
    }

    pub fn formatted(&self) -> Option<Formatted> {
        self.formatted
    }

    /// Moves requests from the kernel to the client. Returns whether there were any, and whether there are more.
    fn serve_device(&mut self, context: &mut Context<'_>) -> (bool, bool) {
        // Before the session is open a straggler of the last one could still land.
        if !context.takes_input || !matches!(self.stage, Stage::Serving | Stage::Fenced) {
            return (false, false);
        }
        let mut any = false;
        for _ in 0..DEVICE_TURNS_MAX {
            any |= self.submit_pending(context.now);
            let (Some(device), Some(devices)) = (&mut self.device, context.devices.as_deref_mut()) else {
                return (any, false);
            };
            if !device.pending.is_empty() {
                return (any, false);
            }
            match device.turn(devices) {
                device::Turn::Progress => any = true,
                device::Turn::Waits => return (any, false),
                device::Turn::Ended(reason) => {
                    tracing::error!(volume = %self.spec.volume, %reason, "the device has ended");
                    self.device_failure = Some(reason);
                    self.drop_device(context);
                    return (true, false);
                }
            }
        }
        (any, true)
    }

    /// As far as the client's window goes; true where anything went.
    fn submit_pending(&mut self, now: Timestamp) -> bool {
        let mut any = false;
        while let Some(device) = &mut self.device
            && !device.pending.is_empty()
        {
            let Some(client) = &mut self.client else {
                // Fenced before this process began.
                let request = device.pending.pop_front().expect("it is not empty");
                device.on_completion(Completion { id: request.id, result: Err(Error::Fenced) });
                any = true;
                continue;
            };
            if !client.can_submit() || self.bytes_outstanding >= BYTES_OUTSTANDING_MAX {
                break;
            }
            let request = device.pending.pop_front().expect("it is not empty");
            self.forward(now, DEVICE_SLOT, 0, request);
            any = true;
        }
        any
    }

    fn forward(&mut self, now: Timestamp, slot: usize, serial: u64, mut request: Request) {
        let client = self.client.as_mut().expect("whoever forwards has looked");
        let bytes = match &request.operation {
            Operation::Read { length, .. } => u64::from(*length),
            Operation::Write { data, .. } => data.len() as u64,
            Operation::WriteZeroes { .. } | Operation::Discard { .. } | Operation::Flush => 0,
        };
        self.totals.requests += 1;
        match &request.operation {
            Operation::Read { .. } => self.totals.read_bytes += bytes,
            Operation::Write { .. } => self.totals.written_bytes += bytes,
            Operation::WriteZeroes { .. } | Operation::Discard { .. } | Operation::Flush => {}
        }
        self.route_next += 1;
        self.routes.insert(self.route_next, Route { slot, serial, id: request.id, bytes });
        self.bytes_outstanding += bytes;
        self.gap.on_submit(now);
        request.id = RequestId(self.route_next);
        client.submit(now, request);
    }

    fn run_effects(&mut self, context: &mut Context<'_>) -> bool {
        let Some(client) = &mut self.client else { return false };
        let effects = client.take_effects();
        let any = !effects.is_empty();
        for effect in effects {
            match effect {
                ClientEffect::Send { to, request } => context.peers.send(context.now, to, &request),
                ClientEffect::Complete(completion) => self.on_complete(context.now, completion),
                ClientEffect::Attached { epoch, geometry, formatted, .. } => {
                    self.formatted = Some(formatted);
                    self.on_attached(epoch, geometry, context.recorder);
                }
                ClientEffect::Refused(Refusal::Stale { epoch }) => {
                    self.record = self.record.or(Some(Record { epoch: epoch.0, fenced: false }));
                    self.on_fenced(context.now, Refusal::Stale { epoch }.to_string(), context.recorder);
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
                    let reason = "another attachment has taken the volume over".into();
                    self.on_fenced(context.now, reason, context.recorder);
                }
                ClientEffect::Detached => {
                    tracing::info!(volume = %self.spec.volume, "detached");
                    self.forget(context.recorder);
                }
                ClientEffect::Resized(geometry) => {
                    self.geometry = Some(geometry);
                    self.connections.values_mut().for_each(|connection| connection.session.on_resized(geometry));
                    if let Some(device) = &mut self.device {
                        device.on_resized(geometry);
                    }
                }
                ClientEffect::FormattedSet(formatted) => self.formatted = Some(formatted),
                ClientEffect::Replicas(replicas) => self.on_replicas(context, replicas),
                ClientEffect::MoreReplicas(replicas) => self.connect_to(context, replicas),
            }
        }
        any
    }

    /// Members of the volume came or went: the leader says where they are now.
    fn on_replicas(&mut self, context: &mut Context<'_>, replicas: Vec<(NodeId, String)>) {
        for gone in self.spec.nodes.extract_if(.., |entry| replicas.iter().all(|(node, _)| *node != entry.node)) {
            tracing::info!(volume = %self.spec.volume, node = %gone.node, "a replica has left");
            context.peers.remove(gone.node);
        }
        self.connect_to(context, replicas);
    }

    fn connect_to(&mut self, context: &mut Context<'_>, replicas: Vec<(NodeId, String)>) {
        let Some(client) = &mut self.client else { return };
        for (node, address) in replicas {
            if self.spec.nodes.iter().any(|entry| entry.node == node) {
                continue;
            }
            let Ok(address) = address.parse() else {
                tracing::warn!(volume = %self.spec.volume, %node, %address, "a replica is where it cannot be reached");
                continue;
            };
            tracing::info!(volume = %self.spec.volume, %node, %address, "a replica has come");
            let entry = NodeAddress { node, address };
            context.peers.add(context.now, &entry);
            self.spec.nodes.push(entry);
            if context.peers.is_connected(node) {
                client.on_connected(context.now, node);
            }
        }
    }

    fn on_complete(&mut self, now: Timestamp, completion: Completion) {
        let route = self.routes.remove(&completion.id.0).expect("the client completes what was submitted, once");
        self.bytes_outstanding -= route.bytes;
        self.gap.on_complete(now);
        if route.slot == DEVICE_SLOT {
            if let Some(device) = &mut self.device {
                device.on_completion(Completion { id: route.id, result: completion.result });
            }
            return;
        }
        // The connection may be gone, and another one in its slot.
        if let Some(connection) = self.connections.get_mut(&route.slot)
            && connection.serial == route.serial
        {
            connection.session.on_completion(Completion { id: route.id, result: completion.result });
        }
    }

    fn on_attached(&mut self, epoch: Epoch, geometry: Geometry, recorder: &Recorder) {
        tracing::info!(volume = %self.spec.volume, epoch = epoch.0, size_bytes = geometry.size_bytes, "attached");
        if let Some(device) = &mut self.device
            && self.geometry.is_none_or(|known| known != geometry)
        {
            device.on_resized(geometry);
        }
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

    fn on_fenced(&mut self, now: Timestamp, reason: String, recorder: &Recorder) {
        tracing::error!(volume = %self.spec.volume, %reason, "fenced: the device fails for good");
        self.reason = Some(reason);
        self.stage = Stage::Fenced;
        self.release_at = Some(now);
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
