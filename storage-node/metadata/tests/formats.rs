//! The encodings as they stand in logs, checkpoints and messages. These bytes are kept for ever: a test that fails here
//! asks for a new version, not for new expectations.

use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{Founder, Member};
use holdfast_metadata::command::{
    COMMAND_BYTES_MAX, CreateVolume, DecodeError, DeleteVolume, ReplaceReplica, SetVolumeReplicas,
};
use holdfast_metadata::intent::{
    Action, Control, CreateReplica, INTENT_BYTES_MAX, Intent, IntentError, IntentReply, IntentResult,
};
use holdfast_metadata::spec::{Labels, Name, Spread, VolumeSpec};
use holdfast_metadata::state::{STATE_BYTES_MAX, StateError};
use holdfast_metadata::{Catalogue, Command};

fn node() -> NodeId {
    NodeId::from_bytes([0x11; 16]).expect("not zero")
}

fn disk() -> DiskId {
    DiskId::from_bytes([0x22; 16]).expect("not zero")
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([0x33; 16]).expect("not zero")
}

fn replica() -> ReplicaId {
    ReplicaId::from_bytes([0x44; 16]).expect("not zero")
}

fn catalogue() -> Catalogue {
    let founder = Founder {
        node: node(),
        replica: replica(),
        name: Name::new("n").expect("a name"),
        peer_address: "n:1".into(),
        api_address: "n:2".into(),
        zone: None,
    };
    Catalogue::found(ClusterId::from_bytes([0x55; 16]).expect("not zero"), &[founder]).expect("one founder")
}

fn create_replica() -> Control {
    Control::Intent(Intent {
        node: node(),
        revision: 7,
        generation: 1,
        action: Action::CreateReplica(CreateReplica {
            group: GroupId::first(volume()),
            replica: replica(),
            disk: disk(),
            members: vec![(replica(), node())],
            name: Name::new("v").expect("a name"),
            size_bytes: 1 << 30,
            logical_block_bytes: 512,
        }),
    })
}

#[test]
fn commands_are_these_bytes() {
    let create = Command::CreateVolume(CreateVolume {
        volume: volume(),
        name: Name::new("v").expect("a name"),
        spec: VolumeSpec { size_bytes: 1 << 30, logical_block_bytes: 512, replicas: 1, spread: Spread::Node },
        labels: Labels::new(),
        members: vec![Member { replica: replica(), node: node(), disk: disk() }],
        planned_at: 6,
    });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"create_volume","body":{"volume":"33333333-3333-3333-3333-333333333333","#,
        r#""name":"v","spec":{"size_bytes":1073741824,"logical_block_bytes":512,"replicas":1},"#,
        r#""members":[{"replica":"44444444-4444-4444-4444-444444444444","#,
        r#""node":"11111111-1111-1111-1111-111111111111","disk":"22222222-2222-2222-2222-222222222222"}],"#,
        r#""planned_at":6}}}"#
    );
    assert_eq!(String::from_utf8(create.encode()).expect("text"), bytes);
    assert_eq!(Command::decode(bytes.as_bytes()), Ok(create));
    let labelled = Command::CreateVolume(CreateVolume {
        volume: volume(),
        name: Name::new("v").expect("a name"),
        spec: VolumeSpec { size_bytes: 1 << 30, logical_block_bytes: 512, replicas: 1, spread: Spread::Zone },
        labels: Labels::from([("kubernetes.io/pv".into(), "pvc-1".into())]),
        members: vec![Member { replica: replica(), node: node(), disk: disk() }],
        planned_at: 6,
    });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"create_volume","body":{"volume":"33333333-3333-3333-3333-333333333333","#,
        r#""name":"v","spec":{"size_bytes":1073741824,"logical_block_bytes":512,"replicas":1,"spread":"zone"},"#,
        r#""labels":{"kubernetes.io/pv":"pvc-1"},"#,
        r#""members":[{"replica":"44444444-4444-4444-4444-444444444444","#,
        r#""node":"11111111-1111-1111-1111-111111111111","disk":"22222222-2222-2222-2222-222222222222"}],"#,
        r#""planned_at":6}}}"#
    );
    assert_eq!(String::from_utf8(labelled.encode()).expect("text"), bytes);
    assert_eq!(Command::decode(bytes.as_bytes()), Ok(labelled));
    let replace = Command::ReplaceReplica(ReplaceReplica {
        volume: volume(),
        old: Some(ReplicaId::from_bytes([0x45; 16]).expect("not zero")),
        new: Some(Member { replica: replica(), node: node(), disk: disk() }),
        planned_at: 6,
    });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"replace_replica","body":{"volume":"33333333-3333-3333-3333-333333333333","#,
        r#""old":"45454545-4545-4545-4545-454545454545","#,
        r#""new":{"replica":"44444444-4444-4444-4444-444444444444","#,
        r#""node":"11111111-1111-1111-1111-111111111111","disk":"22222222-2222-2222-2222-222222222222"},"#,
        r#""planned_at":6}}}"#
    );
    assert_eq!(String::from_utf8(replace.encode()).expect("text"), bytes);
    assert_eq!(Command::decode(bytes.as_bytes()), Ok(replace));
    let take_out =
        Command::ReplaceReplica(ReplaceReplica { volume: volume(), old: Some(replica()), new: None, planned_at: 6 });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"replace_replica","body":{"volume":"33333333-3333-3333-3333-333333333333","#,
        r#""old":"44444444-4444-4444-4444-444444444444","planned_at":6}}}"#
    );
    assert_eq!(String::from_utf8(take_out.encode()).expect("text"), bytes);
    assert_eq!(Command::decode(bytes.as_bytes()), Ok(take_out));
    let set =
        Command::SetVolumeReplicas(SetVolumeReplicas { volume: volume(), replicas: 2, expected_generation: None });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"set_volume_replicas","#,
        r#""body":{"volume":"33333333-3333-3333-3333-333333333333","replicas":2,"expected_generation":null}}}"#
    );
    assert_eq!(String::from_utf8(set.encode()).expect("text"), bytes);
    assert_eq!(Command::decode(bytes.as_bytes()), Ok(set));
    let delete = Command::DeleteVolume(DeleteVolume { volume: volume(), expected_generation: Some(3) });
    let bytes = concat!(
        r#"{"version":1,"command":{"kind":"delete_volume","#,
        r#""body":{"volume":"33333333-3333-3333-3333-333333333333","expected_generation":3}}}"#
    );
    assert_eq!(String::from_utf8(delete.encode()).expect("text"), bytes);
    let long = vec![b' '; COMMAND_BYTES_MAX + 1];
    assert_eq!(Command::decode(&long), Err(DecodeError::TooLarge { bytes: COMMAND_BYTES_MAX + 1 }));
}

#[test]
fn states_are_these_bytes_and_hash() {
    let bytes = concat!(
        r#"{"version":1,"catalogue":{"cluster":"55555555-5555-5555-5555-555555555555","applied":0,"forgotten_at":0,"#,
        r#""founding":[{"node":"11111111-1111-1111-1111-111111111111","replica":"44444444-4444-4444-4444-444444444444","#,
        r#""name":"n","peer_address":"n:1","api_address":"n:2","zone":null}],"#,
        r#""metadata":{"members":[{"replica":"44444444-4444-4444-4444-444444444444","#,
        r#""node":"11111111-1111-1111-1111-111111111111","disk":null}],"replacement":null,"generation":1},"#,
        r#""nodes":{"11111111-1111-1111-1111-111111111111":{"name":"n","peer_address":"n:1","api_address":"n:2","#,
        r#""zone":null,"state":"active"}},"disks":{},"volumes":{},"tombstones":{}}}"#
    );
    assert_eq!(String::from_utf8(catalogue().encode_state()).expect("text"), bytes);
    assert_eq!(Catalogue::decode_state(bytes.as_bytes()).expect("its own encoding"), catalogue());
    // FNV-1a of the same bytes, step by step.
    let mut hash = 14695981039346656037u64;
    for byte in bytes.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(1099511628211);
    }
    assert_eq!(catalogue().state_hash(), hash);
}

#[test]
fn states_that_contradict_themselves_are_refused() {
    let good = String::from_utf8(catalogue().encode_state()).expect("text");
    let decode = |from: &str, to: &str| {
        assert!(good.contains(from));
        Catalogue::decode_state(good.replace(from, to).as_bytes()).expect_err("it is not a catalogue")
    };
    assert!(matches!(decode(r#""version":1"#, r#""version":2"#), StateError::UnknownVersion { version: 2 }));
    assert!(matches!(decode(r#""forgotten_at":0"#, r#""forgotten_at":1"#), StateError::Inconsistent { .. }));
    let elsewhere = (r#""nodes":{"11111111-1111"#, r#""nodes":{"11111111-1112"#);
    assert!(matches!(decode(elsewhere.0, elsewhere.1), StateError::Inconsistent { .. }));
    let disk = concat!(
        r#""disks":{"22222222-2222-2222-2222-222222222222":{"node":"11111111-1111-1111-1111-111111111111","#,
        r#""capacity_bytes":1,"free_bytes":2,"state":"active"}}"#
    );
    assert!(matches!(decode(r#""disks":{}"#, disk), StateError::Inconsistent { .. }));
    assert!(matches!(decode(r#""n:1""#, r#""n""#), StateError::Spec(_)));
    assert!(matches!(decode(r#""disks":{}"#, r#""disks":{},"more":1"#), StateError::Malformed { .. }));
    let long = vec![b' '; STATE_BYTES_MAX + 1];
    assert!(matches!(Catalogue::decode_state(&long), Err(StateError::TooLarge { .. })));
}

#[test]
fn control_messages_are_these_bytes() {
    let bytes = concat!(
        r#"{"version":1,"control":{"intent":{"node":"11111111-1111-1111-1111-111111111111","revision":7,"#,
        r#""generation":1,"action":{"create_replica":{"group":"33333333-3333-3333-3333-333333333333/0","#,
        r#""replica":"44444444-4444-4444-4444-444444444444","disk":"22222222-2222-2222-2222-222222222222","#,
        r#""members":[["44444444-4444-4444-4444-444444444444","11111111-1111-1111-1111-111111111111"]],"#,
        r#""name":"v","size_bytes":1073741824,"logical_block_bytes":512}}}}}"#
    );
    assert_eq!(String::from_utf8(create_replica().encode()).expect("text"), bytes);
    let Control::Intent(intent) = create_replica() else { panic!("it is an intent") };
    let under_way = IntentResult::UnderWay { behind: 3 };
    for result in [IntentResult::Done, IntentResult::Stale, IntentResult::NotLeader, under_way] {
        let reply = Control::Reply(IntentReply { generation: 1, action: intent.action.clone(), result });
        assert_eq!(Control::decode(&reply.encode()).expect("its own encoding"), reply);
    }
}

#[test]
fn hostile_control_messages_are_refused() {
    let good = String::from_utf8(create_replica().encode()).expect("text");
    let decode = |from: &str, to: &str| {
        assert!(good.contains(from));
        Control::decode(good.replace(from, to).as_bytes()).expect_err("it is not a control message")
    };
    assert!(matches!(decode(r#""version":1"#, r#""version":2"#), IntentError::UnknownVersion { version: 2 }));
    assert!(matches!(decode(r#"3333/0"#, r#"3333/65536"#), IntentError::Malformed { .. }));
    assert!(matches!(decode(r#"3333/0"#, r#"3333"#), IntentError::Malformed { .. }));
    assert!(matches!(decode("create_replica", "make_coffee"), IntentError::Malformed { .. }));
    // The replica that is to be created is a founder on another node than the addressed one.
    assert!(matches!(decode(r#""node":"11111111-1111"#, r#""node":"11111111-1112"#), IntentError::Members));
    let member = r#"["44444444-4444-4444-4444-444444444444","11111111-1111-1111-1111-111111111111"]"#;
    assert!(matches!(decode(member, &format!("{member},{member}")), IntentError::Members));
    let long = vec![b' '; INTENT_BYTES_MAX + 1];
    assert!(matches!(Control::decode(&long), Err(IntentError::TooLarge { .. })));
}
