//! The connections to storage nodes: one per node, shared by all volumes, made again when lost.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_consensus::Timestamp;
use holdfast_id::NodeId;
use holdfast_protocol::session::{Reply, Request};
use holdfast_protocol::socket_name;
use holdfast_transport::pki::{Identity, Roots};
use holdfast_transport::resolver::Resolver;
use holdfast_transport::{Class, ConnectionId, Frame, PeerIdentity, PeerRole, SendError, Transport, TransportEvent};

use crate::config::{Address, NodeAddress};
use crate::control::NodeStatus;

/// The first wait before a lost node is tried again; a restarted process listens within milliseconds.
const RETRY_MIN: Duration = Duration::from_millis(5);
/// The longest: a node that comes back is noticed within this.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A connection that lasted this long was a good one: the next loss starts from [`RETRY_MIN`].
const GOOD_AFTER: Duration = Duration::from_secs(1);
/// Between two looks whether the socket of a node of this machine answers, while its address does; doubled each time: a
/// node that was started again has it within milliseconds, one that has moved elsewhere leaves it behind for good.
const SOCKET_AGAIN_MIN: Duration = Duration::from_millis(100);
const SOCKET_AGAIN_MAX: Duration = Duration::from_secs(60);
/// Frames that wait behind the transport's own queue. The data in them is that of the clients' windows, so it is held
/// anyway; past this the node takes nothing any more, and a new connection is the better way.
const FRAMES_WAITING_MAX: usize = 16 << 10;

pub(crate) enum PeerEvent {
    Connected(NodeId),
    Closed(NodeId),
    Reply { from: NodeId, reply: Reply },
}

struct Peer {
    address: Address,
    /// Volumes that use it; without any it is forgotten.
    users: usize,
    /// The last attempt was by the socket on this machine, and failed.
    socket_failed: bool,
    connection: Option<ConnectionId>,
    connected_at: Option<Timestamp>,
    /// Connected by its address though it has a socket on this machine.
    detour: Option<Detour>,
    /// The last connection by the socket.
    by_socket: Option<ConnectionId>,
    retry_at: Option<Timestamp>,
    retry_wait: Duration,
    waiting: VecDeque<(Class, Frame)>,
    /// Attempts by address; a name with several addresses has them tried in turn.
    attempts: usize,
    /// Why there is no connection.
    reason: Option<String>,
}

/// The socket is tried beside the connection that is used, and takes its place once it answers.
struct Detour {
    /// Under way.
    connection: Option<ConnectionId>,
    again_at: Option<Timestamp>,
    again_wait: Duration,
}

pub(crate) struct Peers {
    transport: Transport,
    resolver: Resolver,
    /// Where the nodes of this machine have their sockets.
    sockets: Option<PathBuf>,
    peers: BTreeMap<NodeId, Peer>,
    by_connection: BTreeMap<ConnectionId, NodeId>,
    events: VecDeque<PeerEvent>,
}

fn since_boot(now: Timestamp) -> Duration {
    Duration::from_nanos(now.0)
}

impl Peers {
    /// `wake` ends the wait of the thread that drives it.
    pub fn new(transport: Transport, sockets: Option<PathBuf>, wake: Arc<dyn Fn() + Send + Sync>) -> Peers {
        Peers {
            transport,
            resolver: Resolver::of_the_system(wake),
            sockets,
            peers: BTreeMap::new(),
            by_connection: BTreeMap::new(),
            events: VecDeque::new(),
        }
    }

    /// Connections from now on show and trust these.
    pub fn set_identity(&mut self, identity: Identity, roots: Roots) {
        match self.transport.set_identity(identity, roots) {
            Ok(()) => tracing::info!("the certificates were replaced: new connections use them"),
            Err(error) => tracing::error!(%error, "the certificates in the folder cannot be used"),
        }
    }

    pub fn is_connected(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.connected_at.is_some())
    }

    pub fn status(&self, entry: &NodeAddress) -> NodeStatus {
        let peer = self.peers.get(&entry.node);
        NodeStatus {
            node: entry.node,
            address: entry.address.clone(),
            connected: self.is_connected(entry.node),
            reason: peer.and_then(|peer| peer.reason.clone()),
        }
    }

    pub fn owns(&self, token: mio::Token) -> bool {
        self.transport.owns(token)
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        let transport = self.transport.deadline().map(|at| Timestamp(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)));
        let now = (!self.events.is_empty()).then_some(Timestamp::ZERO);
        let retries = self.peers.values().filter_map(|peer| peer.retry_at);
        let sockets = self.peers.values().filter_map(|peer| peer.detour.as_ref()?.again_at);
        retries.chain(sockets).chain(transport).chain(now).min()
    }

    pub fn on_ready(&mut self, event: &mio::event::Event, now: Timestamp) {
        self.transport.on_ready(event, since_boot(now));
    }

    pub fn on_deadline(&mut self, now: Timestamp) {
        if self.transport.deadline().is_some_and(|at| at <= since_boot(now)) {
            self.transport.on_deadline(since_boot(now));
        }
        for (node, found) in self.resolver.take() {
            self.on_resolved(now, node, found);
        }
        let due = |(node, peer): (&NodeId, &Peer)| peer.retry_at.is_some_and(|at| at <= now).then_some(*node);
        for node in self.peers.iter().filter_map(due).collect::<Vec<_>>() {
            self.connect(now, node);
        }
        let due = |peer: &Peer| peer.detour.as_ref()?.again_at.filter(|at| *at <= now);
        let due = |(node, peer): (&NodeId, &Peer)| due(peer).map(|_| *node);
        for node in self.peers.iter().filter_map(due).collect::<Vec<_>>() {
            self.try_socket(now, node);
        }
    }

    /// One more volume uses the node. A new address counts from the next connection on.
    pub fn add(&mut self, now: Timestamp, entry: &NodeAddress) {
        let peer = self.peers.entry(entry.node).or_insert_with(|| Peer {
            address: entry.address.clone(),
            users: 0,
            socket_failed: false,
            connection: None,
            connected_at: None,
            detour: None,
            by_socket: None,
            retry_at: Some(now),
            retry_wait: RETRY_MIN,
            waiting: VecDeque::new(),
            attempts: 0,
            reason: Some("not connected yet".into()),
        });
        peer.users += 1;
        if peer.address != entry.address {
            peer.address = entry.address.clone();
            if peer.retry_at.is_some() {
                peer.retry_at = Some(now);
            }
        }
    }

    /// One volume less uses the node.
    pub fn remove(&mut self, node: NodeId) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.users -= 1;
        if peer.users > 0 {
            return;
        }
        let detour = peer.detour.take().and_then(|detour| detour.connection);
        for connection in peer.connection.into_iter().chain(detour) {
            self.transport.close(connection);
            self.by_connection.remove(&connection);
        }
        self.peers.remove(&node);
    }

    /// To a node without a connection nothing is sent: whoever sends learns of the loss and sends again.
    pub fn send(&mut self, now: Timestamp, to: NodeId, request: &Request) {
        let class = if matches!(request, Request::Io { .. }) { Class::Data } else { Class::Control };
        let Some(peer) = self.peers.get_mut(&to) else { return };
        let Some(connection) = peer.connection.filter(|_| peer.connected_at.is_some()) else { return };
        let encoded = request.encode();
        let frame = Frame { kind: encoded.kind, meta: encoded.meta, payload: encoded.payload };
        if peer.waiting.is_empty() {
            match self.transport.send(connection, class, frame.clone()) {
                Ok(()) | Err(SendError::Closed) => return,
                Err(SendError::Full) => {}
                Err(SendError::TooLong) => unreachable!("requests are at most 1 MiB long"),
            }
        }
        if peer.waiting.len() < FRAMES_WAITING_MAX {
            peer.waiting.push_back((class, frame));
            return;
        }
        self.transport.close(connection);
        self.on_closed(now, to, "it took nothing any more; the connection is made anew".into());
    }

    /// Writes out what was sent.
    pub fn flush(&mut self) {
        self.transport.flush();
    }

    pub fn poll(&mut self, now: Timestamp) -> Option<PeerEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let event = self.transport.poll()?;
            self.on_transport(now, event);
        }
    }

    fn on_transport(&mut self, now: Timestamp, event: TransportEvent) {
        let Some(node) = self.by_connection.get(&event.connection()).copied() else { return };
        let peer = self.peers.get_mut(&node).expect("a connection belongs to a peer");
        if peer.detour.as_ref().is_some_and(|detour| detour.connection == Some(event.connection())) {
            return self.on_detour(now, node, event);
        }
        match event {
            TransportEvent::Connected { connection, .. } => {
                peer.connected_at = Some(now);
                peer.socket_failed = false;
                peer.reason = None;
                tracing::info!(%node, "connected");
                self.events.push_back(PeerEvent::Connected(node));
                let by_socket = peer.by_socket == Some(connection);
                let socket = self.sockets.as_ref().map(|sockets| sockets.join(socket_name(node)));
                peer.detour = socket.filter(|path| !by_socket && path.exists()).map(|_| Detour {
                    connection: None,
                    again_at: Some(now),
                    again_wait: SOCKET_AGAIN_MIN,
                });
            }
            TransportEvent::Frame { connection, frame } => match Reply::decode(frame.kind, frame.meta, frame.payload) {
                Ok(reply) => self.events.push_back(PeerEvent::Reply { from: node, reply }),
                Err(error) => {
                    self.transport.close(connection);
                    self.on_closed(now, node, format!("it sent what is no reply: {error}"));
                }
            },
            TransportEvent::Closed { reason, .. } => self.on_closed(now, node, reason.to_string()),
            TransportEvent::Writable { connection } => {
                while let Some((class, frame)) = peer.waiting.front() {
                    if self.transport.send(connection, *class, frame.clone()).is_err() {
                        break;
                    }
                    peer.waiting.pop_front();
                }
            }
        }
    }

    fn try_socket(&mut self, now: Timestamp, node: NodeId) {
        let Some(sockets) = &self.sockets else { return };
        let Some(detour) = self.peers.get_mut(&node).and_then(|peer| peer.detour.as_mut()) else { return };
        detour.again_at = None;
        let connection = self.transport.connect_unix(&sockets.join(socket_name(node)), expected(node), since_boot(now));
        detour.connection = Some(connection);
        self.by_connection.insert(connection, node);
    }

    /// Of a socket that is tried while the address answers. Its volumes see a connection lost and made again.
    fn on_detour(&mut self, now: Timestamp, node: NodeId, event: TransportEvent) {
        let peer = self.peers.get_mut(&node).expect("a connection belongs to a peer");
        let detour = peer.detour.as_mut().expect("the event is its connection's");
        match event {
            TransportEvent::Connected { connection, .. } => {
                peer.detour = None;
                peer.by_socket = Some(connection);
                if let Some(former) = peer.connection.replace(connection) {
                    self.transport.close(former);
                    self.by_connection.remove(&former);
                }
                peer.waiting.clear();
                peer.connected_at = Some(now);
                tracing::info!(%node, "connected by its socket");
                self.events.extend([PeerEvent::Closed(node), PeerEvent::Connected(node)]);
            }
            TransportEvent::Closed { connection, .. } => {
                self.by_connection.remove(&connection);
                detour.connection = None;
                detour.again_at = Some(now + detour.again_wait);
                detour.again_wait = (detour.again_wait * 2).min(SOCKET_AGAIN_MAX);
            }
            // Nothing was asked there yet.
            TransportEvent::Frame { .. } | TransportEvent::Writable { .. } => {}
        }
    }

    fn connect(&mut self, now: Timestamp, node: NodeId) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.retry_at = None;
        let expected = expected(node);
        let socket = self.sockets.as_ref().map(|sockets| sockets.join(socket_name(node)));
        let socket = socket.filter(|path| !peer.socket_failed && path.exists());
        // Withdrawn when it has connected: whatever else becomes of it, the address is next.
        peer.socket_failed = socket.is_some();
        let connection = match (&peer.address, &socket) {
            (_, Some(path)) | (Address::Unix(path), None) => {
                self.transport.connect_unix(path, expected, since_boot(now))
            }
            (Address::Tcp(address), None) => self.transport.connect(*address, expected, since_boot(now)),
            (Address::Name(name), None) => return self.resolver.ask(node, name),
        };
        peer.connection = Some(connection);
        peer.by_socket = socket.map(|_| connection);
        self.by_connection.insert(connection, node);
    }

    /// The peer may have gone meanwhile, or be another one of the same node, which waits for its own turn.
    fn on_resolved(&mut self, now: Timestamp, node: NodeId, found: io::Result<Vec<SocketAddr>>) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.connection.is_some() || peer.retry_at.is_some() {
            return;
        }
        match found.as_deref() {
            Ok([]) => self.on_closed(now, node, "its name has no address".into()),
            Ok(found) => {
                let address = found[peer.attempts % found.len()];
                peer.attempts = peer.attempts.wrapping_add(1);
                let connection = self.transport.connect(address, expected(node), since_boot(now));
                peer.connection = Some(connection);
                self.by_connection.insert(connection, node);
            }
            Err(error) => self.on_closed(now, node, format!("its name cannot be resolved: {error}")),
        }
    }

    fn on_closed(&mut self, now: Timestamp, node: NodeId, reason: String) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if let Some(connection) = peer.connection.take() {
            self.by_connection.remove(&connection);
        }
        if let Some(connection) = peer.detour.take().and_then(|detour| detour.connection) {
            self.transport.close(connection);
            self.by_connection.remove(&connection);
        }
        let connected_at = peer.connected_at.take();
        peer.waiting.clear();
        if connected_at.is_some_and(|at| now.since(at) >= GOOD_AFTER) {
            peer.retry_wait = RETRY_MIN;
        }
        peer.retry_at = Some(now + peer.retry_wait);
        peer.retry_wait = (peer.retry_wait * 2).min(RETRY_MAX);
        if connected_at.is_some() || peer.reason.as_ref() != Some(&reason) {
            tracing::warn!(%node, address = %peer.address, %reason, "not connected");
        }
        peer.reason = Some(reason);
        if connected_at.is_some() {
            self.events.push_back(PeerEvent::Closed(node));
        }
    }
}

fn expected(node: NodeId) -> Option<PeerIdentity> {
    Some(PeerIdentity { role: PeerRole::Node, id: node.as_u128() })
}
