//! [`Core`]: what every group of the shard shares: the disk's store, node-pair liveness, and the effects of this step.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::liveness::pairs::Pairs;
use holdfast_consensus::{Message, Term, Timestamp};
use holdfast_id::{GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::intent::Intent;
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::Reply;
use holdfast_replica::rebuild::Permits;
use holdfast_replica::rebuild::message::{RebuildMessage, encode};
use holdfast_replica::replica::Fetch;
use holdfast_replica::{Context, LogCommand, wire};
use holdfast_store::ops::{DeviceError, DeviceOp, OpId};
use holdfast_store::store::Store;

use crate::admin::AdminReply;

/// No operation of the disk completing for so long, with some in flight, is a hang: no healthy disk takes half a second
/// for one request, and failover has to be done in one and a half.
const DISK_STALLED_AFTER: Duration = Duration::from_millis(500);

/// Blocks of a slot of the store's map, which rebuilds copy whole.
const SLOT_BLOCKS: u32 = 16;

/// The store's own bound is 100 ms.
const STORE_IDLE_AFTER: Duration = Duration::from_millis(50);

/// A connection of an attached machine, numbered by the rim; never reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

/// Whom a read of the store is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadPurpose {
    Client {
        token: u64,
    },
    /// The edge blocks of a read-modify-write.
    Edges {
        read: u64,
    },
    /// A slot, or a page of changes, for a rebuild.
    Rebuild {
        request: u64,
    },
}

/// A read of the store under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingRead {
    pub(crate) group: GroupId,
    pub(crate) first_block: u64,
    pub(crate) count: u32,
    pub(crate) purpose: ReadPurpose,
}

/// The leadership was lost before an answer was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotLeader;

/// Where a node is to be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    pub node: NodeId,
    /// By nodes and attached machines.
    pub peer: String,
    /// The control API.
    pub api: String,
}

/// The nodes of a volume's replicas, as its leader knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaNodes {
    pub volume: VolumeId,
    pub term: Term,
    pub nodes: Vec<NodeId>,
}

/// What the rim carries out after a step, in this order of lists; within a list in order.
#[derive(Debug, Default)]
pub struct Effects {
    pub device: Vec<DeviceOp>,
    pub peers: Vec<(NodeId, PeerMessage)>,
    pub clients: Vec<(ClientId, Reply)>,
    /// Where a volume's replicas are; the rim adds the addresses and sends `Reply::Replicas`.
    pub replicas: Vec<(ClientId, ReplicaNodes)>,
    pub admin: Vec<(u64, AdminReply)>,
    /// Where other nodes are to be reached, as far as it changed; the rim keeps them over restarts.
    pub addresses: Vec<NodeAddress>,
    /// The disk failed: this shard serves nothing more. Told once.
    pub failed: Option<String>,
}

pub(crate) struct Core {
    pub(crate) node: NodeId,
    pub(crate) now: Timestamp,
    pub(crate) store: Store,
    pub(crate) pairs: Pairs,
    pub(crate) effects: Effects,
    pub(crate) permits: Permits,
    /// Reads of the store under way.
    pub(crate) reads: BTreeMap<u64, PendingRead>,
    /// Groups whose deadline may have moved in this step.
    pub(crate) touched: BTreeSet<GroupId>,
    /// Resizes that volumes have applied, or lost with their leadership, by the metadata plane's token.
    pub(crate) resized: Vec<(u64, Result<(), NotLeader>)>,
    /// A group has other members than before: whom this node exchanges heartbeats with may have changed.
    pub(crate) members_changed: bool,
    /// The next identifier that this node mints; counted from the random seed, so no other node or life mints it.
    next_identifier: u128,
    /// Elections won here while the members of the group were changing.
    pub(crate) elected_in_joint_change: u64,
    /// What the metadata leader here wants of this node itself.
    pub(crate) own_intents: Vec<Intent>,
    /// Groups whose deadline is to be asked for at the end of the step.
    pub(crate) due: BTreeSet<GroupId>,
    pub(crate) connected: BTreeSet<NodeId>,
    /// Nodes that share a group with this one: heartbeats go to them.
    pub(crate) watched: BTreeSet<NodeId>,
    /// Operations of the disk in flight, and when one last completed or the first was submitted.
    operations: usize,
    progress_at: Timestamp,
    /// When the store last asked something of the disk.
    busy_at: Timestamp,
    next_token: u64,
}

impl Core {
    pub(crate) fn new(now: Timestamp, store: Store, pairs: Pairs, seed: u128) -> Core {
        let node = store.superblock().node;
        Core {
            node,
            now,
            store,
            pairs,
            effects: Effects::default(),
            permits: Permits::default(),
            reads: BTreeMap::new(),
            touched: BTreeSet::new(),
            resized: Vec::new(),
            next_identifier: seed,
            elected_in_joint_change: 0,
            members_changed: false,
            own_intents: Vec::new(),
            due: BTreeSet::new(),
            connected: BTreeSet::new(),
            watched: BTreeSet::new(),
            operations: 0,
            progress_at: now,
            busy_at: now,
            next_token: 0,
        }
    }

    pub(crate) fn context(&mut self) -> Context<'_> {
        Context { now: self.now, pairs: &mut self.pairs, store: &mut self.store, permits: &mut self.permits }
    }

    pub(crate) fn boot(&self) -> u64 {
        self.store.superblock().boot_epoch
    }

    /// Collects what the store wants of the disk.
    pub(crate) fn submit(&mut self) {
        if self.idle_at().is_some_and(|at| at <= self.now) {
            self.store.on_idle();
        }
        let operations = self.store.take_ops();
        if !operations.is_empty() {
            self.busy_at = self.now;
        }
        if self.operations == 0 {
            self.progress_at = self.now;
        }
        self.operations += operations.len();
        self.effects.device.extend(operations);
    }

    pub(crate) fn on_completion(&mut self, id: OpId, result: Result<Bytes, DeviceError>) {
        self.operations -= 1;
        self.progress_at = self.now;
        self.store.on_completion(id, result);
    }

    /// When the store is to note how far it is whole.
    pub(crate) fn idle_at(&self) -> Option<Timestamp> {
        self.store.wants_idle().then(|| self.busy_at + STORE_IDLE_AFTER)
    }

    /// Peers must not wait for a leader whose disk hangs, though the rest of it is well.
    pub(crate) fn disk_stalled(&self) -> bool {
        self.operations > 0 && self.now.since(self.progress_at) >= DISK_STALLED_AFTER
    }

    pub(crate) fn next_replica(&mut self) -> ReplicaId {
        loop {
            self.next_identifier = self.next_identifier.wrapping_add(1);
            if let Some(replica) = ReplicaId::from_bytes(self.next_identifier.to_be_bytes()) {
                return replica;
            }
        }
    }

    /// Somebody uses the disk.
    pub(crate) fn disk_is_busy(&self) -> bool {
        self.operations > 0
    }

    pub(crate) fn next_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    pub(crate) fn read(&mut self, group: GroupId, first_block: u64, count: u32, purpose: ReadPurpose) {
        let token = self.next_token();
        self.reads.insert(token, PendingRead { group, first_block, count, purpose });
        self.store.read(group, first_block, count, token);
    }

    /// Asks the store for what a rebuild needs.
    pub(crate) fn fetch(&mut self, group: GroupId, request: u64, fetch: Fetch) {
        let token = self.next_token();
        let purpose = ReadPurpose::Rebuild { request };
        self.reads.insert(token, PendingRead { group, first_block: 0, count: 0, purpose });
        match fetch {
            Fetch::Changes { kept, above, from_slot } => {
                self.store.changed_since(group, kept, above, from_slot, token);
            }
            Fetch::Slot { kept, slot } => {
                let first_block = slot * u64::from(SLOT_BLOCKS);
                self.store.read_kept(group, kept, first_block, SLOT_BLOCKS, token);
            }
        }
    }

    pub(crate) fn send_rebuild(
        &mut self,
        node: NodeId,
        group: GroupId,
        from: ReplicaId,
        to: ReplicaId,
        message: &RebuildMessage,
    ) {
        let (meta, payload) = encode(message);
        self.effects.peers.push((node, PeerMessage::Delta { group, from, to, meta, payload }));
    }

    pub(crate) fn send_raft(
        &mut self,
        node: NodeId,
        group: GroupId,
        from: ReplicaId,
        to: ReplicaId,
        message: &Message<LogCommand>,
    ) {
        let (meta, payload) = wire::encode(message);
        self.effects.peers.push((node, PeerMessage::Raft { group, from, to, meta, payload }));
    }

    pub(crate) fn send_control(&mut self, node: NodeId, body: Bytes) {
        self.effects.peers.push((node, PeerMessage::Control { body }));
    }
}
