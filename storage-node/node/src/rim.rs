//! [`Rim`]: the data thread. It samples the clock, moves bytes between sockets, disk and shard, and decides nothing.
//!
//! One `epoll` wakes it for everything: sockets (transport), the disk's completions (the driver's descriptor) and
//! control calls (a waker). Per wake-up it gathers what happened, steps the shard once, and carries out the effects.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use anyhow::{Context, Result};
use holdfast_consensus::Timestamp;
use holdfast_id::{ClusterId, DiskId, NodeId};
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{Reply, Request};
use holdfast_shard::{AdminReply, ClientId, Effects, Event, Shard, ShardOptions};
use holdfast_transport::pki::Identity;
use holdfast_transport::{ConnectionId, PeerIdentity, PeerRole, Transport, TransportEvent};
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
/// Control calls that may wait for the data thread; one more is refused.
const CALLS_MAX: usize = 256;

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
#[derive(Clone, Copy)]
enum Remote {
    Node(NodeId),
    Client(ClientId),
}

pub(crate) struct Rim {
    poll: Poll,
    transport: Transport,
    calls: Receiver<(Call, oneshot::Sender<Answer>)>,
    disk: Disk,
    shard: Option<Shard>,
    peers: Peers,
    remotes: BTreeMap<ConnectionId, Remote>,
    clients: BTreeMap<ClientId, ConnectionId>,
    next_client: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Answer>>,
    next_token: u64,
    node: NodeId,
    stopping: bool,
}

impl Rim {
    /// Opens everything that can be refused: certificates, ports, the disk.
    pub(crate) fn start(config: &Config, identity: Identity) -> Result<(Rim, Control)> {
        let node = identity_node(&identity)?;
        let poll = Poll::new().context("epoll")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).context("eventfd")?);
        let (sender, calls) = sync_channel(CALLS_MAX);
        let mut disk = Disk::open(config)?;
        poll.registry().register(&mut SourceFd(&disk.fd()), DISK, Interest::READABLE).context("watch the disk")?;
        let cluster = disk.cluster();
        let options = holdfast_transport::Options::new(identity, cluster);
        let mut transport = Transport::new(options, poll.registry(), TRANSPORT..TRANSPORT_END)?;
        let listener = TcpListener::bind(config.listen)
            .with_context(|| format!("listen on {}; is another node running there?", config.listen))?;
        transport.listen(listener)?;
        let shard = disk.open_shard(options_of_shard()?, clock::now())?;
        let peers = Peers::open(config.dir.join("peers.json"), node)?;
        let rim = Rim {
            poll,
            transport,
            calls,
            disk,
            shard,
            peers,
            remotes: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            waiting: BTreeMap::new(),
            next_token: 0,
            node,
            stopping: false,
        };
        Ok((rim, Control { calls: sender, waker }))
    }

    /// Until a stop is asked for.
    ///
    /// # Errors
    /// What the machine no longer gives: epoll, the address book's file.
    pub(crate) fn run(mut self) -> Result<()> {
        let mut readiness = Events::with_capacity(EVENTS_MAX);
        while !self.stopping {
            let timeout = self.deadline().map(|at| at.since(clock::now()));
            match self.poll.poll(&mut readiness, timeout) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error).context("epoll"),
                _ => {}
            }
            let now = clock::now();
            let mut events = Vec::new();
            for event in &readiness {
                if self.transport.owns(event.token()) {
                    self.transport.on_ready(event, clock::since_boot(now));
                }
            }
            self.transport.on_deadline(clock::since_boot(now));
            self.take_calls(&mut events);
            self.take_frames(now, &mut events);
            events.extend(self.disk.completions().into_iter().map(|(id, result)| Event::Device { id, result }));
            // Sampled after the last event was received: an answer that waited in a queue must not look fresh.
            let now = clock::now();
            if let Some(shard) = &mut self.shard {
                let effects = shard.step(events, now);
                self.carry_out(effects)?;
            }
            self.peers.connect_due(&mut self.transport, now);
            self.transport.flush();
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Timestamp> {
        let shard = self.shard.as_ref().and_then(Shard::deadline);
        let transport = self.transport.deadline().map(|since_boot| Timestamp::ZERO + since_boot);
        [shard, transport, self.peers.deadline()].into_iter().flatten().min()
    }

    fn take_frames(&mut self, now: Timestamp, events: &mut Vec<Event>) {
        while let Some(event) = self.transport.poll() {
            match event {
                TransportEvent::Connected { connection, identity, .. } => {
                    let remote = self.on_connected(connection, identity);
                    if let Remote::Node(node) = remote {
                        events.push(Event::PeerConnected(node));
                    }
                }
                TransportEvent::Frame { connection, frame } => {
                    let Some(remote) = self.remotes.get(&connection).copied() else { continue };
                    let event = match remote {
                        Remote::Node(from) => PeerMessage::decode(frame.kind, frame.meta, frame.payload)
                            .map(|message| Event::Peer { from, message })
                            .map_err(|error| error.to_string()),
                        Remote::Client(client) => Request::decode(frame.kind, frame.meta, frame.payload)
                            .map(|request| Event::Client { client, request })
                            .map_err(|error| error.to_string()),
                    };
                    match event {
                        Ok(event) => events.push(event),
                        Err(reason) => {
                            tracing::warn!(%connection, %reason, "a frame that cannot be read; the connection ends");
                            self.transport.close(connection);
                        }
                    }
                }
                TransportEvent::Closed { connection, reason } => {
                    self.peers.on_closed(connection, &reason, now);
                    match self.remotes.remove(&connection) {
                        Some(Remote::Node(node)) => {
                            // A newer connection of the same pair may have taken this one's place.
                            if self.peers.connection(node).is_none() {
                                events.push(Event::PeerClosed(node));
                            }
                        }
                        Some(Remote::Client(client)) => {
                            self.clients.remove(&client);
                            events.push(Event::ClientClosed(client));
                        }
                        None => tracing::debug!(%connection, %reason, "a connection came to nothing"),
                    }
                }
                TransportEvent::Writable { .. } => {}
            }
        }
    }

    fn on_connected(&mut self, connection: ConnectionId, identity: PeerIdentity) -> Remote {
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
                Remote::Client(client)
            }
        };
        self.remotes.insert(connection, remote);
        remote
    }

    fn take_calls(&mut self, events: &mut Vec<Event>) {
        while let Ok((call, answer)) = self.calls.try_recv() {
            let reply = match call {
                Call::Probe => Answer::Disk(self.disk.view()),
                Call::Format { cluster } => match self.format(cluster) {
                    Ok(()) => Answer::Disk(self.disk.view()),
                    Err(error) => Answer::Refused(format!("{error:#}")),
                },
                Call::Learn(addresses) => match self.peers.learn(&addresses) {
                    Ok(()) => Answer::Done,
                    Err(error) => Answer::Refused(format!("{error:#}")),
                },
                Call::Stop => {
                    self.stopping = true;
                    Answer::Done
                }
                Call::Shard(request) if self.shard.is_some() => {
                    self.next_token += 1;
                    self.waiting.insert(self.next_token, answer);
                    events.push(Event::Admin { token: self.next_token, request });
                    continue;
                }
                Call::Shard(_) => Answer::Refused(match self.disk.view().state {
                    DiskState::Empty => "the node belongs to no cluster yet".into(),
                    DiskState::Foreign(reason) | DiskState::Failed(reason) => reason,
                    DiskState::Formatted(_) => "the disk is not open".into(),
                }),
            };
            // The caller may have given up waiting.
            let _ = answer.send(reply);
        }
    }

    fn format(&mut self, cluster: ClusterId) -> Result<()> {
        if self.disk.cluster() == Some(cluster) {
            return Ok(());
        }
        let disk = DiskId::from_bytes(random_bytes()?).context("a random identifier of all zeroes")?;
        self.disk.format(cluster, self.node, disk)?;
        self.shard = self.disk.open_shard(options_of_shard()?, clock::now())?;
        self.transport.set_cluster(cluster);
        Ok(())
    }

    fn carry_out(&mut self, effects: Effects) -> Result<()> {
        self.disk.submit(effects.device);
        for (node, message) in effects.peers {
            let Some(connection) = self.peers.connection(node) else { continue };
            let class = message.class();
            let (kind, meta, payload) = message.encode();
            // A full or closed connection loses the message; consensus sends again what matters.
            let _ = self.transport.send(connection, class.into(), holdfast_transport::Frame { kind, meta, payload });
        }
        for (client, reply) in effects.clients {
            self.reply(client, &reply);
        }
        for (token, reply) in effects.admin {
            if let Some(answer) = self.waiting.remove(&token) {
                let _ = answer.send(Answer::Shard(reply));
            }
        }
        if !effects.addresses.is_empty() {
            self.peers.learn(&effects.addresses)?;
        }
        if let Some(reason) = effects.failed {
            tracing::error!(%reason, "the disk failed: this node serves nothing more from it");
            self.disk.fail(reason);
        }
        Ok(())
    }

    fn reply(&mut self, client: ClientId, reply: &Reply) {
        let Some(connection) = self.clients.get(&client) else { return };
        let (kind, meta, payload) = reply.encode();
        let frame = holdfast_transport::Frame { kind, meta, payload };
        if self.transport.send(*connection, holdfast_transport::Class::Data, frame).is_err() {
            // A client that does not read its answers has lost them: it starts again with a new connection.
            self.transport.close(*connection);
        }
    }
}

pub(crate) fn identity_node(identity: &Identity) -> Result<NodeId> {
    let peer = identity.peer();
    anyhow::ensure!(peer.role == PeerRole::Node, "the certificate is for the role {}, not for a node", peer.role);
    NodeId::from_bytes(peer.id.to_be_bytes()).context("the certificate names no node")
}

fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).context("the system has no random numbers")?;
    Ok(bytes)
}

fn options_of_shard() -> Result<ShardOptions> {
    Ok(ShardOptions::new(u64::from_le_bytes(random_bytes()?)))
}
