//! Random work, crashes and restarts; every read is held against the model.

use crate::chunk::tests::harness::{GROUPS_MAX, Machine, group, replica, state, write, zero};

/// Places where groups write: within a leaf, across leaves, and where the map has to grow.
fn first_block(machine: &mut Machine) -> u64 {
    match machine.random.below(10) {
        0 => 256 * 256 + machine.random.below(300),
        1 => (1 << 33) + machine.random.below(40),
        _ => machine.random.below(600),
    }
}

fn step(machine: &mut Machine, next_replica: &mut u8) {
    let id = group(machine.random.below(u64::from(GROUPS_MAX) - 2) as u16);
    let live = machine.models.get(&id).is_some_and(|model| model.created && !model.deleting);
    match machine.random.below(100) {
        0..10 if !machine.models.contains_key(&id) => {
            *next_replica += 1;
            let bytes = [0, 100, 3616, 3617, 200_000][machine.random.below(5) as usize];
            machine.create(id, replica(*next_replica), state(u64::from(*next_replica), bytes));
        }
        0..35 if live => {
            let first = first_block(machine);
            let count = if machine.random.chance(70) { 1 } else { 1 + machine.random.below(40) };
            let numbers = machine.numbers(count);
            machine.apply(id, vec![write(first, &numbers)]);
        }
        35..42 if live => {
            let first = first_block(machine);
            let count = if machine.random.chance(20) { 1 << 14 } else { 1 + machine.random.below(60) };
            machine.apply(id, vec![zero(first, count)]);
        }
        42..60 if live => {
            let first = first_block(machine);
            let count = 1 + machine.random.below(256) as u32;
            machine.read(id, first, count);
        }
        60..66 if live && !machine.chunks.groups[&id].committing => {
            let bytes = [0, 3616, 70_000][machine.random.below(3) as usize];
            let tag = machine.next_number;
            machine.checkpoint(id, state(tag, bytes));
        }
        66 if live && !machine.chunks.groups[&id].committing && machine.random.chance(30) => {
            let model = machine.models.get_mut(&id).unwrap();
            model.deleting = true;
            let replica = model.replica;
            machine.chunks.delete_group(id, replica).unwrap();
        }
        67 if live => {
            let below = machine.models[&id].last();
            machine.chunks.forget_tombstones(id, below);
        }
        68 => {
            machine.settle();
            machine.check_leaks();
        }
        69 if machine.random.chance(40) => {
            machine.crash();
            machine.settle();
            machine.check_leaks();
        }
        _ => machine.complete_any(),
    }
    machine.collect();
    assert!(!machine.failed);
    assert_eq!(machine.failures, []);
}

#[test]
fn random_work_reads_as_the_oracle_says_through_crashes() {
    for seed in 0..40 {
        let mut machine = Machine::new(seed, 2000);
        let mut next_replica = 0;
        for _ in 0..1500 {
            step(&mut machine, &mut next_replica);
        }
        machine.settle();
        machine.check_leaks();
        machine.crash();
    }
}

#[test]
fn the_same_calls_give_the_same_operations() {
    let run = || {
        let mut machine = Machine::new(3, 500);
        let mut next_replica = 0;
        let mut operations = Vec::new();
        for _ in 0..600 {
            step(&mut machine, &mut next_replica);
            operations.push(machine.in_flight.iter().map(|in_flight| in_flight.op.clone()).collect::<Vec<_>>());
        }
        operations
    };
    assert_eq!(run(), run());
}
