//! Checks every read of a volume against the writes it may return.
//!
//! What it is: the history of one volume as its clients saw it, block by block. Written blocks are unique (see
//! [`crate::stamp`]), so each read names its write and the check needs no search. What it is not: a view into nodes,
//! logs or disks; it knows only what was asked and what was answered. Who drives it: the workload, at the moment it
//! submits and at the moment it is answered.
//!
//! Rules, each sound (a correct volume never breaks it):
//! 1. *No phantom*: a value read is that of a write to this very block, of this run, asked for before the read ended.
//! 2. *Linearizable*: a value is superseded once an operation on another value began after the first took effect and
//!    ended; a read that begins after that must not return it. Operations are writes and reads alike: a value that was
//!    read has taken effect, and one that another read replaced does not come back.
//! 3. *Whole* (requests are atomic, reads and writes alike): where a read of several blocks shows a write in one, no
//!    other block that the write covers shows what it has replaced.
//! 4. *Fenced*: what a former epoch wrote has taken effect when the next attachment is answered, or never will.
//!
//! Zeroes are not unique, so a read of zeroes passes if any zeroing (or the beginning) admits it; they supersede
//! unique values as strictly as these do one another. An operation that failed or was never answered may take effect
//! at any time, or never, within these rules.
//!
//! Cost: a read compares its block's value with the operations on that block; histories are kept for the whole run.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use holdfast_id::VolumeId;
use holdfast_protocol::session::Epoch;

use crate::stamp::{BLOCK_BYTES, SECTOR_BYTES, BlockStamp, Content, StampError, WriteId};

/// Counts what the checker was told, in order: real time for the purposes of linearizability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

const NEVER: Moment = Moment(u64::MAX);
/// All blocks are zeroes before the first operation.
const BEGINNING: Moment = Moment(0);

/// A read that was asked for and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a read that is never ended is never checked"]
pub struct PendingRead {
    invoked: Moment,
    first_block: u64,
    count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("block {block}: {error}")]
    Unreadable { block: u64, error: StampError },
    #[error("block {block} shows {stamp:?}, which was never written there")]
    Phantom { block: u64, stamp: BlockStamp },
    #[error("block {block} shows {shown:?}, superseded by an operation on {by:?}")]
    Stale { block: u64, shown: Value, by: Value },
    #[error("block {block} shows {shown:?} from before {write:?}, which the same read shows in block {other}")]
    Torn { block: u64, shown: Value, write: WriteId, other: u64 },
    #[error("the read has {actual} bytes instead of {expected}")]
    Length { expected: usize, actual: usize },
}

/// What a block held, as far as reads can tell values apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Zeroes,
    Write(WriteId),
}

#[derive(Clone, Debug)]
struct Mutation {
    epoch: Epoch,
    first_block: u64,
    count: u64,
    zeroes: bool,
    invoked: Moment,
    completed: Moment,
}

/// An answered operation on one block, and the value that was current at some moment between its two ends.
#[derive(Clone, Copy, Debug)]
struct Operation {
    value: Value,
    invoked: Moment,
    completed: Moment,
}

#[derive(Clone, Debug, Default)]
struct History {
    operations: Vec<Operation>,
    /// When a value that was read had certainly taken effect.
    seen: BTreeMap<WriteId, Moment>,
    /// Zeroing mutations of the block.
    zeroings: Vec<WriteId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Statistics {
    pub writes: u64,
    pub zeroings: u64,
    pub blocks_read: u64,
}

#[derive(Clone, Debug)]
pub struct Checker {
    volume: VolumeId,
    salt: u64,
    /// Bytes of what is called a block here: 4096, or 512 for a range that is written in sectors.
    unit: usize,
    now: Moment,
    mutations: BTreeMap<WriteId, Mutation>,
    next: u64,
    histories: BTreeMap<u64, History>,
    statistics: Statistics,
}

impl Checker {
    /// Of a volume that is all zeroes and written in whole blocks. `salt` is of the run.
    pub fn new(volume: VolumeId, salt: u64) -> Checker {
        Checker::with_unit(volume, salt, BLOCK_BYTES)
    }

    /// The same in sectors: every number of a block in its calls is that of a sector.
    pub fn of_sectors(volume: VolumeId, salt: u64) -> Checker {
        Checker::with_unit(volume, salt, SECTOR_BYTES)
    }

    fn with_unit(volume: VolumeId, salt: u64, unit: usize) -> Checker {
        Checker {
            volume,
            salt,
            unit,
            now: BEGINNING,
            mutations: BTreeMap::new(),
            next: 1,
            histories: BTreeMap::new(),
            statistics: Statistics::default(),
        }
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Every block that was asked to change: those to read at the end.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.histories.keys().copied()
    }

    /// A write is about to be submitted; it must carry exactly these bytes, and go out after this call.
    pub fn begin_write(&mut self, epoch: Epoch, first_block: u64, count: u64) -> (WriteId, Bytes) {
        self.statistics.writes += 1;
        let write = self.begin(epoch, first_block, count, false);
        let mut data = BytesMut::with_capacity(count as usize * self.unit);
        for block in first_block..first_block + count {
            let stamp = BlockStamp { volume: self.volume, write, block, salt: self.salt };
            data.extend_from_slice(&stamp.to_unit(self.unit));
        }
        (write, data.freeze())
    }

    /// A write-zeroes or discard is about to be submitted.
    pub fn begin_zeroes(&mut self, epoch: Epoch, first_block: u64, count: u64) -> WriteId {
        self.statistics.zeroings += 1;
        let write = self.begin(epoch, first_block, count, true);
        for block in first_block..first_block + count {
            self.history(block).zeroings.push(write);
        }
        write
    }

    /// The mutation was acknowledged as done. One that failed is not told here: it may or may not take effect.
    pub fn end_mutation(&mut self, write: WriteId) {
        let completed = self.tick();
        let mutation = self.mutations.get_mut(&write).expect("a mutation begins before it ends");
        assert_eq!(mutation.completed, NEVER, "{write:?} was acknowledged twice");
        mutation.completed = completed;
        let Mutation { first_block, count, zeroes, invoked, .. } = *mutation;
        let value = if zeroes { Value::Zeroes } else { Value::Write(write) };
        for block in first_block..first_block + count {
            self.history(block).operations.push(Operation { value, invoked, completed });
        }
    }

    pub fn begin_read(&mut self, first_block: u64, count: u64) -> PendingRead {
        PendingRead { invoked: self.tick(), first_block, count }
    }

    /// The read was answered with these bytes. One that failed is not told here.
    pub fn end_read(&mut self, read: PendingRead, data: &[u8]) -> Result<(), Violation> {
        let completed = self.tick();
        let PendingRead { invoked, first_block, count } = read;
        let expected = count as usize * self.unit;
        if data.len() != expected {
            return Err(Violation::Length { expected, actual: data.len() });
        }
        let mut shown = Vec::new();
        for (block, bytes) in (first_block..).zip(data.chunks(self.unit)) {
            let value = self.value(block, bytes)?;
            self.check_current(block, value, invoked)?;
            shown.push((block, value));
        }
        self.check_whole(&shown)?;
        for (block, value) in shown {
            self.statistics.blocks_read += 1;
            let history = self.history(block);
            history.operations.push(Operation { value, invoked, completed });
            if let Value::Write(write) = value {
                history.seen.entry(write).or_insert(completed);
            }
        }
        Ok(())
    }

    /// An attachment with this epoch was answered. Whatever a lower epoch wrote has taken effect by now, or never will.
    pub fn on_attached(&mut self, epoch: Epoch) {
        let now = self.tick();
        for (write, mutation) in &self.mutations {
            if mutation.epoch < epoch && mutation.completed == NEVER {
                for block in mutation.first_block..mutation.first_block + mutation.count {
                    let history = self.histories.get_mut(&block).expect("a mutation has a history in its blocks");
                    history.seen.entry(*write).or_insert(now);
                }
            }
        }
    }

    fn begin(&mut self, epoch: Epoch, first_block: u64, count: u64, zeroes: bool) -> WriteId {
        let invoked = self.tick();
        let write = WriteId(self.next);
        self.next += 1;
        let mutation = Mutation { epoch, first_block, count, zeroes, invoked, completed: NEVER };
        self.mutations.insert(write, mutation);
        for block in first_block..first_block + count {
            self.history(block);
        }
        write
    }

    fn tick(&mut self) -> Moment {
        self.now.0 += 1;
        self.now
    }

    fn history(&mut self, block: u64) -> &mut History {
        self.histories.entry(block).or_default()
    }

    /// Rule 1.
    fn value(&self, block: u64, bytes: &[u8]) -> Result<Value, Violation> {
        let stamp = match Content::of(bytes).map_err(|error| Violation::Unreadable { block, error })? {
            Content::Zeroes => return Ok(Value::Zeroes),
            Content::Stamp(stamp) => stamp,
        };
        let ours = stamp.volume == self.volume && stamp.salt == self.salt && stamp.block == block;
        match self.mutations.get(&stamp.write) {
            Some(mutation) if ours && !mutation.zeroes && covers(mutation, block) => Ok(Value::Write(stamp.write)),
            _ => Err(Violation::Phantom { block, stamp }),
        }
    }

    /// Rules 2 and 4, for a value shown by a read that began at `invoked`.
    fn check_current(&self, block: u64, shown: Value, invoked: Moment) -> Result<(), Violation> {
        let Some(history) = self.histories.get(&block) else { return Ok(()) };
        let superseded_by = |effective: Moment| {
            let supersedes = |operation: &&Operation| {
                operation.value != shown && operation.invoked > effective && operation.completed < invoked
            };
            history.operations.iter().find(supersedes).map(|operation| operation.value)
        };
        let by = match shown {
            Value::Write(write) => superseded_by(self.effective(history, write)),
            // Admitted by the latest zeroing to take effect, or by the beginning.
            Value::Zeroes => {
                let zeroings = history.zeroings.iter().map(|zeroing| self.effective(history, *zeroing));
                let latest = zeroings.chain([BEGINNING]).max().expect("the beginning at least");
                superseded_by(latest)
            }
        };
        match by {
            Some(by) => Err(Violation::Stale { block, shown, by }),
            None => Ok(()),
        }
    }

    /// Rule 3.
    fn check_whole(&self, shown: &[(u64, Value)]) -> Result<(), Violation> {
        for &(other, value) in shown {
            let Value::Write(write) = value else { continue };
            let mutation = &self.mutations[&write];
            for &(block, value) in shown {
                if !covers(mutation, block) {
                    continue;
                }
                let history = &self.histories[&block];
                let effective = match value {
                    Value::Write(shown) if shown != write => self.effective(history, shown),
                    // A zeroing that may yet take effect, or that may lie after the write, admits the zeroes.
                    Value::Zeroes => {
                        let zeroings = history.zeroings.iter().map(|zeroing| self.effective(history, *zeroing));
                        zeroings.chain([BEGINNING]).max().expect("the beginning at least")
                    }
                    Value::Write(_) => continue,
                };
                if effective < mutation.invoked {
                    return Err(Violation::Torn { block, shown: value, write, other });
                }
            }
        }
        Ok(())
    }

    /// The earliest moment by which the mutation has certainly taken effect in the block, if ever.
    fn effective(&self, history: &History, write: WriteId) -> Moment {
        let seen = history.seen.get(&write).copied().unwrap_or(NEVER);
        self.mutations[&write].completed.min(seen)
    }
}

fn covers(mutation: &Mutation, block: u64) -> bool {
    (mutation.first_block..mutation.first_block + mutation.count).contains(&block)
}

#[cfg(test)]
mod tests;
