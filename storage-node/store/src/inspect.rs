//! Looks at a disk that no process has open, and never writes: what is there, and what is wrong with it.

use std::collections::BTreeMap;
use std::fmt;

use crate::chunk::{Chunks, Limits, SnapshotInfo};
use crate::device::Device;
use crate::group::{Damage, OpenError};
use crate::ops::OpIds;
use crate::superblock::Superblock;
use crate::wal::{Extent, Inspection, Stretch, inspect};

/// What a disk holds, for people.
#[derive(Debug)]
pub struct Description {
    superblock: Superblock,
    wal: Inspection,
    groups: Vec<GroupDescription>,
    /// Entries of the group table none of whose copies can be read.
    damaged_entries: Vec<u32>,
}

#[derive(Debug)]
struct GroupDescription {
    name: String,
    checkpoint_index: u64,
    records: Option<(u64, u64)>,
    /// Bytes of the records' payloads that lie in slots.
    slot_bytes: usize,
    /// The payload of the record after the last was torn.
    torn_payload: bool,
    damage: Option<Damage>,
    snapshots: Vec<SnapshotInfo>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Repaired by the next open.
    Note,
    /// Redundancy on this disk is lost, no data.
    Warning,
    /// Data of this disk is lost; other replicas have to repair it.
    Error,
}

/// Something about a disk that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub text: String,
}

/// Reads the superblock, the whole WAL and every map.
pub fn describe(device: &dyn Device) -> Result<Description, OpenError> {
    let superblock = Superblock::read(device)?.ok_or(OpenError::NotFormatted)?;
    let (mut chunks, checkpointed) = Chunks::open(device, superblock.chunks, OpIds::chunks(), Limits::default())?;
    let bases: Vec<_> = checkpointed.iter().map(crate::store::base_of).collect();
    let (wal, logs) = inspect(device, &superblock, &bases, &mut chunks)?;
    let groups = checkpointed
        .into_iter()
        .zip(logs)
        .map(|(checkpointed, log)| GroupDescription {
            name: format!("{} replica {}", checkpointed.group, checkpointed.replica),
            checkpoint_index: checkpointed.index,
            records: log.records.first().zip(log.records.last()).map(|(first, last)| (first.index, last.index)),
            slot_bytes: log.placed.iter().flat_map(|(_, placed)| placed).map(Extent::bytes_in_slots).sum(),
            torn_payload: log.torn_payload,
            damage: checkpointed.damage.or(log.damage),
            snapshots: chunks.snapshots(checkpointed.group),
        })
        .collect();
    Ok(Description { superblock, wal, groups, damaged_entries: chunks.damaged_entries().to_vec() })
}

/// Everything that is wrong, the worst first. A disk that cannot be described at all is an error of its own.
pub fn check(device: &dyn Device) -> Result<Vec<Finding>, OpenError> {
    let described = describe(device)?;
    let mut findings = Vec::new();
    let mut find = |severity, text: String| findings.push(Finding { severity, text });
    for (copy, whole) in Superblock::whole_copies(device)?.into_iter().enumerate() {
        if !whole {
            find(Severity::Warning, format!("copy {copy} of the superblock is damaged"));
        }
    }
    for offset in &described.wal.unreadable {
        find(Severity::Warning, format!("the device cannot read the WAL's block at byte {offset}"));
    }
    for stretch in &described.wal.stretches {
        match stretch {
            Stretch::Whole { .. } => {}
            Stretch::Torn { sequence, offset } => {
                find(Severity::Note, format!("batch {sequence} at byte {offset} is torn; it was never acknowledged"));
            }
            Stretch::Damaged { sequence, offset, groups } => {
                find(Severity::Error, format!("batch {sequence} at byte {offset} of {groups} groups is damaged"));
            }
            Stretch::Lost { to } => {
                find(Severity::Error, format!("batches up to {to} are lost, and nothing tells whose they were"));
            }
        }
    }
    for entry in &described.damaged_entries {
        find(Severity::Error, format!("entry {entry} of the group table is lost, and the group in it"));
    }
    for group in &described.groups {
        if group.torn_payload {
            let last = group.records.map_or(group.checkpoint_index, |(_, last)| last);
            let text = format!("{}: the payload of record {} is torn; it was never acknowledged", group.name, last + 1);
            find(Severity::Note, text);
        }
        match &group.damage {
            None => {}
            Some(Damage::Log { intact_to }) => {
                find(Severity::Error, format!("{}: the log is intact only up to {intact_to}", group.name));
            }
            Some(Damage::Checkpoint { reason }) => find(Severity::Error, format!("{}: {reason}", group.name)),
        }
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok(findings)
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Superblock { cluster, node, disk, version, boot_epoch, clean, device_bytes, wal, chunks, .. } =
            &self.superblock;
        writeln!(f, "disk {disk} of node {node}, cluster {cluster}")?;
        let closed = if *clean { "closed in order" } else { "not closed in order" };
        writeln!(f, "format {version}, boot epoch {boot_epoch}, {closed}, {device_bytes} bytes")?;
        let segment_bytes = self.superblock.wal_segment_bytes;
        writeln!(f, "WAL [{}, {}), segments of {segment_bytes} bytes", wal.start, wal.end)?;
        writeln!(f, "chunks [{}, {})", chunks.start, chunks.end)?;
        match self.wal.marked {
            Some(sequence) => writeln!(f, "mark: flushed up to batch {sequence}")?,
            None => writeln!(f, "mark: none")?,
        }
        // Per segment, not per batch: a WAL holds many thousands.
        let mut generations: BTreeMap<u64, (u64, u64, u64)> = BTreeMap::new();
        for stretch in &self.wal.stretches {
            if let Stretch::Whole { sequence, generation, bytes } = stretch {
                let entry = generations.entry(*generation).or_insert((*sequence, *sequence, 0));
                entry.1 = *sequence;
                entry.2 += bytes;
            }
        }
        for (generation, (first, last, bytes)) in generations {
            writeln!(f, "  generation {generation}: batches {first} to {last}, {bytes} bytes")?;
        }
        for group in &self.groups {
            write!(f, "group {}: checkpoint {}", group.name, group.checkpoint_index)?;
            match group.records {
                Some((first, last)) => write!(f, ", records {first} to {last}")?,
                None => f.write_str(", no records")?,
            }
            if group.slot_bytes > 0 {
                write!(f, ", {} bytes of payload in slots", group.slot_bytes)?;
            }
            match &group.damage {
                Some(Damage::Log { intact_to }) => writeln!(f, ", DAMAGED above {intact_to}")?,
                Some(Damage::Checkpoint { reason }) => writeln!(f, ", DAMAGED: {reason}")?,
                None => writeln!(f)?,
            }
            for snapshot in &group.snapshots {
                write!(f, "  snapshot at {}", snapshot.index)?;
                match snapshot.allocated_bytes {
                    Some(bytes) => writeln!(f, ": {bytes} bytes, shared ones included")?,
                    None => writeln!(f, ": parts of its map are lost")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.text)
    }
}

#[cfg(test)]
mod tests;
