//! Disks that hold what no store wrote: by bit rot, or by somebody who knows the checksums.

use super::model::Run;
use crate::device::memory::MemoryDevice;
use crate::device::{BLOCK_BYTES, Device};
use crate::store::Store;

/// With checkpoints, truncations, and records that are in the WAL alone.
fn worked() -> Run {
    let mut run = Run::new(2);
    for round in 0..40 {
        run.append(1 + round % 2, u64::from(round % 3 == 0), round % 2 == 0, &[usize::from(round % 4), 0]);
        while run.step(|_| {}) {}
        if round % 10 == 5 {
            run.checkpoint(1, 3);
        }
    }
    run.idle();
    while run.step(|_| {}) {}
    run
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Whatever is flipped, and wherever, a disk opens, or its refusal says why; no length is believed that is not there.
#[test]
fn a_disk_with_any_bytes_changed_opens_or_says_why() {
    let run = worked();
    let bytes = run.device.len().unwrap();
    // Offsets at which there is something to change.
    let mut block = vec![0; BLOCK_BYTES];
    let used: Vec<u64> = (0..bytes)
        .step_by(BLOCK_BYTES)
        .filter(|at| {
            run.device.read_at(*at, &mut block).unwrap();
            block.iter().any(|byte| *byte != 0)
        })
        .collect();
    let (mut opened, mut refused, mut state) = (0, 0, 1);
    let mut random = |end: usize| random(&mut state) as usize % end;
    for _ in 0..2000 {
        let fork = run.device.fork();
        for _ in 0..1 + random(4) {
            let length = [1, 2, 8, 512, BLOCK_BYTES][random(5)];
            let at = used[random(used.len())] + random(BLOCK_BYTES - length + 1) as u64;
            fork.corrupt(at, length);
        }
        match Store::open(&fork) {
            Ok((_, groups)) => {
                opened += 1;
                for group in groups {
                    let first = group.checkpoint_index + 1;
                    let continues = |(expected, record): (u64, &crate::group::Record)| expected == record.index;
                    let from = group.records.first().map_or(first, |record| record.index);
                    assert!((from..).zip(&group.records).all(continues), "a log has no holes");
                }
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    assert!(opened > 500 && refused > 0, "both were seen: {opened} opened, {refused} refused");
}

/// Where a block's checksum stands, and what it covers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Summed {
    /// At 8, over what follows, up to there.
    Head(usize),
    /// At 12, over the block with zeroes there.
    Chunk,
}

impl Summed {
    const ALL: [Summed; 3] = [Summed::Head(128), Summed::Head(BLOCK_BYTES), Summed::Chunk];

    fn sum(self, block: &mut [u8]) {
        let at = if self == Summed::Chunk { 12 } else { 8 };
        let checksum = match self {
            Summed::Head(to) => crc32c::crc32c(&block[12..to]),
            Summed::Chunk => {
                block[12..16].fill(0);
                crc32c::crc32c(&block[..BLOCK_BYTES])
            }
        };
        block[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
    }

    /// `None`: the block is of another kind.
    fn of(block: &[u8]) -> Option<Summed> {
        Summed::ALL.into_iter().find(|kind| {
            let mut summed = block.to_vec();
            kind.sum(&mut summed);
            block[0] == b'H' && summed == block
        })
    }
}

/// One field changed, and summed up again.
fn forge(block: &mut [u8], summed: Summed, state: &mut u64) {
    let value = [0, 1, u64::MAX, u64::MAX - 1, 1 << 32, 1 << 63, random(state)][random(state) as usize % 7];
    let (from, to) = match summed {
        Summed::Head(to) => (12, to.min(160)),
        Summed::Chunk => (16, 160),
    };
    let at = from + random(state) as usize % (to - from - 8);
    // Where fields are as a rule; and now and then across two of them.
    let at = if random(state).is_multiple_of(8) { at } else { at.next_multiple_of(8).min(to - 8) };
    if random(state).is_multiple_of(2) {
        block[at..at + 8].copy_from_slice(&value.to_le_bytes());
    } else {
        block[at..at + 4].copy_from_slice(&value.to_le_bytes()[..4]);
    }
    summed.sum(block);
}

/// As [`forge`], of the table or the records of a batch.
fn forge_body(batch: &mut [u8], state: &mut u64) {
    let at = 128 + random(state) as usize % (batch.len() - 128 - 8);
    let at = at.next_multiple_of(8).min(batch.len() - 8);
    let value = [0, 1, u64::MAX, 1 << 32, random(state)][random(state) as usize % 5];
    batch[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let field = |batch: &[u8], at: usize| u32::from_le_bytes(batch[at..at + 4].try_into().unwrap()) as usize;
    let (table, groups) = (field(batch, 60), field(batch, 64));
    let sum = crc32c::crc32c(&batch[table..table + groups * 64]);
    batch[68..72].copy_from_slice(&sum.to_le_bytes());
    let sum = crc32c::crc32c(&batch[128..]);
    batch[12..16].copy_from_slice(&sum.to_le_bytes());
    let sum = crc32c::crc32c(&batch[12..128]);
    batch[8..12].copy_from_slice(&sum.to_le_bytes());
}

fn block_at(device: &MemoryDevice, at: u64, length: usize) -> Vec<u8> {
    let mut block = vec![0; length];
    device.read_at(at, &mut block).unwrap();
    block
}

/// Fields of every kind of block that is read at a start, changed to anything, under a checksum that is right.
#[test]
fn a_disk_with_forged_fields_opens_or_says_why() {
    let run = worked();
    let mut forgeable = Vec::new();
    for at in (0..run.device.len().unwrap()).step_by(BLOCK_BYTES) {
        let block = block_at(&run.device, at, BLOCK_BYTES);
        forgeable.extend(Summed::of(&block).map(|summed| (at, summed)));
    }
    let batches = forgeable.iter().filter(|(_, summed)| *summed == Summed::Head(128)).count();
    assert!(Summed::ALL.iter().all(|kind| forgeable.iter().any(|(_, summed)| summed == kind)), "every kind is there");
    assert!(batches >= 10 && forgeable.len() >= batches + 3, "{batches} batches of {}", forgeable.len());
    let (mut opened, mut state) = (0, 7);
    for _ in 0..3000 {
        let fork = run.device.fork();
        for _ in 0..1 + random(&mut state) % 2 {
            let (at, summed) = forgeable[random(&mut state) as usize % forgeable.len()];
            let mut block = block_at(&fork, at, BLOCK_BYTES);
            if summed == Summed::Head(128) && random(&mut state).is_multiple_of(2) {
                let length = u32::from_le_bytes(block[56..60].try_into().unwrap()) as usize;
                if length == 0 || length > 1 << 20 || !length.is_multiple_of(BLOCK_BYTES) {
                    continue;
                }
                block = block_at(&fork, at, length);
                let table = u32::from_le_bytes(block[60..64].try_into().unwrap()) as usize;
                let groups = u32::from_le_bytes(block[64..68].try_into().unwrap()) as usize;
                if table.saturating_add(groups.saturating_mul(64)) > length {
                    continue;
                }
                forge_body(&mut block, &mut state);
            } else {
                forge(&mut block, summed, &mut state);
            }
            fork.write_durable_at(at, &block).unwrap();
        }
        opened += u32::from(Store::open(&fork).is_ok());
    }
    assert!(opened > 300, "{opened} opened");
}
