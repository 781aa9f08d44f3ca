//! Replicas move between nodes and are made again, driven by the shards alone: a network without faults, disks in
//! memory, and a clock that jumps to the next deadline.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{DiskState, Founder, NodeState, VolumeState};
use holdfast_metadata::command::{Command, RegisterDisk, RegisterNode, SetNodeState, SetVolumeReplicas};
use holdfast_metadata::spec::{Labels, Name, Spread, VolumeSpec};
use holdfast_metadata::{Catalogue, Outcome, planner};
use holdfast_protocol::peer::PeerMessage;
use holdfast_shard::{AdminReply, AdminRequest, Effects, Event, NewVolume, Shard, ShardOptions};
use holdfast_store::device::Device;
use holdfast_store::device::memory::MemoryDevice;
use holdfast_store::ops::DeviceOp;
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

/// Far beyond what anything here takes; a test that reaches it shows where things stand.
const STEPS_MAX: usize = 200_000;

fn id<T>(kind: u8, number: u8, from: impl FnOnce([u8; 16]) -> Option<T>) -> T {
    let mut bytes = [kind; 16];
    bytes[15] = number;
    from(bytes).expect("not zero")
}

fn node(number: u8) -> NodeId {
    id(1, number, NodeId::from_bytes)
}

fn cluster() -> ClusterId {
    id(9, 9, ClusterId::from_bytes)
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a DNS label")
}

struct Machine {
    device: MemoryDevice,
    disk: DiskId,
    /// `None` while the process is not running.
    shard: Option<Shard>,
    inbox: VecDeque<Event>,
}

struct World {
    now: Timestamp,
    machines: BTreeMap<NodeId, Machine>,
    answers: BTreeMap<u64, AdminReply>,
    next_token: u64,
    disks: u8,
}

impl World {
    fn new(nodes: u8) -> World {
        let mut world = World {
            now: Timestamp(1_000_000_000),
            machines: BTreeMap::new(),
            answers: BTreeMap::new(),
            next_token: 0,
            disks: 0,
        };
        (0..nodes).for_each(|number| world.insert_disk(node(number)));
        world
    }

    /// Starts the node with an empty disk, whatever it had.
    fn insert_disk(&mut self, node: NodeId) {
        self.disks += 1;
        let disk = id(2, self.disks, DiskId::from_bytes);
        let device = MemoryDevice::new(64 << 20);
        let format = FormatOptions {
            wal_segment_bytes: 4 << 20,
            wal_segments: 4,
            groups_max: 16,
            boot_epoch: u64::from(self.disks) * 1000,
            ..FormatOptions::new(cluster(), node, disk)
        };
        Store::format(&device, &format).expect("an empty disk");
        self.machines.insert(node, Machine { device, disk, shard: None, inbox: VecDeque::new() });
        self.start(node);
    }

    fn start(&mut self, node: NodeId) {
        let now = self.now;
        let machine = self.machines.get_mut(&node).expect("a machine");
        let seed = u128::from_be_bytes(node.to_bytes()) ^ u128::from(now.0);
        machine.shard = Some(Shard::open(ShardOptions::new(seed), &machine.device, now).expect("the disk opens"));
        machine.inbox.clear();
        let others: Vec<NodeId> = self.running().filter(|other| *other != node).collect();
        for other in others {
            self.push(node, Event::PeerConnected(other));
            self.push(other, Event::PeerConnected(node));
        }
    }

    fn stop(&mut self, node: NodeId) {
        let machine = self.machines.get_mut(&node).expect("a machine");
        machine.shard = None;
        machine.inbox.clear();
        let others: Vec<NodeId> = self.running().collect();
        others.into_iter().for_each(|other| self.push(other, Event::PeerClosed(node)));
    }

    fn running(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.machines.iter().filter(|(_, machine)| machine.shard.is_some()).map(|(node, _)| *node)
    }

    fn shards(&self) -> impl Iterator<Item = (NodeId, &Shard)> {
        self.machines.iter().filter_map(|(node, machine)| Some((*node, machine.shard.as_ref()?)))
    }

    fn push(&mut self, node: NodeId, event: Event) {
        let machine = self.machines.get_mut(&node).expect("a machine");
        if machine.shard.is_some() {
            machine.inbox.push_back(event);
        }
    }

    /// Until the condition holds.
    fn run_until(&mut self, what: &str, mut done: impl FnMut(&World) -> bool) {
        for _ in 0..STEPS_MAX {
            if done(self) {
                return;
            }
            let ready = self.machines.iter().find(|(_, machine)| !machine.inbox.is_empty()).map(|(node, _)| *node);
            let next = ready.unwrap_or_else(|| {
                let due = self.shards().filter_map(|(node, shard)| Some((shard.deadline()?, node))).min();
                let (at, node) = due.expect("somebody has something to do");
                self.now = self.now.max(at);
                node
            });
            self.now = self.now + Duration::from_micros(1);
            self.step(next);
        }
        let reports: Vec<_> = self.shards().map(|(node, shard)| (node, shard.report())).collect();
        panic!("it does not come to this: {what}\n{reports:#?}");
    }

    fn step(&mut self, node: NodeId) {
        let now = self.now;
        let machine = self.machines.get_mut(&node).expect("a machine");
        let events = machine.inbox.drain(..).collect();
        let shard = machine.shard.as_mut().expect("it runs");
        let effects: Effects = shard.step(events, now);
        assert_eq!(effects.failed, None);
        for operation in effects.device {
            let result = match &operation {
                DeviceOp::Read { offset, length, .. } => {
                    let mut bytes = vec![0; *length as usize];
                    machine.device.read_at(*offset, &mut bytes).map(|()| Bytes::from(bytes))
                }
                DeviceOp::Write { offset, data, .. } => machine.device.write_at(*offset, data).map(|()| Bytes::new()),
                DeviceOp::Flush { .. } => machine.device.flush().map(|()| Bytes::new()),
            };
            let result = Ok(result.expect("memory does not fail"));
            machine.inbox.push_back(Event::Device { id: operation.id(), result });
        }
        self.answers.extend(effects.admin);
        for (to, message) in effects.peers {
            let encoded = message.encode();
            let message = PeerMessage::decode(encoded.kind, encoded.meta, encoded.payload).expect("its own encoding");
            self.push(to, Event::Peer { from: node, message });
        }
    }

    fn ask(&mut self, node: NodeId, request: AdminRequest) -> AdminReply {
        self.next_token += 1;
        let token = self.next_token;
        self.push(node, Event::Admin { token, request });
        self.run_until("an answer", |world| world.answers.contains_key(&token));
        self.answers.remove(&token).expect("it is there")
    }

    /// Asks whoever leads the metadata plane.
    fn ask_leader(&mut self, request: &AdminRequest) -> AdminReply {
        let leads = |world: &World| {
            let group = GroupId::metadata(cluster());
            world.shards().find(|(_, shard)| shard.leads(group)).map(|(node, _)| node)
        };
        loop {
            self.run_until("the metadata plane has a leader", |world| leads(world).is_some());
            let leader = leads(self).expect("it was there");
            match self.ask(leader, request.clone()) {
                AdminReply::Failed(_) => {}
                reply => return reply,
            }
        }
    }

    fn change(&mut self, command: Command) {
        match self.ask_leader(&AdminRequest::Change(command.clone())) {
            AdminReply::Changed(Outcome::Applied | Outcome::Unchanged) => {}
            reply => panic!("{command:?} is answered {reply:?}"),
        }
    }

    fn catalogue(&mut self) -> Catalogue {
        match self.ask_leader(&AdminRequest::Catalogue) {
            AdminReply::Catalogue(catalogue) => (*catalogue).clone(),
            reply => panic!("{reply:?}"),
        }
    }

    /// Asks again and again, with time passing.
    fn wait(&mut self, what: &str, holds: impl Fn(&Catalogue) -> bool) -> Catalogue {
        for _ in 0..300 {
            let catalogue = self.catalogue();
            if holds(&catalogue) {
                return catalogue;
            }
            let until = self.now + Duration::from_millis(100);
            self.run_until("time passes", |world| world.now >= until);
        }
        panic!("it does not come to this: {what}\n{:#?}", self.catalogue());
    }

    fn found(&mut self, nodes: u8) {
        let founder = |number: u8| Founder {
            node: node(number),
            replica: id(3, number, ReplicaId::from_bytes),
            name: name(&format!("n{number}")),
            peer_address: format!("n{number}:1"),
            api_address: format!("n{number}:2"),
            zone: None,
        };
        let founders: Vec<Founder> = (0..3).map(founder).collect();
        for number in 0..3 {
            let reply = self.ask(node(number), AdminRequest::Found { founders: founders.clone() });
            assert!(matches!(reply, AdminReply::Founded), "{reply:?}");
        }
        for number in 0..nodes {
            let Founder { node, name, peer_address, api_address, zone, .. } = founder(number);
            self.change(Command::RegisterNode(RegisterNode { node, name, peer_address, api_address, zone }));
            self.register(node);
        }
    }

    fn register(&mut self, node: NodeId) {
        let disk = self.machines[&node].disk;
        self.change(Command::RegisterDisk(RegisterDisk { disk, node, capacity_bytes: 32 << 20, only: true }));
    }

    fn create(&mut self, number: u8) -> GroupId {
        self.create_with(number, 3)
    }

    fn create_with(&mut self, number: u8, replicas: u8) -> GroupId {
        let volume = id(4, number, VolumeId::from_bytes);
        let new = NewVolume {
            volume,
            replicas: (0..3).map(|n| id(5, number * 8 + n, ReplicaId::from_bytes)).collect(),
            name: name(&format!("v{number}")),
            spec: VolumeSpec { size_bytes: 1 << 20, logical_block_bytes: 512, replicas, spread: Spread::Node },
            preferred: Vec::new(),
            labels: Labels::new(),
        };
        let reply = self.ask_leader(&AdminRequest::CreateVolume(new));
        assert!(matches!(reply, AdminReply::Changed(Outcome::Applied)), "{reply:?}");
        self.wait("the volume is ready", |catalogue| catalogue.volumes()[&volume].state == VolumeState::Ready);
        GroupId::first(volume)
    }

    fn holders(&self, group: GroupId) -> BTreeSet<NodeId> {
        self.shards().filter(|(_, shard)| shard.machine_state(group).is_some()).map(|(node, _)| node).collect()
    }

    /// Every replica has come to the same state.
    fn run_until_equal(&mut self, group: GroupId) {
        self.run_until("the replicas are equal", |world| {
            let states: Vec<_> = world.shards().filter_map(|(_, shard)| shard.machine_state(group)).collect();
            states.windows(2).all(|pair| (pair[0].1, &pair[0].2) == (pair[1].1, &pair[1].2))
        });
    }
}

fn members(catalogue: &Catalogue, group: GroupId) -> BTreeSet<NodeId> {
    catalogue.placement(group.volume).expect("it is there").members.iter().map(|place| place.node).collect()
}

#[test]
fn a_removed_node_hands_on_what_it_holds_and_then_holds_nothing() {
    let mut world = World::new(4);
    world.found(4);
    let volumes = [world.create(1), world.create(2), world.create(3)];
    let metadata = GroupId::metadata(cluster());
    // Also where it leads what is to move.
    world.change(Command::SetNodeState(SetNodeState { node: node(0), state: NodeState::Removing }));
    let done = |catalogue: &Catalogue| catalogue.nodes()[&node(0)].state == NodeState::Removed;
    let catalogue = world.wait("the node is removed", done);
    let others: BTreeSet<NodeId> = (1..4).map(node).collect();
    for group in volumes.into_iter().chain([metadata]) {
        assert_eq!(members(&catalogue, group), others, "{group}");
        world.run_until_equal(group);
        assert_eq!(world.holders(group), others, "{group}: deleted where it left, and only there");
    }
    assert!(catalogue.tombstones().is_empty());
    // Nothing needs it any more.
    world.stop(node(0));
    world.create(4);
}

#[test]
fn an_empty_disk_is_filled_again_though_leaders_change_meanwhile() {
    for killed in 0..3 {
        let mut world = World::new(3);
        world.found(3);
        let volumes = [world.create(1), world.create(2)];
        world.stop(node(2));
        world.insert_disk(node(2));
        world.register(node(2));
        let catalogue = world.catalogue();
        assert!(catalogue.disks().values().any(|disk| disk.state == DiskState::Failed), "the former one is lost");
        // A leader goes away in the middle of each change of members, or right away.
        let mut kills = 0;
        if killed < 2 {
            world.run_until("a change of members", |world| {
                world.shards().any(|(other, shard)| other == node(killed) && shard.leads_joint_change())
                    || world
                        .shards()
                        .all(|(_, shard)| volumes.iter().all(|group| shard.machine_state(*group).is_some()))
            });
            world.stop(node(killed));
            kills += 1;
            let until = world.now + Duration::from_secs(3);
            world.run_until("time passes", |world| world.now >= until);
            world.start(node(killed));
        }
        let done = |catalogue: &Catalogue| {
            let ids = catalogue.volumes().keys().copied().chain([catalogue.metadata_id()]);
            ids.filter_map(|id| catalogue.placement(id)).all(|placement| {
                placement.replacement.is_none() && placement.members.iter().all(|place| catalogue.counts(place))
            })
        };
        let catalogue = world.wait("everything is on disks that count", done);
        let all: BTreeSet<NodeId> = (0..3).map(node).collect();
        for group in volumes.into_iter().chain([GroupId::metadata(cluster())]) {
            assert_eq!(members(&catalogue, group), all, "{group} after {kills} kills");
            world.run_until_equal(group);
            assert_eq!(world.holders(group), all, "{group}");
        }
    }
}

/// As many members as wanted, and nothing left of any other.
fn settled(catalogue: &Catalogue, group: GroupId) -> bool {
    let placement = catalogue.placement(group.volume).expect("it is there");
    let enough = placement.members.len() == placement.wanted;
    enough && placement.replacement.is_none() && catalogue.tombstones().is_empty()
}

#[test]
fn copies_come_and_go_one_by_one() {
    let mut world = World::new(4);
    world.found(4);
    let group = world.create_with(1, 1);
    for replicas in [3, 2, 4, 1, 2] {
        let set = SetVolumeReplicas { volume: group.volume, replicas, expected_generation: None };
        world.change(Command::SetVolumeReplicas(set));
        let catalogue = world.wait("the copies are there", |catalogue| settled(catalogue, group));
        let members = members(&catalogue, group);
        assert_eq!(members.len(), usize::from(replicas));
        world.run_until_equal(group);
        assert_eq!(world.holders(group), members, "{replicas} copies");
    }
}

#[test]
fn no_copy_goes_that_the_others_could_not_do_without() {
    let mut world = World::new(3);
    world.found(3);
    let group = world.create(1);
    let catalogue = world.catalogue();
    let placement = catalogue.placement(group.volume).expect("it is there");
    let goes = planner::plan_removal(&catalogue, &placement);
    let stays = placement.members.iter().find(|place| Some(place.replica) != goes).expect("three copies").node;
    world.stop(stays);
    let set = SetVolumeReplicas { volume: group.volume, replicas: 2, expected_generation: None };
    world.change(Command::SetVolumeReplicas(set));
    let until = world.now + Duration::from_secs(10);
    world.run_until("time passes", |world| {
        let joint = world.shards().any(|(_, shard)| shard.leads_joint_change());
        assert!(!joint, "a joint change that cannot be committed stops the volume");
        world.now >= until
    });
    assert!(!settled(&world.catalogue(), group));
    world.start(stays);
    world.wait("the copy is gone", |catalogue| settled(catalogue, group));
    world.run_until_equal(group);
}
