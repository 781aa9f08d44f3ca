//! What a disk is to this crate: bytes at offsets, and a flush.
//!
//! `Device` is the blocking view that `format`, `open` and the offline tools use, and that the drivers serve the
//! run-time operations of [`crate::ops`] from. It promises only what disks promise: a write is durable once a later
//! `flush` has returned; before that any part of it, in units of [`SECTOR_BYTES`], may or may not survive a crash.

pub mod fault;
pub mod file;
pub mod memory;

use std::io;

/// Alignment of every offset, length and buffer in memory.
pub const BLOCK_BYTES: usize = 4096;
/// What a disk writes whole: a torn write is torn between two sectors, never within one.
pub const SECTOR_BYTES: usize = 512;

/// One disk, or a file that stands for one.
#[allow(clippy::len_without_is_empty, reason = "an empty device is refused by size, nobody asks for emptiness")]
pub trait Device: Send + Sync {
    /// Bytes of the device; constant while it is open.
    fn len(&self) -> io::Result<u64>;
    /// Fills the whole buffer or fails. Never written bytes read as anything.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes everything or fails; after a failure the range holds anything.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// When it returns `Ok`, every write that returned before it was called is durable.
    fn flush(&self) -> io::Result<()>;
    /// When it returns `Ok`, this write is durable; of other writes it promises nothing.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(offset, data)?;
        self.flush()
    }
}

/// Bytes `[start, end)` of a device; both are multiples of [`BLOCK_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub end: u64,
}

impl Region {
    /// # Panics
    /// Where a bound is not aligned or the region ends before it starts.
    pub const fn new(start: u64, end: u64) -> Region {
        assert!(start <= end && start.is_multiple_of(BLOCK_BYTES as u64) && end.is_multiple_of(BLOCK_BYTES as u64));
        Region { start, end }
    }

    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }
}

/// Refuses what no [`Device`] takes: ranges beyond its end, and offsets or lengths that are not aligned.
pub fn check_range(offset: u64, length: usize, device_bytes: u64) -> io::Result<()> {
    if !offset.is_multiple_of(BLOCK_BYTES as u64) || !length.is_multiple_of(BLOCK_BYTES) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("unaligned range {offset}+{length}")));
    }
    match offset.checked_add(length as u64) {
        Some(end) if end <= device_bytes => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("range {offset}+{length} ends beyond the device of {device_bytes} bytes"),
        )),
    }
}
