//! Payloads in slots: how often they are written and flushed, how much of them is taken, and what their loss means.

use super::*;
use crate::group::{APPEND_BYTES_MAX, PayloadAt};

const SLOT: usize = 64 << 10;

fn long(number: u8, sequence: u64, index: u64, first_block: u64, payload: Vec<u8>) -> Append {
    let mut append = append(number, sequence, index, payload);
    let checksums = append.records[0].payload.chunks(BLOCK).map(holdfast_block::checksum).collect();
    append.records[0].at = Some(PayloadAt { first_block, checksums });
    append
}

impl Disk {
    /// Performs what there is to do and tells the operations; what they cause stays to be done.
    fn round(&mut self) -> Vec<DeviceOp> {
        let ops = self.store.take_ops();
        for op in &ops {
            let result = self.perform(op.clone());
            self.store.on_completion(op.id(), Ok(result));
        }
        ops
    }
}

#[test]
fn a_long_payload_is_written_once_and_flushed_with_its_batch() {
    let mut disk = Disk::new();
    disk.create(1);
    disk.store.append(long(1, 1, 1, 0, vec![5; 4 * SLOT])).unwrap();
    let ops = disk.store.take_ops();
    let [
        DeviceOp::Write { id: payload, data, durable: false, .. },
        DeviceOp::Write { id: batch, data: record, durable: false, .. },
    ] = ops.as_slice()
    else {
        panic!("{ops:?}")
    };
    assert_eq!((data.len(), record.len()), (4 * SLOT, BLOCK), "a checksum for each block in the record");
    let (payload, batch) = (*payload, *batch);
    for op in ops {
        disk.perform(op);
    }
    disk.store.on_completion(batch, Ok(Bytes::new()));
    assert!(disk.store.take_ops().is_empty(), "the flush would not cover the payload");
    disk.store.append(append(1, 2, 2, vec![1; BLOCK])).unwrap();
    assert!(disk.store.take_ops().is_empty(), "one batch at a time");
    disk.store.on_completion(payload, Ok(Bytes::new()));
    assert_eq!(disk.store.take_events(), []);
    let flush = disk.round();
    assert!(matches!(flush.as_slice(), [DeviceOp::Flush { .. }]), "{flush:?}");
    assert_eq!(disk.store.take_events(), [StoreEvent::Flushed { group: group(1), sequence: 1 }]);
    let next = disk.round();
    assert!(matches!(next.as_slice(), [DeviceOp::Write { durable: true, .. }]), "without payloads as ever: {next:?}");

    disk.store.apply(group(1), 1, write(0, vec![5; 4 * SLOT]));
    disk.store.apply(group(1), 2, vec![]);
    disk.store.checkpoint(group(1), 2, state("two")).unwrap();
    let mut written = 0;
    loop {
        let ops = disk.round();
        if ops.is_empty() {
            break;
        }
        written +=
            ops.iter().map(|op| if let DeviceOp::Write { data, .. } = op { data.len() } else { 0 }).sum::<usize>();
    }
    assert_eq!(written, 3 * BLOCK, "the intent, a leaf, the header");
    let mut disk = disk.reopen();
    assert_eq!(disk.read(1, 0, 65).unwrap(), [vec![5; 4 * SLOT], vec![0; BLOCK]].concat());
    let found = &disk.groups[0];
    assert_eq!(found.records.iter().map(|record| record.payload.len()).collect::<Vec<_>>(), [4 * SLOT, BLOCK]);
}

#[test]
fn payloads_in_slots_fill_the_log_as_if_they_lay_in_it() {
    let mut disk = Disk::new();
    disk.create(1);
    disk.create(2);
    let total = disk.store.usage().wal_total as usize;
    let (mut index, mut wanted) = (0, 0);
    let full = loop {
        match disk.store.append(long(1, index + 1, index + 1, 0, vec![index as u8 + 1; SLOT])) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
        let events = disk.run();
        wanted += events.iter().filter(|event| matches!(event, StoreEvent::CheckpointWanted { .. })).count();
    };
    assert_eq!((full, index as usize), (AppendError::Full, total / SLOT));
    assert_eq!((wanted, disk.store.usage().wal_used as usize), (1, total));
    disk.store.append(append(2, 1, 1, vec![1; BLOCK])).expect("what stays in the log has room there");
    disk.run();
    let used = disk.store.usage().data_used;
    for n in 1..=index {
        disk.store.apply(group(1), n, write(0, vec![n as u8; SLOT]));
    }
    disk.store.checkpoint(group(1), index, state("full")).unwrap();
    disk.run();
    assert_eq!(disk.store.usage().data_used, used - (index - 1) * SLOT as u64 + SLOT as u64, "one slot, one of pages");
    disk.store.release(group(1), index);
    disk.store.append(long(1, index + 1, index + 1, 0, vec![1; 16 * SLOT])).expect("one payload always has room");
    let bytes = APPEND_BYTES_MAX as u64;
    assert!(disk.store.usage().wal_used <= bytes);
}

#[test]
fn a_refused_append_takes_no_slots() {
    let mut disk = Disk::new();
    disk.create(1);
    let before = disk.store.usage();
    let mut refused = long(1, 1, 1, 0, vec![1; SLOT]);
    refused.records[0].header = vec![0; (64 << 10) + 1].into();
    assert!(matches!(disk.store.append(refused), Err(AppendError::TooLarge { .. })));
    assert_eq!(disk.store.usage(), before);
    // The second record finds no space, and the first gives its own back.
    for index in (1..).step_by(2) {
        let mut both = long(1, index, index, 0, vec![1; SLOT]);
        let second = long(1, index, index + 1, index * 256, vec![2; 15 * SLOT]).records;
        both.records.extend(second);
        let before = disk.store.usage();
        match disk.store.append(both) {
            Ok(()) => {}
            Err(AppendError::NoSpace) => {
                assert_eq!(disk.store.usage(), before);
                disk.store.append(long(1, index, index, 0, vec![1; SLOT])).expect("the first alone has space");
                return;
            }
            Err(error) => panic!("{error}"),
        }
        disk.run();
        disk.store.apply(group(1), index, write(0, vec![1; SLOT]));
        disk.store.apply(group(1), index + 1, write(index * 256, vec![2; 15 * SLOT]));
        disk.store.checkpoint(group(1), index + 1, state("more")).unwrap();
        disk.run();
        disk.store.release(group(1), index + 1);
    }
}

#[test]
fn slots_of_a_deleted_group_wait_for_the_writes_to_them() {
    let mut disk = Disk::new();
    disk.create(1);
    disk.create(2);
    let free = disk.store.usage().data_used;
    disk.store.append(long(1, 1, 1, 0, vec![1; SLOT])).unwrap();
    let held: Vec<DeviceOp> = disk.store.take_ops();
    disk.store.delete_group(group(1), replica(1)).unwrap();
    assert_eq!(disk.run().len(), 1, "it is deleted");
    assert_eq!(disk.store.usage().data_used, free + SLOT as u64);
    for op in held {
        let id = op.id();
        let result = disk.perform(op);
        disk.store.on_completion(id, Ok(result));
    }
    disk.run();
    assert_eq!(disk.store.usage().data_used, free);
}

/// Two groups with a payload each and a record behind it; the slot of the first one's.
fn two_payloads() -> (Disk, u64) {
    let mut disk = Disk::new();
    disk.create(1);
    disk.create(2);
    disk.store.append(append(1, 1, 1, vec![1; BLOCK])).unwrap();
    disk.run();
    disk.store.append(long(1, 2, 2, 0, vec![2; SLOT])).unwrap();
    disk.store.append(long(2, 1, 1, 0, vec![3; SLOT])).unwrap();
    let ops = disk.round();
    let DeviceOp::Write { offset, .. } = &ops[0] else { panic!("{ops:?}") };
    let offset = *offset;
    disk.run();
    (disk, offset)
}

#[test]
fn a_lost_payload_is_damage_of_its_group_alone_until_that_has_noted_it() {
    let (mut disk, offset) = two_payloads();
    disk.store.append(append(1, 3, 3, vec![4; BLOCK])).unwrap();
    disk.run();
    disk.device.corrupt(offset + 5 * BLOCK as u64, 1);
    for _ in 0..2 {
        disk = disk.reopen();
        assert_eq!(disk.groups[0].damage, Some(Damage::Log { intact_to: 1 }));
        assert_eq!(disk.groups[0].records.len(), 1);
        assert_eq!((&disk.groups[1].damage, disk.groups[1].records.len()), (&None, 1));
    }
    disk.store.append(append(1, 1, 2, vec![5; BLOCK])).unwrap();
    disk.run();
    let disk = disk.reopen();
    assert_eq!((&disk.groups[0].damage, disk.groups[0].records.len()), (&None, 2));
}

#[test]
fn a_payload_of_the_last_batch_is_torn_unless_the_mark_says_that_it_was_flushed() {
    for marked in [false, true] {
        let (mut disk, offset) = two_payloads();
        if marked {
            disk.store.on_idle();
            disk.run();
        }
        disk.device.corrupt(offset, 1);
        let mut disk = disk.reopen();
        let damage = marked.then_some(Damage::Log { intact_to: 1 });
        assert_eq!((&disk.groups[0].damage, disk.groups[0].records.len()), (&damage, 1));
        assert_eq!((&disk.groups[1].damage, disk.groups[1].records.len()), (&None, 1));
        // What comes next follows what is left, also when the torn record's slots hold something else by then.
        disk.store.append(long(2, 1, 2, 16, vec![6; SLOT])).unwrap();
        disk.store.append(long(1, 1, 2, 0, vec![7; SLOT])).unwrap();
        disk.run();
        let disk = disk.reopen();
        assert_eq!((&disk.groups[0].damage, disk.groups[0].records.len()), (&None, 2));
        assert_eq!((&disk.groups[0].records[1].payload[0], disk.groups[1].records.len()), (&7, 2));
    }
}

#[test]
fn what_only_a_page_cache_held_is_durable_after_an_open() {
    let mut disk = Disk::new();
    disk.create(1);
    disk.store.append(long(1, 1, 1, 0, vec![8; SLOT])).unwrap();
    for op in disk.store.take_ops() {
        disk.perform(op);
    }
    // The process dies and the disk's cache lives; then the power fails.
    let disk = Disk::open(disk.device.fork());
    assert_eq!(disk.groups[0].records.len(), 1);
    let disk = disk.reopen();
    assert_eq!(disk.groups[0].records[0].payload, vec![8; SLOT]);
}

#[test]
fn records_kept_below_a_checkpoint_end_where_their_slots_were_given_away() {
    let mut disk = Disk::new();
    disk.create(1);
    for index in 1..=3 {
        disk.store.append(long(1, index, index, 0, vec![index as u8; SLOT])).unwrap();
        disk.run();
        disk.store.apply(group(1), index, write(0, vec![index as u8; SLOT]));
    }
    disk.store.checkpoint(group(1), 3, state("three")).unwrap();
    disk.run();
    let mut disk = disk.reopen();
    assert_eq!(disk.groups[0].records.len(), 3, "nothing has taken their slots yet");
    // A later checkpoint writes into the slot that the map has adopted.
    disk.store.append(append(1, 1, 4, vec![9; BLOCK])).unwrap();
    disk.run();
    disk.store.apply(group(1), 4, write(2, vec![9; BLOCK]));
    disk.store.checkpoint(group(1), 4, state("four")).unwrap();
    disk.run();
    let disk = disk.reopen();
    assert_eq!((&disk.groups[0].damage, disk.groups[0].checkpoint_index), (&None, 4));
    assert_eq!(disk.groups[0].records.iter().map(|record| record.index).collect::<Vec<_>>(), [4]);
}
