//! Snapshots in the state of a volume: who asks again is answered alike, and names are somebody's.

#![allow(clippy::unwrap_used, reason = "a test's helpers are tests")]

use bytes::Bytes;
use holdfast_block::Geometry;
use holdfast_id::{SnapshotId, VolumeId};
use holdfast_volume::volume::SNAPSHOTS_MAX;
use holdfast_volume::{Applied, Command, Keeping, Name, Outcome, Volume, VolumeSpec};

fn volume() -> Volume {
    Volume::new(VolumeSpec {
        id: VolumeId::from_bytes([7; 16]).unwrap(),
        name: Name::new("v").unwrap(),
        geometry: Geometry::new(1 << 20, 512).unwrap(),
    })
}

fn id(number: usize) -> SnapshotId {
    SnapshotId::from_bytes((number as u128 + 1).to_be_bytes()).unwrap()
}

fn apply(volume: &mut Volume, command: &Command) -> Applied {
    volume.apply(volume.applied() + 1, &command.encode(), &Bytes::new()).unwrap()
}

fn take(volume: &mut Volume, number: usize, name: &str) -> (Outcome, Option<Keeping>) {
    let applied = apply(volume, &Command::TakeSnapshot { snapshot: id(number), name: Name::new(name).unwrap() });
    (applied.outcome, applied.keeping)
}

fn delete(volume: &mut Volume, number: usize) -> Option<Keeping> {
    let applied = apply(volume, &Command::DeleteSnapshot { snapshot: id(number) });
    assert_eq!(applied.outcome, Outcome::SnapshotDeleted);
    applied.keeping
}

#[test]
fn a_repeated_snapshot_is_the_one_taken_before() {
    let mut volume = volume();
    assert_eq!(take(&mut volume, 1, "a"), (Outcome::SnapshotTaken { index: 1 }, Some(Keeping::Keep)));
    apply(&mut volume, &Command::Resize { size_bytes: 2 << 20 });
    assert_eq!(take(&mut volume, 1, "a"), (Outcome::SnapshotTaken { index: 1 }, None));
    assert_eq!(take(&mut volume, 2, "b"), (Outcome::SnapshotTaken { index: 4 }, Some(Keeping::Keep)));
    let sizes: Vec<u64> = volume.snapshots().iter().map(|snapshot| snapshot.size_bytes).collect();
    assert_eq!(sizes, [1 << 20, 2 << 20], "each as large as the volume was");
    assert_eq!(delete(&mut volume, 1), Some(Keeping::Drop { index: 1 }));
    assert_eq!(delete(&mut volume, 1), None);
    assert_eq!(volume.snapshots().len(), 1);
}

#[test]
fn a_name_or_identifier_of_another_snapshot_is_refused() {
    let mut volume = volume();
    take(&mut volume, 1, "a");
    let taken = Outcome::SnapshotConflict { snapshot: id(1), name: Name::new("a").unwrap() };
    assert_eq!(take(&mut volume, 2, "a"), (taken.clone(), None));
    assert_eq!(take(&mut volume, 1, "b"), (taken, None));
    delete(&mut volume, 1);
    assert!(matches!(take(&mut volume, 2, "a"), (Outcome::SnapshotTaken { index: 5 }, Some(Keeping::Keep))));
}

#[test]
fn one_more_than_the_limit_is_refused_until_one_is_deleted() {
    let mut volume = volume();
    for number in 0..SNAPSHOTS_MAX {
        assert!(matches!(take(&mut volume, number, &number.to_string()).0, Outcome::SnapshotTaken { .. }));
    }
    assert_eq!(take(&mut volume, SNAPSHOTS_MAX, "more"), (Outcome::TooManySnapshots, None));
    assert!(matches!(take(&mut volume, 3, "3"), (Outcome::SnapshotTaken { index: 4 }, None)), "it is there");
    delete(&mut volume, 3);
    assert!(matches!(take(&mut volume, SNAPSHOTS_MAX, "more").0, Outcome::SnapshotTaken { .. }));
}

#[test]
fn a_state_with_snapshots_of_the_future_or_of_one_name_is_refused() {
    let mut volume = volume();
    take(&mut volume, 1, "aa");
    take(&mut volume, 2, "bb");
    let state = volume.encode_state().to_vec();
    assert_eq!(Volume::decode_state(&state).as_ref(), Ok(&volume));
    // The last name and, before it, the last index.
    let mut same = state.clone();
    same.splice(state.len() - 2.., *b"aa");
    assert!(Volume::decode_state(&same).is_err());
    let mut future = state.clone();
    let at = state.len() - 4 - 16;
    future[at] = 3;
    assert!(Volume::decode_state(&future).is_err());
}
