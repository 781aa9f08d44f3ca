use bytes::Bytes;
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};

use super::*;
use crate::device::memory::MemoryDevice;
use crate::group::{Damage, Record};
use crate::ops::WriteBytes;
use crate::superblock::FormatOptions;

/// A disk whose WAL is driven by hand, one blocking operation at a time.
struct Disk {
    device: MemoryDevice,
    superblock: Superblock,
    bases: Vec<GroupBase>,
    wal: Wal,
    logs: Vec<RecoveredLog>,
    sequence: u64,
}

/// For logs whose payloads are all inline.
struct NoSlots;

impl Slots for NoSlots {
    fn are_slots(&self, _: u64, _: usize) -> bool {
        false
    }

    fn claim(&mut self, _: u64, _: usize) -> bool {
        false
    }
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
        wal_segment_bytes: 64 << 10,
        wal_segments: 4,
        groups_max: 8,
        ..FormatOptions::new(cluster, node, disk)
    }
}

impl Disk {
    fn new(groups: u8) -> Disk {
        let device = MemoryDevice::new(6 << 20);
        let superblock = Superblock::lay_out(device.len().unwrap(), &options()).unwrap();
        Wal::format(&device, &superblock).unwrap();
        let base = |number| GroupBase { group: group(number), replica: replica(number), index: 0, wal_sequence: 0 };
        Self::open(device, superblock, (1..=groups).map(base).collect())
    }

    fn open(device: MemoryDevice, superblock: Superblock, bases: Vec<GroupBase>) -> Disk {
        let (wal, logs) = Wal::open(&device, &superblock, &bases, &mut NoSlots).unwrap();
        Disk { device, superblock, bases, wal, logs, sequence: 0 }
    }

    fn reopen(self) -> Disk {
        Self::open(self.device, self.superblock, self.bases)
    }

    fn append(&mut self, number: u8, truncate_from: Option<u64>, records: &[(u64, usize)]) -> Result<(), AppendError> {
        self.sequence += 1;
        let record = |(index, bytes): &(u64, usize)| Record {
            index: *index,
            header: Bytes::from(format!("{number}.{index}.{}", self.sequence)),
            payload: Bytes::from(vec![number; *bytes]),
            at: None,
        };
        let hard_state = Some(Bytes::from(format!("hard {}", self.sequence)));
        let records: Vec<Record> = records.iter().map(record).collect();
        let placed = vec![Vec::new(); records.len()];
        let append = Append { group: group(number), sequence: self.sequence, hard_state, truncate_from, records };
        self.wal.append(&append, &placed).map(|_| ())
    }

    /// Performs operations until there is none; the offsets written.
    fn run(&mut self) -> Vec<u64> {
        let mut offsets = Vec::new();
        while let Some(op) = self.wal.take_ops() {
            offsets.push(self.perform(op));
        }
        offsets
    }

    fn perform(&mut self, op: DeviceOp) -> u64 {
        let DeviceOp::Write { id, offset, data, durable: true } = op else { panic!("{op:?}") };
        self.device.write_at(offset, &data).unwrap();
        self.device.flush().unwrap();
        self.wal.on_completion(id, Ok(()));
        offset
    }

    fn indexes(&self, number: u8) -> Vec<u64> {
        self.logs[usize::from(number) - 1].records.iter().map(|record| record.index).collect()
    }

    fn checkpoint(&mut self, number: u8, index: u64) {
        let sequence = self.wal.checkpoint_sequence(group(number));
        self.wal.on_checkpoint(group(number), index, sequence);
        let base = &mut self.bases[usize::from(number) - 1];
        (base.index, base.wal_sequence) = (index, sequence);
    }
}

#[test]
fn appends_of_many_groups_share_a_batch_and_come_back() {
    let mut disk = Disk::new(2);
    disk.append(1, None, &[(1, 4096), (2, 0)]).unwrap();
    let first = disk.wal.take_ops().unwrap();
    disk.append(2, None, &[(1, 0)]).unwrap();
    disk.append(1, Some(2), &[(2, 4096)]).unwrap();
    assert!(disk.wal.take_ops().is_none(), "one batch is in flight");
    disk.perform(first);
    assert_eq!(disk.wal.take_events(), [StoreEvent::Flushed { group: group(1), sequence: 1 }]);
    assert_eq!(disk.run().len(), 1);
    let flushed = |number, sequence| StoreEvent::Flushed { group: group(number), sequence };
    assert_eq!(disk.wal.take_events(), [flushed(2, 2), flushed(1, 3)]);
    let disk = disk.reopen();
    assert_eq!((disk.indexes(1), disk.indexes(2)), (vec![1, 2], vec![1]));
    assert_eq!(disk.logs[0].records[1].header, "1.2.3");
    assert_eq!(disk.logs[0].hard_state.as_deref(), Some(&b"hard 3"[..]));
    assert_eq!(disk.logs[0].damage, None);
}

#[test]
fn the_ring_wraps_asks_for_checkpoints_and_refuses_before_it_wedges() {
    let mut disk = Disk::new(2);
    disk.append(2, None, &[(1, 4096)]).unwrap();
    let mut index = 0;
    let mut wanted = Vec::new();
    let full = loop {
        if let Err(error) = disk.append(1, None, &[(index + 1, 16384)]) {
            break error;
        }
        index += 1;
        disk.run();
        let events = disk.wal.take_events();
        wanted.extend(events.into_iter().filter(|event| matches!(event, StoreEvent::CheckpointWanted { .. })));
    };
    assert_eq!(full, AppendError::Full);
    let want = |number| StoreEvent::CheckpointWanted { group: group(number) };
    assert_eq!(wanted, [want(1), want(2)]);
    let mut without_data = 0;
    while disk.append(1, None, &[(index + 1, 0)]).is_ok() {
        (index, without_data) = (index + 1, without_data + 1);
        disk.run();
    }
    assert!(without_data > 1, "what has no data has a reserve");
    disk.append(1, None, &[]).expect("and hard states one of their own");
    disk.run();
    disk.checkpoint(1, index);
    disk.wal.release(group(1), index);
    assert_eq!(disk.append(1, None, &[(index + 1, 16384)]), Err(AppendError::Full), "group 2 holds the oldest segment");
    disk.checkpoint(2, 1);
    disk.wal.release(group(2), 1);
    for _ in 0..100 {
        index += 1;
        disk.append(1, None, &[(index, 16384)]).unwrap();
        disk.run();
        disk.checkpoint(1, index);
        disk.wal.release(group(1), index - 1);
    }
    let disk = disk.reopen();
    assert_eq!(disk.indexes(1).last(), Some(&index));
    assert_eq!(disk.logs[1].damage, None);
    assert_eq!(disk.logs[1].hard_state, None, "the checkpoint's is newer");
}

#[test]
fn a_torn_last_batch_is_cut_and_its_place_used_again() {
    let mut disk = Disk::new(1);
    disk.append(1, None, &[(1, 8192)]).unwrap();
    disk.run();
    disk.append(1, None, &[(2, 8192)]).unwrap();
    let Some(DeviceOp::Write { offset, data, .. }) = disk.wal.take_ops() else { panic!() };
    disk.device.write_at(offset, &data).unwrap();
    disk.device.crash(|_, sector| sector != 3);
    let mut disk = disk.reopen();
    assert_eq!((disk.indexes(1), &disk.logs[0].damage), (vec![1], &None));
    disk.append(1, None, &[(2, 0)]).unwrap();
    assert_eq!(disk.run(), [offset]);
    let disk = disk.reopen();
    assert_eq!((disk.indexes(1), &disk.logs[0].damage), (vec![1, 2], &None));
}

#[test]
fn a_bad_batch_before_a_whole_one_is_damage_of_the_groups_in_it_alone() {
    let mut disk = Disk::new(3);
    for number in 1..=3 {
        disk.append(number, None, &[(1, 0)]).unwrap();
    }
    disk.run();
    disk.append(1, None, &[(2, 8192)]).unwrap();
    let damaged = disk.run()[0];
    disk.append(1, None, &[(3, 0)]).unwrap();
    disk.append(2, None, &[(2, 0)]).unwrap();
    disk.run();
    disk.device.corrupt(damaged + 4096, 512);
    let mut disk = disk.reopen();
    assert_eq!((disk.indexes(1), disk.indexes(2), disk.indexes(3)), (vec![1], vec![1, 2], vec![1]));
    assert_eq!(disk.logs[0].damage, Some(Damage::Log { intact_to: 1 }));
    assert_eq!((&disk.logs[1].damage, &disk.logs[2].damage), (&None, &None));
    // Told again until the group has noted it; then what follows continues the intact part.
    disk = disk.reopen();
    assert_eq!(disk.logs[0].damage, Some(Damage::Log { intact_to: 1 }));
    disk.append(1, None, &[(2, 0)]).unwrap();
    disk.run();
    disk = disk.reopen();
    assert_eq!((disk.indexes(1), &disk.logs[0].damage), (vec![1, 2], &None));
    assert_eq!(disk.logs[0].records[1].header, "1.2.1");
}

#[test]
fn damage_without_a_table_marks_every_group() {
    let mut disk = Disk::new(2);
    disk.append(1, None, &[(1, 0)]).unwrap();
    let damaged = disk.run()[0];
    disk.append(1, None, &[(2, 0)]).unwrap();
    disk.run();
    disk.device.corrupt(damaged, 512);
    let disk = disk.reopen();
    assert_eq!(disk.indexes(1), []);
    for log in &disk.logs {
        assert_eq!(log.damage, Some(Damage::Log { intact_to: 0 }));
    }
    assert!(disk.reopen().logs.iter().all(|log| log.damage.is_some()));
}

#[test]
fn a_group_made_after_batches_were_lost_keeps_its_own_records() {
    let mut disk = Disk::new(1);
    disk.append(1, None, &[(1, 0)]).unwrap();
    let damaged = disk.run()[0];
    disk.append(1, None, &[(2, 0)]).unwrap();
    disk.run();
    disk.device.corrupt(damaged, 512);
    let mut disk = disk.reopen();
    disk.bases.push(GroupBase { group: group(2), replica: replica(2), index: 0, wal_sequence: 0 });
    disk.wal.add_group(group(2), replica(2));
    disk.run();
    assert_eq!(disk.wal.take_events(), [], "an anchor is nobody's append");
    disk.append(2, None, &[(1, 0), (2, 0)]).unwrap();
    disk.run();
    let disk = disk.reopen();
    assert_eq!((disk.indexes(2), &disk.logs[1].damage), (vec![1, 2], &None));
    assert_eq!(disk.logs[0].damage, Some(Damage::Log { intact_to: 0 }));
}

#[test]
fn a_bad_last_batch_at_the_mark_is_damage_and_is_not_overwritten() {
    for table_survives in [false, true] {
        let mut disk = Disk::new(2);
        disk.append(1, None, &[(1, 0)]).unwrap();
        disk.run();
        disk.append(1, None, &[(2, 8192)]).unwrap();
        let damaged = disk.run()[0];
        assert!(disk.wal.wants_idle());
        let mark = disk.wal.on_idle().unwrap();
        disk.perform(mark);
        assert!(!disk.wal.wants_idle());
        disk.device.corrupt(damaged + if table_survives { 4096 } else { 0 }, 512);
        let evidence = |device: &MemoryDevice| {
            let mut bytes = vec![0; 12288];
            device.read_at(damaged, &mut bytes).unwrap();
            bytes
        };
        let before = evidence(&disk.device);
        let disk = disk.reopen();
        assert_eq!((disk.indexes(1), &disk.logs[0].damage), (vec![1], &Some(Damage::Log { intact_to: 1 })));
        assert_eq!(disk.logs[1].damage.is_some(), !table_survives);
        assert_eq!(evidence(&disk.device), before);
    }
}

#[test]
fn an_append_beyond_a_limit_is_refused_whole() {
    let mut disk = Disk::new(1);
    assert!(matches!(disk.append(1, None, &[(1, 32768)]), Err(AppendError::TooLarge { .. })));
    assert!(matches!(
        disk.append(1, None, &[(1, 2 << 20)]),
        Err(AppendError::TooLarge { limit: PAYLOAD_BYTES_MAX, .. })
    ));
    disk.append(1, None, &[(1, 16384)]).expect("the refused ones left nothing behind");
}

#[test]
fn a_failed_write_fails_the_disk_once_and_for_good() {
    let mut disk = Disk::new(1);
    disk.append(1, None, &[(1, 0)]).unwrap();
    let op = disk.wal.take_ops().unwrap();
    disk.append(1, None, &[(2, 0)]).unwrap();
    disk.wal.on_completion(op.id(), Err(DeviceError::Flush { reason: "gone".into() }));
    assert_eq!(disk.wal.take_events(), [StoreEvent::Failed { reason: "flushing failed: gone".into() }]);
    assert!(disk.wal.take_ops().is_none());
    assert_eq!(disk.append(1, None, &[(3, 0)]), Err(AppendError::Failed));
    assert_eq!(disk.wal.take_events(), []);
}

const GOLDEN: &[u8] = include_bytes!("../../golden/wal-batch-1.bin");

/// A hard state, a truncation, an entry with a payload and one without, of two groups.
fn golden_batch(disk: &mut Disk) -> (OpId, u64, WriteBytes) {
    disk.append(1, None, &[(1, 0), (2, 4096)]).unwrap();
    disk.append(2, None, &[(1, 0)]).unwrap();
    disk.append(1, Some(2), &[(2, 0)]).unwrap();
    let Some(DeviceOp::Write { id, offset, data, durable: true }) = disk.wal.take_ops() else { panic!() };
    (id, offset, data)
}

#[test]
fn the_first_batch_format_is_written_for_ever() {
    let (_, _, data) = golden_batch(&mut Disk::new(2));
    assert_eq!(data[..], *GOLDEN);
}

const GOLDEN_EXTENTS: &[u8] = include_bytes!("../../golden/wal-batch-extents-1.bin");

/// A payload with a block inline, two slots, a slot of zeroes, and a block inline.
#[test]
fn the_first_format_of_extents_is_written_and_read_for_ever() {
    let mut disk = Disk::new(1);
    let payload: Vec<u8> = (0..50u8).flat_map(|block| [block; BLOCK_BYTES]).collect();
    let extents = vec![
        Extent::Inline { blocks: 1 },
        Extent::Slots {
            offset: 5 << 20,
            checksums: payload[4096..33 * 4096].chunks(4096).map(holdfast_block::checksum).collect(),
        },
        Extent::Zero { blocks: 16 },
        Extent::Inline { blocks: 1 },
    ];
    let record = Record { index: 1, header: "header".into(), payload: payload.clone().into(), at: None };
    let append = Append { group: group(1), sequence: 1, hard_state: None, truncate_from: None, records: vec![record] };
    disk.wal.append(&append, std::slice::from_ref(&extents)).unwrap();
    assert_eq!(disk.wal.take_payload_ops().len(), 1);
    let Some(DeviceOp::Write { data, durable: false, .. }) = disk.wal.take_ops() else { panic!() };
    assert_eq!(data[..], *GOLDEN_EXTENTS);

    let header = BatchHeader::decode(GOLDEN_EXTENTS, GOLDEN_EXTENTS.len()).unwrap();
    let mut rest = batch::records_of(&header, &bytes::Bytes::from_static(GOLDEN_EXTENTS));
    let Ok(format::WalRecord::Entry { index: 1, payload: stored, .. }) = format::decode_record(&mut rest, 1) else {
        panic!()
    };
    assert_eq!((stored.bytes, stored.extents, rest.len()), (payload.len(), extents, 0));
    assert_eq!(stored.inline, [&payload[..4096], &payload[49 * 4096..]].concat());
}

#[test]
fn the_first_batch_format_is_read_for_ever() {
    let mut disk = Disk::new(2);
    let (_, offset, _) = golden_batch(&mut disk);
    disk.device.write_at(offset, GOLDEN).unwrap();
    let disk = disk.reopen();
    assert_eq!((disk.indexes(1), disk.indexes(2)), (vec![1, 2], vec![1]));
    let [first, second] = disk.logs[0].records.as_slice() else { panic!() };
    assert_eq!((&first.header[..], &second.header[..], second.payload.len()), (&b"1.1.1"[..], &b"1.2.3"[..], 0));
    assert_eq!(disk.logs[1].hard_state.as_deref(), Some(&b"hard 2"[..]));
}
