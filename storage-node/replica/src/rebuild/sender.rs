//! [`Sender`]: the leader's side of one rebuild, over one map that is kept: a frozen one, or a snapshot's.
//!
//! It answers and remembers nothing but what is being read for an answer: the receiver knows what it lacks.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use holdfast_consensus::{Position, Timestamp};
use holdfast_store::chunk::{Changes, Kept, SlotChange};
use holdfast_store::device::BLOCK_BYTES;
use holdfast_store::group::{InstalledSlot, ReadError};

use crate::rebuild::message::RebuildMessage;
use crate::rebuild::{
    RESEND_AFTER, RebuildId, RebuildPhase, RebuildProgress, SILENCE_MAX, SLOTS_IN_FLIGHT_MAX, STATE_CHUNK_BYTES,
};

/// Answers being read for; an honest receiver asks for no more.
const REQUESTS_MAX: usize = SLOTS_IN_FLIGHT_MAX + 1;

/// What the sender wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderAction {
    Send(RebuildMessage),
    /// Ask the frozen map; [`Sender::on_changes`] follows.
    Changes {
        request: u64,
        above: u64,
        from_slot: u64,
    },
    /// Read the slot of the frozen map whole; [`Sender::on_slot`] follows.
    Slot {
        request: u64,
        slot: u64,
    },
    /// It is over; `done`: the receiver has everything.
    End {
        done: bool,
    },
}

#[derive(Debug)]
enum Request {
    Changes { above: u64, from_slot: u64 },
    Slot(SlotChange),
}

/// See the module.
#[derive(Debug)]
pub struct Sender {
    id: RebuildId,
    pub kept: Kept,
    pub position: Position,
    hash: u128,
    /// Configuration and machine state at `position`.
    state: Bytes,
    began: Timestamp,
    requests: BTreeMap<u64, Request>,
    /// The furthest page told, so that a repeated one is not counted twice.
    listed_to: Option<u64>,
    heard: bool,
    heard_at: Timestamp,
    offer_at: Timestamp,
    pub progress: RebuildProgress,
    actions: Vec<SenderAction>,
}

impl Sender {
    pub fn new(id: RebuildId, kept: Kept, position: Position, hash: u128, state: Bytes, now: Timestamp) -> Sender {
        let mut sender = Sender {
            id,
            kept,
            position,
            hash,
            state,
            began: now,
            requests: BTreeMap::new(),
            listed_to: None,
            heard: false,
            heard_at: now,
            offer_at: now,
            progress: RebuildProgress { phase: RebuildPhase::Copying, ..RebuildProgress::default() },
            actions: Vec::new(),
        };
        sender.offer(now);
        sender
    }

    pub fn id(&self) -> RebuildId {
        self.id
    }

    pub fn began(&self) -> Timestamp {
        self.began
    }

    /// Whether the receiver has taken the offer up.
    pub fn heard(&self) -> bool {
        self.heard
    }

    pub fn deadline(&self) -> Timestamp {
        let silent = self.heard_at + SILENCE_MAX;
        if self.heard { silent } else { silent.min(self.offer_at) }
    }

    pub fn take_actions(&mut self) -> Vec<SenderAction> {
        std::mem::take(&mut self.actions)
    }

    pub fn on_deadline(&mut self, now: Timestamp) {
        if self.heard_at + SILENCE_MAX <= now {
            self.end(false);
        } else if !self.heard && self.offer_at <= now {
            self.offer(now);
        }
    }

    /// A message of this rebuild; `request` is a number never used before, to find an answer of the store by.
    pub fn on_message(&mut self, now: Timestamp, message: &RebuildMessage, request: u64) {
        self.heard = true;
        self.heard_at = now;
        match message {
            RebuildMessage::AskChanges { above, from_slot, .. } if self.requests.len() < REQUESTS_MAX => {
                let (above, from_slot) = (*above, *from_slot);
                self.requests.insert(request, Request::Changes { above, from_slot });
                self.actions.push(SenderAction::Changes { request, above, from_slot });
            }
            RebuildMessage::AskSlot { change, .. } if self.requests.len() < REQUESTS_MAX => {
                self.requests.insert(request, Request::Slot(change.clone()));
                self.actions.push(SenderAction::Slot { request, slot: change.slot });
            }
            RebuildMessage::AskState { offset, .. } => {
                let offset = *offset;
                let end = self.state.len().min((offset as usize).saturating_add(STATE_CHUNK_BYTES));
                if (offset as usize) < end {
                    let bytes = self.state.slice(offset as usize..end);
                    self.actions.push(SenderAction::Send(RebuildMessage::State { id: self.id, offset, bytes }));
                }
            }
            RebuildMessage::Done { .. } => self.end(true),
            RebuildMessage::Abort { .. } => self.end(false),
            // Too much at once is asked again; the rest is for receivers.
            _ => {}
        }
    }

    /// The frozen map's answer.
    pub fn on_changes(&mut self, request: u64, result: Result<Changes, ReadError>) {
        let Some(Request::Changes { above, from_slot }) = self.requests.remove(&request) else { return };
        match result {
            Ok(changes) => {
                if self.listed_to.is_none_or(|to| to < from_slot) {
                    self.listed_to = Some(from_slot);
                    self.progress.slots_compared += changes.slots.len() as u64;
                    let blocks: u64 = changes.slots.iter().map(|change| u64::from(change.present.count_ones())).sum();
                    self.progress.bytes_listed += blocks * BLOCK_BYTES as u64;
                }
                self.send(RebuildMessage::Changes { id: self.id, above, from_slot, changes });
            }
            Err(_) => self.unreadable(),
        }
    }

    /// The sixteen blocks of a slot.
    pub fn on_slot(&mut self, request: u64, result: Result<Bytes, ReadError>) {
        let Some(Request::Slot(change)) = self.requests.remove(&request) else { return };
        let Ok(bytes) = result else { return self.unreadable() };
        let SlotChange { slot, index, present } = change;
        let mut data = BytesMut::with_capacity(present.count_ones() as usize * BLOCK_BYTES);
        for (block, bytes) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            if present & (1 << block) != 0 {
                data.extend_from_slice(bytes);
            }
        }
        let data = data.freeze();
        let checksums = data.chunks_exact(BLOCK_BYTES).map(holdfast_block::checksum).collect();
        self.progress.bytes_copied += data.len() as u64;
        let slot = InstalledSlot { slot, index, present, data, checksums };
        self.send(RebuildMessage::Slot { id: self.id, slot });
    }

    /// What is frozen here cannot all be read: another replica, or this one once it is repaired, may do better.
    fn unreadable(&mut self) {
        self.send(RebuildMessage::Abort { id: self.id });
        self.end(false);
    }

    fn offer(&mut self, now: Timestamp) {
        self.offer_at = now + RESEND_AFTER;
        let (id, position, hash) = (self.id, self.position, self.hash);
        self.send(RebuildMessage::Offer { id, position, hash, state_bytes: self.state.len() as u32 });
    }

    fn send(&mut self, message: RebuildMessage) {
        self.actions.push(SenderAction::Send(message));
    }

    fn end(&mut self, done: bool) {
        self.actions.push(SenderAction::End { done });
    }
}
