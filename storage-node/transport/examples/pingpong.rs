//! Round trips and throughput between two transports of this machine, over TLS and over a Unix socket.
//!
//! `cargo run --release -p holdfast-transport --example pingpong`

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use holdfast_transport::pki::{Authority, Roots, Validity};
use holdfast_transport::{
    Class, ConnectionId, Frame, Options, PeerIdentity, PeerRole, SendError, Transport, TransportEvent, Versions,
};
use mio::{Events, Poll};

const KIND: u16 = 0x0100;
const ROUND_TRIPS: usize = 20_000;
const BYTES: usize = 2 << 30;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct End {
    transport: Transport,
    poll: Poll,
    events: Events,
    start: Instant,
}

impl End {
    fn new(options: Options) -> Result<End> {
        let poll = Poll::new()?;
        let transport = Transport::new(options, poll.registry(), 0..8)?;
        Ok(End { transport, poll, events: Events::with_capacity(64), start: Instant::now() })
    }

    fn next(&mut self) -> Result<TransportEvent> {
        loop {
            if let Some(event) = self.transport.poll() {
                return Ok(event);
            }
            self.transport.flush();
            let now = self.start.elapsed();
            let timeout = self.transport.deadline().map(|at| at.saturating_sub(now));
            if timeout == Some(Duration::ZERO) {
                self.transport.on_deadline(now);
            }
            self.poll.poll(&mut self.events, timeout)?;
            let now = self.start.elapsed();
            for event in &self.events {
                self.transport.on_ready(event, now);
            }
        }
    }
}

/// Sends small frames back, swallows large ones, and answers the last of them.
fn serve(mut end: End) -> Result<()> {
    let mut swallowed = 0;
    loop {
        match end.next()? {
            TransportEvent::Frame { connection, frame } if frame.kind == KIND => {
                end.transport.send(connection, Class::Data, frame)?;
            }
            TransportEvent::Frame { connection, frame } => {
                swallowed += frame.payload.len();
                if swallowed >= BYTES {
                    swallowed = 0;
                    let done = Frame { kind: KIND + 1, meta: Bytes::new(), payload: Bytes::new() };
                    end.transport.send(connection, Class::Data, done)?;
                }
            }
            TransportEvent::Closed { .. } => return Ok(()),
            TransportEvent::Connected { .. } | TransportEvent::Writable { .. } => {}
        }
    }
}

fn ping(end: &mut End, connection: ConnectionId, bytes: usize) -> Result<Duration> {
    let payload = Bytes::from(vec![1; bytes]);
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        let frame = Frame { kind: KIND, meta: Bytes::from_static(&[0; 72]), payload: payload.clone() };
        end.transport.send(connection, Class::Data, frame)?;
        end.next()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[ROUND_TRIPS / 2])
}

fn stream(end: &mut End, connection: ConnectionId, bytes: usize) -> Result<f64> {
    let payload = Bytes::from(vec![1; bytes]);
    let start = Instant::now();
    let mut left = BYTES;
    while left > 0 {
        let frame = Frame { kind: KIND + 1, meta: Bytes::from_static(&[0; 72]), payload: payload.clone() };
        match end.transport.send(connection, Class::Data, frame) {
            Ok(()) => left = left.saturating_sub(bytes),
            Err(SendError::Full) => {
                end.next()?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    while !matches!(end.next()?, TransportEvent::Frame { .. }) {}
    Ok(BYTES as f64 / 1e6 / start.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let now = SystemTime::now();
    let validity = Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_secs(3600) };
    let authority = Authority::create("pingpong", validity)?;
    let options = |role, id| -> Result<Options> {
        let identity = authority.issue(PeerIdentity { role, id }, validity)?;
        let roots = Roots::from_pem(authority.certificate_pem())?;
        Ok(Options::new(identity, roots, 1, Versions { min: 1, max: 1 }))
    };
    let folder = std::env::temp_dir().join(format!("holdfast-pingpong-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let path = folder.join("socket");
    for unix in [false, true] {
        let mut server = End::new(options(PeerRole::Node, 1)?)?;
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let address = tcp.local_addr()?;
        if unix {
            server.transport.listen_unix(UnixListener::bind(&path)?)?;
        } else {
            server.transport.listen(tcp)?;
        }
        let server = std::thread::spawn(move || serve(server));
        let mut client = End::new(options(PeerRole::Agent, 2)?)?;
        let connection = match unix {
            true => client.transport.connect_unix(&path, None, Duration::ZERO),
            false => client.transport.connect(address, None, Duration::ZERO),
        };
        println!("{}", if unix { "Unix socket" } else { "TLS over loopback" });
        match client.next()? {
            TransportEvent::Connected { .. } => {}
            other => return Err(format!("not connected: {other:?}").into()),
        }
        println!("  round trip, empty frame: p50 {:?}", ping(&mut client, connection, 0)?);
        println!("  round trip, 4 KiB frame: p50 {:?}", ping(&mut client, connection, 4096)?);
        println!("  frames of   4 KiB: {:6.0} MB/s", stream(&mut client, connection, 4096)?);
        println!("  frames of 128 KiB: {:6.0} MB/s", stream(&mut client, connection, 128 << 10)?);
        println!("  frames of   1 MiB: {:6.0} MB/s", stream(&mut client, connection, 1 << 20)?);
        client.transport.close(connection);
        server.join().map_err(|_| "the server panicked")??;
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
