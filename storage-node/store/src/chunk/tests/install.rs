//! Deltas between two groups with one log: whatever the receiver had, and wherever it lost power, it ends as the sender.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::chunk::SlotChange;
use crate::chunk::tests::harness::{
    Entry, Machine, Random, Taking, bytes_of, group, hash_of, replica, state, write, zero,
};
use crate::device::BLOCK_BYTES;
use crate::group::{InstallError, InstalledSlot, Mutation, ReadError, StoreError};
use crate::ops::DeviceOp;

const SLOTS: u64 = 400;

/// As `log`, with two snapshots of which the first is deleted.
fn log_with_snapshots(seed: u64) -> Vec<Entry> {
    let mut log = log(seed, 45);
    for (index, taking) in [
        (12, Taking::Take(state(12, 9000))),
        (25, Taking::Take(state(25, 9000))),
        (32, Taking::Delete(12)),
        (40, Taking::Take(state(40, 9000))),
    ] {
        let entry = &mut log[index - 1];
        (entry.mutations, entry.snapshot) = (Vec::new(), Some(taking));
    }
    log
}

/// A log of writes and discards, a few of them where the map has to grow.
fn log(seed: u64, entries: u64) -> Vec<Entry> {
    let mut random = Random(seed);
    let mutation = |n: u64, random: &mut Random| -> Mutation {
        let first = if random.chance(8) { (1 << 20) + random.below(40) } else { random.below(400) };
        match random.below(4) {
            0 => zero(first, 1 + random.below(60)),
            _ => {
                let count = 1 + random.below(20);
                write(first, &(0..count).map(|i| n * 100 + i + 1).collect::<Vec<_>>())
            }
        }
    };
    (1..=entries)
        .map(|index| Entry { index, mutations: vec![mutation(index, &mut random)], placed: Vec::new(), snapshot: None })
        .collect()
}

/// A group that has applied the log up to `to`, with a checkpoint there and others on the way.
fn machine(seed: u64, log: &[Entry], to: u64) -> Machine {
    let mut machine = Machine::new(seed, SLOTS);
    machine.create(group(0), replica(1), state(1, 10));
    machine.settle();
    for entry in log.iter().take_while(|entry| entry.index <= to) {
        match &entry.snapshot {
            None => drop(machine.apply(group(0), entry.mutations.clone())),
            Some(Taking::Take(state)) => drop(machine.take_snapshot(group(0), state.clone())),
            Some(Taking::Delete(snapshot)) => machine.delete_snapshot(group(0), *snapshot),
        }
        machine.settle();
        if machine.random.chance(15) {
            machine.checkpoint(group(0), state(entry.index, 10));
            machine.settle();
        }
    }
    machine.checkpoint(group(0), state(to, 5000));
    machine.settle();
    machine
}

struct Delta {
    index: u64,
    hash: u128,
    slots: Vec<InstalledSlot>,
    /// Of the state at the index.
    snapshots: Vec<u64>,
}

/// What a sender with the log up to `index` tells one that asks from `above` on.
fn delta(log: &[Entry], index: u64, above: u64) -> Delta {
    let mut sender = machine(77 + index, log, index);
    let frozen = sender.chunks.freeze(group(0)).unwrap();
    let blocks = sender.models[&group(0)].blocks_at(index);
    let changes = sender.changes(group(0), frozen, above);
    let slots = changes.slots.into_iter().map(|SlotChange { slot, index, present }| {
        let bytes = bytes_of(&blocks, slot * 16, 16);
        let present_blocks = (0..16).filter(|block| present & (1 << block) != 0);
        let data: Vec<u8> =
            present_blocks.flat_map(|block| bytes[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES].to_vec()).collect();
        let checksums = data.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
        InstalledSlot { slot, index, present, data: Bytes::from(data), checksums }
    });
    let snapshots = sender.models[&group(0)].snapshots_at(index);
    Delta { index, hash: frozen.hash.unwrap(), slots: slots.collect(), snapshots }
}

impl Machine {
    fn own(&mut self, above: u64) -> BTreeMap<u64, u64> {
        let mut own = BTreeMap::new();
        let mut from = Some(0);
        while let Some(slot) = from {
            self.chunks.changed_since(group(0), None, above, slot, 0);
            self.collect();
            let answer = loop {
                match self.chunks.take_changes().pop() {
                    Some(answer) => break answer.result.unwrap(),
                    None => self.complete_any(),
                }
            };
            own.extend(answer.slots.into_iter().map(|change| (change.slot, change.index)));
            from = answer.next_slot;
        }
        own
    }

    /// Begins a commit of what was installed.
    fn commit_install(&mut self) {
        let index = self.chunks.checkpoint_index(group(0)).unwrap();
        let model = self.models.get_mut(&group(0)).unwrap();
        let last = model.states.last().unwrap().clone();
        model.states.push(last);
        let hard_state = state(index, 0).hard_state;
        self.chunks.commit_install(group(0), index * 10, hard_state).unwrap();
        self.collect();
    }

    /// Begins the end; what follows is checked as any group of that log would be.
    fn finish_install(&mut self, delta: &Delta, log: &[Entry]) -> Result<(), InstallError> {
        let end = state(delta.index, 9000);
        self.chunks.finish_install(
            group(0),
            delta.index,
            delta.index * 10,
            end.clone(),
            delta.hash,
            &delta.snapshots,
        )?;
        let model = self.models.get_mut(&group(0)).unwrap();
        model.states.push((delta.index, end));
        model.entries = log.iter().take_while(|entry| entry.index <= delta.index).cloned().collect();
        model.blocks = model.blocks_at(delta.index);
        self.collect();
        Ok(())
    }

    /// The slots that differ, in parts of `part`; the first `completions` operations complete. How many are done.
    fn install(&mut self, delta: &Delta, log: &[Entry], part: usize, mut completions: u64) -> (usize, bool) {
        let own = self.own(0);
        let differing: Vec<_> = delta.slots.iter().filter(|slot| own.get(&slot.slot) != Some(&slot.index)).collect();
        let mut settle = |machine: &mut Machine| {
            machine.collect();
            while !machine.in_flight.is_empty() && completions > 0 {
                machine.complete_any();
                completions -= 1;
            }
            machine.in_flight.is_empty() && completions > 0
        };
        for slots in differing.chunks(part) {
            for slot in slots {
                self.chunks.install(group(0), delta.index, (*slot).clone()).unwrap();
            }
            self.commit_install();
            if !settle(self) {
                return (differing.len(), false);
            }
        }
        self.finish_install(delta, log).unwrap();
        (differing.len(), settle(self))
    }
}

#[test]
fn a_delta_makes_the_receiver_the_sender_and_copies_what_differs_only() {
    for seed in 0..20 {
        let log = log(seed, 60);
        let (base, index) = (Random(seed).below(40), 45);
        let mut receiver = machine(seed, &log, base);
        let delta = delta(&log, index, base);
        let (copied, done) = receiver.install(&delta, &log, 5, u64::MAX);
        assert!(done && copied == delta.slots.len(), "a receiver at its base has none of it");
        let blocks = receiver.models[&group(0)].blocks_at(index);
        assert_eq!(receiver.chunks.map_hash(group(0)), Some((index, hash_of(&blocks))));
        for first in (0..640).step_by(64) {
            receiver.read(group(0), first, 64);
        }
        receiver.settle();
        receiver.check_leaks();
        // It goes on as any other: the rest of the log, a checkpoint, a crash.
        for entry in &log[index as usize..] {
            receiver.apply(group(0), entry.mutations.clone());
        }
        receiver.checkpoint(group(0), state(60, 0));
        receiver.crash();
        receiver.settle();
        receiver.check_leaks();
        assert_eq!(receiver.failures, []);
    }
}

#[test]
fn deltas_to_each_snapshot_and_then_to_the_end_bring_the_snapshots() {
    for seed in 0..10 {
        let log = log_with_snapshots(seed);
        // As a rebuild of one that has everything up to 12, or nothing.
        let base = if seed % 2 == 0 { 3 } else { 14 };
        let mut receiver = machine(seed, &log, base);
        for index in [12, 25, 40, 43].into_iter().filter(|index| *index > base) {
            let delta = delta(&log, index, receiver.models[&group(0)].last());
            assert!(receiver.install(&delta, &log, 5, u64::MAX).1);
            assert_eq!(receiver.snapshots(group(0)), delta.snapshots, "as of {index}");
            for snapshot in delta.snapshots {
                receiver.read_snapshot(group(0), snapshot, 0, 256);
                receiver.read_snapshot(group(0), snapshot, 256, 256);
            }
            receiver.settle();
            receiver.check_leaks();
            receiver.crash();
            receiver.settle();
            receiver.check_leaks();
        }
        assert_eq!(receiver.snapshots(group(0)), [25, 40]);
        assert_eq!(receiver.failures, []);
    }
}

/// The sender has none of them any more, and the next of its states does not name them.
#[test]
fn older_snapshots_that_are_deleted_since_do_not_hold_up_one_that_is_brought_twice() {
    let mut log = log_with_snapshots(2);
    (log[11].snapshot, log[31].snapshot) = (None, None);
    let mut receiver = machine(2, &log, 3);
    let mut first = delta(&log, 25, 3);
    first.snapshots = vec![12, 25];
    assert!(receiver.install(&first, &log, 5, u64::MAX).1);
    assert_eq!(receiver.snapshots(group(0)), [25]);
    let next = delta(&log, 43, 25);
    for slot in &next.slots[..2] {
        receiver.chunks.install(group(0), 43, slot.clone()).unwrap();
    }
    receiver.commit_install();
    receiver.settle();
    let mut again = delta(&log, 25, 0);
    again.snapshots = vec![12, 25];
    let known: BTreeMap<u64, u64> = again.slots.iter().map(|slot| (slot.slot, slot.index)).collect();
    for slot in receiver.own(0).into_keys().filter(|slot| !known.contains_key(slot)) {
        let gone = InstalledSlot { slot, index: 0, present: 0, data: Bytes::new(), checksums: [].into() };
        receiver.chunks.install(group(0), 43, gone).unwrap();
    }
    assert!(receiver.install(&again, &log, 5, u64::MAX).1);
    assert_eq!(receiver.snapshots(group(0)), [25]);
    receiver.check_leaks();
}

#[test]
fn an_install_without_a_snapshot_that_the_state_names_does_not_end() {
    let log = log_with_snapshots(1);
    let mut receiver = machine(1, &log, 3);
    let delta = delta(&log, 43, 3);
    for slot in &delta.slots {
        receiver.chunks.install(group(0), 43, slot.clone()).unwrap();
    }
    receiver.commit_install();
    receiver.settle();
    assert_eq!(receiver.finish_install(&delta, &log), Err(InstallError::Snapshots { first: 25, count: 2 }));
}

#[test]
fn a_crash_at_any_operation_of_an_install_leaves_before_between_or_after() {
    let mut ends = [0; 3];
    for seed in 0..6 {
        let log = log(seed, 40);
        let first = delta(&log, 20, 6);
        for completions in 0.. {
            let mut receiver = machine(seed, &log, 6);
            let (all, finished) = receiver.install(&first, &log, 4, completions);
            let model = receiver.models[&group(0)].clone();
            let ops: Vec<DeviceOp> = receiver.in_flight.drain(..).map(|in_flight| in_flight.op).collect();
            receiver.random = Random(seed * 1000 + completions);
            receiver.disk = receiver.disk.crashed(&ops, &mut receiver.random);
            let found = receiver.reopen().remove(0);
            assert_eq!(found.damage, None);
            assert!(model.states.contains(&(found.index, found.state.clone())), "the state is of the index");
            let end = match (found.index, found.installing) {
                (6, 0) => 0,
                (6, 20) => 1,
                (20, 0) => 2,
                other => panic!("{other:?}"),
            };
            ends[end] += 1;
            assert!(!finished || end == 2, "a finished install stays");
            let full = Entry { index: 0, mutations: Vec::new(), placed: Vec::new(), snapshot: None };
            let whole: Vec<Entry> = log.iter().take(found.index as usize).cloned().collect();
            let model = receiver.models.get_mut(&group(0)).unwrap();
            model.states = vec![(found.index, found.state)];
            model.entries = if whole.is_empty() { vec![full] } else { whole };
            model.blocks = model.blocks_at(found.index);
            receiver.read(group(0), 0, 128);
            receiver.settle();
            receiver.check_leaks();
            if end == 1 {
                assert_eq!(receiver.failures, [ReadError::Installing]);
                assert_eq!(receiver.chunks.map_hash(group(0)), None);
                assert_eq!(receiver.chunks.freeze(group(0)), Err(StoreError::Busy));
                let refused = receiver.chunks.checkpoint(group(0), 7, 70, state(7, 0));
                assert_eq!(refused, Err(StoreError::Installing));
                receiver.failures.clear();
            }
            assert_eq!(receiver.failures, []);
            // It goes on with the same delta, or with a later one, and copies nothing twice.
            let (next, least) =
                if completions % 2 == 0 && end < 2 { (&first, all) } else { (&delta(&log, 35, 6), 1000) };
            let (copied, done) = receiver.install(next, &log, 3, u64::MAX);
            assert!(done && copied <= least, "{copied} of {least}");
            assert!(end != 1 || next.index != 20 || copied < all, "what is in the map is not copied again");
            receiver.crash();
            receiver.settle();
            receiver.check_leaks();
            assert_eq!(receiver.failures, []);
            if finished {
                break;
            }
        }
    }
    assert!(ends.iter().all(|count| *count >= 12), "every outcome was seen: {ends:?}");
}

/// The end of a delta of which one slot, the n-th, did not come.
fn without_one_slot(n: usize) -> Result<(), InstallError> {
    let log = log(3, 40);
    let mut receiver = machine(1, &log, 10);
    let mut short = delta(&log, 40, 10);
    let data: Vec<usize> = (0..short.slots.len()).filter(|slot| short.slots[*slot].present != 0).collect();
    short.slots.remove(data[n % data.len()]);
    for slot in &short.slots {
        receiver.chunks.install(group(0), 40, slot.clone()).unwrap();
    }
    receiver.commit_install();
    receiver.settle();
    receiver.finish_install(&short, &log)?;
    receiver.settle();
    Ok(())
}

#[test]
fn a_map_that_is_not_the_senders_is_refused_and_can_still_be_completed() {
    for n in 0..5 {
        assert!(matches!(without_one_slot(n), Err(InstallError::Hash { .. })));
    }
    let log = log(3, 40);
    let mut receiver = machine(1, &log, 10);
    let whole = delta(&log, 40, 0);
    let part = Delta { slots: whole.slots[..3].to_vec(), ..whole };
    let whole = delta(&log, 40, 0);
    for slot in &part.slots {
        receiver.chunks.install(group(0), 40, slot.clone()).unwrap();
    }
    assert_eq!(receiver.finish_install(&whole, &log), Err(StoreError::Busy.into()), "slots are not committed");
    receiver.commit_install();
    receiver.settle();
    assert!(matches!(receiver.finish_install(&whole, &log), Err(InstallError::Hash { .. })));
    assert!(receiver.install(&whole, &log, 50, u64::MAX).1);
    receiver.settle();
    receiver.check_leaks();
}

#[test]
fn nothing_is_installed_over_entries_that_are_not_checkpointed() {
    let log = log(4, 12);
    let mut receiver = machine(1, &log, 10);
    let slot = delta(&log, 12, 0).slots.remove(0);
    receiver.apply(group(0), log[10].mutations.clone());
    assert_eq!(receiver.chunks.install(group(0), 12, slot.clone()), Err(StoreError::Busy));
    receiver.checkpoint(group(0), state(11, 0));
    assert_eq!(receiver.chunks.install(group(0), 12, slot.clone()), Err(StoreError::Busy), "it is under way");
    receiver.settle();
    assert_eq!(receiver.chunks.install(group(0), 12, slot), Ok(()));
}

#[test]
fn tombstones_forgotten_too_early_are_caught_by_the_hash() {
    // Written at 1 by both; the sender discards it at 2 and forgets that it did, though the receiver is at 1.
    let log = [
        Entry { index: 1, mutations: vec![write(0, &[1, 2]), write(64, &[3])], placed: Vec::new(), snapshot: None },
        Entry { index: 2, mutations: vec![zero(0, 16)], placed: Vec::new(), snapshot: None },
        Entry { index: 3, mutations: vec![write(65, &[4])], placed: Vec::new(), snapshot: None },
    ];
    let mut sender = machine(1, &log, 2);
    sender.chunks.forget_tombstones(group(0), 3);
    sender.apply(group(0), log[2].mutations.clone());
    sender.checkpoint(group(0), state(3, 0));
    sender.settle();
    let frozen = sender.chunks.freeze(group(0)).unwrap();
    assert_eq!(sender.changes(group(0), frozen, 1).slots.len(), 1, "the tombstone is not told");

    let mut receiver = machine(2, &log, 1);
    let mut early = delta(&log, 3, 1);
    early.slots.retain(|slot| slot.slot != 0);
    for slot in &early.slots {
        receiver.chunks.install(group(0), 3, slot.clone()).unwrap();
    }
    receiver.commit_install();
    receiver.settle();
    assert!(matches!(receiver.finish_install(&early, &log), Err(InstallError::Hash { .. })));
    // The full comparison drops what the sender does not know.
    let gone = InstalledSlot { slot: 0, index: 0, present: 0, data: Bytes::new(), checksums: [].into() };
    receiver.chunks.install(group(0), 3, gone).unwrap();
    receiver.commit_install();
    receiver.settle();
    receiver.finish_install(&early, &log).unwrap();
    receiver.settle();
    receiver.check_leaks();
}

#[cfg(feature = "planted")]
#[test]
fn a_delta_taken_without_its_hash_is_noticed() {
    holdfast_planted::plant(Some(holdfast_planted::Bug::InstallAnyMap));
    let outcome = without_one_slot(0);
    holdfast_planted::plant(None);
    assert_eq!(outcome, Ok(()), "the check is what refuses it");
}
