//! TCP and Unix sockets under one name, and who is at the other end of the latter.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};

use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::buffer::spare_capacity;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_tcp_congestion};

/// Congestion controls, the best first; the last is allowed everywhere. BBR, the default of some systems, paces by timers
/// at the rate that it measures, which between processes that wait for their turn on a processor is far below what the
/// path carries: a quarter of the throughput at three times the processor time was measured on loopback.
const CONGESTION: [&str; 2] = ["cubic", "reno"];
/// What a Unix socket is to hold; the kernel gives what its own bound allows.
const UNIX_SEND_BYTES: usize = 1 << 20;

pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub fn source(&mut self) -> &mut dyn Source {
        match self {
            Listener::Tcp(listener) => listener,
            Listener::Unix(listener) => listener,
        }
    }

    pub fn accept(&self) -> io::Result<(Stream, Option<SocketAddr>)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept()?;
                Ok((Stream::Tcp(stream), Some(address)))
            }
            Listener::Unix(listener) => Ok((Stream::Unix(listener.accept()?.0), None)),
        }
    }
}

pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(self.source(), token, Interest::READABLE | Interest::WRITABLE)
    }

    /// A Unix socket raises an event each time its peer has read something; it is told of only where it is waited for.
    pub fn watches_writing_on_demand(&self) -> bool {
        matches!(self, Stream::Unix(_))
    }

    pub fn watch(&mut self, registry: &Registry, token: Token, writing: bool) -> io::Result<()> {
        let interest = if writing { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        registry.reregister(self.source(), token, interest)
    }

    pub fn source(&mut self) -> &mut dyn Source {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) => stream,
        }
    }

    /// Whether a connection attempt has come to its end: `Ok(false)` while it has not.
    pub fn finish_connect(&self) -> io::Result<bool> {
        let Stream::Tcp(stream) = self else { return Ok(true) };
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        match stream.peer_addr() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// TCP: frames are gathered above; waiting for more of them in the kernel only adds delay, as does its pacing (see
    /// [`CONGESTION`]). Unix sockets have the room for a long request, which else is woken up for several times; TCP finds
    /// its own.
    pub fn tune(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => {
                // Without any of them it is the system's own.
                let _ = CONGESTION.iter().any(|name| set_tcp_congestion(stream, name).is_ok());
                stream.set_nodelay(true)
            }
            Stream::Unix(stream) => Ok(set_socket_send_buffer_size(stream, UNIX_SEND_BYTES)?),
        }
    }

    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }

    /// Behind what `buffer` holds, as much as it has room for.
    pub fn read_to(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let room = spare_capacity(buffer);
        Ok(match self {
            Stream::Tcp(stream) => rustix::io::read(stream, room),
            Stream::Unix(stream) => rustix::io::read(stream, room),
        }?)
    }

    pub fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write_vectored(slices),
            Stream::Unix(stream) => stream.write_vectored(slices),
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    pub fn end_writing(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// The user of the process at the other end, where that is neither ours nor root. Nobody on TCP: TLS tells there.
    pub fn foreign_user(&self) -> io::Result<Option<u32>> {
        let Stream::Unix(stream) = self else { return Ok(None) };
        // A process in another pod has the PID 0 here, which the credentials of rustix cannot hold.
        let user = getsockopt(stream, PeerCredentials)?.uid();
        let trusted = user == 0 || user == rustix::process::geteuid().as_raw();
        Ok((!trusted).then_some(user))
    }
}
