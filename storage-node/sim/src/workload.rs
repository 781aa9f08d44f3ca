//! What runs on the volumes: attached machines that read and write stamped blocks, and check what they read.
//!
//! What it is: for each volume its checkers, and for each attached machine (an *agent*) the product's client with the
//! requests it has under way. The first blocks of a volume are written in single sectors, which makes the leader read
//! and modify; the others in whole blocks. What it is not: the driver; the world's loop passes time, connections and
//! replies.

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Operation, Request, RequestId};
use holdfast_client::{Client, ClientOptions, Mode};
use holdfast_consensus::Timestamp;
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Instance, Session};

use crate::checker::{Checker, PendingRead};
use crate::prng::{MILLION, Prng};
use crate::stamp::{BLOCK_BYTES, SECTOR_BYTES, WriteId};

/// Blocks at the start of each volume that are written in sectors.
const SECTOR_BLOCKS: u64 = 16;
const SECTORS_PER_BLOCK: u64 = (BLOCK_BYTES / SECTOR_BYTES) as u64;
/// Half of the requests go to so many blocks: requests must overlap to be ordered wrongly.
const HOT_BLOCKS: u64 = 24;

/// Which of a volume's checkers, and so which unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Blocks,
    Sectors,
}

impl Unit {
    fn bytes(self) -> u64 {
        match self {
            Unit::Blocks => BLOCK_BYTES as u64,
            Unit::Sectors => SECTOR_BYTES as u64,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Pending {
    Mutation(Unit, WriteId),
    Read(Unit, PendingRead),
    Flush,
}

/// Shares of the kinds of requests, in a million; the rest are reads.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub write_ppm: u32,
    pub zero_ppm: u32,
    pub flush_ppm: u32,
    pub sector_ppm: u32,
    /// Of the writes, those of up to a MiB.
    pub large_ppm: u32,
}

/// One volume as all its agents see it.
pub struct Target {
    pub volume: VolumeId,
    pub replicas: Vec<NodeId>,
    pub size_bytes: u64,
    blocks: Checker,
    sectors: Checker,
    /// The agent that may be attached.
    pub agent: Option<u32>,
    pub completed: u64,
}

impl Target {
    pub fn new(volume: VolumeId, replicas: Vec<NodeId>, size_bytes: u64, salt: u64) -> Target {
        Target {
            volume,
            replicas,
            size_bytes,
            blocks: Checker::new(volume, salt),
            sectors: Checker::of_sectors(volume, !salt),
            agent: None,
            completed: 0,
        }
    }

    pub fn bytes_verified(&self) -> u64 {
        self.blocks.statistics().blocks_read * BLOCK_BYTES as u64
            + self.sectors.statistics().blocks_read * SECTOR_BYTES as u64
    }

    fn checker(&mut self, unit: Unit) -> &mut Checker {
        match unit {
            Unit::Blocks => &mut self.blocks,
            Unit::Sectors => &mut self.sectors,
        }
    }

    /// The session is open: what earlier ones wrote has taken effect by now, or never will. Sessions rise over the
    /// volume's whole life, over epochs too, so they stand for epochs here.
    pub fn on_attached(&mut self, session: Session) {
        self.blocks.on_attached(Epoch(session.0));
        self.sectors.on_attached(Epoch(session.0));
    }

    /// Reads that together cover everything that was ever asked to be written.
    pub fn ranges(&self) -> Vec<(u64, u32)> {
        let mut ranges: Vec<(u64, u32)> = Vec::new();
        let sectors = self.sectors.blocks().map(|sector| (Unit::Sectors, sector));
        let blocks = self.blocks.blocks().map(|block| (Unit::Blocks, block));
        for (unit, number) in sectors.chain(blocks) {
            let (offset, bytes) = (number * unit.bytes(), unit.bytes() as u32);
            match ranges.last_mut() {
                // Never over the border between the units: a read has one checker.
                Some((start, length))
                    if *start + u64::from(*length) == offset
                        && offset != SECTOR_BLOCKS * BLOCK_BYTES as u64
                        && *length < 64 << 10 =>
                {
                    *length += bytes;
                }
                _ => ranges.push((offset, bytes)),
            }
        }
        ranges
    }
}

/// One attached machine.
pub struct Agent {
    pub target: usize,
    pub client: Client,
    pub holder: String,
    pub session: Option<Session>,
    pub epoch: Option<Epoch>,
    pub alive: bool,
    pending: BTreeMap<RequestId, Pending>,
    next: u64,
}

impl Agent {
    pub fn new(now: Timestamp, target: usize, of: &Target, holder: String, mode: Mode, prng: &mut Prng) -> Agent {
        let instance = Instance(u128::from(prng.next_u64()) << 64 | u128::from(prng.next_u64()));
        let options = ClientOptions::new(of.volume, of.replicas.clone(), holder.clone(), instance, mode);
        Agent {
            target,
            client: Client::new(options, now),
            holder,
            session: None,
            epoch: None,
            alive: true,
            pending: BTreeMap::new(),
            next: 0,
        }
    }

    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// Submits a request of the mix.
    pub fn submit(&mut self, now: Timestamp, target: &mut Target, mix: &Mix, prng: &mut Prng) {
        let session = self.session.expect("only an attached agent submits");
        let unit = if prng.chance(mix.sector_ppm) { Unit::Sectors } else { Unit::Blocks };
        let kind = prng.below(u64::from(MILLION)) as u32;
        let writes = kind < mix.write_ppm;
        let (first, count) = range(unit, target.size_bytes, writes, mix, prng);
        let (offset, bytes) = (first * unit.bytes(), count * unit.bytes());
        let epoch = Epoch(session.0);
        let (operation, pending) = if writes {
            let (write, data) = target.checker(unit).begin_write(epoch, first, count);
            (Operation::Write { offset, data }, Pending::Mutation(unit, write))
        } else if kind < mix.write_ppm + mix.zero_ppm {
            let write = target.checker(unit).begin_zeroes(epoch, first, count);
            let operation = if prng.chance(MILLION / 2) {
                Operation::Discard { offset, length: bytes }
            } else {
                Operation::WriteZeroes { offset, length: bytes }
            };
            (operation, Pending::Mutation(unit, write))
        } else if kind < mix.write_ppm + mix.zero_ppm + mix.flush_ppm {
            (Operation::Flush, Pending::Flush)
        } else {
            return self.read(now, target, offset, bytes as u32);
        };
        self.put(now, operation, pending);
    }

    /// Submits a read of whole units of one kind.
    pub fn read(&mut self, now: Timestamp, target: &mut Target, offset: u64, length: u32) {
        let unit = if offset < SECTOR_BLOCKS * BLOCK_BYTES as u64 { Unit::Sectors } else { Unit::Blocks };
        let read = target.checker(unit).begin_read(offset / unit.bytes(), u64::from(length) / unit.bytes());
        self.put(now, Operation::Read { offset, length }, Pending::Read(unit, read));
    }

    fn put(&mut self, now: Timestamp, operation: Operation, pending: Pending) {
        self.next += 1;
        let id = RequestId(self.next);
        self.pending.insert(id, pending);
        self.client.submit(now, Request { id, operation });
    }

    /// # Errors
    /// What no correct cluster answers, in words.
    pub fn on_complete(&mut self, target: &mut Target, completion: Completion) -> Result<Option<Error>, String> {
        let Completion { id, result } = completion;
        let pending = self.pending.remove(&id).ok_or_else(|| format!("{id:?} is completed twice"))?;
        let data: Bytes = match result {
            Ok(data) => data,
            Err(error) => return Ok(Some(error)),
        };
        target.completed += 1;
        match pending {
            Pending::Mutation(unit, write) => target.checker(unit).end_mutation(write),
            Pending::Read(unit, read) => {
                target.checker(unit).end_read(read, &data).map_err(|v| format!("{unit:?} of {}: {v}", target.volume))?;
            }
            Pending::Flush => {}
        }
        Ok(None)
    }
}

/// First unit and number of units.
fn range(unit: Unit, size_bytes: u64, writes: bool, mix: &Mix, prng: &mut Prng) -> (u64, u64) {
    let (start, end) = match unit {
        Unit::Sectors => (0, SECTOR_BLOCKS * SECTORS_PER_BLOCK),
        Unit::Blocks => (SECTOR_BLOCKS, size_bytes / BLOCK_BYTES as u64),
    };
    let count_max = match unit {
        Unit::Blocks if writes && prng.chance(mix.large_ppm) => 256,
        Unit::Blocks => 8,
        Unit::Sectors => 20,
    };
    let count = prng.between(1, count_max.min(end - start));
    let hot = prng.chance(MILLION / 2);
    let last = end - count;
    let last = if hot { last.min(start + HOT_BLOCKS) } else { last };
    (prng.between(start, last), count)
}
