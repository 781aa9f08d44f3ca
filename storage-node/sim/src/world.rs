//! [`World`]: machines, agents and what connects them, driven by one loop in simulated time.
//!
//! What it is: the one place where effects are carried out and time passes. What happens next is the earliest of the
//! timers, deliveries, completions and deadlines; where several are due at one moment their order is fixed. What it is
//! not: the one who decides what runs and what breaks; see [`crate::scenario`] and [`crate::faults`].
//!
//! Invariants: the same seed gives the same events in the same order, told by [`World::log_hash`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_block::Error;
use holdfast_client::{ClientEffect, Mode};
use holdfast_consensus::{LogIndex, Timestamp};
use holdfast_id::{NodeId, VolumeId};
use holdfast_metadata::catalogue::DiskState;
use holdfast_metadata::command::{Command, RegisterDisk, SetDiskState};
use holdfast_protocol::session::Reply;
use holdfast_shard::{AdminReply, AdminRequest, Effects, ReplicaNodes};

use crate::connections::{Arrival, Connections, End};
use crate::disk::CrashMode;
use crate::faults::Plan;
use crate::machine::{Machine, Power};
use crate::prng::Prng;
use crate::workload::{Agent, Mix, Target};

/// Between two looks of a process at the connections it lacks.
const DIAL_EVERY: Duration = Duration::from_millis(20);
/// An attempt to connect that was not answered is given up after so many looks.
const DIAL_PATIENCE: u32 = 10;

/// Between two attempts of a node to register its new disk.
const REGISTER_EVERY: Duration = Duration::from_millis(500);
/// What every disk has for volumes.
const CAPACITY_BYTES: u64 = 40 << 20;

/// Why a seed fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Something came out wrong: an answer, a state, a refusal that nothing justifies.
    #[error("incorrect: {0}")]
    Incorrect(String),
    /// Something did not come to an end in the time it may take.
    #[error("stuck: {0}")]
    Stuck(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// A process looks for connections it lacks.
    Dial(End),
    /// The workload of a target does something.
    Work(usize),
    /// The next fault strikes.
    Fault,
    Restart(usize),
    Resume(usize),
    DiskWell(usize),
    Unblock(End, End),
    LinkWell(End, End),
    TimeOut(End, End),
    /// A node tells the metadata plane of its new disk, so many times more.
    Register(usize, u32),
    /// The disk that failed is replaced.
    Replace,
    /// A node's disk takes copies again.
    Keep(usize),
}

/// How the workload behaves.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub mix: Mix,
    pub depth: usize,
    pub pause_max: Duration,
}

pub struct World {
    pub now: Timestamp,
    pub prng: Prng,
    pub connections: Connections,
    pub machines: Vec<Machine>,
    pub targets: Vec<Target>,
    pub agents: BTreeMap<u32, Agent>,
    pub pace: Pace,
    pub plan: Plan,
    /// The workload submits nothing while false.
    pub working: bool,
    pub marks: BTreeSet<&'static str>,
    /// What each snapshot's map was found to be, by the index of its entry.
    pub snapshots: BTreeMap<(VolumeId, LogIndex), u128>,
    /// Two replicas, or one at two times, had another one.
    pub contradiction: Option<String>,
    /// The next leader of a group whose members are changing is killed.
    pub ambush: bool,
    pub verbose: bool,
    timers: BTreeMap<(Timestamp, u64), Timer>,
    next_timer: u64,
    dialled: BTreeMap<(End, End), u32>,
    next_agent: u32,
    next_token: u64,
    answers: BTreeMap<u64, AdminReply>,
    /// Answers nobody waits for are not kept.
    awaited: BTreeSet<u64>,
    hash: u64,
    pub events: u64,
}

impl World {
    pub fn new(
        prng: Prng,
        connections: Connections,
        machines: Vec<Machine>,
        pace: Pace,
        plan: Plan,
        verbose: bool,
    ) -> World {
        World {
            now: Timestamp(1_000_000_000),
            prng,
            connections,
            machines,
            targets: Vec::new(),
            agents: BTreeMap::new(),
            pace,
            plan,
            working: false,
            marks: BTreeSet::new(),
            snapshots: BTreeMap::new(),
            contradiction: None,
            ambush: false,
            verbose,
            timers: BTreeMap::new(),
            next_timer: 0,
            dialled: BTreeMap::new(),
            next_agent: 0,
            next_token: 0,
            answers: BTreeMap::new(),
            awaited: BTreeSet::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            events: 0,
        }
    }

    /// Of everything that happened so far, in order.
    pub fn log_hash(&self) -> u64 {
        self.hash
    }

    pub fn log(&mut self, text: impl FnOnce() -> String) {
        if self.verbose {
            println!("{} {}", self.now, text());
        }
    }

    pub fn at(&mut self, when: Timestamp, timer: Timer) {
        self.timers.insert((when, self.next_timer), timer);
        self.next_timer += 1;
    }

    pub fn after(&mut self, wait: Duration, timer: Timer) {
        self.at(self.now + wait, timer);
    }

    /// Forgets timers, so that what they would do does not happen.
    pub fn cancel(&mut self, which: impl Fn(&Timer) -> bool) {
        self.timers.retain(|_, timer| !which(timer));
    }

    /// Lets time pass until the condition holds or the time has come; whether it held.
    ///
    /// # Errors
    /// What went wrong meanwhile.
    pub fn run_until(&mut self, limit: Timestamp, mut done: impl FnMut(&World) -> bool) -> Result<bool, Failure> {
        loop {
            if done(self) {
                return Ok(true);
            }
            let Some((at, source)) = self.next().filter(|(at, _)| *at <= limit) else {
                self.now = self.now.max(limit);
                return Ok(false);
            };
            self.now = self.now.max(at);
            self.events += 1;
            self.note(source.code());
            self.handle(source)?;
        }
    }

    /// # Errors
    /// What went wrong meanwhile.
    pub fn run_for(&mut self, time: Duration) -> Result<(), Failure> {
        self.run_until(self.now + time, |_| false).map(|_| ())
    }

    fn next(&self) -> Option<(Timestamp, Source)> {
        let mut next: Option<(Timestamp, Source)> = None;
        let mut offer = |at: Option<Timestamp>, source: Source| {
            if let Some(at) = at
                && next.is_none_or(|(earliest, _)| at < earliest)
            {
                next = Some((at, source));
            }
        };
        offer(self.timers.first_key_value().map(|((at, _), _)| *at), Source::Timer);
        offer(self.connections.next_delivery(), Source::Delivery);
        for (number, machine) in self.machines.iter().enumerate() {
            offer(machine.disk.next_completion(), Source::Disk(number));
            offer(machine.wake_at(), Source::Step(number));
        }
        for (number, agent) in self.agents.iter().filter(|(_, agent)| agent.alive) {
            offer(agent.client.deadline(), Source::Agent(*number));
        }
        next
    }

    /// FNV-1a over words; the hash of a run is compared with that of the same seed only.
    fn note(&mut self, code: u64) {
        for word in [self.now.0, code] {
            self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
        }
    }

    fn handle(&mut self, source: Source) -> Result<(), Failure> {
        match source {
            Source::Timer => {
                let (_, timer) = self.timers.pop_first().expect("the earliest of the timers");
                self.on_timer(timer)
            }
            Source::Delivery => match self.connections.deliver(self.now) {
                Some((to, from, _, arrival)) => self.on_arrival(to, from, arrival),
                None => Ok(()),
            },
            Source::Disk(number) => {
                let machine = &mut self.machines[number];
                while let Some((id, result)) = machine.disk.complete(self.now) {
                    machine.on_completion(self.now, id, result);
                }
                Ok(())
            }
            Source::Step(number) => {
                let effects = self.machines[number].step(self.now).map_err(Failure::Stuck)?;
                self.carry_out(number, effects)?;
                self.maybe_ambush(number);
                Ok(())
            }
            Source::Agent(number) => {
                let agent = self.agents.get_mut(&number).expect("listed by its number");
                agent.client.on_deadline(self.now);
                self.pump(number)
            }
        }
    }

    fn on_arrival(&mut self, to: End, from: End, arrival: Arrival) -> Result<(), Failure> {
        match to {
            End::Node(number) => {
                let node = self.node_at(from);
                // A newer connection of the pair has taken the place of the one that closed.
                if matches!(arrival, Arrival::Closed) && node.is_some() && self.connections.is_open(to, from) {
                    return Ok(());
                }
                let machine = &mut self.machines[usize::from(number)];
                machine.on_arrival(self.now, from, node, arrival).map_err(Failure::Incorrect)
            }
            End::Client(number) => {
                let (now, from_node) = (self.now, self.node_at(from));
                let Some(agent) = self.agents.get_mut(&number).filter(|agent| agent.alive) else { return Ok(()) };
                let node = from_node.expect("agents speak to nodes");
                match arrival {
                    Arrival::Connected => agent.client.on_connected(now, node),
                    Arrival::Closed => agent.client.on_closed(now, node),
                    Arrival::Message(message) => {
                        let reply = Reply::decode(message.kind, message.meta, message.payload)
                            .map_err(|error| Failure::Incorrect(format!("a reply of {from:?}: {error}")))?;
                        agent.client.on_reply(now, node, reply);
                    }
                }
                self.pump(number)
            }
        }
    }

    fn carry_out(&mut self, number: usize, effects: Effects) -> Result<(), Failure> {
        let (now, end) = (self.now, self.machines[number].end);
        if let Some(reason) = effects.failed {
            self.log(|| format!("{end:?} gives its disk up: {reason}"));
            if !self.machines[number].may_fail {
                return Err(Failure::Incorrect(format!("{end:?} gives a sound disk up: {reason}")));
            }
        }
        for op in effects.device {
            self.note(op.id().0);
            self.machines[number].submit(now, op);
        }
        for (node, message) in effects.peers {
            let to = self.end_of(node);
            // A full or closed connection loses the message; whoever needs an answer sends again.
            let _ = self.connections.send(now, end, to, message.encode());
        }
        for (client, reply) in effects.clients {
            let Some(to) = self.machines[number].client_end(client) else { continue };
            if self.connections.send(now, end, to, reply.encode()).is_err() {
                self.connections.close(now, end, to);
                self.machines[number].drop_client(now, to);
            }
        }
        for (client, ReplicaNodes { volume, term, nodes }) in effects.replicas {
            let Some(to) = self.machines[number].client_end(client) else { continue };
            let replicas = nodes.into_iter().map(|node| (node, format!("{node}:7000"))).collect();
            let _ = self.connections.send(now, end, to, Reply::Replicas { volume, term, replicas }.encode());
        }
        for (token, reply) in effects.admin {
            if self.awaited.remove(&token) {
                self.answers.insert(token, reply);
            }
        }
        Ok(())
    }

    /// Carries out what an agent's client asks for.
    fn pump(&mut self, number: u32) -> Result<(), Failure> {
        loop {
            let agent = self.agents.get_mut(&number).expect("called for a known agent");
            let effects = agent.client.take_effects();
            if effects.is_empty() {
                return Ok(());
            }
            for effect in effects {
                self.on_client_effect(number, effect)?;
            }
        }
    }

    fn on_client_effect(&mut self, number: u32, effect: ClientEffect) -> Result<(), Failure> {
        let (now, end) = (self.now, End::Client(number));
        match effect {
            ClientEffect::Send { to, request } => {
                let to_end = self.end_of(to);
                if self.connections.send(now, end, to_end, request.encode()) == Err(crate::connections::SendError::Full)
                {
                    self.connections.close(now, end, to_end);
                    self.agents.get_mut(&number).expect("it asked").client.on_closed(now, to);
                }
            }
            ClientEffect::Complete(completion) => {
                let agent = self.agents.get_mut(&number).expect("it asked");
                let target = &mut self.targets[agent.target];
                let id = completion.id;
                match agent.on_complete(target, completion).map_err(Failure::Incorrect)? {
                    None => {}
                    Some(Error::Fenced) => {
                        self.marks.insert("a fenced request");
                    }
                    Some(Error::Unavailable) => {}
                    Some(error) => {
                        return Err(Failure::Incorrect(format!("{end:?} is answered {error:?} to {id:?}")));
                    }
                }
            }
            ClientEffect::Attached { epoch, session, geometry, .. } => {
                self.log(|| format!("{end:?} attached: epoch {} session {}", epoch.0, session.0));
                self.note(session.0);
                let agent = self.agents.get_mut(&number).expect("it asked");
                (agent.session, agent.epoch) = (Some(session), Some(epoch));
                let target = &mut self.targets[agent.target];
                target.on_attached(session);
                target.size_bytes = target.size_bytes.max(geometry.size_bytes);
            }
            ClientEffect::Resized(geometry) => {
                let agent = self.agents.get_mut(&number).expect("it asked");
                let target = &mut self.targets[agent.target];
                target.size_bytes = target.size_bytes.max(geometry.size_bytes);
                self.marks.insert("a resize under load");
            }
            ClientEffect::Fenced => {
                self.log(|| format!("{end:?} fenced"));
                self.end_agent(number);
            }
            ClientEffect::Refused(reason) => {
                self.log(|| format!("{end:?} refused: {reason}"));
                self.end_agent(number);
            }
            ClientEffect::Detached => {
                self.log(|| format!("{end:?} detached"));
                self.marks.insert("a detach");
                self.end_agent(number);
            }
            ClientEffect::FormattedSet(_) => {}
            ClientEffect::MoreReplicas(replicas) => {
                let target = self.agents[&number].target;
                self.targets[target].replicas.extend(replicas.into_iter().map(|(node, _)| node));
            }
            ClientEffect::Replicas(replicas) => {
                let target = self.agents[&number].target;
                self.targets[target].replicas = replicas.into_iter().map(|(node, _)| node).collect();
                self.marks.insert("members of a volume moved under load");
            }
        }
        Ok(())
    }

    /// The agent has ended by itself: its process exits.
    fn end_agent(&mut self, number: u32) {
        self.kill_agent(number, false);
    }

    pub fn kill_agent(&mut self, number: u32, power: bool) {
        let end = End::Client(number);
        if let Some(agent) = self.agents.get_mut(&number) {
            agent.alive = false;
            let target = &mut self.targets[agent.target];
            if target.agent == Some(number) {
                target.agent = None;
            }
        }
        if power {
            self.connections.vanish(end);
        } else {
            self.connections.kill(self.now, end);
        }
    }

    /// A new process attaches to the target; the one before is not told.
    pub fn attach(&mut self, target: usize, holder: String, mode: Mode) -> u32 {
        self.next_agent += 1;
        let number = self.next_agent;
        let agent = Agent::new(self.now, target, &self.targets[target], holder, mode, &mut self.prng);
        self.agents.insert(number, agent);
        self.targets[target].agent = Some(number);
        self.connections.start(self.now, End::Client(number));
        self.after(Duration::ZERO, Timer::Dial(End::Client(number)));
        number
    }

    /// Lets an agent submit and do what follows from it.
    ///
    /// # Errors
    /// What went wrong meanwhile.
    pub fn with_agent(
        &mut self,
        number: u32,
        call: impl FnOnce(&mut Agent, &mut Target, Timestamp, &mut Prng),
    ) -> Result<(), Failure> {
        let agent = self.agents.get_mut(&number).expect("called for a known agent");
        let target = &mut self.targets[agent.target];
        call(agent, target, self.now, &mut self.prng);
        self.pump(number)
    }

    fn on_timer(&mut self, timer: Timer) -> Result<(), Failure> {
        match timer {
            Timer::Dial(end) => self.dial(end),
            Timer::Work(target) => return self.work(target),
            Timer::Fault => self.strike(),
            Timer::Restart(number) => return self.restart(number),
            Timer::Resume(number) => self.resume(number),
            Timer::DiskWell(number) => {
                let machine = &mut self.machines[number];
                machine.disk.set_slowness(1);
                machine.disk.resume(self.now);
            }
            Timer::Register(number, times) => {
                let command = self.registration(number);
                self.tell_all(&command);
                if times > 0 {
                    self.after(REGISTER_EVERY, Timer::Register(number, times - 1));
                }
            }
            Timer::Replace => self.replace_disk(),
            Timer::Keep(number) => {
                let disk = self.machines[number].disk_id;
                self.tell_all(&Command::SetDiskState(SetDiskState { disk, state: DiskState::Active }));
            }
            Timer::Unblock(from, to) => self.connections.unblock(self.now, from, to),
            Timer::LinkWell(from, to) => self.restore_link(from, to),
            Timer::TimeOut(one, other) => {
                self.log(|| format!("{one:?} and {other:?} give their connection up"));
                self.connections.time_out(one, other);
            }
        }
        Ok(())
    }

    /// Of a pair of nodes the lower one connects; agents connect to every replica of their volume.
    fn dial(&mut self, end: End) {
        let wanted: Vec<End> = match end {
            End::Node(number) => {
                let machine = &self.machines[usize::from(number)];
                if machine.shard.is_none() {
                    return;
                }
                if machine.stopped {
                    Vec::new()
                } else {
                    (number + 1..self.machines.len() as u8).map(End::Node).collect()
                }
            }
            End::Client(number) => {
                let Some(agent) = self.agents.get(&number).filter(|agent| agent.alive) else { return };
                self.targets[agent.target].replicas.iter().map(|node| self.end_of(*node)).collect()
            }
        };
        for to in wanted {
            if self.connections.is_open(end, to) {
                self.dialled.remove(&(end, to));
                continue;
            }
            let looks = self.dialled.entry((end, to)).or_insert(DIAL_PATIENCE);
            if *looks >= DIAL_PATIENCE || !self.connections.is_opening(end, to) {
                *looks = 0;
                self.connections.connect(self.now, end, to);
            } else {
                *looks += 1;
            }
        }
        let wait = self.prng.duration(DIAL_EVERY / 2, DIAL_EVERY);
        self.after(wait, Timer::Dial(end));
    }

    fn work(&mut self, target: usize) -> Result<(), Failure> {
        if !self.working {
            return Ok(());
        }
        if let Some(number) = self.targets[target].agent {
            let burst = self.prng.between(1, self.pace.depth as u64);
            for _ in 0..burst {
                let agent = &self.agents[&number];
                let ready = agent.alive && agent.session.is_some() && agent.client.can_submit();
                if !ready || agent.outstanding() >= self.pace.depth || self.targets[target].agent != Some(number) {
                    break;
                }
                let mix = self.pace.mix;
                self.with_agent(number, |agent, target, now, prng| agent.submit(now, target, &mix, prng))?;
            }
        }
        let pause = self.prng.duration(Duration::from_micros(100), self.pace.pause_max);
        self.after(pause, Timer::Work(target));
        Ok(())
    }

    pub fn start_work(&mut self) {
        self.working = true;
        self.cancel(|timer| matches!(timer, Timer::Work(_)));
        for target in 0..self.targets.len() {
            self.after(Duration::ZERO, Timer::Work(target));
        }
    }

    /// # Errors
    /// The disk does not open, and no fault says why.
    pub fn restart(&mut self, number: usize) -> Result<(), Failure> {
        let machine = &mut self.machines[number];
        if machine.shard.is_some() || machine.failed.is_some() {
            return Ok(());
        }
        let end = machine.end;
        if let Err(reason) = machine.boot(self.now) {
            if !machine.may_fail {
                return Err(Failure::Incorrect(format!("the sound disk of {end:?} does not open: {reason}")));
            }
            machine.failed = Some(reason);
            return Ok(());
        }
        self.log(|| format!("{end:?} starts"));
        self.connections.start(self.now, end);
        self.after(Duration::ZERO, Timer::Dial(end));
        Ok(())
    }

    pub fn crash(&mut self, number: usize, power: Power, mode: CrashMode) {
        let end = self.machines[number].end;
        self.log(|| format!("{end:?} crashes: {power:?} {mode:?}"));
        self.machines[number].crash(power, mode);
        if power == Power::Off {
            self.connections.vanish(end);
        } else {
            self.connections.kill(self.now, end);
        }
        self.cancel(|timer| *timer == Timer::Dial(end) || *timer == Timer::Resume(number));
    }

    pub fn resume(&mut self, number: usize) {
        let end = self.machines[number].end;
        if self.machines[number].stopped {
            self.log(|| format!("{end:?} goes on"));
            self.machines[number].stopped = false;
            self.connections.resume(end);
        }
    }

    pub fn end_of(&self, node: NodeId) -> End {
        let machine = self.machines.iter().find(|machine| machine.node == node);
        machine.expect("every node is a machine of this world").end
    }

    fn node_at(&self, end: End) -> Option<NodeId> {
        match end {
            End::Node(number) => Some(self.machines[usize::from(number)].node),
            End::Client(_) => None,
        }
    }

    /// Asks a node and waits for the answer; `None` where none came in time.
    ///
    /// # Errors
    /// What went wrong meanwhile.
    pub fn ask(&mut self, number: usize, request: AdminRequest, wait: Duration) -> Result<Option<AdminReply>, Failure> {
        let token = self.tell(number, request);
        self.awaited.insert(token);
        self.run_until(self.now + wait, |world| world.answers.contains_key(&token))?;
        self.awaited.remove(&token);
        Ok(self.answers.remove(&token))
    }

    /// Asks whoever leads the metadata plane, and waits for nothing.
    pub fn tell_all(&mut self, command: &Command) {
        for number in 0..self.machines.len() {
            self.tell(number, AdminRequest::Change(command.clone()));
        }
    }

    /// What a node says of its disk when it joins.
    pub fn registration(&self, number: usize) -> Command {
        let machine = &self.machines[number];
        let (disk, node) = (machine.disk_id, machine.node);
        Command::RegisterDisk(RegisterDisk { disk, node, capacity_bytes: CAPACITY_BYTES, only: true })
    }

    /// A change of members is over in some milliseconds: no fault at random times meets one.
    fn maybe_ambush(&mut self, number: usize) {
        let Some(shard) = &self.machines[number].shard else { return };
        if shard.elected_in_joint_change() > 0 {
            self.marks.insert("a leader change in a joint change");
        }
        if self.ambush && shard.leads_joint_change() {
            self.ambush = false;
            self.crash(number, Power::Killed, CrashMode::Any);
            let wait = self.prng.duration(self.plan.lasts_min, self.plan.lasts_max);
            self.after(wait, Timer::Restart(number));
        }
    }

    /// Asks a node and waits for nothing.
    pub fn tell(&mut self, number: usize, request: AdminRequest) -> u64 {
        self.next_token += 1;
        self.machines[number].ask(self.now, self.next_token, request);
        self.next_token
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Source {
    Timer,
    Delivery,
    Disk(usize),
    Step(usize),
    Agent(u32),
}

impl Source {
    fn code(self) -> u64 {
        match self {
            Source::Timer => 1,
            Source::Delivery => 2,
            Source::Disk(number) => 0x100 + number as u64,
            Source::Step(number) => 0x200 + number as u64,
            Source::Agent(number) => 0x1000 + u64::from(number),
        }
    }
}
