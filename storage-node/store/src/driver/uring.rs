//! A driver over io_uring: no thread of its own, one system call for everything submitted at once.
//!
//! A durable write is a write and then a data sync, pushed as soon as the write has completed. One operation with
//! `RWF_DSYNC` was measured to take the kernel's shared work queue for its flush, which costs a scheduler tick (4 ms)
//! where the processors are busy; linked operations gained nothing, and stop at a short write. A thread that waits in
//! `epoll_wait` while it has operations in flight may see `EINTR` from it: that says no more than [`Driver::is_ready`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bytes::Bytes;
use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::{Driver, EventFd, error_of};
use crate::device::file::FileDevice;
use crate::ops::{AlignedBuffer, DeviceError, DeviceOp, OpId};

/// Operations in the kernel at a time; more wait in a queue. Fast disks reach their rate with fewer.
const DEPTH: usize = 128;

pub struct UringDriver {
    ring: IoUring,
    device: Arc<FileDevice>,
    completed: EventFd,
    /// What the kernel works on, by the operation's user data. Owns the memory the kernel reads and writes.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    queue: VecDeque<DeviceOp>,
    completions: Vec<(OpId, Result<Bytes, DeviceError>)>,
}

struct Slot {
    operation: DeviceOp,
    /// Where a read puts its bytes; empty for the rest.
    buffer: AlignedBuffer,
    /// Bytes moved so far: the kernel may stop short, and is asked for the rest.
    done: usize,
    /// The bytes of a durable write are moved, and wait for the sync.
    syncing: bool,
}

impl UringDriver {
    /// Fails where the kernel has no io_uring, forbids it, or lacks an operation: use the threads there.
    pub fn new(device: Arc<FileDevice>) -> io::Result<UringDriver> {
        // Completions wait for the owner's next system call, where it is not asleep: no interrupt is sent for them. Older
        // kernels (before 5.19) do not know that.
        let ring =
            IoUring::builder().setup_coop_taskrun().build(DEPTH as u32).or_else(|_| IoUring::new(DEPTH as u32))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let completed = EventFd::new()?;
        ring.submitter().register_eventfd(completed.as_raw_fd())?;
        Ok(UringDriver {
            ring,
            device,
            completed,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            queue: VecDeque::new(),
            completions: Vec::new(),
        })
    }

    /// Moves what fits from the queue into the kernel.
    fn pump(&mut self) {
        while let (Some(slot), false) = (self.free.last().copied(), self.queue.is_empty()) {
            self.free.pop();
            let operation = self.queue.pop_front().expect("the queue is not empty");
            let buffer = match &operation {
                DeviceOp::Read { length, .. } => AlignedBuffer::with_capacity(*length as usize),
                _ => AlignedBuffer::with_capacity(0),
            };
            self.slots[slot] = Some(Slot { operation, buffer, done: 0, syncing: false });
            self.push(slot);
        }
        self.enter();
    }

    fn push(&mut self, number: usize) {
        let slot = self.slots[number].as_mut().expect("only occupied slots are pushed");
        let file = match slot.operation {
            DeviceOp::Read { cached: true, .. } => self.device.cached_fd(),
            _ => self.device.as_raw_fd(),
        };
        let entry = slot.entry(types::Fd(file)).user_data(number as u64);
        // SAFETY: the entry's memory belongs to the slot, which is freed only when the kernel has completed it, and
        // the files stay open as long as `self.device`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for every slot, and a slot has one entry at a time");
    }

    fn enter(&mut self) {
        if self.ring.submission().is_empty() {
            return;
        }
        match self.ring.submit() {
            Ok(_) => {}
            // The kernel is short of memory or was interrupted: the owner comes back to `completions` at once.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                self.completed.raise();
            }
            Err(error) => panic!("the kernel refuses a ring it made itself: {error}"),
        }
    }

    /// Takes completions out of the ring; asks for what is still to do.
    fn reap(&mut self) {
        let done: Vec<(usize, i32)> =
            self.ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect();
        for (number, result) in done {
            let slot = self.slots[number].as_mut().expect("the kernel completes what is in flight");
            match slot.advance(result) {
                None => self.push(number),
                Some(result) => {
                    let Slot { operation, buffer, .. } = self.slots[number].take().expect("looked at above");
                    let result = result.map(|()| buffer.into_bytes()).map_err(|error| error_of(&operation, &error));
                    self.completions.push((operation.id(), result));
                    self.free.push(number);
                }
            }
        }
    }
}

impl Slot {
    fn entry(&mut self, file: types::Fd) -> squeue::Entry {
        let (done, rest) = (self.done, self.length() - self.done);
        // Lengths are those of 32-bit fields and of batches, both below 4 GiB.
        let rest = rest as u32;
        let sync = || opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build();
        match &self.operation {
            DeviceOp::Read { offset, .. } => {
                // SAFETY: `done` is at most the length, which the buffer was allocated with.
                let to = unsafe { self.buffer.memory().add(done) };
                opcode::Read::new(file, to, rest).offset(*offset + done as u64).build()
            }
            DeviceOp::Write { .. } if self.syncing => sync(),
            DeviceOp::Write { offset, data, .. } => {
                let from = data[done..].as_ptr();
                opcode::Write::new(file, from, rest).offset(*offset + done as u64).build()
            }
            DeviceOp::Flush { .. } => sync(),
        }
    }

    fn length(&self) -> usize {
        match &self.operation {
            DeviceOp::Read { length, .. } => *length as usize,
            DeviceOp::Write { data, .. } => data.len(),
            DeviceOp::Flush { .. } => 0,
        }
    }

    /// `None`: there is more to do.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        if result < 0 {
            return Some(Err(io::Error::from_raw_os_error(-result)));
        }
        let moved = result as usize;
        self.done += moved;
        if self.done < self.length() {
            return if moved == 0 { Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof))) } else { None };
        }
        match self.operation {
            // SAFETY: the kernel has filled `length` bytes from the start of the buffer.
            DeviceOp::Read { length, .. } => unsafe { self.buffer.set_filled(length as usize) },
            DeviceOp::Write { durable: true, .. } if !self.syncing => {
                self.syncing = true;
                return None;
            }
            DeviceOp::Write { .. } | DeviceOp::Flush { .. } => {}
        }
        Some(Ok(()))
    }
}

impl Driver for UringDriver {
    fn submit(&mut self, operations: Vec<DeviceOp>) {
        self.queue.extend(operations);
        self.pump();
    }

    fn completions(&mut self) -> Vec<(OpId, Result<Bytes, DeviceError>)> {
        // Cleared before taking: a completion that comes between raises it again.
        self.completed.clear();
        self.reap();
        self.pump();
        std::mem::take(&mut self.completions)
    }

    fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    fn fd(&self) -> RawFd {
        self.completed.as_raw_fd()
    }
}

impl Drop for UringDriver {
    fn drop(&mut self) {
        self.queue.clear();
        while self.free.len() < DEPTH {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The kernel may still use the memory: better to lose it than to free it.
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
            }
            self.reap();
        }
    }
}
