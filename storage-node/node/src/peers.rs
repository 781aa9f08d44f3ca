//! [`Peers`]: one connection to every known node, made anew when it is lost.
//!
//! Of a pair, the node with the lower identifier connects; the other waits. Where both ends know each other there is
//! so exactly one connection, and a second one (the peer started again before this end noticed) replaces the first.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use holdfast_consensus::Timestamp;
use holdfast_id::NodeId;
use holdfast_shard::NodeAddress;
use holdfast_transport::resolver::Resolver;
use holdfast_transport::{CloseReason, ConnectionId, PeerIdentity, PeerRole, Transport};

use crate::addresses::{Address, AddressBook};
use crate::clock;

/// After a connection was lost or came to nothing; doubled each time, up to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);

struct Peer {
    address: String,
    /// Greeted and usable.
    connection: Option<ConnectionId>,
    /// Under way.
    connecting: Option<ConnectionId>,
    retry_at: Timestamp,
    retry_after: Duration,
    /// Connections tried; a name with several addresses has them tried in turn.
    attempts: usize,
}

impl Peer {
    /// Known by name only, to be connected to at once.
    fn new() -> Peer {
        Peer {
            address: String::new(),
            connection: None,
            connecting: None,
            retry_at: Timestamp::ZERO,
            retry_after: RETRY_MIN,
            attempts: 0,
        }
    }

    fn is_unconnected(&self) -> bool {
        self.connection.is_none() && self.connecting.is_none()
    }
}

pub(crate) struct Peers {
    node: NodeId,
    /// Where others reach this node.
    advertise: String,
    book: AddressBook,
    peers: BTreeMap<NodeId, Peer>,
    resolver: Resolver,
}

impl Peers {
    /// `wake` ends the wait of the thread that calls `connect_due`.
    pub(crate) fn open(
        dir: &Path,
        node: NodeId,
        advertise: String,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Peers> {
        let book = AddressBook::open(dir)?;
        let mut peers =
            Peers { node, advertise, peers: BTreeMap::new(), book, resolver: Resolver::of_the_system(wake) };
        peers.refresh();
        Ok(peers)
    }

    pub(crate) fn learn(&mut self, addresses: &[NodeAddress]) -> Result<()> {
        if self.book.learn(addresses)? {
            self.refresh();
        }
        Ok(())
    }

    fn refresh(&mut self) {
        for (node, address) in self.book.iter().filter(|(node, _)| *node != self.node) {
            let peer = self.peers.entry(node).or_insert_with(Peer::new);
            if peer.address != address.peer {
                peer.address.clone_from(&address.peer);
                peer.retry_at = Timestamp::ZERO;
            }
        }
    }

    /// Where nodes and attached machines reach it.
    pub(crate) fn address(&self, node: NodeId) -> Option<String> {
        match self.peers.get(&node) {
            Some(peer) => Some(peer.address.clone()),
            None => (node == self.node).then(|| self.advertise.clone()),
        }
    }

    pub(crate) fn addresses(&self) -> BTreeMap<NodeId, Address> {
        self.book.iter().map(|(node, address)| (node, address.clone())).collect()
    }

    pub(crate) fn connection(&self, node: NodeId) -> Option<ConnectionId> {
        self.peers.get(&node).and_then(|peer| peer.connection)
    }

    /// When `connect_due` has something to do.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        self.peers
            .iter()
            .filter(|(node, peer)| self.node < **node && peer.is_unconnected() && !self.resolver.is_under_way(**node))
            .map(|(_, peer)| peer.retry_at)
            .min()
    }

    pub(crate) fn connect_due(&mut self, transport: &mut Transport, now: Timestamp) {
        for (node, found) in self.resolver.take() {
            match found.as_deref() {
                Ok([]) => tracing::warn!(%node, "the address names no machine"),
                Ok(found) => self.connect(transport, node, found, now),
                Err(error) => tracing::warn!(%node, %error, "the address cannot be resolved"),
            }
        }
        let own = self.node;
        let due = |(node, peer): (&NodeId, &Peer)| (own < *node && peer.retry_at <= now).then_some(*node);
        for node in self.peers.iter().filter_map(due).collect::<Vec<_>>() {
            let peer = self.peers.get_mut(&node).expect("listed by its name");
            if !peer.is_unconnected() || self.resolver.is_under_way(node) {
                continue;
            }
            peer.retry_at = now + peer.retry_after;
            peer.retry_after = (peer.retry_after * 2).min(RETRY_MAX);
            match peer.address.parse() {
                Ok(address) => self.connect(transport, node, &[address], now),
                // Names are resolved anew each time: a pod that moved keeps its name, not its address.
                Err(_) => self.resolver.ask(node, &peer.address),
            }
        }
    }

    fn connect(&mut self, transport: &mut Transport, node: NodeId, to: &[SocketAddr], now: Timestamp) {
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.is_unconnected()) else { return };
        let expected = PeerIdentity { role: PeerRole::Node, id: node.as_u128() };
        let address = to[peer.attempts % to.len()];
        peer.attempts = peer.attempts.wrapping_add(1);
        peer.connecting = Some(transport.connect(address, Some(expected), clock::since_boot(now)));
    }

    /// Returns the connection that this one replaces.
    pub(crate) fn on_connected(&mut self, node: NodeId, connection: ConnectionId) -> Option<ConnectionId> {
        let peer = self.peers.entry(node).or_insert_with(Peer::new);
        peer.connecting = None;
        peer.retry_after = RETRY_MIN;
        tracing::info!(%node, %connection, "peer connected");
        peer.connection.replace(connection)
    }

    pub(crate) fn on_closed(&mut self, connection: ConnectionId, reason: &CloseReason, now: Timestamp) {
        for (node, peer) in &mut self.peers {
            if peer.connection == Some(connection) {
                tracing::info!(%node, %connection, %reason, "peer lost");
                peer.connection = None;
                peer.retry_at = now + RETRY_MIN;
            } else if peer.connecting == Some(connection) {
                tracing::debug!(%node, %connection, %reason, "peer not reached");
                peer.connecting = None;
            }
        }
    }
}
