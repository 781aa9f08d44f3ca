//! Whole conversations, byte for byte: `C` the client sends, `S` the server must answer, `E` the server must end.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

mod peer;

use bytes::Bytes;
use holdfast_block::{Completion, Operation};
use holdfast_nbd::End;
use peer::{EXPORT_BYTES, Peer, hex};

/// Hexadecimal words, and `(xx*n)` for n bytes of xx.
fn bytes_of(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .flat_map(|word| match word.strip_prefix('(').and_then(|word| word.strip_suffix(')')) {
            Some(run) => {
                let (byte, count) = run.split_once('*').unwrap();
                hex(byte).repeat(count.parse().unwrap())
            }
            None => hex(word),
        })
        .collect()
}

fn serve(peer: &mut Peer, memory: &mut [u8]) {
    while let Some(request) = peer.session.poll_request() {
        let mut data = Bytes::new();
        match request.operation {
            Operation::Read { offset, length } => {
                data = Bytes::copy_from_slice(&memory[offset as usize..][..length as usize]);
            }
            Operation::Write { offset, data } => memory[offset as usize..][..data.len()].copy_from_slice(&data),
            Operation::WriteZeroes { offset, length } | Operation::Discard { offset, length } => {
                memory[offset as usize..][..length as usize].fill(0);
            }
            Operation::Flush => {}
        }
        peer.session.on_completion(Completion { id: request.id, result: Ok(data) });
    }
}

fn replay(transcript: &str) {
    let (mut peer, mut memory) = (Peer::greeted(), vec![0; EXPORT_BYTES as usize]);
    let mut sent = Vec::new();
    for (number, line) in transcript.lines().enumerate() {
        let (kind, rest) = line.split_at(1);
        let at = number + 1;
        match kind {
            "#" => {}
            "C" => {
                assert_eq!(sent, [], "line {at}: the server said more before");
                peer.send(&[bytes_of(rest)]);
            }
            "S" => {
                serve(&mut peer, &mut memory);
                sent.extend(peer.take());
                let expected = bytes_of(rest);
                assert_eq!(sent.drain(..expected.len().min(sent.len())).collect::<Vec<_>>(), expected, "line {at}");
            }
            "E" => assert_eq!((peer.take(), peer.session.end()), (vec![], Some(End::Disconnected)), "line {at}"),
            other => panic!("line {at} begins with {other}"),
        }
    }
    assert!(peer.session.end().is_some(), "a transcript goes on to the end");
}

#[test]
fn a_conversation_with_structured_replies() {
    replay(include_str!("testdata/structured.txt"));
}

#[test]
fn a_conversation_with_an_old_client() {
    replay(include_str!("testdata/simple.txt"));
}
