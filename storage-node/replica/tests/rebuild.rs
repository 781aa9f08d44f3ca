//! Both sides of a rebuild over two stores in memory, with random writes and discards, lost, repeated and late messages,
//! crashes of the receiver at any moment, and new rounds of the sender: the receiver ends as the sender, every time.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::{LogIndex, Position, Term, Timestamp};
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_replica::rebuild::message::{RebuildMessage, decode, encode};
use holdfast_replica::rebuild::receiver::{GiveUp, Offer, Receiver, ReceiverAction};
use holdfast_replica::rebuild::sender::{Sender, SenderAction};
use holdfast_replica::rebuild::{RebuildId, SLOTS_IN_FLIGHT_MAX};
use holdfast_store::chunk::{Frozen, Kept, RepairEvent};
use holdfast_store::device::memory::MemoryDevice;
use holdfast_store::device::{BLOCK_BYTES, Device};
use holdfast_store::group::{GroupState, InstallError, Mutation, ReadError, StoreError, StoreEvent};
use holdfast_store::ops::{DeviceOp, OpId};
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

fn group() -> GroupId {
    GroupId::first(VolumeId::from_bytes([7; 16]).expect("not zero"))
}

fn replica(number: u8) -> ReplicaId {
    ReplicaId::from_bytes([number; 16]).expect("not zero")
}

fn state(index: u64) -> GroupState {
    // Longer than one chunk at times.
    let bytes = if index.is_multiple_of(3) { 300_000 } else { 100 };
    let state = index.to_le_bytes().into_iter().cycle().take(bytes).collect::<Vec<u8>>().into();
    GroupState { hard_state: Bytes::from_static(b"hard"), position: Bytes::new(), state }
}

/// A store on a disk whose operations complete when told to.
struct Machine {
    device: MemoryDevice,
    store: Store,
    ops: Vec<DeviceOp>,
    events: Vec<StoreEvent>,
    applied: u64,
    checkpointed: u64,
    installing: u64,
}

impl Machine {
    fn new(number: u8) -> Machine {
        let device = MemoryDevice::new(48 << 20);
        let id = [number; 16];
        let cluster = ClusterId::from_bytes([1; 16]).expect("not zero");
        let (node, disk) = (NodeId::from_bytes(id).expect("not zero"), DiskId::from_bytes(id).expect("not zero"));
        let options = FormatOptions {
            wal_segment_bytes: 128 << 10,
            wal_segments: 4,
            groups_max: 4,
            ..FormatOptions::new(cluster, node, disk)
        };
        Store::format(&device, &options).unwrap();
        let (store, _) = Store::open(&device).unwrap();
        let (ops, events) = (Vec::new(), Vec::new());
        let mut machine = Machine { device, store, ops, events, applied: 0, checkpointed: 0, installing: 0 };
        machine.store.create_group(group(), replica(number), state(0)).unwrap();
        machine.settle();
        machine.events.clear();
        machine
    }

    fn collect(&mut self) {
        self.ops.extend(self.store.take_ops());
        self.events.extend(self.store.take_events());
    }

    fn complete_one(&mut self, random: &mut Random) {
        self.collect();
        if !self.ops.is_empty() {
            let op = self.ops.swap_remove(random.below(self.ops.len() as u64) as usize);
            self.perform(op);
        }
    }

    fn perform(&mut self, op: DeviceOp) {
        let id: OpId = op.id();
        let result = match op {
            DeviceOp::Read { offset, length, .. } => {
                let mut buffer = vec![0; length as usize];
                self.device.read_at(offset, &mut buffer).unwrap();
                Bytes::from(buffer)
            }
            DeviceOp::Write { offset, data, durable, .. } => {
                if durable {
                    self.device.write_durable_at(offset, &data).unwrap();
                } else {
                    self.device.write_at(offset, &data).unwrap();
                }
                Bytes::new()
            }
            DeviceOp::Flush { .. } => {
                self.device.flush().unwrap();
                Bytes::new()
            }
        };
        self.store.on_completion(id, Ok(result));
        self.collect();
    }

    fn settle(&mut self) {
        self.collect();
        while let Some(op) = self.ops.pop() {
            self.perform(op);
        }
    }

    fn apply(&mut self, mutation: Mutation) {
        self.applied += 1;
        self.store.apply(group(), self.applied, vec![mutation]);
    }

    fn checkpoint(&mut self) {
        self.store.checkpoint(group(), self.applied, state(self.applied)).unwrap();
        self.settle();
        let done = StoreEvent::CheckpointDone { group: group(), index: self.applied };
        assert!(self.events.contains(&done));
        self.events.retain(|event| !matches!(event, StoreEvent::CheckpointDone { .. }));
        self.checkpointed = self.applied;
    }

    /// Loses power. Whatever was written and not flushed may be there or not, sector by sector.
    fn crash(&mut self, random: &mut Random) {
        let style = random.below(3);
        self.device.crash(|_: usize, _: usize| style == 0 || style == 1 && random.chance(50));
        let (store, groups) = Store::open(&self.device).unwrap();
        let found = &groups[0];
        assert_eq!(found.damage, None);
        self.store = store;
        self.ops.clear();
        self.events.clear();
        (self.checkpointed, self.applied) = (found.checkpoint_index, found.checkpoint_index);
        self.installing = found.installing;
        assert_eq!(found.checkpoint.state, state(self.checkpointed).state, "the state is of the index");
    }

    /// Every page of a map on the disk that begins so is rotten; how many there are.
    fn rot_pages(&mut self, magic: &[u8]) -> usize {
        let mut rotten = 0;
        for offset in (0..48 << 20).step_by(BLOCK_BYTES) {
            let mut block = vec![0; BLOCK_BYTES];
            self.device.read_at(offset, &mut block).unwrap();
            if block.starts_with(magic) {
                self.device.write_durable_at(offset, &[0; BLOCK_BYTES]).unwrap();
                rotten += 1;
            }
        }
        rotten
    }

    fn scrub(&mut self) {
        self.store.scrub_from_start();
        loop {
            self.store.scrub_step();
            self.settle();
            let events = self.store.take_repair_events();
            if events.iter().any(|event| matches!(event, RepairEvent::Scrubbed { finished: true, .. })) {
                return;
            }
        }
    }

    fn read(&mut self, first: u64, count: u32) -> Result<Bytes, ReadError> {
        self.store.read(group(), first, count, u64::MAX);
        self.settle();
        let at = self.events.iter().position(|e| matches!(e, StoreEvent::Read { token: u64::MAX, .. })).unwrap();
        let StoreEvent::Read { result, .. } = self.events.remove(at) else { unreachable!("it was matched") };
        result
    }
}

struct Run {
    random: Random,
    now: Timestamp,
    sender: Machine,
    receiver: Machine,
    sending: Option<(Sender, Frozen)>,
    receiving: Option<Receiver>,
    to_sender: Vec<RebuildMessage>,
    to_receiver: Vec<RebuildMessage>,
    number: u64,
    token: u64,
    own_tokens: Vec<u64>,
    finishing: Option<u64>,
    committing: bool,
    uncommitted: bool,
    given_up: BTreeMap<&'static str, u64>,
    copied: Vec<(u64, u64)>,
    crashes: u64,
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut run = Run {
            random: Random(seed),
            now: Timestamp(1),
            sender: Machine::new(1),
            receiver: Machine::new(2),
            sending: None,
            receiving: None,
            to_sender: Vec::new(),
            to_receiver: Vec::new(),
            number: 0,
            token: 0,
            own_tokens: Vec::new(),
            finishing: None,
            committing: false,
            uncommitted: false,
            given_up: BTreeMap::new(),
            copied: Vec::new(),
            crashes: 0,
        };
        // A history that both have, one that the sender alone has, with checkpoints at other places.
        for _ in 0..run.random.below(60) {
            let mutation = run.mutation();
            run.sender.apply(mutation.clone());
            run.receiver.apply(mutation);
            if run.random.chance(10) {
                run.receiver.checkpoint();
            }
        }
        run.receiver.checkpoint();
        run.write(40);
        run
    }

    fn mutation(&mut self) -> Mutation {
        let first_block = if self.random.chance(10) { 1 << 18 } else { 0 } + self.random.below(700);
        if self.random.chance(25) {
            return Mutation::Zero { first_block, count: 1 + self.random.below(80), discard: true };
        }
        let blocks = 1 + self.random.below(30) as usize;
        let fill = self.random.next().to_le_bytes();
        let data: Vec<u8> = fill.into_iter().cycle().take(blocks * BLOCK_BYTES).collect();
        let checksums: Arc<[u32]> = data.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
        Mutation::Write { first_block, data: data.into(), checksums }
    }

    fn write(&mut self, most: u64) {
        for _ in 0..self.random.below(most) {
            let mutation = self.mutation();
            self.sender.apply(mutation);
        }
    }

    /// The sender's last checkpoint, offered under a new number.
    fn begin(&mut self) {
        if let Some((_, frozen)) = self.sending.take() {
            self.sender.store.thaw(group(), frozen.id);
        }
        self.write(5);
        self.sender.checkpoint();
        let frozen = self.sender.store.freeze(group()).unwrap();
        self.number += 1;
        let id = RebuildId { term: Term(1), number: self.number };
        let position = Position { term: Term(1), index: LogIndex(frozen.index) };
        let state = state(frozen.index).state;
        let sender = Sender::new(id, Kept::Frozen(frozen.id), position, frozen.hash.unwrap(), state, self.now);
        self.sending = Some((sender, frozen));
    }

    fn drive_sender(&mut self) {
        let Some((sender, frozen)) = &mut self.sending else { return };
        let (id, mut ended) = (Kept::Frozen(frozen.id), false);
        for action in sender.take_actions() {
            match action {
                SenderAction::Send(message) => self.to_receiver.push(message),
                SenderAction::Changes { request, above, from_slot } => {
                    self.sender.store.changed_since(group(), Some(id), above, from_slot, request);
                }
                SenderAction::Slot { request, slot } => {
                    self.sender.store.read_kept(group(), id, slot * 16, 16, request);
                }
                SenderAction::End { .. } => ended = true,
            }
        }
        self.sender.collect();
        let answers = self.sender.store.take_changes();
        let events = std::mem::take(&mut self.sender.events);
        let (sender, _) = self.sending.as_mut().expect("it was there above");
        answers.into_iter().for_each(|answer| sender.on_changes(answer.token, answer.result));
        for event in events {
            if let StoreEvent::Read { token, result } = event {
                sender.on_slot(token, result);
            }
        }
        if ended && let Some((_, frozen)) = self.sending.take() {
            self.sender.store.thaw(group(), frozen.id);
        }
    }

    fn on_offer(&mut self, id: RebuildId, position: Position, hash: u128, state_bytes: u32) {
        let known = self.receiving.as_ref().is_some_and(|receiver| receiver.offer.id >= id);
        if known || self.finishing.is_some() || self.committing || position.index.0 <= self.receiver.checkpointed {
            return;
        }
        if self.uncommitted {
            // What an earlier rebuild brought is in the map before the next one looks at it.
            self.receiving = None;
            return self.commit();
        }
        let offer = Offer { id, from: replica(1), position, hash, state_bytes };
        self.receiving = Some(Receiver::new(offer, self.receiver.checkpointed, self.receiver.installing, self.now));
    }

    fn drive_receiver(&mut self) {
        self.receiver.collect();
        for event in std::mem::take(&mut self.receiver.events) {
            if let StoreEvent::CheckpointDone { index, .. } = event {
                if self.committing {
                    self.committing = false;
                    self.receiving.iter_mut().for_each(|receiver| receiver.on_committed(self.now));
                } else if self.finishing.take() == Some(index) {
                    (self.receiver.checkpointed, self.receiver.applied) = (index, index);
                    self.receiver.installing = 0;
                    self.receiving = None;
                }
            }
        }
        for answer in self.receiver.store.take_changes() {
            let own = self.own_tokens.contains(&answer.token);
            if let (true, Some(receiver)) = (own, &mut self.receiving) {
                receiver.on_own(self.now, answer.result);
            }
        }
        while let Some(receiver) = &mut self.receiving {
            let actions = receiver.take_actions();
            if actions.is_empty() {
                return;
            }
            for action in actions {
                self.carry_out(action);
            }
        }
    }

    fn carry_out(&mut self, action: ReceiverAction) {
        let Some(receiver) = &mut self.receiving else { return };
        let (now, offer) = (self.now, receiver.offer);
        match action {
            ReceiverAction::Send(message) => self.to_sender.push(message),
            ReceiverAction::Own { above, from_slot } => {
                self.token += 1;
                self.own_tokens = vec![self.token];
                self.receiver.store.changed_since(group(), None, above, from_slot, self.token);
            }
            ReceiverAction::Install(slot) => {
                match self.receiver.store.install(group(), offer.position.index.0, slot.clone()) {
                    Ok(()) => {
                        self.uncommitted = true;
                        self.copied.push((slot.slot, slot.index));
                    }
                    Err(StoreError::Full | StoreError::Busy) => receiver.on_full(now, slot),
                    Err(error) => panic!("{error}"),
                }
            }
            ReceiverAction::Commit => self.commit(),
            ReceiverAction::Finish { state: bytes } => {
                let index = offer.position.index.0;
                assert_eq!(bytes, state(index).state);
                match self.receiver.store.finish_install(group(), index, state(index), offer.hash, &[]) {
                    Ok(()) => self.finishing = Some(index),
                    Err(InstallError::Hash { .. }) => receiver.on_hash_mismatch(now),
                    Err(InstallError::Store(StoreError::Busy | StoreError::Full)) => receiver.on_finish_refused(now),
                    Err(InstallError::MapLost) => receiver.on_map_lost(now),
                    Err(error) => panic!("{error}"),
                }
            }
            ReceiverAction::GiveUp { reason } => {
                assert_ne!(reason, GiveUp::Nonsense);
                *self
                    .given_up
                    .entry(match reason {
                        GiveUp::Hash => "hash",
                        GiveUp::OwnMap => "own map",
                        _ => "other",
                    })
                    .or_default() += 1;
                self.receiving = None;
            }
        }
    }

    fn commit(&mut self) {
        self.receiver.store.commit_install(group(), Bytes::from_static(b"hard")).unwrap();
        (self.committing, self.uncommitted) = (true, false);
    }

    /// One message of a queue arrives, twice, late, or never.
    fn deliver(&mut self, lossy: bool) {
        let to_sender = self.random.chance(50);
        let queue = if to_sender { &mut self.to_sender } else { &mut self.to_receiver };
        if queue.is_empty() {
            return;
        }
        let at = if lossy { self.random.below(queue.len() as u64) as usize } else { 0 };
        let message = if lossy && self.random.chance(10) { queue[at].clone() } else { queue.remove(at) };
        if lossy && self.random.chance(10) {
            return;
        }
        let (meta, payload) = encode(&message);
        assert_eq!(decode(&meta, &payload), Ok(message.clone()));
        if to_sender {
            if let Some((sender, _)) = self.sending.as_mut().filter(|(sender, _)| Some(sender.id()) == message.id()) {
                self.token += 1;
                sender.on_message(self.now, &message, self.token);
            }
        } else if let RebuildMessage::Offer { id, position, hash, state_bytes } = message {
            self.on_offer(id, position, hash, state_bytes);
        } else if let Some(receiver) = &mut self.receiving
            && message.id() == Some(receiver.offer.id)
            && self.finishing.is_none()
        {
            receiver.on_message(self.now, message);
        }
    }

    fn step(&mut self, lossy: bool) {
        self.deliver(lossy);
        self.sender.complete_one(&mut self.random);
        self.receiver.complete_one(&mut self.random);
        self.drive_sender();
        self.drive_receiver();
        assert!(self.receiving.is_none() || self.to_sender.len() < 40 * SLOTS_IN_FLIGHT_MAX, "questions pile up");
        self.now = self.now + Duration::from_millis(self.random.below(if lossy { 60 } else { 6 }));
        let now = self.now;
        if let Some((sender, _)) = self.sending.as_mut().filter(|(sender, _)| sender.deadline() <= now) {
            sender.on_deadline(now);
        }
        if self.finishing.is_none()
            && let Some(receiver) = &mut self.receiving
        {
            receiver.on_deadline(now);
        }
        if lossy && self.random.chance(1) {
            self.crashes += 1;
            self.receiver.crash(&mut self.random);
            (self.receiving, self.finishing, self.committing) = (None, None, false);
            self.uncommitted = false;
        }
        if lossy && self.random.chance(1) {
            self.begin();
        }
    }

    /// Until the receiver has what the sender has, or gives up.
    fn finish(&mut self) {
        self.begin();
        let given_up = self.given_up.clone();
        for _ in 0..50_000 {
            self.step(false);
            let equal = self.receiver.checkpointed == self.sender.checkpointed;
            if self.receiving.is_none() && (equal || self.given_up != given_up) {
                return;
            }
        }
        panic!("the rebuild does not end");
    }

    fn check_equal(&mut self) {
        let index = self.receiver.checkpointed;
        assert_eq!(self.receiver.store.map_hash(group()), self.sender.store.map_hash(group()), "at {index}");
        for first in (0..768).step_by(128).chain([1 << 18, (1 << 18) + 256, (1 << 18) + 512]) {
            let (here, there) = (self.receiver.read(first, 128), self.sender.read(first, 128));
            assert!(here.is_ok() && here == there, "blocks from {first} at {index}");
        }
    }
}

#[test]
fn whatever_is_lost_the_receiver_ends_as_the_sender() {
    let (mut crashes, mut resumed) = (0, 0);
    for seed in 0..60 {
        let mut run = Run::new(seed);
        run.begin();
        for _ in 0..run.random.below(600) {
            run.step(true);
        }
        crashes += run.crashes;
        resumed += u64::from(run.receiver.installing > 0);
        // From here on nothing is lost; rounds go on until the receiver has what the sender has.
        let mut rounds = 0;
        while run.receiver.checkpointed < run.sender.checkpointed || run.receiving.is_some() {
            rounds += 1;
            assert!(rounds < 20, "seed {seed} does not end: {:?}", run.given_up);
            if run.sending.is_none() || run.random.chance(50) {
                run.begin();
            }
            for _ in 0..20_000 {
                run.step(false);
                if run.receiving.is_none() && run.receiver.checkpointed == run.sender.checkpointed {
                    break;
                }
            }
        }
        assert_eq!(run.given_up.get("hash"), None, "seed {seed}");
        run.sender.settle();
        run.check_equal();
        // And the copy survives.
        run.receiver.crash(&mut run.random);
        assert_eq!(run.receiver.installing, 0);
        run.check_equal();
    }
    assert!(crashes > 60 && resumed > 5, "{crashes} crashes, {resumed} installs went on after one");
}

#[test]
fn a_second_rebuild_copies_only_what_changed_since() {
    let mut run = Run::new(3);
    run.finish();
    let first = std::mem::take(&mut run.copied);
    let before = run.sender.applied;
    let data: Arc<[u32]> = [holdfast_block::checksum(&[9; BLOCK_BYTES])].into();
    let write = Mutation::Write { first_block: 5, data: vec![9; BLOCK_BYTES].into(), checksums: data };
    run.sender.apply(write);
    run.random = Random(u64::MAX);
    run.finish();
    let second = std::mem::take(&mut run.copied);
    assert!(first.len() > 10, "{first:?}");
    assert!(second.iter().all(|(_, index)| *index > before) && second.contains(&(0, before + 1)), "{second:?}");
    run.check_equal();
}

#[test]
fn a_group_without_blocks_is_rebuilt_by_its_state_alone() {
    let mut run = Run::new(1);
    // As the metadata group: entries change the state, and nothing of a map.
    (run.sender, run.receiver) = (Machine::new(1), Machine::new(2));
    for _ in 0..9 {
        run.sender.apply(Mutation::Zero { first_block: 0, count: 1, discard: true });
    }
    run.sender.checkpoint();
    let frozen = run.sender.store.freeze(group()).unwrap();
    let id = RebuildId { term: Term(1), number: 1 };
    let position = Position { term: Term(1), index: LogIndex(frozen.index) };
    let sender =
        Sender::new(id, Kept::Frozen(frozen.id), position, frozen.hash.unwrap(), state(frozen.index).state, run.now);
    run.sending = Some((sender, frozen));
    for _ in 0..2_000 {
        run.step(false);
    }
    assert_eq!((run.receiver.checkpointed, run.copied.len()), (9, 0));
    run.receiver.crash(&mut run.random);
    assert_eq!((run.receiver.checkpointed, run.receiver.installing), (9, 0));
}

/// No other replica has what it lost as of the index where it stands; only a rebuild can bring it.
#[test]
fn a_copy_behind_the_log_is_rebuilt_around_lost_pages_of_its_map() {
    for magic in [b"HFLF", b"HFIN"] {
        let mut run = Run::new(3);
        run.finish();
        assert!(run.receiver.rot_pages(magic) > 0);
        run.receiver.crash(&mut run.random);
        let data: Arc<[u32]> = [holdfast_block::checksum(&[9; BLOCK_BYTES])].into();
        let write = Mutation::Write { first_block: 5, data: vec![9; BLOCK_BYTES].into(), checksums: data };
        run.sender.apply(write);
        run.finish();
        assert_eq!(run.given_up, BTreeMap::from([("own map", 1)]), "what it holds is not counted yet");
        let events = run.receiver.store.take_repair_events();
        assert!(events.contains(&RepairEvent::Unknown { group: group() }), "{events:?}");
        run.receiver.scrub();
        run.finish();
        run.check_equal();
        run.receiver.crash(&mut run.random);
        run.check_equal();
    }
}
