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
use holdfast_shard::{AdminRequest, ClientId, ClientRole, Effects, Event, Shard, ShardOptions};
use holdfast_store::device::{BLOCK_BYTES, Device};
use holdfast_store::ops::{AlignedBuffer, DeviceError, DeviceOp, OpId, WriteBytes};
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

use crate::clock::Clock;
use crate::connections::{Arrival, End};
use crate::disk::{CrashMode, DiskOptions, SimDisk};
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
/// More starts than a run has time for: what a formatted disk's boot epoch is above that of the one before.
const BOOTS_MAX: u64 = 1 << 20;
/// Rot strikes among so many of the newest writes of data.
const DATA_WRITES_KEPT: usize = 2000;
/// Blocks whose loss a peer makes good begin so: a client's blocks, leaves, and other pages of the map.
const SPOILED: [&[u8]; 3] = [b"HFSTAMP1", b"HFLF", b"HFIN"];

/// What becomes of a write of data that completes well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoiling {
    /// One of its sectors holds something else.
    Corrupt,
    /// The disk keeps what it had.
    Lost,
    /// It lands in another place, where other data was.
    Misdirected,
}

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
    /// How its disks are formatted, and how large they are.
    format: FormatOptions,
    wipes: u64,
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
    /// Where the newest blocks of data were written.
    data_writes: VecDeque<u64>,
    /// For the next write of data.
    spoiling: Option<Spoiling>,
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
        disk: SimDisk,
        format: FormatOptions,
        clock: Clock,
        options: ShardOptions,
        prng: Prng,
    ) -> Machine {
        Machine {
            end,
            node: format.node,
            disk_id: format.disk,
            disk,
            format,
            wipes: 0,
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
            data_writes: VecDeque::new(),
            spoiling: None,
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
        // The upper half, so that the identifiers counted from it are never those of another machine or boot.
        self.options.seed = u128::from(self.prng.next_u64()) << 64;
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

    /// The machine, which has no power, gets an empty disk in place of the one it had.
    ///
    /// # Errors
    /// The empty disk cannot be formatted.
    pub fn wipe(&mut self, disk: DiskId) -> Result<(), String> {
        assert!(self.shard.is_none(), "disks are changed without power");
        self.wipes += 1;
        self.disk_id = disk;
        let bytes = self.disk.len().map_err(|error| chain(&error))?;
        self.disk = SimDisk::new(self.prng.split("disk", self.wipes), DiskOptions::solid_state(bytes));
        self.disk.write_at(0, &vec![0; 1 << 20]).map_err(|error| chain(&error))?;
        let format = FormatOptions { disk, boot_epoch: self.wipes * BOOTS_MAX, ..self.format.clone() };
        Store::format(&self.disk, &format).map_err(|error| chain(&error))?;
        self.log_writes.clear();
        self.data_writes.clear();
        self.spoiling = None;
        self.failed = None;
        self.may_fail = false;
        Ok(())
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

    /// Data at rest rots, or the next write of data does.
    pub fn rot_data(&mut self, prng: &mut Prng) -> bool {
        if self.data_writes.is_empty() {
            return false;
        }
        let block = BLOCK_BYTES as u64;
        let offset = *prng.pick(self.data_writes.make_contiguous());
        match prng.below(6) {
            0 => self.disk.corrupt(offset + prng.below(8) * SECTOR_BYTES, SECTOR_BYTES),
            1 => {
                // What a careless hand writes over the middle of a file; only where blocks of data are.
                let near: Vec<u64> =
                    self.data_writes.iter().filter(|at| (offset..offset + 16 * block).contains(at)).copied().collect();
                near.into_iter().for_each(|at| self.disk.corrupt(at, block));
            }
            2 => self.disk.make_unreadable(offset + prng.below(8) * SECTOR_BYTES, SECTOR_BYTES),
            3 => self.spoiling = Some(Spoiling::Corrupt),
            4 => self.spoiling = Some(Spoiling::Lost),
            _ => self.spoiling = Some(Spoiling::Misdirected),
        }
        true
    }

    /// What the disk makes of a write.
    fn spoil(&mut self, mut offset: u64, data: WriteBytes) -> (u64, WriteBytes) {
        let is_data = |block: &[u8]| SPOILED.iter().any(|magic| block.starts_with(magic));
        if !data.chunks(BLOCK_BYTES).all(is_data) {
            return (offset, data);
        }
        let mut bytes = data.to_vec();
        match self.spoiling.take() {
            None => {}
            Some(Spoiling::Corrupt) => bytes[self.prng.below(data.len() as u64) as usize] ^= 0x10,
            Some(Spoiling::Lost) => {
                let mut old = AlignedBuffer::zeroed(data.len());
                if self.disk.read_at(offset, &mut old).is_ok() {
                    bytes.copy_from_slice(&old);
                }
            }
            Some(Spoiling::Misdirected) => {
                let others = self.data_writes.iter().rev().copied();
                let elsewhere = others.filter(|other| other.abs_diff(offset) >= data.len() as u64).nth(20);
                if let Some(other) = elsewhere.filter(|_| data.len() == BLOCK_BYTES) {
                    offset = other;
                }
            }
        }
        for at in (offset..offset + data.len() as u64).step_by(BLOCK_BYTES) {
            self.data_writes.push_back(at);
        }
        while self.data_writes.len() > DATA_WRITES_KEPT {
            self.data_writes.pop_front();
        }
        (offset, AlignedBuffer::padded(&bytes).into())
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
        let op = match op {
            DeviceOp::Write { id, offset, data, durable: false } => {
                let (offset, data) = self.spoil(offset, data);
                DeviceOp::Write { id, offset, data, durable: false }
            }
            op => op,
        };
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
                Event::Client { client, role: ClientRole::Agent, request }
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
