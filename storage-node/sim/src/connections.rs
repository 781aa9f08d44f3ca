//! Connections between simulated processes, as TCP gives them: in order and whole, or closed.
//!
//! What it is: messages over [`Network`], one connection per pair of ends. A blocked link loses nothing: what is sent
//! is sent again by the kernels and arrives, late and in order, once the link is whole, unless the connection was given
//! up meanwhile. A process that is stopped still has a kernel that takes its messages, up to a buffer; what finds the
//! buffer full is dropped by its sender, as the product's transport does. What it is not: TLS, frames, priorities. Who
//! drives it: the world's loop.
//!
//! Invariants: an end hears nothing of a connection before `Connected` and nothing after `Closed`; of the messages of
//! one direction of a connection it hears those that were accepted, in order, each once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use holdfast_consensus::Timestamp;
use holdfast_protocol::wire::Encoded;

use crate::network::{Link, Network};
use crate::prng::Prng;

/// The product's transport refuses longer ones, so nobody may ask for them.
const META_BYTES_MAX: usize = 256 << 10;
const PAYLOAD_BYTES_MAX: usize = (4 << 20) + (64 << 10);

/// One process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Node(u8),
    Client(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Connection(u64);

/// What an end hears.
#[derive(Clone, Debug)]
pub enum Arrival {
    Connected,
    Message(Encoded),
    Closed,
}

#[derive(Clone, Debug)]
enum Packet {
    Open,
    Opened,
    Message(Encoded),
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    Closed,
    Full,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    pub messages: u64,
    pub opened: u64,
    pub closed: u64,
    /// Found a full buffer.
    pub dropped: u64,
    /// Arrived only after a blocked link was whole again.
    pub delayed: u64,
}

type Pair = (End, End);

pub struct Connections {
    network: Network<End, (Connection, Packet)>,
    /// By the end that holds it and the end it leads to.
    open: BTreeMap<Pair, Connection>,
    /// Asked for and not answered.
    opening: BTreeMap<Pair, Connection>,
    /// Processes that run or are stopped; whoever is not here refuses.
    alive: BTreeSet<End>,
    stopped: BTreeSet<End>,
    /// Machines without power: they do not even refuse.
    dark: BTreeSet<End>,
    blocked: BTreeSet<Pair>,
    held: BTreeMap<Pair, VecDeque<(Connection, Packet)>>,
    /// Bytes under way by direction, and those among them that a stopped process has not taken.
    under_way: BTreeMap<Pair, usize>,
    untaken: BTreeMap<Pair, usize>,
    buffer_bytes: usize,
    ready: VecDeque<(End, End, Connection, Arrival)>,
    next: u64,
    statistics: Statistics,
}

impl Connections {
    /// A direction takes a message while fewer than `buffer_bytes` are under way in it.
    pub fn new(prng: Prng, link: Link, buffer_bytes: usize) -> Connections {
        assert!(link.loss_ppm == 0 && link.duplicate_ppm == 0 && link.reorder_ppm == 0, "TCP hides these");
        Connections {
            network: Network::new(prng, link),
            open: BTreeMap::new(),
            opening: BTreeMap::new(),
            alive: BTreeSet::new(),
            stopped: BTreeSet::new(),
            dark: BTreeSet::new(),
            blocked: BTreeSet::new(),
            held: BTreeMap::new(),
            under_way: BTreeMap::new(),
            untaken: BTreeMap::new(),
            buffer_bytes,
            ready: VecDeque::new(),
            next: 0,
            statistics: Statistics::default(),
        }
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    pub fn next_delivery(&self) -> Option<Timestamp> {
        if self.ready.is_empty() { self.network.next_delivery() } else { Some(Timestamp::ZERO) }
    }

    /// What the next end hears by `now`: who, from whom, over which connection, what.
    pub fn deliver(&mut self, now: Timestamp) -> Option<(End, End, Connection, Arrival)> {
        loop {
            if let Some(arrival) = self.ready.pop_front() {
                return Some(arrival);
            }
            let delivery = self.network.deliver(now)?;
            let (from, to, (connection, packet)) = (delivery.from, delivery.to, delivery.message);
            if self.blocked.contains(&(from, to)) {
                self.held.entry((from, to)).or_default().push_back((connection, packet));
                continue;
            }
            self.take(now, from, to, connection, packet);
        }
    }

    pub fn is_open(&self, from: End, to: End) -> bool {
        self.open.contains_key(&(from, to))
    }

    pub fn is_opening(&self, from: End, to: End) -> bool {
        self.opening.contains_key(&(from, to))
    }

    pub fn peers_of(&self, end: End) -> Vec<End> {
        self.open.keys().filter(|(holder, _)| *holder == end).map(|(_, peer)| *peer).collect()
    }

    /// A process begins to listen. Its kernel knows nothing of the connections it had before power was lost, and says so
    /// to the peers' next attempts to send again.
    pub fn start(&mut self, now: Timestamp, end: End) {
        self.alive.insert(end);
        self.dark.remove(&end);
        let leading_here = self.open.iter().filter(|((_, to), _)| *to == end);
        let unknown: Vec<(End, Connection)> = leading_here
            .filter(|((holder, _), connection)| self.open.get(&(end, *holder)) != Some(connection))
            .map(|((holder, _), connection)| (*holder, *connection))
            .collect();
        for (holder, connection) in unknown {
            self.put(now, end, holder, connection, Packet::Close);
        }
    }

    /// Asks for a connection; what was asked before and not answered is given up.
    pub fn connect(&mut self, now: Timestamp, from: End, to: End) {
        self.next += 1;
        let connection = Connection(self.next);
        self.opening.insert((from, to), connection);
        self.put(now, from, to, connection, Packet::Open);
    }

    /// # Errors
    /// The message is lost: there is no connection, or its buffer is full.
    pub fn send(&mut self, now: Timestamp, from: End, to: End, message: Encoded) -> Result<(), SendError> {
        assert!(
            message.meta.len() <= META_BYTES_MAX && message.payload.len() <= PAYLOAD_BYTES_MAX,
            "a message of kind {} with {} + {} bytes fits no frame",
            message.kind,
            message.meta.len(),
            message.payload.len()
        );
        let Some(connection) = self.open.get(&(from, to)).copied() else { return Err(SendError::Closed) };
        let bytes = message.meta.len() + message.payload.len();
        let under_way = self.under_way.entry((from, to)).or_default();
        // An agent keeps by itself what its transport does not take; a node drops it.
        if *under_way >= self.buffer_bytes && matches!(from, End::Node(_)) {
            self.statistics.dropped += 1;
            return Err(SendError::Full);
        }
        *under_way += bytes;
        self.statistics.messages += 1;
        self.put(now, from, to, connection, Packet::Message(message));
        Ok(())
    }

    /// The end closes its connection; the other one hears of it.
    pub fn close(&mut self, now: Timestamp, from: End, to: End) {
        if let Some(connection) = self.open.remove(&(from, to)) {
            self.put(now, from, to, connection, Packet::Close);
        }
    }

    /// Both kernels give the connection up.
    pub fn time_out(&mut self, one: End, other: End) {
        for (holder, peer) in [(one, other), (other, one)] {
            self.opening.remove(&(holder, peer));
            if let Some(connection) = self.open.remove(&(holder, peer)) {
                self.statistics.closed += 1;
                self.ready.push_back((holder, peer, connection, Arrival::Closed));
            }
            self.forget_held(holder, peer);
        }
    }

    /// The process is gone; its kernel closes what it had open.
    pub fn kill(&mut self, now: Timestamp, end: End) {
        self.alive.remove(&end);
        self.stopped.remove(&end);
        for peer in self.peers_of(end) {
            self.close(now, end, peer);
        }
        self.opening.retain(|(holder, _), _| *holder != end);
        self.untaken.retain(|(_, to), _| *to != end);
        self.under_way.retain(|(_, to), _| *to != end);
    }

    /// The machine is gone; nobody tells the peers.
    pub fn vanish(&mut self, end: End) {
        self.alive.remove(&end);
        self.stopped.remove(&end);
        self.dark.insert(end);
        self.open.retain(|(holder, _), _| *holder != end);
        self.opening.retain(|(holder, _), _| *holder != end);
        self.network.forget(end);
        let gone: Vec<Pair> = self.held.keys().copied().filter(|(from, to)| *from == end || *to == end).collect();
        for (from, to) in gone {
            self.forget_held(from, to);
        }
        self.untaken.retain(|(from, to), _| *from != end && *to != end);
        self.under_way.retain(|(from, to), _| *from != end && *to != end);
    }

    /// SIGSTOP: what comes waits in the kernel, and nobody new is greeted.
    pub fn stop(&mut self, end: End) {
        self.stopped.insert(end);
    }

    /// SIGCONT, once the process has taken what waited.
    pub fn resume(&mut self, end: End) {
        self.stopped.remove(&end);
        let taken: Vec<Pair> = self.untaken.keys().copied().filter(|(_, to)| *to == end).collect();
        for pair in taken {
            let bytes = self.untaken.remove(&pair).unwrap_or(0);
            self.arrived(pair, bytes);
        }
    }

    pub fn block(&mut self, from: End, to: End) {
        self.blocked.insert((from, to));
    }

    /// What was held arrives anew, in order.
    pub fn unblock(&mut self, now: Timestamp, from: End, to: End) {
        self.blocked.remove(&(from, to));
        for (connection, packet) in self.held.remove(&(from, to)).unwrap_or_default() {
            self.statistics.delayed += 1;
            self.put(now, from, to, connection, packet);
        }
    }

    pub fn blocked(&self) -> Vec<(End, End)> {
        self.blocked.iter().copied().collect()
    }

    pub fn set_link(&mut self, from: End, to: End, link: Link) {
        self.network.set_link(from, to, link);
    }

    pub fn heal_links(&mut self) {
        self.network.heal();
    }

    fn put(&mut self, now: Timestamp, from: End, to: End, connection: Connection, packet: Packet) {
        if self.dark.contains(&from) {
            return;
        }
        let bytes = match &packet {
            Packet::Message(message) => message.meta.len() + message.payload.len(),
            _ => 0,
        };
        self.network.send(now, from, to, bytes + 64, (connection, packet));
    }

    fn take(&mut self, now: Timestamp, from: End, to: End, connection: Connection, packet: Packet) {
        if self.dark.contains(&to) {
            return;
        }
        let current = self.open.get(&(to, from)) == Some(&connection);
        match packet {
            Packet::Open if !self.alive.contains(&to) => self.put(now, to, from, connection, Packet::Close),
            Packet::Open if self.stopped.contains(&to) => {}
            Packet::Open => {
                if let Some(former) = self.open.insert((to, from), connection) {
                    self.statistics.closed += 1;
                    self.ready.push_back((to, from, former, Arrival::Closed));
                }
                self.statistics.opened += 1;
                self.under_way.remove(&(to, from));
                self.put(now, to, from, connection, Packet::Opened);
                self.ready.push_back((to, from, connection, Arrival::Connected));
            }
            Packet::Opened if self.opening.get(&(to, from)) == Some(&connection) => {
                self.opening.remove(&(to, from));
                self.open.insert((to, from), connection);
                self.under_way.remove(&(to, from));
                self.ready.push_back((to, from, connection, Arrival::Connected));
            }
            Packet::Opened => self.put(now, to, from, connection, Packet::Close),
            Packet::Message(message) => {
                let bytes = message.meta.len() + message.payload.len();
                if self.stopped.contains(&to) && current {
                    *self.untaken.entry((from, to)).or_default() += bytes;
                } else {
                    self.arrived((from, to), bytes);
                }
                if current {
                    self.ready.push_back((to, from, connection, Arrival::Message(message)));
                } else {
                    self.put(now, to, from, connection, Packet::Close);
                }
            }
            Packet::Close => {
                if current {
                    self.statistics.closed += 1;
                    self.open.remove(&(to, from));
                    self.ready.push_back((to, from, connection, Arrival::Closed));
                } else if self.opening.get(&(to, from)) == Some(&connection) {
                    self.opening.remove(&(to, from));
                }
            }
        }
    }

    fn forget_held(&mut self, from: End, to: End) {
        for (_, packet) in self.held.remove(&(from, to)).unwrap_or_default() {
            if let Packet::Message(message) = packet {
                self.arrived((from, to), message.meta.len() + message.payload.len());
            }
        }
    }

    fn arrived(&mut self, pair: Pair, bytes: usize) {
        if let Some(under_way) = self.under_way.get_mut(&pair) {
            *under_way = under_way.saturating_sub(bytes);
        }
    }
}
