//! Promises of space: what was promised is always there.

use crate::chunk::space::blocks_for_payload;
use crate::chunk::tests::harness::{Machine, group, replica, state, write, zero};
use crate::group::StoreError;

#[test]
fn the_bound_covers_any_place_of_a_payload() {
    for (blocks, slots, leaves) in [(1, 1, 1), (2, 2, 2), (16, 2, 2), (17, 2, 2), (18, 3, 2), (256, 17, 2)] {
        assert_eq!(blocks_for_payload(blocks), slots * 16 + leaves * 5);
    }
    assert_eq!(blocks_for_payload(0), 0);
}

#[test]
fn a_disk_filled_to_refusal_still_writes_back_everything_and_frees_it_again() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 128);
        machine.create(group(0), replica(1), state(1, 0));
        machine.settle();
        let mut at = 0;
        let mut refused = 0;
        while refused < 3 {
            let count = 1 + machine.random.below(100);
            let index = machine.models[&group(0)].last() + 1;
            match machine.chunks.reserve(group(0), index, count) {
                Ok(()) => {
                    let numbers = machine.numbers(count);
                    machine.apply(group(0), vec![write(at, &numbers)]);
                    at += count + machine.random.below(40);
                }
                Err(error) => {
                    assert_eq!(error, StoreError::Full);
                    machine.collect();
                    // Only the first refusal is worth a checkpoint: it turns bounds into facts.
                    machine.checkpoint(group(0), state(2, 0));
                    machine.settle();
                    refused += 1;
                }
            }
            machine.collect();
        }
        assert!(!machine.failed);
        assert!(machine.wanted.contains(&group(0)), "a full disk asks for a checkpoint first");
        assert_eq!(machine.chunks.usage().data_reserved, 0);
        machine.check_leaks();
        machine.crash();
        // Discards and their checkpoints live on the reserve.
        machine.apply(group(0), vec![zero(0, 1 << 14)]);
        machine.checkpoint(group(0), state(3, 0));
        machine.settle();
        machine.check_leaks();
        let used = machine.chunks.usage().data_used;
        assert!(used <= 2 * 65536, "the map's own slabs are left, not {used}");
        machine.chunks.forget_tombstones(group(0), u64::MAX);
        machine.apply(group(0), vec![write(1, &[7]), zero(0, 1 << 14)]);
        machine.checkpoint(group(0), state(3, 0));
        machine.settle();
        assert_eq!(machine.chunks.usage().data_used, 0, "nothing but forgotten tombstones");
    }
}

#[test]
fn what_a_restart_would_promise_again_counts_until_a_checkpoint_which_is_asked_for_at_half() {
    let mut machine = Machine::new(1, 128);
    machine.create(group(0), replica(1), state(1, 0));
    machine.settle();
    let mut taken = 0;
    // One block over and over: to the overlay it is one slot.
    while machine.wanted.is_empty() {
        assert!(machine.chunks.reserve(group(0), taken + 1, 1).is_ok(), "half is left");
        taken = machine.apply(group(0), vec![write(0, &[taken + 1])]);
        machine.collect();
    }
    assert_eq!(machine.chunks.usage().data_reserved, 21 * 4096);
    assert!((48..52).contains(&taken), "128 slots for 21 blocks each: {taken}");
    machine.crash();
    let entries = machine.models[&group(0)].entries.clone();
    for entry in &entries {
        machine.chunks.promise(group(0), entry.index + taken, 21).unwrap();
    }
    assert!(machine.chunks.reserve(group(0), 2 * taken + 1, 16).is_ok(), "and what comes next has space");
}

#[test]
fn promises_end_with_apply_truncation_and_deletion() {
    let mut machine = Machine::new(1, 128);
    machine.create(group(0), replica(1), state(1, 0));
    machine.settle();
    for index in 1..=4 {
        machine.chunks.reserve(group(0), index, 1).unwrap();
    }
    assert_eq!(machine.chunks.usage().data_reserved, 4 * 21 * 4096);
    machine.chunks.unreserve(group(0), 3);
    assert_eq!(machine.chunks.usage().data_reserved, 2 * 21 * 4096);
    let numbers = machine.numbers(1);
    machine.apply(group(0), vec![write(0, &numbers)]);
    assert_eq!(machine.chunks.usage().data_reserved, 2 * 21 * 4096, "a promise became a layer's need");
    machine.models.get_mut(&group(0)).unwrap().deleting = true;
    machine.chunks.delete_group(group(0), replica(1)).unwrap();
    machine.settle();
    assert_eq!(machine.chunks.usage().data_reserved, 0);
    assert_eq!(machine.chunks.reserve(group(0), 9, 1), Err(StoreError::UnknownGroup));
}

#[test]
fn a_group_or_disk_with_much_overlay_is_asked_for_a_checkpoint_once() {
    let mut machine = Machine::new(1, 300);
    machine.chunks.limits.group_overlay_bytes = 100 << 10;
    machine.chunks.limits.overlay_bytes = 150 << 10;
    for id in 0..3 {
        machine.create(group(id), replica(id as u8 + 1), state(1, 0));
    }
    machine.settle();
    let fill = |machine: &mut Machine, id, blocks| {
        let numbers = machine.numbers(blocks);
        machine.apply(group(id), vec![write(0, &numbers)]);
        machine.collect();
        std::mem::take(&mut machine.wanted)
    };
    assert_eq!(fill(&mut machine, 0, 20), []);
    assert_eq!(fill(&mut machine, 0, 20), [group(0)], "its own limit");
    assert_eq!(fill(&mut machine, 0, 20), [], "told once");
    assert_eq!(fill(&mut machine, 1, 18), []);
    assert_eq!(fill(&mut machine, 2, 22), [group(2)], "the disk's limit, the largest of those not yet asked");
    machine.checkpoint(group(0), state(2, 0));
    machine.settle();
    assert_eq!(fill(&mut machine, 0, 24), [group(0)], "asked anew after a checkpoint");
}
