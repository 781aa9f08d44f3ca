mod crash;
mod hostile;
pub(crate) mod model;
mod payload;
mod random;

use std::sync::Arc;

use holdfast_id::{ClusterId, DiskId, NodeId, VolumeId};

use super::*;
use crate::device::BLOCK_BYTES;
use crate::device::memory::MemoryDevice;
use crate::group::{Damage, ReadError, Record};

const BLOCK: usize = BLOCK_BYTES;

/// A store whose operations are performed at once.
struct Disk {
    device: MemoryDevice,
    store: Store,
    groups: Vec<RecoveredGroup>,
}

fn group(number: u8) -> GroupId {
    GroupId::first(VolumeId::from_bytes([number; 16]).unwrap())
}

fn replica(number: u8) -> ReplicaId {
    ReplicaId::from_bytes([number; 16]).unwrap()
}

fn options() -> FormatOptions {
    let cluster = ClusterId::from_bytes([1; 16]).unwrap();
    let node = NodeId::from_bytes([2; 16]).unwrap();
    let disk = DiskId::from_bytes([3; 16]).unwrap();
    FormatOptions {
        wal_segment_bytes: 128 << 10,
        wal_segments: 4,
        groups_max: 8,
        ..FormatOptions::new(cluster, node, disk)
    }
}

fn state(text: &str) -> GroupState {
    GroupState {
        hard_state: Bytes::from(format!("hard {text}")),
        position: Bytes::new(),
        state: text.to_owned().into(),
    }
}

fn append(number: u8, sequence: u64, index: u64, payload: Vec<u8>) -> Append {
    let record = Record { index, header: Bytes::from_static(b"header"), payload: payload.into(), at: None };
    let hard_state = Some(Bytes::from(format!("hard {sequence}")));
    Append { group: group(number), sequence, hard_state, truncate_from: None, records: vec![record] }
}

fn write(first_block: u64, data: Vec<u8>) -> Vec<Mutation> {
    let checksums: Arc<[u32]> = data.chunks(BLOCK).map(holdfast_block::checksum).collect();
    vec![Mutation::Write { first_block, data: data.into(), checksums }]
}

impl Disk {
    fn new() -> Disk {
        let device = MemoryDevice::new(16 << 20);
        Store::format(&device, &options()).unwrap();
        Self::open(device)
    }

    fn open(device: MemoryDevice) -> Disk {
        let (store, groups) = Store::open(&device).unwrap();
        Disk { device, store, groups }
    }

    fn reopen(self) -> Disk {
        self.device.crash(|_, _| false);
        Self::open(self.device)
    }

    fn run(&mut self) -> Vec<StoreEvent> {
        loop {
            let ops = self.store.take_ops();
            if ops.is_empty() {
                return self.store.take_events();
            }
            for op in ops {
                let id = op.id();
                let result = self.perform(op);
                self.store.on_completion(id, Ok(result));
            }
        }
    }

    fn perform(&self, op: DeviceOp) -> Bytes {
        match op {
            DeviceOp::Read { offset, length, .. } => {
                let mut buffer = vec![0; length as usize];
                self.device.read_at(offset, &mut buffer).unwrap();
                return buffer.into();
            }
            DeviceOp::Write { offset, data, durable, .. } => {
                self.device.write_at(offset, &data).unwrap();
                if durable {
                    self.device.flush().unwrap();
                }
            }
            DeviceOp::Flush { .. } => self.device.flush().unwrap(),
        }
        Bytes::new()
    }

    fn create(&mut self, number: u8) {
        self.store.create_group(group(number), replica(number), state("new")).unwrap();
        let created = StoreEvent::GroupCreated { group: group(number), replica: replica(number) };
        assert_eq!(self.run(), [created]);
    }

    fn read(&mut self, number: u8, first_block: u64, count: u32) -> Result<Bytes, ReadError> {
        self.store.read(group(number), first_block, count, 77);
        match self.run().as_slice() {
            [StoreEvent::Read { token: 77, result }] => result.clone(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_group_lives_through_append_apply_checkpoint_and_two_crashes() {
    let mut disk = Disk::new();
    assert_eq!(disk.store.append(append(1, 1, 1, vec![])), Err(AppendError::UnknownGroup));
    disk.create(1);
    for index in 1..=3 {
        disk.store.append(append(1, index, index, vec![index as u8; BLOCK])).unwrap();
    }
    assert_eq!(disk.run(), [StoreEvent::Flushed { group: group(1), sequence: 3 }]);

    let mut disk = disk.reopen();
    assert_eq!(disk.store.superblock().boot_epoch, 2);
    let found = &disk.groups[0];
    assert_eq!((found.replica, found.checkpoint_index, found.records.len()), (replica(1), 0, 3));
    assert_eq!((found.hard_state.as_deref(), &found.damage), (Some(&b"hard 3"[..]), &None));
    for record in disk.groups.remove(0).records {
        disk.store.apply(group(1), record.index, write(record.index, record.payload.to_vec()));
    }
    disk.store.checkpoint(group(1), 3, state("three")).unwrap();
    disk.store.append(append(1, 4, 4, vec![])).unwrap();
    let events = disk.run();
    assert!(events.contains(&StoreEvent::CheckpointDone { group: group(1), index: 3 }), "{events:?}");
    assert_eq!(disk.store.usage().data_reserved, 0);

    let mut disk = disk.reopen();
    let found = &disk.groups[0];
    assert_eq!((found.checkpoint_index, &found.checkpoint), (3, &state("three")));
    assert_eq!(found.hard_state.as_deref(), Some(&b"hard 4"[..]), "appended after the checkpoint");
    assert_eq!(found.records.iter().map(|record| record.index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(disk.read(1, 1, 4).unwrap(), [vec![1; BLOCK], vec![2; BLOCK], vec![3; BLOCK], vec![0; BLOCK]].concat());
}

#[test]
fn what_a_deleted_replica_left_in_the_wal_is_not_its_successors() {
    let mut disk = Disk::new();
    disk.create(1);
    disk.store.append(append(1, 1, 1, vec![])).unwrap();
    disk.run();
    assert_eq!(disk.store.delete_group(group(1), replica(9)), Err(StoreError::UnknownGroup));
    disk.store.delete_group(group(1), replica(1)).unwrap();
    assert_eq!(disk.run(), [StoreEvent::GroupDeleted { group: group(1), replica: replica(1) }]);
    disk.store.create_group(group(1), replica(2), state("again")).unwrap();
    disk.run();
    let disk = disk.reopen();
    assert_eq!((disk.groups.len(), disk.groups[0].replica), (1, replica(2)));
    assert_eq!((disk.groups[0].records.len(), &disk.groups[0].hard_state), (0, &None));
}

#[test]
fn a_full_disk_and_a_full_wal_are_told_apart_and_both_recover() {
    let mut disk = Disk::new();
    disk.create(1);
    let mut index = 0;
    let mut refused = None;
    for _ in 0..400 {
        match disk.store.append(append(1, index + 1, index + 1, vec![1; 8 * BLOCK])) {
            Ok(()) => {
                index += 1;
                disk.store.apply(group(1), index, write(index * 64, vec![1; 8 * BLOCK]));
                disk.run();
            }
            Err(AppendError::Full) => {
                disk.store.checkpoint(group(1), index, state("more")).unwrap();
                disk.store.release(group(1), index);
                assert!(disk.run().contains(&StoreEvent::CheckpointDone { group: group(1), index }));
            }
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    assert_eq!(refused, Some(AppendError::NoSpace));
    let discard = vec![Mutation::Zero { first_block: 0, count: 1 << 14, discard: true }];
    disk.store.append(append(1, index + 1, index + 1, vec![])).expect("what has no payload draws on the reserve");
    disk.store.apply(group(1), index + 1, discard);
    disk.store.checkpoint(group(1), index + 1, state("less")).unwrap();
    disk.run();
    disk.store.release(group(1), index + 1);
    disk.store.append(append(1, index + 2, index + 2, vec![1; 8 * BLOCK])).expect("there is space again");
}

#[test]
fn the_first_failure_is_told_once_and_ends_everything() {
    for of_wal in [true, false] {
        let mut disk = Disk::new();
        disk.create(1);
        disk.store.append(append(1, 1, 1, vec![1; BLOCK])).unwrap();
        disk.run();
        disk.store.apply(group(1), 1, write(0, vec![1; BLOCK]));
        disk.store.append(append(1, 2, 2, vec![1; BLOCK])).unwrap();
        disk.store.checkpoint(group(1), 1, state("one")).unwrap();
        let ops = disk.store.take_ops();
        let victim = ops.iter().map(DeviceOp::id).find(|id| id.is_wal() == of_wal).unwrap();
        disk.store.on_completion(victim, Err(DeviceError::Flush { reason: "gone".into() }));
        for op in ops.iter().filter(|op| op.id() != victim) {
            disk.store.on_completion(op.id(), Ok(Bytes::new()));
        }
        let events = disk.store.take_events();
        assert!(matches!(events.as_slice(), [StoreEvent::Failed { .. }]), "{events:?}");
        assert!(disk.store.take_ops().is_empty());
        assert_eq!(disk.store.append(append(1, 3, 3, vec![])), Err(AppendError::Failed));
        assert_eq!(disk.store.checkpoint(group(1), 1, state("one")), Err(StoreError::Failed));
        assert_eq!(disk.read(1, 0, 1), Err(ReadError::Failed));
        assert!(disk.store.take_events().is_empty());
    }
}

#[test]
fn a_disk_is_formatted_once_and_only_where_nothing_is() {
    let device = MemoryDevice::new(16 << 20);
    assert!(matches!(Store::probe(&device), Ok(None)));
    assert!(matches!(Store::open(&device), Err(OpenError::NotFormatted)));
    let formatted = Store::format(&device, &options()).unwrap();
    assert_eq!(Store::probe(&device).unwrap(), Some(formatted));
    assert!(matches!(Store::format(&device, &options()), Err(FormatError::AlreadyFormatted { .. })));

    let foreign = MemoryDevice::new(16 << 20);
    // The magic of ext4 lies at byte 1080.
    foreign.corrupt(1080, 2);
    assert!(matches!(Store::format(&foreign, &options()), Err(FormatError::Foreign)));
    let small = MemoryDevice::new(2 << 20);
    assert!(matches!(Store::format(&small, &options()), Err(FormatError::TooSmall { .. })));
    let odd = FormatOptions { wal_segment_bytes: 5000, ..options() };
    assert!(matches!(Store::format(&MemoryDevice::new(16 << 20), &odd), Err(FormatError::InvalidOption { .. })));
}

#[test]
fn closing_marks_the_disk_clean_until_it_is_opened_again() {
    let disk = Disk::new();
    assert!(!Store::probe(&disk.device).unwrap().unwrap().clean);
    let device = disk.device.clone();
    disk.store.close(&device).unwrap();
    assert!(Store::probe(&device).unwrap().unwrap().clean);
    let disk = Disk::open(device);
    assert!(!Store::probe(&disk.device).unwrap().unwrap().clean);
}

#[test]
fn damage_of_the_wal_reaches_the_recovered_group() {
    let mut disk = Disk::new();
    disk.create(1);
    let mut offsets = Vec::new();
    for index in 1..=2 {
        disk.store.append(append(1, index, index, vec![])).unwrap();
        let ops = disk.store.take_ops();
        let [DeviceOp::Write { offset, .. }] = ops.as_slice() else { panic!("{ops:?}") };
        offsets.push(*offset);
        for op in ops {
            let id = op.id();
            let result = disk.perform(op);
            disk.store.on_completion(id, Ok(result));
        }
    }
    disk.device.corrupt(offsets[0] + 512, 1);
    let disk = disk.reopen();
    assert_eq!(disk.groups[0].damage, Some(Damage::Log { intact_to: 0 }));
}

#[test]
fn the_log_restarts_above_an_installed_state() {
    let mut disk = Disk::new();
    disk.create(1);
    for index in 1..=6 {
        disk.store.append(append(1, index, index, vec![index as u8; BLOCK])).unwrap();
    }
    disk.run();
    disk.store.apply(group(1), 1, write(0, vec![1; BLOCK]));
    disk.store.checkpoint(group(1), 1, state("one")).unwrap();
    disk.run();
    let install = |disk: &mut Disk, slot: u64, index: u64, text: &str| {
        let data = Bytes::from(vec![index as u8; BLOCK]);
        let checksums = [holdfast_block::checksum(&data)].into();
        disk.store.install(group(1), index, InstalledSlot { slot, index, present: 1, data, checksums }).unwrap();
        disk.store.commit_install(group(1), Bytes::from_static(b"hard")).unwrap();
        disk.run();
        let wrong = disk.store.finish_install(group(1), index, state(text), 0, &[]);
        let Err(InstallError::Hash { found, .. }) = wrong else { panic!("{wrong:?}") };
        disk.store.finish_install(group(1), index, state(text), found, &[]).unwrap();
        assert!(disk.run().contains(&StoreEvent::CheckpointDone { group: group(1), index }));
    };
    // Within the log: whether records above it follow is the caller's to know.
    install(&mut disk, 1, 4, "four");
    let mut disk = disk.reopen();
    let found = &disk.groups[0];
    assert_eq!((found.checkpoint_index, found.installing, &found.checkpoint), (4, 0, &state("four")));
    assert_eq!(found.records.iter().map(|record| record.index).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    // They do not: all that came before goes, below the checkpoint too, and the log goes on above it.
    let restart = Append { truncate_from: Some(1), ..append(1, 1, 5, vec![9; BLOCK]) };
    disk.store.append(restart.clone()).unwrap();
    disk.run();
    let mut disk = disk.reopen();
    assert_eq!(disk.groups[0].records, restart.records);
    assert_eq!(disk.groups[0].damage, None);
    // Beyond the log.
    install(&mut disk, 2, 20, "twenty");
    assert_eq!(disk.store.last_appended(group(1)), Some(20));
    disk.store.append(append(1, 2, 21, vec![])).unwrap();
    disk.run();
    assert_eq!(disk.store.usage().data_reserved, 0, "records that are not applied any more hold no promise");
    let mut disk = disk.reopen();
    let found = &disk.groups[0];
    assert_eq!((found.checkpoint_index, found.damage.clone()), (20, None));
    assert_eq!(found.records.iter().map(|record| record.index).collect::<Vec<_>>(), [21]);
    assert_eq!(disk.read(1, 0, 1).unwrap(), vec![1; BLOCK]);
    assert_eq!(disk.read(1, 16, 17).unwrap(), [vec![4; BLOCK], vec![0; 15 * BLOCK], vec![20; BLOCK]].concat());
}
