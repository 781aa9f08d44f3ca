//! [`Rim`]: the data thread. It samples the clock, moves bytes between sockets, disk and shard, and decides nothing.
//!
//! One `epoll` wakes it for everything: sockets (transport), the disk's completions (the driver's descriptor) and
//! control calls (a waker). Per wake-up it gathers what happened, steps the shard once, and carries out the effects.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_consensus::Timestamp;
use holdfast_id::{ClusterId, DiskId, NodeId};
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{Reply, Request};
use holdfast_protocol::wire::Encoded;
use holdfast_protocol::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, socket_name};
use holdfast_shard::{ClientId, ClientRole, Effects, Event, ReplicaNodes, Shard, ShardOptions};
use holdfast_transport::{
    Class, CloseReason, ConnectionId, Frame, PeerIdentity, PeerRole, SendError, Transport, TransportEvent, Versions,
};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use tokio::sync::oneshot;

use crate::clock;
use crate::config::Config;
use crate::control::{Answer, Call, DiskState};
use crate::disk::Disk;
use crate::peers::Peers;

const WAKER: Token = Token(0);
const DISK: Token = Token(1);
/// Tokens `[TRANSPORT, TRANSPORT_END)` are the transport's: one a socket.
const TRANSPORT: usize = 16;
const TRANSPORT_END: usize = 1 << 20;
/// Readiness events taken per wake-up.
const EVENTS_MAX: usize = 256;
/// Steps per wake-up: more than one where the disk has answered by the time the last one is carried out.
const ROUNDS_MAX: usize = 4;
/// Control calls that may wait for the data thread; one more is refused.
const CALLS_MAX: usize = 256;
/// How long a node that is to stop waits for others to lead what it led: several times what that takes where a quorum
/// is well, and not worth more where none is.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(1);

/// The control thread's end.
#[derive(Clone)]
pub(crate) struct Control {
    calls: SyncSender<(Call, oneshot::Sender<Answer>)>,
    waker: Arc<Waker>,
}

impl Control {
    /// Waits for the data thread's answer; the caller bounds the wait.
    pub(crate) async fn call(&self, call: Call) -> Answer {
        let (sender, receiver) = oneshot::channel();
        match self.calls.try_send((call, sender)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Answer::Refused("too many control calls wait; try again".into()),
            Err(TrySendError::Disconnected(_)) => return Answer::Refused("the node is stopping".into()),
        }
        if let Err(error) = self.waker.wake() {
            return Answer::Refused(format!("the data thread cannot be woken: {error}"));
        }
        receiver.await.unwrap_or_else(|_| Answer::Refused("the node is stopping".into()))
    }
}

/// Who is at the other end of a connection.
#[derive(Clone)]
enum Remote {
    Node(NodeId),
    Client(ClientId, ClientRole),
}

pub(crate) struct Rim {
    poll: Poll,
    waker: Arc<Waker>,
    config: Arc<Config>,
    calls: Receiver<(Call, oneshot::Sender<Answer>)>,
    disk: Disk,
    /// `None` while the disk belongs to no cluster: nothing is listened to then but control calls.
    live: Option<Live>,
    node: NodeId,
    /// Once it is to end: when at the latest.
    stop_at: Option<Timestamp>,
}

/// What a node has once it belongs to a cluster.
struct Live {
    shard: Shard,
    transport: Transport,
    peers: Peers,
    remotes: BTreeMap<ConnectionId, Remote>,
    clients: BTreeMap<ClientId, ConnectionId>,
    next_client: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Answer>>,
    next_token: u64,
}

impl Rim {
    /// Opens everything that can be refused: certificates, ports, the disk.
    pub(crate) fn start(config: &Arc<Config>) -> Result<(Rim, Control)> {
        let (identity, _) = config.credentials()?;
        let node = NodeId::from_bytes(identity.peer().id.to_be_bytes()).context("the certificate names no node")?;
        let poll = Poll::new().context("epoll")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).context("eventfd")?);
        let (sender, calls) = sync_channel(CALLS_MAX);
        let disk = Disk::open(config)?;
        if let DiskState::Formatted(superblock) = disk.view().state {
            // Its votes and log are another node's: one that speaks for it under this name would vote twice.
            ensure!(
                superblock.node == node,
                "the disk {} is that of node {} of cluster {}, the certificate in {} is that of node {node}: start the \
                 node with the disk and the certificate that belong together",
                config.device.display(),
                superblock.node,
                superblock.cluster,
                config.pki.display(),
            );
        }
        if let (DiskState::Formatted(superblock), Some(join)) = (disk.view().state, &config.join) {
            ensure!(
                superblock.cluster == join.cluster,
                "the disk {} belongs to cluster {}, the node is to join {}: give it its own disk, or an empty one",
                config.device.display(),
                superblock.cluster,
                join.cluster,
            );
        }
        poll.registry().register(&mut SourceFd(&disk.fd()), DISK, Interest::READABLE).context("watch the disk")?;
        let (config, own_waker) = (Arc::clone(config), Arc::clone(&waker));
        let mut rim = Rim { poll, waker: own_waker, config, calls, disk, live: None, node, stop_at: None };
        rim.go_live()?;
        Ok((rim, Control { calls: sender, waker }))
    }

    fn go_live(&mut self) -> Result<()> {
        let DiskState::Formatted(_) = self.disk.view().state else { return Ok(()) };
        // First what may be refused without a trace: opening the disk writes to it.
        let listen = self.config.listen;
        let listener = crate::bind(listen)?;
        let options = ShardOptions::new(u128::from_le_bytes(random_bytes()?));
        let Some(shard) = self.disk.open_shard(options, clock::now())? else { return Ok(()) };
        let (identity, roots) = self.config.credentials()?;
        let superblock = shard.superblock();
        let versions = Versions { min: PROTOCOL_VERSION_MIN, max: PROTOCOL_VERSION };
        let mut options = holdfast_transport::Options::new(identity, roots, superblock.boot_epoch, versions);
        options.cluster = Some(superblock.cluster);
        let mut transport = Transport::new(options, self.poll.registry(), TRANSPORT..TRANSPORT_END)?;
        transport.listen(listener)?;
        if let Some(sockets) = &self.config.sockets {
            // Agents that find no socket connect over TLS: its lack costs time, nothing else.
            match bind_local(sockets, self.node) {
                Ok(listener) => transport.listen_unix(listener)?,
                Err(error) => {
                    tracing::warn!(%error, folder = %sockets.display(), "no socket for agents of this machine")
                }
            }
        }
        let waker = Arc::clone(&self.waker);
        // A wake-up that fails leaves the answer to the next one: heartbeats come every 100 ms.
        let wake = Arc::new(move || drop(waker.wake()));
        let peers = Peers::open(&self.config.dir, self.node, self.config.peer_address(), wake)?;
        tracing::info!(node = %self.node, cluster = %superblock.cluster, disk = %superblock.disk, %listen, "serving");
        let damaged = shard.report().log_damage.groups;
        if damaged > 0 {
            tracing::warn!(
                damaged,
                "the log was damaged: copies on this disk do not vote before they have followed an elected leader"
            );
        }
        self.live = Some(Live {
            shard,
            transport,
            peers,
            remotes: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            waiting: BTreeMap::new(),
            next_token: 0,
        });
        Ok(())
    }

    /// Until a stop is asked for and others lead what this node led; ends with a note of that on the disk.
    ///
    /// # Errors
    /// What the machine no longer gives: epoll, the address book's file, the disk.
    pub(crate) fn run(mut self) -> Result<()> {
        let mut readiness = Events::with_capacity(EVENTS_MAX);
        while !self.is_done() {
            let deadline = [self.live.as_ref().and_then(Live::deadline), self.stop_at].into_iter().flatten().min();
            let timeout = deadline.map(|at| at.since(clock::now()));
            match self.poll.poll(&mut readiness, timeout) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error).context("epoll"),
                _ => {}
            }
            let mut events = Vec::new();
            self.take_calls(&mut events);
            // What completes while this thread waits interrupts the wait, and needs no other to be noticed.
            let disk_ready = readiness.iter().any(|event| event.token() == DISK) || self.disk.is_ready();
            let completions = if disk_ready { self.disk.completions() } else { Vec::new() };
            let Some(live) = &mut self.live else { continue };
            live.take_frames(&readiness, &mut events);
            events.extend(completions.into_iter().map(|(id, result)| Event::Device { id, result }));
            for round in 1.. {
                // Sampled after the last event was received: an answer that waited in a queue must not look fresh.
                let now = clock::now();
                let mut effects = live.shard.step(events, now);
                self.disk.submit(std::mem::take(&mut effects.device));
                if let Some(reason) = effects.failed.take() {
                    tracing::error!(%reason, "the disk failed: this node serves nothing more from it");
                    self.disk.fail(reason);
                }
                live.carry_out(effects)?;
                live.peers.connect_due(&mut live.transport, now);
                live.transport.flush();
                if round == ROUNDS_MAX || !self.disk.is_ready() {
                    break;
                }
                let completions = self.disk.completions();
                events = completions.into_iter().map(|(id, result)| Event::Device { id, result }).collect();
            }
        }
        self.disk.close(self.live.map(|live| live.shard))
    }

    fn is_done(&self) -> bool {
        let Some(stop_at) = self.stop_at else { return false };
        self.live.as_ref().is_none_or(|live| live.shard.is_handed_over()) || clock::now() >= stop_at
    }

    fn take_calls(&mut self, events: &mut Vec<Event>) {
        while let Ok((call, answer)) = self.calls.try_recv() {
            let reply = match call {
                Call::Probe => Answer::Disk(self.disk.view()),
                Call::Format { cluster } => match self.format(cluster) {
                    Ok(()) => Answer::Disk(self.disk.view()),
                    Err(error) => Answer::Refused(format!("{error:#}")),
                },
                Call::Stop => {
                    // A second one, sent by whoever notices the end, changes nothing.
                    self.stop_at.get_or_insert(clock::now() + HAND_OVER_WITHIN);
                    events.push(Event::Stop);
                    Answer::Done
                }
                Call::Credentials(credentials) => match &mut self.live {
                    Some(live) => match live.transport.set_identity(credentials.0, credentials.1) {
                        Ok(()) => Answer::Done,
                        Err(error) => Answer::Refused(error.to_string()),
                    },
                    None => Answer::Done,
                },
                Call::Learn(_) | Call::Addresses | Call::Shard(_) if self.live.is_none() => {
                    Answer::Refused(match self.disk.view().state {
                        DiskState::Empty => "the node belongs to no cluster yet".into(),
                        DiskState::Foreign(reason) | DiskState::Failed(reason) => reason,
                        DiskState::Formatted(_) => "the disk is not open".into(),
                    })
                }
                Call::Learn(addresses) => {
                    let live = self.live.as_mut().expect("checked by the arm before");
                    match live.peers.learn(&addresses) {
                        Ok(()) => Answer::Done,
                        Err(error) => Answer::Refused(format!("{error:#}")),
                    }
                }
                Call::Addresses => {
                    Answer::Addresses(self.live.as_ref().expect("checked by the arm before").peers.addresses())
                }
                Call::Shard(request) => {
                    let live = self.live.as_mut().expect("checked by the arm before");
                    live.next_token += 1;
                    live.waiting.insert(live.next_token, answer);
                    events.push(Event::Admin { token: live.next_token, request });
                    continue;
                }
            };
            // The caller may have given up waiting.
            let _ = answer.send(reply);
        }
    }

    fn format(&mut self, cluster: ClusterId) -> Result<()> {
        if let DiskState::Formatted(superblock) = self.disk.view().state {
            ensure!(superblock.cluster == cluster, "the disk belongs to cluster {}", superblock.cluster);
            return Ok(());
        }
        let disk = DiskId::from_bytes(random_bytes()?).context("a random identifier of all zeroes")?;
        self.disk.format(cluster, self.node, disk)?;
        self.go_live()
    }
}

impl Live {
    fn deadline(&self) -> Option<Timestamp> {
        let transport = self.transport.deadline().map(|since_boot| Timestamp::ZERO + since_boot);
        [self.shard.deadline(), transport, self.peers.deadline()].into_iter().flatten().min()
    }

    fn take_frames(&mut self, readiness: &Events, events: &mut Vec<Event>) {
        let now = clock::now();
        for event in readiness {
            if self.transport.owns(event.token()) {
                self.transport.on_ready(event, clock::since_boot(now));
            }
        }
        self.transport.on_deadline(clock::since_boot(now));
        while let Some(event) = self.transport.poll() {
            match event {
                TransportEvent::Connected { connection, identity, holder, .. } => {
                    if let Remote::Node(node) = self.on_connected(connection, identity, holder) {
                        events.push(Event::PeerConnected(node));
                    }
                }
                TransportEvent::Frame { connection, frame } => self.on_frame(connection, frame, events),
                TransportEvent::Closed { connection, reason, .. } => {
                    self.peers.on_closed(connection, &reason, now);
                    self.forget(connection, events);
                }
                TransportEvent::Writable { .. } => {}
            }
        }
    }

    fn on_frame(&mut self, connection: ConnectionId, frame: Frame, events: &mut Vec<Event>) {
        let Frame { kind, meta, payload } = frame;
        let event = match self.remotes.get(&connection).cloned() {
            Some(Remote::Node(from)) => {
                PeerMessage::decode(kind, meta, payload).map(|message| Event::Peer { from, message })
            }
            Some(Remote::Client(client, role)) => {
                Request::decode(kind, meta, payload).map(|request| Event::Client { client, role, request })
            }
            None => return,
        };
        match event {
            Ok(event) => events.push(event),
            Err(error) => {
                tracing::warn!(%connection, %error, "a message that cannot be read: the connection ends");
                self.transport.close(connection);
                self.peers.on_closed(connection, &CloseReason::Goodbye, clock::now());
                self.forget(connection, events);
            }
        }
    }

    fn forget(&mut self, connection: ConnectionId, events: &mut Vec<Event>) {
        match self.remotes.remove(&connection) {
            // A newer connection of the same pair may have taken this one's place.
            Some(Remote::Node(node)) if self.peers.connection(node).is_none_or(|current| current == connection) => {
                events.push(Event::PeerClosed(node));
            }
            Some(Remote::Client(client, _)) => {
                self.clients.remove(&client);
                events.push(Event::ClientClosed(client));
            }
            Some(Remote::Node(_)) | None => {}
        }
    }

    fn on_connected(&mut self, connection: ConnectionId, identity: PeerIdentity, holder: Option<Arc<str>>) -> Remote {
        let node = NodeId::from_bytes(identity.id.to_be_bytes()).filter(|_| identity.role == PeerRole::Node);
        let remote = match node {
            Some(node) => {
                if let Some(former) = self.peers.on_connected(node, connection) {
                    self.remotes.remove(&former);
                    self.transport.close(former);
                }
                Remote::Node(node)
            }
            None => {
                self.next_client += 1;
                let client = ClientId(self.next_client);
                self.clients.insert(client, connection);
                // Only a `node-agent` has a holder, and none is without.
                Remote::Client(client, holder.map_or(ClientRole::Agent, ClientRole::NodeAgent))
            }
        };
        self.remotes.insert(connection, remote.clone());
        remote
    }

    fn carry_out(&mut self, effects: Effects) -> Result<()> {
        for (node, message) in effects.peers {
            let Some(connection) = self.peers.connection(node) else { continue };
            let class = match message {
                PeerMessage::Heartbeat { .. } | PeerMessage::HeartbeatReply { .. } => Class::Control,
                PeerMessage::Raft { .. } | PeerMessage::Control { .. } => Class::Data,
                PeerMessage::RepairRequest { .. } => Class::Data,
                PeerMessage::Delta { .. } | PeerMessage::RepairReply { .. } => Class::Bulk,
            };
            match self.transport.send(connection, class, into_frame(message.encode())) {
                // Who needs an answer sends again.
                Ok(()) | Err(SendError::Full | SendError::Closed) => {}
                Err(error @ SendError::TooLong) => tracing::error!(%node, %error, "a message that can never be sent"),
            }
        }
        for (client, reply) in effects.clients {
            self.reply(client, &reply);
        }
        for (client, ReplicaNodes { volume, term, nodes }) in effects.replicas {
            // One whose address is not known yet is told of with the next change, or by the leader's successor.
            let found = nodes.into_iter().filter_map(|node| Some((node, self.peers.address(node)?)));
            let replicas: Vec<(NodeId, String)> = found.collect();
            if !replicas.is_empty() {
                self.reply(client, &Reply::Replicas { volume, term, replicas });
            }
        }
        for (token, reply) in effects.admin {
            if let Some(answer) = self.waiting.remove(&token) {
                let _ = answer.send(Answer::Shard(reply));
            }
        }
        if !effects.addresses.is_empty() {
            self.peers.learn(&effects.addresses)?;
        }
        Ok(())
    }

    fn reply(&mut self, client: ClientId, reply: &Reply) {
        let Some(connection) = self.clients.get(&client) else { return };
        if self.transport.send(*connection, Class::Data, into_frame(reply.encode())).is_err() {
            // A client that does not take its answers has lost them: it starts again with a new connection.
            self.transport.close(*connection);
        }
    }
}

/// A socket left by a dead process is in the way: this one has the disk, so no other serves as this node.
fn bind_local(folder: &Path, node: NodeId) -> std::io::Result<UnixListener> {
    std::fs::create_dir_all(folder)?;
    let path = folder.join(socket_name(node));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

fn into_frame(message: Encoded) -> Frame {
    Frame { kind: message.kind, meta: message.meta, payload: message.payload }
}

fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).context("the system has no random numbers")?;
    Ok(bytes)
}
