//! [`Model`]: what every 4 KiB of the volume may hold, exactly.
//!
//! A block holds the stamp of the write that made it. At most one write of a block is outstanding at a time, so a read
//! may see one of two stamps at most, and once the newer one was seen or acknowledged only that.

use std::collections::BTreeSet;

pub const BLOCK: usize = 4096;

#[derive(Clone, Copy, Default)]
struct Block {
    /// The newest stamp that was acknowledged or read: nothing older may be read any more.
    floor: u64,
    /// The newest stamp sent.
    ceiling: u64,
    writing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    pub first: usize,
    pub count: usize,
}

impl Extent {
    pub fn offset(self) -> u64 {
        (self.first * BLOCK) as u64
    }

    pub fn bytes(self) -> u32 {
        (self.count * BLOCK) as u32
    }

    fn blocks(self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

pub struct Model {
    blocks: Vec<Block>,
    stamp: u64,
    /// Writes whose connection broke before their answer: each happened as a whole, or not at all.
    orphans: BTreeSet<Extent>,
}

impl Model {
    /// Of a volume, or the beginning of one, that nobody has written yet.
    pub fn new(blocks: usize) -> Model {
        Model { blocks: vec![Block::default(); blocks], stamp: 0, orphans: BTreeSet::new() }
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn can_write(&self, extent: Extent) -> bool {
        self.blocks[extent.blocks()].iter().all(|block| !block.writing && block.floor == block.ceiling)
    }

    /// The data of a new write.
    pub fn begin_write(&mut self, extent: Extent) -> (u64, Vec<u8>) {
        assert!(self.can_write(extent));
        self.stamp += 1;
        let mut data = vec![0; extent.count * BLOCK];
        for (number, bytes) in extent.blocks().zip(data.chunks_exact_mut(BLOCK)) {
            fill(number, self.stamp, bytes);
            self.blocks[number].writing = true;
            self.blocks[number].ceiling = self.stamp;
        }
        (self.stamp, data)
    }

    pub fn on_written(&mut self, extent: Extent, stamp: u64) {
        for block in &mut self.blocks[extent.blocks()] {
            assert!(block.writing && block.ceiling == stamp);
            block.writing = false;
            block.floor = stamp;
        }
    }

    /// Nobody will ever say whether this write happened.
    pub fn on_write_lost(&mut self, extent: Extent) {
        for block in &mut self.blocks[extent.blocks()] {
            block.writing = false;
        }
        self.orphans.insert(extent);
    }

    /// What a read that is sent now must at least see.
    pub fn begin_read(&self, extent: Extent) -> Vec<u64> {
        self.blocks[extent.blocks()].iter().map(|block| block.floor).collect()
    }

    pub fn on_read(&mut self, extent: Extent, floors: &[u64], data: &[u8]) {
        for ((number, floor), bytes) in extent.blocks().zip(floors).zip(data.chunks_exact(BLOCK)) {
            let stamp = stamp_of(number, bytes);
            let block = &mut self.blocks[number];
            assert!(
                (*floor..=block.ceiling).contains(&stamp),
                "block {number}: read write {stamp}, but write {floor} was acknowledged or read before and {} is the newest",
                block.ceiling
            );
            block.floor = block.floor.max(stamp);
        }
    }

    /// All of the volume as the next holder, or the same one with nothing in flight, has read it. Writes whose fate was
    /// open are decided by it: what is read once stays so.
    pub fn settle_all(&mut self, data: &[u8]) {
        for orphan in std::mem::take(&mut self.orphans) {
            let range = orphan.first * BLOCK..(orphan.first + orphan.count) * BLOCK;
            self.settle(orphan, &data[range]);
        }
        let all = Extent { first: 0, count: self.blocks.len() };
        let floors = self.begin_read(all);
        self.on_read(all, &floors, data);
    }

    fn settle(&mut self, orphan: Extent, data: &[u8]) {
        let mut happened = BTreeSet::new();
        for (number, bytes) in orphan.blocks().zip(data.chunks_exact(BLOCK)) {
            let stamp = stamp_of(number, bytes);
            let block = &mut self.blocks[number];
            assert!(
                stamp == block.floor || stamp == block.ceiling,
                "block {number}: read write {stamp}, expected {} or {}",
                block.floor,
                block.ceiling
            );
            // Where a read of the first holder saw it, it has happened for everybody.
            happened.insert(stamp == block.ceiling);
            (block.floor, block.ceiling) = (stamp, stamp);
        }
        assert_eq!(happened.len(), 1, "half of the write of {orphan:?} happened");
    }
}

fn fill(number: usize, stamp: u64, bytes: &mut [u8]) {
    let mut state = (number as u64) << 40 ^ stamp;
    let (head, rest) = bytes.split_at_mut(16);
    head[..8].copy_from_slice(&(number as u64).to_le_bytes());
    head[8..].copy_from_slice(&stamp.to_le_bytes());
    for word in rest.chunks_exact_mut(8) {
        word.copy_from_slice(&random(&mut state).to_le_bytes());
    }
}

/// 0: never written. Anything that is not exactly what some write put there is damage.
fn stamp_of(number: usize, bytes: &[u8]) -> u64 {
    if bytes.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let stamp = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    let mut expected = [0; BLOCK];
    fill(number, stamp, &mut expected);
    assert!(bytes == expected, "block {number} holds what nobody wrote there; it begins with {:02x?}", &bytes[..16]);
    stamp
}

/// SplitMix64.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
