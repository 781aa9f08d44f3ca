//! One test per group of sentences of the protocol's description (`doc/proto.md`); section names in quotes.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

mod peer;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Operation, RequestId};
use holdfast_nbd::{BYTES_MAX, End, PAYLOAD_BYTES_MAX, REQUESTS_MAX, Violation};
use peer::*;

// "Newstyle negotiation", "Fixed newstyle negotiation"

#[test]
fn the_server_greets_first_and_offers_fixed_newstyle_without_zeroes() {
    let mut peer = Peer::greeted();
    assert_eq!(peer.take(), hex("4e42444d41474943 49484156454f5054 0003"));
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut peer = Peer::greeted();
    peer.send(&[0x8000_0001_u32.to_be_bytes().to_vec()]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::ClientFlags(0x8000_0001))));
    assert_eq!(peer.take(), []);
}

#[test]
fn an_option_without_its_magic_ends_the_connection() {
    let mut peer = Peer::haggling();
    peer.send(&[vec![0x58; 16]]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::OptionMagic)));
}

#[test]
fn an_unknown_option_is_refused_and_the_next_is_understood() {
    let mut peer = Peer::haggling();
    for unknown in [4, 5, 11, 0xffff_ffff] {
        peer.send(&[option(unknown, &[1, 2, 3])]);
        assert_eq!(peer.take(), option_reply(unknown, ERR_UNSUP, &[]));
    }
    peer.send(&[option(ABORT, &[])]);
    assert_eq!(peer.take(), option_reply(ABORT, ACK, &[]));
}

#[test]
fn an_option_too_long_to_look_at_is_skipped() {
    let mut peer = Peer::haggling();
    let mut long = option(GO, &[]);
    long[12..16].copy_from_slice(&(10_u32 << 20).to_be_bytes());
    peer.send(&[long]);
    for _ in 0..10 {
        peer.send(&[vec![0; 1 << 20]]);
    }
    assert_eq!(peer.take(), option_reply(GO, ERR_TOO_BIG, &[]));
    peer.send(&[option(STRUCTURED_REPLY, &[])]);
    assert_eq!(peer.take(), option_reply(STRUCTURED_REPLY, ACK, &[]));
}

#[test]
fn endless_haggling_ends_the_connection() {
    let mut peer = Peer::haggling();
    for _ in 0..256 {
        peer.send(&[option(LIST, &[])]);
    }
    assert_eq!(peer.session.end(), None);
    peer.send(&[option(LIST, &[])]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::TooManyOptions)));
}

// "Option types"

#[test]
fn export_name_answers_size_flags_and_zeroes_unless_declined() {
    for (client_flags, zeroes) in [(1_u32, 124), (3, 0)] {
        let mut peer = Peer::greeted();
        peer.take();
        peer.send(&[client_flags.to_be_bytes().to_vec(), option(EXPORT_NAME, b"disk")]);
        let mut expected = hex("0000000000400000 016d");
        expected.resize(10 + zeroes, 0);
        assert_eq!(peer.take(), expected);
        assert!(peer.session.is_transmitting());
    }
}

#[test]
fn export_name_of_another_export_ends_the_connection() {
    let mut peer = Peer::haggling();
    peer.send(&[option(EXPORT_NAME, b"other")]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::UnknownExport)));
}

#[test]
fn abort_is_acknowledged_and_its_data_ignored() {
    let mut peer = Peer::haggling();
    peer.send(&[option(ABORT, b"bye")]);
    assert_eq!(peer.session.end(), None, "the answer goes out first");
    assert_eq!(peer.take(), option_reply(ABORT, ACK, &[]));
    assert_eq!(peer.session.end(), Some(End::Aborted));
}

#[test]
fn list_names_the_export_and_takes_no_data() {
    let mut peer = Peer::haggling();
    peer.send(&[option(LIST, &[])]);
    let expected = [option_reply(LIST, SERVER, &hex("00000004 6469736b")), option_reply(LIST, ACK, &[])];
    assert_eq!(peer.take(), expected.concat());
    peer.send(&[option(LIST, &[0])]);
    assert_eq!(peer.take(), option_reply(LIST, ERR_INVALID, &[]));
}

#[test]
fn info_and_go_answer_alike_and_only_go_begins_transmission() {
    for name in [&b"disk"[..], b""] {
        let mut peer = Peer::haggling();
        for code in [INFO, GO] {
            assert!(!peer.session.is_transmitting());
            peer.send(&[option(code, &info_request(name, &[3, 1, 9999]))]);
            let expected = [
                option_reply(code, REP_INFO, &hex("0000 0000000000400000 016d")),
                option_reply(code, REP_INFO, &hex("0003 00000200 00001000 00100000")),
                option_reply(code, REP_INFO, &hex("0001 6469736b")),
                option_reply(code, ACK, &[]),
            ];
            assert_eq!(peer.take(), expected.concat());
        }
        assert!(peer.session.is_transmitting());
    }
}

#[test]
fn go_to_an_unknown_export_is_refused_without_information() {
    let mut peer = Peer::haggling();
    peer.send(&[option(GO, &info_request(b"other", &[]))]);
    assert_eq!(peer.take(), option_reply(GO, ERR_UNKNOWN, &[]));
    assert!(!peer.session.is_transmitting());
}

#[test]
fn go_with_lengths_that_do_not_fit_is_invalid() {
    let long_name = [&5000_u32.to_be_bytes()[..], &[b'a'; 5000], &[0, 0]].concat();
    let cases: [(&[u8], u32); 5] = [
        (&[], ERR_INVALID),
        (&hex("ffffffff 0000"), ERR_TOO_BIG),
        (&hex("00000004 6469736b 0002 0001"), ERR_INVALID),
        (&hex("00000005 6469736b"), ERR_INVALID),
        (&long_name, ERR_TOO_BIG),
    ];
    for (data, code) in cases {
        let mut peer = Peer::haggling();
        peer.send(&[option(GO, data)]);
        assert_eq!(peer.take(), option_reply(GO, code, &[]), "{data:?}");
    }
}

#[test]
fn structured_replies_are_acknowledged_without_data_only_and_offer_df() {
    let mut peer = Peer::haggling();
    peer.send(&[option(STRUCTURED_REPLY, &[7])]);
    assert_eq!(peer.take(), option_reply(STRUCTURED_REPLY, ERR_INVALID, &[]));
    peer.send(&[option(STRUCTURED_REPLY, &[]), option(INFO, &info_request(b"", &[]))]);
    let replies = peer.take();
    assert_eq!(&replies[20..][..20 + 12], option_reply(INFO, REP_INFO, &hex("0000 0000000000400000 01ed")));
}

// "Metadata querying"

#[test]
fn no_metadata_context_is_offered_or_selected() {
    let mut peer = Peer::haggling();
    let base = hex("00000004 6469736b 00000001 0000000f 626173653a616c6c6f636174696f6e");
    for code in [LIST_META_CONTEXT, SET_META_CONTEXT] {
        peer.send(&[option(code, &base)]);
        assert_eq!(peer.take(), option_reply(code, ERR_INVALID, &[]), "structured replies come first");
    }
    peer.send(&[option(STRUCTURED_REPLY, &[])]);
    peer.take();
    let unknown = hex("00000001 41 00000000");
    let torn = hex("00000004 6469736b 00000002 00000001 61");
    let endless = hex("00000004 6469736b ffffffff 00000001 61");
    for code in [LIST_META_CONTEXT, SET_META_CONTEXT] {
        for (data, reply) in [(&base, ACK), (&unknown, ERR_UNKNOWN), (&torn, ERR_INVALID), (&endless, ERR_INVALID)] {
            peer.send(&[option(code, data)]);
            assert_eq!(peer.take(), option_reply(code, reply, &[]));
        }
    }
}

#[test]
fn block_status_without_a_context_is_invalid() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(0, 7, 1, 0, 4096)]);
    assert_eq!(peer.take_error_chunk(1), 22);
}

// "Request types"

#[test]
fn a_read_is_answered_simply_when_nothing_else_was_negotiated() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 0xc0ffee, 512, 1024)]);
    let asked = peer.poll();
    assert_eq!(asked.operation, Operation::Read { offset: 512, length: 1024 });
    peer.complete(asked.id, Ok(vec![7; 1024]));
    let mut expected = hex("67446698 00000000 0000000000c0ffee");
    expected.resize(16 + 1024, 7);
    assert_eq!(peer.take(), expected);
}

#[test]
fn a_failed_simple_read_has_no_payload() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 1, 0, 3 << 20)]);
    let parts: Vec<RequestId> = (0..3).map(|_| peer.poll().id).collect();
    peer.complete(parts[0], Ok(vec![0; 1 << 20]));
    peer.complete(parts[2], Err(Error::Corrupt));
    assert_eq!(peer.take(), [], "not before every part is done");
    peer.complete(parts[1], Ok(vec![0; 1 << 20]));
    assert_eq!(peer.take(), hex("67446698 00000005 0000000000000001"));
}

#[test]
fn a_long_simple_read_is_one_reply_in_order() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 9, 1 << 20, (2 << 20) + 512)]);
    let parts: Vec<_> = (0..3).map(|_| peer.poll()).collect();
    assert_eq!(parts[2].operation, Operation::Read { offset: 3 << 20, length: 512 });
    for number in [2, 0, 1] {
        let length = if number == 2 { 512 } else { 1 << 20 };
        peer.complete(parts[number].id, Ok(vec![number as u8 + 1; length]));
    }
    let sent = peer.take();
    assert_eq!(sent.len(), 16 + (2 << 20) + 512);
    assert_eq!((sent[16], sent[16 + (1 << 20)], sent[16 + (2 << 20)]), (1, 2, 3));
}

#[test]
fn a_structured_read_sends_a_chunk_per_part_and_the_last_is_final() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(0, READ, 9, 1 << 20, 2 << 20)]);
    let parts: Vec<_> = (0..2).map(|_| peer.poll().id).collect();
    peer.complete(parts[1], Ok(vec![2; 1 << 20]));
    let sent = peer.take();
    assert_eq!(&sent[..28], hex("668e33ef 0000 0001 0000000000000009 00100008 0000000000200000"));
    assert_eq!(sent.len(), 28 + (1 << 20));
    peer.complete(parts[0], Ok(vec![1; 1 << 20]));
    let sent = peer.take();
    assert_eq!(&sent[..28], hex("668e33ef 0001 0001 0000000000000009 00100008 0000000000100000"));
}

#[test]
fn a_structured_read_that_failed_in_part_ends_with_an_error() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(0, READ, 9, 0, 2 << 20)]);
    let parts: Vec<_> = (0..2).map(|_| peer.poll().id).collect();
    peer.complete(parts[0], Err(Error::Corrupt));
    peer.complete(parts[1], Ok(vec![1; 1 << 20]));
    let sent = peer.take();
    assert_eq!(&sent[..8], hex("668e33ef 0000 0001"), "the good part is not final");
    assert_eq!(&sent[28 + (1 << 20)..][..24], hex("668e33ef 0001 8001 0000000000000009 00000033 00000005"));
}

#[test]
fn an_unfragmented_read_is_one_chunk_whatever_its_length() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(DF, READ, 9, 4096, 2 << 20)]);
    let parts: Vec<_> = (0..2).map(|_| peer.poll().id).collect();
    peer.complete(parts[1], Ok(vec![2; 1 << 20]));
    assert_eq!(peer.take(), []);
    peer.complete(parts[0], Ok(vec![1; 1 << 20]));
    let sent = peer.take();
    assert_eq!(&sent[..28], hex("668e33ef 0001 0001 0000000000000009 00200008 0000000000001000"));
    assert_eq!((sent.len(), sent[28], sent[28 + (1 << 20)]), (28 + (2 << 20), 1, 2));
}

#[test]
fn a_write_is_answered_after_it_is_done() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, WRITE, 5, 4096, 512), vec![3; 511]]);
    assert_eq!(peer.session.poll_request(), None, "the payload is not complete");
    peer.send(&[vec![3]]);
    let asked = peer.poll();
    assert_eq!(asked.operation, Operation::Write { offset: 4096, data: Bytes::from(vec![3; 512]) });
    assert_eq!(peer.take(), []);
    peer.complete(asked.id, Ok(vec![]));
    assert_eq!(peer.take(), hex("67446698 00000000 0000000000000005"));
}

#[test]
fn a_long_write_is_split_and_answered_once_also_when_parts_overtake_the_payload() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(0, WRITE, 5, 0, 2 << 20), vec![1; 1 << 20]]);
    let first = peer.poll();
    peer.complete(first.id, Ok(vec![]));
    assert_eq!(peer.take(), [], "half of it is still to come");
    peer.send(&[vec![2; 1 << 20]]);
    let second = peer.poll();
    assert_eq!(second.operation, Operation::Write { offset: 1 << 20, data: Bytes::from(vec![2; 1 << 20]) });
    peer.complete(second.id, Ok(vec![]));
    assert_eq!(peer.take(), hex("668e33ef 0001 0000 0000000000000005 00000000"));
}

#[test]
fn fua_is_valid_with_every_command() {
    let mut peer = Peer::transmitting(true);
    peer.send(&[request(FUA, WRITE, 1, 0, 512), vec![0; 512]]);
    for command in [READ, TRIM, WRITE_ZEROES] {
        peer.send(&[request(FUA, command, 1, 0, 512)]);
    }
    peer.send(&[request(FUA, FLUSH, 1, 0, 0)]);
    assert_eq!(std::iter::from_fn(|| peer.session.poll_request()).count(), 5);
}

#[test]
fn flush_is_asked_of_the_volume_and_has_no_range() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, FLUSH, 1, 0, 0)]);
    let asked = peer.poll();
    assert_eq!(asked.operation, Operation::Flush);
    peer.complete(asked.id, Err(Error::Fenced));
    assert_eq!(peer.take(), hex("67446698 00000005 0000000000000001"));
    peer.send(&[request(0, FLUSH, 2, 0, 512)]);
    assert_eq!(peer.take(), hex("67446698 00000016 0000000000000002"));
}

#[test]
fn trim_and_write_zeroes_are_split_at_what_the_volume_takes() {
    let mut peer = Peer::transmitting_with(64 << 30, false);
    peer.send(&[request(0, TRIM, 1, 4096, 512)]);
    assert_eq!(peer.poll().operation, Operation::Discard { offset: 4096, length: 512 });
    peer.send(&[request(NO_HOLE, WRITE_ZEROES, 2, 0, u32::MAX - 511)]);
    let parts: Vec<_> = std::iter::from_fn(|| peer.session.poll_request()).collect();
    assert_eq!(parts.len(), 64);
    assert_eq!(parts[0].operation, Operation::WriteZeroes { offset: 0, length: 64 << 20 });
    assert_eq!(parts[63].operation, Operation::WriteZeroes { offset: 63 * (64 << 20), length: (64 << 20) - 512 });
    for part in parts {
        assert_eq!(peer.take(), []);
        peer.complete(part.id, Ok(vec![]));
    }
    assert_eq!(peer.take(), hex("67446698 00000000 0000000000000002"));
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_a_refused_write_takes_its_payload_along() {
    let mut peer = Peer::transmitting(true);
    for (flags, command) in
        [(0, 5), (0, 8), (0, 999), (NO_HOLE, READ), (FAST_ZERO, WRITE_ZEROES), (DF, TRIM), (1 << 15, FLUSH)]
    {
        let length = if command == FLUSH { 0 } else { 512 };
        peer.send(&[request(flags, command, 3, 0, length)]);
        assert_eq!(peer.take_error_chunk(3), 22, "command {command} with flags {flags}");
    }
    peer.send(&[request(DF, WRITE, 4, 0, 1 << 20), vec![0x25; 1 << 20]]);
    assert_eq!(peer.take_error_chunk(4), 22);
    let mut simple = Peer::transmitting(false);
    simple.send(&[request(DF, READ, 3, 0, 512)]);
    assert_eq!(simple.take(), hex("67446698 00000016 0000000000000003"), "DF is not offered without structure");
}

#[test]
fn disconnect_has_no_reply_and_what_is_outstanding_is_served() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 1, 0, 512), request(0, DISC, 0, 0, 0), request(0, READ, 2, 0, 512)]);
    let asked = peer.poll();
    assert_eq!(peer.session.poll_request(), None, "nothing is taken after the goodbye");
    assert!(!peer.session.wants_input());
    assert_eq!(peer.session.end(), None);
    peer.complete(asked.id, Ok(vec![0; 512]));
    assert_eq!(peer.take().len(), 16 + 512);
    assert_eq!(peer.session.end(), Some(End::Disconnected));
}

#[test]
fn an_end_of_input_drops_the_unfinished_write_and_serves_the_rest() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 1, 0, 512), request(0, WRITE, 2, 0, 2 << 20), vec![0; (1 << 20) + 5]]);
    let (read, part) = (peer.poll(), peer.poll());
    peer.session.on_end_of_input();
    peer.complete(part.id, Ok(vec![]));
    assert_eq!(peer.session.end(), None);
    peer.complete(read.id, Ok(vec![0; 512]));
    assert_eq!(peer.take().len(), 16 + 512, "the write has no answer");
    assert_eq!(peer.session.end(), Some(End::Closed));
}

#[test]
fn a_request_without_its_magic_ends_the_connection() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 1, 0, 512)]);
    let asked = peer.poll();
    peer.send(&[vec![0; 28]]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::RequestMagic)));
    peer.complete(asked.id, Ok(vec![0; 512]));
    assert_eq!(peer.take(), [], "a late completion is taken and forgotten");
}

// "Size constraints"

#[test]
fn what_is_not_aligned_or_beyond_the_end_is_refused_with_its_number() {
    let end = EXPORT_BYTES;
    let (invalid, no_space) = (22, 28);
    let cases = [
        (READ, 1, 512, invalid),
        (READ, 0, 100, invalid),
        (READ, 0, 0, invalid),
        (READ, end, 512, invalid),
        (READ, end - 512, 1024, invalid),
        (READ, u64::MAX - 511, 512, invalid),
        (WRITE, 1, 512, invalid),
        (WRITE, end - 512, 1024, no_space),
        (WRITE, u64::MAX - 511, 512, no_space),
        (WRITE, 0, 0, invalid),
        (WRITE_ZEROES, end, 512, no_space),
        (TRIM, end, 512, invalid),
        (TRIM, 7, 512, invalid),
    ];
    for (command, offset, length, errno) in cases {
        let mut peer = Peer::transmitting(true);
        let payload = if command == WRITE { length as usize } else { 0 };
        peer.send(&[request(0, command, 8, offset, length), vec![0; payload]]);
        assert_eq!(peer.take_error_chunk(8), errno, "command {command} at {offset}, {length} bytes");
        assert_eq!(peer.session.poll_request(), None);
    }
}

#[test]
fn payloads_up_to_32_mib_are_served_whatever_is_advertised() {
    let mut peer = Peer::transmitting_with(1 << 30, false);
    peer.send(&[request(0, READ, 1, 0, PAYLOAD_BYTES_MAX)]);
    assert_eq!(std::iter::from_fn(|| peer.session.poll_request()).count(), 32);
    peer.send(&[request(0, READ, 2, 0, PAYLOAD_BYTES_MAX + 512)]);
    assert_eq!(peer.take(), hex("67446698 00000016 0000000000000002"));
    peer.send(&[request(0, WRITE, 3, 0, PAYLOAD_BYTES_MAX + 512)]);
    assert_eq!(peer.session.end(), Some(End::Violation(Violation::WriteTooLong(PAYLOAD_BYTES_MAX + 512))));
}

// "Error values"

#[test]
fn every_failure_of_the_volume_has_a_number_of_the_protocol() {
    let cases = [
        (Error::OutOfRange, 28),
        (Error::Misaligned, 22),
        (Error::TooLarge, 22),
        (Error::NoSpace, 28),
        (Error::Fenced, 5),
        (Error::Corrupt, 5),
        (Error::Unavailable, 5),
    ];
    let mut peer = Peer::transmitting(true);
    for (error, errno) in cases {
        peer.send(&[request(0, WRITE_ZEROES, 8, 0, 512)]);
        let asked = peer.poll();
        peer.complete(asked.id, Err(error));
        assert_eq!(peer.take_error_chunk(8), errno, "{error}");
    }
}

#[test]
fn a_read_of_the_wrong_length_fails_and_keeps_the_stream_intact() {
    let mut peer = Peer::transmitting(false);
    peer.send(&[request(0, READ, 1, 0, 512)]);
    let asked = peer.poll();
    peer.complete(asked.id, Ok(vec![0; 100]));
    assert_eq!(peer.take(), hex("67446698 00000005 0000000000000001"));
}

// Limits of our own.

#[test]
fn a_client_that_asks_and_asks_is_read_no_further() {
    let mut peer = Peer::transmitting(false);
    for cookie in 0..2 * REQUESTS_MAX as u64 {
        peer.send(&[request(0, TRIM, cookie, 0, 512)]);
    }
    let asked: Vec<_> = std::iter::from_fn(|| peer.session.poll_request()).collect();
    assert_eq!(asked.len(), REQUESTS_MAX);
    assert!(!peer.session.wants_input());
    peer.complete(asked[0].id, Ok(vec![]));
    assert_eq!(peer.poll().operation, asked[0].operation, "what was read already goes on by itself");
}

#[test]
fn a_client_that_does_not_take_its_replies_is_read_no_further() {
    let mut peer = Peer::transmitting(false);
    let mut held = 0;
    while peer.session.wants_input() {
        peer.send(&[request(0, READ, 1, 0, 4 << 20)]);
        while let Some(asked) = peer.session.poll_request() {
            held += 1 << 20;
            peer.session.on_completion(Completion { id: asked.id, result: Ok(Bytes::from(vec![0; 1 << 20])) });
        }
    }
    assert!(held <= BYTES_MAX + (4 << 20), "{held}");
    peer.take();
    assert!(peer.session.wants_input());
}
