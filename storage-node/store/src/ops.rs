//! Operations on a disk as data: what the sans-I/O parts ask for and what they are told afterwards.
//!
//! Nothing here performs an operation. Operations in flight are unordered: an operation that must follow another is
//! submitted after that one's completion, with the one exception of `Write { durable: true }`.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::{fmt, slice};

use bytes::Bytes;

use crate::device::BLOCK_BYTES;

/// Names an operation in flight on one disk; never reused while the store is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// Hands out operation ids: the WAL has the even ones, chunks the odd ones, so that a completion names its owner.
#[derive(Debug)]
pub struct OpIds {
    next: u64,
}

impl OpIds {
    pub const fn wal() -> OpIds {
        OpIds { next: 0 }
    }

    pub const fn chunks() -> OpIds {
        OpIds { next: 1 }
    }

    pub fn take(&mut self) -> OpId {
        let id = OpId(self.next);
        self.next += 2;
        id
    }
}

impl OpId {
    pub const fn is_wal(self) -> bool {
        self.0.is_multiple_of(2)
    }
}

/// One operation. Offsets and lengths are multiples of [`BLOCK_BYTES`].
#[derive(Clone, PartialEq, Eq)]
pub enum DeviceOp {
    /// Completes with exactly `length` bytes. `cached`: what the system holds of the disk in memory will do, and may be
    /// kept there; else they are the disk's own.
    Read { id: OpId, offset: u64, length: u32, cached: bool },
    /// `durable`: completes only once this write is durable. A write and its flush may be one operation of the disk.
    Write { id: OpId, offset: u64, data: WriteBytes, durable: bool },
    /// When it completes, every write that completed before its submission is durable.
    Flush { id: OpId },
}

impl DeviceOp {
    pub fn id(&self) -> OpId {
        match self {
            DeviceOp::Read { id, .. } | DeviceOp::Write { id, .. } | DeviceOp::Flush { id } => *id,
        }
    }
}

impl fmt::Debug for DeviceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceOp::Read { id, offset, length, cached: _ } => write!(f, "Read({} {offset:#x}+{length:#x})", id.0),
            DeviceOp::Write { id, offset, data, durable } => {
                let kind = if *durable { "DurableWrite" } else { "Write" };
                write!(f, "{kind}({} {offset:#x}+{:#x})", id.0, data.len())
            }
            DeviceOp::Flush { id } => write!(f, "Flush({})", id.0),
        }
    }
}

/// Why an operation failed; the disk's own words, for the log and the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("reading {length} bytes at {offset} failed: {reason}")]
    Read { offset: u64, length: u64, reason: String },
    #[error("writing {length} bytes at {offset} failed: {reason}")]
    Write { offset: u64, length: u64, reason: String },
    #[error("flushing failed: {reason}")]
    Flush { reason: String },
}

/// Bytes whose address is a multiple of [`BLOCK_BYTES`], as direct I/O needs. Grows like a `Vec` until it is full.
pub struct AlignedBuffer {
    pointer: NonNull<u8>,
    length: usize,
    capacity: usize,
}

// SAFETY: the buffer owns its memory exclusively and has no interior mutability, like Vec<u8>.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; `&AlignedBuffer` only reads.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// An empty buffer with room for `capacity` bytes, rounded up to whole blocks, at least one.
    pub fn with_capacity(capacity: usize) -> AlignedBuffer {
        Self::allocate(capacity, false)
    }

    /// `length` zero bytes.
    pub fn zeroed(length: usize) -> AlignedBuffer {
        let mut buffer = Self::allocate(length, true);
        buffer.length = length;
        buffer
    }

    /// A copy of `data`, followed by zeroes up to the next multiple of [`BLOCK_BYTES`].
    pub fn padded(data: &[u8]) -> AlignedBuffer {
        let mut buffer = Self::with_capacity(data.len());
        buffer.extend_from_slice(data);
        buffer.pad_to_block();
        buffer
    }

    fn allocate(capacity: usize, zeroed: bool) -> AlignedBuffer {
        let capacity = capacity.max(1).next_multiple_of(BLOCK_BYTES);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is at least one block, never zero.
        let pointer = unsafe { if zeroed { alloc_zeroed(layout) } else { alloc(layout) } };
        let pointer = NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout));
        AlignedBuffer { pointer, length: 0, capacity }
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BLOCK_BYTES).expect("a capacity that overflows isize was asked for")
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Appends; moves to a buffer of twice the capacity where it does not fit.
    pub fn extend_from_slice(&mut self, data: &[u8]) {
        let needed = self.length + data.len();
        if needed > self.capacity {
            let mut larger = Self::with_capacity(needed.max(self.capacity * 2));
            larger.extend_from_slice(self);
            *self = larger;
        }
        // SAFETY: `data` fits behind `length` (checked above) and cannot overlap memory this buffer owns alone.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.pointer.as_ptr().add(self.length), data.len()) };
        self.length = needed;
    }

    /// Appends zeroes up to the next multiple of [`BLOCK_BYTES`].
    pub fn pad_to_block(&mut self) {
        let padding = self.length.next_multiple_of(BLOCK_BYTES) - self.length;
        self.extend_from_slice(&[0; BLOCK_BYTES][..padding]);
    }

    /// The start of the memory, `capacity` bytes long, for the kernel to fill.
    pub(crate) fn memory(&mut self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// # Safety
    /// The first `length` bytes, at most `capacity`, have been written.
    pub(crate) unsafe fn set_filled(&mut self, length: usize) {
        assert!(length <= self.capacity, "more bytes than the buffer has room for");
        self.length = length;
    }

    /// Hands the memory over without a copy; parts of it can then be shared.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `alloc` with this very layout and is freed only here.
        unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.capacity)) };
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the first `length` bytes are initialised and owned.
        unsafe { slice::from_raw_parts(self.pointer.as_ptr(), self.length) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.pointer.as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Clone for AlignedBuffer {
    fn clone(&self) -> AlignedBuffer {
        let mut copy = Self::with_capacity(self.length);
        copy.extend_from_slice(self);
        copy
    }
}

impl PartialEq for AlignedBuffer {
    fn eq(&self, other: &AlignedBuffer) -> bool {
        self[..] == other[..]
    }
}

impl Eq for AlignedBuffer {}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.length)
    }
}

/// What a write writes: shared bytes whose address is a multiple of [`BLOCK_BYTES`], as direct I/O needs.
#[derive(Clone, PartialEq, Eq)]
pub struct WriteBytes(Bytes);

impl WriteBytes {
    /// The bytes themselves where their address suits, else a copy.
    pub fn aligned(bytes: Bytes) -> WriteBytes {
        if (bytes.as_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            WriteBytes(bytes)
        } else {
            AlignedBuffer::padded(&bytes).into()
        }
    }
}

impl From<AlignedBuffer> for WriteBytes {
    fn from(buffer: AlignedBuffer) -> WriteBytes {
        WriteBytes(buffer.into_bytes())
    }
}

impl Deref for WriteBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for WriteBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteBytes({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_grows_keeps_its_bytes_and_stays_aligned() {
        let mut buffer = AlignedBuffer::with_capacity(1);
        assert_eq!(buffer.capacity(), BLOCK_BYTES);
        buffer.extend_from_slice(&[7; 4000]);
        buffer.extend_from_slice(&[8; 4000]);
        assert_eq!((&buffer[..4000], &buffer[4000..]), (&[7; 4000][..], &[8; 4000][..]));
        buffer.pad_to_block();
        assert_eq!(buffer.len(), 2 * BLOCK_BYTES);
        assert_eq!(buffer[8000..], [0; 192]);
        assert!((buffer.as_ptr() as usize).is_multiple_of(BLOCK_BYTES));
        let address = buffer.as_ptr();
        assert_eq!(buffer.into_bytes().as_ptr(), address);
        assert_eq!(AlignedBuffer::zeroed(0).len(), 0);
    }

    #[test]
    fn what_is_written_is_copied_only_where_its_address_does_not_suit() {
        let bytes = AlignedBuffer::padded(&[7; 3 * BLOCK_BYTES]).into_bytes();
        let suits = bytes.slice(BLOCK_BYTES..);
        assert_eq!(WriteBytes::aligned(suits.clone()).as_ptr(), suits.as_ptr());
        let copied = WriteBytes::aligned(bytes.slice(512..512 + BLOCK_BYTES));
        assert_eq!((copied.as_ptr() as usize % BLOCK_BYTES, copied.len(), copied[0]), (0, BLOCK_BYTES, 7));
    }

    #[test]
    fn the_two_owners_never_take_the_same_id() {
        let (mut wal, mut chunks) = (OpIds::wal(), OpIds::chunks());
        for _ in 0..3 {
            assert!(wal.take().is_wal());
            assert!(!chunks.take().is_wal());
        }
    }
}
