//! One socket and its link: moves bytes between the two until one of them has no more.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::time::Duration;

use mio::{Registry, Token};

use super::{ConnectionId, TransportEvent};
use crate::close::CloseReason;
use crate::link::{Link, LinkEvent};
use crate::outgoing::Outgoing;
use crate::socket::Stream;

/// Read by one system call, and processed before the next.
const READ_BYTES: usize = 256 << 10;
/// As above, without TLS: what of a long payload comes with the header of its frame is copied, the rest is not.
const PLAIN_READ_BYTES: usize = 64 << 10;
/// Pieces written by one system call.
const SLICES: usize = 64;
/// Read from one connection before others have their turn.
const READS_PER_TURN: usize = 4;
/// Buffers kept for the next connection that writes.
const SPARE_BUFFERS_MAX: usize = 4;

/// What the connections of a transport have in common, so that each of them costs little.
pub(super) struct Shared {
    pub events: VecDeque<TransportEvent>,
    input: Vec<u8>,
    spare: Vec<Outgoing>,
}

impl Shared {
    pub fn new() -> Shared {
        Shared { events: VecDeque::new(), input: vec![0; READ_BYTES], spare: Vec::new() }
    }

    pub fn closed(&mut self, connection: ConnectionId, address: Option<SocketAddr>, reason: CloseReason) {
        self.events.push_back(TransportEvent::Closed { connection, address, reason });
    }

    /// The buffer of a connection that ends serves another one.
    pub fn take_back(&mut self, connection: &mut Connection) {
        if let Some(mut outgoing) = connection.outgoing.take() {
            outgoing.consume(outgoing.waiting().len());
            self.give_back(outgoing);
        }
    }

    fn give_back(&mut self, outgoing: Outgoing) {
        if self.spare.len() < SPARE_BUFFERS_MAX {
            self.spare.push(outgoing);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The kernel has not said yet whether anybody answers.
    Connecting,
    /// TLS and the hellos.
    Greeting,
    Open,
    /// Closed for the owner; the last words are under way.
    Lingering,
}

/// What the transport has to know after a step that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// For its socket.
    Waits,
    /// The socket may hold more.
    MoreInput,
    /// Lingering is over.
    Gone,
}

pub(super) struct Connection {
    pub id: ConnectionId,
    pub stream: Stream,
    pub link: Link,
    pub phase: Phase,
    pub address: Option<SocketAddr>,
    pub timer: Option<Duration>,
    /// The kernel has told of the end of the input or of an error: read until it shows.
    pub ended: bool,
    /// The next event may be that the socket takes more.
    watches_writing: bool,
    /// What the socket did not take.
    outgoing: Option<Outgoing>,
    writing_ended: bool,
}

impl Connection {
    pub fn new(id: ConnectionId, stream: Stream, link: Link, address: Option<SocketAddr>) -> Connection {
        Connection {
            id,
            stream,
            link,
            phase: Phase::Connecting,
            address,
            timer: None,
            ended: false,
            watches_writing: true,
            outgoing: None,
            writing_ended: false,
        }
    }

    pub fn has_output(&self) -> bool {
        self.outgoing.is_some() || self.link.has_output()
    }

    /// Asks for the events that it waits for from now on.
    pub fn watch(&mut self, registry: &Registry, token: Token) -> Result<(), CloseReason> {
        let wanted = self.phase == Phase::Connecting || self.has_output();
        if self.watches_writing == wanted || !self.stream.watches_writing_on_demand() {
            return Ok(());
        }
        self.watches_writing = wanted;
        let watched = self.stream.watch(registry, token, wanted);
        watched.map_err(|error| CloseReason::Lost { kind: error.kind() })
    }

    /// Everything the socket allows now.
    pub fn turn(&mut self, shared: &mut Shared) -> Result<Progress, CloseReason> {
        if self.phase == Phase::Connecting {
            match self.stream.finish_connect() {
                Ok(false) => return Ok(Progress::Waits),
                Ok(true) => {}
                Err(error) => return Err(CloseReason::ConnectFailed { kind: error.kind() }),
            }
            self.begin(shared)?;
        }
        let progress = self.read(shared)?;
        if progress == Progress::Gone {
            return Ok(progress);
        }
        match self.write(shared)? {
            Progress::Waits => Ok(progress),
            other => Ok(other),
        }
    }

    fn begin(&mut self, shared: &mut Shared) -> Result<(), CloseReason> {
        self.phase = Phase::Greeting;
        let lost = |error: io::Error| CloseReason::Lost { kind: error.kind() };
        self.stream.tune().map_err(lost)?;
        if let Some(uid) = self.stream.foreign_user().map_err(lost)? {
            return Err(CloseReason::ForeignUser { uid });
        }
        let mut out = self.take_outgoing(shared);
        let outcome = self.link.start(&mut out);
        self.keep_outgoing(shared, out);
        outcome
    }

    fn read(&mut self, shared: &mut Shared) -> Result<Progress, CloseReason> {
        let mut input = std::mem::take(&mut shared.input);
        let mut out = self.take_outgoing(shared);
        let outcome = self.read_into(&mut input, &mut out, &mut shared.events);
        self.keep_outgoing(shared, out);
        shared.input = input;
        if self.phase == Phase::Greeting && self.link.is_open() {
            self.phase = Phase::Open;
        }
        outcome
    }

    fn read_into(
        &mut self,
        input: &mut [u8],
        out: &mut Outgoing,
        events: &mut VecDeque<TransportEvent>,
    ) -> Result<Progress, CloseReason> {
        let connection = self.id;
        let mut on_event = |event| {
            events.push_back(match event {
                LinkEvent::Frame(frame) => TransportEvent::Frame { connection, frame },
                LinkEvent::Connected(peer) => TransportEvent::Connected {
                    connection,
                    identity: peer.bearer.peer,
                    holder: peer.bearer.holder,
                    version: peer.version,
                    boot: peer.boot,
                    cluster: peer.cluster,
                },
            });
        };
        let most = if self.link.is_plain() { PLAIN_READ_BYTES } else { input.len() };
        for _ in 0..READS_PER_TURN {
            let (start, room, read) = match self.link.payload() {
                Some(payload) => (None, payload.capacity() - payload.len(), self.stream.read_to(payload)),
                None => {
                    let start = self.link.begin_read(input);
                    (Some(start), most - start, self.stream.read(&mut input[start..most]))
                }
            };
            match read {
                Ok(0) if self.phase == Phase::Lingering => return Ok(Progress::Gone),
                Ok(0) => return Err(CloseReason::Vanished),
                Ok(count) => {
                    match start {
                        Some(start) => self.link.on_bytes(&mut input[..start + count], out, &mut on_event)?,
                        None => self.link.on_payload(&mut on_event)?,
                    }
                    // A short read has emptied the socket, and more input raises a new event; but an end that
                    // was already told does not.
                    if count < room && !self.ended {
                        return Ok(Progress::Waits);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Waits),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CloseReason::Lost { kind: error.kind() }),
            }
        }
        Ok(Progress::MoreInput)
    }

    /// Writes until the socket takes no more or nothing is left.
    pub fn write(&mut self, shared: &mut Shared) -> Result<Progress, CloseReason> {
        if self.phase == Phase::Connecting {
            return Ok(Progress::Waits);
        }
        let mut out = self.take_outgoing(shared);
        let outcome = self.write_from(&mut out);
        self.keep_outgoing(shared, out);
        if self.link.take_writable() {
            shared.events.push_back(TransportEvent::Writable { connection: self.id });
        }
        match outcome {
            Ok(()) => {}
            // The peer may have said why it closed; that is worth more than the error.
            Err(WriteError::Socket(kind)) => {
                self.ended = true;
                self.read(shared)?;
                return Err(CloseReason::Lost { kind });
            }
            Err(WriteError::Link(reason)) => return Err(reason),
        }
        if self.phase == Phase::Lingering && !self.has_output() && !self.writing_ended {
            self.writing_ended = true;
            if self.stream.end_writing().is_err() {
                return Ok(Progress::Gone);
            }
            // The peer may have closed its side already, which raises no further event.
            return self.read(shared);
        }
        Ok(Progress::Waits)
    }

    fn write_from(&mut self, out: &mut Outgoing) -> Result<(), WriteError> {
        while self.link.is_plain() && self.link.has_output() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.link.slices(&mut slices);
            // A farewell that says nothing: only the end is left to note.
            let written = if filled == 0 { Ok(0) } else { self.stream.write_vectored(&slices[..filled]) };
            match written {
                Ok(count) => self.link.on_written(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WriteError::Socket(error.kind())),
            }
        }
        loop {
            while !out.is_empty() {
                match self.stream.write(out.waiting()) {
                    Ok(count) => out.consume(count),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(WriteError::Socket(error.kind())),
                }
            }
            if !self.link.has_output() {
                return Ok(());
            }
            self.link.fill(out).map_err(WriteError::Link)?;
            if out.is_empty() {
                return Ok(());
            }
        }
    }

    fn take_outgoing(&mut self, shared: &mut Shared) -> Outgoing {
        self.outgoing.take().or_else(|| shared.spare.pop()).unwrap_or_default()
    }

    fn keep_outgoing(&mut self, shared: &mut Shared, outgoing: Outgoing) {
        if outgoing.is_empty() {
            shared.give_back(outgoing);
        } else {
            self.outgoing = Some(outgoing);
        }
    }
}

enum WriteError {
    Socket(io::ErrorKind),
    Link(CloseReason),
}
