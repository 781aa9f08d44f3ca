//! What breaks, and what the attached machines do beside reading and writing.
//!
//! A seed chooses which kinds it uses and how often they strike; each strike undoes itself after a time of its own,
//! so that faults overlap. `World::heal` undoes them all at once.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_client::Mode;
use holdfast_id::{DiskId, GroupId, SnapshotId};
use holdfast_metadata::catalogue::DiskState;
use holdfast_metadata::command::{Command, ResizeVolume, SetDiskState};
use holdfast_shard::AdminRequest;

use crate::connections::End;
use crate::disk::{CrashMode, Fault};
use crate::latency::Latency;
use crate::machine::{Machine, Power};
use crate::network::Link;
use crate::prng::MILLION;
use crate::world::{Timer, World};

/// More of it and the fragile machine never gets whole again in between.
const ROTS_MAX: u64 = 2;
/// Nothing brings a copy back yet that needs more than the log has: another wipe could find the last one.
const WIPES_MAX: u64 = 1;
/// How often a node tells of its new disk: for as long as the metadata plane may be away.
const REGISTRATIONS: u32 = 40;
/// For a copy to be created, to learn and to vote.
const MOVE_MIN: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// A node's process is killed; what it had not flushed survives in any part.
    Kill,
    /// A machine loses power.
    PowerLoss,
    /// All machines lose power at once.
    PowerLossOfAll,
    /// A node's process gets SIGSTOP, and SIGCONT later.
    Stop,
    /// A node and all others do not reach each other.
    Isolation,
    /// A node hears others, or an agent, and is not heard, or the other way round.
    OneWay,
    SlowLink,
    SlowDisk,
    HungDisk,
    Drift,
    /// A machine loses power, and something of its log has rotted when it comes back. One machine per run: what no
    /// other copy has cannot be repaired.
    RottenLog,
    /// Blocks of the data rot or cannot be read any more, or writes of data are lost, spoiled or go astray. On the same
    /// machine, for the same reason.
    RottenData,
    /// An agent's process is killed; its next one resumes the epoch.
    AgentKill,
    /// A machine with an agent loses power; another one takes the volume over.
    AgentLoss,
    /// Another machine takes the volume over while the first still works.
    TakeOver,
    /// An agent gives the volume back; another one attaches.
    Detach,
    Resize,
    /// A snapshot of a volume is taken, or one is deleted. Not where data rots: what only a snapshot names is not
    /// repaired.
    Snapshot,
    /// A machine loses power and comes back with an empty disk: a new member, whose copies are made again. The same
    /// machine as whose log rots.
    DiskWiped,
    /// A write or a flush fails: nothing is served from that disk any more, and the machine comes back with an empty one.
    /// In place of a wiped disk, for the same reason.
    DiskFailed,
    /// What a node holds is moved elsewhere; sometimes a leader is killed in the middle of the change.
    MembershipChange,
}

impl FaultKind {
    /// Those that any seed may use.
    pub const ALL: [FaultKind; 20] = [
        FaultKind::Kill,
        FaultKind::PowerLoss,
        FaultKind::PowerLossOfAll,
        FaultKind::Stop,
        FaultKind::Isolation,
        FaultKind::OneWay,
        FaultKind::SlowLink,
        FaultKind::SlowDisk,
        FaultKind::HungDisk,
        FaultKind::Drift,
        FaultKind::RottenLog,
        FaultKind::RottenData,
        FaultKind::AgentKill,
        FaultKind::AgentLoss,
        FaultKind::TakeOver,
        FaultKind::Detach,
        FaultKind::Resize,
        FaultKind::DiskWiped,
        FaultKind::DiskFailed,
        FaultKind::MembershipChange,
    ];

    /// Something breaks, rather than being asked for.
    pub fn breaks(self) -> bool {
        !matches!(
            self,
            FaultKind::TakeOver
                | FaultKind::Detach
                | FaultKind::Resize
                | FaultKind::Snapshot
                | FaultKind::MembershipChange
        )
    }
}

/// What a seed lets break.
#[derive(Clone, Debug)]
pub struct Plan {
    pub kinds: Vec<FaultKind>,
    /// Between two strikes.
    pub pause_min: Duration,
    pub pause_max: Duration,
    /// How long a fault lasts.
    pub lasts_min: Duration,
    pub lasts_max: Duration,
    pub link: Link,
    /// No clock is further off than this.
    pub drift_ppm: i32,
    pub size_bytes_max: u64,
    /// The machine whose disk may rot.
    pub fragile: usize,
    /// A machine whose disk has failed, or is about to, until it is replaced.
    pub doomed: Option<usize>,
    pub struck: BTreeMap<FaultKind, u64>,
}

/// Snapshots of one volume that the workload keeps.
const SNAPSHOTS_KEPT: usize = 6;

impl World {
    /// The next fault, and the time of the one after it.
    pub(crate) fn strike(&mut self) {
        let kind = *self.prng.pick(&self.plan.kinds);
        if self.apply_fault(kind) {
            *self.plan.struck.entry(kind).or_default() += 1;
        }
        let pause = self.prng.duration(self.plan.pause_min, self.plan.pause_max);
        self.after(pause, Timer::Fault);
    }

    /// Asks whoever leads the volume for one more snapshot, or one less, and waits for nothing.
    fn change_snapshots(&mut self, target: usize) -> bool {
        self.note_snapshots();
        let volume = self.targets[target].volume;
        let leads = |machine: &Machine| {
            machine.is_serving() && machine.shard.as_ref().is_some_and(|shard| shard.leads(GroupId::first(volume)))
        };
        let Some(leader) = self.machines.iter().position(leads) else { return false };
        let report = self.machines[leader].shard.as_ref().expect("it leads").report();
        let report = report.volumes.into_iter().find(|report| report.volume == volume);
        let snapshots = report.map_or(Vec::new(), |report| report.snapshots);
        let request =
            if snapshots.len() < SNAPSHOTS_KEPT && (snapshots.is_empty() || self.prng.chance(MILLION * 6 / 10)) {
                let number = u128::from(self.prng.next_u64()) + 1;
                let snapshot = SnapshotId::from_bytes(number.to_be_bytes()).expect("it is not zero");
                AdminRequest::TakeSnapshot { volume, snapshot, name: number.to_string() }
            } else {
                AdminRequest::DeleteSnapshot { volume, snapshot: self.prng.pick(&snapshots).snapshot }
            };
        self.tell(leader, request);
        true
    }

    /// What a snapshot holds is the same on every replica, and the same for ever.
    pub(crate) fn note_snapshots(&mut self) {
        let reports = self.machines.iter().filter(|machine| machine.is_serving()).filter_map(|m| m.shard.as_ref());
        for report in reports.flat_map(|shard| shard.report().volumes) {
            for snapshot in report.snapshots {
                let Some(hash) = snapshot.held.and_then(|held| held.hash) else { continue };
                let known = *self.snapshots.entry((report.volume, snapshot.index)).or_insert(hash);
                if known != hash && self.contradiction.is_none() {
                    let text = format!(
                        "snapshot {} of {} is {hash:032x} and was {known:032x}",
                        snapshot.index.0, report.volume
                    );
                    self.contradiction = Some(text);
                }
            }
        }
    }

    /// Whether it found something to break.
    fn apply_fault(&mut self, kind: FaultKind) -> bool {
        let lasts = self.prng.duration(self.plan.lasts_min, self.plan.lasts_max);
        let number = self.prng.below(self.machines.len() as u64) as usize;
        let target = self.prng.below(self.targets.len() as u64) as usize;
        let end = self.machines[number].end;
        self.log(|| format!("fault {kind:?}, {end:?} or target {target}, for {lasts:?}"));
        match kind {
            FaultKind::Kill | FaultKind::PowerLoss => {
                let power = if kind == FaultKind::Kill { Power::Killed } else { Power::Off };
                self.lose(number, power, lasts)
            }
            FaultKind::PowerLossOfAll => {
                for number in 0..self.machines.len() {
                    let spread = self.prng.duration(Duration::ZERO, lasts);
                    self.lose(number, Power::Off, spread);
                }
                true
            }
            FaultKind::Stop => {
                let machine = &mut self.machines[number];
                if machine.shard.is_none() || machine.stopped {
                    return false;
                }
                machine.stopped = true;
                self.connections.stop(end);
                self.after(lasts, Timer::Resume(number));
                true
            }
            FaultKind::Isolation => {
                let others: Vec<End> = self.ends().into_iter().filter(|other| *other != end).collect();
                for other in others {
                    self.block(end, other, lasts);
                    self.block(other, end, lasts);
                    self.may_time_out(end, other, lasts);
                }
                true
            }
            FaultKind::OneWay => {
                let ends: Vec<End> = self.ends().into_iter().filter(|other| *other != end).collect();
                let other = *self.prng.pick(&ends);
                let (from, to) = if self.prng.chance(MILLION / 2) { (end, other) } else { (other, end) };
                self.block(from, to, lasts);
                self.may_time_out(from, to, lasts);
                true
            }
            FaultKind::SlowLink => {
                let ends: Vec<End> = self.ends().into_iter().filter(|other| *other != end).collect();
                let other = *self.prng.pick(&ends);
                let slow = Latency::uniform(Duration::from_millis(1), Duration::from_millis(80));
                self.connections.set_link(end, other, Link { latency: slow, ..self.plan.link });
                self.after(lasts, Timer::LinkWell(end, other));
                true
            }
            FaultKind::SlowDisk => {
                let factor = *self.prng.pick(&[10, 100, 1000]);
                self.machines[number].disk.set_slowness(factor);
                self.after(lasts, Timer::DiskWell(number));
                true
            }
            FaultKind::HungDisk => {
                self.machines[number].disk.hang();
                self.after(lasts, Timer::DiskWell(number));
                true
            }
            FaultKind::Drift => {
                let bound = self.plan.drift_ppm as u64;
                let drift = self.prng.between(0, 2 * bound) as i32 - bound as i32;
                let now = self.now;
                self.machines[number].clock.set_drift(now, drift);
                true
            }
            FaultKind::RottenLog => {
                let number = self.plan.fragile;
                if self.plan.struck.get(&kind).is_some_and(|count| *count >= ROTS_MAX) {
                    return false;
                }
                self.lose(number, Power::Off, lasts) && self.machines[number].rot_log(&mut self.prng)
            }
            FaultKind::RottenData => self.machines[self.plan.fragile].rot_data(&mut self.prng),
            FaultKind::AgentKill => self.agent_again(target, |holder, epoch| match epoch {
                Some(epoch) => (holder, Mode::Resume { epoch }),
                None => (holder, Mode::Attach { take_over: true }),
            }),
            FaultKind::AgentLoss => {
                let Some(agent) = self.targets[target].agent else { return false };
                self.kill_agent(agent, true);
                self.attach_new(target);
                true
            }
            FaultKind::TakeOver => {
                self.attach_new(target);
                true
            }
            FaultKind::Detach => {
                let Some(number) = self.targets[target].agent else { return false };
                let now = self.now;
                let agent = self.agents.get_mut(&number).expect("attached to a target");
                if agent.session.is_none() {
                    return false;
                }
                agent.client.detach(now);
                // Taken over where giving it back takes too long; it must not matter.
                self.attach_new(target);
                true
            }
            FaultKind::Resize => {
                let size = self.targets[target].size_bytes;
                if size >= self.plan.size_bytes_max {
                    return false;
                }
                let volume = self.targets[target].volume;
                let size_bytes = size + self.prng.between(1, (self.plan.size_bytes_max - size) / 4096) * 4096;
                let resize = ResizeVolume { volume, size_bytes, expected_generation: None };
                self.tell_all(&Command::ResizeVolume(resize));
                true
            }
            FaultKind::Snapshot => self.change_snapshots(target),
            FaultKind::DiskWiped => {
                let number = self.plan.fragile;
                if self.wipes() >= WIPES_MAX || !self.lose(number, Power::Off, lasts) {
                    return false;
                }
                self.put_in_empty_disk(number, lasts);
                true
            }
            FaultKind::DiskFailed => {
                let number = self.plan.fragile;
                if self.wipes() >= WIPES_MAX || self.machines[number].shard.is_none() {
                    return false;
                }
                let fault = if self.prng.chance(MILLION / 2) { Fault::FlushError } else { Fault::WriteError };
                self.machines[number].disk.inject(fault);
                self.machines[number].may_fail = true;
                self.plan.doomed = Some(number);
                self.after(lasts, Timer::Replace);
                true
            }
            FaultKind::MembershipChange => {
                if self.machines.len() <= 3 {
                    return false;
                }
                let disk = self.machines[number].disk_id;
                self.tell_all(&Command::SetDiskState(SetDiskState { disk, state: DiskState::Removing }));
                self.after(lasts.max(MOVE_MIN), Timer::Keep(number));
                self.ambush = self.prng.chance(MILLION / 2);
                true
            }
        }
    }

    fn wipes(&self) -> u64 {
        let of = |kind| self.plan.struck.get(kind).copied().unwrap_or(0);
        of(&FaultKind::DiskWiped) + of(&FaultKind::DiskFailed)
    }

    /// Into a machine without power; it tells of the disk when it is back, after `lasts`.
    fn put_in_empty_disk(&mut self, number: usize, lasts: Duration) {
        let mut bytes = [0; 16];
        self.prng.fill(&mut bytes);
        let disk = DiskId::from_bytes(bytes).expect("sixteen random bytes are not all zeroes");
        self.machines[number].wipe(disk).expect("an empty disk can be formatted");
        self.after(lasts, Timer::Register(number, REGISTRATIONS));
        self.ambush = self.prng.chance(MILLION / 2);
    }

    /// The disk that failed goes, an empty one comes.
    pub(crate) fn replace_disk(&mut self) {
        let Some(number) = self.plan.doomed.take() else { return };
        if self.machines[number].shard.is_some() {
            self.crash(number, Power::Off, CrashMode::Any);
        }
        self.cancel(|timer| *timer == Timer::Restart(number));
        self.put_in_empty_disk(number, Duration::ZERO);
        self.after(Duration::ZERO, Timer::Restart(number));
    }

    /// Undoes everything that can be undone.
    pub(crate) fn heal(&mut self) {
        self.cancel(|timer| *timer == Timer::Fault);
        self.replace_disk();
        self.ambush = false;
        if self.wipes() > 0 {
            self.after(Duration::from_secs(1), Timer::Register(self.plan.fragile, REGISTRATIONS));
        }
        for (from, to) in self.connections.blocked() {
            self.connections.unblock(self.now, from, to);
        }
        self.connections.heal_links();
        for number in 0..self.machines.len() {
            self.resume(number);
            let now = self.now;
            let machine = &mut self.machines[number];
            machine.disk.set_slowness(1);
            machine.disk.resume(now);
            if machine.shard.is_none() {
                self.cancel(|timer| *timer == Timer::Restart(number));
                self.after(Duration::ZERO, Timer::Restart(number));
            }
        }
    }

    pub(crate) fn restore_link(&mut self, from: End, to: End) {
        let link = self.plan.link;
        self.connections.set_link(from, to, link);
    }

    pub(crate) fn attach_new(&mut self, target: usize) -> u32 {
        let name = format!("machine-{}", self.prng.below(1000));
        self.attach(target, name, Mode::Attach { take_over: true })
    }

    fn agent_again(
        &mut self,
        target: usize,
        next: impl FnOnce(String, Option<holdfast_protocol::session::Epoch>) -> (String, Mode),
    ) -> bool {
        let Some(number) = self.targets[target].agent else { return false };
        let agent = &self.agents[&number];
        let (holder, mode) = next(agent.holder.clone(), agent.epoch);
        self.kill_agent(number, false);
        self.attach(target, holder, mode);
        true
    }

    fn lose(&mut self, number: usize, power: Power, lasts: Duration) -> bool {
        if self.machines[number].shard.is_none() || self.machines[number].failed.is_some() {
            return false;
        }
        let mode = *self.prng.pick(&[CrashMode::Any, CrashMode::Any, CrashMode::LoseAll, CrashMode::KeepAll]);
        self.crash(number, power, mode);
        self.after(lasts, Timer::Restart(number));
        true
    }

    fn block(&mut self, from: End, to: End, lasts: Duration) {
        self.connections.block(from, to);
        self.after(lasts, Timer::Unblock(from, to));
    }

    /// Kernels give a silent connection up some time, or not before it is well again.
    fn may_time_out(&mut self, one: End, other: End, lasts: Duration) {
        if self.prng.chance(MILLION / 2) {
            let wait = self.prng.duration(Duration::ZERO, lasts);
            self.after(wait, Timer::TimeOut(one, other));
        }
    }

    fn ends(&self) -> Vec<End> {
        let agents = self.agents.iter().filter(|(_, agent)| agent.alive).map(|(number, _)| End::Client(*number));
        self.machines.iter().map(|machine| machine.end).chain(agents).collect()
    }
}
