//! A simulated disk: takes the store's operations as data, completes them in simulated time, and fails as disks do.
//!
//! What it is: `Media` behind a queue without order, as devices have. Operations take effect when they complete; a
//! crash in between leaves any part of a write. For formatting and opening, which block, it is a [`Device`] too; then
//! its operations take no time and faults of the media apply. What it is not: a file, a driver, a guess at a real
//! model's speed. Who drives it: the simulation's loop.
//!
//! Invariants: after [`SimDisk::crash`] what a completed flush covered is there (unless a fault was injected into
//! it), and no operation submitted before completes any more. The same calls with the same generator give the same
//! completions and the same bytes.

mod media;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_store::device::{BLOCK_BYTES, Device, check_range};
use holdfast_store::ops::{AlignedBuffer, DeviceError, DeviceOp, OpId};

pub use self::media::CrashMode;
use self::media::{Mark, Media};
use crate::latency::Latency;
use crate::prng::Prng;

/// Operations in flight on one disk. The store bounds its own far below; more is a bug of its.
pub const IN_FLIGHT_MAX: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// A multiple of 4096.
    pub bytes: u64,
    pub read: Latency,
    pub write: Latency,
    pub flush: Latency,
    /// Never written blocks hold old bytes instead of zeroes.
    pub used: bool,
}

impl DiskOptions {
    /// Times of a data-centre solid-state disk, with its rare pauses.
    pub const fn solid_state(bytes: u64) -> DiskOptions {
        let micros = Duration::from_micros;
        DiskOptions {
            bytes,
            read: Latency::uniform(micros(60), micros(120)).with_tail(1000, Duration::from_millis(5)),
            write: Latency::uniform(micros(10), micros(40)).with_tail(1000, Duration::from_millis(5)),
            flush: Latency::uniform(micros(20), micros(400)).with_tail(5000, Duration::from_millis(30)),
            used: true,
        }
    }
}

/// What goes wrong with the next operation of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    ReadError,
    /// The bytes come from another place of the disk, without an error.
    MisdirectedRead,
    WriteError,
    /// Completes well and changes nothing.
    LostWrite,
    /// Completes well and lands elsewhere.
    MisdirectedWrite,
    /// Nothing the flush should have covered will be on the disk after a crash.
    FlushError,
}

/// What happened so far; a run whose faults are all zero has shown nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Statistics {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// Injected with [`SimDisk::inject`] and come to pass, media faults met, or refused because the disk was full.
    pub faults: u64,
    pub crashes: u64,
    /// Writes in flight at a crash.
    pub interrupted: u64,
}

#[derive(Debug)]
pub struct SimDisk {
    prng: Prng,
    options: DiskOptions,
    /// [`Device`] is shared between threads by its contract; the simulation has one.
    media: Mutex<Media>,
    /// By time of completion, then by order of submission.
    in_flight: BTreeMap<(Timestamp, u64), InFlight>,
    /// Submitted while the disk hung, in order.
    hung: Option<VecDeque<DeviceOp>>,
    next: u64,
    slowness: u32,
    full: bool,
    faults: Vec<Fault>,
    statistics: Statistics,
}

#[derive(Debug)]
struct InFlight {
    op: DeviceOp,
    /// What had completed when the operation was submitted: what a flush must cover.
    mark: Mark,
}

impl SimDisk {
    pub fn new(mut prng: Prng, options: DiskOptions) -> SimDisk {
        assert!(options.bytes.is_multiple_of(BLOCK_BYTES as u64), "whole blocks");
        let garbage = if options.used { prng.next_u64() | 1 } else { 0 };
        SimDisk {
            prng,
            options,
            media: Mutex::new(Media::new(garbage)),
            in_flight: BTreeMap::new(),
            hung: None,
            next: 0,
            slowness: 1,
            full: false,
            faults: Vec::new(),
            statistics: Statistics::default(),
        }
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len() + self.hung.as_ref().map_or(0, VecDeque::len)
    }

    /// 512-byte sectors that a crash now may lose.
    pub fn volatile_sectors(&self) -> usize {
        self.media().volatile_sectors()
    }

    /// When the next operation completes; `None` also while the disk hangs.
    pub fn next_completion(&self) -> Option<Timestamp> {
        if self.hung.is_some() {
            return None;
        }
        self.in_flight.first_key_value().map(|((at, _), _)| *at)
    }

    /// # Panics
    /// Where the operation is not aligned or lies beyond the end: the store must not ask for that.
    pub fn submit(&mut self, now: Timestamp, op: DeviceOp) {
        let (offset, length) = match &op {
            DeviceOp::Read { offset, length, .. } => (*offset, *length as usize),
            DeviceOp::Write { offset, data, .. } => (*offset, data.len()),
            DeviceOp::Flush { .. } => (0, 0),
        };
        check_range(offset, length, self.options.bytes).unwrap_or_else(|error| panic!("{op:?}: {error}"));
        assert!(self.in_flight() < IN_FLIGHT_MAX, "too many operations in flight");
        match &mut self.hung {
            Some(waiting) => waiting.push_back(op),
            None => self.start(now, op),
        }
    }

    /// The next operation that has completed by `now`.
    pub fn complete(&mut self, now: Timestamp) -> Option<(OpId, Result<Bytes, DeviceError>)> {
        if self.next_completion()? > now {
            return None;
        }
        let (_, InFlight { op, mark }) = self.in_flight.pop_first()?;
        let id = op.id();
        let result = match op {
            DeviceOp::Read { offset, length, .. } => self.read(offset, length),
            DeviceOp::Write { offset, data, durable, .. } => self.write(offset, &data, durable),
            DeviceOp::Flush { .. } => self.flush(mark),
        };
        Some((id, result))
    }

    /// The next operation the fault is about fails that way. Several of a kind wait for as many operations.
    pub fn inject(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// Latencies are multiplied from now on; 1 is well.
    pub fn set_slowness(&mut self, factor: u32) {
        self.slowness = factor.max(1);
    }

    /// Nothing completes until [`SimDisk::resume`].
    pub fn hang(&mut self) {
        self.hung.get_or_insert_default();
    }

    /// What was in flight goes on; nothing completes before `now`.
    pub fn resume(&mut self, now: Timestamp) {
        for op in self.hung.take().unwrap_or_default() {
            self.start(now, op);
        }
        for ((at, number), operation) in std::mem::take(&mut self.in_flight) {
            self.in_flight.insert((at.max(now), number), operation);
        }
    }

    /// While full, writes to places never written before fail, as on a sparse file.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// Bit rot in `[offset, offset + length)`, whole sectors, until they are written again.
    pub fn corrupt(&mut self, offset: u64, length: u64) {
        let SimDisk { media, prng, .. } = self;
        media.get_mut().unwrap_or_else(PoisonError::into_inner).corrupt(offset, length, prng);
    }

    /// The sectors cannot be read until they are written again.
    pub fn make_unreadable(&mut self, offset: u64, length: u64) {
        self.media().make_unreadable(offset, length);
    }

    /// Power fails and comes back: what is in flight is gone, a write among it may have landed in part.
    pub fn crash(&mut self, mode: CrashMode) {
        self.statistics.crashes += 1;
        let mut interrupted: Vec<DeviceOp> = std::mem::take(&mut self.in_flight).into_values().map(|o| o.op).collect();
        interrupted.extend(self.hung.take().into_iter().flatten());
        self.prng.shuffle(&mut interrupted);
        let SimDisk { media, prng, statistics, .. } = self;
        let media = media.get_mut().unwrap_or_else(PoisonError::into_inner);
        for op in interrupted {
            if let DeviceOp::Write { offset, data, .. } = op {
                statistics.interrupted += 1;
                media.write(offset, &data);
            }
        }
        media.crash(mode, prng);
        self.faults.clear();
        self.slowness = 1;
    }

    fn media(&self) -> MutexGuard<'_, Media> {
        self.media.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&mut self, now: Timestamp, op: DeviceOp) {
        let latency = match &op {
            DeviceOp::Read { .. } => self.options.read.draw(&mut self.prng),
            DeviceOp::Write { durable: false, .. } => self.options.write.draw(&mut self.prng),
            DeviceOp::Write { durable: true, .. } => {
                self.options.write.draw(&mut self.prng) + self.options.flush.draw(&mut self.prng)
            }
            DeviceOp::Flush { .. } => self.options.flush.draw(&mut self.prng),
        };
        let mark = self.media().mark();
        self.in_flight.insert((now + latency * self.slowness, self.next), InFlight { op, mark });
        self.next += 1;
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Bytes, DeviceError> {
        self.statistics.reads += 1;
        let failed = |reason: String| DeviceError::Read { offset, length: u64::from(length), reason };
        if self.strikes(Fault::ReadError) {
            return Err(failed("injected".to_owned()));
        }
        let from =
            if self.strikes(Fault::MisdirectedRead) { self.elsewhere(offset, u64::from(length)) } else { offset };
        let mut buffer = AlignedBuffer::zeroed(length as usize);
        let read = self.media().read(from, &mut buffer);
        match read {
            Ok(()) => Ok(buffer.into_bytes()),
            Err(sector) => {
                self.statistics.faults += 1;
                Err(failed(format!("sector {sector} is unreadable")))
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> Result<Bytes, DeviceError> {
        self.statistics.writes += 1;
        let length = data.len() as u64;
        let failed = |reason: &str| DeviceError::Write { offset, length, reason: reason.to_owned() };
        if self.strikes(Fault::WriteError) {
            // After an error the range holds anything: here a prefix of whole sectors, not durable.
            let landed = self.prng.between(0, length / media::SECTOR) * media::SECTOR;
            self.media().write(offset, &data[..landed as usize]);
            return Err(failed("injected"));
        }
        if self.full && !self.media().is_allocated(offset, length) {
            self.statistics.faults += 1;
            return Err(failed("no space left on device"));
        }
        if self.strikes(Fault::LostWrite) {
            return Ok(Bytes::new());
        }
        let to = if self.strikes(Fault::MisdirectedWrite) { self.elsewhere(offset, length) } else { offset };
        if durable {
            self.media().write_durable(to, data);
        } else {
            self.media().write(to, data);
        }
        Ok(Bytes::new())
    }

    fn flush(&mut self, mark: Mark) -> Result<Bytes, DeviceError> {
        self.statistics.flushes += 1;
        if self.strikes(Fault::FlushError) {
            self.media().doom(mark);
            return Err(DeviceError::Flush { reason: "injected".to_owned() });
        }
        self.media().flush(mark);
        Ok(Bytes::new())
    }

    /// Whether the fault was waiting for this operation.
    fn strikes(&mut self, fault: Fault) -> bool {
        let Some(at) = self.faults.iter().position(|waiting| *waiting == fault) else { return false };
        self.faults.remove(at);
        self.statistics.faults += 1;
        true
    }

    /// Another aligned place with room for the length, or the same where the disk has only one.
    fn elsewhere(&mut self, offset: u64, length: u64) -> u64 {
        let block = BLOCK_BYTES as u64;
        let places = (self.options.bytes - length) / block + 1;
        let other = self.prng.below(places) * block;
        if other != offset { other } else { (offset + block) % (places * block) }
    }
}

impl Device for SimDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.options.bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        check_range(offset, buffer.len(), self.options.bytes)?;
        self.media().read(offset, buffer).map_err(|sector| io::Error::other(format!("sector {sector} is unreadable")))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.options.bytes)?;
        self.media().write(offset, data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut media = self.media();
        let mark = media.mark();
        media.flush(mark);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
