//! Three nodes that serve one model volume over the real transport: sessions, fencing and exactly-once as the protocol
//! states them, with a leader that the test moves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use holdfast_agent::{IdentityPaths, NodeAddress};
use holdfast_block::{Error, Geometry, Operation};
use holdfast_consensus::{LogIndex, Position, Term};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Refusal, Reply, Request, Session};
use holdfast_protocol::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, socket_name};
use holdfast_transport::pki::{Authority, Roots, Validity};
use holdfast_transport::{
    Class, ConnectionId, Frame, Options, PeerIdentity, PeerRole, Transport, TransportEvent, Versions,
};
use mio::{Events, Poll, Token, Waker};

pub const SIZE: u64 = 4 << 20;

pub fn volume() -> VolumeId {
    VolumeId::from_bytes([0xab; 16]).unwrap()
}

pub struct Model {
    pub leader: Option<usize>,
    pub term: u64,
    pub index: u64,
    pub holder: Option<String>,
    pub epoch: u64,
    pub session: u64,
    instance: Option<Instance>,
    answered: BTreeSet<u64>,
    low: u64,
    pub data: Vec<u8>,
    /// How often a mutation took effect.
    pub applied: u64,
    /// Connections closed that had asked something.
    pub users_gone: usize,
}

impl Model {
    fn open_session(&mut self, instance: Instance) {
        if self.instance != Some(instance) {
            self.session += 1;
            self.instance = Some(instance);
            self.answered.clear();
            self.low = 1;
        }
    }

    /// What another machine's `attach --take-over` does.
    pub fn take_over(&mut self, holder: &str) {
        self.epoch += 1;
        self.session += 1;
        self.instance = None;
        self.holder = Some(holder.into());
    }

    fn attached(&self, instance: Instance) -> Reply {
        Reply::Attached {
            volume: volume(),
            instance,
            epoch: Epoch(self.epoch),
            session: Session(self.session),
            geometry: Geometry::new(SIZE, 512).unwrap(),
            formatted: Formatted::None,
        }
    }

    fn serve(&mut self, request: Request) -> Reply {
        let stale = |epoch| Reply::Refused { volume: volume(), instance: None, reason: Refusal::Stale { epoch } };
        self.index += 1;
        match request {
            Request::Attach { holder, instance, take_over, .. } => {
                if self.instance != Some(instance) {
                    if let Some(held) = self.holder.clone().filter(|held| *held != holder && !take_over) {
                        let reason = Refusal::Held { holder: held, epoch: Epoch(self.epoch) };
                        return Reply::Refused { volume: volume(), instance: Some(instance), reason };
                    }
                    self.epoch += 1;
                    self.holder = Some(holder);
                    self.open_session(instance);
                }
                self.attached(instance)
            }
            Request::OpenSession { epoch, instance, .. } => {
                if epoch.0 != self.epoch || self.holder.is_none() {
                    let reason = Refusal::Stale { epoch };
                    return Reply::Refused { volume: volume(), instance: Some(instance), reason };
                }
                self.open_session(instance);
                self.attached(instance)
            }
            Request::Detach { epoch, .. } if epoch.0 == self.epoch => {
                self.holder = None;
                Reply::Detached { volume: volume(), epoch }
            }
            Request::Detach { epoch, .. } | Request::SetFormatted { epoch, .. } => stale(epoch),
            Request::Io { stamp, operation, .. } => {
                let current = stamp.epoch.0 == self.epoch && stamp.session.0 == self.session && self.holder.is_some();
                let result =
                    if current { Ok(self.io(stamp.sequence, stamp.oldest, operation)) } else { Err(Error::Fenced) };
                let seen = Position { term: Term(self.term), index: LogIndex(self.index) };
                Reply::Io { volume: volume(), session: stamp.session, sequence: stamp.sequence, seen, result }
            }
        }
    }

    fn io(&mut self, sequence: u64, oldest: u64, operation: Operation) -> Bytes {
        let (offset, data) = match operation {
            Operation::Read { offset, length } => {
                return Bytes::copy_from_slice(&self.data[offset as usize..][..length as usize]);
            }
            Operation::Flush => return Bytes::new(),
            Operation::Write { offset, data } => (offset, data),
            Operation::WriteZeroes { offset, length } | Operation::Discard { offset, length } => {
                (offset, Bytes::from(vec![0; length as usize]))
            }
        };
        self.low = self.low.max(oldest);
        if sequence >= self.low && self.answered.insert(sequence) {
            self.data[offset as usize..][..data.len()].copy_from_slice(&data);
            self.applied += 1;
        }
        Bytes::new()
    }
}

enum Order {
    Announce,
    Listen(UnixListener),
    Stop,
}

struct Node {
    orders: Sender<Order>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

pub struct Cluster {
    pub model: Arc<Mutex<Model>>,
    pub nodes: Vec<NodeAddress>,
    authority: Authority,
    running: Vec<Option<Node>>,
}

fn validity() -> Validity {
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 3600);
    Validity { not_before: now - day, not_after: now + day }
}

impl Cluster {
    pub fn start() -> Cluster {
        let model = Model {
            leader: Some(0),
            term: 5,
            index: 0,
            holder: None,
            epoch: 0,
            session: 0,
            instance: None,
            answered: BTreeSet::new(),
            low: 1,
            data: vec![0; SIZE as usize],
            applied: 0,
            users_gone: 0,
        };
        let mut cluster = Cluster {
            model: Arc::new(Mutex::new(model)),
            nodes: Vec::new(),
            authority: Authority::create("test", validity()).unwrap(),
            running: Vec::new(),
        };
        let listeners: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        for (listener, number) in listeners.iter().zip(1..) {
            let address = listener.local_addr().unwrap();
            let node = NodeId::from_bytes([number; 16]).unwrap();
            // One is known by its name, as pods are.
            let address = if number == 3 { format!("localhost:{}", address.port()) } else { address.to_string() };
            cluster.nodes.push(NodeAddress { node, address: address.parse().unwrap() });
        }
        for (number, listener) in listeners.into_iter().enumerate() {
            cluster.spawn(number, listener);
        }
        cluster
    }

    pub fn save_identity(&self, directory: &Path) -> IdentityPaths {
        let paths = IdentityPaths {
            certificate: directory.join("agent.crt"),
            key: directory.join("agent.key"),
            roots: directory.join("roots.crt"),
        };
        let peer = PeerIdentity { role: PeerRole::Agent, id: 77 };
        self.authority.issue(peer, validity()).unwrap().save(&paths.certificate, &paths.key).unwrap();
        std::fs::write(&paths.roots, self.authority.certificate_pem()).unwrap();
        paths
    }

    fn spawn(&mut self, number: usize, listener: TcpListener) {
        let peer = PeerIdentity { role: PeerRole::Node, id: self.nodes[number].node.as_u128() };
        let identity = self.authority.issue(peer, validity()).unwrap();
        let roots = Roots::from_pem(self.authority.certificate_pem()).unwrap();
        let poll = Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), Token(0)).unwrap();
        let versions = Versions { min: PROTOCOL_VERSION_MIN, max: PROTOCOL_VERSION };
        let mut transport =
            Transport::new(Options::new(identity, roots, 1, versions), poll.registry(), 16..80).unwrap();
        transport.listen(listener).unwrap();
        let (orders, inbox) = channel();
        let (model, ids) = (Arc::clone(&self.model), self.nodes.iter().map(|entry| entry.node).collect());
        let thread = std::thread::spawn(move || {
            Server { number, ids, poll, transport, model, inbox, users: BTreeMap::new() }.run();
        });
        self.running.push(Some(Node { orders, waker, thread: Some(thread) }));
    }

    /// The next term's leader, `None` for none; told to whoever has used the volume if `announced`.
    pub fn lead(&self, leader: Option<usize>, announced: bool) {
        {
            let mut model = self.model.lock().unwrap();
            model.term += 1;
            model.leader = leader;
        }
        if let Some(node) = leader.and_then(|leader| self.running[leader].as_ref()).filter(|_| announced) {
            node.orders.send(Order::Announce).unwrap();
            node.waker.wake().unwrap();
        }
    }

    /// The node listens at its socket in the folder from now on.
    pub fn listen_at_socket(&self, number: usize, folder: &Path) {
        let path = folder.join(socket_name(self.nodes[number].node));
        let _ = std::fs::remove_file(&path);
        let node = self.running[number].as_ref().unwrap();
        node.orders.send(Order::Listen(UnixListener::bind(path).unwrap())).unwrap();
        node.waker.wake().unwrap();
    }

    /// Its connections close, and nothing listens any more.
    pub fn kill(&mut self, number: usize) {
        if let Some(mut node) = self.running[number].take() {
            // A node that panicked has told so itself.
            let _ = node.orders.send(Order::Stop);
            node.waker.wake().unwrap();
            let _ = node.thread.take().unwrap().join();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.running.len()).for_each(|number| self.kill(number));
    }
}

struct Server {
    number: usize,
    ids: Vec<NodeId>,
    poll: Poll,
    transport: Transport,
    model: Arc<Mutex<Model>>,
    inbox: Receiver<Order>,
    /// Connections that have used the volume.
    users: BTreeMap<ConnectionId, ()>,
}

impl Server {
    fn run(mut self) {
        let (mut events, start) = (Events::with_capacity(64), Instant::now());
        loop {
            let wait = self.transport.deadline().map(|at| at.saturating_sub(start.elapsed()));
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.unwrap(),
            }
            let now = start.elapsed();
            for event in &events {
                if self.transport.owns(event.token()) {
                    self.transport.on_ready(event, now);
                }
            }
            self.transport.on_deadline(now);
            while let Ok(order) = self.inbox.try_recv() {
                match order {
                    Order::Stop => return,
                    Order::Listen(listener) => self.transport.listen_unix(listener).unwrap(),
                    Order::Announce => {
                        let term = Term(self.model.lock().unwrap().term);
                        for user in self.users.keys().copied().collect::<Vec<_>>() {
                            self.send(user, Reply::Leading { volume: volume(), term });
                        }
                    }
                }
            }
            while let Some(event) = self.transport.poll() {
                match event {
                    TransportEvent::Frame { connection, frame } => {
                        let request = Request::decode(frame.kind, frame.meta, frame.payload).unwrap();
                        self.users.insert(connection, ());
                        let reply = self.answer(request);
                        self.send(connection, reply);
                    }
                    TransportEvent::Closed { connection, .. } => {
                        if self.users.remove(&connection).is_some() {
                            self.model.lock().unwrap().users_gone += 1;
                        }
                    }
                    TransportEvent::Connected { .. } | TransportEvent::Writable { .. } => {}
                }
            }
            self.transport.flush();
        }
    }

    fn answer(&self, request: Request) -> Reply {
        let mut model = self.model.lock().unwrap();
        if model.leader == Some(self.number) {
            return model.serve(request);
        }
        let leader = model.leader.map(|leader| self.ids[leader]);
        Reply::NotLeader { volume: volume(), term: Term(model.term), leader }
    }

    fn send(&mut self, to: ConnectionId, reply: Reply) {
        let encoded = reply.encode();
        let frame = Frame { kind: encoded.kind, meta: encoded.meta, payload: encoded.payload };
        // A connection that closed meanwhile has its own event.
        let _ = self.transport.send(to, Class::Data, frame);
    }
}
