//! Performs operations on a device for an owner that never blocks.
//!
//! The owner submits operations, waits for [`Driver::fd`] to be readable together with its sockets, and takes the
//! completions. Completions come in any order. What an operation means is the store's business; when it must wait
//! for another is, too.

pub mod thread;
pub mod uring;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

use bytes::Bytes;

use crate::device::file::FileDevice;
use crate::ops::{DeviceError, DeviceOp, OpId};

/// Whoever performs operations. Dropping it waits for what is in flight.
pub trait Driver: Send {
    /// Takes any number of operations; what the device cannot take at once is queued.
    fn submit(&mut self, operations: Vec<DeviceOp>);
    /// What has completed since the last call; the bytes of a read, no bytes for the rest. Clears the descriptor's
    /// readiness.
    fn completions(&mut self) -> Vec<(OpId, Result<Bytes, DeviceError>)>;
    /// Whether something has completed in the meantime, as far as can be told for nothing. True for reads of what was in
    /// memory as soon as they are submitted.
    fn is_ready(&mut self) -> bool;
    /// Readable when there are completions to take.
    fn fd(&self) -> RawFd;
}

/// io_uring where the kernel has it and lets us use it, else threads.
pub fn for_file(device: Arc<FileDevice>) -> io::Result<Box<dyn Driver>> {
    match uring::UringDriver::new(device.clone()) {
        Ok(driver) => Ok(Box::new(driver)),
        Err(_) => Ok(Box::new(thread::ThreadDriver::new(device)?)),
    }
}

/// A counter in the kernel that a poll can wait for.
#[derive(Debug)]
pub(crate) struct EventFd(File);

impl EventFd {
    fn new() -> io::Result<EventFd> {
        // SAFETY: no memory is passed; the result is checked before use.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open and nobody else owns it.
        Ok(EventFd(unsafe { File::from_raw_fd(fd) }))
    }

    fn raise(&self) {
        // It fails only where the counter is at its end: then it is readable anyway.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    fn clear(&self) {
        // It fails only where the counter is zero: then it is clear.
        let _ = (&self.0).read(&mut [0; 8]);
    }

    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The words for a failed operation.
fn error_of(operation: &DeviceOp, error: &io::Error) -> DeviceError {
    let reason = error.to_string();
    match operation {
        DeviceOp::Read { offset, length, .. } => {
            DeviceError::Read { offset: *offset, length: u64::from(*length), reason }
        }
        DeviceOp::Write { offset, data, .. } => {
            DeviceError::Write { offset: *offset, length: data.len() as u64, reason }
        }
        DeviceOp::Flush { .. } => DeviceError::Flush { reason },
    }
}

#[cfg(test)]
mod tests;
