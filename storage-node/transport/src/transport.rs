//! All connections of one thread, driven by the owner's `mio::Poll`.
//!
//! The owner calls `on_ready` for every event whose token it owns, `on_deadline` once `deadline` has passed, `poll`
//! until it is empty, and `flush` once it has sent what it has to send; then it waits, until `deadline` at most. Work
//! per call is bounded: what is left over, and events not yet polled, make `deadline` lie in the past, so that the owner
//! comes back after its other duties.
//!
//! A connection that ends tells its peer why, and stays for a short while after its `Closed` event until the peer has
//! read that (a socket closed with unread input would be reset, and the reason lost). It then takes a token, nothing
//! else.

mod connection;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdfast_id::ClusterId;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Interest, Registry, Token};

use self::connection::{Connection, Phase, Progress, Shared};
use crate::close::CloseReason;
use crate::frame::{Class, Frame, KIND_MIN, META_BYTES_MAX, PAYLOAD_BYTES_MAX};
use crate::hello::{Demands, Hello, Versions};
use crate::identity::PeerIdentity;
use crate::link::Link;
use crate::outbox::QueueBytes;
use crate::pki::{Identity, Roots};
use crate::socket::{Listener, Stream};
use crate::tls::TlsConfigs;

/// Connections taken from one listener before others have their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Until a listener is tried again that could not accept, for want of file descriptors as a rule.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Accepted connections that have not finished the greeting; of more, or where no token is left, the oldest gives way:
/// strangers that connect and stay silent must not keep the others out.
const GREETINGS_MAX: usize = 256;

/// How a transport presents itself, and its limits. Time is the owner's: `now` everywhere is time since boot.
#[derive(Clone, Debug)]
pub struct Options {
    pub identity: Identity,
    pub roots: Roots,
    /// `None` for those who do not know it (yet): any cluster is then accepted.
    pub cluster: Option<ClusterId>,
    /// Told to every peer: differs between any two lives of this process.
    pub boot: u64,
    pub versions: Versions,
    pub connect_timeout: Duration,
    /// For TLS and the greeting together.
    pub handshake_timeout: Duration,
    /// How long a closed connection may take to deliver what was sent and why it ended.
    pub linger: Duration,
    pub queue_bytes: QueueBytes,
}

impl Options {
    /// With the usual limits: 1 s to connect, 3 s for the handshake, 2 s to linger.
    pub fn new(identity: Identity, roots: Roots, boot: u64, versions: Versions) -> Options {
        Options {
            identity,
            roots,
            cluster: None,
            boot,
            versions,
            connect_timeout: Duration::from_secs(1),
            handshake_timeout: Duration::from_secs(3),
            linger: Duration::from_secs(2),
            queue_bytes: QueueBytes::default(),
        }
    }
}

/// Names a connection of one transport; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId {
    serial: u64,
    slot: usize,
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.serial)
    }
}

/// Events of one connection come in order: `Connected`, then any number of others, then `Closed`, which is the only
/// one of a connection that never came to be. None comes after the owner called `close`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransportEvent {
    Connected {
        connection: ConnectionId,
        identity: PeerIdentity,
        /// Of a `node-agent`: the only holder that it may be.
        holder: Option<Arc<str>>,
        /// The highest protocol version both speak.
        version: u16,
        boot: u64,
        cluster: Option<ClusterId>,
    },
    Frame {
        connection: ConnectionId,
        frame: Frame,
    },
    /// `address` is `None` for Unix sockets.
    Closed {
        connection: ConnectionId,
        address: Option<SocketAddr>,
        reason: CloseReason,
    },
    /// A queue that refused a frame has room again.
    Writable {
        connection: ConnectionId,
    },
}

impl TransportEvent {
    pub fn connection(&self) -> ConnectionId {
        match self {
            TransportEvent::Connected { connection, .. }
            | TransportEvent::Frame { connection, .. }
            | TransportEvent::Closed { connection, .. }
            | TransportEvent::Writable { connection } => *connection,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("the connection is closed, or not connected yet")]
    Closed,
    #[error("the queue is full until `Writable`")]
    Full,
    #[error("meta is longer than 256 KiB, or the payload longer than 4 MiB + 64 KiB")]
    TooLong,
}

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("every token of this transport is in use")]
    Exhausted,
    #[error("protocol versions {0} are no range")]
    Versions(Versions),
    #[error("identity and roots make no TLS configuration")]
    Tls(#[from] rustls::Error),
    #[error("a socket failed")]
    Socket(#[from] io::Error),
}

enum Slot {
    Free,
    Listener(Listener),
    Connection(Box<Connection>),
}

pub struct Transport {
    options: Options,
    tls: TlsConfigs,
    registry: Registry,
    tokens: Range<usize>,
    /// One per token.
    slots: Vec<Slot>,
    free: BTreeSet<usize>,
    serial: u64,
    /// The latest time the owner told; `close` counts from it.
    now: Duration,
    /// Of connections that are not open and of listeners that could not accept.
    timers: BTreeSet<(Duration, usize)>,
    /// Accepted connections before the end of the greeting, by age.
    greetings: BTreeSet<(u64, usize)>,
    /// Slots whose sockets may hold more input than one turn takes.
    unread: BTreeSet<usize>,
    /// Connections with frames queued since the last flush.
    unflushed: BTreeSet<usize>,
    shared: Shared,
}

impl Transport {
    /// The tokens in `tokens` of the registry belong to this transport: one per listener and connection.
    pub fn new(options: Options, registry: &Registry, tokens: Range<usize>) -> Result<Transport, TransportError> {
        if options.versions.min > options.versions.max {
            return Err(TransportError::Versions(options.versions));
        }
        Ok(Transport {
            tls: TlsConfigs::new(&options.identity, &options.roots)?,
            registry: registry.try_clone()?,
            slots: tokens.clone().map(|_| Slot::Free).collect(),
            free: (0..tokens.len()).collect(),
            serial: 0,
            now: Duration::ZERO,
            timers: BTreeSet::new(),
            greetings: BTreeSet::new(),
            unread: BTreeSet::new(),
            unflushed: BTreeSet::new(),
            shared: Shared::new(),
            tokens,
            options,
        })
    }

    pub fn owns(&self, token: Token) -> bool {
        self.tokens.contains(&token.0)
    }

    /// Until when the owner may sleep; in the past where there is something to do now: `on_deadline`, and events to
    /// `poll`, which every call may raise, `flush` too.
    pub fn deadline(&self) -> Option<Duration> {
        if self.unread.is_empty() && self.shared.events.is_empty() {
            self.timers.first().map(|(at, _)| *at)
        } else {
            Some(Duration::ZERO)
        }
    }

    /// Connections from now on show and trust these; the others go on with what they began with.
    pub fn set_identity(&mut self, identity: Identity, roots: Roots) -> Result<(), TransportError> {
        self.tls = TlsConfigs::new(&identity, &roots)?;
        self.options.identity = identity;
        self.options.roots = roots;
        Ok(())
    }

    /// Accepts peers over TLS for as long as the transport lives.
    pub fn listen(&mut self, listener: std::net::TcpListener) -> Result<(), TransportError> {
        listener.set_nonblocking(true)?;
        self.add_listener(Listener::Tcp(TcpListener::from_std(listener)))
    }

    /// Accepts agents and admins of the same machine that run as our user or root; no TLS.
    pub fn listen_unix(&mut self, listener: std::os::unix::net::UnixListener) -> Result<(), TransportError> {
        listener.set_nonblocking(true)?;
        self.add_listener(Listener::Unix(UnixListener::from_std(listener)))
    }

    fn add_listener(&mut self, mut listener: Listener) -> Result<(), TransportError> {
        let slot = self.free.first().copied().ok_or(TransportError::Exhausted)?;
        self.registry.register(listener.source(), Token(self.tokens.start + slot), Interest::READABLE)?;
        self.free.remove(&slot);
        self.slots[slot] = Slot::Listener(listener);
        // Whoever connected before the registration raises no event.
        self.unread.insert(slot);
        Ok(())
    }

    /// Leads to `Connected` or `Closed`. With `expected`, whoever else answers there is refused.
    pub fn connect(&mut self, address: SocketAddr, expected: Option<PeerIdentity>, now: Duration) -> ConnectionId {
        self.connect_stream(TcpStream::connect(address).map(Stream::Tcp), Some(address), expected, now)
    }

    /// As `connect`, to a `listen_unix` on this machine.
    pub fn connect_unix(&mut self, path: &Path, expected: Option<PeerIdentity>, now: Duration) -> ConnectionId {
        self.connect_stream(UnixStream::connect(path).map(Stream::Unix), None, expected, now)
    }

    fn connect_stream(
        &mut self,
        stream: io::Result<Stream>,
        address: Option<SocketAddr>,
        expected: Option<PeerIdentity>,
        now: Duration,
    ) -> ConnectionId {
        self.now = now;
        let stream = stream.map_err(|error| CloseReason::ConnectFailed { kind: error.kind() });
        let demands = Demands { expected, agents_and_admins_only: false };
        self.add_connection(stream, address, demands, true)
    }

    fn add_connection(
        &mut self,
        stream: Result<Stream, CloseReason>,
        address: Option<SocketAddr>,
        demands: Demands,
        connecting: bool,
    ) -> ConnectionId {
        self.serial += 1;
        if self.free.is_empty() {
            self.evict_oldest_greeting();
        }
        let Some(slot) = self.free.first().copied() else {
            let id = ConnectionId { serial: self.serial, slot: usize::MAX };
            self.shared.closed(id, address, CloseReason::Exhausted);
            return id;
        };
        let id = ConnectionId { serial: self.serial, slot };
        let made = stream.and_then(|stream| self.make_connection(id, stream, address, demands, connecting));
        match made {
            Ok(connection) => {
                self.free.remove(&slot);
                let timeout = if connecting { self.options.connect_timeout } else { self.options.handshake_timeout };
                let mut connection = Box::new(connection);
                self.set_timer(slot, &mut connection, Some(self.now.saturating_add(timeout)));
                if connecting {
                    self.slots[slot] = Slot::Connection(connection);
                } else {
                    self.greetings.insert((id.serial, slot));
                    self.drive(slot, connection, Connection::turn);
                }
            }
            Err(reason) => self.shared.closed(id, address, reason),
        }
        id
    }

    fn make_connection(
        &self,
        id: ConnectionId,
        mut stream: Stream,
        address: Option<SocketAddr>,
        demands: Demands,
        connecting: bool,
    ) -> Result<Connection, CloseReason> {
        let hello = Hello {
            versions: self.options.versions,
            bearer: self.options.identity.bearer().clone(),
            cluster: self.options.cluster,
            boot: self.options.boot,
        };
        let session = match (&stream, connecting) {
            (Stream::Unix(_), _) => None,
            (Stream::Tcp(_), true) => Some(self.tls.connect()),
            (Stream::Tcp(_), false) => Some(self.tls.accept()),
        };
        let session = session.transpose().map_err(|error| CloseReason::Tls { detail: error.to_string() })?;
        let link = Link::new(session, hello, demands, self.options.queue_bytes);
        stream
            .register(&self.registry, Token(self.tokens.start + id.slot))
            .map_err(|error| CloseReason::Lost { kind: error.kind() })?;
        Ok(Connection::new(id, stream, link, address))
    }

    /// To be called for the events whose tokens it owns.
    pub fn on_ready(&mut self, event: &mio::event::Event, now: Duration) {
        self.now = now;
        let Some(slot) = event.token().0.checked_sub(self.tokens.start).filter(|slot| *slot < self.slots.len()) else {
            return;
        };
        let ended = event.is_read_closed() || event.is_error();
        self.take_turn(slot, ended);
    }

    /// Times out what is due and goes on with what earlier turns left.
    pub fn on_deadline(&mut self, now: Duration) {
        self.now = now;
        for slot in std::mem::take(&mut self.unread) {
            self.take_turn(slot, false);
        }
        while let Some((at, slot)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, slot));
            match std::mem::replace(&mut self.slots[slot], Slot::Free) {
                Slot::Free => unreachable!("a freed slot keeps no timer"),
                Slot::Listener(listener) => self.accept(slot, listener),
                Slot::Connection(mut connection) => {
                    connection.timer = None;
                    match connection.phase {
                        Phase::Connecting => self.fail(slot, connection, CloseReason::ConnectTimeout),
                        Phase::Greeting => self.fail(slot, connection, CloseReason::HandshakeTimeout),
                        Phase::Lingering => self.release(slot, connection),
                        Phase::Open => unreachable!("an open connection has no timer"),
                    }
                }
            }
        }
    }

    fn take_turn(&mut self, slot: usize, ended: bool) {
        match std::mem::replace(&mut self.slots[slot], Slot::Free) {
            // An event of a connection that has gone meanwhile.
            Slot::Free => {}
            Slot::Listener(listener) => self.accept(slot, listener),
            Slot::Connection(mut connection) => {
                connection.ended |= ended;
                self.drive(slot, connection, Connection::turn);
            }
        }
    }

    fn accept(&mut self, slot: usize, listener: Listener) {
        let agents_and_admins_only = matches!(listener, Listener::Unix(_));
        let mut turns = ACCEPTS_PER_TURN;
        let outcome = loop {
            if turns == 0 {
                self.unread.insert(slot);
                break Ok(());
            }
            turns -= 1;
            match listener.accept() {
                Ok((stream, address)) => {
                    if self.greetings.len() >= GREETINGS_MAX {
                        self.evict_oldest_greeting();
                    }
                    let demands = Demands { expected: None, agents_and_admins_only };
                    self.add_connection(Ok(stream), address, demands, false);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {
                }
                Err(error) => break Err(error),
            }
        };
        if outcome.is_err() {
            self.timers.insert((self.now.saturating_add(ACCEPT_RETRY), slot));
        }
        self.slots[slot] = Slot::Listener(listener);
    }

    /// Without last words: those would keep its token.
    fn evict_oldest_greeting(&mut self) {
        let Some((_, slot)) = self.greetings.first().copied() else { return };
        if let Slot::Connection(connection) = std::mem::replace(&mut self.slots[slot], Slot::Free) {
            self.shared.closed(connection.id, connection.address, CloseReason::Crowded);
            self.release(slot, connection);
        }
    }

    /// Queues a frame for the next `flush`.
    ///
    /// # Panics
    /// If the kind is below [`KIND_MIN`]: those are the transport's own.
    pub fn send(&mut self, connection: ConnectionId, class: Class, frame: Frame) -> Result<(), SendError> {
        assert!(frame.kind >= KIND_MIN, "frame kind {} is the transport's own", frame.kind);
        if frame.meta.len() > META_BYTES_MAX || frame.payload.len() > PAYLOAD_BYTES_MAX {
            return Err(SendError::TooLong);
        }
        let Some(Slot::Connection(open)) = self.slots.get_mut(connection.slot) else { return Err(SendError::Closed) };
        if open.id != connection || !open.link.is_open() {
            return Err(SendError::Closed);
        }
        open.link.send(class, frame).map_err(|_| SendError::Full)?;
        self.unflushed.insert(connection.slot);
        Ok(())
    }

    /// Writes everything queued that the sockets take: several frames per TLS record and system call.
    pub fn flush(&mut self) {
        for slot in std::mem::take(&mut self.unflushed) {
            if let Slot::Connection(connection) = std::mem::replace(&mut self.slots[slot], Slot::Free) {
                self.drive(slot, connection, Connection::write);
            }
        }
    }

    /// What happened, in order.
    pub fn poll(&mut self) -> Option<TransportEvent> {
        self.shared.events.pop_front()
    }

    /// What was sent is still delivered if the peer takes it in time, then a goodbye. No event follows, not even those
    /// that wait to be polled.
    pub fn close(&mut self, connection: ConnectionId) {
        self.shared.events.retain(|event| event.connection() != connection);
        let Some(slot) = self.slots.get_mut(connection.slot) else { return };
        match slot {
            Slot::Connection(open) if open.id == connection && open.phase != Phase::Lingering => {}
            _ => return,
        }
        let Slot::Connection(mut open) = std::mem::replace(slot, Slot::Free) else { return };
        open.link.finish();
        self.linger(connection.slot, open);
    }

    /// Lets the connection do one step, then puts it where its new state belongs.
    fn drive(
        &mut self,
        slot: usize,
        mut connection: Box<Connection>,
        step: impl FnOnce(&mut Connection, &mut Shared) -> Result<Progress, CloseReason>,
    ) {
        let connecting = connection.phase == Phase::Connecting;
        let token = Token(self.tokens.start + slot);
        let progress = step(&mut connection, &mut self.shared);
        match progress.and_then(|progress| connection.watch(&self.registry, token).map(|()| progress)) {
            Ok(progress) => {
                if connecting && connection.phase != Phase::Connecting {
                    let at = self.now.saturating_add(self.options.handshake_timeout);
                    self.set_timer(slot, &mut connection, Some(at));
                }
                match progress {
                    Progress::Waits => {}
                    Progress::MoreInput => {
                        self.unread.insert(slot);
                    }
                    Progress::Gone => return self.release(slot, connection),
                }
                if connection.phase == Phase::Open && connection.timer.is_some() {
                    self.set_timer(slot, &mut connection, None);
                    self.greetings.remove(&(connection.id.serial, slot));
                }
                self.slots[slot] = Slot::Connection(connection);
            }
            Err(reason) => self.fail(slot, connection, reason),
        }
    }

    fn fail(&mut self, slot: usize, mut connection: Box<Connection>, reason: CloseReason) {
        if connection.phase == Phase::Lingering {
            return self.release(slot, connection);
        }
        connection.link.abort(&reason);
        self.shared.closed(connection.id, connection.address, reason);
        self.linger(slot, connection);
    }

    /// Stays until the peer has read the last words, if there are any to read and somebody to read them.
    fn linger(&mut self, slot: usize, mut connection: Box<Connection>) {
        let connected = connection.phase != Phase::Connecting;
        self.greetings.remove(&(connection.id.serial, slot));
        connection.phase = Phase::Lingering;
        if connected && connection.has_output() {
            let at = self.now.saturating_add(self.options.linger);
            self.set_timer(slot, &mut connection, Some(at));
            self.drive(slot, connection, Connection::write);
        } else {
            self.release(slot, connection);
        }
    }

    fn release(&mut self, slot: usize, mut connection: Box<Connection>) {
        self.set_timer(slot, &mut connection, None);
        self.greetings.remove(&(connection.id.serial, slot));
        self.unread.remove(&slot);
        self.unflushed.remove(&slot);
        // Fails only for a socket that was never registered; closing it removes it in any case.
        let _ = self.registry.deregister(connection.stream.source());
        self.shared.take_back(&mut connection);
        self.slots[slot] = Slot::Free;
        self.free.insert(slot);
    }

    fn set_timer(&mut self, slot: usize, connection: &mut Connection, at: Option<Duration>) {
        if let Some(old) = connection.timer.take() {
            self.timers.remove(&(old, slot));
        }
        if let Some(at) = at {
            self.timers.insert((at, slot));
            connection.timer = Some(at);
        }
    }
}
