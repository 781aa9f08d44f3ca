use proptest::prelude::*;

use super::*;
use crate::wire::{DecodeError, Encoded};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn group(volume: u128, shard: u16) -> GroupId {
    let mut bytes = [0; GroupId::BYTES];
    bytes[..16].copy_from_slice(&volume.to_be_bytes());
    bytes[16..].copy_from_slice(&shard.to_be_bytes());
    GroupId::from_bytes(bytes).expect("the volume is not zero")
}

fn replica(value: u128) -> ReplicaId {
    ReplicaId::from_bytes(value.to_be_bytes()).expect("not zero")
}

#[track_caller]
fn golden(message: PeerMessage, kind: u16, meta: &str, payload: &[u8]) {
    let encoded = message.encode();
    assert_eq!((encoded.kind, hex(&encoded.meta).as_str(), &encoded.payload[..]), (kind, meta, payload));
    assert_eq!(PeerMessage::decode(encoded.kind, encoded.meta, encoded.payload), Ok(message));
}

#[test]
fn peer_messages_have_these_bytes() {
    let heartbeat = PeerMessage::Heartbeat { sequence: 0x0102, boot: 3, disk_stalled: true };
    golden(heartbeat, 0x0301, "0201000000000000030000000000000001", b"");
    let reply =
        PeerMessage::HeartbeatReply { sequence: 0x0102, boot: 3, support: SupportEpoch { boot: 4, count: 0x0506 } };
    golden(reply, 0x0302, "0201000000000000030000000000000004000000000000000605000000000000", b"");
    let address = format!("{:032x}0102{:032x}{:032x}", 0xaau8, 0xbbu8, 0xccu8);
    let (meta, payload) = (Bytes::from_static(b"\x01\x02"), Bytes::from_static(b"entries"));
    let (group, from, to) = (group(0xaa, 0x0102), replica(0xbb), replica(0xcc));
    let raft = PeerMessage::Raft { group, from, to, meta: meta.clone(), payload: payload.clone() };
    golden(raft, 0x0303, &format!("{address}0102"), b"entries");
    golden(PeerMessage::Control { body: Bytes::from_static(b"intent") }, 0x0304, "", b"intent");
    golden(PeerMessage::Delta { group, from, to, meta, payload }, 0x0305, &format!("{address}0102"), b"entries");
    let slot = "0504030201000000";
    let request = PeerMessage::RepairRequest { group, from, to, slot: 0x01_0203_0405 };
    golden(request, 0x0306, &format!("{address}{slot}"), b"");
    let reply = |copy| PeerMessage::RepairReply { group, from, to, slot: 0x01_0203_0405, copy };
    golden(reply(None), 0x0307, &format!("{address}{slot}00"), b"");
    let copy = SlotCopy { index: 7, present: 0x8003, bad: 0x0012, data: Bytes::from(vec![5; 2 * 4096]) };
    golden(reply(Some(copy)), 0x0307, &format!("{address}{slot}01070000000000000003801200"), &[5; 2 * 4096]);
}

#[test]
fn what_follows_the_address_is_shared_and_not_copied() {
    let (meta, payload) = (Bytes::from(vec![1; 64]), Bytes::from(vec![2; 4096]));
    let data = payload.as_ptr();
    let message = PeerMessage::Raft { group: group(1, 0), from: replica(2), to: replica(3), meta, payload };
    let encoded = message.encode();
    assert_eq!(encoded.payload.as_ptr(), data);
    let inner = encoded.meta[50..].as_ptr();
    let Ok(PeerMessage::Raft { meta, payload, .. }) = PeerMessage::decode(encoded.kind, encoded.meta, encoded.payload)
    else {
        panic!("a Raft message comes back as one")
    };
    assert_eq!((meta.as_ptr(), payload.as_ptr()), (inner, data));
}

#[test]
fn every_refusal_names_what_was_wrong() {
    let decode = |kind, meta: &[u8], payload: &'static [u8]| {
        PeerMessage::decode(kind, Bytes::copy_from_slice(meta), Bytes::from_static(payload))
    };
    assert_eq!(decode(0x0308, b"", b""), Err(DecodeError::UnknownKind { kind: 0x0308 }));
    assert_eq!(
        decode(kind::HEARTBEAT, &[0; 16], b""),
        Err(DecodeError::Short { message: "Heartbeat", field: "disk_stalled", missing: 1 })
    );
    assert_eq!(
        decode(kind::HEARTBEAT, &[2; 17], b""),
        Err(DecodeError::Value { message: "Heartbeat", field: "disk_stalled", value: 2 })
    );
    assert_eq!(
        decode(kind::HEARTBEAT_REPLY, &[0; 33], b""),
        Err(DecodeError::Trailing { message: "HeartbeatReply", extra: 1 })
    );
    assert_eq!(
        decode(kind::HEARTBEAT, &[0; 17], b"x"),
        Err(DecodeError::UnexpectedPayload { message: "Heartbeat", length: 1 })
    );
    assert_eq!(decode(kind::RAFT, &[0; 50], b""), Err(DecodeError::ZeroId { message: "Raft", field: "group" }));
    assert_eq!(decode(kind::CONTROL, &[0], b"x"), Err(DecodeError::Trailing { message: "Control", extra: 1 }));
    let mut no_receiver = [1; 50];
    no_receiver[34..].fill(0);
    assert_eq!(decode(kind::DELTA, &no_receiver, b""), Err(DecodeError::ZeroId { message: "Delta", field: "to" }));
    let beyond = [&[1; 50][..], &(1u64 << 36).to_le_bytes()].concat();
    assert_eq!(
        decode(kind::REPAIR_REQUEST, &beyond, b""),
        Err(DecodeError::Value { message: "RepairRequest", field: "slot", value: 1 << 36 })
    );
    let one_block = [&[1; 50][..], &[0; 8], &[1], &[0; 8], &[1, 0], &[0, 0]].concat();
    assert_eq!(
        decode(kind::REPAIR_REPLY, &one_block, b"short"),
        Err(DecodeError::Value { message: "RepairReply", field: "present", value: 1 })
    );
}

fn any_bytes() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
}

fn any_message() -> impl Strategy<Value = PeerMessage> {
    let address = || {
        (1..=u128::MAX, any::<u16>(), 1..=u128::MAX, 1..=u128::MAX)
            .prop_map(|(volume, shard, from, to)| (group(volume, shard), replica(from), replica(to)))
    };
    prop_oneof![
        any::<(u64, u64, bool)>().prop_map(|(sequence, boot, disk_stalled)| PeerMessage::Heartbeat {
            sequence,
            boot,
            disk_stalled
        }),
        any::<(u64, u64, u64, u64)>().prop_map(|(sequence, boot, supporter, count)| PeerMessage::HeartbeatReply {
            sequence,
            boot,
            support: SupportEpoch { boot: supporter, count }
        }),
        (address(), any_bytes(), any_bytes()).prop_map(|((group, from, to), meta, payload)| PeerMessage::Raft {
            group,
            from,
            to,
            meta,
            payload
        }),
        any_bytes().prop_map(|body| PeerMessage::Control { body }),
        (address(), any_bytes(), any_bytes()).prop_map(|((group, from, to), meta, payload)| PeerMessage::Delta {
            group,
            from,
            to,
            meta,
            payload
        }),
        (address(), 0u64..1 << 36).prop_map(|((group, from, to), slot)| PeerMessage::RepairRequest {
            group,
            from,
            to,
            slot
        }),
        (address(), 0u64..1 << 36, any::<Option<(u64, u16, u16)>>()).prop_map(|((group, from, to), slot, copy)| {
            let copy = copy.map(|(index, present, bad)| SlotCopy {
                index,
                present,
                bad,
                data: vec![6; (present & !bad).count_ones() as usize * 4096].into(),
            });
            PeerMessage::RepairReply { group, from, to, slot, copy }
        }),
    ]
}

proptest! {
    #[test]
    fn any_message_comes_back(message in any_message()) {
        let encoded = message.encode();
        prop_assert_eq!(PeerMessage::decode(encoded.kind, encoded.meta, encoded.payload), Ok(message));
    }

    /// Whatever is accepted is the one encoding of its message.
    #[test]
    fn any_bytes_are_refused_or_canonical(kind in 0x02ffu16..=0x0309, meta in any_bytes(), payload in any_bytes()) {
        if let Ok(message) = PeerMessage::decode(kind, meta.clone(), payload.clone()) {
            prop_assert_eq!(message.encode(), Encoded { kind, meta, payload });
        }
    }
}
