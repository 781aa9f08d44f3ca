//! Snapshots beside checkpoints under way, deleted in every order, and power lost at every operation of it.

use crate::chunk::SNAPSHOTS_MAX;
use crate::chunk::tests::harness::{Machine, Random, group, replica, state, write, zero};
use crate::group::StoreError;

const SLOT: u64 = 65536;

fn prepared(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 300);
    machine.create(group(0), replica(1), state(1, 10));
    machine.settle();
    let numbers = machine.numbers(80);
    machine.apply(group(0), vec![write(0, &numbers)]);
    machine.checkpoint(group(0), state(2, 10));
    machine.settle();
    machine
}

fn overwrite(machine: &mut Machine, first: u64, count: u64) {
    let numbers = machine.numbers(count);
    machine.apply(group(0), vec![write(first, &numbers)]);
}

/// Three snapshots while the checkpoint of what was before the first is under way, with changes between and after.
fn snapshots_under_load(machine: &mut Machine) -> [u64; 3] {
    overwrite(machine, 10, 4);
    machine.checkpoint(group(0), state(3, 70_000));
    machine.collect();
    overwrite(machine, 12, 30);
    let first = machine.take_snapshot(group(0), state(4, 0));
    machine.apply(group(0), vec![zero(0, 40)]);
    overwrite(machine, 70_000, 3);
    let second = machine.take_snapshot(group(0), state(5, 60_000));
    overwrite(machine, 5, 1);
    let third = machine.take_snapshot(group(0), state(6, 0));
    machine.delete_snapshot(group(0), second);
    overwrite(machine, 0, 20);
    machine.read_start();
    [first, second, third]
}

#[test]
fn a_snapshot_holds_what_was_applied_before_it_whatever_comes_after() {
    for seed in 0..20 {
        let mut machine = prepared(seed);
        let [first, _, third] = snapshots_under_load(&mut machine);
        machine.settle();
        assert!(machine.wanted.contains(&group(0)), "a deletion waits for a checkpoint, and asks for it");
        machine.checkpoint(group(0), state(7, 0));
        machine.settle();
        assert_eq!(machine.snapshots(group(0)), [first, third]);
        for snapshot in [first, third] {
            machine.read_snapshot(group(0), snapshot, 0, 256);
            machine.read_snapshot(group(0), snapshot, 70_000 - 100, 256);
        }
        machine.settle();
        machine.check_leaks();
        machine.crash();
    }
}

#[test]
fn a_crash_at_any_operation_of_snapshots_and_their_deletion_is_recoverable() {
    crash_at_any_operation();
}

#[cfg(feature = "planted")]
#[test]
fn a_planted_slot_freed_while_a_snapshot_names_it_is_found() {
    use holdfast_planted::{Bug, plant};

    plant(Some(Bug::FreeSnapshotSlot));
    let failure = std::panic::catch_unwind(crash_at_any_operation);
    // The thread may serve another test.
    plant(None);
    failure.expect_err("the bug is not found");
}

fn crash_at_any_operation() {
    let mut seen = [0; 4];
    for survives in 0..3 {
        for completions in 0.. {
            let mut machine = prepared(survives);
            snapshots_under_load(&mut machine);
            machine.collect();
            for _ in 0..completions {
                machine.complete_any();
            }
            let finished = machine.in_flight.is_empty();
            machine.random = Random(survives * 1000 + completions);
            machine.crash();
            machine.settle();
            seen[machine.snapshots(group(0)).len()] += 1;
            machine.check_leaks();
            // And it is as good as any: what is deleted goes, what is kept stays, through one more crash.
            overwrite(&mut machine, 30, 30);
            machine.checkpoint(group(0), state(8, 0));
            machine.settle();
            machine.check_leaks();
            for snapshot in machine.snapshots(group(0)) {
                machine.delete_snapshot(group(0), snapshot);
            }
            machine.checkpoint(group(0), state(9, 0));
            machine.collect();
            for _ in 0..completions % 7 {
                machine.complete_any();
            }
            machine.crash();
            machine.settle();
            machine.check_leaks();
            if finished {
                break;
            }
        }
    }
    // Replayed to the end, whatever the crash left.
    assert!(seen[2] + seen[3] > 60, "{seen:?}");
}

#[test]
fn deleting_snapshots_in_any_order_frees_what_nobody_names() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        for together in [false, true] {
            let mut machine = prepared(7);
            let before = machine.chunks.usage().data_used;
            let mut snapshots = Vec::new();
            for n in 0..4 {
                snapshots.push(machine.take_snapshot(group(0), state(n, 0)));
                overwrite(&mut machine, n * 16, 17);
                machine.settle();
            }
            machine.checkpoint(group(0), state(9, 0));
            machine.settle();
            machine.check_leaks();
            assert!(machine.chunks.usage().data_used >= before + 4 * SLOT);
            for n in order {
                machine.delete_snapshot(group(0), snapshots[n]);
                if !together {
                    machine.checkpoint(group(0), state(9, 0));
                    machine.settle();
                    machine.check_leaks();
                }
            }
            machine.checkpoint(group(0), state(9, 0));
            machine.settle();
            machine.check_leaks();
            assert_eq!(machine.snapshots(group(0)), []);
            assert!(machine.chunks.usage().data_used <= before, "nothing of them is left");
        }
    }
}

#[test]
fn a_discard_gives_space_back_when_the_last_snapshot_that_names_it_goes() {
    let mut machine = prepared(1);
    let snapshot = machine.take_snapshot(group(0), state(3, 0));
    machine.settle();
    machine.apply(group(0), vec![zero(0, 80)]);
    machine.checkpoint(group(0), state(4, 0));
    machine.settle();
    let held = machine.chunks.usage().data_used;
    machine.delete_snapshot(group(0), snapshot);
    machine.checkpoint(group(0), state(5, 0));
    machine.settle();
    let left = machine.chunks.usage().data_used;
    assert!(held - left >= 5 * SLOT, "the five slots were held: {held}, {left}");
    machine.check_leaks();
}

#[test]
fn a_deleted_group_takes_its_snapshots_along() {
    for seed in 0..10 {
        let mut machine = prepared(seed);
        snapshots_under_load(&mut machine);
        machine.settle();
        machine.models.get_mut(&group(0)).unwrap().deleting = true;
        machine.chunks.delete_group(group(0), replica(1)).unwrap();
        machine.settle();
        machine.check_leaks();
        assert_eq!(machine.chunks.usage().data_used, 0);
    }
}

#[test]
fn snapshots_have_a_limit_and_deleted_ones_do_not_count() {
    let mut machine = prepared(1);
    let first = machine.take_snapshot(group(0), state(3, 0));
    for _ in 1..SNAPSHOTS_MAX {
        machine.take_snapshot(group(0), state(3, 0));
    }
    let index = machine.models[&group(0)].last() + 1;
    let refused = machine.chunks.take_snapshot(group(0), index, index * 10, state(3, 0));
    assert_eq!(refused, Err(StoreError::TooManySnapshots));
    machine.delete_snapshot(group(0), first);
    machine.take_snapshot(group(0), state(3, 0));
    machine.settle();
    assert_eq!(machine.snapshots(group(0)).len(), SNAPSHOTS_MAX);
    machine.check_leaks();
    machine.crash();
}

#[test]
fn a_snapshot_on_a_full_disk_waits_for_space_and_its_group_can_go_meanwhile() {
    for deleted in 0..2 {
        let mut machine = Machine::new(3, 64);
        for id in 0..2 {
            machine.create(group(id), replica(id as u8 + 1), state(1, 0));
        }
        machine.settle();
        let mut at = 0;
        for _ in 0..2 {
            while machine.chunks.reserve(group(1), machine.models[&group(1)].last() + 1, 16).is_ok() {
                let numbers = machine.numbers(16);
                machine.apply(group(1), vec![write(at, &numbers)]);
                at += 16;
            }
            machine.checkpoint(group(1), state(2, 0));
            machine.settle();
        }
        let spare = machine.chunks.allocator.free_slots() - 1;
        let spare: Vec<_> = (0..spare).map(|_| machine.chunks.allocator.take_slot().unwrap()).collect();
        for tag in 0..3 {
            machine.take_snapshot(group(0), state(tag, 60_000));
        }
        machine.settle();
        assert!(machine.chunks.waiting_cuts.contains(&group(0)) && !machine.failed);
        assert_eq!(machine.snapshots(group(0)), []);
        machine.models.get_mut(&group(deleted)).unwrap().deleting = true;
        machine.chunks.delete_group(group(deleted), replica(deleted as u8 + 1)).unwrap();
        machine.settle();
        machine.chunks.free_slots(spare);
        machine.settle();
        assert_eq!(machine.snapshots(group(0)).len(), if deleted == 0 { 0 } else { 3 });
        machine.check_leaks();
        machine.crash();
    }
}

#[test]
fn references_that_do_not_add_up_are_found_at_open() {
    let mut machine = prepared(1);
    machine.take_snapshot(group(0), state(3, 0));
    machine.settle();
    overwrite(&mut machine, 0, 16);
    machine.checkpoint(group(0), state(4, 0));
    machine.settle();
    // As a program would leave it that forgets the era of what it takes.
    let found = &machine.chunks.groups[&group(0)];
    let mut header = found.header.clone();
    header.era = found.snapshots[0].era;
    header.generation += 1;
    let offset = machine.chunks.layout.header_offset(header.entry, header.generation);
    machine.disk.write(offset, &header.encode(), true);
    let found = machine.reopen();
    assert!(found[0].damage.is_some());
    assert!(machine.chunks.snapshots(group(0)).is_empty());
}
