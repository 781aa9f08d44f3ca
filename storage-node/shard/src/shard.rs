//! [`Shard`]: events in, effects out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_consensus::liveness::Pairs;
use holdfast_consensus::raft::Options as RaftOptions;
use holdfast_id::{DiskId, GroupId, NodeId, ReplicaId};
use holdfast_metadata::{Catalogue, Intent, IntentReply};
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{self, Reply, Request};
use holdfast_replica::replica::{RestoreError, initial_state, machine_state};
use holdfast_replica::{Directory, Replica, wire};
use holdfast_store::{Device, DeviceError, OpId, OpenError, RecoveredGroup, Store, StoreError, StoreEvent, Superblock};
use holdfast_volume::Volume;

use crate::admin::{AdminError, AdminReply, AdminRequest, Founder, ReplicaReport, VolumeReport};
use crate::core::{ClientId, Core, Effects};
use crate::machine::{CatalogueMachine, VolumeMachine};
use crate::metadata_group::MetadataGroup;
use crate::volume_group::VolumeGroup;

/// A leader's lease and a follower's promise, see architecture 3.1.
const LEASE: Duration = Duration::from_millis(300);
/// Election timeouts are spread over this much beyond the lease.
const ELECTION_JITTER: Duration = Duration::from_millis(150);
/// Clocks of two machines drift apart by less than this: 500 ppm is what NTP itself tolerates before it steps.
const DRIFT_PPM: u32 = 500;
const APPEND_BYTES_MAX: usize = 2 << 20;
const INFLIGHT_BYTES_MAX: usize = 8 << 20;

/// What happened. Whatever wakes a shard is one of these or its deadline.
#[derive(Debug)]
pub enum Event {
    PeerConnected(NodeId),
    PeerClosed(NodeId),
    Peer { from: NodeId, message: PeerMessage },
    Client { client: ClientId, request: Request },
    ClientClosed(ClientId),
    Device { id: OpId, result: Result<Bytes, DeviceError> },
    Admin { token: u64, request: AdminRequest },
}

#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error("the disk cannot be opened")]
    Open(#[from] OpenError),
    #[error("a group on the disk cannot be restored")]
    Restore(#[from] RestoreError),
    #[error("the state of group {group} on the disk cannot be read: {reason}")]
    State { group: GroupId, reason: String },
}

/// One disk's worth of storage node.
pub struct Shard {
    core: Core,
    seed: u64,
    volumes: BTreeMap<GroupId, VolumeGroup>,
    metadata: Option<MetadataGroup>,
    /// Groups whose creation or deletion is on its way to the disk, with who is told when it is there.
    creating: BTreeMap<GroupId, Creation>,
    deleting: BTreeMap<GroupId, NodeId>,
    deadlines: BTreeSet<(Timestamp, GroupId)>,
    deadline_of: BTreeMap<GroupId, Timestamp>,
    connected: BTreeSet<NodeId>,
}

struct Creation {
    replica: ReplicaId,
    state: holdfast_store::GroupState,
    /// `None` for the founding of the metadata plane, answered through `token`.
    reply_to: Option<NodeId>,
    token: Option<u64>,
}
