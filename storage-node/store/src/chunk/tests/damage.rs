//! Bits that rot: each kind of block, with the outcome the caller sees.

use crate::chunk::layout::{Named, Place};
use crate::chunk::page::LEAF_BLOCKS;
use crate::chunk::tests::harness::{Machine, group, replica, state, write, zero};
use crate::group::{Damage, ReadError, StoreError, StoreEvent};
use crate::ops::{DeviceError, DeviceOp};

/// Three leaves of data below an inner page, all of it checkpointed.
fn prepared() -> Machine {
    let mut machine = Machine::new(1, 300);
    machine.create(group(0), replica(1), state(1, 100_000));
    machine.settle();
    for leaf in 0..3 {
        let numbers = machine.numbers(20);
        machine.apply(group(0), vec![write(leaf * LEAF_BLOCKS + 8, &numbers)]);
    }
    machine.checkpoint(group(0), state(2, 100_000));
    machine.settle();
    machine
}

fn offset(machine: &Machine, place: Place) -> u64 {
    machine.chunks.layout.offset(place)
}

/// Places named by the map, pages by level.
fn leaf_place(machine: &mut Machine, number: u64) -> Place {
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    let page = machine.chunks.cache.get(root.place);
    let page = page.expect("the root was used last");
    page.inner().children[number as usize].unwrap().page.place
}

fn read_fails(machine: &mut Machine, first: u64, count: u32) -> ReadError {
    machine.read(group(0), first, count);
    machine.settle();
    let error = machine.failures.pop().expect("the read fails");
    assert_eq!(machine.failures, []);
    error
}

#[test]
fn a_rotten_data_block_is_named_and_its_neighbours_read() {
    let mut machine = prepared();
    machine.read(group(0), 0, 256);
    machine.settle();
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    let first = leaf_place(&mut machine, 0);
    assert_ne!(first, root.place);
    let leaf = machine.chunks.cache.get(first).expect("just read");
    let slot = leaf.leaf().slots[0].place;
    for block in [9, 10] {
        let at = offset(&machine, Place(slot.0 + block));
        machine.disk.rot(at);
    }
    assert_eq!(read_fails(&mut machine, 0, 64), ReadError::Corrupt { first_block: 9, count: 2 });
    assert_eq!(machine.chunks.counters().corrupt_blocks, 2);
    machine.read(group(0), 11, 64);
    machine.settle();
    assert_eq!(machine.failures, []);
    // Overwriting repairs it, for good.
    let numbers = machine.numbers(2);
    machine.apply(group(0), vec![write(9, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.settle();
    machine.crash();
    machine.check_leaks();
}

#[test]
fn a_rotten_leaf_loses_its_blocks_until_they_are_overwritten() {
    let mut machine = prepared();
    machine.read(group(0), 0, 64);
    machine.settle();
    let leaf = leaf_place(&mut machine, 1);
    let at = offset(&machine, leaf);
    machine.disk.rot(at);
    let found = machine.reopen();
    assert_eq!(found[0].damage, None, "what is lost is told block by block");
    assert_eq!(machine.chunks.counters().corrupt_pages, 1);
    assert_eq!(read_fails(&mut machine, 250, 16), ReadError::Corrupt { first_block: 256, count: 10 });
    machine.read(group(0), 0, 256);
    machine.settle();
    assert_eq!(machine.failures, []);

    // A later checkpoint of a neighbouring block keeps the loss known, also across restarts.
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(300, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.settle();
    let found = machine.reopen();
    assert_eq!(found[0].damage, None);
    assert_eq!(read_fails(&mut machine, 256, 256), ReadError::Corrupt { first_block: 256, count: 44 });
    machine.read(group(0), 300, 1);
    machine.settle();
    assert_eq!(machine.failures, []);

    let numbers = machine.numbers(256);
    machine.apply(group(0), vec![write(256, &numbers)]);
    machine.checkpoint(group(0), state(4, 0));
    machine.settle();
    machine.crash();
    machine.check_leaks();
}

#[test]
fn a_rotten_root_loses_everything_below_it_and_nothing_else() {
    let mut machine = prepared();
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    let at = offset(&machine, root.place);
    machine.disk.rot(at);
    let found = machine.reopen();
    assert_eq!(found[0].damage, None);
    assert_eq!(read_fails(&mut machine, 0, 4), ReadError::Corrupt { first_block: 0, count: 4 });
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(1, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.settle();
    machine.reopen();
    machine.read(group(0), 1, 1);
    machine.settle();
    assert_eq!(machine.failures, []);
    assert_eq!(read_fails(&mut machine, 600, 1), ReadError::Corrupt { first_block: 600, count: 1 });
    machine.check_leaks();
}

#[test]
fn a_rotten_state_damages_the_group() {
    let mut machine = prepared();
    let state_slot = machine.chunks.allocator.named().into_iter().find_map(|named| match named {
        Named::Slot(place) if is_state(&machine, place) => Some(place),
        _ => None,
    });
    let at = offset(&machine, state_slot.unwrap());
    machine.disk.rot(at);
    let found = machine.reopen();
    assert!(matches!(&found[0].damage, Some(Damage::Checkpoint { reason }) if reason.contains("state")));
    assert_eq!((found[0].group, found[0].replica, found[0].index), (group(0), replica(1), 3));
    assert_eq!(machine.chunks.checkpoint(group(0), 3, 30, state(3, 0)), Err(StoreError::Damaged));
    assert_eq!(read_fails(&mut machine, 8, 4), ReadError::Corrupt { first_block: 8, count: 4 });
    machine.chunks.delete_group(group(0), replica(1)).unwrap();
    machine.settle();
    machine.crash();
    assert!(machine.models.is_empty());
}

fn is_state(machine: &Machine, place: Place) -> bool {
    use crate::chunk::header::StateHome;
    matches!(&machine.chunks.groups[&group(0)].header.state, StateHome::Slots { places, .. } if places.contains(&place))
}

#[test]
fn one_rotten_copy_of_a_new_header_hides_nothing_two_are_reported() {
    let mut machine = Machine::new(1, 100);
    machine.create(group(0), replica(1), state(1, 10));
    machine.settle();
    let header = machine.chunks.groups[&group(0)].header.clone();
    let at = machine.chunks.layout.header_offset(header.entry, header.generation);
    machine.disk.rot(at);
    let found = machine.reopen();
    assert_eq!((found.len(), found[0].replica), (1, replica(1)));
    let at = machine.chunks.layout.header_offset(header.entry, header.generation - 1);
    machine.disk.rot(at);
    let found = machine.reopen();
    assert_eq!(found, []);
    assert_eq!(machine.chunks.damaged_entries(), [header.entry]);
}

#[test]
fn an_old_header_whose_slots_have_a_new_owner_damages_only_its_group() {
    let mut machine = prepared();
    machine.create(group(1), replica(2), state(1, 0));
    machine.settle();
    // Replace all of group 0's pages and free a slot, which group 1 then takes.
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(8, &numbers), zero(256, 256)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.settle();
    for n in 0..16 {
        let numbers = machine.numbers(256);
        machine.apply(group(1), vec![write(n * 256, &numbers)]);
    }
    machine.checkpoint(group(1), state(3, 0));
    machine.settle();
    let header = machine.chunks.groups[&group(0)].header.clone();
    let at = machine.chunks.layout.header_offset(header.entry, header.generation);
    machine.disk.rot(at);
    let found = machine.reopen();
    let damage = |id| found.iter().find(|found| found.group == group(id)).unwrap().damage.clone();
    assert!(matches!(damage(0), Some(Damage::Checkpoint { .. })), "{:?}", damage(0));
    assert_eq!(damage(1), None);
    for n in 0..16 {
        machine.read(group(1), n * 256, 256);
    }
    machine.settle();
    assert_eq!(machine.failures, []);
}

#[test]
fn a_failed_write_fails_the_disk_and_every_read_in_flight() {
    let mut machine = prepared();
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(8, &numbers)]);
    machine.chunks.read(group(0), 256, 16, 99);
    machine.checkpoint(group(0), state(3, 0));
    let ops = machine.chunks.take_ops();
    let header = ops.iter().find(|op| matches!(op, DeviceOp::Write { durable: true, .. })).unwrap();
    let error = DeviceError::Flush { reason: "gone".to_owned() };
    machine.chunks.on_completion(header.id(), Err(error));
    let events = machine.chunks.take_events();
    assert!(matches!(&events[0], StoreEvent::Read { token: 99, result: Err(ReadError::Failed) }));
    assert!(matches!(&events[1], StoreEvent::Failed { reason } if reason.contains("gone")));
    assert_eq!(machine.chunks.checkpoint(group(0), 9, 0, state(1, 0)), Err(StoreError::Failed));
    assert!(machine.chunks.take_ops().is_empty());
}

/// Completes everything, reads with an error.
fn fail_reads(machine: &mut Machine) {
    for op in machine.chunks.take_ops() {
        let DeviceOp::Read { id, offset, length, .. } = op else { panic!("only reads were asked for") };
        let error = DeviceError::Read { offset, length: u64::from(length), reason: "medium".to_owned() };
        machine.chunks.on_completion(id, Err(error));
    }
    // An operation for several blocks is tried again block by block.
    for op in machine.chunks.take_ops() {
        let error = DeviceError::Read { offset: 0, length: 4096, reason: "medium".to_owned() };
        machine.chunks.on_completion(op.id(), Err(error));
    }
}

#[test]
fn a_block_or_page_that_cannot_be_read_is_lost_like_one_that_reads_wrong() {
    let mut machine = prepared();
    machine.read(group(0), 8, 4);
    machine.settle();
    machine.chunks.read(group(0), 8, 4, 70);
    fail_reads(&mut machine);
    let corrupt = |first_block, count| Err(ReadError::Corrupt { first_block, count });
    assert_eq!(machine.chunks.take_events(), [StoreEvent::Read { token: 70, result: corrupt(8, 4) }]);
    // The blocks themselves are asked for again; only pages are given up at once.
    machine.read(group(0), 8, 4);
    machine.settle();
    assert_eq!(machine.failures, []);

    machine.reopen();
    machine.chunks.read(group(0), 600, 10, 71);
    fail_reads(&mut machine);
    assert_eq!(machine.chunks.take_events(), [StoreEvent::Read { token: 71, result: corrupt(600, 10) }]);
    assert_eq!((machine.chunks.counters().read_errors, machine.chunks.counters().corrupt_pages), (1, 1));
    assert_eq!(read_fails(&mut machine, 8, 1), ReadError::Corrupt { first_block: 8, count: 1 }, "its root is given up");
    assert_eq!(machine.reopen()[0].damage, None);
    machine.read(group(0), 8, 1);
    machine.settle();
    assert_eq!(machine.failures, [], "until the next open finds it whole");
}

#[test]
fn a_copy_of_a_rotten_slot_keeps_its_neighbours_and_its_rot() {
    let mut machine = prepared();
    machine.read(group(0), 8, 4);
    machine.settle();
    let leaf = leaf_place(&mut machine, 0);
    let leaf = machine.chunks.cache.get(leaf).expect("just read");
    let at = offset(&machine, Place(leaf.leaf().slots[0].place.0 + 10));
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(9, &numbers)]);
    machine.disk.rot(at);
    machine.checkpoint(group(0), state(3, 0));
    machine.settle();
    assert_eq!(read_fails(&mut machine, 8, 8), ReadError::Corrupt { first_block: 10, count: 1 });
    machine.read(group(0), 8, 2);
    machine.read(group(0), 11, 5);
    machine.read_frozen(group(0), frozen, 9, 1);
    machine.settle();
    assert_eq!(machine.failures, []);
    machine.chunks.thaw(group(0), frozen.id);
    machine.check_leaks();
}
