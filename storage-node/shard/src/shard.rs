//! [`Shard`]: events in, effects out.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::liveness::pairs::{PairEvent, PairOptions, Pairs};
use holdfast_consensus::{Options as RaftOptions, Timestamp};
use holdfast_id::{GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::Catalogue;
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{self, Reply, Request};
use holdfast_replica::replica::{Answer, RestoreError, machine_state};
use holdfast_replica::{Context, Replica, StateMachine, rebuild, wire};
use holdfast_store::device::Device;
use holdfast_store::group::{Damage, OpenError, ReadError, RecoveredGroup, StoreEvent};
use holdfast_store::ops::{DeviceError, OpId};
use holdfast_store::store::Store;
use holdfast_store::superblock::Superblock;
use holdfast_volume::Volume;

use crate::access::ClientRole;
use crate::admin::{AdminError, AdminReply, AdminRequest};
use crate::core::{ClientId, Core, Effects, PendingRead, ReadPurpose};
use crate::intents::Orders;
use crate::machine::VolumeMachine;
use crate::metadata_group::MetadataGroup;
use crate::recovery::LogRecovery;
use crate::repair::Repairs;
use crate::scrub::{ScrubOptions, Scrubbing};
use crate::volume_group::VolumeGroup;

/// Election timeouts are spread over this much beyond the lease.
const ELECTION_JITTER: Duration = Duration::from_millis(150);
const APPEND_BYTES_MAX: usize = 1 << 20;
const INFLIGHT_BYTES_MAX: usize = 8 << 20;

/// What happened. Whatever wakes a shard is one of these or its deadline.
#[derive(Debug)]
pub enum Event {
    PeerConnected(NodeId),
    PeerClosed(NodeId),
    Peer {
        from: NodeId,
        message: PeerMessage,
    },
    Client {
        client: ClientId,
        role: ClientRole,
        request: Request,
    },
    ClientClosed(ClientId),
    Device {
        id: OpId,
        result: Result<Bytes, DeviceError>,
    },
    Admin {
        token: u64,
        request: AdminRequest,
    },
    /// The process is about to end: what is led here is handed over. See [`Shard::is_handed_over`].
    Stop,
}

#[derive(Clone, Copy, Debug)]
pub struct ShardOptions {
    /// Between two heartbeats of a pair of nodes.
    pub heartbeat: Duration,
    /// A leader's lease and a follower's promise.
    pub lease: Duration,
    /// How far the clock of any node may run from true time, in millionths.
    pub drift_ppm: u32,
    /// Spreads elections, and identifiers are counted from it; the rim passes a random one.
    pub seed: u128,
    pub scrub: ScrubOptions,
}

impl ShardOptions {
    /// The product's times; 500 ppm is what a clock may be off before time synchronisation gives it up.
    pub const fn new(seed: u128) -> ShardOptions {
        ShardOptions {
            heartbeat: Duration::from_millis(100),
            lease: Duration::from_millis(300),
            drift_ppm: 500,
            seed,
            scrub: ScrubOptions::PRODUCT,
        }
    }
}

/// Why a disk does not make a shard.
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
    pub(crate) core: Core,
    options: ShardOptions,
    pub(crate) volumes: BTreeMap<GroupId, VolumeGroup>,
    pub(crate) metadata: Option<MetadataGroup>,
    pub(crate) orders: Orders,
    /// Groups of which the disk holds nothing usable but the name, and why.
    pub(crate) damaged: BTreeMap<GroupId, String>,
    pub(crate) repairs: Repairs,
    pub(crate) scrub: Scrubbing,
    pub(crate) recovery: LogRecovery,
    deadlines: BTreeSet<(Timestamp, GroupId)>,
    deadline_of: BTreeMap<GroupId, Timestamp>,
    stopping: bool,
    /// Groups led here since the stop was asked for whose next leader is not known yet.
    handing_over: BTreeSet<GroupId>,
}

/// A message between replicas, not decoded yet.
struct RaftMessage {
    from: ReplicaId,
    to: ReplicaId,
    meta: Bytes,
    payload: Bytes,
}

/// The calls of a replica that do not depend on its state machine.
trait Driven {
    fn on_message(&mut self, context: &mut Context<'_>, node: NodeId, addressed: &RaftMessage);
    fn on_rebuild(&mut self, context: &mut Context<'_>, from: ReplicaId, to: ReplicaId, meta: &Bytes, payload: &Bytes);
    fn on_fetched(&mut self, context: &mut Context<'_>, request: u64, answer: Answer);
    fn on_deadline(&mut self, context: &mut Context<'_>);
    fn on_suspect(&mut self, context: &mut Context<'_>, node: NodeId);
    fn on_peer_connected(&mut self, context: &mut Context<'_>, node: NodeId);
    fn on_flushed(&mut self, context: &mut Context<'_>, sequence: u64);
    fn on_checkpoint_wanted(&mut self);
    fn on_checkpoint_done(&mut self, context: &mut Context<'_>, index: u64);
    fn on_disk_failed(&mut self, context: &mut Context<'_>, reason: &str);
    fn yield_leadership(&mut self, context: &mut Context<'_>);
    fn lives_on(&self, node: NodeId) -> bool;
    /// It leads, and somebody is there to lead after it.
    fn can_yield(&self) -> bool;
    fn follows(&self) -> bool;
}

impl<S: StateMachine> Driven for Replica<S> {
    fn on_message(&mut self, context: &mut Context<'_>, node: NodeId, addressed: &RaftMessage) {
        if addressed.to != self.id() {
            return; // Meant for a former replica of this group on this node.
        }
        // One that cannot be read is another build's, by its certificate one of ours: as good as lost on the way.
        if let Ok(message) = wire::decode(&addressed.meta, &addressed.payload) {
            Replica::on_message(self, context, node, addressed.from, message);
        }
    }

    fn on_rebuild(&mut self, context: &mut Context<'_>, from: ReplicaId, to: ReplicaId, meta: &Bytes, payload: &Bytes) {
        if to != self.id() {
            return;
        }
        if let Ok(message) = rebuild::message::decode(meta, payload) {
            self.on_rebuild_message(context, from, message);
        }
    }

    fn on_fetched(&mut self, context: &mut Context<'_>, request: u64, answer: Answer) {
        Replica::on_fetched(self, context, request, answer);
    }

    fn on_deadline(&mut self, context: &mut Context<'_>) {
        Replica::on_deadline(self, context);
    }

    fn on_suspect(&mut self, context: &mut Context<'_>, node: NodeId) {
        Replica::on_suspect(self, context, node);
    }

    fn on_peer_connected(&mut self, context: &mut Context<'_>, node: NodeId) {
        Replica::on_peer_connected(self, context, node);
    }

    fn on_flushed(&mut self, context: &mut Context<'_>, sequence: u64) {
        Replica::on_flushed(self, context, sequence);
    }

    fn on_checkpoint_wanted(&mut self) {
        Replica::on_checkpoint_wanted(self);
    }

    fn on_checkpoint_done(&mut self, context: &mut Context<'_>, index: u64) {
        Replica::on_checkpoint_done(self, context, index);
    }

    fn on_disk_failed(&mut self, context: &mut Context<'_>, reason: &str) {
        Replica::on_disk_failed(self, context, reason);
    }

    fn yield_leadership(&mut self, context: &mut Context<'_>) {
        Replica::yield_leadership(self, context);
    }

    fn lives_on(&self, node: NodeId) -> bool {
        self.directory().values().any(|home| *home == node)
    }

    fn can_yield(&self) -> bool {
        self.status().peers.iter().any(|peer| peer.reachable)
    }

    fn follows(&self) -> bool {
        self.leader().is_some_and(|leader| leader != self.id())
    }
}

impl Shard {
    /// Opens the disk and every group on it. Blocks for as long as recovery takes.
    ///
    /// # Errors
    /// The disk is not formatted, damaged beyond its redundancy, or written by a newer build: nothing was changed.
    pub fn open(options: ShardOptions, device: &dyn Device, now: Timestamp) -> Result<Shard, ShardError> {
        let (store, recovered) = Store::open(device)?;
        let (node, boot) = (store.superblock().node, store.superblock().boot_epoch);
        let found_damage = store.counters().corrupt_pages > 0;
        let ShardOptions { heartbeat, lease, drift_ppm, .. } = options;
        let pairs = Pairs::new(PairOptions { node, heartbeat, lease, drift_ppm, boot });
        let core = Core::new(now, store, pairs, options.seed);
        let mut shard = Shard {
            core,
            options,
            volumes: BTreeMap::new(),
            metadata: None,
            orders: Orders::default(),
            damaged: BTreeMap::new(),
            repairs: Repairs::default(),
            scrub: Scrubbing::new(options.scrub, now, found_damage),
            recovery: LogRecovery::default(),
            deadlines: BTreeSet::new(),
            deadline_of: BTreeMap::new(),
            stopping: false,
            handing_over: BTreeSet::new(),
        };
        for group in recovered {
            shard.add_group(group)?;
        }
        shard.refresh_peers();
        shard.refresh_deadlines();
        Ok(shard)
    }

    pub fn superblock(&self) -> &Superblock {
        self.core.store.superblock()
    }

    /// After [`Event::Stop`]: whether nobody waits for this shard. False as long as a group that it led has peers and
    /// none of them leads it; the rim bounds the wait.
    pub fn is_handed_over(&self) -> bool {
        self.stopping && self.handing_over.is_empty()
    }

    /// Notes an orderly end on the disk, of which nothing may be in flight any more.
    ///
    /// # Errors
    /// The disk's own.
    pub fn close(self, device: &dyn Device) -> io::Result<()> {
        self.core.store.close(device)
    }

    /// When `step` wants to be called though nothing happens.
    pub fn deadline(&self) -> Option<Timestamp> {
        let groups = self.deadlines.first().map(|(at, _)| *at);
        let metadata = self.metadata.as_ref().and_then(MetadataGroup::retry_at);
        let own = [self.core.pairs.deadline(), self.core.idle_at(), self.repairs.deadline(), self.scrub.deadline()];
        [groups, metadata].into_iter().chain(own).flatten().min()
    }

    /// Takes what happened together, with the time sampled after the last of it, and returns what is to be done.
    pub fn step(&mut self, events: Vec<Event>, now: Timestamp) -> Effects {
        self.core.now = now;
        for event in events {
            self.on_event(event);
        }
        self.on_deadlines();
        self.on_pair_events();
        self.settle();
        self.drive_repairs();
        self.drive_scrub();
        self.settle();
        self.watch_recovery();
        if self.stopping {
            self.hand_over();
        }
        self.refresh_deadlines();
        self.core.submit();
        std::mem::take(&mut self.core.effects)
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Device { id, result } => self.core.on_completion(id, result),
            Event::Peer { from, message } => self.on_peer(from, message),
            Event::Client { client, role, request } => self.on_client(client, &role, request),
            Event::ClientClosed(client) => {
                for volume in self.volumes.values_mut() {
                    volume.on_client_closed(client);
                }
            }
            Event::PeerConnected(node) => {
                self.core.connected.insert(node);
                self.repairs.on_peer_connected(self.core.now);
                self.each_group_on(node, |replica, context| replica.on_peer_connected(context, node));
                if let Some(metadata) = &mut self.metadata {
                    metadata.on_peer_connected(node);
                    self.core.touched.insert(metadata.group());
                }
            }
            Event::PeerClosed(node) => {
                self.core.connected.remove(&node);
                self.core.pairs.on_closed(node);
            }
            Event::Admin { token, request } => self.on_admin(token, request),
            Event::Stop => self.stopping = true,
        }
    }

    /// Asks again where nobody was fit to lead yet; and of what is elected here meanwhile.
    fn hand_over(&mut self) {
        for group in self.groups() {
            let handing_over = &mut self.handing_over;
            let replica: &mut dyn Driven = match self.volumes.get_mut(&group) {
                Some(volume) => &mut volume.replica,
                None => &mut self.metadata.as_mut().expect("one of the groups").replica,
            };
            if replica.follows() {
                handing_over.remove(&group);
            } else if replica.can_yield() {
                handing_over.insert(group);
                replica.yield_leadership(&mut self.core.context());
                self.core.touched.insert(group);
            }
        }
        self.settle();
    }

    fn on_peer(&mut self, from: NodeId, message: PeerMessage) {
        match message {
            PeerMessage::Heartbeat { sequence, boot, disk_stalled } => {
                let support = self.core.pairs.on_heartbeat(self.core.now, from, boot, disk_stalled);
                if let Some(support) = support {
                    let reply = PeerMessage::HeartbeatReply { sequence, boot, support };
                    self.core.effects.peers.push((from, reply));
                }
            }
            // An answer to a heartbeat of an earlier life of this node proves nothing to this one.
            PeerMessage::HeartbeatReply { sequence, boot, support } if boot == self.core.boot() => {
                self.core.pairs.on_reply(from, sequence, support);
            }
            PeerMessage::HeartbeatReply { .. } => {}
            PeerMessage::Raft { group, from: sender, to, meta, payload } => {
                let message = RaftMessage { from: sender, to, meta, payload };
                self.with_group(group, |replica, context| replica.on_message(context, from, &message));
            }
            PeerMessage::Control { body } => self.on_control(from, &body),
            PeerMessage::Delta { group, from: sender, to, meta, payload } => {
                self.with_group(group, |replica, context| replica.on_rebuild(context, sender, to, &meta, &payload));
            }
            PeerMessage::RepairRequest { group, from: sender, to, slot } => {
                self.on_repair_request(from, group, sender, to, slot);
            }
            PeerMessage::RepairReply { group, from: sender, to, slot, copy } => {
                self.on_repair_reply(group, sender, to, slot, copy);
            }
        }
    }

    fn on_client(&mut self, client: ClientId, role: &ClientRole, request: Request) {
        let volume = request_volume(&request);
        match self.volumes.get_mut(&GroupId::first(volume)) {
            Some(group) => {
                self.core.touched.insert(GroupId::first(volume));
                group.on_client(&mut self.core, client, role, request);
            }
            None => {
                let instance = match request {
                    Request::Attach { instance, .. } | Request::OpenSession { instance, .. } => Some(instance),
                    _ => None,
                };
                let reply = Reply::Refused { volume, instance, reason: session::Refusal::UnknownVolume };
                self.core.effects.clients.push((client, reply));
            }
        }
    }

    fn on_admin(&mut self, token: u64, request: AdminRequest) {
        match (request, &mut self.metadata) {
            (AdminRequest::Report, _) => {
                let report = Box::new(self.report());
                self.core.effects.admin.push((token, AdminReply::Report(report)));
            }
            (AdminRequest::Volumes { volumes }, _) => {
                let reports = self.report_volumes(&volumes);
                self.core.effects.admin.push((token, AdminReply::Volumes(reports)));
            }
            (AdminRequest::Usage, _) => {
                let usage = self.core.store.usage();
                self.core.effects.admin.push((token, AdminReply::Usage(usage)));
            }
            (AdminRequest::Found { founders }, _) => self.found(token, &founders),
            (AdminRequest::Attach(attach), _) => {
                self.on_volume_admin(token, attach.volume, |group, core| group.on_attach(core, token, attach));
            }
            (AdminRequest::Detach { volume, epoch }, _) => {
                self.on_volume_admin(token, volume, |group, core| group.on_detach(core, token, epoch));
            }
            (AdminRequest::TakeSnapshot { volume, snapshot, name }, _) => {
                self.on_volume_admin(token, volume, |group, core| group.on_take_snapshot(core, token, snapshot, name));
            }
            (AdminRequest::DeleteSnapshot { volume, snapshot }, _) => {
                self.on_volume_admin(token, volume, |group, core| group.on_delete_snapshot(core, token, snapshot));
            }
            (request, Some(metadata)) => {
                self.core.touched.insert(metadata.group());
                metadata.on_admin(&mut self.core, token, request);
            }
            (_, None) => {
                let reply = AdminReply::Failed(AdminError::NotLeader { leader: None });
                self.core.effects.admin.push((token, reply));
            }
        }
    }

    fn on_volume_admin(&mut self, token: u64, volume: VolumeId, call: impl FnOnce(&mut VolumeGroup, &mut Core)) {
        let group = GroupId::first(volume);
        match self.volumes.get_mut(&group) {
            Some(volume) => {
                self.core.touched.insert(group);
                call(volume, &mut self.core);
            }
            None => self.core.effects.admin.push((token, AdminReply::Failed(AdminError::NoReplica))),
        }
    }

    fn on_deadlines(&mut self) {
        let now = self.core.now;
        let boot = self.core.boot();
        let disk_stalled = self.core.disk_stalled();
        if disk_stalled {
            for group in self.groups() {
                self.with_group(group, |replica, context| replica.yield_leadership(context));
            }
        }
        for due in self.core.pairs.on_deadline(now) {
            let heartbeat = PeerMessage::Heartbeat { sequence: due.sequence, boot, disk_stalled };
            self.core.effects.peers.push((due.to, heartbeat));
        }
        if let Some(metadata) = self.metadata.as_mut().filter(|m| m.retry_at().is_some_and(|at| at <= now)) {
            metadata.on_retry();
            self.core.touched.insert(metadata.group());
        }
        while let Some((at, group)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(at, group));
            self.deadline_of.remove(&group);
            self.with_group(group, |replica, context| replica.on_deadline(context));
        }
    }

    fn on_pair_events(&mut self) {
        for event in self.core.pairs.take_events() {
            match event {
                PairEvent::Suspected(node) => {
                    self.each_group_on(node, |replica, context| replica.on_suspect(context, node));
                }
                PairEvent::SupportChanged(node) => {
                    self.each_group_on(node, |replica, context| replica.on_peer_connected(context, node));
                }
            }
        }
    }

    /// Until nothing that happened leaves anything to do: completions wake groups, groups ask the store, and so on.
    fn settle(&mut self) {
        loop {
            let mut quiet = true;
            for event in self.core.store.take_events() {
                quiet = false;
                self.on_store_event(event);
            }
            for event in self.core.store.take_repair_events() {
                quiet = false;
                self.on_repair_event(event);
            }
            for answer in self.core.store.take_changes() {
                quiet = false;
                let Some(PendingRead { group, purpose: ReadPurpose::Rebuild { request }, .. }) =
                    self.core.reads.remove(&answer.token)
                else {
                    continue;
                };
                let changes = Answer::Changes(answer.result);
                self.with_group(group, |replica, context| replica.on_fetched(context, request, changes));
            }
            while let Some(group) = self.core.touched.pop_first() {
                quiet = false;
                self.core.due.insert(group);
                if let Some(volume) = self.volumes.get_mut(&group) {
                    volume.settle(&mut self.core);
                } else if let Some(metadata) = self.metadata.as_mut().filter(|metadata| metadata.group() == group) {
                    metadata.settle(&mut self.core);
                }
            }
            if std::mem::take(&mut self.core.members_changed) {
                self.refresh_peers();
            }
            quiet &= !self.carry_out_own();
            if quiet {
                return;
            }
        }
    }

    fn on_store_event(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Flushed { group, sequence } => {
                self.with_group(group, |replica, context| replica.on_flushed(context, sequence));
            }
            StoreEvent::CheckpointDone { group, index } => {
                self.with_group(group, |replica, context| replica.on_checkpoint_done(context, index));
            }
            StoreEvent::CheckpointWanted { group } => {
                self.with_group(group, |replica, _| replica.on_checkpoint_wanted());
            }
            StoreEvent::Read { token, result } => {
                let Some(mut read) = self.core.reads.remove(&token) else { return };
                if let ReadPurpose::Rebuild { request } = read.purpose {
                    let slot = Answer::Slot(result);
                    return self.with_group(read.group, |replica, context| replica.on_fetched(context, request, slot));
                }
                if let Err(ReadError::Corrupt { first_block, .. }) = result {
                    match self.park_read(read, first_block) {
                        Ok(()) => return,
                        Err(failed) => read = failed,
                    }
                }
                if let Some(volume) = self.volumes.get_mut(&read.group) {
                    self.core.touched.insert(read.group);
                    volume.on_store_read(&mut self.core, read.purpose, result);
                }
            }
            StoreEvent::GroupCreated { group, .. } => self.on_group_created(group),
            StoreEvent::GroupDeleted { group, replica } => {
                self.repairs.forget(group);
                self.on_group_deleted(group, replica);
            }
            StoreEvent::Failed { reason } => {
                let groups: Vec<GroupId> = self.groups();
                for group in groups {
                    self.with_group(group, |replica, context| replica.on_disk_failed(context, &reason));
                }
                self.core.effects.failed = Some(reason);
            }
        }
    }

    fn groups(&self) -> Vec<GroupId> {
        self.volumes.keys().copied().chain(self.metadata.as_ref().map(MetadataGroup::group)).collect()
    }

    fn with_group(&mut self, group: GroupId, call: impl FnOnce(&mut dyn Driven, &mut Context<'_>)) {
        let replica: &mut dyn Driven = if let Some(volume) = self.volumes.get_mut(&group) {
            &mut volume.replica
        } else if let Some(metadata) = self.metadata.as_mut().filter(|metadata| metadata.group() == group) {
            &mut metadata.replica
        } else {
            return;
        };
        self.core.touched.insert(group);
        call(replica, &mut self.core.context());
    }

    fn each_group_on(&mut self, node: NodeId, mut call: impl FnMut(&mut dyn Driven, &mut Context<'_>)) {
        for group in self.groups() {
            self.with_group(group, |replica, context| {
                if replica.lives_on(node) {
                    call(replica, context);
                }
            });
        }
    }

    /// Makes a group that is on the disk live.
    pub(crate) fn add_group(&mut self, recovered: RecoveredGroup) -> Result<(), ShardError> {
        let group = recovered.group;
        if let Some(Damage::Checkpoint { reason }) = &recovered.damage {
            self.damaged.insert(group, reason.clone());
            return Ok(());
        }
        if let Some(Damage::Log { .. }) = &recovered.damage {
            self.recovery.found.insert(group);
        }
        let state = machine_state(&recovered)?;
        let unreadable = |reason: String| ShardError::State { group, reason };
        let options = self.raft_options(recovered.replica);
        let now = self.core.now;
        if group.is_metadata() {
            let catalogue = Catalogue::decode_state(&state).map_err(|error| unreadable(error.to_string()))?;
            self.metadata = Some(MetadataGroup::restore(recovered, catalogue, options, now)?);
        } else {
            let volume = Volume::decode_state(&state).map_err(|error| unreadable(error.to_string()))?;
            let replica = Replica::restore(recovered, VolumeMachine { volume }, options, now)?;
            self.volumes.insert(group, VolumeGroup::new(replica));
        }
        if !self.is_whole(group) {
            self.recovery.follow(group);
        }
        self.core.touched.insert(group);
        self.core.due.insert(group);
        Ok(())
    }

    fn raft_options(&self, replica: ReplicaId) -> RaftOptions {
        // Replicas of one group must not campaign in step: their own random identifiers spread them.
        let id = replica.as_u128();
        RaftOptions {
            id: replica,
            lease: self.options.lease,
            drift_ppm: self.options.drift_ppm,
            election_jitter: ELECTION_JITTER,
            append_bytes_max: APPEND_BYTES_MAX,
            inflight_bytes_max: INFLIGHT_BYTES_MAX,
            seed: fold(self.options.seed) ^ fold(id),
        }
    }

    /// Heartbeats go to the nodes that share a group with this one, and to no other.
    pub(crate) fn refresh_peers(&mut self) {
        let mut nodes = BTreeSet::new();
        for volume in self.volumes.values() {
            nodes.extend(volume.replica.directory().values().copied());
        }
        if let Some(metadata) = &self.metadata {
            nodes.extend(metadata.replica.directory().values().copied());
        }
        nodes.remove(&self.core.node);
        for gone in self.core.watched.difference(&nodes) {
            self.core.pairs.forget(*gone);
        }
        for new in nodes.difference(&self.core.watched) {
            self.core.pairs.watch(self.core.now, *new);
        }
        self.core.watched = nodes;
    }

    fn refresh_deadlines(&mut self) {
        for group in std::mem::take(&mut self.core.due) {
            let deadline = if let Some(volume) = self.volumes.get(&group) {
                volume.replica.deadline()
            } else {
                self.metadata.as_ref().filter(|metadata| metadata.group() == group).and_then(|m| m.replica.deadline())
            };
            let former = match deadline {
                Some(at) => self.deadline_of.insert(group, at),
                None => self.deadline_of.remove(&group),
            };
            if former != deadline {
                if let Some(former) = former {
                    self.deadlines.remove(&(former, group));
                }
                self.deadlines.extend(deadline.map(|at| (at, group)));
            }
        }
    }
}

fn fold(wide: u128) -> u64 {
    (wide as u64) ^ ((wide >> 64) as u64)
}

fn request_volume(request: &Request) -> VolumeId {
    match request {
        Request::Attach { volume, .. }
        | Request::OpenSession { volume, .. }
        | Request::Detach { volume, .. }
        | Request::SetFormatted { volume, .. }
        | Request::Io { volume, .. } => *volume,
    }
}
