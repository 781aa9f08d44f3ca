//! Whatever bytes come, in whatever pieces: no panic, bounded memory, and honest clients get the right data.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

mod peer;

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Operation, Request};
use holdfast_nbd::{BYTES_MAX, PAYLOAD_BYTES_MAX, REQUESTS_MAX};
use peer::*;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Piece {
    Bytes(Vec<u8>),
    Option { code: u32, data: Vec<u8> },
    Go { name: Vec<u8>, infos: Vec<u16> },
    Request { flags: u16, command: u16, offset: u64, length: u32, payload: usize },
    TakeReplies,
    Complete { which: usize, fails: bool },
    End,
}

fn piece() -> impl Strategy<Value = Piece> {
    let offset = prop_oneof![0..EXPORT_BYTES * 2, any::<u64>(), (0..16_u64).prop_map(|block| block * 4096)];
    let length = prop_oneof![0..8192_u32, any::<u32>(), (0..64_u32).prop_map(|block| block * (64 << 10))];
    prop_oneof![
        1 => vec(any::<u8>(), 0..64).prop_map(Piece::Bytes),
        2 => (0..14_u32, vec(any::<u8>(), 0..40)).prop_map(|(code, data)| Piece::Option { code, data }),
        3 => (Just(b"disk".to_vec()), vec(0..5_u16, 0..4)).prop_map(|(name, infos)| Piece::Go { name, infos }),
        8 => (prop_oneof![Just(0), any::<u16>()], 0..9_u16, offset, length, 0..70_000_usize).prop_map(
            |(flags, command, offset, length, payload)| Piece::Request { flags, command, offset, length, payload }
        ),
        2 => Just(Piece::TakeReplies),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(which, fails)| Piece::Complete { which, fails }),
        1 => Just(Piece::End),
    ]
}

fn answer(peer: &mut Peer, request: &Request, fails: bool) {
    let result = match request.operation {
        _ if fails => Err(Error::Unavailable),
        Operation::Read { length, .. } => Ok(Bytes::from(vec![0; length as usize])),
        _ => Ok(Bytes::new()),
    };
    peer.session.on_completion(Completion { id: request.id, result });
}

fn run(peer: &mut Peer, pieces: Vec<Piece>) {
    let mut asked: Vec<Request> = Vec::new();
    for piece in pieces {
        let bytes = match piece {
            Piece::Bytes(bytes) => bytes,
            Piece::Option { code, data } => option(code, &data),
            Piece::Go { name, infos } => option(GO, &info_request(&name, &infos)),
            Piece::Request { flags, command, offset, length, payload } => {
                let payload = vec![0; if command == WRITE { payload.min(length as usize) } else { 0 }];
                [request(flags, command, 1, offset, length), payload].concat()
            }
            Piece::TakeReplies => {
                peer.take();
                continue;
            }
            Piece::Complete { which, fails } => {
                if !asked.is_empty() {
                    let request = asked.swap_remove(which % asked.len());
                    answer(peer, &request, fails);
                }
                continue;
            }
            Piece::End => {
                peer.session.on_end_of_input();
                continue;
            }
        };
        if peer.session.wants_input() {
            peer.send(&[bytes]);
        }
        let room = peer.session.input().capacity();
        assert!(room <= 2 * (1 << 20) + 200_000, "a buffer of {room} bytes");
        while let Some(request) = peer.session.poll_request() {
            asked.push(request);
        }
        assert!(asked.len() < REQUESTS_MAX + 64);
        let data: u64 = asked
            .iter()
            .map(|request| match &request.operation {
                Operation::Read { length, .. } => u64::from(*length),
                Operation::Write { data, .. } => data.len() as u64,
                _ => 0,
            })
            .sum();
        assert!(data <= (BYTES_MAX + PAYLOAD_BYTES_MAX as usize) as u64, "{data}");
    }
    // Whatever happened, a session whose peer is gone and whose requests are answered is over.
    peer.session.on_end_of_input();
    while let Some(request) = peer.session.poll_request() {
        asked.push(request);
    }
    asked.iter().for_each(|request| answer(peer, request, false));
    peer.take();
    assert!(peer.session.end().is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..4096)) {
        run(&mut Peer::greeted(), vec![Piece::Bytes(bytes.clone())]);
        run(&mut Peer::haggling(), vec![Piece::Bytes(bytes.clone())]);
        run(&mut Peer::transmitting(true), vec![Piece::Bytes(bytes)]);
    }

    #[test]
    fn arbitrary_haggling_is_bounded_and_ends(pieces in vec(piece(), 0..40)) {
        run(&mut Peer::haggling(), pieces);
    }

    #[test]
    fn arbitrary_commands_are_bounded_and_end(pieces in vec(piece(), 0..60), structured: bool) {
        run(&mut Peer::transmitting(structured), pieces);
    }

    /// The stream of bytes decides, not how it was cut.
    #[test]
    fn the_cut_of_the_stream_does_not_matter(
        lengths in vec((0..8_u64, 1..9_u32), 1..20), cuts in vec(1..5000_usize, 1..50), structured: bool,
    ) {
        let stream: Vec<u8> = lengths
            .iter()
            .enumerate()
            .flat_map(|(n, (block, blocks))| {
                let length = blocks * 512;
                [request(0, WRITE, n as u64, block * 4096, length), vec![n as u8; length as usize]].concat()
            })
            .collect();
        let mut whole = Peer::transmitting(structured);
        whole.send(std::slice::from_ref(&stream));
        let mut cut = Peer::transmitting(structured);
        let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            cut.session.input().extend_from_slice(piece);
            cut.session.on_input();
            rest = after;
        }
        let polled = |peer: &mut Peer| std::iter::from_fn(|| peer.session.poll_request()).collect::<Vec<_>>();
        let (from_whole, from_cut) = (polled(&mut whole), polled(&mut cut));
        prop_assert_eq!(from_whole.len(), lengths.len());
        prop_assert_eq!(from_whole, from_cut);
    }

    /// Every command gets one reply, with its cookie, whatever the order of completions.
    #[test]
    fn every_command_is_answered_once(order in vec(any::<usize>(), 30), structured: bool) {
        let mut peer = Peer::transmitting(structured);
        for cookie in 0..30 {
            peer.send(&[request(0, TRIM, cookie, 0, 512)]);
        }
        let mut asked: Vec<Request> = std::iter::from_fn(|| peer.session.poll_request()).collect();
        let mut answers = BTreeMap::new();
        for which in order {
            let request = asked.swap_remove(which % asked.len());
            answer(&mut peer, &request, false);
            let sent = peer.take();
            prop_assert_eq!(sent.len(), if structured { 20 } else { 16 });
            let cookie = u64::from_be_bytes(sent[8..16].try_into().unwrap());
            *answers.entry(cookie).or_insert(0) += 1;
        }
        prop_assert_eq!(answers, (0..30).map(|cookie| (cookie, 1)).collect::<BTreeMap<u64, i32>>());
    }
}
