//! Payloads that lie in their slots before a checkpoint knows of them.

use std::sync::Arc;

use holdfast_id::GroupId;

use crate::chunk::layout::SLOT_BYTES;
use crate::chunk::tests::harness::{Entry, Machine, group, replica, state, write, zero};
use crate::device::BLOCK_BYTES;
use crate::group::{Mutation, PayloadAt, Record};
use crate::ops::DeviceOp;
use crate::wal::{Extent, Slots};

impl Machine {
    /// Places the payload of a write, as an append does, makes it durable, as the log does, and applies the write.
    /// False: there is no space.
    pub fn apply_placed(&mut self, id: GroupId, first_block: u64, numbers: &[u64]) -> bool {
        let mutation = write(first_block, numbers);
        let Mutation::Write { data, checksums, .. } = &mutation else { unreachable!("a write was made") };
        let at = Some(PayloadAt { first_block, checksums: checksums.clone() });
        let index = self.models[&id].last() + 1;
        let record = Record { index, header: Default::default(), payload: data.clone(), at };
        let Ok(placed) = self.chunks.place_record(id, &record) else { return false };
        let mut from = 0;
        for extent in &placed {
            if let Extent::Slots { offset, checksums } = extent {
                let part = &record.payload[from..from + extent.bytes()];
                let sums: Arc<[u32]> = part.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
                assert_eq!(sums[..], checksums[..]);
                self.disk.write(*offset, part, true);
            }
            from += extent.bytes();
        }
        self.chunks.hold(id, index, &placed);
        self.apply(id, vec![mutation]);
        self.models.get_mut(&id).unwrap().entries.last_mut().unwrap().placed = placed;
        true
    }
}

/// As recovery of the log does with a live record.
pub fn claim(chunks: &mut impl Slots, entry: &Entry) {
    for extent in &entry.placed {
        if let Extent::Slots { offset, .. } = extent {
            assert!(chunks.claim(*offset, extent.bytes()), "the slots of entry {} are its own", entry.index);
        }
    }
}

fn machine() -> Machine {
    let mut machine = Machine::new(1, 200);
    machine.create(group(0), replica(1), state(1, 0));
    machine.settle();
    machine
}

fn place(machine: &mut Machine, first: u64, count: u64) {
    let numbers = machine.numbers(count);
    assert!(machine.apply_placed(group(0), first, &numbers));
}

/// Makes a checkpoint; the bytes it wrote, but for headers.
fn checkpoint(machine: &mut Machine) -> usize {
    machine.checkpoint(group(0), state(2, 0));
    machine.collect();
    let mut written = 0;
    while !machine.in_flight.is_empty() {
        if let DeviceOp::Write { data, durable: false, .. } = &machine.in_flight[0].op {
            written += data.len();
        }
        machine.complete(0);
    }
    machine.check_leaks();
    written
}

#[test]
fn a_checkpoint_adopts_what_covers_its_slot_and_writes_only_the_rest() {
    let mut machine = machine();
    place(&mut machine, 16, 256);
    let used = machine.chunks.usage();
    assert_eq!((used.data_used, used.data_reserved), (16 * SLOT_BYTES as u64, 2 * 5 * 4096), "pages are promised");
    machine.read(group(0), 0, 257);
    assert_eq!(checkpoint(&mut machine), 3 * BLOCK_BYTES, "two leaves and the root");
    // Not aligned: six blocks before the first slot, ten behind the last.
    place(&mut machine, 10, 32);
    assert_eq!(checkpoint(&mut machine), 16 * BLOCK_BYTES + 2 * BLOCK_BYTES);
    // A slot of zeroes alone is stored nowhere before it is written back.
    assert!(machine.apply_placed(group(0), 0, &[0; 16]));
    let placed = &machine.models[&group(0)].entries.last().unwrap().placed;
    assert_eq!(placed, &[Extent::Zero { blocks: 16 }]);
    checkpoint(&mut machine);
    machine.read(group(0), 0, 257);
    machine.settle();
    machine.crash();
    assert_eq!(machine.failures, []);
}

#[test]
fn what_is_written_into_a_slot_before_the_checkpoint_moves_it_elsewhere() {
    let mut machine = machine();
    place(&mut machine, 0, 48);
    let home = machine.models[&group(0)].entries[0].placed.clone();
    machine.apply(group(0), vec![write(20, &[7])]);
    machine.apply(group(0), vec![zero(40, 2)]);
    machine.crash();
    assert_eq!(checkpoint(&mut machine), 16 * BLOCK_BYTES + BLOCK_BYTES, "the one slot and the leaf");
    let [Extent::Slots { offset, checksums }] = home.as_slice() else { panic!("{home:?}") };
    assert_eq!(checksums.len(), 48);
    assert!(machine.chunks.claim(*offset + SLOT_BYTES as u64, SLOT_BYTES), "the middle slot was given back");
    assert!(!machine.chunks.claim(*offset, SLOT_BYTES), "the others are the map's");
    machine.read(group(0), 0, 64);
    machine.settle();
    assert_eq!(machine.failures, []);
}

#[test]
fn a_payload_hidden_before_the_checkpoint_leaves_nothing_behind() {
    let mut machine = machine();
    place(&mut machine, 0, 16);
    place(&mut machine, 0, 16);
    place(&mut machine, 32, 16);
    machine.apply(group(0), vec![zero(32, 16)]);
    machine.crash();
    checkpoint(&mut machine);
    assert_eq!(machine.chunks.usage().data_used, 2 * SLOT_BYTES as u64, "one slot and the pages");
    machine.read(group(0), 0, 64);
    machine.crash();
}

#[test]
fn a_frozen_map_keeps_what_an_adopted_slot_replaced() {
    let mut machine = machine();
    place(&mut machine, 0, 32);
    checkpoint(&mut machine);
    let frozen = machine.chunks.freeze(group(0)).unwrap();
    place(&mut machine, 0, 32);
    checkpoint(&mut machine);
    machine.read_frozen(group(0), frozen, 0, 32);
    machine.read(group(0), 0, 32);
    machine.settle();
    machine.chunks.thaw(group(0), frozen.id);
    machine.settle();
    machine.check_leaks();
    assert_eq!(machine.failures, []);
}

#[test]
fn a_disk_filled_with_payloads_writes_back_everything_it_took() {
    let mut machine = Machine::new(3, 128);
    machine.create(group(0), replica(1), state(1, 0));
    machine.settle();
    let mut refused = 0;
    while refused < 3 {
        let (first, count) = (machine.random.below(3000), 1 + machine.random.below(100));
        let numbers = machine.numbers(count);
        if !machine.apply_placed(group(0), first, &numbers) {
            machine.collect();
            machine.checkpoint(group(0), state(2, 0));
            machine.settle();
            machine.check_leaks();
            refused += 1;
        }
        // A small write spoils a home, and has to have the space for that.
        let index = machine.models[&group(0)].last() + 1;
        if machine.random.chance(50) && machine.chunks.reserve(group(0), index, 1).is_ok() {
            let at = machine.random.below(3000);
            let numbers = machine.numbers(1);
            machine.apply(group(0), vec![write(at, &numbers)]);
        }
        machine.collect();
    }
    assert!(!machine.failed);
    machine.checkpoint(group(0), state(2, 0));
    machine.settle();
    assert_eq!(machine.chunks.usage().data_reserved, 0);
    machine.check_leaks();
    machine.crash();
}
