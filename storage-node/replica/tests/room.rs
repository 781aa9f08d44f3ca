//! A leader whose disk has no room for more data says so before it proposes, and takes data again when there is room.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::liveness::pairs::{PairOptions, Pairs};
use holdfast_consensus::{Configuration, LogIndex, Member, Options, Refusal, Role, Timestamp};
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_replica::codec::LogCommand;
use holdfast_replica::rebuild::Permits;
use holdfast_replica::replica::{Applied, Context, Output, Replica, StateMachine, initial_state};
use holdfast_store::device::memory::MemoryDevice;
use holdfast_store::device::{BLOCK_BYTES, Device};
use holdfast_store::group::{Mutation, PayloadAt, RecoveredGroup, StoreEvent};
use holdfast_store::ops::DeviceOp;
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

/// Sixteen blocks.
const SLOT_BYTES: usize = 16 * BLOCK_BYTES;

/// The header is the number of a slot: with a payload it is written, without one discarded.
struct Slots;

impl StateMachine for Slots {
    type Outcome = ();
    type Error = Infallible;

    fn apply(&mut self, _: LogIndex, command: &LogCommand) -> Result<Applied<()>, Infallible> {
        let PayloadAt { first_block, checksums } = Self::payload_at(command).unwrap();
        let data = command.payload.clone();
        let mutation = if data.is_empty() {
            Mutation::Zero { first_block, count: 16, discard: true }
        } else {
            Mutation::Write { first_block, data, checksums }
        };
        Ok(Applied { outcome: (), mutations: vec![mutation], keeping: None })
    }

    fn payload_at(command: &LogCommand) -> Option<PayloadAt> {
        let first_block = 16 * u64::from_le_bytes(command.header[..].try_into().unwrap());
        let checksums: Arc<[u32]> = command.payload.chunks(BLOCK_BYTES).map(holdfast_block::checksum).collect();
        Some(PayloadAt { first_block, checksums })
    }

    fn encode_state(&self) -> Bytes {
        Bytes::new()
    }

    fn snapshots(&self) -> Vec<u64> {
        Vec::new()
    }

    fn decode_state(_: &Bytes) -> Result<Slots, String> {
        Ok(Slots)
    }
}

/// One node with the only replica of its group.
struct Single {
    device: MemoryDevice,
    store: Store,
    pairs: Pairs,
    permits: Permits,
    replica: Replica<Slots>,
    now: Timestamp,
}

fn id<T>(from: impl Fn([u8; 16]) -> Option<T>) -> T {
    from([7; 16]).expect("not zero")
}

impl Single {
    fn options() -> Options {
        Options {
            id: id(ReplicaId::from_bytes),
            lease: Duration::from_millis(300),
            drift_ppm: 500,
            election_jitter: Duration::from_millis(150),
            append_bytes_max: 1 << 20,
            inflight_bytes_max: 8 << 20,
            seed: 1,
        }
    }

    fn lead() -> Single {
        let device = MemoryDevice::new(24 << 20);
        let options = FormatOptions {
            wal_segment_bytes: 1 << 20,
            wal_segments: 8,
            groups_max: 4,
            ..FormatOptions::new(id(ClusterId::from_bytes), id(NodeId::from_bytes), id(DiskId::from_bytes))
        };
        Store::format(&device, &options).unwrap();
        let (store, _) = Store::open(&device).unwrap();
        let (group, own) = (GroupId::first(id(VolumeId::from_bytes)), id(ReplicaId::from_bytes));
        let members = vec![Member { replica: own, node: id(NodeId::from_bytes), role: Role::Voter }];
        let configuration = Configuration { members, outgoing: Vec::new(), min_data: 1 };
        let state = initial_state(configuration, Bytes::new());
        let recovered = RecoveredGroup {
            group,
            replica: own,
            checkpoint_index: 0,
            checkpoint: state.clone(),
            committed_to: 0,
            installing: 0,
            hard_state: None,
            records: Vec::new(),
            damage: None,
        };
        let options = Single::options();
        let lease = options.lease;
        let node = id(NodeId::from_bytes);
        let pairs = PairOptions { node, heartbeat: Duration::from_millis(100), lease, drift_ppm: 500, boot: 1 };
        let now = Timestamp::ZERO;
        let replica = Replica::restore(recovered, Slots, options, now).unwrap();
        let (pairs, permits) = (Pairs::new(pairs), Permits::default());
        let mut single = Single { device, store, pairs, permits, replica, now };
        single.store.create_group(group, own, state).unwrap();
        single.settle();
        while single.replica.leader() != Some(own) {
            single.now = single.replica.deadline().expect("it is to stand for election");
            single.call(|replica, context| replica.on_deadline(context));
            single.settle();
        }
        single
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut Replica<Slots>, &mut Context<'_>) -> T) -> T {
        let Single { store, pairs, permits, now, .. } = self;
        call(&mut self.replica, &mut Context { now: *now, pairs, store, permits })
    }

    /// Until nothing happens any more.
    fn settle(&mut self) {
        loop {
            let mut outputs = Vec::new();
            self.call(|replica, context| replica.settle(context, &mut outputs));
            let stopped = outputs.iter().any(|output| matches!(output, Output::Stopped { .. }));
            assert!(!stopped, "{outputs:?}");
            let (ops, events) = (self.store.take_ops(), self.store.take_events());
            if ops.is_empty() && events.is_empty() && outputs.is_empty() {
                return;
            }
            for op in ops {
                self.perform(op);
            }
            for event in events {
                match event {
                    StoreEvent::Flushed { sequence, .. } => self.call(|r, context| r.on_flushed(context, sequence)),
                    StoreEvent::CheckpointWanted { .. } => self.replica.on_checkpoint_wanted(),
                    StoreEvent::CheckpointDone { index, .. } => {
                        self.call(|r, context| r.on_checkpoint_done(context, index))
                    }
                    _ => {}
                }
            }
        }
    }

    fn perform(&mut self, op: DeviceOp) {
        let id = op.id();
        let result = match op {
            DeviceOp::Read { offset, length, .. } => {
                let mut buffer = vec![0; length as usize];
                self.device.read_at(offset, &mut buffer).unwrap();
                Bytes::from(buffer)
            }
            DeviceOp::Write { offset, data, .. } => {
                self.device.write_at(offset, &data).unwrap();
                Bytes::new()
            }
            DeviceOp::Flush { .. } => Bytes::new(),
        };
        self.store.on_completion(id, Ok(result));
    }

    fn propose(&mut self, slot: u64, data: usize) -> Result<(), Refusal> {
        let header = Bytes::copy_from_slice(&slot.to_le_bytes());
        let command = LogCommand { header, payload: vec![slot as u8; data].into() };
        loop {
            let proposed = self.call(|replica, context| replica.propose(context, command.clone())).map(|_| ());
            self.settle();
            if proposed != Err(Refusal::Busy) {
                return proposed;
            }
        }
    }
}

#[test]
fn data_is_refused_before_it_is_proposed_and_taken_again_when_there_is_room() {
    let mut single = Single::lead();
    let usage = single.store.usage();
    let most = usage.data_total / SLOT_BYTES as u64;
    let taken = (0..most).take_while(|slot| single.propose(*slot, SLOT_BYTES).is_ok()).count() as u64;
    assert!(taken < most && taken >= most * 3 / 4, "{taken} of {most} slots were taken");
    assert_eq!(single.propose(taken, SLOT_BYTES), Err(Refusal::NoRoom));
    // What is there stays writable only where a checkpoint makes room; a discard needs none, and gives some.
    assert_eq!(single.replica.applied().index, single.replica.status().last.index);
    for slot in 0..8 {
        single.propose(slot, 0).unwrap();
    }
    single.replica.on_checkpoint_wanted();
    single.settle();
    assert_eq!(single.propose(taken, SLOT_BYTES), Ok(()));
}

#[test]
fn what_a_checkpoint_gives_back_is_waited_for() {
    let mut single = Single::lead();
    let slots = single.store.usage().data_total / SLOT_BYTES as u64 / 2;
    for round in 0..4 {
        for slot in 0..slots {
            assert_eq!(single.propose(slot, BLOCK_BYTES), Ok(()), "slot {slot} in round {round}");
            assert_eq!(single.propose(slot, SLOT_BYTES), Ok(()), "slot {slot} in round {round}");
        }
    }
}

/// So that it can be applied and checkpointed, and its space reused, before anybody leads again.
#[test]
fn a_start_knows_most_of_what_was_committed() {
    let mut single = Single::lead();
    for slot in 0..24 {
        single.propose(slot, SLOT_BYTES).unwrap();
    }
    let (_, mut recovered) = Store::open(&single.device).unwrap();
    let recovered = recovered.remove(0);
    assert_eq!(recovered.checkpoint_index, 0, "nothing was checkpointed");
    let replica = Replica::restore(recovered, Slots, Single::options(), single.now).unwrap();
    let status = replica.status();
    assert!(status.committed.0 + 17 > status.last.index.0, "{status:?}");
}
