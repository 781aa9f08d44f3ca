//! Repair: what the disk has lost is asked of the other replicas, and who asks is answered.
//!
//! Not here: whether a copy is right, and how it is written; the store proves both. Driven by the shard: the store
//! tells what is corrupt, peers answer, and once per step everything that can go on does.
//!
//! Invariants:
//! 1. A read that meets corrupt blocks waits, and is read again when they are repaired. It fails only when every other
//!    replica of the group has been heard and none has the blocks.
//! 2. Each slot is asked for once at a time, of one replica at a time.
//! 3. Nothing here wakes the node while there is nothing to repair.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_consensus::Timestamp;
use holdfast_id::{GroupId, NodeId, ReplicaId};
use holdfast_protocol::peer::{PeerMessage, SlotCopy};
use holdfast_store::chunk::{Mending, RepairEvent};
use holdfast_store::group::ReadError;

use crate::admin::{LastRepair, RepairReport};
use crate::core::PendingRead;
use crate::shard::Shard;

/// Slots asked for at a time for what no client waits for; 4 MiB. More is found again by the scrub, which waits for
/// these. Slots that clients wait for are bounded by the clients' windows.
const ASKS_MAX: usize = 64;
/// Slots read for other replicas at a time.
const QUESTIONS_MAX: usize = 64;
/// A replica that has not answered for so long is passed over for the next: many times what a busy disk needs.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Before a replica that could not tell, or whose copy did not fit the time here, is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// Before a look for somebody to ask, where nobody that may have it is connected.
const NOBODY_AFTER: Duration = Duration::from_millis(500);
/// A slot that no replica had is asked for again, when it is wanted again, after so long.
const LOST_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Slots that no replica had, of all groups, kept for the report; beyond it the oldest numbers are forgotten.
const LOST_MAX: usize = 4096;

const SLOT_BLOCKS: u64 = 16;

/// Sixteen blocks of a group.
type Slot = (GroupId, u64);

#[derive(Default)]
pub(crate) struct Repairs {
    asks: BTreeMap<Slot, Ask>,
    /// Reads that met corrupt blocks of a slot that is asked for.
    parked: Vec<(Slot, PendingRead)>,
    /// Slots some of which no other replica has either, and when that was found.
    lost: BTreeMap<Slot, Timestamp>,
    /// Slots being read for others, by the store's token.
    questions: BTreeMap<u64, Question>,
    /// Copies on their way into the store, by its token.
    mending: BTreeMap<u64, Slot>,
    tallies: BTreeMap<GroupId, Tally>,
}

struct Ask {
    /// They were heard, and do not have all of it.
    heard: BTreeSet<ReplicaId>,
    /// Asked last; the next one is the one after it.
    last: Option<ReplicaId>,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    Waits { until: Timestamp },
    Asked { until: Timestamp },
    Mends,
}

struct Question {
    node: NodeId,
    group: GroupId,
    from: ReplicaId,
    slot: u64,
}

#[derive(Default)]
struct Tally {
    corrupt_slots: u64,
    repaired_blocks: u64,
    mismatches: u64,
    last: Option<(NodeId, Timestamp, u64)>,
}

impl Repairs {
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        let until = |ask: &Ask| match ask.state {
            State::Waits { until } | State::Asked { until } => Some(until),
            State::Mends => None,
        };
        self.asks.values().filter_map(until).min()
    }

    /// The scrub waits while so much is asked for.
    pub(crate) fn is_busy(&self) -> bool {
        self.asks.len() >= ASKS_MAX / 2
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.asks.is_empty()
    }

    /// Somebody came who may have what is missing.
    pub(crate) fn on_peer_connected(&mut self, now: Timestamp) {
        for ask in self.asks.values_mut() {
            if let State::Waits { until } = &mut ask.state {
                *until = now;
            }
        }
    }

    pub(crate) fn forget(&mut self, group: GroupId) {
        self.asks.retain(|(of, _), _| *of != group);
        self.lost.retain(|(of, _), _| *of != group);
        self.parked.retain(|((of, _), _)| *of != group);
        self.tallies.remove(&group);
    }

    pub(crate) fn report(&self, group: GroupId, now: Timestamp) -> RepairReport {
        let none = Tally::default();
        let tally = self.tallies.get(&group).unwrap_or(&none);
        let of_group = (group, 0)..=(group, u64::MAX);
        RepairReport {
            corrupt_slots: tally.corrupt_slots,
            repaired_blocks: tally.repaired_blocks,
            mismatches: tally.mismatches,
            pending_slots: self.asks.range(of_group.clone()).count() as u64,
            lost_slots: self.lost.range(of_group).map(|((_, slot), _)| *slot).collect(),
            last: tally.last.map(|(from, at, slot)| LastRepair {
                from,
                ago: now.since(at),
                first_block: slot * SLOT_BLOCKS,
            }),
        }
    }

    fn ask(&mut self, slot: Slot, now: Timestamp) {
        let state = State::Waits { until: now };
        if let std::collections::btree_map::Entry::Vacant(entry) = self.asks.entry(slot) {
            entry.insert(Ask { heard: BTreeSet::new(), last: None, state });
            self.tallies.entry(slot.0).or_default().corrupt_slots += 1;
        }
    }

    fn is_lost(&self, slot: Slot, now: Timestamp) -> bool {
        self.lost.get(&slot).is_some_and(|at| now.since(*at) < LOST_AGAIN_AFTER)
    }
}

impl Shard {
    /// A read met corrupt blocks. `Err`: it has failed for good, and goes back to who asked.
    pub(crate) fn park_read(&mut self, read: PendingRead, first_block: u64) -> Result<(), PendingRead> {
        let slot = (read.group, first_block / SLOT_BLOCKS);
        if self.repairs.is_lost(slot, self.core.now) {
            return Err(read);
        }
        self.repairs.ask(slot, self.core.now);
        self.repairs.parked.push((slot, read));
        Ok(())
    }

    pub(crate) fn on_repair_event(&mut self, event: RepairEvent) {
        match event {
            RepairEvent::Corrupt { group, slots } => {
                for slot in slots {
                    let slot = (group, slot);
                    if self.repairs.asks.len() < ASKS_MAX && !self.repairs.is_lost(slot, self.core.now) {
                        self.repairs.ask(slot, self.core.now);
                    }
                }
            }
            RepairEvent::SlotRead { token, result } => self.on_slot_read(token, result),
            RepairEvent::Mended { token, result } => self.on_mended(token, result),
            RepairEvent::Unknown { group } => self.look_through(group),
            RepairEvent::Scrubbed { bytes, finished } => self.on_scrubbed(bytes, finished),
        }
    }

    pub(crate) fn on_repair_request(
        &mut self,
        node: NodeId,
        group: GroupId,
        from: ReplicaId,
        to: ReplicaId,
        slot: u64,
    ) {
        let Some(volume) = self.volumes.get(&group) else { return };
        if volume.replica.id() != to || volume.replica.node_of(from) != Some(node) {
            return;
        }
        let question = Question { node, group, from, slot };
        if self.repairs.questions.len() >= QUESTIONS_MAX || volume.stopped().is_some() {
            return self.reply(&question, None);
        }
        let applied = volume.replica.applied().index.0;
        let token = self.core.next_token();
        self.repairs.questions.insert(token, question);
        self.core.store.read_slot(group, slot, applied, token);
    }

    fn on_slot_read(&mut self, token: u64, result: Result<holdfast_store::chunk::SlotCopy, ReadError>) {
        let Some(question) = self.repairs.questions.remove(&token) else { return };
        let copy = result.ok().map(|copy| SlotCopy {
            index: copy.index,
            present: copy.present,
            bad: copy.bad,
            data: copy.data,
        });
        self.reply(&question, copy);
    }

    fn reply(&mut self, question: &Question, copy: Option<SlotCopy>) {
        let Question { node, group, from: to, slot } = *question;
        let Some(volume) = self.volumes.get(&group) else { return };
        let reply = PeerMessage::RepairReply { group, from: volume.replica.id(), to, slot, copy };
        self.core.effects.peers.push((node, reply));
    }

    pub(crate) fn on_repair_reply(
        &mut self,
        group: GroupId,
        from: ReplicaId,
        to: ReplicaId,
        number: u64,
        copy: Option<SlotCopy>,
    ) {
        let slot = (group, number);
        let Some(volume) = self.volumes.get(&group).filter(|volume| volume.replica.id() == to) else { return };
        let Some(ask) = self.repairs.asks.get_mut(&slot).filter(|ask| ask.last == Some(from)) else { return };
        if !matches!(ask.state, State::Asked { .. }) {
            return;
        }
        let Some(SlotCopy { index, present, bad, data }) = copy else {
            ask.state = State::Waits { until: self.core.now + AGAIN_AFTER };
            return;
        };
        ask.state = State::Mends;
        let token = self.core.next_token();
        self.repairs.mending.insert(token, slot);
        let copy = holdfast_store::chunk::SlotCopy { index, present, bad, data };
        self.core.store.mend(group, number, copy, volume.replica.applied().index.0, token);
    }

    fn on_mended(&mut self, token: u64, result: Mending) {
        let Some(slot) = self.repairs.mending.remove(&token) else { return };
        let now = self.core.now;
        let Some(ask) = self.repairs.asks.get_mut(&slot) else { return };
        let of = ask.last.expect("a copy came from somebody");
        let from = self.volumes.get(&slot.0).and_then(|volume| volume.replica.node_of(of));
        let tally = self.repairs.tallies.entry(slot.0).or_default();
        if let Mending::Mended { blocks, .. } = result
            && blocks > 0
        {
            tally.repaired_blocks += u64::from(blocks);
            tally.last = from.map(|from| (from, now, slot.1));
        }
        match result {
            Mending::Mended { missing: 0, .. } => {
                self.repairs.lost.remove(&slot);
                self.end(slot);
            }
            Mending::Mended { .. } => {
                ask.heard.insert(of);
                ask.state = State::Waits { until: now };
            }
            Mending::Mismatch => {
                tally.mismatches += 1;
                ask.heard.insert(of);
                ask.state = State::Waits { until: now };
            }
            // The rebuild brings what is lost, and all the rest.
            Mending::Behind if self.volumes.get(&slot.0).is_some_and(|volume| volume.replica.installing()) => {
                self.end(slot);
            }
            Mending::Behind | Mending::Stale | Mending::Full => {
                ask.state = State::Waits { until: now + AGAIN_AFTER };
            }
        }
    }

    /// Asks on where an answer did not come or was not enough.
    pub(crate) fn drive_repairs(&mut self) {
        let now = self.core.now;
        let is_due = |ask: &Ask| match ask.state {
            State::Waits { until } | State::Asked { until } => until <= now,
            State::Mends => false,
        };
        let due: Vec<Slot> = self.repairs.asks.iter().filter(|(_, ask)| is_due(ask)).map(|(slot, _)| *slot).collect();
        for slot in due {
            self.ask_next(slot);
        }
    }

    fn ask_next(&mut self, slot: Slot) {
        let (group, number) = slot;
        let now = self.core.now;
        let Some(volume) = self.volumes.get(&group) else {
            return self.repairs.forget(group);
        };
        let ask = self.repairs.asks.get_mut(&slot).expect("it was found due");
        let own = volume.replica.id();
        let others = volume.replica.directory().iter().filter(|(replica, _)| **replica != own);
        let others: Vec<(ReplicaId, NodeId)> = others.map(|(replica, node)| (*replica, *node)).collect();
        if others.iter().all(|(replica, _)| ask.heard.contains(replica)) {
            self.repairs.lost.insert(slot, now);
            while self.repairs.lost.len() > LOST_MAX {
                self.repairs.lost.pop_first();
            }
            return self.end(slot);
        }
        let open =
            others.iter().filter(|(replica, node)| !ask.heard.contains(replica) && self.core.connected.contains(node));
        let open: Vec<(ReplicaId, NodeId)> = open.copied().collect();
        let next = open.iter().find(|(replica, _)| Some(*replica) > ask.last).or(open.first());
        match next {
            Some((replica, node)) => {
                ask.last = Some(*replica);
                ask.state = State::Asked { until: now + ANSWER_WITHIN };
                let message = PeerMessage::RepairRequest { group, from: own, to: *replica, slot: number };
                self.core.effects.peers.push((*node, message));
            }
            None => ask.state = State::Waits { until: now + NOBODY_AFTER },
        }
    }

    /// Nothing more is to be had: whoever waits reads again.
    fn end(&mut self, slot: Slot) {
        self.repairs.asks.remove(&slot);
        let parked = std::mem::take(&mut self.repairs.parked);
        let (woken, parked): (Vec<_>, Vec<_>) = parked.into_iter().partition(|(of, _)| *of == slot);
        self.repairs.parked = parked;
        for (_, read) in woken {
            self.core.read(read.group, read.first_block, read.count, read.purpose);
        }
        if self.repairs.is_quiet() {
            self.look_through(slot.0);
        }
    }
}
