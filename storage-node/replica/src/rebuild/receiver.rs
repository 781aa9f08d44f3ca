//! [`Receiver`]: the side of a rebuild that is brought up, and asks.
//!
//! Not here: storing. Whoever drives it has stopped applying, has everything applied in a checkpoint, and carries out
//! the actions in order.
//!
//! Page by page: the sender's changes above the base, then the own map over the same slots; where the indices differ
//! the slot is fetched. Equal indices are equal content, because both maps come of one log. Slots the own map has and
//! the sender does not name cannot be above the base of an honest history; then, and where the whole is not the
//! sender's at the end, everything is compared from index 0, once.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use holdfast_consensus::{Position, Timestamp};
use holdfast_id::ReplicaId;
use holdfast_store::chunk::{Changes, SlotChange};
use holdfast_store::device::BLOCK_BYTES;
use holdfast_store::group::{InstalledSlot, ReadError};

use crate::rebuild::message::RebuildMessage;
use crate::rebuild::{
    COMMIT_BYTES, RESEND_AFTER, RETRY_AFTER, RebuildId, SILENCE_MAX, SLOTS_IN_FLIGHT_MAX, SLOTS_IN_FLIGHT_MIN,
};

/// Bytes that a slot without data counts before a commit: what it takes in memory and in the map.
const SLOT_OVERHEAD_BYTES: u64 = 256;

/// What the receiver wants done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverAction {
    /// To the sender.
    Send(RebuildMessage),
    /// Ask the own map which slots changed above an index; [`Receiver::on_own`] follows.
    Own { above: u64, from_slot: u64 },
    /// Give it to the store; where that has no space, [`Receiver::on_full`].
    Install(InstalledSlot),
    /// Make what was installed durable; [`Receiver::on_committed`] follows.
    Commit,
    /// Everything is here: end the install with this state. Where the hash of the map differs,
    /// [`Receiver::on_hash_mismatch`].
    Finish { state: Bytes },
    /// It cannot go on. What was installed stays, and is found by the next rebuild.
    GiveUp { reason: GiveUp },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GiveUp {
    #[error("the sender was not heard any more")]
    Silence,
    #[error("the sender ended it")]
    Aborted,
    #[error("another term began, and its leader offers what there is to offer")]
    Deposed,
    #[error("the sender contradicts itself")]
    Nonsense,
    #[error("the map here cannot be read")]
    OwnMap,
    #[error("the map is not the sender's though every slot was compared")]
    Hash,
    #[error("the state cannot be read by this build")]
    State,
    #[error("the state names snapshots that are not here")]
    Snapshots,
}

/// What was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    pub id: RebuildId,
    pub from: ReplicaId,
    pub position: Position,
    pub hash: u128,
    pub state_bytes: u32,
}

#[derive(Debug)]
enum Stage {
    /// The sender is asked for the page from this slot on.
    Listing {
        from_slot: u64,
    },
    /// The own map is asked for the same.
    Comparing {
        theirs: Changes,
        from_slot: u64,
        own: BTreeMap<u64, u64>,
    },
    /// The page's differing slots are fetched.
    Copying {
        next_slot: Option<u64>,
    },
    /// The last commit.
    Committing,
    State(BytesMut),
    Finishing,
}

/// See the module.
#[derive(Debug)]
pub struct Receiver {
    pub offer: Offer,
    above: u64,
    stage: Stage,
    todo: VecDeque<SlotChange>,
    in_flight: BTreeMap<u64, SlotChange>,
    /// How many may be.
    window: usize,
    /// The store had no space for them.
    stalled: Vec<InstalledSlot>,
    uncommitted_bytes: u64,
    committing: bool,
    heard_at: Timestamp,
    /// When what is due is asked for again.
    again_at: Timestamp,
    /// Slots found different, and slots compared.
    pub fetched: u64,
    pub compared: u64,
    actions: Vec<ReceiverAction>,
}

impl Receiver {
    /// `base`: index of the own checkpoint. `installing`: the highest index whose slots may be here already.
    pub fn new(offer: Offer, base: u64, installing: u64, now: Timestamp) -> Receiver {
        // Behind what was begun here once, slots may have to go back; only the full comparison sees those.
        let above = if offer.position.index.0 < installing { 0 } else { base };
        let mut receiver = Receiver {
            offer,
            above,
            stage: Stage::Listing { from_slot: 0 },
            todo: VecDeque::new(),
            in_flight: BTreeMap::new(),
            window: SLOTS_IN_FLIGHT_MIN,
            stalled: Vec::new(),
            uncommitted_bytes: 0,
            committing: false,
            heard_at: now,
            again_at: now,
            fetched: 0,
            compared: 0,
            actions: Vec::new(),
        };
        receiver.list(now, 0);
        receiver
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        let waits = self.awaits_sender() || !self.stalled.is_empty() || matches!(self.stage, Stage::Finishing);
        waits.then_some(self.again_at)
    }

    pub fn take_actions(&mut self) -> Vec<ReceiverAction> {
        std::mem::take(&mut self.actions)
    }

    /// A message of the offered rebuild, from its sender.
    pub fn on_message(&mut self, now: Timestamp, message: RebuildMessage) {
        self.heard_at = now;
        self.again_at = self.again_at.max(now + RESEND_AFTER);
        match message {
            RebuildMessage::Changes { above, from_slot, changes, .. } => {
                self.on_changes(above, from_slot, changes);
            }
            RebuildMessage::Slot { slot, .. } => self.on_slot(now, slot),
            RebuildMessage::State { offset, bytes, .. } => self.on_state(now, offset, &bytes),
            RebuildMessage::Abort { .. } => self.give_up(GiveUp::Aborted),
            // The offer again, or what only senders hear.
            _ => {}
        }
    }

    /// The own map's answer.
    pub fn on_own(&mut self, now: Timestamp, result: Result<Changes, ReadError>) {
        let Stage::Comparing { theirs, from_slot, own } = &mut self.stage else { return };
        let Ok(changes) = result else { return self.give_up(GiveUp::OwnMap) };
        own.extend(changes.slots.iter().map(|change| (change.slot, change.index)));
        match changes.next_slot {
            Some(next) if theirs.next_slot.is_none_or(|end| next < end) => {
                self.actions.push(ReceiverAction::Own { above: self.above, from_slot: next });
            }
            _ => {
                let (theirs, from_slot, own) = (std::mem::take(&mut theirs.slots), *from_slot, std::mem::take(own));
                self.compare(now, &theirs, from_slot, own);
            }
        }
    }

    /// The store had no space for a slot: tried again later.
    pub fn on_full(&mut self, now: Timestamp, slot: InstalledSlot) {
        self.uncommitted_bytes = self.uncommitted_bytes.saturating_sub(weight(&slot));
        self.stalled.push(slot);
        self.again_at = now + RETRY_AFTER;
    }

    /// The commit asked for is durable.
    pub fn on_committed(&mut self, now: Timestamp) {
        self.committing = false;
        self.pump(now);
    }

    /// Something that should not be is here, or the other way round: everything is compared, once.
    pub fn on_hash_mismatch(&mut self, now: Timestamp) {
        if self.above == 0 {
            return self.give_up(GiveUp::Hash);
        }
        self.compare_all(now);
    }

    /// Pages of the own map were lost. Those that hold nothing newer than the base are found by comparing everything;
    /// the rest is for the scrub, which counts what is there.
    pub fn on_map_lost(&mut self, now: Timestamp) {
        if self.above == 0 {
            return self.give_up(GiveUp::OwnMap);
        }
        self.compare_all(now);
    }

    /// The end could not be written now.
    pub fn on_finish_refused(&mut self, now: Timestamp) {
        self.again_at = now + RETRY_AFTER;
    }

    pub fn give_up(&mut self, reason: GiveUp) {
        self.actions.push(ReceiverAction::GiveUp { reason });
    }

    pub fn on_deadline(&mut self, now: Timestamp) {
        if self.deadline().is_none_or(|at| at > now) {
            return;
        }
        if self.awaits_sender() && self.heard_at + SILENCE_MAX <= now {
            return self.give_up(GiveUp::Silence);
        }
        self.again_at = now + RESEND_AFTER;
        for slot in std::mem::take(&mut self.stalled) {
            self.install(slot);
        }
        let id = self.offer.id;
        match &self.stage {
            Stage::Listing { from_slot } => {
                let (above, from_slot) = (self.above, *from_slot);
                self.send(RebuildMessage::AskChanges { id, above, from_slot });
            }
            Stage::Copying { .. } => {
                // More than what lies between takes was asked for.
                self.window = SLOTS_IN_FLIGHT_MIN;
                for change in self.in_flight.values().take(self.window).cloned().collect::<Vec<_>>() {
                    self.send(RebuildMessage::AskSlot { id, change });
                }
            }
            Stage::State(bytes) => {
                let offset = bytes.len() as u32;
                self.send(RebuildMessage::AskState { id, offset });
            }
            Stage::Finishing => {
                // The state was complete once and is asked for again: it is not kept twice.
                self.stage = Stage::State(BytesMut::new());
                self.send(RebuildMessage::AskState { id, offset: 0 });
            }
            Stage::Comparing { .. } | Stage::Committing => {}
        }
        self.pump(now);
    }

    fn awaits_sender(&self) -> bool {
        match self.stage {
            Stage::Listing { .. } | Stage::State(_) => true,
            Stage::Copying { .. } => !self.in_flight.is_empty(),
            Stage::Comparing { .. } | Stage::Committing | Stage::Finishing => false,
        }
    }

    fn list(&mut self, now: Timestamp, from_slot: u64) {
        self.stage = Stage::Listing { from_slot };
        self.heard_at = self.heard_at.max(now);
        self.again_at = now + RESEND_AFTER;
        self.send(RebuildMessage::AskChanges { id: self.offer.id, above: self.above, from_slot });
    }

    fn compare_all(&mut self, now: Timestamp) {
        self.above = 0;
        self.todo.clear();
        self.in_flight.clear();
        self.list(now, 0);
    }

    fn on_changes(&mut self, above: u64, from_slot: u64, changes: Changes) {
        let Stage::Listing { from_slot: asked } = self.stage else { return };
        if (above, from_slot) != (self.above, asked) {
            return; // An answer to what was asked before.
        }
        let mut least = from_slot;
        for change in &changes.slots {
            if change.slot < least || change.index <= above || change.index > self.offer.position.index.0 {
                return self.give_up(GiveUp::Nonsense);
            }
            least = change.slot + 1;
        }
        if changes.next_slot.is_some_and(|next| next < least || next <= from_slot) {
            return self.give_up(GiveUp::Nonsense);
        }
        self.compared += changes.slots.len() as u64;
        self.stage = Stage::Comparing { theirs: changes, from_slot, own: BTreeMap::new() };
        self.actions.push(ReceiverAction::Own { above, from_slot });
    }

    fn compare(&mut self, now: Timestamp, theirs: &[SlotChange], from_slot: u64, mut own: BTreeMap<u64, u64>) {
        let Stage::Comparing { theirs: Changes { next_slot, .. }, .. } = self.stage else { return };
        own.retain(|slot, _| *slot >= from_slot && next_slot.is_none_or(|end| *slot < end));
        let mut differing = Vec::new();
        for change in theirs {
            if own.remove(&change.slot) != Some(change.index) {
                differing.push(change.clone());
            }
        }
        if self.above > 0 && !own.is_empty() {
            return self.compare_all(now);
        }
        self.stage = Stage::Copying { next_slot };
        // The sender knows nothing of these.
        let gone = own.into_keys().map(|slot| SlotChange { slot, index: 0, present: 0 });
        for change in gone.chain(differing) {
            self.fetched += 1;
            if change.present == 0 {
                let SlotChange { slot, index, present } = change;
                self.install(InstalledSlot { slot, index, present, data: Bytes::new(), checksums: [].into() });
            } else {
                self.todo.push_back(change);
            }
        }
        self.pump(now);
    }

    fn on_slot(&mut self, now: Timestamp, slot: InstalledSlot) {
        let asked = self.in_flight.get(&slot.slot);
        if asked.is_none_or(|change| (change.index, change.present) != (slot.index, slot.present)) {
            return; // An answer to what was asked before, or that came already.
        }
        let sums = slot.data.chunks_exact(BLOCK_BYTES).map(holdfast_block::checksum);
        if !sums.eq(slot.checksums.iter().copied()) {
            return; // Broken on its way: asked for again.
        }
        self.in_flight.remove(&slot.slot);
        self.window = (self.window + 1).min(SLOTS_IN_FLIGHT_MAX);
        self.install(slot);
        self.pump(now);
    }

    fn on_state(&mut self, now: Timestamp, offset: u32, bytes: &Bytes) {
        let Stage::State(state) = &mut self.stage else { return };
        if offset as usize != state.len() || bytes.is_empty() {
            return;
        }
        state.extend_from_slice(bytes);
        if state.len() > self.offer.state_bytes as usize {
            return self.give_up(GiveUp::Nonsense);
        }
        self.next_of_state(now);
    }

    fn next_of_state(&mut self, now: Timestamp) {
        let Stage::State(state) = &mut self.stage else { return };
        let offset = state.len() as u32;
        if offset == self.offer.state_bytes {
            let state = std::mem::take(state).freeze();
            self.stage = Stage::Finishing;
            self.again_at = now + RETRY_AFTER;
            self.actions.push(ReceiverAction::Finish { state });
        } else {
            self.again_at = now + RESEND_AFTER;
            self.send(RebuildMessage::AskState { id: self.offer.id, offset });
        }
    }

    fn install(&mut self, slot: InstalledSlot) {
        self.uncommitted_bytes += weight(&slot);
        self.actions.push(ReceiverAction::Install(slot));
    }

    /// Does whatever can be done without a further answer.
    fn pump(&mut self, now: Timestamp) {
        let room = self.stalled.is_empty() && self.uncommitted_bytes < 2 * COMMIT_BYTES;
        while room && self.in_flight.len() < self.window {
            let Some(change) = self.todo.pop_front() else { break };
            if self.in_flight.is_empty() {
                // Nothing was due from the sender meanwhile: its silence begins now.
                self.heard_at = now;
                self.again_at = now + RESEND_AFTER;
            }
            self.in_flight.insert(change.slot, change.clone());
            self.send(RebuildMessage::AskSlot { id: self.offer.id, change });
        }
        if self.uncommitted_bytes >= COMMIT_BYTES {
            self.commit();
        }
        let page_done = self.todo.is_empty() && self.in_flight.is_empty() && self.stalled.is_empty();
        match self.stage {
            Stage::Copying { next_slot: Some(next) } if page_done => self.list(now, next),
            Stage::Copying { next_slot: None } if page_done => {
                self.stage = Stage::Committing;
                self.pump(now);
            }
            Stage::Committing if self.uncommitted_bytes > 0 => self.commit(),
            Stage::Committing if !self.committing && self.stalled.is_empty() => {
                self.stage = Stage::State(BytesMut::new());
                self.heard_at = now;
                self.next_of_state(now);
            }
            _ => {}
        }
    }

    fn commit(&mut self) {
        if !self.committing {
            self.committing = true;
            self.uncommitted_bytes = 0;
            self.actions.push(ReceiverAction::Commit);
        }
    }

    fn send(&mut self, message: RebuildMessage) {
        self.actions.push(ReceiverAction::Send(message));
    }
}

fn weight(slot: &InstalledSlot) -> u64 {
    slot.data.len() as u64 + SLOT_OVERHEAD_BYTES
}
