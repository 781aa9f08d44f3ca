//! Reads in flight while checkpoints overwrite and free what they fetch.

use crate::chunk::Kept;
use crate::chunk::layout::{Named, Place};
use crate::chunk::tests::harness::{Machine, group, replica, state, write, zero};
use crate::ops::DeviceOp;

/// Blocks 8 to 27 are checkpointed, and their leaf is in the cache.
fn prepared() -> Machine {
    let mut machine = Machine::new(1, 100);
    machine.limits.cached_pages = 100;
    machine.reopen();
    machine.create(group(0), replica(1), state(1, 0));
    machine.settle();
    let numbers = machine.numbers(20);
    machine.apply(group(0), vec![write(8, &numbers)]);
    machine.checkpoint(group(0), state(2, 0));
    machine.settle();
    machine
}

fn first_slot(machine: &mut Machine) -> Place {
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    machine.chunks.cache.get(root.place).expect("it was just written").leaf().slots[0].place
}

/// Completes everything but the read that is the first operation in flight.
fn complete_others(machine: &mut Machine) {
    assert!(matches!(machine.in_flight[0].op, DeviceOp::Read { .. }));
    while machine.in_flight.len() > 1 {
        machine.complete(1);
    }
}

#[test]
fn a_checkpoint_overwrites_nothing_that_an_earlier_read_still_fetches() {
    let mut machine = prepared();
    machine.read(group(0), 8, 4);
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(9, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.collect();
    complete_others(&mut machine);
    assert_eq!(machine.chunks.groups[&group(0)].header.index, 1, "the checkpoint waits");
    machine.settle();
    assert_eq!(machine.failures, []);
    assert_eq!(machine.chunks.groups[&group(0)].header.index, 2);
}

#[test]
fn a_slot_is_not_reused_while_a_read_fetches_from_it() {
    let mut machine = prepared();
    let slot = Named::Slot(first_slot(&mut machine));
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(9, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    // The intent is on its way; this read takes the map from before, whose slot the checkpoint copies.
    let intent = machine.chunks.take_ops();
    machine.read(group(0), 10, 1);
    assert_eq!(intent.len(), 1);
    machine.submit(intent);
    complete_others(&mut machine);
    assert_eq!(machine.chunks.groups[&group(0)].header.index, 2, "the checkpoint is done");
    machine.chunks.thaw(group(0), frozen.id);
    assert!(machine.chunks.allocator.named().contains(&slot), "the read keeps it");
    machine.settle();
    assert!(!machine.chunks.allocator.named().contains(&slot));
    assert_eq!(machine.failures, []);
    machine.check_leaks();
}

#[test]
fn after_a_thaw_a_checkpoint_waits_for_reads_of_the_frozen_map() {
    let mut machine = prepared();
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    // Another group's checkpoint goes first, so that this one is planned after the thaw.
    machine.create(group(1), replica(2), state(1, 0));
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(9, &numbers)]);
    machine.checkpoint(group(0), state(3, 0));
    let first = machine.chunks.take_ops();
    machine.read_frozen(group(0), frozen, 9, 1);
    machine.submit(first);
    machine.chunks.thaw(group(0), frozen.id);
    complete_others(&mut machine);
    assert_eq!(machine.chunks.groups[&group(0)].header.index, 1, "the checkpoint waits");
    machine.settle();
    assert_eq!(machine.failures, []);
    machine.check_leaks();
}

#[test]
fn a_question_keeps_the_pages_it_waits_for() {
    let mut machine = prepared();
    machine.reopen();
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    machine.chunks.changed_since(group(0), Some(Kept::Frozen(frozen.id)), 0, 0, 5);
    machine.collect();
    machine.chunks.thaw(group(0), frozen.id);
    machine.apply(group(0), vec![zero(0, 64)]);
    machine.checkpoint(group(0), state(3, 0));
    machine.collect();
    while machine.in_flight.iter().any(|in_flight| !matches!(in_flight.op, DeviceOp::Read { .. })) {
        let n = machine.in_flight.iter().position(|in_flight| !matches!(in_flight.op, DeviceOp::Read { .. }));
        machine.complete(n.unwrap());
    }
    assert!(machine.chunks.allocator.named().contains(&Named::Page(root.place)));
    machine.settle();
    let answers = machine.chunks.take_changes();
    let slots = answers[0].result.as_ref().unwrap().slots.iter();
    let slots: Vec<(u64, u64, u16)> = slots.map(|change| (change.slot, change.index, change.present)).collect();
    assert_eq!(slots, [(0, 1, 0xff00), (1, 1, 0x0fff)]);
    machine.check_leaks();
}
