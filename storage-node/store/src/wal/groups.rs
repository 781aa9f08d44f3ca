//! What the WAL still holds of every group, and which segments that pins.
//!
//! Only durable batches count: a batch in flight lies at or behind the last flushed one, and that is never released.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use holdfast_id::{GroupId, ReplicaId};

use super::extents::Extent;
use super::format::TableEntry;

/// A group's part of the WAL.
#[derive(Debug)]
pub(super) struct GroupLog {
    pub replica: ReplicaId,
    pub checkpoint_index: u64,
    /// Batches up to this one hold no hard state newer than the checkpoint's.
    checkpoint_sequence: u64,
    /// Records up to here may leave the WAL.
    released: u64,
    /// Last record appended, flushed or not; the next one follows it.
    pub last_appended: u64,
    /// Ascending by generation: the last record of the group in each.
    spans: VecDeque<Span>,
    /// The newest hard state or anchor in the WAL, unless the checkpoint has a newer one.
    hard_state: Option<HardStatePlace>,
    /// The oldest generation this group needs, as entered in `Groups::pins`.
    pin: Option<u64>,
    /// `CheckpointWanted` was told and no checkpoint was made since.
    wanted: bool,
    /// Records that are not released and have payload in slots: index and bytes, ascending.
    payloads: VecDeque<(u64, u64)>,
    slot_bytes: u64,
}

#[derive(Debug)]
struct Span {
    generation: u64,
    last_index: u64,
}

#[derive(Debug)]
struct HardStatePlace {
    generation: u64,
    sequence: u64,
}

#[derive(Debug, Default)]
pub(super) struct Groups {
    logs: BTreeMap<GroupId, GroupLog>,
    pins: BTreeSet<(u64, GroupId)>,
    /// Of all groups.
    slot_bytes: u64,
}

impl Groups {
    pub fn get(&self, group: GroupId) -> Option<&GroupLog> {
        self.logs.get(&group)
    }

    pub fn get_mut(&mut self, group: GroupId) -> Option<&mut GroupLog> {
        self.logs.get_mut(&group)
    }

    /// The oldest generation any group needs.
    pub fn oldest_pin(&self) -> Option<u64> {
        self.pins.first().map(|(generation, _)| *generation)
    }

    /// Groups that need a generation up to `generation` and were not yet asked for a checkpoint; asks them now.
    pub fn ask_for_checkpoints(&mut self, generation: u64) -> Vec<GroupId> {
        let holding = self.pins.iter().take_while(|(pin, _)| *pin <= generation);
        let groups: Vec<GroupId> = holding.map(|(_, group)| *group).collect();
        groups
            .into_iter()
            .filter(|group| {
                let log = self.logs.get_mut(group).expect("only known groups are pinned");
                !std::mem::replace(&mut log.wanted, true)
            })
            .collect()
    }

    /// Bytes of payload in slots that records name which are not released.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Whether so many bytes of payload more stay within `most`. One payload always has room.
    pub fn has_room_for(&self, slot_bytes: u64, most: u64) -> bool {
        slot_bytes == 0 || self.slot_bytes == 0 || self.slot_bytes + slot_bytes <= most
    }

    /// The group with the most payload in slots, of those that were not yet asked for a checkpoint; asks it now.
    pub fn ask_for_payloads(&mut self) -> Option<GroupId> {
        let holding = self.logs.iter_mut().filter(|(_, log)| log.slot_bytes > 0 && !log.wanted);
        let (group, log) = holding.max_by_key(|(_, log)| log.slot_bytes)?;
        log.wanted = true;
        Some(*group)
    }

    /// A record was appended.
    pub fn note_payload(&mut self, group: GroupId, index: u64, placed: &[Extent]) {
        let bytes = placed.iter().map(Extent::bytes_in_slots).sum::<usize>() as u64;
        if let Some(log) = self.logs.get_mut(&group).filter(|_| bytes > 0) {
            log.payloads.push_back((index, bytes));
            log.slot_bytes += bytes;
            self.slot_bytes += bytes;
        }
    }

    /// Records from `from` on were truncated.
    pub fn forget_payloads(&mut self, group: GroupId, from: u64) {
        let Some(log) = self.logs.get_mut(&group) else { return };
        while let Some((_, bytes)) = log.payloads.pop_back_if(|(index, _)| *index >= from) {
            log.slot_bytes -= bytes;
            self.slot_bytes -= bytes;
        }
    }

    pub fn insert(&mut self, group: GroupId, replica: ReplicaId, checkpoint_index: u64, checkpoint_sequence: u64) {
        let log = GroupLog {
            replica,
            checkpoint_index,
            checkpoint_sequence,
            released: 0,
            last_appended: checkpoint_index,
            spans: VecDeque::new(),
            hard_state: None,
            pin: None,
            wanted: false,
            payloads: VecDeque::new(),
            slot_bytes: 0,
        };
        let previous = self.logs.insert(group, log);
        assert!(previous.is_none(), "{group} was added twice");
    }

    pub fn remove(&mut self, group: GroupId) {
        let Some(log) = self.logs.remove(&group) else { return };
        self.slot_bytes -= log.slot_bytes;
        if let Some(pin) = log.pin {
            self.pins.remove(&(pin, group));
        }
    }

    /// A batch with this entry became durable. Entries of groups or replicas deleted meanwhile are passed over.
    pub fn on_durable(&mut self, entry: &TableEntry, generation: u64, sequence: u64) {
        let Some(log) = self.logs.get_mut(&entry.group).filter(|log| log.replica == entry.replica) else { return };
        if entry.truncate_from != 0 {
            for span in &mut log.spans {
                span.last_index = span.last_index.min(entry.truncate_from - 1);
            }
        }
        if entry.last_index != 0 {
            match log.spans.back_mut() {
                Some(span) if span.generation == generation => span.last_index = entry.last_index,
                _ => log.spans.push_back(Span { generation, last_index: entry.last_index }),
            }
        }
        if (entry.hard_state || entry.anchor) && sequence > log.checkpoint_sequence {
            log.hard_state = Some(HardStatePlace { generation, sequence });
        }
        self.update_pin(entry.group);
    }

    pub fn on_checkpoint(&mut self, group: GroupId, index: u64, sequence: u64) {
        let Some(log) = self.logs.get_mut(&group) else { return };
        log.checkpoint_index = log.checkpoint_index.max(index);
        log.last_appended = log.last_appended.max(index);
        log.checkpoint_sequence = log.checkpoint_sequence.max(sequence);
        log.wanted = false;
        if log.hard_state.as_ref().is_some_and(|place| place.sequence <= log.checkpoint_sequence) {
            log.hard_state = None;
        }
        self.update_pin(group);
    }

    /// Records up to `to`, or to the checkpoint where that is less, may leave.
    pub fn release(&mut self, group: GroupId, to: u64) {
        let Some(log) = self.logs.get_mut(&group) else { return };
        log.released = log.released.max(to.min(log.checkpoint_index));
        let released = log.released;
        while let Some((_, bytes)) = log.payloads.pop_front_if(|(index, _)| *index <= released) {
            log.slot_bytes -= bytes;
            self.slot_bytes -= bytes;
        }
        self.update_pin(group);
    }

    fn update_pin(&mut self, group: GroupId) {
        let Some(log) = self.logs.get_mut(&group) else { return };
        while log.spans.front().is_some_and(|span| span.last_index <= log.released) {
            log.spans.pop_front();
        }
        let records = log.spans.front().map(|span| span.generation);
        let hard_state = log.hard_state.as_ref().map(|place| place.generation);
        let pin = match (records, hard_state) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if pin != log.pin {
            if let Some(old) = log.pin {
                self.pins.remove(&(old, group));
            }
            if let Some(new) = pin {
                self.pins.insert((new, group));
            }
            log.pin = pin;
        }
    }
}
