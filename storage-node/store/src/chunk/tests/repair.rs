//! What rots is taken from another replica: at once for reads, for good with the next checkpoint.

use std::collections::BTreeSet;

use crate::chunk::cache::PageCache;
use crate::chunk::layout::{Place, SLOT_BLOCKS};
use crate::chunk::page::{LEAF_BLOCKS, LEAF_SLOTS};
use crate::chunk::tests::harness::{Blocks, Machine, Random, bytes_of, group, hash_of, replica, state, write, zero};
use crate::chunk::{Mending, RepairEvent, SlotCopy};
use crate::device::BLOCK_BYTES;
use crate::group::ReadError;
use crate::ops::{DeviceError, DeviceOp};

/// The slot as a replica has it that has applied all up to an index.
fn copy_at(machine: &Machine, slot: u64, index: u64) -> SlotCopy {
    copy_of(&machine.models[&group(0)].blocks_at(index), slot, index)
}

fn copy_of(blocks: &Blocks, slot: u64, index: u64) -> SlotCopy {
    let first = slot * SLOT_BLOCKS;
    let present = (0..SLOT_BLOCKS).filter(|block| blocks.contains_key(&(first + block)));
    let present: u16 = present.fold(0, |mask, block| mask | 1 << block);
    let all = bytes_of(blocks, first, SLOT_BLOCKS as u32);
    let held = all.chunks(BLOCK_BYTES).enumerate().filter(|(block, _)| present & (1 << block) != 0);
    let data: Vec<u8> = held.flat_map(|(_, block)| block.to_vec()).collect();
    SlotCopy { index, present, bad: 0, data: data.into() }
}

fn mend(machine: &mut Machine, slot: u64, copy: SlotCopy) -> Mending {
    let applied = machine.models[&group(0)].last();
    machine.chunks.mend(group(0), slot, copy, applied, slot);
    machine.settle();
    let events = machine.chunks.take_repair_events();
    let mended = |event: &RepairEvent| match event {
        RepairEvent::Mended { token, result } if *token == slot => Some(*result),
        _ => None,
    };
    events.iter().find_map(mended).expect("every copy is answered")
}

/// Slots told to be corrupt since the last call.
fn corrupt(machine: &mut Machine) -> BTreeSet<u64> {
    let slots = machine.chunks.take_repair_events().into_iter().filter_map(|event| match event {
        RepairEvent::Corrupt { group: found, slots } => {
            assert_eq!(found, group(0));
            Some(slots)
        }
        _ => None,
    });
    slots.flatten().collect()
}

/// Reads until it succeeds, with the other replica's help. Returns what had to be repaired.
fn read_healing(machine: &mut Machine, first: u64, count: u32) -> BTreeSet<u64> {
    let mut healed = BTreeSet::new();
    for _ in 0..=2 * u64::from(count) {
        machine.read(group(0), first, count);
        machine.settle();
        match machine.failures.pop() {
            None => return healed,
            Some(ReadError::Corrupt { .. }) => {}
            Some(error) => panic!("{error}"),
        }
        let last = machine.models[&group(0)].last();
        for slot in corrupt(machine) {
            let copy = copy_at(machine, slot, last);
            let result = mend(machine, slot, copy);
            assert!(matches!(result, Mending::Mended { missing: 0, .. }), "{result:?}");
            healed.insert(slot);
        }
    }
    panic!("the read never succeeds");
}

/// Three leaves of data, checkpointed.
fn prepared(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 300);
    machine.create(group(0), replica(1), state(1, 100_000));
    machine.settle();
    for leaf in 0..3 {
        let numbers = machine.numbers(40);
        machine.apply(group(0), vec![write(leaf * LEAF_BLOCKS + 8, &numbers)]);
    }
    machine.checkpoint(group(0), state(2, 100_000));
    machine.settle();
    machine
}

fn leaf(machine: &mut Machine, number: u64) -> Place {
    machine.read(group(0), number * LEAF_BLOCKS, 1);
    machine.settle();
    let root = machine.chunks.groups[&group(0)].header.root.page.unwrap();
    let page = machine.chunks.cache.get(root.place).expect("the root was used last");
    page.inner().children[number as usize].unwrap().page.place
}

fn slot_place(machine: &mut Machine, slot: u64) -> Place {
    let place = leaf(machine, slot / LEAF_SLOTS as u64);
    let page = machine.chunks.cache.get(place).expect("just read");
    page.leaf().slots[(slot % LEAF_SLOTS as u64) as usize].place
}

fn rot(machine: &Machine, place: Place) {
    machine.disk.rot(machine.chunks.layout.offset(place));
}

fn read_fails(machine: &mut Machine) {
    machine.read(group(0), 16, 16);
    machine.settle();
    assert_eq!(machine.failures.pop(), Some(ReadError::Corrupt { first_block: 16, count: 16 }));
}

fn finish(machine: &mut Machine) {
    machine.checkpoint(group(0), state(3, 100_000));
    machine.settle();
}

#[test]
fn a_rotten_block_is_read_right_at_once_and_moves_to_a_fresh_slot() {
    let mut machine = prepared(1);
    let old = slot_place(&mut machine, 1);
    for block in [0, 3, 4] {
        rot(&machine, Place(old.0 + block));
    }
    assert_eq!(read_healing(&mut machine, 0, 64), BTreeSet::from([1]));
    assert_eq!(machine.wanted, [group(0)], "the checkpoint is asked for");
    let counters = machine.chunks.counters();
    assert_eq!((counters.corrupt_blocks, counters.repaired_blocks), (3, 16));
    finish(&mut machine);
    assert_ne!(slot_place(&mut machine, 1), old);
    machine.check_leaks();
    machine.crash();
}

#[test]
fn blocks_that_changed_meanwhile_are_not_taken_from_the_copy() {
    let mut machine = prepared(2);
    let old = slot_place(&mut machine, 1);
    for block in 0..16 {
        rot(&machine, Place(old.0 + block));
    }
    // The leaf is at hand, so the copy comes before the checkpoint's end.
    machine.chunks.cache = PageCache::new(100);
    read_fails(&mut machine);
    let index = machine.models[&group(0)].last();
    let copy = copy_at(&machine, 1, index);
    // One before, one while, and one after the copy is taken, with a checkpoint under way in between.
    let numbers = machine.numbers(3);
    machine.apply(group(0), vec![write(17, &numbers[..1])]);
    machine.checkpoint(group(0), state(3, 10));
    machine.apply(group(0), vec![write(18, &numbers[1..2]), zero(20, 2)]);
    machine.collect();
    machine.complete(0);
    machine.chunks.mend(group(0), 1, copy, 0, 0);
    machine.apply(group(0), vec![write(19, &numbers[2..])]);
    machine.settle();
    let mended = RepairEvent::Mended { token: 0, result: Mending::Mended { blocks: 12, missing: 0 } };
    assert!(machine.chunks.take_repair_events().contains(&mended));
    assert_eq!(read_healing(&mut machine, 0, 64), BTreeSet::new());
    finish(&mut machine);
    assert_eq!(read_healing(&mut machine, 0, 64), BTreeSet::new());
    machine.check_leaks();
    machine.crash();
}

#[test]
fn a_slot_keeps_the_index_of_its_latest_change_when_older_blocks_are_mended() {
    let mut machine = prepared(3);
    let old = slot_place(&mut machine, 1);
    rot(&machine, Place(old.0 + 5));
    let numbers = machine.numbers(1);
    let changed = machine.apply(group(0), vec![write(16, &numbers)]);
    let copy = copy_at(&machine, 1, changed);
    machine.checkpoint(group(0), state(3, 10));
    machine.collect();
    machine.chunks.mend(group(0), 1, copy, 0, 0);
    machine.settle();
    finish(&mut machine);
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    let changes = machine.changes(group(0), frozen, changed - 1);
    assert_eq!(changes.slots.iter().map(|change| (change.slot, change.index)).collect::<Vec<_>>(), [(1, changed)]);
}

#[test]
fn a_rotten_page_is_rebuilt_from_the_other_replica() {
    for level in [0, 1] {
        let mut machine = prepared(4);
        let place = match level {
            0 => leaf(&mut machine, 1),
            _ => machine.chunks.groups[&group(0)].header.root.page.unwrap().place,
        };
        rot(&machine, place);
        machine.reopen();
        assert_eq!(machine.chunks.map_hash(group(0)).is_some(), level == 0 || level == 1, "the counts are of before");
        let healed = read_healing(&mut machine, 256, 256);
        assert_eq!(healed, (16..32).collect());
        read_healing(&mut machine, 0, 256);
        read_healing(&mut machine, 512, 256);
        finish(&mut machine);
        // What else lay below the root, nobody has asked for: those leaves are still marked as lost.
        if level == 0 {
            machine.reopen();
            assert!(machine.chunks.map_hash(group(0)).is_some(), "nothing is lost, so it is counted again");
            machine.crash();
            machine.check_leaks();
        } else {
            machine.reopen();
            assert_eq!(read_healing(&mut machine, 0, 256), BTreeSet::new());
            assert_eq!(read_healing(&mut machine, 512, 256), BTreeSet::new());
        }
    }
}

#[test]
fn a_copy_of_another_time_or_another_content_is_refused() {
    let mut machine = prepared(5);
    let old = slot_place(&mut machine, 1);
    rot(&machine, Place(old.0 + 1));
    let last = machine.models[&group(0)].last();
    let stale = copy_at(&machine, 1, last - 1);
    assert_eq!(mend(&mut machine, 1, stale), Mending::Stale);
    let early = SlotCopy { index: last + 1, ..copy_at(&machine, 1, last) };
    assert_eq!(mend(&mut machine, 1, early), Mending::Behind);
    let mut wrong = copy_at(&machine, 1, last);
    let mut bytes = wrong.data.to_vec();
    bytes[5] ^= 1;
    wrong.data = bytes.into();
    assert_eq!(mend(&mut machine, 1, wrong), Mending::Mismatch);
    let right = copy_at(&machine, 1, last);
    let fewer = SlotCopy { present: right.present & !1, data: right.data.slice(BLOCK_BYTES..), ..right.clone() };
    assert_eq!(mend(&mut machine, 1, fewer), Mending::Mismatch);
    // Two replicas that are corrupt in different blocks have all of them together.
    let partly =
        SlotCopy { bad: 1 << 7, data: [&right.data[..7 * 4096], &right.data[8 * 4096..]].concat().into(), ..right };
    assert_eq!(mend(&mut machine, 1, partly), Mending::Mended { blocks: 15, missing: 1 << 7 });
    assert_eq!(read_healing(&mut machine, 0, 64), BTreeSet::new());
    finish(&mut machine);
    machine.check_leaks();
    machine.crash();
}

#[test]
fn a_crash_at_any_operation_of_the_repair_leaves_what_was_right_or_what_is() {
    let (mut before, mut after) = (0, 0);
    for seed in 0..8 {
        for completions in 0.. {
            let mut machine = prepared(seed);
            let old = slot_place(&mut machine, 17);
            rot(&machine, Place(old.0 + 2));
            read_healing(&mut machine, 256, 64);
            let numbers = machine.numbers(2);
            machine.apply(group(0), vec![write(275, &numbers)]);
            machine.checkpoint(group(0), state(3, 70_000));
            machine.collect();
            for _ in 0..completions {
                machine.complete_any();
            }
            let finished = machine.in_flight.is_empty();
            machine.random = Random(seed * 1000 + completions);
            let ops: Vec<DeviceOp> = machine.in_flight.drain(..).map(|in_flight| in_flight.op).collect();
            machine.disk = machine.disk.crashed(&ops, &mut machine.random);
            let found = machine.reopen();
            let entries = machine.models[&group(0)].entries.clone();
            for entry in entries.into_iter().filter(|entry| entry.index > found[0].index) {
                machine.chunks.apply(group(0), entry.index, entry.mutations);
            }
            let kept = (found[0].index, found[0].state.clone());
            machine.models.get_mut(&group(0)).unwrap().states = vec![kept];
            let healed = read_healing(&mut machine, 256, 64);
            if found[0].index == 3 {
                before += 1;
                assert_eq!(healed, BTreeSet::from([17]), "the damage is found again");
            } else {
                after += 1;
                assert_eq!(healed, BTreeSet::new());
            }
            finish(&mut machine);
            machine.check_leaks();
            machine.crash();
            if finished {
                assert_eq!(found[0].index, 4);
                break;
            }
        }
    }
    assert!(before > 20 && after >= 8, "both were seen: {before} {after}");
}

#[test]
fn an_unreadable_sector_costs_its_block_alone() {
    let mut machine = prepared(6);
    let old = slot_place(&mut machine, 1);
    let bad = machine.chunks.layout.offset(Place(old.0 + 9));
    let fail = |machine: &mut Machine| loop {
        machine.collect();
        let Some(n) = machine.in_flight.iter().position(|in_flight| match in_flight.op {
            DeviceOp::Read { offset, length, .. } => (offset..offset + u64::from(length)).contains(&bad),
            _ => false,
        }) else {
            if machine.in_flight.is_empty() {
                return;
            }
            machine.complete_any();
            continue;
        };
        let DeviceOp::Read { id, offset, length, .. } = machine.in_flight.remove(n).op else { unreachable!() };
        let reason = "a bad sector".to_owned();
        let error = DeviceError::Read { offset, length: u64::from(length), reason };
        machine.chunks.on_completion(id, Err(error));
    };
    machine.read(group(0), 0, 64);
    fail(&mut machine);
    assert_eq!(machine.failures.pop(), Some(ReadError::Corrupt { first_block: 25, count: 1 }));
    // A checkpoint that has to copy the slot keeps its other blocks.
    machine.chunks.freeze(group(0)).unwrap();
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(16, &numbers)]);
    machine.checkpoint(group(0), state(3, 10));
    fail(&mut machine);
    assert!(corrupt(&mut machine).contains(&1));
    assert_ne!(slot_place(&mut machine, 1), old);
    machine.read(group(0), 0, 25);
    machine.read(group(0), 26, 64);
    machine.settle();
    assert_eq!(machine.failures, []);
    assert_eq!(read_healing(&mut machine, 16, 16), BTreeSet::from([1]));
}

/// A pass; returns what it read.
fn scrub(machine: &mut Machine) -> u64 {
    machine.chunks.scrub_from_start();
    let mut read = 0;
    loop {
        machine.chunks.scrub_step();
        machine.settle();
        let events = machine.chunks.take_repair_events();
        let step = events.iter().find_map(|event| match event {
            RepairEvent::Scrubbed { bytes, finished } => Some((*bytes, *finished)),
            _ => None,
        });
        let (bytes, finished) = step.expect("a step is answered");
        read += bytes;
        let last = machine.models[&group(0)].last();
        for event in events {
            let RepairEvent::Corrupt { slots, .. } = event else { continue };
            for slot in slots {
                let copy = copy_at(machine, slot, last);
                let result = mend(machine, slot, copy);
                assert!(matches!(result, Mending::Mended { missing: 0, .. }), "{result:?}");
            }
        }
        if finished {
            return read;
        }
    }
}

#[test]
fn a_scrub_reads_all_there_is_and_finds_nothing_where_nothing_is_wrong() {
    let mut machine = prepared(7);
    let (blocks, pages, headers, state) = (120, 4, 2, 100_000u64.div_ceil(4096));
    assert_eq!(scrub(&mut machine), (blocks + pages + headers + state) * 4096);
    assert_eq!(machine.chunks.counters(), Default::default());
    assert_eq!(machine.wanted, []);
    // And so with all of it hidden by the overlay, but for the data.
    let numbers = machine.numbers(768);
    for (i, part) in numbers.chunks(256).enumerate() {
        machine.apply(group(0), vec![write(i as u64 * 256, part)]);
    }
    assert_eq!(scrub(&mut machine), (pages + headers + state) * 4096);
}

#[test]
fn a_scrub_finds_every_kind_of_rot_and_all_of_it_is_repaired() {
    for kind in 0..6 {
        for cached in [false, true] {
            let mut machine = prepared(8);
            let header = machine.chunks.groups[&group(0)].header.clone();
            let table = |generation| machine.chunks.layout.header_offset(header.entry, generation);
            let offset = match kind {
                0 => table(header.generation),
                1 => table(header.generation + 1),
                2 => {
                    let crate::chunk::header::StateHome::Slots { places, .. } = &header.state else { panic!() };
                    machine.chunks.layout.offset(places[1])
                }
                3 => machine.chunks.layout.offset(header.root.page.unwrap().place),
                4 => {
                    let place = leaf(&mut machine, 2);
                    machine.chunks.layout.offset(place)
                }
                _ => {
                    let place = slot_place(&mut machine, 33);
                    machine.chunks.layout.offset(Place(place.0 + 6))
                }
            };
            if !cached {
                machine.chunks.cache = PageCache::new(if kind == 3 { 4 } else { 3 });
            }
            machine.disk.rot(offset);
            scrub(&mut machine);
            let counters = machine.chunks.counters();
            let found = [counters.corrupt_headers, counters.corrupt_pages, counters.corrupt_blocks];
            let expected: [bool; 3] = [kind < 3, kind == 3 || kind == 4, kind == 5 || !cached && kind == 4];
            assert_eq!(found.map(|count| count > 0)[..2], expected[..2], "kind {kind}: {counters:?}");
            assert_eq!(machine.wanted, [group(0)], "kind {kind} is repaired by a checkpoint");
            machine.wanted.clear();
            finish(&mut machine);
            // After it the disk is whole again, and says so. A lost root leaves 253 empty leaves that are not known to
            // be so before the same pass has asked for each of them.
            let before = machine.chunks.counters();
            scrub(&mut machine);
            assert_eq!(machine.chunks.counters(), before, "kind {kind}");
            let (index, hash) = machine.chunks.map_hash(group(0)).expect("the pass has counted what was lost");
            assert_eq!(hash, hash_of(&machine.models[&group(0)].blocks_at(index)));
            machine.crash();
            machine.check_leaks();
        }
    }
}
