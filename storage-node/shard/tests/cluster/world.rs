//! [`Cluster`]: three shards over disks in memory, their messages and their time, in one thread.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::Founder;
use holdfast_metadata::command::{Command, RegisterDisk};
use holdfast_metadata::spec::{Labels, Name, Spread, VolumeSpec};
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::{Reply, Request};
use holdfast_shard::{AdminReply, AdminRequest, ClientId, ClientRole, Event, NewVolume, Shard, ShardOptions};
use holdfast_store::device::Device;
use holdfast_store::device::memory::MemoryDevice;
use holdfast_store::ops::{AlignedBuffer, DeviceOp};
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

const NODES: u8 = 3;
pub const VOLUME_BYTES: u64 = 4 << 20;
/// What is waited for comes within this, of the cluster's own time.
const SOON: Duration = Duration::from_secs(30);

pub struct Cluster {
    pub shards: Vec<Shard>,
    devices: Vec<MemoryDevice>,
    pub now: Timestamp,
    network: VecDeque<(usize, usize, PeerMessage)>,
    pub replies: Vec<(ClientId, Reply)>,
    answers: BTreeMap<u64, AdminReply>,
    token: u64,
    pub volume: VolumeId,
    /// What becomes of a message between nodes on its way; `None` loses it.
    pub on_the_way: Box<dyn FnMut(PeerMessage) -> Option<PeerMessage>>,
}

fn node(number: usize) -> NodeId {
    NodeId::from_bytes([number as u8 + 1; 16]).unwrap()
}

impl Cluster {
    /// Founded, with one volume that is led and served.
    pub fn new() -> Cluster {
        let cluster = ClusterId::from_bytes([77; 16]).unwrap();
        let now = Timestamp(1_000_000_000);
        let (mut shards, mut devices) = (Vec::new(), Vec::new());
        for number in 0..usize::from(NODES) {
            let device = MemoryDevice::new(112 << 20);
            let disk = DiskId::from_bytes([number as u8 + 1; 16]).unwrap();
            let sizes = FormatOptions::new(cluster, node(number), disk);
            let sizes = FormatOptions { wal_segment_bytes: 4 << 20, wal_segments: 8, groups_max: 16, ..sizes };
            Store::format(&device, &sizes).unwrap();
            shards.push(Shard::open(ShardOptions::new(number as u128), &device, now).unwrap());
            devices.push(device);
        }
        let volume = VolumeId::from_bytes([42; 16]).unwrap();
        let mut cluster = Cluster {
            shards,
            devices,
            now,
            network: VecDeque::new(),
            replies: Vec::new(),
            answers: BTreeMap::new(),
            token: 0,
            volume,
            on_the_way: Box::new(Some),
        };
        cluster.connect_all();
        cluster.found(cluster_founders());
        cluster.create();
        cluster
    }

    fn connect_all(&mut self) {
        for one in 0..self.shards.len() {
            let others = (0..self.shards.len()).filter(|other| *other != one);
            let events = others.map(|other| Event::PeerConnected(node(other))).collect();
            self.step(one, events);
        }
    }

    fn found(&mut self, founders: Vec<Founder>) {
        for number in 0..self.shards.len() {
            let request = AdminRequest::Found { founders: founders.clone() };
            let answer = self.ask(number, request);
            assert!(matches!(answer, AdminReply::Founded), "{answer:?}");
        }
        for number in 0..self.shards.len() {
            let disk = self.shards[number].superblock().disk;
            let register = RegisterDisk { disk, node: node(number), capacity_bytes: 40 << 20, only: false };
            self.ask_leader(AdminRequest::Change(Command::RegisterDisk(register)));
        }
    }

    fn create(&mut self) {
        let new = NewVolume {
            volume: self.volume,
            replicas: (0..NODES).map(|number| ReplicaId::from_bytes([100 + number; 16]).unwrap()).collect(),
            name: Name::new("v").unwrap(),
            spec: VolumeSpec {
                size_bytes: VOLUME_BYTES,
                logical_block_bytes: 512,
                replicas: NODES,
                spread: Spread::Node,
            },
            preferred: Vec::new(),
            labels: Labels::new(),
        };
        let answer = self.ask_leader(AdminRequest::CreateVolume(new));
        assert!(matches!(answer, AdminReply::Changed(_)), "{answer:?}");
        self.run_until("a leader of the volume", |cluster| cluster.leader().is_some());
    }

    /// Which shard leads and serves the volume.
    pub fn leader(&self) -> Option<usize> {
        let group = GroupId::first(self.volume);
        self.shards.iter().position(|shard| shard.leads(group))
    }

    /// Asks all of it in one step; returns the tokens of the answers.
    pub fn tell(&mut self, number: usize, requests: Vec<AdminRequest>) -> Vec<u64> {
        let first = self.token + 1;
        self.token += requests.len() as u64;
        let tokens: Vec<u64> = (first..=self.token).collect();
        let asked = tokens.iter().zip(requests).map(|(token, request)| Event::Admin { token: *token, request });
        let events = asked.collect();
        self.step(number, events);
        tokens
    }

    pub fn take_answer(&mut self, token: u64) -> Option<AdminReply> {
        self.answers.remove(&token)
    }

    pub fn answer(&mut self, token: u64) -> AdminReply {
        self.run_until("an answer", |cluster| cluster.answers.contains_key(&token));
        self.answers.remove(&token).unwrap()
    }

    pub fn ask(&mut self, number: usize, request: AdminRequest) -> AdminReply {
        let token = self.tell(number, vec![request])[0];
        self.answer(token)
    }

    fn ask_leader(&mut self, request: AdminRequest) -> AdminReply {
        for _ in 0..1000 {
            for number in 0..self.shards.len() {
                match self.ask(number, request.clone()) {
                    AdminReply::Failed(_) => {}
                    answer => return answer,
                }
            }
            self.pass(Duration::from_millis(50));
        }
        panic!("nobody leads the metadata plane");
    }

    pub fn request(&mut self, number: usize, client: ClientId, request: Request) {
        self.request_as(number, client, ClientRole::Agent, request);
    }

    pub fn request_as(&mut self, number: usize, client: ClientId, role: ClientRole, request: Request) {
        let encoded = request.encode();
        let decoded = Request::decode(encoded.kind, encoded.meta, encoded.payload).expect("what a client can send");
        self.step(number, vec![Event::Client { client, role, request: decoded }]);
    }

    pub fn step(&mut self, number: usize, mut events: Vec<Event>) {
        loop {
            let effects = self.shards[number].step(std::mem::take(&mut events), self.now);
            assert_eq!(effects.failed, None, "the disk is sound");
            self.answers.extend(effects.admin);
            self.replies.extend(effects.clients);
            for (to, message) in effects.peers {
                let to = (0..self.shards.len()).find(|number| node(*number) == to).unwrap();
                self.network.push_back((number, to, message));
            }
            if effects.device.is_empty() {
                return;
            }
            events = effects.device.into_iter().map(|op| perform(&self.devices[number], op)).collect();
        }
    }

    /// Delivers what is on the way, then lets the time pass until somebody wants to be woken.
    fn turn(&mut self) {
        while let Some((from, to, message)) = self.network.pop_front() {
            let encoded = message.encode();
            let message = PeerMessage::decode(encoded.kind, encoded.meta, encoded.payload).expect("what a peer sent");
            if let Some(message) = (self.on_the_way)(message) {
                self.step(to, vec![Event::Peer { from: node(from), message }]);
            }
        }
        let due = self.shards.iter().filter_map(Shard::deadline).min().expect("heartbeats");
        // A moment later than the last step at least, so that nothing stands still.
        self.now = due.max(self.now + Duration::from_micros(100));
        for number in 0..self.shards.len() {
            if self.shards[number].deadline().is_some_and(|at| at <= self.now) {
                self.step(number, Vec::new());
            }
        }
    }

    pub fn run_until(&mut self, what: &str, mut done: impl FnMut(&Cluster) -> bool) {
        let until = self.now + SOON;
        while !done(self) {
            assert!(self.now < until, "not within {SOON:?}: {what}");
            self.turn();
        }
    }

    pub fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.turn();
        }
    }

    /// All processes end at once and start again, with what their disks have flushed.
    pub fn restart(&mut self) {
        self.network.clear();
        self.now = self.now + Duration::from_secs(1);
        for (number, device) in self.devices.iter().enumerate() {
            device.crash(|_: usize, _: usize| false);
            self.shards[number] =
                Shard::open(ShardOptions::new(number as u128), device, self.now).expect("it recovers");
        }
        self.connect_all();
        self.run_until("a leader after the restart", |cluster| cluster.leader().is_some());
    }
}

fn cluster_founders() -> Vec<Founder> {
    let founder = |number: usize| Founder {
        node: node(number),
        replica: ReplicaId::from_bytes([200 + number as u8; 16]).unwrap(),
        name: Name::new(&format!("node-{number}")).unwrap(),
        peer_address: format!("node-{number}:1"),
        api_address: format!("node-{number}:2"),
        zone: None,
    };
    (0..usize::from(NODES)).map(founder).collect()
}

fn perform(device: &MemoryDevice, op: DeviceOp) -> Event {
    let id = op.id();
    let bytes = match op {
        DeviceOp::Read { offset, length, .. } => {
            let mut buffer = AlignedBuffer::zeroed(length as usize);
            device.read_at(offset, &mut buffer).unwrap();
            buffer.into_bytes()
        }
        DeviceOp::Write { offset, data, durable: true, .. } => {
            device.write_durable_at(offset, &data).unwrap();
            Bytes::new()
        }
        DeviceOp::Write { offset, data, durable: false, .. } => {
            device.write_at(offset, &data).unwrap();
            Bytes::new()
        }
        DeviceOp::Flush { .. } => {
            device.flush().unwrap();
            Bytes::new()
        }
    };
    Event::Device { id, result: Ok(bytes) }
}
