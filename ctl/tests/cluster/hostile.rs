//! Garbage at every port and socket of a running cluster: whoever sends it is refused, and nobody else notices.
//!
//! What the decoders and state machines do with each kind of it is their own tests' business; this is about the
//! processes around them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use holdfast_transport::pki::{Authority, Roots, Validity};
use holdfast_transport::{
    Class, Frame, KIND_MIN, Options, PAYLOAD_BYTES_MAX, PeerIdentity, PeerRole, Transport, TransportEvent, Versions,
};
use mio::{Events, Poll};

use crate::harness::{Cluster, SOON};
use crate::model::{Model, random};
use crate::workload::{End, Workload, verify};

const BLOCKS: usize = 1024;
/// Frames from somebody with a good certificate, to each node.
const FRAMES: usize = 400;
/// More than a node greets at a time.
const SILENT: usize = 300;

fn noise(seed: &mut u64, length: usize) -> Vec<u8> {
    (0..length.div_ceil(8)).flat_map(|_| random(seed).to_le_bytes()).take(length).collect()
}

/// Openings of several protocols, whole and cut off, and plain noise.
fn openings(seed: &mut u64) -> Vec<Vec<u8>> {
    let mut openings = vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        // A TLS record of 16 KiB that says it is a handshake message of 16 MiB.
        [&[0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &noise(seed, 16 << 10)].concat(),
        // Our own frame without TLS.
        [&b"HF\x01\x00\x01\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"[..], &noise(seed, 64)].concat(),
        // NBD: good flags, then an option longer than any.
        [&3u32.to_be_bytes()[..], b"IHAVEOPT", &7u32.to_be_bytes(), &u32::MAX.to_be_bytes(), &noise(seed, 4096)]
            .concat(),
        b"{\"version\":1,\"command\":\"attach\",\"volume\":{}}\n".to_vec(),
        vec![b'['; 200 << 10],
    ];
    openings.extend((0..24).map(|number| noise(seed, 1 << (number % 16))));
    openings
}

/// Sends it and waits until the other end is through with it.
fn say(mut stream: impl Read + Write, bytes: &[u8], end: impl FnOnce()) {
    // Refused in the middle of it as a rule; then writing or reading fails, which is as good.
    let _ = stream.write_all(bytes);
    end();
    let _ = stream.read_to_end(&mut Vec::new());
}

fn say_to_port(address: &str, bytes: &[u8]) {
    let stream = TcpStream::connect(address).expect("the port is open");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    say(&stream, bytes, || drop(stream.shutdown(std::net::Shutdown::Write)));
}

fn say_to_socket(path: &Path, bytes: &[u8]) {
    let stream = UnixStream::connect(path).expect("the socket is open");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    say(&stream, bytes, || drop(stream.shutdown(std::net::Shutdown::Write)));
}

/// Somebody with the certificate of an agent, whose frames are nearly those of one.
fn say_frames(pki: &Path, address: &str, volume: &[u8; 16], seed: &mut u64) {
    let authority = Authority::load(&pki.join("ca.pem"), &pki.join("ca.key")).expect("the cluster's authority");
    let now = SystemTime::now();
    let validity = Validity { not_before: now, not_after: now + Duration::from_secs(3600) };
    let identity = authority.issue(PeerIdentity { role: PeerRole::Agent, id: 666 }, validity).expect("a certificate");
    let roots = Roots::load(&pki.join("ca.pem")).expect("roots");
    let poll = Poll::new().expect("a poll");
    let options = Options::new(identity, roots, 1, Versions { min: 1, max: 1 });
    let mut transport = Transport::new(options, poll.registry(), 0..8).expect("a transport");
    let began = Instant::now();
    let mut poll = poll;
    let mut events = Events::with_capacity(64);
    let mut connection = None;
    let (mut sent, mut connections) = (0, 0);
    while sent < FRAMES {
        assert!(began.elapsed() < SOON, "only {sent} frames were taken");
        if connection.is_none() {
            connections += 1;
            transport.connect(address.parse().expect("an address"), None, began.elapsed());
            connection = Some(None);
        }
        poll.poll(&mut events, Some(Duration::from_millis(10))).expect("polling");
        for event in &events {
            transport.on_ready(event, began.elapsed());
        }
        transport.on_deadline(began.elapsed());
        while let Some(event) = transport.poll() {
            match event {
                TransportEvent::Connected { connection: id, .. } => connection = Some(Some(id)),
                // Its manners were noticed: it comes again.
                TransportEvent::Closed { .. } => connection = None,
                _ => {}
            }
        }
        if let Some(Some(id)) = connection {
            for _ in 0..20 {
                let frame = frame(volume, seed);
                sent += usize::from(transport.send(id, Class::Data, frame).is_ok());
            }
            transport.flush();
        }
    }
    assert!(connections > 1, "it was thrown out at least once");
}

fn frame(volume: &[u8; 16], seed: &mut u64) -> Frame {
    let dice = random(seed);
    // Session requests, replies, messages between nodes, and what nobody speaks.
    let kind = match dice % 8 {
        0 => 0x0200 + (dice >> 8 & 15) as u16,
        1 => 0x0300 + (dice >> 8 & 7) as u16,
        2 => KIND_MIN + (dice >> 16) as u16 % 0x1000,
        _ => 0x0100 + (dice >> 8 & 15) as u16,
    };
    let mut meta = volume.to_vec();
    // Small numbers for the most part: epochs, sessions, offsets that exist.
    for _ in 0..dice >> 24 & 15 {
        let number = random(seed);
        meta.extend((if number & 3 == 0 { number } else { number >> 8 & 7 }).to_le_bytes());
    }
    meta.extend(noise(seed, (dice >> 32 & 7) as usize));
    let payload = match dice >> 40 & 31 {
        0 => PAYLOAD_BYTES_MAX,
        1..4 => 4096,
        _ => 0,
    };
    Frame { kind, meta: Bytes::from(meta), payload: Bytes::from(vec![7; payload]) }
}

#[test]
fn garbage_at_every_port_and_socket_disturbs_nobody() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    let file = cluster.file();
    let pids: Vec<u32> = cluster.nodes().iter().map(|node| cluster.pid(node)).collect();
    let agent = cluster.agent_pid("local");
    let workload = Workload::start(&socket, Model::new(BLOCKS), 5);
    workload.wait_completed(50);

    let mut seed = 1;
    // An agent's certificate is good for every volume; what is said is about another one than the workload's.
    cluster.must(&["volume", "create", "target", "--size", "64Mi"]);
    let text = cluster.volume("target")["id"].as_str().expect("an identifier").replace('-', "");
    let volume = u128::from_str_radix(&text, 16).expect("an identifier").to_be_bytes();
    let control = cluster.dir().join("agents/local/control.sock");
    let mut silent = Vec::new();
    for node in file["nodes"].as_array().expect("nodes") {
        let [endpoint, api] = ["endpoint", "api"].map(|key| node[key].as_str().expect("an address"));
        silent.extend((0..SILENT).map(|_| TcpStream::connect(endpoint).expect("the port is open")));
        silent.extend((0..8).map(|_| TcpStream::connect(api).expect("the port is open")));
        for bytes in openings(&mut seed) {
            say_to_port(endpoint, &bytes);
            say_to_port(api, &bytes);
        }
        say_frames(&cluster.dir().join("pki"), endpoint, &volume, &mut seed);
    }
    for bytes in openings(&mut seed) {
        say_to_socket(&socket, &bytes);
        say_to_socket(&control, &bytes);
    }
    workload.wait_completed(100);
    drop(silent);

    let outcome = workload.stop();
    assert_eq!(outcome.end, End::Stopped);
    let mut model = outcome.model;
    verify(&socket, &mut model);
    assert_eq!(cluster.nodes().iter().map(|node| cluster.pid(node)).collect::<Vec<u32>>(), pids, "no node ended");
    assert_eq!(cluster.agent_pid("local"), agent, "the agent did not end");
    cluster.must(&["volume", "create", "w", "--size", "64Mi"]);
    cluster.must(&["detach", "v"]);
    verify(&cluster.attach("v", "local", &[]), &mut model);
}
