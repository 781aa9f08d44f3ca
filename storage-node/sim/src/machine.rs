//! One simulated machine: a clock, a disk and the storage node's process, the rim of a [`Shard`].
//!
//! What it is: what `holdfast-node` does around its shard, on simulated things: it gathers what happened, samples the
//! clock after the last of it, steps the shard once for all of it, and takes time for that. What it is not: the one who
//! carries the effects out; that is the world's loop, which also decides what breaks.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_id::{DiskId, GroupId, NodeId};
use holdfast_planted::Bug;
use holdfast_protocol::peer::PeerMessage;
use holdfast_protocol::session::Request;
use holdfast_shard::{AdminRequest, ClientId, Effects, Event, Shard, ShardOptions};
use holdfast_store::ops::{DeviceError, DeviceOp, OpId};

use crate::clock::Clock;
use crate::connections::{Arrival, End};
use crate::disk::{CrashMode, SimDisk};
use crate::prng::Prng;

/// What a step takes, at least and at most; what arrives meanwhile waits for the next one.
const STEP_MIN: Duration = Duration::from_micros(1);
const STEP_MAX: Duration = Duration::from_micros(15);
/// A boot clock shows anything below this after power came back: the firmware took its time.
const BOOT_SHOWN_MAX: u64 = 30_000_000_000;
/// Steps in one second of simulated time that nothing but the shard's own deadline asked for. A node of a few groups
/// has a few tens of them; thousands are a loop that eats a core.
const IDLE_STEPS_MAX: u32 = 3_000;

/// Rot strikes among so many of the newest writes to the log, and spares the last of them.
const LOG_WRITES_KEPT: usize = 200;
const LOG_WRITES_SPARED: usize = 3;
const SECTOR_BYTES: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// The process runs, or is stopped.
    On,
    /// The process is gone, the machine is there.
    Killed,
    /// The machine has no power.
    Off,
}

pub struct Machine {
    pub end: End,
    pub node: NodeId,
    pub disk_id: DiskId,
    pub disk: SimDisk,
    pub clock: Clock,
    pub power: Power,
    pub stopped: bool,
    /// A fault that entitles the disk to fail has been injected.
    pub may_fail: bool,
    /// Why the disk was given up.
    pub failed: Option<String>,
    pub boots: u32,
    /// A start found something of the log unreadable.
    pub found_damage: bool,
    pub shard: Option<Shard>,
    options: ShardOptions,
    prng: Prng,
    log_region: Range<u64>,
    /// Offsets and lengths of the newest writes to the log.
    log_writes: VecDeque<(u64, u64)>,
    inbox: Vec<Event>,
    /// When the first of the inbox came.
    inbox_since: Timestamp,
    busy_until: Timestamp,
    clients: BTreeMap<ClientId, End>,
    client_ids: BTreeMap<End, ClientId>,
    next_client: u64,
    /// Steps without an event, in the second that began then.
    idle_steps: (Timestamp, u32),
}

impl Machine {
    pub fn new(
        end: End,
        node: NodeId,
        disk_id: DiskId,
        disk: SimDisk,
        clock: Clock,
        options: ShardOptions,
        prng: Prng,
    ) -> Machine {
        Machine {
            end,
            node,
            disk_id,
            disk,
            clock,
            power: Power::Killed,
            stopped: false,
            may_fail: false,
            failed: None,
            boots: 0,
            found_damage: false,
            shard: None,
            options,
            prng,
            log_region: 0..0,
            log_writes: VecDeque::new(),
            inbox: Vec::new(),
            inbox_since: Timestamp::ZERO,
            busy_until: Timestamp::ZERO,
            clients: BTreeMap::new(),
            client_ids: BTreeMap::new(),
            next_client: 0,
            idle_steps: (Timestamp::ZERO, 0),
        }
    }

    pub fn is_serving(&self) -> bool {
        self.shard.is_some() && !self.stopped && self.failed.is_none()
    }

    /// When it wants to step.
    pub fn wake_at(&self) -> Option<Timestamp> {
        let shard = self.shard.as_ref().filter(|_| !self.stopped)?;
        let at = if self.inbox.is_empty() { self.clock.when(shard.deadline()?) } else { self.inbox_since };
        Some(at.max(self.busy_until))
    }

    /// Starts the process.
    ///
    /// # Errors
    /// The disk makes no shard, in its own words.
    pub fn boot(&mut self, now: Timestamp) -> Result<(), String> {
        assert!(self.shard.is_none() && self.failed.is_none(), "a process runs, or has nothing to run on");
        if self.power == Power::Off {
            let shown = Timestamp(self.prng.below(BOOT_SHOWN_MAX));
            self.clock.reboot(now, shown);
        }
        self.boots += 1;
        self.options.seed = self.prng.next_u64();
        let shard = Shard::open(self.options, &self.disk, self.clock.read(now)).map_err(|error| chain(&error))?;
        self.log_region = shard.superblock().wal.start..shard.superblock().wal.end;
        let volumes = shard.report().volumes.into_iter().map(|volume| GroupId::first(volume.volume));
        self.found_damage |= volumes.into_iter().any(|group| !shard.is_whole(group));
        self.shard = Some(shard);
        self.power = Power::On;
        self.busy_until = now;
        Ok(())
    }

    /// The process is gone, and with `Power::Off` the machine.
    pub fn crash(&mut self, power: Power, mode: CrashMode) {
        self.shard = None;
        self.stopped = false;
        self.power = power;
        self.inbox.clear();
        self.clients.clear();
        self.client_ids.clear();
        self.next_client = 0;
        self.disk.crash(mode);
    }

    /// Rots a sector of the log, unless it might be of the last batches: they look like torn ones, and what a torn batch
    /// held was never told to be durable.
    pub fn rot_log(&mut self, prng: &mut Prng) -> bool {
        let last = self.log_writes.len().saturating_sub(LOG_WRITES_SPARED);
        if last == 0 {
            return false;
        }
        let (offset, bytes) = self.log_writes[prng.below(last as u64) as usize];
        let spared =
            |at: u64| self.log_writes.iter().skip(last).any(|(start, length)| (*start..start + length).contains(&at));
        let sector = offset + prng.below(bytes / SECTOR_BYTES) * SECTOR_BYTES;
        if spared(sector) {
            return false;
        }
        self.disk.corrupt(sector, SECTOR_BYTES);
        true
    }

    pub fn submit(&mut self, now: Timestamp, op: DeviceOp) {
        if let DeviceOp::Write { offset, data, .. } = &op
            && self.log_region.contains(offset)
        {
            self.log_writes.push_back((*offset, data.len() as u64));
            if self.log_writes.len() > LOG_WRITES_KEPT {
                self.log_writes.pop_front();
            }
        }
        self.disk.submit(now, op);
    }

    pub fn push(&mut self, now: Timestamp, event: Event) {
        if self.shard.is_some() {
            if self.inbox.is_empty() {
                self.inbox_since = now;
            }
            self.inbox.push(event);
        }
    }

    pub fn ask(&mut self, now: Timestamp, token: u64, request: AdminRequest) {
        self.push(now, Event::Admin { token, request });
    }

    pub fn on_completion(&mut self, now: Timestamp, id: OpId, result: Result<Bytes, DeviceError>) {
        self.push(now, Event::Device { id, result });
    }

    /// `node_of` names nodes by their ends.
    ///
    /// # Errors
    /// The bytes are no message: no simulated peer sends such.
    pub fn on_arrival(
        &mut self,
        now: Timestamp,
        from: End,
        node: Option<NodeId>,
        arrival: Arrival,
    ) -> Result<(), String> {
        if self.shard.is_none() {
            return Ok(());
        }
        let event = match (node, arrival) {
            (Some(node), Arrival::Connected) => Event::PeerConnected(node),
            (Some(node), Arrival::Closed) => Event::PeerClosed(node),
            (Some(node), Arrival::Message(message)) => {
                let message =
                    PeerMessage::decode(message.kind, message.meta, message.payload).map_err(|e| e.to_string())?;
                Event::Peer { from: node, message }
            }
            (None, Arrival::Connected) => {
                self.next_client += 1;
                let client = ClientId(self.next_client);
                self.clients.insert(client, from);
                self.client_ids.insert(from, client);
                return Ok(());
            }
            (None, Arrival::Closed) => match self.forget_client(from) {
                Some(client) => Event::ClientClosed(client),
                None => return Ok(()),
            },
            (None, Arrival::Message(message)) => {
                let Some(client) = self.client_ids.get(&from).copied() else { return Ok(()) };
                let request =
                    Request::decode(message.kind, message.meta, message.payload).map_err(|e| e.to_string())?;
                Event::Client { client, request }
            }
        };
        self.push(now, event);
        Ok(())
    }

    pub fn client_end(&self, client: ClientId) -> Option<End> {
        self.clients.get(&client).copied()
    }

    /// The connection was closed from here.
    pub fn drop_client(&mut self, now: Timestamp, end: End) {
        if let Some(client) = self.forget_client(end) {
            self.push(now, Event::ClientClosed(client));
        }
    }

    fn forget_client(&mut self, end: End) -> Option<ClientId> {
        let client = self.client_ids.remove(&end)?;
        self.clients.remove(&client);
        Some(client)
    }

    /// Steps the shard with what came.
    ///
    /// # Errors
    /// The shard asks to be woken again and again for nothing.
    pub fn step(&mut self, now: Timestamp) -> Result<Effects, String> {
        let events = std::mem::take(&mut self.inbox);
        let sampled_at = self.sampled_at(now, events.is_empty());
        let shard = self.shard.as_mut().expect("only a process that runs wakes up");
        if events.is_empty() {
            let second = Duration::from_secs(1);
            if now.since(self.idle_steps.0) >= second {
                self.idle_steps = (now, 0);
            }
            self.idle_steps.1 += 1;
            if self.idle_steps.1 > IDLE_STEPS_MAX {
                let deadline = shard.deadline();
                return Err(format!("{:?} spins: its deadline {deadline:?} does not pass", self.end));
            }
        }
        let count = events.len() as u32;
        let effects = shard.step(events, self.clock.read(sampled_at));
        self.busy_until = now + self.prng.duration(STEP_MIN, STEP_MAX) + STEP_MIN * count;
        if let Some(reason) = &effects.failed {
            self.failed = Some(reason.clone());
        }
        Ok(effects)
    }
}

impl Machine {
    /// When the clock is read: after the last event was received.
    fn sampled_at(&self, now: Timestamp, empty: bool) -> Timestamp {
        if holdfast_planted::is(Bug::NowTakenBeforeStop) && !empty { self.inbox_since } else { now }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
