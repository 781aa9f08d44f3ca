//! Transports over real sockets of this machine, all on one poll in one thread; time is a number the tests choose.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use holdfast_id::ClusterId;
use holdfast_transport::pki::{Authority, Identity, Roots, Validity};
use holdfast_transport::{
    CertificateRefusal, Class, CloseReason, ConnectionId, Frame, FrameError, META_BYTES_MAX, Options,
    PAYLOAD_BYTES_MAX, PeerIdentity, PeerRole, Refusal, SendError, Transport, TransportEvent, Versions,
};
use mio::{Events, Poll};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

const TOKENS_EACH: usize = 16;
const KIND: u16 = 0x0100;
/// Nothing waits this long unless a test hangs.
const HANGS: Duration = Duration::from_secs(20);

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Valid whenever the tests run: 2001 to 2286.
fn valid() -> Validity {
    Validity { not_before: at(1_000_000_000), not_after: at(10_000_000_000) }
}

fn who(role: PeerRole, id: u128) -> PeerIdentity {
    PeerIdentity { role, id }
}

fn authority() -> Authority {
    Authority::create("test", valid()).expect("an authority")
}

fn roots(authorities: &[&Authority]) -> Roots {
    let pem: String = authorities.iter().map(|authority| authority.certificate_pem()).collect();
    Roots::from_pem(&pem).expect("roots")
}

fn options_of(identity: Identity, roots: Roots) -> Options {
    Options::new(identity, roots, 7, Versions { min: 1, max: 2 })
}

fn options(authority: &Authority, peer: PeerIdentity) -> Options {
    options_of(authority.issue(peer, valid()).expect("an identity"), roots(&[authority]))
}

fn frame(kind: u16, payload: &[u8]) -> Frame {
    Frame { kind, meta: Bytes::from_static(b"meta"), payload: Bytes::copy_from_slice(payload) }
}

struct Net {
    poll: Poll,
    transports: Vec<Transport>,
    events: Vec<VecDeque<TransportEvent>>,
    now: Duration,
}

impl Net {
    fn new(options: Vec<Options>) -> Net {
        let poll = Poll::new().expect("a poll");
        let transports: Vec<Transport> = options
            .into_iter()
            .enumerate()
            .map(|(at, options)| {
                let first = at * TOKENS_EACH;
                Transport::new(options, poll.registry(), first..first + TOKENS_EACH).expect("a transport")
            })
            .collect();
        let events = transports.iter().map(|_| VecDeque::new()).collect();
        Net { poll, transports, events, now: Duration::from_secs(100) }
    }

    fn listen(&mut self, at: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        self.transports[at].listen(listener).expect("listening");
        address
    }

    fn connect(&mut self, at: usize, address: SocketAddr, expected: Option<PeerIdentity>) -> ConnectionId {
        self.transports[at].connect(address, expected, self.now)
    }

    /// What needs no waiting.
    fn work(&mut self) {
        for (transport, events) in self.transports.iter_mut().zip(&mut self.events) {
            transport.flush();
            events.extend(std::iter::from_fn(|| transport.poll()));
            while transport.deadline().is_some_and(|deadline| deadline <= self.now) {
                transport.on_deadline(self.now);
                events.extend(std::iter::from_fn(|| transport.poll()));
            }
        }
    }

    fn turn(&mut self, timeout: Duration) -> bool {
        self.work();
        let mut ready = Events::with_capacity(64);
        self.poll.poll(&mut ready, Some(timeout)).expect("polling");
        for event in &ready {
            for transport in &mut self.transports {
                if transport.owns(event.token()) {
                    transport.on_ready(event, self.now);
                }
            }
        }
        self.work();
        !ready.is_empty()
    }

    fn run_until(&mut self, mut done: impl FnMut(&mut Net) -> bool) {
        self.work();
        while !done(self) {
            assert!(self.turn(HANGS), "nothing happens any more; events: {:?}", self.events);
        }
    }

    fn next(&mut self, at: usize) -> TransportEvent {
        self.run_until(|net| !net.events[at].is_empty());
        self.events[at].pop_front().expect("an event")
    }

    fn next_frame(&mut self, at: usize) -> Frame {
        match self.next(at) {
            TransportEvent::Frame { frame, .. } => frame,
            other => panic!("a frame was expected: {other:?}"),
        }
    }

    fn next_connected(&mut self, at: usize) -> ConnectionId {
        match self.next(at) {
            TransportEvent::Connected { connection, .. } => connection,
            other => panic!("a connection was expected: {other:?}"),
        }
    }

    fn next_closed(&mut self, at: usize) -> CloseReason {
        match self.next(at) {
            TransportEvent::Closed { reason, .. } => reason,
            other => panic!("an end was expected: {other:?}"),
        }
    }

    /// Transport 0 connects to transport 1.
    fn pair(&mut self) -> (ConnectionId, ConnectionId) {
        let address = self.listen(1);
        let client = self.connect(0, address, None);
        assert_eq!(self.next_connected(0), client);
        (client, self.next_connected(1))
    }
}

fn two_nodes() -> Net {
    let authority = authority();
    Net::new(vec![options(&authority, who(PeerRole::Node, 1)), options(&authority, who(PeerRole::Node, 2))])
}

/// Both ends of one attempt of the first to connect to the second.
fn reasons(client: Options, server: Options, expected: Option<PeerIdentity>) -> (CloseReason, CloseReason) {
    let mut net = Net::new(vec![client, server]);
    let address = net.listen(1);
    net.connect(0, address, expected);
    (net.next_closed(0), net.next_closed(1))
}

#[test]
fn both_ends_learn_who_the_other_is() {
    let authority = authority();
    let cluster = ClusterId::from_bytes([9; 16]);
    let (one, two) = (who(PeerRole::Agent, 1), who(PeerRole::Node, 2));
    let client = Options { boot: 11, versions: Versions { min: 2, max: 9 }, ..options(&authority, one) };
    let server = Options { boot: 22, cluster, versions: Versions { min: 1, max: 5 }, ..options(&authority, two) };
    let mut net = Net::new(vec![client, server]);
    let address = net.listen(1);
    let connection = net.connect(0, address, Some(two));
    let at_client =
        TransportEvent::Connected { connection, identity: two, holder: None, version: 5, boot: 22, cluster };
    assert_eq!(net.next(0), at_client);
    let TransportEvent::Connected { connection, identity, version, boot, cluster, .. } = net.next(1) else {
        panic!("a connection was expected")
    };
    assert_eq!((identity, version, boot, cluster), (one, 5, 11, None));
    net.transports[1].send(connection, Class::Data, frame(KIND, b"welcome")).expect("room");
    assert_eq!(net.next_frame(0), frame(KIND, b"welcome"));
    assert_eq!(net.transports[0].deadline(), None, "an open connection needs no time");
}

#[test]
fn frames_of_all_lengths_arrive_whole_and_in_order() {
    let mut net = two_nodes();
    let (client, server) = net.pair();
    let mut random = StdRng::seed_from_u64(1);
    let mut sent: Vec<Frame> = [0, 1, 4096, 16_384, 16_385, 1 << 20, PAYLOAD_BYTES_MAX]
        .into_iter()
        .map(|length| {
            let mut payload = vec![0; length];
            random.fill_bytes(&mut payload);
            frame(KIND, &payload)
        })
        .collect();
    sent.push(Frame { kind: u16::MAX, meta: Bytes::from(vec![3; META_BYTES_MAX]), payload: Bytes::new() });
    sent.push(Frame { kind: KIND, meta: Bytes::new(), payload: Bytes::new() });
    for frame in &sent {
        net.transports[0].send(client, Class::Data, frame.clone()).expect("room");
        net.transports[1].send(server, Class::Data, frame.clone()).expect("room");
    }
    for frame in &sent {
        assert!(net.next_frame(0) == *frame && net.next_frame(1) == *frame, "a frame was altered");
    }
    let too_long = Frame { kind: KIND, meta: Bytes::from(vec![0; META_BYTES_MAX + 1]), payload: Bytes::new() };
    assert_eq!(net.transports[0].send(client, Class::Data, too_long), Err(SendError::TooLong));
}

#[test]
fn an_unknown_authority_is_refused_and_told() {
    // Another authority may well have the same name.
    for name in ["test", "other"] {
        let (ours, other) = (authority(), Authority::create(name, valid()).expect("an authority"));
        refused_by_both(&ours, &other);
    }
}

fn refused_by_both(ours: &Authority, other: &Authority) {
    let node = who(PeerRole::Node, 2);
    let agent = who(PeerRole::Agent, 1);
    let distrusts_client = options_of(ours.issue(node, valid()).expect("issued"), roots(&[other]));
    let (client, server) = reasons(options(ours, agent), distrusts_client, None);
    assert_eq!(client, CloseReason::Refused(Refusal::UnknownAuthority));
    assert_eq!(server, CloseReason::Certificate(CertificateRefusal::UnknownAuthority));
    let distrusts_server = options_of(ours.issue(agent, valid()).expect("issued"), roots(&[other]));
    let (client, server) = reasons(distrusts_server, options(ours, node), None);
    assert_eq!(client, CloseReason::Certificate(CertificateRefusal::UnknownAuthority));
    assert_eq!(server, CloseReason::Refused(Refusal::UnknownAuthority));
}

#[test]
fn certificates_outside_their_validity_are_refused_and_told() {
    let authority = authority();
    let (agent, node) = (who(PeerRole::Agent, 1), who(PeerRole::Node, 2));
    let expired = Validity { not_before: at(1_000_000_000), not_after: at(1_000_000_060) };
    let early = Validity { not_before: at(9_000_000_000), not_after: at(9_999_999_999) };
    for (validity, refusal) in [(expired, CertificateRefusal::Expired), (early, CertificateRefusal::NotYetValid)] {
        let with = |peer| options_of(authority.issue(peer, validity).expect("issued"), roots(&[&authority]));
        let (client, server) = reasons(with(agent), options(&authority, node), None);
        assert_eq!(server, CloseReason::Certificate(refusal.clone()));
        assert_eq!(client, CloseReason::Refused(Refusal::CertificateExpired));
        let (client, server) = reasons(options(&authority, agent), with(node), None);
        assert_eq!(client, CloseReason::Certificate(refusal));
        assert_eq!(server, CloseReason::Refused(Refusal::CertificateExpired));
    }
}

#[test]
fn only_nodes_may_accept() {
    let authority = authority();
    let (one, two) = (who(PeerRole::Node, 1), who(PeerRole::Agent, 2));
    let (client, server) = reasons(options(&authority, one), options(&authority, two), Some(two));
    assert_eq!(client, CloseReason::Certificate(CertificateRefusal::WrongPurpose));
    assert_eq!(server, CloseReason::Refused(Refusal::CertificateRefused));
}

#[test]
fn whoever_else_answers_is_refused_and_told() {
    let authority = authority();
    let (one, two, three) = (who(PeerRole::Node, 1), who(PeerRole::Node, 2), who(PeerRole::Node, 3));
    let (client, server) = reasons(options(&authority, one), options(&authority, two), Some(three));
    assert_eq!(client, CloseReason::WrongIdentity { expected: three, found: two });
    assert_eq!(server, CloseReason::Refused(Refusal::WrongIdentity));
}

#[test]
fn other_versions_and_clusters_are_told_to_both_ends() {
    let authority = authority();
    let (one, two) = (who(PeerRole::Node, 1), who(PeerRole::Node, 2));
    let (old, new) = (Versions { min: 1, max: 2 }, Versions { min: 3, max: 4 });
    let older = Options { versions: old, ..options(&authority, one) };
    let newer = Options { versions: new, ..options(&authority, two) };
    let (client, server) = reasons(older, newer, None);
    assert_eq!(client, CloseReason::NoCommonVersion { ours: old, theirs: new });
    assert_eq!(server, CloseReason::NoCommonVersion { ours: new, theirs: old });

    let [first, second] = [1, 2].map(|byte| ClusterId::from_bytes([byte; 16]).expect("not zero"));
    let ours = Options { cluster: Some(first), ..options(&authority, one) };
    let foreign = Options { cluster: Some(second), ..options(&authority, two) };
    let (client, server) = reasons(ours, foreign, None);
    assert_eq!(client, CloseReason::WrongCluster { ours: first, theirs: second });
    assert_eq!(server, CloseReason::WrongCluster { ours: second, theirs: first });
}

#[test]
fn hostile_bytes_before_tls_end_that_connection_only() {
    let mut net = two_nodes();
    let (client, server) = net.pair();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    net.transports[1].listen(listener).expect("listening");
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut noise = vec![0; random.random_range(1..3000)];
        random.fill_bytes(&mut noise);
        match seed % 4 {
            // The beginning of a handshake record, then noise.
            0 => noise.splice(0..0, [22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3]).count(),
            1 => noise.splice(0..0, *b"GET / HTTP/1.1\r\n\r\n").count(),
            2 => noise.splice(0..0, [22, 3, 3, 0xff, 0xff]).count(),
            _ => 0,
        };
        let mut raw = TcpStream::connect(address).expect("the kernel accepts");
        raw.write_all(&noise).expect("the kernel takes it");
        raw.shutdown(std::net::Shutdown::Write).expect("connected");
        let reason = net.next_closed(1);
        assert!(matches!(reason, CloseReason::Tls { .. } | CloseReason::Vanished), "seed {seed}: {reason:?}");
    }
    net.transports[0].send(client, Class::Data, frame(KIND, b"still here")).expect("open");
    assert_eq!(net.next_frame(1), frame(KIND, b"still here"));
    net.transports[1].send(server, Class::Data, frame(KIND, b"so am I")).expect("open");
    assert_eq!(net.next_frame(0), frame(KIND, b"so am I"));
}

#[test]
fn who_never_finishes_the_handshake_is_dropped_in_time() {
    let authority = authority();
    let mut net = Net::new(vec![options(&authority, who(PeerRole::Node, 1))]);
    let address = net.listen(0);
    let mut raw = TcpStream::connect(address).expect("the kernel accepts");
    net.run_until(|net| net.transports[0].deadline().is_some());
    let deadline = net.transports[0].deadline().expect("a handshake has an end");
    assert_eq!(deadline, net.now + Duration::from_secs(3));
    net.now = deadline - Duration::from_nanos(1);
    net.work();
    assert!(net.events[0].is_empty());
    net.now = deadline;
    assert_eq!(net.next_closed(0), CloseReason::HandshakeTimeout);
    assert_eq!(raw.read(&mut [0; 16]).expect("an end, not an error"), 0);
    assert_eq!(net.transports[0].deadline(), None);
}

#[test]
fn silent_strangers_do_not_keep_peers_out() {
    let mut net = two_nodes();
    let address = net.listen(1);
    // One token is the listener's.
    let strangers: Vec<TcpStream> =
        (0..TOKENS_EACH).map(|_| TcpStream::connect(address).expect("the kernel accepts")).collect();
    assert_eq!(net.next_closed(1), CloseReason::Crowded);
    net.connect(0, address, None);
    assert_eq!(net.next_closed(1), CloseReason::Crowded);
    net.next_connected(0);
    net.next_connected(1);
    // Nor do they keep this end from connecting.
    let other = net.listen(0);
    net.connect(1, other, None);
    assert_eq!(net.next_closed(1), CloseReason::Crowded);
    net.next_connected(1);
    drop(strangers);
}

#[test]
fn nobody_answering_is_told_with_its_reason() {
    let mut net = two_nodes();
    let address = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    net.connect(0, address, None);
    assert_eq!(net.next_closed(0), CloseReason::ConnectFailed { kind: std::io::ErrorKind::ConnectionRefused });
    // An attempt of which no event has come when its time is over.
    let address = net.listen(1);
    let connection = net.transports[0].connect(address, None, net.now);
    net.now += Duration::from_secs(1);
    net.transports[0].on_deadline(net.now);
    let closed = TransportEvent::Closed { connection, address: Some(address), reason: CloseReason::ConnectTimeout };
    assert_eq!(net.transports[0].poll(), Some(closed));
}

#[test]
fn urgent_frames_arrive_first() {
    let mut net = two_nodes();
    let (client, _) = net.pair();
    for (kind, class) in [
        (KIND + 1, Class::Bulk),
        (KIND + 2, Class::Bulk),
        (KIND + 3, Class::Data),
        (KIND + 4, Class::Control),
        (KIND + 5, Class::Data),
    ] {
        net.transports[0].send(client, class, frame(kind, &[0; 20_000])).expect("room");
    }
    let kinds: Vec<u16> = (0..5).map(|_| net.next_frame(1).kind - KIND).collect();
    assert_eq!(kinds, [4, 3, 5, 1, 2]);
}

#[test]
fn a_full_queue_refuses_and_tells_when_it_has_room() {
    let mut net = two_nodes();
    let (client, _) = net.pair();
    let payload = vec![5; 1 << 20];
    // The peer does not read while only this end works: the sockets fill, then the queue.
    let mut sent = 0;
    loop {
        match net.transports[0].send(client, Class::Data, frame(KIND, &payload)) {
            Ok(()) => sent += 1,
            Err(error) => {
                assert_eq!(error, SendError::Full);
                break;
            }
        }
        net.transports[0].flush();
        assert!(sent < 1000, "the queue has no bound");
    }
    assert!(net.transports[0].poll().is_none());
    net.transports[0].send(client, Class::Control, frame(KIND + 1, b"urgent")).expect("another class has room");
    let mut overtaken = None;
    for received in 0..=sent {
        if net.next_frame(1).kind == KIND + 1 {
            overtaken = Some(sent - received);
        }
    }
    assert!(overtaken.is_some_and(|frames| frames > 8), "the urgent frame overtook {overtaken:?} others");
    assert_eq!(net.next(0), TransportEvent::Writable { connection: client });
    net.transports[0].send(client, Class::Data, frame(KIND, &payload)).expect("room");
    assert_eq!(net.next_frame(1).payload.len(), payload.len());
    assert!(net.events[0].is_empty(), "told once");
}

#[test]
fn an_owner_with_events_to_poll_does_not_sleep() {
    let authority = authority();
    let mut small = options(&authority, who(PeerRole::Node, 1));
    small.queue_bytes.data = 1000;
    let mut net = Net::new(vec![small, options(&authority, who(PeerRole::Node, 2))]);
    let (client, _) = net.pair();
    let transport = &mut net.transports[0];
    transport.send(client, Class::Data, frame(KIND, &[0; 600])).expect("room");
    assert_eq!(transport.send(client, Class::Data, frame(KIND, &[0; 600])), Err(SendError::Full));
    assert_eq!(transport.deadline(), None);
    // The socket takes everything at once: no event of the poll will follow.
    transport.flush();
    assert_eq!(transport.deadline(), Some(Duration::ZERO));
    assert_eq!(transport.poll(), Some(TransportEvent::Writable { connection: client }));
    assert_eq!(transport.deadline(), None);
}

#[test]
fn what_was_sent_before_a_close_still_arrives() {
    let mut net = two_nodes();
    let (client, server) = net.pair();
    net.transports[1].send(server, Class::Data, frame(KIND, b"never polled")).expect("open");
    for _ in 0..8 {
        net.transports[0].send(client, Class::Data, frame(KIND, &[1; 1 << 20])).expect("room");
    }
    net.transports[0].close(client);
    assert_eq!(net.transports[0].send(client, Class::Data, frame(KIND, b"")), Err(SendError::Closed));
    for _ in 0..8 {
        assert_eq!(net.next_frame(1).payload.len(), 1 << 20);
    }
    assert_eq!(net.next_closed(1), CloseReason::Goodbye);
    net.run_until(|net| net.transports[0].deadline().is_none());
    assert!(net.events[0].is_empty(), "no event follows close: {:?}", net.events[0]);
}

#[test]
fn a_peer_that_dies_is_noticed() {
    let mut net = two_nodes();
    let (client, _) = net.pair();
    let dead = net.transports.pop().expect("two transports");
    drop(dead);
    net.events.pop();
    let TransportEvent::Closed { connection, reason, .. } = net.next(0) else { panic!("an end was expected") };
    assert_eq!(connection, client);
    assert!(matches!(reason, CloseReason::Vanished | CloseReason::Lost { .. }), "{reason:?}");
    assert_eq!(net.transports[0].send(client, Class::Data, frame(KIND, b"")), Err(SendError::Closed));
    assert_eq!(net.transports[0].deadline(), None);
}

#[test]
fn a_peer_that_does_not_read_its_end_is_given_up() {
    let mut net = two_nodes();
    let (client, _) = net.pair();
    for _ in 0..16 {
        let _ = net.transports[0].send(client, Class::Data, frame(KIND, &[1; 1 << 20]));
    }
    net.transports[0].flush();
    net.transports[0].close(client);
    let deadline = net.transports[0].deadline().expect("lingering has an end");
    assert_eq!(deadline, net.now + Duration::from_secs(2));
    net.transports[0].on_deadline(deadline);
    assert_eq!(net.transports[0].deadline(), None);
    // The slot is free: as many connections as there are tokens can be made again.
    let address = net.listen(1);
    for _ in 0..TOKENS_EACH {
        net.connect(0, address, None);
    }
    assert!(net.transports[0].poll().is_none());
    net.connect(0, address, None);
    let TransportEvent::Closed { reason, .. } = net.transports[0].poll().expect("an event") else {
        panic!("an end was expected")
    };
    assert_eq!(reason, CloseReason::Exhausted);
}

#[test]
fn certificates_are_replaced_without_a_restart() {
    let (old, new) = (authority(), authority());
    let (one, two) = (who(PeerRole::Node, 1), who(PeerRole::Node, 2));
    let mut net = Net::new(vec![options(&old, one), options(&old, two)]);
    let address = net.listen(1);
    let before = net.connect(0, address, Some(two));
    assert_eq!(net.next_connected(0), before);
    net.next_connected(1);
    // Both trust both authorities, then each changes its certificate, then the old authority goes.
    let both = || roots(&[&old, &new]);
    for (at, peer) in [(0, one), (1, two)] {
        net.transports[at].set_identity(old.issue(peer, valid()).expect("issued"), both()).expect("set");
    }
    for (at, peer) in [(1, two), (0, one)] {
        net.transports[at].set_identity(new.issue(peer, valid()).expect("issued"), both()).expect("set");
        net.connect(0, address, Some(two));
        net.next_connected(0);
        net.next_connected(1);
    }
    for (at, peer) in [(1, two), (0, one)] {
        net.transports[at].set_identity(new.issue(peer, valid()).expect("issued"), roots(&[&new])).expect("set");
        net.connect(0, address, Some(two));
        net.next_connected(0);
        net.next_connected(1);
    }
    net.transports[0].set_identity(old.issue(one, valid()).expect("issued"), both()).expect("set");
    net.connect(0, address, Some(two));
    assert_eq!(net.next_closed(0), CloseReason::Refused(Refusal::UnknownAuthority));
    assert_eq!(net.next_closed(1), CloseReason::Certificate(CertificateRefusal::UnknownAuthority));
    net.transports[0].send(before, Class::Data, frame(KIND, b"as before")).expect("open");
    assert_eq!(net.next_frame(1), frame(KIND, b"as before"));
}

#[test]
fn agents_of_the_same_machine_need_no_tls() {
    let authority = authority();
    let (one, two) = (who(PeerRole::Agent, 1), who(PeerRole::Node, 2));
    let mut net = Net::new(vec![options(&authority, one), options(&authority, two)]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    net.transports[1].listen_unix(listener).expect("listening");
    let client = net.transports[0].connect_unix(&path, Some(two), net.now);
    assert_eq!(net.next_connected(0), client);
    let server = net.next_connected(1);
    let payload = vec![6; 3 << 20];
    for _ in 0..4 {
        net.transports[0].send(client, Class::Data, frame(KIND, &payload)).expect("room");
        net.transports[1].send(server, Class::Data, frame(KIND, &payload)).expect("room");
    }
    for _ in 0..4 {
        assert!(net.next_frame(0) == frame(KIND, &payload) && net.next_frame(1) == frame(KIND, &payload));
    }
    net.transports[1].close(server);
    assert_eq!(net.next_closed(0), CloseReason::Goodbye);
    net.transports[0].connect_unix(&folder.path().join("nowhere"), None, net.now);
    assert_eq!(net.next_closed(0), CloseReason::ConnectFailed { kind: std::io::ErrorKind::NotFound });
}

#[test]
fn a_node_cannot_come_in_over_a_unix_socket() {
    let authority = authority();
    let (one, two) = (who(PeerRole::Node, 1), who(PeerRole::Node, 2));
    let mut net = Net::new(vec![options(&authority, one), options(&authority, two)]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    net.transports[1].listen_unix(listener).expect("listening");
    net.transports[0].connect_unix(&path, Some(two), net.now);
    assert_eq!(net.next_closed(1), CloseReason::RoleNotAllowed { role: PeerRole::Node });
    // The node's hello came before its refusal.
    net.next_connected(0);
    assert_eq!(net.next_closed(0), CloseReason::Refused(Refusal::NotAllowed));
}

#[test]
fn hostile_bytes_on_a_unix_socket_are_no_frames() {
    let authority = authority();
    let mut net = Net::new(vec![options(&authority, who(PeerRole::Node, 1))]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    net.transports[0].listen_unix(listener).expect("listening");
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut noise = vec![0; random.random_range(16..3000)];
        random.fill_bytes(&mut noise);
        // A header that announces more than a greeting may have, or noise from the first byte.
        if seed % 2 == 0 {
            noise.splice(0..0, [b'H', b'F', 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        }
        let mut raw = std::os::unix::net::UnixStream::connect(&path).expect("the kernel accepts");
        raw.write_all(&noise).expect("the kernel takes it");
        let reason = net.next_closed(0);
        match seed % 2 {
            0 => assert!(matches!(reason, CloseReason::Frame(FrameError::MetaTooLong { .. })), "{reason:?}"),
            _ => assert!(matches!(reason, CloseReason::Frame(_)), "{reason:?}"),
        }
        // The hello and the reason, then the end.
        let mut told = Vec::new();
        raw.read_to_end(&mut told).expect("an end, not an error");
        assert_eq!(told[told.len() - 18..], [b'H', b'F', 1, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 5, 0]);
    }
}
