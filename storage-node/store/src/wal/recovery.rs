//! From the bytes of a ring to the logs of its groups, in three steps: `scan` finds every batch that is or was
//! there, `chain` links those that count, `replay` rebuilds the groups' logs from them. `payloads` then reads what their
//! records have in slots.
//!
//! Then, before anything is told, the last batch and its payloads are rewritten and flushed, since what was read may
//! have been bytes that only a page cache held; a log that ends at a torn payload is truncated there; and damage found for the first time is anchored: a record per damaged group says
//! where its log ends now, so that what is appended from here on is told apart from what lies behind the damage.

mod chain;
mod payloads;
mod replay;
mod scan;

use std::collections::VecDeque;

use bytes::Bytes;
use holdfast_id::{GroupId, ReplicaId};

use self::chain::{Chain, Node};
pub(crate) use self::payloads::Slots;
use self::payloads::{Cut, Resolved, Source};
use self::replay::Replayed;
use self::scan::{Found, Scan};
use super::groups::Groups;
use super::{BATCH_CAPACITY_MIN, Extent, PayloadWrites, Place, Placed, Wal};
use crate::device::Device;
use crate::group::{Damage, OpenError, Record};
use crate::ops::{AlignedBuffer, OpIds};
use crate::superblock::Superblock;

/// A group by its checkpoint; the WAL adds what came after.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupBase {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub index: u64,
    /// Batches up to this one hold no hard state newer than the checkpoint's.
    pub wal_sequence: u64,
}

/// What the WAL has of a group; see [`crate::group::RecoveredGroup`].
#[derive(Debug)]
pub(crate) struct RecoveredLog {
    pub hard_state: Option<Bytes>,
    pub records: Vec<Record>,
    /// Where the payloads of those lie that are not inline, by index.
    pub placed: Vec<(u64, Vec<Extent>)>,
    pub damage: Option<Damage>,
    /// The payload of the record after the last one was torn: it was never acknowledged.
    pub torn_payload: bool,
}

/// The logs are in the order of `bases`.
pub(super) fn open(
    device: &dyn Device,
    superblock: &Superblock,
    bases: &[GroupBase],
    slots: &mut dyn Slots,
) -> Result<(Wal, Vec<RecoveredLog>), OpenError> {
    let scan = Scan::read(device, superblock)?;
    let chain = Chain::link(&scan);
    let replayed = replay::replay(&chain, bases)?;
    let mut source = source(device, superblock, slots, &chain, &scan);
    let mut wal = assemble(&chain, &scan, superblock, bases);
    let mut logs = Vec::with_capacity(bases.len());
    for (base, mut replayed) in bases.iter().zip(replayed) {
        let mut resolved = source.resolve(std::mem::take(&mut replayed.records), base.index);
        for (offset, data) in std::mem::take(&mut resolved.tail) {
            device.write_at(offset, &data)?;
        }
        let log = recovered(base, replayed, resolved);
        wal.groups.get_mut(base.group).expect("every base was inserted").last_appended = log.last(base);
        for (index, placed) in &log.log.placed {
            wal.groups.note_payload(base.group, *index, placed);
        }
        logs.push(log);
    }
    rewrite_tail(device, &chain, &scan)?;
    for (base, log) in bases.iter().zip(&logs) {
        if log.needs_anchor {
            wal.anchor_in_open(base.group, base.replica, log.last(base) + 1);
        } else if log.log.torn_payload {
            wal.truncate_in_open(base.group, base.replica, log.last(base) + 1);
        }
    }
    wal.write_queued(device)?;
    Ok((wal, logs.into_iter().map(|log| log.log).collect()))
}

/// A log, and whether its damage is to be noted.
struct Recovered {
    log: RecoveredLog,
    needs_anchor: bool,
}

impl Recovered {
    fn last(&self, base: &GroupBase) -> u64 {
        self.log.records.last().map_or(base.index, |record| record.index).max(base.index)
    }
}

fn recovered(base: &GroupBase, replayed: Replayed, resolved: Resolved) -> Recovered {
    let payload_lost = resolved.cut == Some(Cut::Damaged);
    let last = resolved.records.last().map_or(base.index, |record| record.index);
    let log = RecoveredLog {
        hard_state: replayed.hard_state,
        records: resolved.records,
        placed: resolved.placed,
        damage: (replayed.damaged || payload_lost).then_some(Damage::Log { intact_to: last }),
        torn_payload: resolved.cut == Some(Cut::Torn),
    };
    Recovered { log, needs_anchor: replayed.needs_anchor || payload_lost }
}

fn source<'a>(
    device: &'a dyn Device,
    superblock: &Superblock,
    slots: &'a mut dyn Slots,
    chain: &Chain<'_>,
    scan: &Scan,
) -> Source<'a> {
    Source {
        device,
        slots,
        last_sequence: chain.flushed_sequence,
        unmarked: scan.mark().is_none_or(|mark| mark.sequence < chain.flushed_sequence),
        // The other half is for what comes next.
        below_bytes: superblock.wal.bytes() as usize / 2,
    }
}

/// What the WAL holds, for people.
#[derive(Debug)]
pub(crate) struct Inspection {
    /// Ascending by sequence; what counts, then what is torn.
    pub stretches: Vec<Stretch>,
    /// The batch that the newer mark names.
    pub marked: Option<u64>,
    /// Blocks the device cannot read.
    pub unreadable: Vec<u64>,
}

#[derive(Debug)]
pub(crate) enum Stretch {
    Whole { sequence: u64, generation: u64, bytes: u64 },
    Damaged { sequence: u64, offset: u64, groups: usize },
    Lost { to: u64 },
    Torn { sequence: u64, offset: u64 },
}

/// As `open`, but writes nothing.
pub(crate) fn inspect(
    device: &dyn Device,
    superblock: &Superblock,
    bases: &[GroupBase],
    slots: &mut dyn Slots,
) -> Result<(Inspection, Vec<RecoveredLog>), OpenError> {
    let scan = Scan::read(device, superblock)?;
    let chain = Chain::link(&scan);
    let replayed = replay::replay(&chain, bases)?;
    let mut source = source(device, superblock, slots, &chain, &scan);
    let log = |(base, mut replayed): (&GroupBase, Replayed)| {
        let resolved = source.resolve(std::mem::take(&mut replayed.records), base.index);
        recovered(base, replayed, resolved).log
    };
    let logs = bases.iter().zip(replayed).map(log).collect();
    let stretch = |node: &Node<'_>| match node {
        Node::Whole { found: Found { header, .. }, .. } => {
            Stretch::Whole { sequence: header.sequence, generation: header.generation, bytes: u64::from(header.length) }
        }
        Node::Damaged { header, table } => {
            Stretch::Damaged { sequence: header.sequence, offset: header.offset, groups: table.len() }
        }
        Node::Lost { to } => Stretch::Lost { to: *to },
    };
    let mut stretches: Vec<Stretch> = chain.nodes.iter().map(stretch).collect();
    let behind = scan.found.range(chain.flushed_sequence + 1..);
    stretches
        .extend(behind.map(|(sequence, found)| Stretch::Torn { sequence: *sequence, offset: found.header.offset }));
    let marked = scan.mark().map(|mark| mark.sequence);
    let inspection = Inspection { stretches, marked, unreadable: scan.unreadable.clone() };
    Ok((inspection, logs))
}

fn assemble(chain: &Chain<'_>, scan: &Scan, superblock: &Superblock, bases: &[GroupBase]) -> Wal {
    let mut groups = Groups::default();
    for base in bases {
        groups.insert(base.group, base.replica, base.index, base.wal_sequence);
    }
    let mut first_sequences: VecDeque<(u64, u64)> = VecDeque::new();
    for node in &chain.nodes {
        let Some(header) = node.header() else { continue };
        if first_sequences.back().is_none_or(|(generation, _)| *generation < header.generation) {
            first_sequences.push_back((header.generation, header.sequence));
        }
        if let Node::Whole { table, .. } = node {
            for entry in *table {
                groups.on_durable(entry, header.generation, header.sequence);
            }
        }
    }
    let checkpointed = bases.iter().map(|base| base.wal_sequence).max().unwrap_or(0);
    let flushed = Place { generation: chain.end_generation, offset: chain.end_offset };
    Wal {
        disk: superblock.disk,
        boot_epoch: superblock.boot_epoch,
        region: superblock.wal,
        segment_bytes: superblock.wal_segment_bytes,
        segments: superblock.segments(),
        groups,
        ids: OpIds::wal(),
        open: None,
        queue: VecDeque::new(),
        in_flight: None,
        payloads: PayloadWrites::default(),
        next_sequence: scan.sequence_seen_max().max(checkpointed) + 1,
        head: flushed,
        flushed_sequence: chain.flushed_sequence,
        flushed,
        first_sequences,
        durable_oldest_generation: chain.oldest_generation,
        marked_number: scan.mark().map_or(0, |mark| mark.number),
        marked_sequence: scan.mark().map_or(0, |mark| mark.sequence),
        batch_capacity: BATCH_CAPACITY_MIN,
        lost_batches: chain.nodes.iter().any(|node| matches!(node, Node::Lost { .. })),
        events: Vec::new(),
        failed: false,
    }
}

/// The last batch and the mark may be in a page cache only; after this they are on the disk.
fn rewrite_tail(device: &dyn Device, chain: &Chain<'_>, scan: &Scan) -> Result<(), OpenError> {
    if let Some(Node::Whole { found, .. }) = chain.nodes.last() {
        device.write_at(found.header.offset, &AlignedBuffer::padded(&found.bytes))?;
    }
    if let Some(mark) = scan.mark() {
        device.write_at(mark.device_offset(), &AlignedBuffer::padded(&mark.encode()))?;
    }
    device.flush()?;
    Ok(())
}

impl Wal {
    /// Writes what is queued here and now, as only recovery does.
    fn write_queued(&mut self, device: &dyn Device) -> Result<(), OpenError> {
        self.close_open();
        while let Some(Placed { place, .. }) = self.queue.front() {
            if place.generation >= self.durable_oldest_generation + self.segments {
                let offset = self.device_offset(*place);
                let reason = "no segment is left to note the damage found elsewhere in the WAL".to_owned();
                return Err(OpenError::Damaged { what: "the WAL", offset, reason });
            }
            let mut placed = self.queue.pop_front().expect("looked at the front");
            if self.first_sequences.back().is_none_or(|(generation, _)| *generation < placed.place.generation) {
                self.first_sequences.push_back((placed.place.generation, placed.batch.sequence));
            }
            // Nothing is released here, so the damage stays visible to a recovery that comes before this is durable.
            let (offset, data) = self.finish(&mut placed, self.durable_oldest_generation);
            device.write_at(offset, &data)?;
            device.flush()?;
            self.on_batch_durable(&placed, self.durable_oldest_generation);
        }
        Ok(())
    }
}
