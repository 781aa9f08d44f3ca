//! Rebuilds every group's log from the linked batches.
//!
//! A group is *frozen* from damage that may have held its records up to the anchor that a later recovery wrote: what
//! lies between cannot be told to continue the log, since a truncation may be lost. See [`crate::group::Damage`].

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_id::GroupId;

use super::GroupBase;
use super::chain::{Chain, Node};
use super::payloads::StoredRecord;
use crate::group::OpenError;
use crate::wal::batch::records_of;
use crate::wal::format::{TableEntry, WalRecord, decode_record};

pub(super) struct Replayed {
    pub hard_state: Option<Bytes>,
    pub records: Vec<StoredRecord>,
    pub damaged: bool,
    /// The damage was not yet told to the group by a recovery that noted it.
    pub needs_anchor: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Intact,
    /// Damage that no recovery has told yet; `frozen`: also the records are in doubt.
    Found {
        frozen: bool,
    },
    /// Told at an earlier open, and not noted by the group since.
    Anchored,
}

struct GroupReplay {
    base: GroupBase,
    hard_state: Option<Bytes>,
    records: Vec<StoredRecord>,
    state: State,
    /// Records follow on ones that are not there. A truncation that took those lets their segment go before this one's;
    /// so it has to come.
    orphaned: bool,
}

/// The answer is in the order of `bases`.
pub(super) fn replay(chain: &Chain<'_>, bases: &[GroupBase]) -> Result<Vec<Replayed>, OpenError> {
    let fresh = |base: &GroupBase| GroupReplay {
        base: *base,
        hard_state: None,
        records: Vec::new(),
        state: State::Intact,
        orphaned: false,
    };
    let mut groups: BTreeMap<GroupId, GroupReplay> = bases.iter().map(|base| (base.group, fresh(base))).collect();
    for node in &chain.nodes {
        match node {
            Node::Whole { found, table } => {
                let mut rest = records_of(&found.header, &found.bytes);
                while !rest.is_empty() {
                    let record = decode_record(&mut rest, table.len()).map_err(|reason| OpenError::Damaged {
                        what: "a WAL batch of a format this program does not know",
                        offset: found.header.offset,
                        reason,
                    })?;
                    apply(&mut groups, table, found.header.sequence, record);
                }
            }
            Node::Damaged { header, table } => {
                for entry in *table {
                    if let Some(group) = member(&mut groups, entry) {
                        group.on_damaged(header.sequence, entry);
                    }
                }
            }
            Node::Lost { .. } => groups.values_mut().for_each(GroupReplay::on_lost),
        }
    }
    let take = |base: &GroupBase| groups.remove(&base.group).expect("every base has its replay").finish();
    Ok(bases.iter().map(take).collect())
}

/// The group of a table entry, if this replica of it still lives here.
fn member<'a>(groups: &'a mut BTreeMap<GroupId, GroupReplay>, entry: &TableEntry) -> Option<&'a mut GroupReplay> {
    groups.get_mut(&entry.group).filter(|group| group.base.replica == entry.replica)
}

fn apply(groups: &mut BTreeMap<GroupId, GroupReplay>, table: &[TableEntry], sequence: u64, record: WalRecord) {
    let slot = match &record {
        WalRecord::HardState { slot, .. }
        | WalRecord::Truncate { slot, .. }
        | WalRecord::Entry { slot, .. }
        | WalRecord::Anchor { slot, .. } => *slot,
    };
    // A record's slot was checked against the table when it was decoded.
    let Some(group) = member(groups, &table[usize::from(slot)]) else { return };
    match record {
        WalRecord::HardState { bytes, .. } => group.on_hard_state(sequence, bytes),
        WalRecord::Truncate { from, .. } => group.truncate(from),
        WalRecord::Entry { index, header, payload, .. } => {
            group.on_entry(StoredRecord { index, header, payload, sequence });
        }
        WalRecord::Anchor { from, .. } => group.on_anchor(sequence, from),
    }
}

impl GroupReplay {
    fn on_hard_state(&mut self, sequence: u64, bytes: Bytes) {
        if sequence > self.base.wal_sequence {
            self.hard_state = Some(bytes);
            if self.state == State::Anchored {
                self.state = State::Intact;
            }
        }
    }

    fn truncate(&mut self, from: u64) {
        if self.state != (State::Found { frozen: true }) {
            let kept = self.records.partition_point(|record| record.index < from);
            self.records.truncate(kept);
            let end = self.records.last().map_or(self.base.index, |last| last.index);
            self.orphaned &= from > end + 1;
        }
    }

    fn on_entry(&mut self, record: StoredRecord) {
        if self.state == (State::Found { frozen: true }) || self.orphaned {
            return;
        }
        let follows_base = record.index <= self.base.index + 1;
        match self.records.last() {
            Some(last) if record.index == last.index + 1 => {}
            // The checkpoint jumped over the records before it, as an installed state does.
            Some(last) if record.index == self.base.index + 1 && last.index < self.base.index => self.records.clear(),
            None if follows_base => {}
            _ => {
                self.orphaned = true;
                return;
            }
        }
        self.records.push(record);
    }

    fn on_anchor(&mut self, sequence: u64, from: u64) {
        // A checkpoint made after the damage was told has noted it.
        self.state = if sequence > self.base.wal_sequence { State::Anchored } else { State::Intact };
        self.truncate(from);
    }

    /// A batch is unreadable, and this is what it did to the group.
    fn on_damaged(&mut self, sequence: u64, entry: &TableEntry) {
        let hard_state_lost = (entry.hard_state || entry.anchor) && sequence > self.base.wal_sequence;
        let touches_log = entry.last_index != 0 || entry.truncate_from != 0;
        // Below the checkpoint records are kept for others only: without some of them there are fewer.
        let log_lost = touches_log && entry.last_index.max(entry.truncate_from) > self.base.index;
        if log_lost {
            self.state = State::Found { frozen: true };
        } else {
            if touches_log {
                self.records.clear();
            }
            if hard_state_lost && self.state != (State::Found { frozen: true }) {
                self.state = State::Found { frozen: false };
            }
        }
    }

    fn on_lost(&mut self) {
        self.state = State::Found { frozen: true };
    }

    fn finish(mut self) -> Replayed {
        if self.orphaned {
            // What should come between is missing without a trace.
            self.on_lost();
        }
        if self.records.last().is_some_and(|last| last.index < self.base.index) {
            self.records.clear();
        }
        Replayed {
            hard_state: self.hard_state,
            records: self.records,
            damaged: self.state != State::Intact,
            needs_anchor: matches!(self.state, State::Found { .. }),
        }
    }
}
