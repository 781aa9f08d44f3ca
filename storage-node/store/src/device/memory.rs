//! A disk in memory that knows what a crash may leave of it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{BLOCK_BYTES, Device, SECTOR_BYTES, check_range};

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
/// disk. Takes memory for what is not zero, and shares it between forks.
#[derive(Clone)]
pub struct MemoryDevice {
    disk: Arc<Mutex<Disk>>,
    bytes: u64,
}

#[derive(Clone, Default)]
struct Disk {
    durable: Image,
    /// As a reader sees it: `durable` with `unflushed` applied.
    current: Image,
    unflushed: Vec<Unflushed>,
}

#[derive(Clone)]
struct Unflushed {
    offset: u64,
    data: Vec<u8>,
}

/// Blocks by their offset; zero where there is none.
#[derive(Clone, Default)]
struct Image(BTreeMap<u64, Arc<[u8; BLOCK_BYTES]>>);

impl Image {
    fn read(&self, offset: u64, buffer: &mut [u8]) {
        buffer.fill(0);
        for (at, block) in self.0.range(offset..offset + buffer.len() as u64) {
            let start = (at - offset) as usize;
            buffer[start..start + BLOCK_BYTES].copy_from_slice(&block[..]);
        }
    }

    /// `offset` and the length are multiples of a sector; neither need be one of a block.
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (number, sector) in data.chunks_exact(SECTOR_BYTES).enumerate() {
            let at = offset + (number * SECTOR_BYTES) as u64;
            self.change(at..at + SECTOR_BYTES as u64, |bytes| bytes.copy_from_slice(sector));
        }
    }

    /// Changes bytes within one block.
    fn change(&mut self, range: Range<u64>, change: impl FnOnce(&mut [u8])) {
        let start = range.start % BLOCK_BYTES as u64;
        let block = self.0.entry(range.start - start).or_insert_with(|| Arc::new([0; BLOCK_BYTES]));
        let length = (range.end - range.start) as usize;
        change(&mut Arc::make_mut(block)[start as usize..start as usize + length]);
    }
}

impl MemoryDevice {
    /// A disk of `bytes` zeroes.
    pub fn new(bytes: usize) -> MemoryDevice {
        MemoryDevice { disk: Arc::default(), bytes: bytes as u64 }
    }

    /// Another disk with the same durable bytes and the same unflushed writes.
    pub fn fork(&self) -> MemoryDevice {
        MemoryDevice { disk: Arc::new(Mutex::new(self.with(|disk| disk.clone()))), bytes: self.bytes }
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
                        disk.durable.write(write.offset + (sector * SECTOR_BYTES) as u64, data);
                    }
                }
            }
            disk.current = disk.durable.clone();
        });
    }

    /// Flips every bit of `[offset, offset + length)`, durably: bit rot.
    pub fn corrupt(&self, offset: u64, length: usize) {
        self.with(|disk| {
            for at in offset..offset + length as u64 {
                for image in [&mut disk.durable, &mut disk.current] {
                    image.change(at..at + 1, |byte| byte[0] = !byte[0]);
                }
            }
        });
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
        self.with(|disk| disk.current.read(offset, buffer));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.bytes)?;
        self.with(|disk| {
            disk.current.write(offset, data);
            disk.unflushed.push(Unflushed { offset, data: data.to_vec() });
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|disk| {
            disk.unflushed.clear();
            disk.durable = disk.current.clone();
        });
        Ok(())
    }

    /// As a disk does with FUA: no write before it becomes durable by it.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.bytes)?;
        self.with(|disk| {
            disk.current.write(offset, data);
            disk.durable.write(offset, data);
            // Older writes of the same bytes are superseded, whether they would have survived or not.
            let end = offset + data.len() as u64;
            for older in &mut disk.unflushed {
                let start = offset.max(older.offset);
                let stop = end.min(older.offset + older.data.len() as u64);
                if start < stop {
                    let new = &data[(start - offset) as usize..(stop - offset) as usize];
                    older.data[(start - older.offset) as usize..(stop - older.offset) as usize].copy_from_slice(new);
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &MemoryDevice, offset: u64) -> Vec<u8> {
        let mut buffer = vec![9; BLOCK_BYTES];
        device.read_at(offset, &mut buffer).unwrap();
        buffer
    }

    #[test]
    fn a_crash_keeps_what_was_flushed_and_the_chosen_sectors() {
        let device = MemoryDevice::new(1 << 20);
        device.write_at(0, &[1; 4096]).unwrap();
        device.flush().unwrap();
        device.write_at(0, &[2; 8192]).unwrap();
        device.write_at(0, &[3; 4096]).unwrap();
        assert_eq!(device.unflushed_sectors(), [16, 8]);
        let fork = device.fork();
        device.crash(|write, sector| write == 0 && sector == 9 || write == 1 && sector == 0);
        assert_eq!((read(&device, 0)[..513].to_vec(), read(&device, 4096)[511..513].to_vec()), {
            let mut first = vec![3; 512];
            first.push(1);
            (first, vec![0, 2])
        });
        assert_eq!(read(&fork, 0), [3; 4096]);
    }

    #[test]
    fn a_durable_write_is_durable_alone_and_outlives_older_writes() {
        let device = MemoryDevice::new(1 << 20);
        device.write_at(0, &[1; 8192]).unwrap();
        device.write_durable_at(4096, &[2; 4096]).unwrap();
        let lost = device.fork();
        lost.crash(|_, _| false);
        assert_eq!((read(&lost, 0), read(&lost, 4096)), (vec![0; 4096], vec![2; 4096]));
        device.crash(|_, _| true);
        assert_eq!((read(&device, 0), read(&device, 4096)), (vec![1; 4096], vec![2; 4096]));
    }
}
