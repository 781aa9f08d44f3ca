//! A disk in memory that knows what a crash may leave of it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Device, SECTOR_BYTES, check_range};

/// Which of the writes that no flush covers survive a crash. Asked in the order of the writes.
pub trait CrashChoice {
    /// Whether `sector`, counted from 0 within the write, of the `write`th unflushed write reaches the disk.
    fn survives(&mut self, write: usize, sector: usize) -> bool;
}

impl<F: FnMut(usize, usize) -> bool> CrashChoice for F {
    fn survives(&mut self, write: usize, sector: usize) -> bool {
        self(write, sector)
    }
}

/// Reads see every write; [`MemoryDevice::crash`] keeps what was flushed and any choice of the rest. Clones share the
/// disk.
#[derive(Clone)]
pub struct MemoryDevice {
    disk: Arc<Mutex<Disk>>,
    bytes: u64,
}

#[derive(Clone)]
struct Disk {
    durable: Vec<u8>,
    /// As a reader sees it: `durable` with `unflushed` applied.
    current: Vec<u8>,
    unflushed: VecDeque<Unflushed>,
}

#[derive(Clone)]
struct Unflushed {
    offset: usize,
    data: Vec<u8>,
}

impl MemoryDevice {
    /// A disk of `bytes` zeroes.
    pub fn new(bytes: usize) -> MemoryDevice {
        let disk = Disk { durable: vec![0; bytes], current: vec![0; bytes], unflushed: VecDeque::new() };
        MemoryDevice { disk: Arc::new(Mutex::new(disk)), bytes: bytes as u64 }
    }

    /// Another disk with the same durable bytes and the same unflushed writes.
    pub fn fork(&self) -> MemoryDevice {
        MemoryDevice { disk: Arc::new(Mutex::new(self.with(|disk| disk.clone()))), bytes: self.bytes }
    }

    pub fn unflushed_writes(&self) -> usize {
        self.with(|disk| disk.unflushed.len())
    }

    /// Sectors of every unflushed write, in order: what a [`CrashChoice`] is asked about.
    pub fn unflushed_sectors(&self) -> Vec<usize> {
        self.with(|disk| disk.unflushed.iter().map(|write| write.data.len() / SECTOR_BYTES).collect())
    }

    /// Power fails: unflushed sectors are kept or lost as `choice` says, in the order they were written.
    pub fn crash(&self, mut choice: impl CrashChoice) {
        self.with(|disk| {
            for (number, write) in std::mem::take(&mut disk.unflushed).into_iter().enumerate() {
                for (sector, data) in write.data.chunks_exact(SECTOR_BYTES).enumerate() {
                    if choice.survives(number, sector) {
                        let at = write.offset + sector * SECTOR_BYTES;
                        disk.durable[at..at + SECTOR_BYTES].copy_from_slice(data);
                    }
                }
            }
            let Disk { durable, current, .. } = disk;
            current.copy_from_slice(durable);
        });
    }

    /// Flips every bit of `[offset, offset + length)`, durably: bit rot.
    pub fn corrupt(&self, offset: u64, length: usize) {
        self.with(|disk| {
            let range = offset as usize..offset as usize + length;
            for image in [&mut disk.durable, &mut disk.current] {
                image[range.clone()].iter_mut().for_each(|byte| *byte = !*byte);
            }
        });
    }

    /// What a crash that loses everything unflushed would leave.
    pub fn durable_bytes(&self) -> Vec<u8> {
        self.with(|disk| disk.durable.clone())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Disk) -> T) -> T {
        // A panic of another holder cannot leave a write half done that matters: this disk may tear anyway.
        work(&mut self.disk.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Device for MemoryDevice {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        check_range(offset, buffer.len(), self.bytes)?;
        let start = offset as usize;
        self.with(|disk| buffer.copy_from_slice(&disk.current[start..start + buffer.len()]));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.bytes)?;
        let start = offset as usize;
        self.with(|disk| {
            disk.current[start..start + data.len()].copy_from_slice(data);
            disk.unflushed.push_back(Unflushed { offset: start, data: data.to_vec() });
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|disk| {
            for write in disk.unflushed.drain(..) {
                disk.durable[write.offset..write.offset + write.data.len()].copy_from_slice(&write.data);
            }
        });
        Ok(())
    }
}
