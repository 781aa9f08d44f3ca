//! Power lost before and after every single operation of a checkpoint, a creation and a deletion.

use crate::chunk::tests::harness::{Machine, Random, group, replica, state, write, zero};
use crate::ops::DeviceOp;

/// A group with two slots, some of whose blocks the next checkpoint will overwrite, zero, or leave alone.
fn prepared(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 200);
    machine.create(group(0), replica(1), state(1, 10));
    machine.settle();
    let numbers = machine.numbers(40);
    machine.apply(group(0), vec![write(100, &numbers)]);
    machine.checkpoint(group(0), state(2, 10));
    machine.settle();
    let numbers = machine.numbers(5);
    machine.apply(group(0), vec![write(110, &numbers)]);
    machine.apply(group(0), vec![zero(112, 1), zero(128, 16)]);
    let numbers = machine.numbers(3);
    machine.apply(group(0), vec![write(300, &numbers)]);
    machine
}

#[test]
fn a_crash_at_any_operation_of_a_checkpoint_is_recoverable() {
    crash_at_any_operation_of_a_checkpoint();
}

#[cfg(feature = "planted")]
#[test]
fn a_planted_checkpoint_that_does_not_flush_its_slots_is_found() {
    use holdfast_planted::{Bug, plant};

    plant(Some(Bug::SkipSlotFlush));
    let failure = std::panic::catch_unwind(crash_at_any_operation_of_a_checkpoint);
    // The thread may serve another test.
    plant(None);
    failure.expect_err("the bug is not found");
}

fn crash_at_any_operation_of_a_checkpoint() {
    let mut ends = (0, 0);
    for survives in 0..12 {
        // Until the checkpoint is done after fewer completions.
        for completions in 0.. {
            let mut machine = prepared(survives);
            machine.checkpoint(group(0), state(3, 70_000));
            machine.collect();
            for _ in 0..completions {
                machine.complete_any();
            }
            let finished = machine.in_flight.is_empty();
            machine.random = Random(survives * 1000 + completions);
            machine.crash();
            let index = machine.models[&group(0)].states[0].0;
            if index == 1 {
                ends.0 += 1
            } else {
                ends.1 += 1
            }
            assert!(!finished || index == 4, "a finished checkpoint stays");
            machine.settle();
            machine.check_leaks();
            // And it is as good as any: one more checkpoint and crash.
            machine.checkpoint(group(0), state(4, 0));
            machine.settle();
            machine.check_leaks();
            machine.crash();
            if finished {
                break;
            }
        }
    }
    assert!(ends.0 > 50 && ends.1 > 12, "both outcomes were seen: {ends:?}");
}

#[test]
fn a_checkpoint_between_restart_and_the_last_write_back_carries_the_mark_on() {
    let mut seen = 0;
    for seed in 0..30 {
        let mut machine = prepared(seed);
        machine.checkpoint(group(0), state(3, 0));
        machine.collect();
        // Past the intent, into the write-back.
        machine.complete(0);
        for _ in 0..1 + seed % 3 {
            machine.complete_any();
        }
        let ops: Vec<DeviceOp> = machine.in_flight.drain(..).map(|in_flight| in_flight.op).collect();
        machine.disk = machine.disk.crashed(&ops, &mut machine.random);
        let found = machine.reopen();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].index, found[0].write_back_to), (1, 4));
        let log = machine.models[&group(0)].entries.clone();
        // The replica replays one entry, makes a checkpoint, and crashes again.
        machine.chunks.apply(group(0), 2, log[1].mutations.clone());
        machine.chunks.checkpoint(group(0), 2, 20, state(9, 0)).unwrap();
        let states = vec![(1, found[0].state.clone()), (2, state(9, 0))];
        machine.models.get_mut(&group(0)).unwrap().states = states;
        machine.settle();
        let found = machine.reopen();
        assert_eq!((found[0].index, found[0].write_back_to), (2, 4));
        machine.crash();
        machine.checkpoint(group(0), state(10, 0));
        machine.settle();
        let found = machine.reopen();
        assert!(found[0].write_back_to <= found[0].index, "a checkpoint past it ends it");
        machine.crash();
        seen += 1;
    }
    assert_eq!(seen, 30);
}

#[test]
fn a_crash_during_creation_or_deletion_leaves_all_or_nothing() {
    for seed in 0..40 {
        let mut machine = Machine::new(seed, 200);
        for id in 0..2 {
            machine.create(group(id), replica(id as u8 + 1), state(u64::from(id), 100_000));
        }
        machine.collect();
        for _ in 0..seed % 8 {
            machine.complete_any();
        }
        machine.crash();
        machine.settle();
        machine.check_leaks();
        for id in 0..2 {
            if !machine.models.contains_key(&group(id)) {
                machine.create(group(id), replica(id as u8 + 11), state(u64::from(id), 5));
            }
        }
        machine.settle();
        let numbers = machine.numbers(600);
        for (i, part) in numbers.chunks(200).enumerate() {
            machine.apply(group(1), vec![write(i as u64 * 200, part)]);
        }
        machine.checkpoint(group(1), state(5, 5));
        machine.settle();
        let model = machine.models.get_mut(&group(1)).unwrap();
        model.deleting = true;
        let deleted = model.replica;
        machine.chunks.delete_group(group(1), deleted).unwrap();
        machine.collect();
        for _ in 0..seed % 5 {
            machine.complete_any();
        }
        machine.crash();
        machine.settle();
        machine.check_leaks();
    }
}
