//! One connection of a user of a device: the socket beneath an NBD session.

use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use bytes::BytesMut;
use holdfast_consensus::Timestamp;
use holdfast_nbd::{End, Export, Session};
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};

/// Bytes read from one connection before others have their turn.
const TURN_BYTES: usize = 4 << 20;
/// Pieces written with one call; more than replies usually need, less than the kernel's 1024.
const SLICES: usize = 64;
/// What its socket is to hold: a long reply, as far as the kernel's own bound allows.
const SEND_BYTES: usize = 1 << 20;
/// Until a connection has chosen the export; it is a process on this machine.
const HAGGLING_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing to do until an event or a completion.
    Waits,
    MoreInput,
    /// Over, with a reason where it was not a goodbye.
    Ended(Option<String>),
}

pub(crate) struct NbdConnection {
    pub session: Session,
    /// Tells connections apart that used the same slot.
    pub serial: u64,
    stream: UnixStream,
    opened: Timestamp,
    readable: bool,
    /// The kernel has told of the end of the input, or of an error: it is read until that shows.
    ended: bool,
    writable: bool,
    /// The next event may be that the socket takes more. Else there is none of that kind: the client's every read would
    /// raise one.
    watches_writing: bool,
}

impl NbdConnection {
    pub fn new(stream: UnixStream, serial: u64, export: Export, now: Timestamp) -> NbdConnection {
        if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BYTES) {
            tracing::debug!(%error, "a socket of the usual size");
        }
        NbdConnection {
            session: Session::new(export),
            serial,
            stream,
            opened: now,
            readable: true,
            ended: false,
            writable: true,
            watches_writing: false,
        }
    }

    pub fn on_ready(&mut self, event: &mio::event::Event) {
        self.ended |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.ended;
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// Asks for the events that it waits for from now on.
    pub fn watch(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let wanted = !self.writable && self.session.has_output();
        if wanted == self.watches_writing {
            return Ok(());
        }
        self.watches_writing = wanted;
        let interest = if wanted { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        registry.reregister(&mut self.stream, token, interest)
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        (!self.session.is_transmitting() && self.session.wants_input()).then(|| self.opened + HAGGLING_MAX)
    }

    /// Moves bytes as far as the socket and the session go. `takes_input` is false while the agent ends.
    pub fn turn(&mut self, now: Timestamp, takes_input: bool) -> Turn {
        let mut budget = TURN_BYTES;
        loop {
            if let Err(error) = self.write() {
                return Turn::Ended(Some(error.to_string()));
            }
            if let Some(end) = self.session.end() {
                let reason = match end {
                    End::Disconnected | End::Aborted | End::Closed => None,
                    End::Violation(violation) => Some(violation.to_string()),
                };
                return Turn::Ended(reason);
            }
            if self.deadline().is_some_and(|deadline| deadline <= now) {
                return Turn::Ended(Some("the client chose no export in time".into()));
            }
            if !self.readable || !takes_input || !self.session.wants_input() {
                return Turn::Waits;
            }
            if budget == 0 {
                return Turn::MoreInput;
            }
            let buffer = self.session.input();
            let room = buffer.capacity() - buffer.len();
            match receive(&self.stream, buffer) {
                Ok(0) => {
                    self.readable = false;
                    self.session.on_end_of_input();
                }
                Ok(length) => {
                    budget = budget.saturating_sub(length);
                    // A short read has emptied the socket, and more raises an event; an end that was told does not.
                    self.readable = length == room || self.ended;
                    self.session.on_input();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Turn::Ended(Some(error.to_string())),
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while self.writable && self.session.has_output() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.session.output(&mut slices);
            match self.stream.write_vectored(&slices[..filled]) {
                Ok(sent) => self.session.on_sent(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Reads into the room that `buffer` has, without zeroing it first: payloads go straight where they stay.
#[allow(unsafe_code)]
fn receive(stream: &UnixStream, buffer: &mut BytesMut) -> io::Result<usize> {
    let room = buffer.spare_capacity_mut();
    assert!(!room.is_empty(), "a session makes room before it is read for");
    // SAFETY: `room` is memory of `buffer`, writable for its whole length, and lives across the call.
    let received = unsafe { libc::recv(stream.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written the first `received` bytes of the room, and not more than there is.
    unsafe { buffer.set_len(buffer.len() + received) };
    Ok(received)
}
