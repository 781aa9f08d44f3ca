//! The encodings of commands and states: golden files, round trips, hostile bytes.
//!
//! Golden files are never changed: logs and checkpoints written by any release must stay readable. A new version of
//! a kind gets new files.

#![allow(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::path::Path;

use bytes::Bytes;
use holdfast_block::Geometry;
use holdfast_id::{SnapshotId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Session, Stamp};
use holdfast_volume::command::{HEADER_BYTES_MAX, WRITE_BLOCKS_MAX, ZERO_BLOCKS_MAX};
use holdfast_volume::name::NAME_BYTES_MAX;
use holdfast_volume::volume::{FORMER_INSTANCES_MAX, SNAPSHOTS_MAX, STATE_BYTES_MAX};
use holdfast_volume::{Command, Name, Outcome, Volume, VolumeSpec};
use proptest::prelude::*;

const STAMP: Stamp = Stamp {
    epoch: Epoch(0x0102_0304_0506_0708),
    session: Session(0x1112_1314_1516_1718),
    sequence: 0x2122_2324_2526_2728,
    oldest: 0x2122_2324_2526_2720,
};
const INSTANCE: Instance = Instance(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f);

/// The golden bytes of this name; written where the file is missing and `REWRITE` is set.
fn golden(name: &str, actual: &[u8]) -> Vec<u8> {
    let path = Path::new("tests/testdata/golden").join(format!("{name}.hex"));
    if !path.exists() && std::env::var_os("REWRITE").is_some() {
        let lines: Vec<String> = actual
            .chunks(16)
            .map(|line| line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "))
            .collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn check_command(name: &str, command: &Command) {
    let encoded = command.encode();
    let golden = golden(name, &encoded);
    assert_eq!(encoded, golden, "{name}");
    assert_eq!(Command::decode(&golden).as_ref(), Ok(command), "{name}");
}

#[test]
fn commands_match_their_golden_files() {
    let checksums = [0xaabb_ccdd, 1].into();
    check_command("write-1", &Command::Write { stamp: STAMP, first_block: 0x3132_3334, checksums });
    let zero = |discard, head, tail| Command::Zero { stamp: STAMP, first_block: 7, count: 16384, discard, head, tail };
    check_command("zero-1", &zero(false, None, None));
    check_command("zero-1-discard-edges", &zero(true, Some(0xdead_beef), Some(0)));
    let holder = Name::new("node-a").unwrap();
    check_command("attach-1", &Command::Attach { holder: holder.clone(), instance: INSTANCE, take_over: false });
    check_command("attach-1-take-over", &Command::Attach { holder, instance: INSTANCE, take_over: true });
    check_command("open-session-1", &Command::OpenSession { epoch: Epoch(3), instance: INSTANCE });
    check_command("detach-1", &Command::Detach { epoch: Epoch(3) });
    check_command("resize-1", &Command::Resize { size_bytes: 1 << 40 });
    let (snapshot, name) = (snapshot_id(7), Name::new("before-upgrade").unwrap());
    check_command("take-snapshot-1", &Command::TakeSnapshot { snapshot, name });
    check_command("delete-snapshot-1", &Command::DeleteSnapshot { snapshot });
    check_command("set-formatted-1", &Command::SetFormatted { epoch: Epoch(3), formatted: Formatted::Formatting });
}

fn snapshot_id(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16]).unwrap()
}

/// With so many snapshots of names that long.
fn take_snapshots(volume: &mut Volume, count: usize, name_bytes: usize) {
    for number in 0..count {
        let name = Name::new(format!("{number:0name_bytes$}")).unwrap();
        let take = Command::TakeSnapshot { snapshot: snapshot_id(number as u8 + 1), name };
        assert!(matches!(apply(volume, &take, 0), Outcome::SnapshotTaken { .. }));
    }
}

fn new_volume(name: &str) -> Volume {
    Volume::new(VolumeSpec {
        id: VolumeId::from_bytes(*b"0123456789abcdef").unwrap(),
        name: Name::new(name).unwrap(),
        geometry: Geometry::new(1 << 30, 512).unwrap(),
    })
}

fn apply(volume: &mut Volume, command: &Command, payload: usize) -> Outcome {
    volume.apply(volume.applied() + 1, &command.encode(), &Bytes::from(vec![0; payload])).unwrap().outcome
}

/// A volume with every optional field and, with long names, of the longest state.
fn full_volume(name: &str, holder: &str) -> Volume {
    let mut volume = new_volume(name);
    let holder = Name::new(holder).unwrap();
    for instance in 1..=FORMER_INSTANCES_MAX as u128 + 2 {
        let attach = Command::Attach { holder: holder.clone(), instance: Instance(instance), take_over: false };
        assert!(matches!(apply(&mut volume, &attach, 0), Outcome::Attached { .. }));
    }
    let (epoch, session) = (volume.epoch(), volume.session());
    apply(&mut volume, &Command::SetFormatted { epoch, formatted: Formatted::Formatting }, 0);
    for (sequence, oldest) in [(1, 1), (900, 1), (1500, 901), (1924, 901)] {
        let stamp = Stamp { epoch, session, sequence, oldest };
        let write = Command::Write { stamp, first_block: 0, checksums: [0].into() };
        assert_eq!(apply(&mut volume, &write, 4096), Outcome::Done);
    }
    volume
}

#[test]
fn states_match_their_golden_files() {
    let mut with_snapshots = full_volume("pvc-1", "node-a");
    take_snapshots(&mut with_snapshots, 2, 4);
    let volumes = [
        ("state-1-new", new_volume("pvc-1")),
        ("state-1-attached", full_volume("pvc-1", "node-a")),
        ("state-2-snapshots", with_snapshots),
    ];
    for (name, volume) in volumes {
        let encoded = volume.encode_state();
        let golden = golden(name, &encoded);
        assert_eq!(encoded, golden, "{name}");
        assert_eq!(Volume::decode_state(&golden).as_ref(), Ok(&volume), "{name}");
    }
}

#[test]
fn the_longest_state_and_header_are_as_long_as_stated() {
    let longest = "n".repeat(NAME_BYTES_MAX);
    let mut volume = full_volume(&longest, &longest);
    take_snapshots(&mut volume, SNAPSHOTS_MAX, NAME_BYTES_MAX);
    assert_eq!(volume.encode_state().len(), STATE_BYTES_MAX);
    let checksums = vec![0; WRITE_BLOCKS_MAX as usize].into();
    let write = Command::Write { stamp: STAMP, first_block: 0, checksums };
    assert_eq!(write.encode().len(), HEADER_BYTES_MAX);
    assert!(Name::new("").is_err() && Name::new("n".repeat(NAME_BYTES_MAX + 1)).is_err());
}

#[test]
fn every_shortened_or_lengthened_encoding_is_refused() {
    let mut volume = full_volume("pvc-1", "node-a");
    take_snapshots(&mut volume, 2, 4);
    let state = volume.encode_state();
    for length in 0..state.len() {
        assert!(Volume::decode_state(&state[..length]).is_err(), "{length}");
    }
    assert!(Volume::decode_state(&[&state[..], &[0]].concat()).is_err());
    let header = Command::Write { stamp: STAMP, first_block: 0, checksums: [1, 2].into() }.encode();
    for length in 0..header.len() {
        assert!(Command::decode(&header[..length]).is_err(), "{length}");
    }
}

fn stamp() -> impl Strategy<Value = Stamp> {
    any::<(u64, u64, u64, u64)>().prop_map(|(epoch, session, sequence, oldest)| Stamp {
        epoch: Epoch(epoch),
        session: Session(session),
        sequence,
        oldest,
    })
}

fn command() -> impl Strategy<Value = Command> {
    let checksums = prop::collection::vec(any::<u32>(), 1..=WRITE_BLOCKS_MAX as usize);
    let edge = || prop::option::of(any::<u32>());
    let formatted = prop_oneof![Just(Formatted::None), Just(Formatted::Formatting), Just(Formatted::Formatted)];
    prop_oneof![
        (stamp(), 0..u64::MAX - 1000, checksums).prop_map(|(stamp, first_block, checksums)| Command::Write {
            stamp,
            first_block,
            checksums: checksums.into()
        }),
        (stamp(), 1..u64::MAX / 2, 1..=ZERO_BLOCKS_MAX, any::<bool>(), edge(), edge()).prop_map(
            |(stamp, first_block, count, discard, head, tail)| Command::Zero {
                stamp,
                first_block,
                count,
                discard,
                head,
                tail
            }
        ),
        ("\\PC{1,60}", any::<u128>(), any::<bool>()).prop_map(|(holder, instance, take_over)| Command::Attach {
            holder: Name::new(holder).unwrap(),
            instance: Instance(instance),
            take_over
        }),
        any::<(u64, u128)>()
            .prop_map(|(epoch, instance)| Command::OpenSession { epoch: Epoch(epoch), instance: Instance(instance) }),
        any::<u64>().prop_map(|epoch| Command::Detach { epoch: Epoch(epoch) }),
        any::<u64>().prop_map(|size_bytes| Command::Resize { size_bytes }),
        (1u8.., "[a-z]{1,9}").prop_map(|(number, name)| {
            Command::TakeSnapshot { snapshot: snapshot_id(number), name: Name::new(name).unwrap() }
        }),
        (1u8..).prop_map(|number| Command::DeleteSnapshot { snapshot: snapshot_id(number) }),
        (any::<u64>(), formatted)
            .prop_map(|(epoch, formatted)| Command::SetFormatted { epoch: Epoch(epoch), formatted }),
    ]
}

proptest! {
    #[test]
    fn commands_round_trip(command in command()) {
        prop_assert_eq!(Command::decode(&command.encode()), Ok(command));
    }

    /// Whatever the bytes: no panic, and what decodes is the only encoding of its value.
    #[test]
    fn hostile_headers_are_refused_or_canonical(mut header in prop::collection::vec(any::<u8>(), 0..100), kind in 0..9u8) {
        if header.len() >= 4 {
            header[..4].copy_from_slice(&[kind, 1, 0, 0]);
        }
        if let Ok(command) = Command::decode(&header) {
            prop_assert_eq!(command.encode(), header);
        }
    }

    #[test]
    fn a_mutated_command_is_refused_or_canonical(command in command(), at in any::<prop::sample::Index>(), value: u8) {
        let mut header = command.encode().to_vec();
        let at = at.index(header.len());
        header[at] = value;
        if let Ok(command) = Command::decode(&header) {
            prop_assert_eq!(command.encode(), header);
        }
    }

    #[test]
    fn a_mutated_state_is_refused_or_canonical(at in any::<prop::sample::Index>(), value: u8) {
        let mut state = full_volume("pvc-1", "node-a").encode_state().to_vec();
        let at = at.index(state.len());
        state[at] = value;
        if let Ok(volume) = Volume::decode_state(&state) {
            prop_assert_eq!(volume.encode_state(), state);
        }
    }

    /// A stamp of a decoded command may hold any numbers: apply decides without a panic.
    #[test]
    fn apply_is_total(commands in prop::collection::vec(command(), 1..20)) {
        let mut volume = full_volume("pvc-1", "node-a");
        for command in commands {
            apply(&mut volume, &command, command.payload_bytes());
        }
    }
}
