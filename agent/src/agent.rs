//! The loop of the agent, and the commands it takes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use holdfast_block::Geometry;
use holdfast_consensus::Timestamp;
use holdfast_id::VolumeId;
use holdfast_protocol::session::{Formatted, HOLDER_BYTES_MAX, Instance, Reply};
use holdfast_protocol::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN};
use holdfast_transport::{Options, Transport, TransportError, Versions};
use mio::{Events, Interest, Poll, Token, Waker};

use crate::clock;
use crate::config::{AgentConfig, AttachMode, VolumeSpec};
use crate::control::{self, Code, Command, ControlConnection, Failure, VolumeState, VolumeStatus};
use crate::credentials::{self, Credentials, CredentialsError};
use crate::device::{self, Device, Devices, KEEPER, KEEPER_RETRY};
use crate::keeper_link::{KeeperLinkError, Left};
use crate::loop_device;
use crate::peers::{PeerEvent, Peers};
use crate::record::{Record, RecordError, Recorder};
use crate::socket::{ServerSocket, SocketError};
use crate::volume::{CONNECTIONS_MAX, Context, DeviceNote, Volume};

const SHUTDOWN: Token = Token(0);
const WAKER: Token = Token(1);
const CONTROL: Token = Token(2);
/// Tokens of control connections follow; more than these at once are closed at once.
const CONTROL_FIRST: usize = 16;
const CONTROL_CONNECTIONS_MAX: usize = 16;
/// One per connection to a node; a cluster with more nodes than this shares no machine's volumes.
const TRANSPORT_FIRST: usize = 1024;
const TRANSPORT_TOKENS: usize = 1024;
/// Every volume has this many tokens from here on, and none is used again.
const VOLUME_FIRST: usize = 1 << 16;
const VOLUME_TOKENS: usize = CONNECTIONS_MAX + 1;
/// Volumes of one machine; Kubernetes allows far fewer.
const VOLUMES_MAX: usize = 1024;
const EVENTS: usize = 256;
/// What is outstanding at the end may take so long to be answered; it is unanswered for its user otherwise.
const DRAIN_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the holder's name has {0} bytes; 1 to {HOLDER_BYTES_MAX} are allowed")]
    Holder(usize),
    #[error("volume {volume}: {detail}")]
    Volume { volume: VolumeId, detail: String },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("this machine's identity cannot be used")]
    Identity(#[from] CredentialsError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Keeper(#[from] KeeperLinkError),
    #[error("the event loop failed")]
    Loop(#[source] io::Error),
    #[error("no randomness: {0}")]
    Random(getrandom::Error),
}

/// What a volume is lent, while the volume itself is borrowed too.
macro_rules! lend {
    ($agent:ident, $now:expr) => {
        Context {
            now: $now,
            peers: &mut $agent.peers,
            recorder: &$agent.recorder,
            registry: $agent.poll.registry(),
            devices: $agent.devices.as_mut(),
            takes_input: $agent.ends_at.is_none(),
        }
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Attached,
    Formatted(Formatted),
    Gone,
}

/// A control connection that is answered when a volume is where it is wanted.
struct Waiter {
    slot: usize,
    serial: u64,
    volume: VolumeId,
    wanted: Wanted,
    until: Timestamp,
}

/// The agent of one machine.
pub struct Agent {
    holder: String,
    poll: Poll,
    peers: Peers,
    recorder: Recorder,
    credentials: Credentials,
    /// `None` where no volume can be a device.
    devices: Option<Devices>,
    /// When a lost keeper is started again.
    keeper_due: Option<Timestamp>,
    /// Of volumes that are not in `volumes`.
    records: BTreeMap<VolumeId, Record>,
    volumes: BTreeMap<VolumeId, Volume>,
    by_token: BTreeMap<usize, VolumeId>,
    token_next: usize,
    /// Volumes with something to do.
    dirty: BTreeSet<VolumeId>,
    control: ServerSocket,
    control_acceptable: bool,
    controls: BTreeMap<usize, ControlConnection>,
    control_serial: u64,
    waiters: Vec<Waiter>,
    /// Only watched; open for as long as the agent lives.
    _shutdown: mio::net::UnixStream,
    /// Set once the agent ends: when it goes at the latest.
    ends_at: Option<Timestamp>,
}

impl Agent {
    /// Serves until `shutdown` becomes readable or closes, or a command says so. Attachments stay.
    ///
    /// Fails at once where something that `config` names cannot be used; later failures are a volume's own, and its
    /// status says them.
    pub fn run(config: AgentConfig, shutdown: StdUnixStream) -> Result<(), AgentError> {
        Agent::start(config, shutdown)?.serve()
    }

    fn start(config: AgentConfig, shutdown: StdUnixStream) -> Result<Agent, AgentError> {
        if !(1..=HOLDER_BYTES_MAX).contains(&config.holder.len()) {
            return Err(AgentError::Holder(config.holder.len()));
        }
        let (identity, roots) = credentials::load(&config.identity, &config.holder)?;
        let poll = Poll::new().map_err(AgentError::Loop)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(AgentError::Loop)?);
        let watched = Credentials::watch(config.identity, config.holder.clone(), waker.clone());
        let credentials = watched.map_err(AgentError::Loop)?;
        let (recorder, records) = Recorder::open(&config.state_directory, waker.clone())?;
        let mut control = ServerSocket::bind(&config.control_socket)?;
        let mut shutdown = mio::net::UnixStream::from_std({
            shutdown.set_nonblocking(true).map_err(AgentError::Loop)?;
            shutdown
        });
        poll.registry().register(&mut control.listener, CONTROL, Interest::READABLE).map_err(AgentError::Loop)?;
        poll.registry().register(&mut shutdown, SHUTDOWN, Interest::READABLE).map_err(AgentError::Loop)?;
        let versions = Versions { min: PROTOCOL_VERSION_MIN, max: PROTOCOL_VERSION };
        let mut options = Options::new(identity, roots, u64::from_le_bytes(random()?), versions);
        options.cluster = config.cluster;
        let tokens = TRANSPORT_FIRST..TRANSPORT_FIRST + TRANSPORT_TOKENS;
        let transport = Transport::new(options, poll.registry(), tokens)?;
        // A wake-up that fails leaves the answer to the next one.
        let resolved = Arc::clone(&waker);
        let wake = Arc::new(move || drop(resolved.wake()));
        let mut agent = Agent {
            holder: config.holder,
            poll,
            peers: Peers::new(transport, config.sockets, wake),
            recorder,
            credentials,
            devices: config.keeper.map(|keeper| Devices::new(keeper, waker)),
            keeper_due: None,
            records,
            volumes: BTreeMap::new(),
            by_token: BTreeMap::new(),
            token_next: VOLUME_FIRST,
            dirty: BTreeSet::new(),
            control,
            control_acceptable: true,
            controls: BTreeMap::new(),
            control_serial: 0,
            waiters: Vec::new(),
            _shutdown: shutdown,
            ends_at: None,
        };
        agent.adopt_devices()?;
        for spec in config.volumes {
            agent.add_volume(clock::now(), spec)?;
        }
        Ok(agent)
    }

    /// Goes on with the devices that the last agent has left with the keeper, and clears those that nobody can serve.
    fn adopt_devices(&mut self) -> Result<(), AgentError> {
        let Some(devices) = &mut self.devices else { return Ok(()) };
        let left = devices.keeper.take_left(!self.records.is_empty())?;
        devices.watch_keeper(self.poll.registry())?;
        for (volume, record) in &self.records {
            if left.iter().all(|left| left.volume != *volume)
                && let Err(error) = loop_device::remove_leftover(&loop_device::name(*volume, record.epoch))
            {
                tracing::error!(%volume, error = error.text(), "a dead device stays behind");
            }
        }
        for left in left {
            self.adopt_device(left)?;
        }
        Ok(())
    }

    fn adopt_device(&mut self, left: Left) -> Result<(), AgentError> {
        let volume = left.volume;
        let recorded = self.records.get(&volume).copied();
        let note = serde_json::from_value::<DeviceNote>(left.note).ok();
        let ours = note.filter(|note| note.spec.volume == volume && recorded.is_some_and(|r| r.epoch == note.epoch));
        let geometry = ours.as_ref().and_then(|note| Geometry::new(note.size_bytes, note.logical_block_bytes));
        let name = recorded.map(|record| loop_device::name(volume, record.epoch));
        let number = name.as_deref().and_then(loop_device::find);
        let (Some(note), Some(geometry)) = (ours, geometry) else {
            tracing::error!(%volume, "the keeper holds a device of no recorded attachment; it is given up");
            return self.give_up(volume);
        };
        let epoch = note.epoch;
        self.add_volume(clock::now(), note.spec)?;
        // Without its loop device it was about to be made, or removed: it is made anew.
        let Some(number) = number else { return self.give_up(volume) };
        let adopted = Device::adopt(volume, epoch, number, geometry, left.descriptor).and_then(|device| {
            let added = self.volumes.get_mut(&volume).expect("it was added a few lines ago");
            added.adopt(device, geometry, self.poll.registry())
        });
        if let Err(error) = adopted {
            tracing::error!(%volume, %error, "the device of the last agent cannot be served on");
            return self.give_up(volume);
        }
        tracing::info!(%volume, device = %loop_device::path(number).display(), "serves the device of the last agent on");
        Ok(())
    }

    fn give_up(&mut self, volume: VolumeId) -> Result<(), AgentError> {
        let devices = self.devices.as_mut().expect("what is given up came from the keeper");
        Ok(devices.keeper.drop_entry(volume)?)
    }

    /// Starts a keeper where the last one ended, and hands it every device.
    fn restore_keeper(&mut self, now: Timestamp) {
        let Some(devices) = &mut self.devices else { return };
        self.keeper_due = None;
        let mut restore = || -> Result<(), KeeperLinkError> {
            let mut held = self.volumes.values().filter_map(|volume| Some((volume, volume.device()?))).peekable();
            if held.peek().is_none() {
                return Ok(());
            }
            devices.ensure_keeper(self.poll.registry())?;
            for (volume, device) in held {
                devices.keeper.put(volume.spec.volume, volume.note(), device.fuse().as_fd())?;
            }
            Ok(())
        };
        if let Err(error) = restore() {
            tracing::error!(%error, "the devices have no keeper");
            self.keeper_due = Some(now + KEEPER_RETRY);
        }
    }

    fn serve(mut self) -> Result<(), AgentError> {
        let mut events = Events::with_capacity(EVENTS);
        // The first turn has what no event tells: clients may have come before the sockets were watched.
        let mut at_once = true;
        self.dirty.extend(self.volumes.keys());
        loop {
            let now = clock::now();
            let wait = if at_once { Some(Duration::ZERO) } else { self.deadline().map(|deadline| deadline.since(now)) };
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(AgentError::Loop)?,
            }
            let now = clock::now();
            for event in &events {
                self.on_event(now, event);
            }
            at_once = self.turn(now);
            if self.ends_at.is_some_and(|ends_at| now >= ends_at || self.has_drained()) {
                self.controls.values_mut().for_each(ControlConnection::write);
                return Ok(());
            }
        }
    }

    /// Whether nobody is owed an answer that can still come, nor the state directory a record.
    fn has_drained(&self) -> bool {
        self.recorder.is_idle() && self.volumes.values().all(|volume| volume.outstanding() == 0)
    }

    fn deadline(&self) -> Option<Timestamp> {
        let volumes = self.volumes.values().filter_map(Volume::deadline);
        let waiters = self.waiters.iter().map(|waiter| waiter.until);
        volumes.chain(waiters).chain(self.peers.deadline()).chain(self.ends_at).chain(self.keeper_due).min()
    }

    fn on_event(&mut self, now: Timestamp, event: &mio::event::Event) {
        match event.token() {
            SHUTDOWN => self.end(now),
            // What woke it is looked at in every turn.
            WAKER => {}
            CONTROL => self.control_acceptable = true,
            KEEPER => {
                if self.devices.as_mut().is_some_and(|devices| devices.keeper.has_ended()) {
                    tracing::warn!("the keeper has ended");
                    self.keeper_due = Some(now);
                }
            }
            token if self.peers.owns(token) => self.peers.on_ready(event, now),
            Token(token) if token >= VOLUME_FIRST => {
                let first = token - (token - VOLUME_FIRST) % VOLUME_TOKENS;
                if let Some(id) = self.by_token.get(&first) {
                    self.dirty.insert(*id);
                    if let Some(volume) = self.volumes.get_mut(id) {
                        volume.on_ready(token - first, event);
                    }
                }
            }
            Token(token) => {
                if let Some(control) = self.controls.get_mut(&(token - CONTROL_FIRST)) {
                    control.on_ready(event);
                }
            }
        }
    }

    /// Does everything that is due; true where there is more to do at once.
    fn turn(&mut self, now: Timestamp) -> bool {
        self.peers.on_deadline(now);
        if let Some((identity, roots)) = self.credentials.take() {
            self.peers.set_identity(identity, roots);
        }
        while let Some(recorded) = self.recorder.poll() {
            self.dirty.insert(recorded.volume);
            if let Some(volume) = self.volumes.get_mut(&recorded.volume) {
                volume.on_recorded(now, recorded);
            }
        }
        while let Some(done) = self.devices.as_ref().and_then(Devices::poll) {
            if let Some(volume) = self.volumes.get_mut(&done.volume) {
                volume.on_device(done.outcome, &mut lend!(self, now));
                self.dirty.insert(done.volume);
            }
        }
        if self.keeper_due.is_some_and(|due| due <= now) {
            self.restore_keeper(now);
        }
        self.take_peer_events(now);
        self.accept_controls();
        self.take_commands(now);
        for (id, volume) in &mut self.volumes {
            if volume.deadline().is_some_and(|at| at <= now) {
                volume.on_deadline(now);
                self.dirty.insert(*id);
            }
        }
        let mut unfinished = BTreeSet::new();
        // Sending may lose a connection, which is news to its volumes.
        while !self.dirty.is_empty() {
            self.pump_dirty(now, &mut unfinished);
            self.peers.flush();
            self.take_peer_events(now);
        }
        self.peers.flush();
        self.dirty = unfinished;
        // Who was answered may have sent the next command long ago.
        let answered = self.answer_waiters(now);
        answered || !self.dirty.is_empty()
    }

    fn pump_dirty(&mut self, now: Timestamp, unfinished: &mut BTreeSet<VolumeId>) {
        while let Some(id) = self.dirty.pop_first() {
            let Some(volume) = self.volumes.get_mut(&id) else { continue };
            let mut context = lend!(self, now);
            if volume.pump(&mut context) {
                unfinished.insert(id);
            }
            if volume.is_gone() {
                self.remove_volume(id);
            }
        }
    }

    fn take_peer_events(&mut self, now: Timestamp) {
        while let Some(event) = self.peers.poll(now) {
            match event {
                PeerEvent::Reply { from, reply } => {
                    let id = volume_of(&reply);
                    if let Some(volume) = self.volumes.get_mut(&id) {
                        volume.on_reply(now, from, reply);
                        self.dirty.insert(id);
                    }
                }
                PeerEvent::Connected(node) | PeerEvent::Closed(node) => {
                    for (id, volume) in &mut self.volumes {
                        if volume.spec.nodes.iter().any(|entry| entry.node == node) {
                            match event {
                                PeerEvent::Connected(_) => volume.on_connected(now, node),
                                _ => volume.on_closed(now, node),
                            }
                            self.dirty.insert(*id);
                        }
                    }
                }
            }
        }
    }

    fn add_volume(&mut self, now: Timestamp, spec: VolumeSpec) -> Result<(), AgentError> {
        let id = spec.volume;
        spec.check().map_err(|detail| AgentError::Volume { volume: id, detail })?;
        if spec.device {
            let detail = match &self.devices {
                Some(_) => device::check_machine().err(),
                None => Some("this agent has no keeper, and so no devices".into()),
            };
            if let Some(detail) = detail {
                return Err(AgentError::Volume { volume: id, detail });
            }
        }
        if self.volumes.contains_key(&id) || self.volumes.len() >= VOLUMES_MAX {
            let detail = format!("it is there already, or one more than {VOLUMES_MAX} volumes");
            return Err(AgentError::Volume { volume: id, detail });
        }
        let instance = Instance(u128::from_le_bytes(random()?));
        let token = self.token_next;
        let mut context = lend!(self, now);
        let record = self.records.get(&id).copied();
        let volume = Volume::start(spec, &self.holder, record, instance, token, &mut context)?;
        self.records.remove(&id);
        self.token_next += VOLUME_TOKENS;
        self.by_token.insert(token, id);
        self.volumes.insert(id, volume);
        self.dirty.insert(id);
        Ok(())
    }

    fn remove_volume(&mut self, id: VolumeId) {
        if let Some(mut volume) = self.volumes.remove(&id) {
            volume.let_go(&mut self.peers);
        }
        self.by_token.retain(|_, volume| *volume != id);
    }

    fn end(&mut self, now: Timestamp) {
        if self.ends_at.is_none() {
            tracing::info!("the agent ends; attachments stay");
            self.ends_at = Some(now + DRAIN_MAX);
        }
    }

    fn accept_controls(&mut self) {
        while self.control_acceptable {
            let mut stream = match self.control.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Out of file descriptors, as a rule, if it is not the end; the next event tries again.
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::error!(%error, "cannot accept on the control socket");
                    }
                    self.control_acceptable = false;
                    return;
                }
            };
            let Some(slot) = (0..CONTROL_CONNECTIONS_MAX).find(|slot| !self.controls.contains_key(slot)) else {
                tracing::warn!("more than {CONTROL_CONNECTIONS_MAX} connections to the control socket");
                continue;
            };
            let both = Interest::READABLE | Interest::WRITABLE;
            match self.poll.registry().register(&mut stream, Token(CONTROL_FIRST + slot), both) {
                Ok(()) => {
                    self.control_serial += 1;
                    self.controls.insert(slot, ControlConnection::new(stream, self.control_serial));
                }
                Err(error) => tracing::error!(%error, "cannot serve a control connection"),
            }
        }
    }

    fn take_commands(&mut self, now: Timestamp) {
        for slot in self.controls.keys().copied().collect::<Vec<_>>() {
            while let Some(control) = self.controls.get_mut(&slot) {
                let Some(line) = control.next_line() else { break };
                match control::parse(&line) {
                    Ok(command) => self.on_command(now, slot, command),
                    Err(failure) => control.answer::<()>(Err(failure)),
                }
            }
        }
        self.controls.retain(|_, control| !control.has_ended());
    }

    fn on_command(&mut self, now: Timestamp, slot: usize, command: Command) {
        let ends = self.ends_at.is_some();
        let outcome = match command {
            Command::Status {} => {
                let volumes: Vec<VolumeStatus> =
                    self.volumes.values().map(|volume| volume.status(now, &self.peers)).collect();
                let result = serde_json::json!({ "holder": self.holder, "volumes": volumes });
                return self.answer(slot, Ok(result));
            }
            Command::Shutdown {} => {
                self.end(now);
                return self.answer(slot, Ok(serde_json::Value::Null));
            }
            _ if ends => Err(Failure { code: Code::ShuttingDown, message: "the agent ends".into() }),
            Command::Attach { volume, wait_ms } => {
                let id = volume.volume;
                self.attach(now, volume).map(|()| (id, Wanted::Attached, wait_ms))
            }
            Command::SetFormatted { volume, formatted, wait_ms } => match self.volumes.get_mut(&volume) {
                Some(attached) => {
                    self.dirty.insert(volume);
                    let wanted = Wanted::Formatted(formatted.into());
                    attached.set_formatted(now, formatted.into()).map(|()| (volume, wanted, wait_ms))
                }
                None => Err(Failure { code: Code::NotFound, message: format!("volume {volume} is not attached") }),
            },
            Command::Detach { volume, force, keep, wait_ms } => match self.volumes.get_mut(&volume) {
                Some(attached) => {
                    self.dirty.insert(volume);
                    attached.detach(force, keep, &mut lend!(self, now)).map(|()| (volume, Wanted::Gone, wait_ms))
                }
                None => Err(Failure { code: Code::NotFound, message: format!("volume {volume} is not attached") }),
            },
        };
        match outcome {
            Ok((volume, wanted, wait_ms)) => {
                let control = self.controls.get_mut(&slot).expect("it has just sent the command");
                control.waiting = true;
                let until = control::wait_until(now, wait_ms);
                self.waiters.push(Waiter { slot, serial: control.serial, volume, wanted, until });
            }
            Err(failure) => self.answer(slot, Err(failure)),
        }
    }

    /// Idempotent: what is attached, or about to be, in the way asked for is left alone; what was refused is tried anew.
    fn attach(&mut self, now: Timestamp, spec: VolumeSpec) -> Result<(), Failure> {
        if let Some(volume) = self.volumes.get(&spec.volume) {
            if let (AttachMode::Resume { epoch }, Some(other)) = (spec.mode, volume.epoch())
                && epoch != other
            {
                return self.attach_other_epoch(now, spec, epoch, other);
            }
            if volume.attach_outcome().is_none_or(|outcome| outcome.is_ok()) {
                if volume.spec.nbd_socket == spec.nbd_socket && volume.spec.device == spec.device {
                    return Ok(());
                }
                let message = match &volume.spec.nbd_socket {
                    Some(path) => format!("it is served at {}", path.display()),
                    None => "it is served as a device".into(),
                };
                return Err(Failure { code: Code::Exists, message });
            }
            if volume.is_fenced() && matches!(spec.mode, AttachMode::Resume { .. }) {
                let message = volume.status(now, &self.peers).reason.unwrap_or_default();
                return Err(Failure { code: Code::Fenced, message });
            }
            if volume.state() != VolumeState::Refused || volume.device().is_some() {
                let message = format!("it is {:?}: detach it first", volume.state());
                return Err(Failure { code: Code::Exists, message });
            }
            self.records.extend(volume.record().map(|record| (spec.volume, record)));
            self.remove_volume(spec.volume);
        }
        self.attach_anew(now, spec)
    }

    fn attach_anew(&mut self, now: Timestamp, spec: VolumeSpec) -> Result<(), Failure> {
        self.add_volume(now, spec).map_err(|error| {
            let message = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            Failure { code: Code::Failed, message }
        })
    }

    /// `epoch` is wanted where `other` is: epochs only rise, so the lower one is over.
    fn attach_other_epoch(&mut self, now: Timestamp, spec: VolumeSpec, epoch: u64, other: u64) -> Result<(), Failure> {
        let volume = self.volumes.get_mut(&spec.volume).expect("its epoch was just looked at");
        if volume.state() == VolumeState::Refused && volume.device().is_none() {
            // It never had that epoch.
            self.remove_volume(spec.volume);
            return self.attach_anew(now, spec);
        }
        if epoch < other {
            let message = format!("epoch {epoch} is over: epoch {other} of it is attached here");
            return Err(Failure { code: Code::Fenced, message });
        }
        if !volume.is_fenced() {
            // Its users would see errors, and whether it is over only the cluster can say.
            let message = format!("epoch {other} of it is attached: detach that first");
            return Err(Failure { code: Code::Exists, message });
        }
        if volume.release(now) {
            self.dirty.insert(spec.volume);
            let message =
                format!("the device of epoch {other}, which is over, is still there: unmount it; then ask again");
            return Err(Failure { code: Code::InUse, message });
        }
        self.remove_volume(spec.volume);
        self.attach_anew(now, spec)
    }

    fn answer(&mut self, slot: usize, result: Result<serde_json::Value, Failure>) {
        if let Some(control) = self.controls.get_mut(&slot) {
            control.answer(result);
            control.write();
        }
    }

    /// Returns whether anyone was answered.
    fn answer_waiters(&mut self, now: Timestamp) -> bool {
        let mut any = false;
        for waiter in std::mem::take(&mut self.waiters) {
            let still_there = self.controls.get(&waiter.slot).is_some_and(|control| control.serial == waiter.serial);
            if !still_there {
                continue;
            }
            let volume = self.volumes.get(&waiter.volume);
            let outcome = match (waiter.wanted, volume) {
                (Wanted::Attached, Some(volume)) => volume.attach_outcome().map(|outcome| {
                    outcome.map(|()| serde_json::to_value(volume.status(now, &self.peers)).expect("text keys"))
                }),
                (Wanted::Attached, None) => {
                    Some(Err(Failure { code: Code::Failed, message: "it was detached meanwhile".into() }))
                }
                (Wanted::Formatted(wanted), Some(volume)) => {
                    (volume.formatted() == Some(wanted)).then_some(Ok(serde_json::Value::Null))
                }
                (Wanted::Formatted(_), None) => {
                    Some(Err(Failure { code: Code::Failed, message: "it was detached meanwhile".into() }))
                }
                (Wanted::Gone, Some(volume)) if volume.detach_refusal().is_some() => volume.detach_refusal().map(Err),
                (Wanted::Gone, None) => Some(Ok(serde_json::Value::Null)),
                (Wanted::Gone, Some(volume)) => match volume.attach_outcome() {
                    Some(Err(failure)) if volume.state() != VolumeState::Detaching => Some(Err(failure)),
                    _ => None,
                },
            };
            let pending = || {
                let reason = volume.and_then(|volume| volume.status(now, &self.peers).reason).unwrap_or_default();
                Err(Failure { code: Code::Pending, message: format!("not through yet; it goes on. {reason}") })
            };
            match outcome.or_else(|| (now >= waiter.until).then(pending)) {
                Some(result) => {
                    any = true;
                    self.answer(waiter.slot, result);
                }
                None => self.waiters.push(waiter),
            }
        }
        any
    }
}

fn volume_of(reply: &Reply) -> VolumeId {
    match reply {
        Reply::Attached { volume, .. }
        | Reply::Detached { volume, .. }
        | Reply::FormattedSet { volume, .. }
        | Reply::Refused { volume, .. }
        | Reply::NotLeader { volume, .. }
        | Reply::Leading { volume, .. }
        | Reply::Replicas { volume, .. }
        | Reply::Io { volume, .. }
        | Reply::Resized { volume, .. } => *volume,
    }
}

fn random<const N: usize>() -> Result<[u8; N], AgentError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(AgentError::Random)?;
    Ok(bytes)
}
