//! A disk with faults, over any other disk. Part of the product: the crash tests run the binary that ships.

mod rule;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::rule::Action;
pub use self::rule::{Faults, Operation, ParseFaultsError};
use super::{BLOCK_BYTES, Device, SECTOR_BYTES, check_range};
use crate::ops::AlignedBuffer;

/// Of this many unflushed sectors one lands early, so that killing the process leaves torn writes.
const EARLY_ONE_IN: u64 = 4;
/// One write of a flush at most.
const RUN_BYTES_MAX: usize = 256 << 10;

/// Does to every operation what its [`Faults`] say.
pub struct FaultDevice {
    inner: Arc<dyn Device>,
    state: Mutex<State>,
    /// Hung operations wait here until [`FaultDevice::set_faults`].
    changed: Condvar,
}

struct State {
    faults: Faults,
    /// Counts the calls of `set_faults`: a hang ends with the rules that caused it.
    version: u64,
    /// What a reader sees of blocks written since the last flush, where those are not passed on.
    unflushed: BTreeMap<u64, AlignedBuffer>,
    random: u64,
}

/// What the rules do to one operation.
#[derive(Default)]
struct Verdict {
    error: bool,
    hang: bool,
    delay: Duration,
    corrupt: Vec<Range<u64>>,
}

impl FaultDevice {
    pub fn new(inner: Arc<dyn Device>, faults: Faults) -> FaultDevice {
        let random = faults.rules.iter().find_map(seed_of).unwrap_or(0);
        let state = State { faults, version: 0, unflushed: BTreeMap::new(), random };
        FaultDevice { inner, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Changes the rules; what hangs goes on. Writes that were held back stay so until the next flush.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.version += 1;
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves at worst a write half done, which is what this device is for.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hangs and delays here; then says whether the operation may go on, and which bytes to flip.
    fn judge(&self, operation: Operation, touched: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut state = self.state();
        let verdict = state.verdict(operation, &touched);
        if verdict.hang {
            let version = state.version;
            while state.version == version {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if verdict.error && operation == Operation::Flush {
            // As a real disk: what could not be flushed is gone, and a second flush would not say so.
            state.unflushed.clear();
        }
        drop(state);
        if !verdict.delay.is_zero() {
            std::thread::sleep(verdict.delay);
        }
        if verdict.error { Err(io::Error::other("injected fault")) } else { Ok(verdict.corrupt) }
    }

    /// As [`FaultDevice::judge`]; what is to be written instead, where that differs.
    fn judge_write(&self, offset: u64, data: &[u8]) -> io::Result<Option<AlignedBuffer>> {
        let corrupt = self.judge(Operation::Write, offset..offset + data.len() as u64)?;
        let corrupted = (!corrupt.is_empty()).then(|| {
            let mut corrupted = AlignedBuffer::with_capacity(data.len());
            corrupted.extend_from_slice(data);
            flip(&mut corrupted, offset, corrupt);
            corrupted
        });
        Ok(corrupted)
    }
}

fn seed_of(rule: &rule::Rule) -> Option<u64> {
    match rule.action {
        Action::LoseUnflushed { seed } => Some(seed),
        _ => None,
    }
}

impl State {
    fn verdict(&mut self, operation: Operation, touched: &Range<u64>) -> Verdict {
        let mut verdict = Verdict::default();
        for rule in &mut self.faults.rules {
            if matches!(rule.action, Action::LoseUnflushed { .. }) || !rule.acts(operation, touched) {
                continue;
            }
            match rule.action {
                Action::Error => verdict.error = true,
                Action::Hang => verdict.hang = true,
                Action::Slow { delay } => verdict.delay += delay,
                Action::Corrupt => {
                    let range = rule.range.clone().unwrap_or(touched.clone());
                    verdict.corrupt.push(range.start.max(touched.start)..range.end.min(touched.end));
                }
                Action::LoseUnflushed { .. } => unreachable!("passed over above"),
            }
        }
        verdict
    }

    fn loses_unflushed(&self) -> bool {
        self.faults.rules.iter().any(|rule| seed_of(rule).is_some())
    }

    /// Splitmix64: good enough to scatter, and the same for the same seed.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Holds a block back; some of its sectors reach the disk below at once.
    fn hold_back(&mut self, inner: &dyn Device, offset: u64, block: &[u8]) -> io::Result<()> {
        let mut early = [false; BLOCK_BYTES / SECTOR_BYTES];
        early.fill_with(|| self.next_random().is_multiple_of(EARLY_ONE_IN));
        if early.contains(&true) {
            let mut below = AlignedBuffer::zeroed(BLOCK_BYTES);
            inner.read_at(offset, &mut below)?;
            for sector in (0..early.len()).filter(|sector| early[*sector]) {
                let bytes = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                below[bytes.clone()].copy_from_slice(&block[bytes]);
            }
            inner.write_at(offset, &below)?;
        }
        self.unflushed.insert(offset, AlignedBuffer::padded(block));
        Ok(())
    }
}

impl Device for FaultDevice {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        check_range(offset, buffer.len(), self.len()?)?;
        let touched = offset..offset + buffer.len() as u64;
        let corrupt = self.judge(Operation::Read, touched.clone())?;
        // The lock is held over both: a flush in between must not hide what moves from memory to the disk below.
        let state = self.state();
        self.inner.read_at(offset, buffer)?;
        for (at, block) in state.unflushed.range(touched) {
            let start = (at - offset) as usize;
            buffer[start..start + BLOCK_BYTES].copy_from_slice(block);
        }
        drop(state);
        flip(buffer, offset, corrupt);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.len()?)?;
        let corrupted = self.judge_write(offset, data)?;
        let data = corrupted.as_deref().unwrap_or(data);
        let mut state = self.state();
        // Also once the rule is gone: a block held back must not be overtaken by a later write.
        if !state.loses_unflushed() && state.unflushed.is_empty() {
            drop(state);
            return self.inner.write_at(offset, data);
        }
        for (number, block) in data.chunks_exact(BLOCK_BYTES).enumerate() {
            state.hold_back(&*self.inner, offset + (number * BLOCK_BYTES) as u64, block)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.judge(Operation::Flush, 0..0)?;
        let mut state = self.state();
        // Neighbours together: a freshly formatted disk has tens of thousands of blocks to flush.
        let (mut start, mut run) = (0, AlignedBuffer::with_capacity(RUN_BYTES_MAX));
        for (offset, block) in std::mem::take(&mut state.unflushed) {
            if offset != start + run.len() as u64 || run.len() == RUN_BYTES_MAX {
                if !run.is_empty() {
                    self.inner.write_at(start, &run)?;
                }
                (start, run) = (offset, AlignedBuffer::with_capacity(RUN_BYTES_MAX));
            }
            run.extend_from_slice(&block);
        }
        if !run.is_empty() {
            self.inner.write_at(start, &run)?;
        }
        drop(state);
        self.inner.flush()
    }

    /// As a disk does with FUA: what other writes left in its cache stays there.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.len()?)?;
        let corrupted = self.judge_write(offset, data)?;
        self.judge(Operation::Flush, 0..0)?;
        let data = corrupted.as_deref().unwrap_or(data);
        let mut state = self.state();
        for number in 0..data.len() / BLOCK_BYTES {
            state.unflushed.remove(&(offset + (number * BLOCK_BYTES) as u64));
        }
        self.inner.write_at(offset, data)?;
        drop(state);
        self.inner.flush()
    }
}

/// Flips one bit of every byte in `ranges`, which lie within the buffer that starts at `offset`.
fn flip(buffer: &mut [u8], offset: u64, ranges: Vec<Range<u64>>) {
    for range in ranges {
        let range = (range.start - offset) as usize..(range.end - offset) as usize;
        buffer[range].iter_mut().for_each(|byte| *byte ^= 0x10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::memory::MemoryDevice;

    fn disk(faults: &str) -> (MemoryDevice, FaultDevice) {
        let inner = MemoryDevice::new(64 << 10);
        let device = FaultDevice::new(Arc::new(inner.clone()), faults.parse().unwrap());
        (inner, device)
    }

    fn read(device: &dyn Device, offset: u64) -> Vec<u8> {
        let mut buffer = vec![0; BLOCK_BYTES];
        device.read_at(offset, &mut buffer).unwrap();
        buffer
    }

    #[test]
    fn unflushed_writes_are_read_back_but_reach_the_disk_torn() {
        let (inner, device) = disk("lose-unflushed seed=1");
        device.write_at(4096, &[1; 8192]).unwrap();
        assert_eq!(read(&device, 8192), [1; 4096]);
        let below = [read(&inner, 4096), read(&inner, 8192)].concat();
        let landed = below.chunks(SECTOR_BYTES).filter(|sector| sector[0] == 1).count();
        assert!((1..16).contains(&landed), "{landed} of 16 sectors landed");
        device.flush().unwrap();
        assert_eq!([read(&inner, 4096), read(&inner, 8192)].concat(), [1; 8192]);
        assert_eq!(inner.unflushed_sectors(), []);
    }

    #[test]
    fn a_durable_write_makes_no_other_durable() {
        let (inner, device) = disk("lose-unflushed seed=1");
        device.write_at(0, &[1; 8192]).unwrap();
        device.write_durable_at(4096, &[2; 4096]).unwrap();
        assert_eq!(read(&inner, 4096), [2; 4096]);
        assert!(read(&inner, 0).contains(&0), "the write before it is still held back");
        assert_eq!([read(&device, 0), read(&device, 4096)].concat(), [[1; 4096], [2; 4096]].concat());
    }

    #[test]
    fn a_failed_flush_loses_what_it_should_have_flushed() {
        let (inner, device) = disk("lose-unflushed; error on=flush times=1");
        device.write_at(0, &[1; 4096]).unwrap();
        assert!(device.flush().is_err());
        device.flush().unwrap();
        assert!(read(&inner, 0).contains(&0));
    }

    #[test]
    fn errors_and_corruption_hit_their_range_only() {
        let (_, device) = disk("error on=write range=8192..8193; corrupt range=4100..4102");
        device.write_at(0, &[1; 8192]).unwrap();
        assert!(device.write_at(4096, &[1; 8192]).is_err());
        let back = read(&device, 4096);
        assert_eq!(back[3..8], [1, 0x11, 0x11, 1, 1]);
        assert_eq!(read(&device, 0), [1; 4096]);
    }

    #[test]
    fn a_hung_operation_goes_on_when_the_rules_change() {
        let (_, device) = disk("hang on=flush");
        let device = Arc::new(device);
        let hung = std::thread::spawn({
            let device = device.clone();
            move || device.flush()
        });
        while !device.state().faults.rules.iter().all(rule::Rule::has_matched) {
            std::thread::yield_now();
        }
        device.set_faults(Faults::default());
        hung.join().unwrap().unwrap();
    }
}
