use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::*;
use crate::close::{CertificateRefusal, Refusal};
use crate::frame::Header;
use crate::hello::Versions;
use crate::identity::{PeerIdentity, PeerRole};
use crate::pki::{Authority, Roots, Validity};
use crate::tls::TlsConfigs;

fn configs(authority: &Authority, peer: PeerIdentity) -> TlsConfigs {
    let roots = Roots::from_pem(authority.certificate_pem()).expect("roots");
    TlsConfigs::new(&authority.issue(peer, valid()).expect("issued"), &roots).expect("a configuration")
}

/// Valid whenever the tests run: 2001 to 2286.
fn valid() -> Validity {
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    Validity { not_before: at(1_000_000_000), not_after: at(10_000_000_000) }
}

const CLIENT: PeerIdentity = PeerIdentity { role: PeerRole::Agent, id: 1 };
const SERVER: PeerIdentity = PeerIdentity { role: PeerRole::Node, id: 2 };

fn hello(identity: PeerIdentity) -> Hello {
    let bearer = Bearer { peer: identity, holder: None };
    Hello { versions: Versions { min: 1, max: 1 }, bearer, cluster: None, boot: 5 }
}

fn anyone() -> Demands {
    Demands { expected: None, agents_and_admins_only: false }
}

/// One end, and everything it has written that the other has not read.
struct End {
    link: Link,
    out: Outgoing,
    events: Vec<LinkEvent>,
    closed: Option<CloseReason>,
}

impl End {
    fn new(tls: TlsSession, identity: PeerIdentity) -> End {
        let link = Link::new(Some(tls), hello(identity), anyone(), QueueBytes::default());
        End { link, out: Outgoing::default(), events: Vec::new(), closed: None }
    }

    fn close(&mut self, reason: CloseReason) {
        if self.closed.is_none() {
            self.link.abort(&reason);
            self.closed = Some(reason);
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let mut input = vec![0; (LEFTOVER_BYTES_MAX + 1).max(bytes.len() + LEFTOVER_BYTES_MAX)];
        let start = self.link.begin_read(&mut input);
        let end = start + bytes.len();
        input[start..end].copy_from_slice(bytes);
        let events = &mut self.events;
        let outcome = self.link.on_bytes(&mut input[..end], &mut self.out, &mut |event| events.push(event));
        if let Err(reason) = outcome {
            self.close(reason);
        }
    }

    /// What it would write to its socket, at most `max` bytes.
    fn written(&mut self, max: usize) -> Vec<u8> {
        if let Err(reason) = self.link.fill(&mut self.out) {
            self.close(reason);
        }
        let bytes = self.out.waiting()[..self.out.waiting().len().min(max)].to_vec();
        self.out.consume(bytes.len());
        bytes
    }
}

fn sessions() -> (TlsSession, TlsSession) {
    let authority = Authority::create("test", valid()).expect("an authority");
    let client = configs(&authority, CLIENT).connect().expect("a session");
    (client, configs(&authority, SERVER).accept().expect("a session"))
}

fn ends() -> (End, End) {
    let (client, server) = sessions();
    let (mut client, server) = (End::new(client, CLIENT), End::new(server, SERVER));
    client.link.start(&mut client.out).expect("a client begins");
    (client, server)
}

/// Carries bytes in pieces of at most `step` until both are silent.
fn exchange(client: &mut End, server: &mut End, mut step: impl FnMut() -> usize) {
    loop {
        let (there, back) = (client.written(step()), server.written(step()));
        if there.is_empty() && back.is_empty() {
            return;
        }
        if !there.is_empty() {
            server.receive(&there);
        }
        if !back.is_empty() {
            client.receive(&back);
        }
    }
}

fn connected() -> (End, End) {
    let (mut client, mut server) = ends();
    exchange(&mut client, &mut server, || usize::MAX);
    let bearer = |peer| Bearer { peer, holder: None };
    let peer = |peer| LinkEvent::Connected(Peer { bearer: bearer(peer), version: 1, boot: 5, cluster: None });
    assert_eq!(std::mem::take(&mut client.events), [peer(SERVER)]);
    assert_eq!(std::mem::take(&mut server.events), [peer(CLIENT)]);
    (client, server)
}

fn frame(payload: Vec<u8>) -> Frame {
    Frame { kind: KIND_MIN, meta: Bytes::from_static(b"m"), payload: Bytes::from(payload) }
}

#[test]
fn bytes_may_arrive_one_by_one() {
    let (mut client, mut server) = ends();
    exchange(&mut client, &mut server, || 1);
    assert!(client.link.is_open() && server.link.is_open());
    client.link.send(Class::Data, frame(vec![1; 40_000])).expect("room");
    exchange(&mut client, &mut server, || 1);
    assert_eq!(server.events.pop(), Some(LinkEvent::Frame(frame(vec![1; 40_000]))));
}

#[test]
fn frames_survive_any_cutting_of_records() {
    let (mut client, mut server) = connected();
    for seed in 0..20 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut expected = Vec::new();
        for _ in 0..random.random_range(1..20) {
            let mut payload = vec![0; random.random_range(0..60_000)];
            random.fill_bytes(&mut payload);
            client.link.send(Class::Data, frame(payload.clone())).expect("room");
            server.link.send(Class::Data, frame(payload.clone())).expect("room");
            expected.push(LinkEvent::Frame(frame(payload)));
        }
        exchange(&mut client, &mut server, || random.random_range(1..50_000));
        assert!(std::mem::take(&mut client.events) == expected, "seed {seed}: frames to the client");
        assert!(std::mem::take(&mut server.events) == expected, "seed {seed}: frames to the server");
        assert_eq!((&client.closed, &server.closed), (&None, &None));
    }
}

#[test]
fn small_frames_share_a_record() {
    let (mut client, mut server) = connected();
    for _ in 0..100 {
        client.link.send(Class::Data, frame(vec![0; 50])).expect("room");
    }
    let bytes = client.written(usize::MAX);
    let wire = 100 * frame(vec![0; 50]).wire_bytes();
    assert_eq!(bytes.len(), wire + 22, "one header, one type and one tag");
    server.receive(&bytes);
    assert_eq!(server.events.len(), 100);
}

#[test]
fn damaged_ciphertext_ends_the_connection_with_a_reason() {
    for seed in 0..200 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut client, mut server) = ends();
        // Damage falls anywhere: into the handshake, the greeting or the frames after it.
        let mut intact = random.random_range(0..6_000);
        let mut frames = 3;
        loop {
            if client.link.is_open() && frames > 0 && client.closed.is_none() {
                frames -= 1;
                client.link.send(Class::Data, frame(vec![9; 1500])).expect("room");
            }
            let mut there = client.written(random.random_range(1..3_000));
            let back = server.written(random.random_range(1..3_000));
            if there.is_empty() && back.is_empty() {
                break;
            }
            if let Some(byte) = there.get_mut(intact) {
                *byte ^= random.random_range(1..=255);
                intact = usize::MAX;
            } else if intact != usize::MAX {
                intact -= there.len();
            }
            if !there.is_empty() {
                server.receive(&there);
            }
            if !back.is_empty() {
                client.receive(&back);
            }
        }
        let damaged = intact == usize::MAX;
        let received = server.events.iter().filter(|event| matches!(event, LinkEvent::Frame(_))).count();
        let genuine = |event: &LinkEvent| match event {
            LinkEvent::Frame(received) => *received == frame(vec![9; 1500]),
            LinkEvent::Connected(peer) => peer.bearer.peer == CLIENT,
        };
        assert!(server.events.iter().all(genuine), "seed {seed}");
        // A length that grew makes the server wait for the rest; the handshake timeout or the heartbeats end that.
        let waits = server.closed.is_none() && !server.link.leftover.is_empty();
        // The version in a record's header before encryption means nothing and is covered by nothing.
        let harmless = received == 3;
        let ended = server.closed.is_some() || client.closed.is_some();
        assert!(!damaged || ended || waits || harmless, "seed {seed}");
        assert!(damaged || harmless, "seed {seed}: {:?}", server.closed);
    }
}

/// A peer with a good certificate that speaks TLS, but no frames.
struct Hostile {
    tls: TlsSession,
    out: Outgoing,
    leftover: Vec<u8>,
    inbox: Inbox,
}

impl Hostile {
    fn secure() -> (Hostile, End) {
        let (client, server) = sessions();
        let (mut server, out) = (End::new(server, SERVER), Outgoing::default());
        let mut hostile = Hostile { tls: client, out, leftover: Vec::new(), inbox: Inbox::new(Limits::OPEN) };
        hostile.tls.decrypt(&mut [], &mut hostile.out, &mut |_| ()).expect("a client begins");
        while hostile.tls.is_handshaking() || !hostile.out.is_empty() {
            hostile.carry(&mut server);
        }
        (hostile, server)
    }

    fn carry(&mut self, server: &mut End) {
        let bytes = self.out.waiting().to_vec();
        self.out.consume(bytes.len());
        server.receive(&bytes);
        self.leftover.extend(server.written(usize::MAX));
        let mut plain = |bytes: &[u8]| self.inbox.extend(bytes);
        if let Ok(decrypted) = self.tls.decrypt(&mut self.leftover, &mut self.out, &mut plain) {
            self.leftover.drain(..decrypted.consumed);
        }
    }

    fn say(&mut self, plaintext: &[u8], server: &mut End) {
        self.tls.encrypt(plaintext, &mut self.leftover, &mut self.out).expect("secure");
        self.carry(server);
    }

    /// The kinds of the frames that the server sent.
    fn told(&mut self) -> Vec<Frame> {
        std::iter::from_fn(|| self.inbox.next().expect("the server sends frames")).map(|(_, frame)| frame).collect()
    }
}

fn wire(frame: &Frame) -> Vec<u8> {
    [&Header::of(Class::Data, frame).encode()[..], &frame.meta, &frame.payload].concat()
}

#[test]
fn hostile_plaintext_inside_tls_is_refused_with_a_reason() {
    let early = frame(vec![1; 100]);
    let false_hello = hello(PeerIdentity { id: 77, ..CLIENT }).encode();
    let short_hello = Frame { meta: Bytes::from_static(b"short"), ..hello(CLIENT).encode() };
    let odd_kind = Frame { kind: 3, meta: Bytes::new(), payload: Bytes::new() };
    let claimed = PeerIdentity { id: 77, ..CLIENT };
    let cases: [(&[&[u8]], CloseReason, u16); 6] = [
        (&[b"GET / HTTP/1.1\r\n\r\n"], FrameError::Magic { found: *b"GE" }.into(), 5),
        (&[&wire(&early)], FrameError::PayloadTooLong { length: 100, max: 0 }.into(), 5),
        (&[&wire(&false_hello)], CloseReason::FalseIdentity { claimed, certified: CLIENT }, 3),
        (&[&wire(&short_hello)], FrameError::Malformed.into(), 5),
        (&[&wire(&odd_kind)], FrameError::UnexpectedKind { kind: 3 }.into(), 5),
        (
            &[&wire(&hello(CLIENT).encode()), &wire(&hello(CLIENT).encode())],
            FrameError::UnexpectedKind { kind: KIND_HELLO }.into(),
            5,
        ),
    ];
    for (said, reason, code) in cases {
        let (mut hostile, mut server) = Hostile::secure();
        for plaintext in said {
            hostile.say(plaintext, &mut server);
        }
        assert_eq!(server.closed, Some(reason));
        let told = hostile.told();
        assert_eq!(told.last().map(|frame| (frame.kind, close_code(&frame.meta))), Some((KIND_CLOSE, Ok(code))));
    }
}

#[test]
fn noise_inside_tls_never_panics_and_is_never_a_frame() {
    for seed in 0..100 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut hostile, mut server) = Hostile::secure();
        if seed % 2 == 0 {
            hostile.say(&wire(&hello(CLIENT).encode()), &mut server);
        }
        let greeted = server.events.len();
        for _ in 0..4 {
            let mut noise = vec![0; random.random_range(1..5_000)];
            random.fill_bytes(&mut noise);
            hostile.say(&noise, &mut server);
        }
        assert_eq!(server.events.len(), greeted, "seed {seed}");
        assert!(matches!(server.closed, Some(CloseReason::Frame(_))), "seed {seed}: {:?}", server.closed);
    }
}

#[test]
fn an_end_without_a_farewell_is_not_a_goodbye() {
    let (mut hostile, mut server) = Hostile::secure();
    hostile.say(&wire(&hello(CLIENT).encode()), &mut server);
    hostile.tls.end(&mut hostile.leftover, &mut hostile.out).expect("secure");
    hostile.carry(&mut server);
    assert_eq!(server.closed, Some(CloseReason::Vanished));
}

#[test]
fn a_farewell_comes_after_what_was_sent() {
    let (mut client, mut server) = connected();
    client.link.send(Class::Bulk, frame(vec![1; 300_000])).expect("room");
    client.link.finish();
    exchange(&mut client, &mut server, || usize::MAX);
    assert_eq!(server.events, [LinkEvent::Frame(frame(vec![1; 300_000]))]);
    assert_eq!(server.closed, Some(CloseReason::Goodbye));
    assert!(!client.link.has_output());
}

#[test]
fn an_aborted_link_still_finishes_the_frame_it_began() {
    let (mut client, mut server) = connected();
    client.link.send(Class::Data, frame(vec![1; 1 << 20])).expect("room");
    client.link.send(Class::Data, frame(vec![2; 1 << 20])).expect("room");
    server.receive(&client.written(100_000));
    client.close(CloseReason::RoleNotAllowed { role: PeerRole::Admin });
    exchange(&mut client, &mut server, || usize::MAX);
    assert_eq!(server.events.len(), 1);
    assert_eq!(server.closed, Some(CloseReason::Refused(Refusal::NotAllowed)));
}

#[test]
fn a_certificate_without_an_identity_is_refused() {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).expect("signed");
    let (ca_pem, ca_key) = (ca.pem(), key.serialize_pem());
    let issuer = Issuer::new(params, key);
    let own_key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["node-1.example".to_owned()]).expect("a name");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let nameless = params.signed_by(&own_key, &issuer).expect("signed");
    let provider = crate::tls::provider();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("a version")
        .with_no_client_auth()
        .with_single_cert(
            vec![nameless.der().clone()],
            rustls::pki_types::PrivateKeyDer::Pkcs8(own_key.serialize_der().into()),
        )
        .expect("a certificate");
    config.send_tls13_tickets = 0;
    let authority = Authority::from_pem(&ca_pem, &ca_key).expect("an authority");
    let client = configs(&authority, CLIENT).connect().expect("a session");
    let server = TlsSession::accept_with(std::sync::Arc::new(config)).expect("a session");
    let (mut client, mut server) = (End::new(client, CLIENT), End::new(server, SERVER));
    client.link.start(&mut client.out).expect("a client begins");
    exchange(&mut client, &mut server, || usize::MAX);
    assert!(
        matches!(client.closed, Some(CloseReason::Certificate(CertificateRefusal::NoIdentity { .. }))),
        "{:?}",
        client.closed
    );
    // A server that asks for no certificate gets none, and cannot say who its peer is.
    assert_eq!(server.closed, Some(CloseReason::Certificate(CertificateRefusal::Missing)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_instead_of_a_handshake_never_panic(pieces in proptest::collection::vec(
        proptest::collection::vec(any::<u8>(), 0..400), 1..6), record: bool)
    {
        let (_, server) = sessions();
        let mut server = End::new(server, SERVER);
        if record {
            server.receive(&[22, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3]);
        }
        for piece in pieces {
            server.receive(&piece);
            server.written(usize::MAX);
        }
        prop_assert!(server.events.is_empty() && !server.link.is_open());
    }
}
