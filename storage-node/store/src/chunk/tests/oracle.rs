//! Random work, crashes and restarts; every read is held against the model.

use std::collections::BTreeMap;

use holdfast_id::GroupId;

use crate::chunk::FREEZES_MAX;
use crate::chunk::tests::harness::{GROUPS_MAX, Machine, Random, group, replica, state, write, zero};
use crate::group::StoreError;

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
            let bytes = [0, 100, 3608, 3609, 200_000][machine.random.below(5) as usize];
            machine.create(id, replica(*next_replica), state(u64::from(*next_replica), bytes));
        }
        10..15 if live => {
            let first = first_block(machine);
            let count = 10 + machine.random.below(60);
            let numbers = machine.numbers(count);
            machine.apply_placed(id, first, &numbers);
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
            let bytes = [0, 3608, 70_000][machine.random.below(3) as usize];
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
            machine.models.get_mut(&id).unwrap().forgotten = below;
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
        70 if live && !machine.chunks.groups[&id].committing && machine.models[&id].frozen.len() < FREEZES_MAX => {
            match machine.chunks.freeze(id) {
                Ok(frozen) => machine.models.get_mut(&id).unwrap().frozen.push(frozen),
                Err(error) => {
                    let header = &machine.chunks.groups[&id].header;
                    assert!(error == StoreError::Busy && header.write_back_to > header.index, "{error}");
                }
            }
        }
        71 if live && !machine.models[&id].frozen.is_empty() => {
            let frozen = &mut machine.models.get_mut(&id).unwrap().frozen;
            let position = machine.random.below(frozen.len() as u64) as usize;
            let thawed = frozen.remove(position);
            machine.chunks.thaw(id, thawed.id);
        }
        72..76 if live && !machine.models[&id].frozen.is_empty() => {
            let frozen = &machine.models[&id].frozen;
            let frozen = frozen[machine.random.below(frozen.len() as u64) as usize];
            let (first, count) = (first_block(machine), 1 + machine.random.below(256) as u32);
            machine.read_frozen(id, frozen, first, count);
        }
        76 if live && !machine.models[&id].frozen.is_empty() => check_changes(machine, id),
        77 | 78 if live && machine.models[&id].snapshots_at(u64::MAX).len() < 6 => {
            let bytes = [0, 65_536][machine.random.below(2) as usize];
            let tag = machine.next_number;
            machine.take_snapshot(id, state(tag, bytes));
        }
        79 if live => {
            let snapshots = machine.models[&id].snapshots_at(u64::MAX);
            if !snapshots.is_empty() {
                let snapshot = snapshots[machine.random.below(snapshots.len() as u64) as usize];
                machine.delete_snapshot(id, snapshot);
            }
        }
        80..83 if live => {
            let snapshots = machine.snapshots(id);
            if !snapshots.is_empty() {
                let snapshot = snapshots[machine.random.below(snapshots.len() as u64) as usize];
                let (first, count) = (first_block(machine), 1 + machine.random.below(256) as u32);
                machine.read_snapshot(id, snapshot, first, count);
            }
        }
        _ => machine.complete_any(),
    }
    machine.collect();
    assert!(!machine.failed);
    assert_eq!(machine.failures, []);
}

/// Whatever differs between an earlier index and a frozen map is told, and nothing that did not change.
fn check_changes(machine: &mut Machine, id: GroupId) {
    let model = machine.models[&id].clone();
    let frozen = model.frozen[machine.random.below(model.frozen.len() as u64) as usize];
    let above = machine.random.below(frozen.index + 1).max(model.forgotten);
    let changes = machine.changes(id, frozen, above);
    let (before, after) = (model.blocks_at(above), model.blocks_at(frozen.index));
    for pair in changes.slots.windows(2) {
        assert!(pair[0].slot < pair[1].slot);
    }
    let told: BTreeMap<u64, u16> = changes.slots.iter().map(|change| (change.slot, change.present)).collect();
    for block in before.keys().chain(after.keys()) {
        let differs = before.get(block) != after.get(block);
        assert!(!differs || above >= frozen.index || told.contains_key(&(block / 16)), "block {block} of {id}");
    }
    for change in &changes.slots {
        assert!(change.index > above && change.index <= frozen.index);
        let blocks = change.slot * 16..(change.slot + 1) * 16;
        let present =
            blocks.filter(|block| after.contains_key(block)).fold(0u16, |mask, block| mask | 1 << (block % 16));
        assert_eq!(change.present, present, "slot {} of {id}", change.slot);
    }
}

#[test]
fn random_work_reads_as_the_oracle_says_through_crashes() {
    for seed in 0..20 {
        let mut machine = Machine::new(seed, 900);
        let mut next_replica = 0;
        for _ in 0..1400 {
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

#[test]
fn the_hash_of_a_map_is_that_of_its_content_whenever_it_was_written_back() {
    let mut random = Random(5);
    let mutations: Vec<_> = (0..60u64)
        .map(|n| {
            let first = random.below(300);
            if n % 4 == 3 { zero(first, 1 + random.below(30)) } else { write(first, &[n + 1, n + 2]) }
        })
        .collect();
    let hash = |every: usize| {
        let mut machine = Machine::new(1, 200);
        machine.create(group(0), replica(1), state(1, 0));
        machine.settle();
        for (n, mutation) in mutations.iter().enumerate() {
            machine.apply(group(0), vec![mutation.clone()]);
            if n % every == every - 1 {
                machine.checkpoint(group(0), state(2, 0));
                machine.settle();
            }
        }
        machine.chunks.map_hash(group(0)).unwrap()
    };
    assert_eq!(hash(60), hash(4));
    assert_eq!(hash(60), hash(5));
    assert_ne!(hash(60).1, 0);
}
