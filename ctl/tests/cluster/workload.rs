//! [`Workload`]: reads and writes in flight over one NBD connection, every read checked against the [`Model`].
//!
//! One thread sends, one receives; both share the model. Nothing is judged by time but the longest gap, which is told.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::harness::{Cluster, SOON};
use crate::model::{BLOCK, Extent, Model, random};
use crate::nbd::{self, FLUSH, FUA, READ, Receiver, Sender, WRITE};

/// 4 KiB to 256 KiB.
pub const BLOCKS_MAX: u64 = 64;
/// Requests in flight.
const DEPTH: usize = 16;
/// What may be written on average where a node is away some seconds and is to find the log still there.
pub const GENTLE: u64 = 6 << 20;
/// As fast as it goes.
pub const UNLIMITED: u64 = u64::MAX;

enum Sent {
    Read { extent: Extent, floors: Vec<u64> },
    Write { extent: Extent, stamp: u64 },
    Flush,
}

struct State {
    model: Model,
    outstanding: BTreeMap<u64, Sent>,
    /// Requests answered without an error.
    completed: u64,
    written_bytes: u64,
    blocks_max: u64,
    /// While something is outstanding: since when nothing was answered.
    silent_since: Instant,
    longest_gap: Duration,
    stopping: bool,
    ended: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By [`Workload::stop`], with an answer to everything.
    Stopped,
    Error(u32),
    Disconnected,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

pub struct Workload {
    shared: Arc<Shared>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<()>,
}

pub struct Outcome {
    pub model: Model,
    pub end: End,
    pub completed: u64,
    pub longest_gap: Duration,
}

impl Workload {
    /// `seed` chooses what is read and written, not when.
    pub fn start(socket: &Path, model: Model, seed: u64) -> Workload {
        Self::start_at(GENTLE, socket, model, seed)
    }

    /// On a volume made for it, `v`, attached by the agent `local`; with something done already.
    pub fn start_on(cluster: &Cluster, blocks: usize, seed: u64) -> Workload {
        cluster.must(&["volume", "create", "v", "--size", "256Mi"]);
        let socket = cluster.attach("v", "local", &[]);
        let workload = Workload::start(&socket, Model::new(blocks), seed);
        workload.wait_completed(100);
        workload
    }

    pub fn start_at(bytes_per_second: u64, socket: &Path, model: Model, seed: u64) -> Workload {
        Self::start_with(bytes_per_second, BLOCKS_MAX, socket, model, seed)
    }

    /// `blocks_max`: of one request, in blocks of 4 KiB; at most [`BLOCKS_MAX`].
    pub fn start_with(bytes_per_second: u64, blocks_max: u64, socket: &Path, model: Model, seed: u64) -> Workload {
        let (sender, receiver) = nbd::connect(socket).expect("the device is there");
        let state = State {
            model,
            outstanding: BTreeMap::new(),
            completed: 0,
            written_bytes: 0,
            blocks_max,
            silent_since: Instant::now(),
            longest_gap: Duration::ZERO,
            stopping: false,
            ended: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (ours, theirs) = (shared.clone(), shared.clone());
        Workload {
            shared,
            sender: thread::spawn(move || ours.send_all(sender, seed, bytes_per_second)),
            receiver: thread::spawn(move || theirs.receive_all(receiver)),
        }
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let until = Instant::now() + SOON;
        let mut state = self.shared.state();
        while !condition(&state) {
            let left = until.saturating_duration_since(Instant::now());
            let outstanding = state.outstanding.len();
            assert!(left > Duration::ZERO, "not within {SOON:?}: {what}; {outstanding} requests are unanswered");
            state = self.shared.changed.wait_timeout(state, left).expect("no thread of the workload panicked").0;
        }
    }

    /// Until so many more requests have been answered.
    pub fn wait_completed(&self, more: u64) {
        let from = self.shared.state().completed;
        self.wait("the device answers", |state| {
            assert_eq!(state.ended, None, "the device failed");
            state.completed >= from + more
        });
    }

    /// Until so many more bytes have been sent to be written.
    pub fn wait_written(&self, more: u64) {
        let from = self.shared.state().written_bytes;
        self.wait("the device takes writes", |state| {
            assert_eq!(state.ended, None, "the device failed");
            state.written_bytes >= from + more
        });
    }

    pub fn wait_full(&self) {
        self.wait("requests in flight", |state| state.outstanding.len() >= DEPTH / 2);
    }

    /// Nothing new is sent, everything outstanding answered.
    pub fn stop(self) -> Outcome {
        self.shared.state().stopping = true;
        self.shared.changed.notify_all();
        self.join()
    }

    /// When the device has failed or gone.
    pub fn join(self) -> Outcome {
        self.wait("the end of the workload", |state| state.ended.is_some());
        self.sender.join().expect("the sender");
        self.receiver.join().expect("the receiver");
        let shared = Arc::into_inner(self.shared).expect("both threads have ended");
        let mut state = shared.state.into_inner().expect("no thread panicked");
        for sent in state.outstanding.into_values() {
            if let Sent::Write { extent, .. } = sent {
                state.model.on_write_lost(extent);
            }
        }
        let end = state.ended.expect("it has ended");
        Outcome { model: state.model, end, completed: state.completed, longest_gap: state.longest_gap }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the workload panicked")
    }

    fn send_all(&self, mut sender: Sender, mut seed: u64, bytes_per_second: u64) {
        let began = Instant::now();
        let mut cookie = 0;
        let mut state = self.state();
        loop {
            if state.ended.is_some() {
                break;
            }
            if state.stopping && state.outstanding.is_empty() {
                state.ended = Some(End::Stopped);
                break;
            }
            let allowed = began.elapsed().as_secs_f64() * bytes_per_second as f64;
            let ahead = state.written_bytes as f64 - allowed;
            if state.stopping || state.outstanding.len() >= DEPTH {
                state = self.changed.wait(state).expect("no thread panicked");
                continue;
            }
            if ahead > 0.0 {
                let pause = Duration::from_secs_f64(ahead / bytes_per_second as f64);
                state = self.changed.wait_timeout(state, pause).expect("no thread panicked").0;
                continue;
            }
            cookie += 1;
            let (command, flags, extent, data) = state.choose(cookie, &mut seed);
            // The receiver goes on meanwhile: the device may want its answers taken before it reads on.
            drop(state);
            let (offset, length) = extent.map_or((0, 0), |extent| (extent.offset(), extent.bytes()));
            let sent = sender.send(command, flags, cookie, offset, length, &data);
            state = self.state();
            if sent.is_err() {
                state.ended.get_or_insert(End::Disconnected);
            }
        }
        drop(state);
        sender.close();
        self.changed.notify_all();
    }

    fn receive_all(&self, mut receiver: Receiver) {
        let result = self.receive(&mut receiver);
        if result.is_err() {
            self.state().ended.get_or_insert(End::Disconnected);
        }
        self.changed.notify_all();
    }

    fn receive(&self, receiver: &mut Receiver) -> io::Result<()> {
        loop {
            let reply = receiver.reply()?;
            let now = Instant::now();
            let mut state = self.state();
            let gap = now - state.silent_since;
            state.longest_gap = state.longest_gap.max(gap);
            state.silent_since = now;
            let sent = state.outstanding.remove(&reply.cookie).expect("an answer to an outstanding request");
            if reply.error != 0 {
                if let Sent::Write { extent, .. } = sent {
                    state.model.on_write_lost(extent);
                }
                state.ended.get_or_insert(End::Error(reply.error));
                self.changed.notify_all();
                continue;
            }
            match sent {
                Sent::Read { extent, floors } => {
                    drop(state);
                    let data = receiver.data(extent.bytes())?;
                    state = self.state();
                    state.model.on_read(extent, &floors, &data);
                }
                Sent::Write { extent, stamp } => state.model.on_written(extent, stamp),
                Sent::Flush => {}
            }
            state.completed += 1;
            self.changed.notify_all();
        }
    }
}

impl State {
    /// Half reads, half writes, now and then a flush; every eighth write is FUA.
    fn choose(&mut self, cookie: u64, seed: &mut u64) -> (u16, u16, Option<Extent>, Vec<u8>) {
        if self.outstanding.is_empty() {
            self.silent_since = Instant::now();
        }
        let dice = random(seed) % 64;
        let extent = loop {
            let count = (1 + random(seed) % self.blocks_max) as usize;
            // Many small ones, some large ones.
            let count = if random(seed).is_multiple_of(2) { 1 + count % 4 } else { count };
            let extent = Extent { first: random(seed) as usize % (self.model.len() - count), count };
            if dice < 32 || self.model.can_write(extent) {
                break extent;
            }
        };
        let (command, flags, extent, data, sent) = match dice {
            0 => (FLUSH, 0, None, Vec::new(), Sent::Flush),
            1..32 => {
                let floors = self.model.begin_read(extent);
                (READ, 0, Some(extent), Vec::new(), Sent::Read { extent, floors })
            }
            _ => {
                let (stamp, data) = self.model.begin_write(extent);
                self.written_bytes += data.len() as u64;
                let flags = if dice < 36 { FUA } else { 0 };
                (WRITE, flags, Some(extent), data, Sent::Write { extent, stamp })
            }
        };
        self.outstanding.insert(cookie, sent);
        (command, flags, extent, data)
    }
}

/// Everything the model speaks of, as the device has it now, with reads in flight one at a time.
pub fn read_all(socket: &Path, blocks: usize) -> Vec<u8> {
    let (mut sender, mut receiver) = nbd::connect(socket).expect("the device is there");
    let mut all = Vec::with_capacity(blocks * BLOCK);
    for first in (0..blocks).step_by(BLOCKS_MAX as usize) {
        let extent = Extent { first, count: (blocks - first).min(BLOCKS_MAX as usize) };
        sender.send(READ, 0, first as u64, extent.offset(), extent.bytes(), &[]).expect("the device reads");
        let reply = receiver.reply().expect("the device answers");
        assert_eq!((reply.error, reply.cookie), (0, first as u64), "reading {extent:?}");
        all.extend(receiver.data(extent.bytes()).expect("the data of a read"));
    }
    all
}

/// Checks all of it, when nothing is in flight.
pub fn verify(socket: &Path, model: &mut Model) {
    let all = read_all(socket, model.len());
    model.settle_all(&all);
}
