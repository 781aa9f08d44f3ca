//! One seed's run: a cluster is founded, works while things break, is healed, and everything is read and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::{Member, Role, Timestamp};
use holdfast_id::{ClusterId, DiskId, GroupId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{Founder, VolumeState};
use holdfast_metadata::command::{Command, RegisterNode};
use holdfast_metadata::spec::{Labels, Name, Spread, VolumeSpec};
use holdfast_metadata::{Catalogue, Outcome};
use holdfast_shard::{AdminError, AdminReply, AdminRequest, NewVolume, ScrubOptions, Shard, ShardOptions, ShardReport};
use holdfast_store::device::Device;
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

use crate::clock::Clock;
use crate::connections::{Connections, End};
use crate::disk::{CrashMode, DiskOptions, SimDisk};
use crate::faults::{FaultKind, Plan};
use crate::latency::Latency;
use crate::machine::{Machine, Power};
use crate::network::Link;
use crate::prng::{MILLION, Prng};
use crate::workload::{Mix, Target};
use crate::world::{Failure, Pace, Timer, World};

/// A run with fewer has shown too little to count.
pub const OPERATIONS_MIN: u64 = 2_000;
pub const FAULTS_MIN: u64 = 3;

/// What must have happened sometimes, over many seeds, for their silence to mean anything.
pub const MARKS: [&str; 16] = [
    "a second leader",
    "a restart",
    "a checkpoint",
    "damage at a start",
    "a fenced request",
    "a detach",
    "a resize under load",
    "a replica behind the log",
    "a rebuild by delta",
    "a delta while writing",
    "a message dropped at a full buffer",
    "members of a volume moved under load",
    "a leader change in a joint change",
    "blocks repaired from a peer",
    "snapshots on every replica",
    "a snapshot brought by a rebuild",
];

/// Members of the metadata plane.
const FOUNDERS: usize = 3;
/// The metadata plane answers within this, when nothing breaks.
const SETUP_MAX: Duration = Duration::from_secs(20);
/// The chaos lasts at least and at most so long.
const CHAOS_MIN: Duration = Duration::from_secs(6);
const CHAOS_MAX: Duration = Duration::from_secs(40);
/// After the healing every request must be answered within this: elections take some hundred milliseconds, clients
/// wait at most a second between two rounds, resends up to 16 s.
const HEAL_MAX: Duration = Duration::from_secs(30);
/// A pass every few seconds, so that a run sees many.
const SCRUB: ScrubOptions = ScrubOptions {
    first_after: Duration::from_millis(500),
    interval: Duration::from_secs(2),
    idle_bytes_per_second: 256 << 20,
    busy_bytes_per_second: 64 << 20,
};
/// Everything rotten is found and repaired within so many passes.
const PASSES_MAX: u32 = 6;
/// Reads in flight while everything is verified.
const VERIFY_DEPTH: usize = 16;

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub verbose: bool,
}

/// What a run has shown.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub operations: u64,
    pub bytes_verified: u64,
    pub faults: BTreeMap<FaultKind, u64>,
    pub marks: BTreeSet<&'static str>,
    /// Replicas that needed more than the log still had, and were rebuilt.
    pub lagging: u64,
    pub events: u64,
    pub log_hash: u64,
    /// Simulated.
    pub lasted: Duration,
}

impl Report {
    /// Whether it has shown enough to count.
    pub fn counts(&self) -> bool {
        let faults: u64 = self.faults.iter().filter(|(kind, _)| kind.breaks()).map(|(_, count)| count).sum();
        self.operations >= OPERATIONS_MIN && faults >= FAULTS_MIN
    }
}

/// # Errors
/// What is wrong with the cluster.
pub fn run(seed: u64, options: Options) -> Result<Report, Failure> {
    let mut scenario = Scenario::new(seed, options)?;
    scenario.set_up()?;
    scenario.chaos()?;
    scenario.heal()?;
    scenario.verify()?;
    scenario.compare()?;
    scenario.repaired()?;
    Ok(scenario.report())
}

struct Scenario {
    world: World,
    cluster: ClusterId,
    sizes: Vec<(u64, u8, u32)>,
    salt: u64,
    lagging: BTreeSet<(GroupId, ReplicaId)>,
    started: Timestamp,
}

fn identifier<T>(prng: &mut Prng, from: impl FnOnce([u8; 16]) -> Option<T>) -> T {
    let mut bytes = [0; 16];
    prng.fill(&mut bytes);
    from(bytes).expect("sixteen random bytes are not all zeroes")
}

impl Scenario {
    fn new(seed: u64, options: Options) -> Result<Scenario, Failure> {
        let root = Prng::new(seed);
        let mut prng = root.split("scenario", 0);
        let nodes = *prng.pick(&[3u8, 3, 4, 5]);
        let cluster = identifier(&mut prng, ClusterId::from_bytes);
        let drift_ppm = *prng.pick(&[500u32, 500, 5_000]);
        let mut machines = Vec::new();
        for number in 0..nodes {
            let node = identifier(&mut prng, NodeId::from_bytes);
            let disk_id = identifier(&mut prng, DiskId::from_bytes);
            // Room for what a log full of small writes is promised after a restart, before any of it is known to be
            // committed: a follower that is short of it takes nothing more, and a bare quorum cannot do without one.
            let megabytes = *prng.pick(&[512u64, 640]);
            let disk = SimDisk::new(root.split("disk", u64::from(number)), DiskOptions::solid_state(megabytes << 20));
            let format = FormatOptions {
                wal_segment_bytes: 5 << 20,
                wal_segments: *prng.pick(&[4, 8, 12]),
                groups_max: 64,
                ..FormatOptions::new(cluster, node, disk_id)
            };
            let wrong = |error: &dyn std::error::Error| Failure::Incorrect(format!("a disk is not formatted: {error}"));
            // A used disk is given to us erased as its refusal says.
            disk.write_at(0, &vec![0; 1 << 20]).map_err(|error| wrong(&error))?;
            Store::format(&disk, &format).map_err(|error| wrong(&error))?;
            let shown = Timestamp(prng.below(1_000_000_000_000));
            let clock = Clock::new(Timestamp(0), shown, 0);
            let shard = ShardOptions { drift_ppm, scrub: SCRUB, ..ShardOptions::new(0) };
            let own = root.split("machine", u64::from(number));
            machines.push(Machine::new(End::Node(number), disk, format, clock, shard, own));
        }
        let latency = *prng.pick(&[
            Latency::uniform(Duration::from_micros(30), Duration::from_micros(150)),
            Latency::uniform(Duration::from_micros(50), Duration::from_millis(2))
                .with_tail(2_000, Duration::from_millis(40)),
        ]);
        let link = Link { bytes_per_second: Some(1 << 30), ..Link::good(latency) };
        let buffer_bytes = *prng.pick(&[256usize << 10, 1 << 20, 16 << 20]);
        let connections = Connections::new(root.split("network", 0), link, buffer_bytes);
        let mix = Mix {
            write_ppm: prng.between(200_000, 700_000) as u32,
            zero_ppm: prng.between(10_000, 100_000) as u32,
            flush_ppm: 30_000,
            sector_ppm: prng.between(20_000, 250_000) as u32,
            large_ppm: prng.between(0, 60_000) as u32,
        };
        let pace = Pace {
            mix,
            depth: *prng.pick(&[2usize, 8, 32]),
            pause_max: *prng.pick(&[Duration::from_millis(10), Duration::from_millis(30)]),
        };
        let mut kinds: Vec<FaultKind> = FaultKind::ALL.to_vec();
        prng.shuffle(&mut kinds);
        kinds.truncate(prng.between(4, FaultKind::ALL.len() as u64) as usize);
        if !kinds.iter().any(|kind| kind.breaks()) {
            kinds.push(FaultKind::Kill);
        }
        if nodes > 3 {
            // Where there is somewhere to move to, it is to be shown: a move takes seconds, and most strikes are in vain.
            kinds.extend([FaultKind::MembershipChange; 2]);
        }
        // By a source of their own, so that the other seeds stay what they are.
        if !kinds.contains(&FaultKind::RottenData) && root.split("snapshots", 0).chance(MILLION / 2) {
            kinds.extend([FaultKind::Snapshot; 3]);
        }
        let pause_max = *prng.pick(&[Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(2)]);
        let lasts_max = *prng.pick(&[Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)]);
        let plan = Plan {
            kinds,
            pause_min: Duration::from_millis(10),
            pause_max,
            lasts_min: Duration::from_millis(5),
            lasts_max,
            link,
            drift_ppm: drift_ppm as i32,
            size_bytes_max: 8 << 20,
            fragile: prng.below(u64::from(nodes)) as usize,
            doomed: None,
            struck: BTreeMap::new(),
        };
        let sizes = (0..prng.between(1, 2))
            .map(|_| {
                let replicas = if nodes == 5 { *prng.pick(&[3u8, 5]) } else { 3 };
                let size = prng.between((1 << 20) / 4096, (4 << 20) / 4096) * 4096;
                (size, replicas, 512)
            })
            .collect();
        let salt = prng.next_u64();
        let world = World::new(root.split("world", 0), connections, machines, pace, plan, options.verbose);
        let started = world.now;
        Ok(Scenario { world, cluster, sizes, salt, lagging: BTreeSet::new(), started })
    }

    fn set_up(&mut self) -> Result<(), Failure> {
        let mut prng = self.world.prng.split("identifiers", 0);
        for number in 0..self.world.machines.len() {
            self.world.restart(number)?;
        }
        let name = |text: String| Name::new(&text).expect("a DNS label");
        let founders: Vec<Founder> = self
            .world
            .machines
            .iter()
            .enumerate()
            .take(FOUNDERS)
            .map(|(number, machine)| Founder {
                node: machine.node,
                replica: identifier(&mut prng, ReplicaId::from_bytes),
                name: name(format!("node-{number}")),
                peer_address: format!("node-{number}:7000"),
                api_address: format!("node-{number}:7001"),
                zone: None,
            })
            .collect();
        for number in 0..FOUNDERS {
            let request = AdminRequest::Found { founders: founders.clone() };
            match self.world.ask(number, request, SETUP_MAX)? {
                Some(AdminReply::Founded) => {}
                other => return Err(Failure::Stuck(format!("founding is answered {other:?}"))),
            }
        }
        for number in 0..self.world.machines.len() {
            let machine = &self.world.machines[number];
            let register = RegisterNode {
                node: machine.node,
                name: name(format!("node-{number}")),
                peer_address: format!("node-{number}:7000"),
                api_address: format!("node-{number}:7001"),
                zone: None,
            };
            self.change(Command::RegisterNode(register))?;
            let register = self.world.registration(number);
            self.change(register)?;
        }
        for (number, (size_bytes, replicas, logical_block_bytes)) in self.sizes.clone().into_iter().enumerate() {
            let volume = identifier(&mut prng, VolumeId::from_bytes);
            let new = NewVolume {
                volume,
                replicas: (0..replicas).map(|_| identifier(&mut prng, ReplicaId::from_bytes)).collect(),
                name: name(format!("volume-{number}")),
                spec: VolumeSpec { size_bytes, logical_block_bytes, replicas, spread: Spread::Node },
                preferred: Vec::new(),
                labels: Labels::new(),
            };
            match self.ask_leader(|| AdminRequest::CreateVolume(new.clone()))? {
                AdminReply::Changed(Outcome::Applied) | AdminReply::Exists { same: true, .. } => {}
                other => return Err(Failure::Incorrect(format!("creating a volume is answered {other:?}"))),
            }
            let nodes = self.wait_ready(volume)?;
            self.world.targets.push(Target::new(volume, nodes, size_bytes, self.salt));
        }
        Ok(())
    }

    fn chaos(&mut self) -> Result<(), Failure> {
        for target in 0..self.world.targets.len() {
            self.world.attach_new(target);
        }
        self.world.start_work();
        self.world.after(Duration::from_millis(500), Timer::Fault);
        let start = self.world.now;
        let enough = |world: &World| {
            let operations: u64 = world.targets.iter().map(|target| target.completed).sum();
            let faults: u64 = world.plan.struck.iter().filter(|(kind, _)| kind.breaks()).map(|(_, count)| count).sum();
            world.now.since(start) >= CHAOS_MIN && operations >= OPERATIONS_MIN + 200 && faults > FAULTS_MIN
        };
        self.world.run_until(start + CHAOS_MAX, enough)?;
        self.note_lagging();
        if self.rebuilt() > 0 {
            self.world.marks.insert("a delta while writing");
        }
        Ok(())
    }

    /// Nothing breaks any more: everything outstanding must come to its end.
    fn heal(&mut self) -> Result<(), Failure> {
        self.world.log(|| "healing".to_owned());
        self.world.heal();
        self.world.cancel(|timer| matches!(timer, Timer::TimeOut(..)));
        self.world.working = false;
        let quiet = |world: &World| world.agents.values().all(|agent| !agent.alive || agent.outstanding() == 0);
        if !self.world.run_until(self.world.now + HEAL_MAX, quiet)? {
            return Err(self.stuck("requests are not answered after the healing"));
        }
        // Some may be fenced and not know it yet, or still wish to take over: all of them go, and new ones come.
        let agents: Vec<u32> = self.world.agents.keys().copied().collect();
        for number in agents {
            self.world.kill_agent(number, false);
        }
        self.world.run_for(Duration::from_secs(1))?;
        for target in 0..self.world.targets.len() {
            self.world.attach_new(target);
        }
        let before: u64 = self.world.targets.iter().map(|target| target.completed).sum();
        self.world.start_work();
        let goes_on = |world: &World| world.targets.iter().map(|target| target.completed).sum::<u64>() >= before + 200;
        if !self.world.run_until(self.world.now + HEAL_MAX, goes_on)? {
            return Err(self.stuck("the work does not go on after the healing"));
        }
        self.world.working = false;
        if !self.world.run_until(self.world.now + HEAL_MAX, quiet)? {
            return Err(self.stuck("the last requests are not answered"));
        }
        Ok(())
    }

    /// Reads everything, from this leader and from the next.
    fn verify(&mut self) -> Result<(), Failure> {
        self.note_lagging();
        for round in 0..2 {
            // Also those whose wish to take over has not been heard yet, and what they had on its way.
            let agents: Vec<u32> = self.world.agents.keys().copied().collect();
            for number in agents {
                self.world.kill_agent(number, round == 0);
            }
            self.world.run_for(Duration::from_secs(1))?;
            for target in 0..self.world.targets.len() {
                let agent = self.world.attach_new(target);
                let attached = |world: &World| world.agents[&agent].session.is_some();
                if !self.world.run_until(self.world.now + HEAL_MAX, attached)? {
                    return Err(self.stuck("nobody can attach to read"));
                }
                for (offset, length) in self.world.targets[target].ranges() {
                    let room = |world: &World| world.agents[&agent].outstanding() < VERIFY_DEPTH;
                    if !self.world.run_until(self.world.now + HEAL_MAX, room)? {
                        return Err(self.stuck("a read is not answered"));
                    }
                    self.world.with_agent(agent, |agent, target, now, _| agent.read(now, target, offset, length))?;
                }
                let done = |world: &World| world.agents[&agent].outstanding() == 0;
                if !self.world.run_until(self.world.now + HEAL_MAX, done)? {
                    return Err(self.stuck("the last reads are not answered"));
                }
                if !self.world.agents[&agent].alive {
                    return Err(Failure::Incorrect("the only agent was fenced while it read".to_owned()));
                }
            }
            if round == 0 {
                self.change_leaders()?;
            }
        }
        Ok(())
    }

    /// Kills the leader of the first volume, unless a machine is gone for good.
    fn change_leaders(&mut self) -> Result<(), Failure> {
        let group = GroupId::first(self.world.targets[0].volume);
        let leader =
            self.world.machines.iter().position(|machine| {
                machine.is_serving() && machine.shard.as_ref().is_some_and(|shard| shard.leads(group))
            });
        let down = self.world.machines.iter().any(|machine| machine.failed.is_some());
        if let Some(number) = leader.filter(|_| !down) {
            self.world.crash(number, Power::Off, CrashMode::LoseAll);
            self.world.after(Duration::from_secs(3), Timer::Restart(number));
            self.world.run_for(Duration::from_millis(10))?;
        }
        Ok(())
    }

    /// All replicas come to the same state at the same index.
    fn compare(&mut self) -> Result<(), Failure> {
        self.world.run_for(Duration::from_secs(5))?;
        self.note_lagging();
        for group in self.groups() {
            let equal = |world: &World| {
                let states = states_of(world, group);
                states.windows(2).all(|pair| pair[0] == pair[1])
            };
            if !self.world.run_until(self.world.now + HEAL_MAX, equal)? {
                let states = states_of(&self.world, group);
                let indexes: Vec<(u64, u32)> =
                    states.iter().map(|(index, state)| (*index, crc32c::crc32c(state))).collect();
                let text = format!("replicas of {group} do not come to one state: {indexes:?}");
                let same_index = indexes.windows(2).all(|pair| pair[0].0 == pair[1].0);
                return Err(if same_index { Failure::Incorrect(text) } else { self.stuck(&text) });
            }
        }
        self.compare_snapshots()
    }

    /// Every replica has every snapshot of its volume's state, and no other content than any had before.
    fn compare_snapshots(&mut self) -> Result<(), Failure> {
        if !self.world.plan.kinds.contains(&FaultKind::Snapshot) {
            return Ok(());
        }
        let whole = |world: &World| {
            let serving = world.machines.iter().filter(|machine| machine.is_serving());
            let reports = serving.filter_map(|machine| machine.shard.as_ref()).flat_map(|shard| shard.report().volumes);
            let mut snapshots = reports.flat_map(|volume| volume.snapshots);
            snapshots.all(|snapshot| snapshot.held.is_some_and(|held| held.hash.is_some()))
        };
        let all_whole = self.world.run_until(self.world.now + HEAL_MAX, whole)?;
        self.world.note_snapshots();
        if let Some(contradiction) = self.world.contradiction.take() {
            return Err(Failure::Incorrect(contradiction));
        }
        if !all_whole {
            let reports = self.reports().into_iter().flatten().flat_map(|report| report.volumes);
            let lists: Vec<_> = reports.map(|volume| (volume.replica.replica, volume.snapshots)).collect();
            return Err(Failure::Incorrect(format!("replicas lack snapshots: {lists:?}")));
        }
        if !self.world.snapshots.is_empty() {
            self.world.marks.insert("snapshots on every replica");
        }
        Ok(())
    }

    /// A scrub of every disk finds nothing any more.
    fn repaired(&mut self) -> Result<(), Failure> {
        let mut found = Vec::new();
        for _ in 0..PASSES_MAX {
            let before = self.reports();
            let passes = |world: &World| {
                let reports = world.machines.iter().map(|m| m.shard.as_ref().filter(|_| m.is_serving()));
                reports.zip(&before).all(|(shard, before)| match (shard, before) {
                    // One pass from its beginning.
                    (Some(shard), Some(before)) => shard.report().scrub.passes >= before.scrub.passes + 2,
                    _ => true,
                })
            };
            if !self.world.run_until(self.world.now + HEAL_MAX, passes)? {
                return Err(self.stuck("a scrub does not end"));
            }
            let broken = |report: &ShardReport| {
                let counters = report.counters;
                [counters.corrupt_blocks, counters.corrupt_pages, counters.corrupt_headers, counters.read_errors]
            };
            found = before
                .iter()
                .zip(self.reports())
                .filter_map(|(before, after)| {
                    let (before, after) = (before.as_ref()?, after?);
                    let repairs = || after.volumes.iter().map(|volume| &volume.repair);
                    let open = repairs().any(|repair| repair.pending_slots > 0 || !repair.lost_slots.is_empty());
                    (open || broken(before) != broken(&after)).then(|| format!("{:?}", after.volumes))
                })
                .collect();
            if let Some(volume) =
                self.reports().iter().flatten().flat_map(|report| &report.volumes).find(|v| v.repair.mismatches > 0)
            {
                return Err(Failure::Incorrect(format!("replicas contradict each other: {volume:?}")));
            }
            if found.is_empty() {
                return Ok(());
            }
        }
        Err(self.stuck(&format!("what has rotted is not repaired: {found:?}")))
    }

    fn reports(&self) -> Vec<Option<ShardReport>> {
        let serving = |machine: &Machine| machine.shard.as_ref().filter(|_| machine.is_serving()).map(Shard::report);
        self.world.machines.iter().map(serving).collect()
    }

    /// Rebuilds that replicas went through, in the lives their machines have now.
    fn rebuilt(&self) -> u64 {
        let shards = self.world.machines.iter().filter_map(|machine| machine.shard.as_ref());
        shards.map(|shard| shard.rebuild_counters().installed).sum()
    }

    fn report(mut self) -> Report {
        self.note_marks();
        let world = self.world;
        Report {
            operations: world.targets.iter().map(|target| target.completed).sum(),
            bytes_verified: world.targets.iter().map(Target::bytes_verified).sum(),
            faults: world.plan.struck.clone(),
            lagging: self.lagging.len() as u64,
            events: world.events,
            log_hash: world.log_hash(),
            lasted: world.now.since(self.started),
            marks: world.marks,
        }
    }

    fn note_marks(&mut self) {
        for machine in &self.world.machines {
            let Some(shard) = &machine.shard else { continue };
            let report = shard.report();
            for volume in &report.volumes {
                if volume.repair.repaired_blocks > 0 {
                    self.world.marks.insert("blocks repaired from a peer");
                }
                if volume.replica.checkpointed.0 > 0 {
                    self.world.marks.insert("a checkpoint");
                }
                if volume.replica.term.0 > 1 {
                    self.world.marks.insert("a second leader");
                }
            }
            if machine.found_damage {
                self.world.marks.insert("damage at a start");
            }
            if machine.boots > 1 {
                self.world.marks.insert("a restart");
            }
        }
        if !self.lagging.is_empty() {
            self.world.marks.insert("a replica behind the log");
        }
        if self.rebuilt() > 0 {
            self.world.marks.insert("a rebuild by delta");
        }
        let shards = self.world.machines.iter().filter_map(|machine| machine.shard.as_ref());
        if shards.map(|shard| shard.rebuild_counters().snapshots).sum::<u64>() > 0 {
            self.world.marks.insert("a snapshot brought by a rebuild");
        }
        if self.world.connections.statistics().dropped > 0 {
            self.world.marks.insert("a message dropped at a full buffer");
        }
    }

    /// Replicas that needed more than the log has.
    fn note_lagging(&mut self) {
        for group in self.groups() {
            let shards = self.world.machines.iter().filter_map(|machine| machine.shard.as_ref());
            for shard in shards {
                self.lagging.extend(shard.lagging(group).into_iter().map(|replica| (group, replica)));
            }
        }
    }

    fn groups(&self) -> Vec<GroupId> {
        let volumes = self.world.targets.iter().map(|target| GroupId::first(target.volume));
        volumes.chain([GroupId::metadata(self.cluster)]).collect()
    }

    fn change(&mut self, command: Command) -> Result<(), Failure> {
        match self.ask_leader(|| AdminRequest::Change(command.clone()))? {
            AdminReply::Changed(Outcome::Applied | Outcome::Unchanged) => Ok(()),
            other => Err(Failure::Incorrect(format!("{command:?} is answered {other:?}"))),
        }
    }

    fn wait_ready(&mut self, volume: VolumeId) -> Result<Vec<NodeId>, Failure> {
        let until = self.world.now + SETUP_MAX;
        while self.world.now < until {
            if let AdminReply::Catalogue(catalogue) = self.ask_leader(|| AdminRequest::Catalogue)? {
                let found: &Catalogue = &catalogue;
                if let Some(entry) = found.volumes().get(&volume).filter(|entry| entry.state == VolumeState::Ready) {
                    return Ok(entry.members.iter().map(|member| member.member.node).collect());
                }
            }
            self.world.run_for(Duration::from_millis(100))?;
        }
        Err(self.stuck("a volume does not become ready"))
    }

    fn ask_leader(&mut self, request: impl Fn() -> AdminRequest) -> Result<AdminReply, Failure> {
        let until = self.world.now + SETUP_MAX;
        let mut number = 0;
        while self.world.now < until {
            match self.world.ask(number, request(), Duration::from_secs(2))? {
                Some(AdminReply::Failed(AdminError::NotLeader { leader })) => {
                    let hinted = leader.and_then(|node| self.world.machines.iter().position(|m| m.node == node));
                    number = hinted.unwrap_or((number + 1) % self.world.machines.len());
                    self.world.run_for(Duration::from_millis(50))?;
                }
                Some(reply) => return Ok(reply),
                None => number = (number + 1) % self.world.machines.len(),
            }
        }
        Err(self.stuck("the metadata plane has no leader"))
    }

    /// Where members live, and in which role.
    fn machines_of(&self, members: &[Member]) -> Vec<(End, Role)> {
        members.iter().map(|member| (self.world.end_of(member.node), member.role)).collect()
    }

    fn stuck(&self, what: &str) -> Failure {
        let mut text = what.to_owned();
        for machine in &self.world.machines {
            let report = machine.shard.as_ref().map(|shard| shard.report());
            text.push_str(&format!("\n  {:?} {:?} failed {:?} ", machine.end, machine.power, machine.failed));
            for volume in report.iter().flat_map(|report| &report.volumes) {
                let r = &volume.replica;
                text.push_str(&format!(
                    "\n    {} {:?} term {} last {} flushed {} committed {} applied {} checkpointed {} serving {} epoch {} lagging {} rebuilding {} {:?} stopped {:?} peers {:?} may vote {} members {:?} from {:?}",
                    volume.volume,
                    r.standing,
                    r.term.0,
                    r.last.0,
                    r.flushed.0,
                    r.committed.0,
                    r.applied.0,
                    r.checkpointed.0,
                    r.serving,
                    volume.epoch.0,
                    volume.lagging.len(),
                    r.rebuilding,
                    volume.rebuilds,
                    r.stopped,
                    r.peers.iter().map(|(_, flushed, reachable)| (flushed.0, *reachable)).collect::<Vec<_>>(),
                    r.may_vote,
                    self.machines_of(&r.members),
                    self.machines_of(&r.outgoing),
                ));
            }
            if let Some(report) = &report {
                text.push_str(&format!("\n    metadata {:?}", report.metadata));
                text.push_str(&format!(
                    "\n    usage {:?} damaged {:?} peers {:?}",
                    report.usage,
                    report.damaged,
                    report.peers.iter().map(|(_, c, s)| (*c, *s)).collect::<Vec<_>>()
                ));
            }
        }
        for (number, agent) in self.world.agents.iter().filter(|(_, agent)| agent.alive) {
            let end = End::Client(*number);
            let open: Vec<bool> =
                self.world.machines.iter().map(|m| self.world.connections.is_open(end, m.end)).collect();
            let known: Vec<bool> =
                self.world.machines.iter().map(|m| self.world.connections.is_open(m.end, end)).collect();
            text.push_str(&format!(
                "\n  agent {number} outstanding {} open {open:?} {known:?} deadline {:?} now {:?} {:?}",
                agent.outstanding(),
                agent.client.deadline(),
                self.world.now,
                agent.client.status()
            ));
        }
        Failure::Stuck(text)
    }
}

/// Index and state of every replica that runs.
fn states_of(world: &World, group: GroupId) -> Vec<(u64, Bytes)> {
    let shards = world.machines.iter().filter(|machine| machine.is_serving()).filter_map(|m| m.shard.as_ref());
    shards.filter_map(|shard| shard.machine_state(group)).map(|(_, index, state)| (index.0, state)).collect()
}

#[cfg(test)]
mod tests {
    use holdfast_shard::Event;

    use super::*;

    /// A planned move of a leader: nobody waits for a lease to run out.
    #[test]
    fn a_leader_that_is_told_to_stop_hands_over_within_100_ms() {
        for seed in [1, 2, 3, 5, 8] {
            let mut scenario = Scenario::new(seed, Options::default()).unwrap();
            scenario.set_up().unwrap();
            scenario.world.attach_new(0);
            scenario.world.start_work();
            scenario.world.run_for(Duration::from_secs(1)).unwrap();
            let group = GroupId::first(scenario.world.targets[0].volume);
            let leads = |machine: &Machine| machine.shard.as_ref().is_some_and(|shard| shard.leads(group));
            let leader = scenario.world.machines.iter().position(leads).expect("a leader");
            let world = &mut scenario.world;
            let start = world.now;
            world.machines[leader].push(start, Event::Stop);
            let over = |world: &World| {
                let shard = world.machines[leader].shard.as_ref().expect("it runs");
                shard.is_handed_over() && world.machines.iter().any(leads)
            };
            assert!(world.run_until(start + Duration::from_millis(100), over).unwrap(), "seed {seed}");
            assert!(!leads(&world.machines[leader]));
            world.crash(leader, Power::Off, CrashMode::LoseAll);
            let completed = world.targets[0].completed;
            world.run_for(Duration::from_millis(200)).unwrap();
            assert!(world.targets[0].completed > completed, "seed {seed}: it goes on without the stopped one");
            world.restart(leader).unwrap();
            scenario.heal().and_then(|()| scenario.verify()).and_then(|()| scenario.compare()).unwrap();
        }
    }
}
