use holdfast_block::Error;
use holdfast_consensus::LogIndex;
use proptest::prelude::*;

use super::*;
use crate::wire::{DecodeError, Encoded};

const VOLUME: &str = "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf";
const INSTANCE_7: &str = "07000000000000000000000000000000";

fn volume() -> VolumeId {
    VOLUME.parse().expect("an identifier")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn u64s(values: &[u64]) -> String {
    values.iter().map(|value| hex(&value.to_le_bytes())).collect()
}

fn stamp() -> Stamp {
    Stamp { epoch: Epoch(1), session: Session(2), sequence: 3, oldest: 4 }
}

fn seen() -> Position {
    Position { term: Term(5), index: LogIndex(6) }
}

fn io(operation: Operation) -> Request {
    Request::Io { volume: volume(), stamp: stamp(), seen: seen(), operation }
}

#[track_caller]
fn golden_request(request: Request, kind: u16, meta: &str, payload: &[u8]) {
    let encoded = request.encode();
    assert_eq!((encoded.kind, hex(&encoded.meta).as_str(), &encoded.payload[..]), (kind, meta, payload));
    assert_eq!(Request::decode(encoded.kind, encoded.meta, encoded.payload), Ok(request));
}

#[track_caller]
fn golden_reply(reply: Reply, kind: u16, meta: &str, payload: &[u8]) {
    let encoded = reply.encode();
    assert_eq!((encoded.kind, hex(&encoded.meta).as_str(), &encoded.payload[..]), (kind, meta, payload));
    assert_eq!(Reply::decode(encoded.kind, encoded.meta, encoded.payload), Ok(reply));
}

#[test]
fn requests_have_these_bytes() {
    let (instance, epoch) = (Instance(7), Epoch(0x0102));
    let attach = Request::Attach { volume: volume(), holder: "n-é".into(), instance, take_over: true };
    golden_request(attach, 0x0101, &format!("{VOLUME}{INSTANCE_7}0104006e2dc3a9"), b"");
    let open = Request::OpenSession { volume: volume(), epoch, instance };
    golden_request(open, 0x0102, &format!("{VOLUME}0201000000000000{INSTANCE_7}"), b"");
    golden_request(Request::Detach { volume: volume(), epoch }, 0x0103, &format!("{VOLUME}0201000000000000"), b"");
    for (formatted, code) in [(Formatted::None, "00"), (Formatted::Formatting, "01"), (Formatted::Formatted, "02")] {
        let set = Request::SetFormatted { volume: volume(), epoch, formatted };
        golden_request(set, 0x0104, &format!("{VOLUME}0201000000000000{code}"), b"");
    }
}

#[test]
fn io_requests_have_these_bytes() {
    let head = format!("{VOLUME}{}", u64s(&[1, 2, 3, 4, 5, 6]));
    golden_request(
        io(Operation::Read { offset: 0x1000, length: 0x0200 }),
        0x0111,
        &format!("{head}001000000000000000020000"),
        b"",
    );
    let write = io(Operation::Write { offset: 0x1000, data: Bytes::from_static(b"data") });
    golden_request(write, 0x0112, &format!("{head}0010000000000000"), b"data");
    let zeroes = io(Operation::WriteZeroes { offset: 0x1000, length: 0x0200 });
    golden_request(zeroes, 0x0113, &format!("{head}00100000000000000002000000000000"), b"");
    let discard = io(Operation::Discard { offset: 0x1000, length: 0x0200 });
    golden_request(discard, 0x0114, &format!("{head}00100000000000000002000000000000"), b"");
    golden_request(io(Operation::Flush), 0x0115, &head, b"");
}

#[test]
fn replies_have_these_bytes() {
    let geometry = Geometry::new(0x10_0000, 512).expect("valid");
    let leader = NodeId::from_bytes([0xb0; 16]);
    let node = "b0".repeat(16);
    let attached = Reply::Attached {
        volume: volume(),
        instance: Instance(7),
        epoch: Epoch(1),
        session: Session(2),
        geometry,
        formatted: Formatted::Formatted,
    };
    let geometry_hex = "000010000000000000020000";
    golden_reply(attached, 0x0201, &format!("{VOLUME}{INSTANCE_7}{}{geometry_hex}02", u64s(&[1, 2])), b"");
    let epoch = Epoch(9);
    golden_reply(Reply::Detached { volume: volume(), epoch }, 0x0202, &format!("{VOLUME}{}", u64s(&[9])), b"");
    golden_reply(Reply::FormattedSet { volume: volume(), epoch }, 0x0203, &format!("{VOLUME}{}", u64s(&[9])), b"");
    let not_leader = Reply::NotLeader { volume: volume(), term: Term(8), leader };
    golden_reply(not_leader, 0x0205, &format!("{VOLUME}{}{node}", u64s(&[8])), b"");
    let no_leader = Reply::NotLeader { volume: volume(), term: Term(8), leader: None };
    golden_reply(no_leader, 0x0205, &format!("{VOLUME}{}{}", u64s(&[8]), "00".repeat(16)), b"");
    golden_reply(Reply::Leading { volume: volume(), term: Term(8) }, 0x0206, &format!("{VOLUME}{}", u64s(&[8])), b"");
    let replicas = vec![(NodeId::from_bytes([3; 16]).expect("not zero"), "n:7".to_owned())];
    let told = Reply::Replicas { volume: volume(), term: Term(8), replicas };
    let text = "03006e3a37";
    golden_reply(told, 0x0208, &format!("{VOLUME}{}01{}{text}", u64s(&[8]), "03".repeat(16)), b"");
    golden_reply(Reply::Resized { volume: volume(), geometry }, 0x0207, &format!("{VOLUME}{geometry_hex}"), b"");
}

#[test]
fn refusals_have_these_bytes() {
    let none = "00".repeat(17);
    let refused = |instance, reason| Reply::Refused { volume: volume(), instance, reason };
    golden_reply(refused(None, Refusal::UnknownVolume), 0x0204, &format!("{VOLUME}{none}01"), b"");
    let held = Refusal::Held { holder: "n1".into(), epoch: Epoch(3) };
    let expected = format!("{VOLUME}01{INSTANCE_7}02{}02006e31", u64s(&[3]));
    golden_reply(refused(Some(Instance(7)), held), 0x0204, &expected, b"");
    let stale = Refusal::Stale { epoch: Epoch(3) };
    golden_reply(refused(None, stale), 0x0204, &format!("{VOLUME}{none}03{}", u64s(&[3])), b"");
    let not_allowed = Refusal::NotAllowed { reason: "no".into() };
    golden_reply(refused(None, not_allowed), 0x0204, &format!("{VOLUME}{none}0402006e6f"), b"");
}

#[test]
fn io_replies_have_these_bytes() {
    let head = format!("{VOLUME}{}", u64s(&[2, 3, 5, 6]));
    let done = |result| Reply::Io { volume: volume(), session: Session(2), sequence: 3, seen: seen(), result };
    golden_reply(done(Ok(Bytes::from_static(b"read"))), 0x0211, &format!("{head}00"), b"read");
    let codes = [
        (Error::OutOfRange, "01"),
        (Error::Misaligned, "02"),
        (Error::TooLarge, "03"),
        (Error::NoSpace, "04"),
        (Error::Fenced, "05"),
        (Error::Corrupt, "06"),
        (Error::Unavailable, "07"),
    ];
    for (error, code) in codes {
        golden_reply(done(Err(error)), 0x0211, &format!("{head}{code}"), b"");
    }
}

#[test]
fn data_is_shared_and_not_copied() {
    let data = Bytes::from(vec![7; 4096]);
    let encoded = io(Operation::Write { offset: 0, data: data.clone() }).encode();
    assert_eq!(encoded.payload.as_ptr(), data.as_ptr());
    let Ok(Request::Io { operation: Operation::Write { data: decoded, .. }, .. }) =
        Request::decode(encoded.kind, encoded.meta, encoded.payload)
    else {
        panic!("a write comes back as a write")
    };
    assert_eq!(decoded.as_ptr(), data.as_ptr());
}

#[test]
fn every_refusal_names_what_was_wrong() {
    let Encoded { kind, meta, .. } = Request::Detach { volume: volume(), epoch: Epoch(1) }.encode();
    let decode = |meta: Bytes, payload: &'static [u8]| Request::decode(kind, meta, Bytes::from_static(payload));
    assert_eq!(
        decode(meta.slice(..20), b""),
        Err(DecodeError::Short { message: "Detach", field: "epoch", missing: 4 })
    );
    let longer: Bytes = [&meta[..], &[0]].concat().into();
    assert_eq!(decode(longer, b""), Err(DecodeError::Trailing { message: "Detach", extra: 1 }));
    assert_eq!(decode(meta.clone(), b"xy"), Err(DecodeError::UnexpectedPayload { message: "Detach", length: 2 }));
    let zero: Bytes = [&[0; 16], &meta[16..]].concat().into();
    assert_eq!(decode(zero, b""), Err(DecodeError::ZeroId { message: "Detach", field: "volume" }));
    assert_eq!(Request::decode(0x0105, meta.clone(), Bytes::new()), Err(DecodeError::UnknownKind { kind: 0x0105 }));
    // A reply is no request, nor the other way round.
    assert_eq!(Reply::decode(kind, meta, Bytes::new()), Err(DecodeError::UnknownKind { kind }));
}

#[test]
fn values_without_a_meaning_are_refused() {
    let altered = |encoded: Encoded, at: usize, value: u8| {
        let mut meta = encoded.meta.to_vec();
        meta[at] = value;
        (encoded.kind, Bytes::from(meta), encoded.payload)
    };
    let attach =
        Request::Attach { volume: volume(), holder: "n1".into(), instance: Instance(7), take_over: false }.encode();
    let (kind, meta, payload) = altered(attach.clone(), 32, 2);
    let value = |message, field, value| DecodeError::Value { message, field, value };
    assert_eq!(Request::decode(kind, meta, payload), Err(value("Attach", "take_over", 2)));
    let (kind, meta, payload) = altered(attach.clone(), 34, 0xff);
    assert_eq!(
        Request::decode(kind, meta, payload),
        Err(DecodeError::LongText { message: "Attach", field: "holder", length: 0xff02, max: HOLDER_BYTES_MAX })
    );
    let (kind, meta, payload) = altered(attach, 35, 0xff);
    assert_eq!(Request::decode(kind, meta, payload), Err(DecodeError::NotUtf8 { message: "Attach", field: "holder" }));
    let geometry = Geometry::new(4096, 512).expect("valid");
    let (kind, meta, payload) = altered(Reply::Resized { volume: volume(), geometry }.encode(), 16, 1);
    assert_eq!(Reply::decode(kind, meta, payload), Err(value("Resized", "size_bytes", 4097)));
    let refused = Reply::Refused { volume: volume(), instance: None, reason: Refusal::UnknownVolume }.encode();
    let (kind, meta, payload) = altered(refused, 17, 1);
    assert_eq!(Reply::decode(kind, meta, payload), Err(value("Refused", "instance", 1)));
    let done = Reply::Io { volume: volume(), session: Session(2), sequence: 3, seen: seen(), result: Ok(Bytes::new()) };
    let (kind, meta, payload) = altered(done.encode(), 48, 8);
    assert_eq!(Reply::decode(kind, meta, payload), Err(value("IoDone", "status", 8)));
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let reason = Refusal::NotAllowed { reason: "é".repeat(REASON_BYTES_MAX) };
    let encoded = Reply::Refused { volume: volume(), instance: None, reason }.encode();
    let Ok(Reply::Refused { reason: Refusal::NotAllowed { reason }, .. }) =
        Reply::decode(encoded.kind, encoded.meta, encoded.payload)
    else {
        panic!("a refusal comes back as a refusal")
    };
    assert_eq!(reason, "é".repeat(REASON_BYTES_MAX / 2));
}

fn any_node() -> impl Strategy<Value = NodeId> {
    any::<u128>().prop_filter_map("not zero", |id| NodeId::from_bytes(id.to_be_bytes()))
}

fn any_volume() -> impl Strategy<Value = VolumeId> {
    (1..=u128::MAX).prop_map(|value| VolumeId::from_bytes(value.to_be_bytes()).expect("not zero"))
}

fn any_position() -> impl Strategy<Value = Position> {
    any::<(u64, u64)>().prop_map(|(term, index)| Position { term: Term(term), index: LogIndex(index) })
}

fn any_data() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
}

fn any_text() -> impl Strategy<Value = String> {
    proptest::collection::vec(any::<char>(), 0..60).prop_map(|characters| characters.into_iter().collect())
}

fn any_formatted() -> impl Strategy<Value = Formatted> {
    prop_oneof![Just(Formatted::None), Just(Formatted::Formatting), Just(Formatted::Formatted)]
}

fn any_geometry() -> impl Strategy<Value = Geometry> {
    (1..=(holdfast_block::VOLUME_BYTES_MAX / 4096), prop_oneof![Just(512), Just(4096)])
        .prop_map(|(blocks, logical)| Geometry::new(blocks * 4096, logical).expect("within bounds"))
}

fn any_operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        any::<(u64, u32)>().prop_map(|(offset, length)| Operation::Read { offset, length }),
        (any::<u64>(), any_data()).prop_map(|(offset, data)| Operation::Write { offset, data }),
        any::<(u64, u64)>().prop_map(|(offset, length)| Operation::WriteZeroes { offset, length }),
        any::<(u64, u64)>().prop_map(|(offset, length)| Operation::Discard { offset, length }),
        Just(Operation::Flush),
    ]
}

fn any_request() -> impl Strategy<Value = Request> {
    let stamp = any::<(u64, u64, u64, u64)>().prop_map(|(epoch, session, sequence, oldest)| Stamp {
        epoch: Epoch(epoch),
        session: Session(session),
        sequence,
        oldest,
    });
    prop_oneof![
        (any_volume(), any_text(), any::<u128>(), any::<bool>()).prop_map(|(volume, holder, instance, take_over)| {
            Request::Attach { volume, holder, instance: Instance(instance), take_over }
        }),
        (any_volume(), any::<u64>(), any::<u128>()).prop_map(|(volume, epoch, instance)| Request::OpenSession {
            volume,
            epoch: Epoch(epoch),
            instance: Instance(instance)
        }),
        (any_volume(), any::<u64>()).prop_map(|(volume, epoch)| Request::Detach { volume, epoch: Epoch(epoch) }),
        (any_volume(), any::<u64>(), any_formatted()).prop_map(|(volume, epoch, formatted)| Request::SetFormatted {
            volume,
            epoch: Epoch(epoch),
            formatted
        }),
        (any_volume(), stamp, any_position(), any_operation())
            .prop_map(|(volume, stamp, seen, operation)| Request::Io { volume, stamp, seen, operation }),
    ]
}

fn any_refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        Just(Refusal::UnknownVolume),
        (any_text(), any::<u64>()).prop_map(|(holder, epoch)| Refusal::Held { holder, epoch: Epoch(epoch) }),
        any::<u64>().prop_map(|epoch| Refusal::Stale { epoch: Epoch(epoch) }),
        any_text().prop_map(|reason| Refusal::NotAllowed { reason }),
    ]
}

fn any_reply() -> impl Strategy<Value = Reply> {
    let result = prop_oneof![
        any_data().prop_map(Ok),
        prop_oneof![
            Just(Error::OutOfRange),
            Just(Error::Misaligned),
            Just(Error::TooLarge),
            Just(Error::NoSpace),
            Just(Error::Fenced),
            Just(Error::Corrupt),
            Just(Error::Unavailable),
        ]
        .prop_map(Err),
    ];
    prop_oneof![
        (any_volume(), any::<(u128, u64, u64)>(), any_geometry(), any_formatted()).prop_map(
            |(volume, (instance, epoch, session), geometry, formatted)| Reply::Attached {
                volume,
                instance: Instance(instance),
                epoch: Epoch(epoch),
                session: Session(session),
                geometry,
                formatted
            }
        ),
        (any_volume(), any::<u64>()).prop_map(|(volume, epoch)| Reply::Detached { volume, epoch: Epoch(epoch) }),
        (any_volume(), any::<u64>()).prop_map(|(volume, epoch)| Reply::FormattedSet { volume, epoch: Epoch(epoch) }),
        (any_volume(), any::<Option<u128>>(), any_refusal()).prop_map(|(volume, instance, reason)| Reply::Refused {
            volume,
            instance: instance.map(Instance),
            reason
        }),
        (any_volume(), any::<u64>(), any::<u128>()).prop_map(|(volume, term, leader)| Reply::NotLeader {
            volume,
            term: Term(term),
            leader: NodeId::from_bytes(leader.to_be_bytes())
        }),
        (any_volume(), any::<u64>()).prop_map(|(volume, term)| Reply::Leading { volume, term: Term(term) }),
        (any_volume(), any::<u64>(), proptest::collection::vec((any_node(), "[a-z]{1,9}:[0-9]{1,5}"), 1..=32))
            .prop_map(|(volume, term, replicas)| Reply::Replicas { volume, term: Term(term), replicas }),
        (any_volume(), any_geometry()).prop_map(|(volume, geometry)| Reply::Resized { volume, geometry }),
        (any_volume(), any::<(u64, u64)>(), any_position(), result).prop_map(
            |(volume, (session, sequence), seen, result)| Reply::Io {
                volume,
                session: Session(session),
                sequence,
                seen,
                result
            }
        ),
    ]
}

const KINDS: std::ops::RangeInclusive<u16> = 0x0100..=0x0218;

proptest! {
    #[test]
    fn any_request_comes_back(request in any_request()) {
        let encoded = request.encode();
        prop_assert_eq!(Request::decode(encoded.kind, encoded.meta, encoded.payload), Ok(request));
    }

    #[test]
    fn any_reply_comes_back(reply in any_reply()) {
        let encoded = reply.encode();
        prop_assert_eq!(Reply::decode(encoded.kind, encoded.meta, encoded.payload), Ok(reply));
    }

    /// Whatever is accepted is the one encoding of its message.
    #[test]
    fn any_bytes_are_refused_or_canonical(kind in KINDS, meta in proptest::collection::vec(any::<u8>(), 0..128),
        payload in any_data())
    {
        let (meta, parts) = (Bytes::from(meta.clone()), (kind, Bytes::from(meta), payload.clone()));
        if let Ok(request) = Request::decode(kind, meta.clone(), payload.clone()) {
            let encoded = request.encode();
            prop_assert_eq!((encoded.kind, encoded.meta, encoded.payload), parts.clone());
        }
        if let Ok(reply) = Reply::decode(kind, meta, payload) {
            let encoded = reply.encode();
            prop_assert_eq!((encoded.kind, encoded.meta, encoded.payload), parts);
        }
    }

    /// Small damage to real messages reaches deeper than noise does.
    #[test]
    fn altered_messages_are_refused_or_canonical(request in any_request(), reply in any_reply(), at: usize, bits: u8,
        cut in proptest::option::of(0usize..100))
    {
        let damage = |meta: &Bytes| {
            let mut meta = meta.to_vec();
            let at = at % meta.len();
            meta[at] ^= bits;
            meta.truncate(cut.unwrap_or(usize::MAX));
            Bytes::from(meta)
        };
        let Encoded { kind, meta, payload } = request.encode();
        let meta = damage(&meta);
        if let Ok(request) = Request::decode(kind, meta.clone(), payload.clone()) {
            prop_assert_eq!(request.encode(), Encoded { kind, meta, payload });
        }
        let Encoded { kind, meta, payload } = reply.encode();
        let meta = damage(&meta);
        if let Ok(reply) = Reply::decode(kind, meta.clone(), payload.clone()) {
            prop_assert_eq!(reply.encode(), Encoded { kind, meta, payload });
        }
    }

    #[test]
    fn every_shorter_meta_is_refused(request in any_request()) {
        let Encoded { kind, meta, payload } = request.encode();
        for length in 0..meta.len() {
            let refused = Request::decode(kind, meta.slice(..length), payload.clone());
            prop_assert!(matches!(refused, Err(DecodeError::Short { .. })), "{length}: {refused:?}");
        }
    }
}
