//! A driver of a few threads over any [`Device`]: for kernels without io_uring, and for devices that inject faults.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::{io, mem};

use bytes::Bytes;

use super::{Driver, EventFd, error_of};
use crate::device::Device;
use crate::ops::{AlignedBuffer, DeviceError, DeviceOp, OpId};

/// Operations at a time. A durable WAL write occupies one; the rest serve reads and write-back.
const THREADS: usize = 4;

pub struct ThreadDriver {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    device: Arc<dyn Device>,
    state: Mutex<State>,
    submitted: Condvar,
    completed: EventFd,
}

#[derive(Default)]
struct State {
    queue: VecDeque<DeviceOp>,
    completions: Vec<(OpId, Result<Bytes, DeviceError>)>,
    stopping: bool,
}

impl ThreadDriver {
    pub fn new(device: Arc<dyn Device>) -> io::Result<ThreadDriver> {
        let completed = EventFd::new()?;
        let shared = Shared { device, state: Mutex::default(), submitted: Condvar::new(), completed };
        let mut driver = ThreadDriver { shared: Arc::new(shared), threads: Vec::new() };
        for number in 0..THREADS {
            let shared = driver.shared.clone();
            let builder = std::thread::Builder::new().name(format!("disk-{number}"));
            driver.threads.push(builder.spawn(move || shared.work())?);
        }
        Ok(driver)
    }
}

impl Driver for ThreadDriver {
    fn submit(&mut self, operations: Vec<DeviceOp>) {
        let count = operations.len();
        self.shared.state().queue.extend(operations);
        for _ in 0..count.min(THREADS) {
            self.shared.submitted.notify_one();
        }
    }

    fn completions(&mut self) -> Vec<(OpId, Result<Bytes, DeviceError>)> {
        // Cleared before taking: a completion that comes between raises it again.
        self.shared.completed.clear();
        mem::take(&mut self.shared.state().completions)
    }

    fn is_ready(&mut self) -> bool {
        false
    }

    fn fd(&self) -> RawFd {
        self.shared.completed.as_raw_fd()
    }
}

impl Drop for ThreadDriver {
    fn drop(&mut self) {
        self.shared.state().stopping = true;
        self.shared.submitted.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing in flight any more.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one call that cannot panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let mut state = self.state();
            let operation = loop {
                match state.queue.pop_front() {
                    Some(operation) => break operation,
                    None if state.stopping => return,
                    None => state = self.submitted.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            let result = self.perform(&operation).map_err(|error| error_of(&operation, &error));
            self.state().completions.push((operation.id(), result));
            self.completed.raise();
        }
    }

    fn perform(&self, operation: &DeviceOp) -> io::Result<Bytes> {
        match operation {
            DeviceOp::Read { offset, length, .. } => {
                let mut buffer = AlignedBuffer::zeroed(*length as usize);
                self.device.read_at(*offset, &mut buffer)?;
                return Ok(buffer.into_bytes());
            }
            DeviceOp::Write { offset, data, durable: true, .. } => self.device.write_durable_at(*offset, data)?,
            DeviceOp::Write { offset, data, durable: false, .. } => self.device.write_at(*offset, data)?,
            DeviceOp::Flush { .. } => self.device.flush()?,
        }
        Ok(Bytes::new())
    }
}
