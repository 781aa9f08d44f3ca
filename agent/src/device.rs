//! One volume's FUSE descriptor: requests of the kernel in, replies out, and the threads that make and end the device.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bytes::Bytes;
use holdfast_block::{Completion, Geometry, Request};
use holdfast_fuse::wire::Reply;
use holdfast_fuse::{Input, Session};
use holdfast_id::VolumeId;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token, Waker};
use rustix::fs::{Mode, OFlags};

use crate::config::KeeperConfig;
use crate::keeper_link::{KeeperLink, KeeperLinkError};
use crate::loop_device::{self, DeviceError, Removal};
use crate::sys;

/// The longest write and the headers before it; the kernel insists on room for both.
const BUFFER_BYTES: usize = holdfast_block::REQUEST_BYTES_MAX as usize + 4096;

/// Between two attempts to reach or start a keeper for devices that have none.
pub(crate) const KEEPER_RETRY: Duration = Duration::from_secs(1);

/// Of the connection to the keeper.
pub(crate) const KEEPER: Token = Token(3);

/// What a thread has done.
pub(crate) enum Outcome {
    /// The device of that number is there.
    Made(Result<u32, DeviceError>),
    Removed(Result<(), DeviceError>),
}

pub(crate) struct Done {
    pub volume: VolumeId,
    pub outcome: Outcome,
}

/// What all devices of the agent share.
pub(crate) struct Devices {
    pub keeper: KeeperLink,
    /// Present and locked before the first read: a process killed in a page fault of the copy would fail the request.
    buffer: Box<[u8]>,
    tell: Sender<Done>,
    done: Receiver<Done>,
    waker: Arc<Waker>,
}

impl Devices {
    pub fn new(config: KeeperConfig, waker: Arc<Waker>) -> Devices {
        let (tell, done) = channel();
        // Any byte but zero: pages that were only promised must become pages now.
        let buffer = vec![0xFF; BUFFER_BYTES].into_boxed_slice();
        for (what, result) in [("lock", sys::lock_memory(&buffer)), ("flush without waiting", sys::become_io_flusher())]
        {
            if let Err(error) = result {
                tracing::info!(%error, "the agent may not {what}; it goes on without");
            }
        }
        Devices { keeper: KeeperLink::new(config), buffer, tell, done, waker }
    }

    /// Starts a keeper where none runs, and watches the connection to it.
    pub fn ensure_keeper(&mut self, registry: &Registry) -> Result<(), KeeperLinkError> {
        self.keeper.ensure()?;
        self.watch_keeper(registry)
    }

    /// Watches the connection to the keeper, if there is one; again is the same as once.
    pub fn watch_keeper(&mut self, registry: &Registry) -> Result<(), KeeperLinkError> {
        let Some(socket) = self.keeper.socket() else { return Ok(()) };
        match registry.register(&mut SourceFd(&socket.as_raw_fd()), KEEPER, Interest::READABLE) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(KeeperLinkError::Spawn(error)),
            _ => Ok(()),
        }
    }

    pub fn poll(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }

    fn start(&self, volume: VolumeId, work: impl FnOnce() -> Outcome + Send + 'static) -> io::Result<()> {
        let (tell, waker) = (self.tell.clone(), self.waker.clone());
        std::thread::Builder::new().name("device".into()).spawn(move || {
            if tell.send(Done { volume, outcome: work() }).is_ok()
                && let Err(error) = waker.wake()
            {
                tracing::error!(%error, "the agent cannot be woken");
            }
        })?;
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("cannot {step}")]
    Io { step: &'static str, source: io::Error },
    #[error(transparent)]
    Keeper(#[from] KeeperLinkError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl OpenError {
    /// With its cause, for those who see only text.
    pub fn text(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Making,
    Ready(u32),
    /// A thread ends the loop device of that number.
    Removing(u32),
}

/// What one attempt to read came to.
pub(crate) enum Turn {
    /// Requests may be pending now, and more may follow.
    Progress,
    Waits,
    /// The kernel has let go of the file system, or it cannot be served on.
    Ended(String),
}

pub(crate) struct Device {
    volume: VolumeId,
    name: String,
    block_bytes: u32,
    fuse: OwnedFd,
    session: Session,
    stage: Stage,
    /// Parts of kernel requests that the volume has not taken yet. While there are any nothing is read, so they are
    /// those of one request.
    pub pending: VecDeque<Request>,
    readable: bool,
    ended: bool,
}

impl Device {
    /// Begins to make the device; [`Outcome::Made`] tells its end.
    pub fn start(
        volume: VolumeId,
        epoch: u64,
        geometry: Geometry,
        note: serde_json::Value,
        devices: &mut Devices,
        (registry, token): (&Registry, Token),
    ) -> Result<Device, OpenError> {
        let io = |step| move |source| OpenError::Io { step, source };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fuse = rustix::fs::open("/dev/fuse", flags, Mode::empty());
        let fuse = fuse.map_err(|error| io("open /dev/fuse")(error.into()))?;
        // Before there is anything to lose: from its first request on the file system must outlive this process.
        devices.ensure_keeper(registry)?;
        devices.keeper.put(volume, note, fuse.as_fd())?;
        let device = Device::new(volume, epoch, geometry, fuse, Stage::Making);
        let mount = loop_device::mount(&device.fuse)?;
        device.register(registry, token).map_err(io("watch /dev/fuse"))?;
        let (name, block_bytes) = (device.name.clone(), device.block_bytes);
        devices
            .start(volume, move || Outcome::Made(loop_device::make(mount, &name, block_bytes)))
            .map_err(io("start a thread"))?;
        Ok(device)
    }

    /// Takes over what an earlier agent served: the kernel sends again what that one left unanswered.
    pub fn adopt(volume: VolumeId, epoch: u64, number: u32, geometry: Geometry, fuse: OwnedFd) -> io::Result<Device> {
        let device = Device::new(volume, epoch, geometry, fuse, Stage::Ready(number));
        rustix::io::write(&device.fuse, &Reply::resend().header)?;
        Ok(device)
    }

    fn new(volume: VolumeId, epoch: u64, geometry: Geometry, fuse: OwnedFd, stage: Stage) -> Device {
        let name = loop_device::name(volume, epoch);
        Device {
            volume,
            session: Session::new(name.clone(), geometry),
            name,
            block_bytes: geometry.logical_block_bytes,
            fuse,
            stage,
            pending: VecDeque::new(),
            readable: true,
            ended: false,
        }
    }

    /// The device, once it is there.
    pub fn path(&self) -> Option<PathBuf> {
        match self.stage {
            Stage::Making => None,
            Stage::Ready(number) | Stage::Removing(number) => Some(loop_device::path(number)),
        }
    }

    pub fn is_making(&self) -> bool {
        self.stage == Stage::Making
    }

    pub fn is_removing(&self) -> bool {
        matches!(self.stage, Stage::Removing(_))
    }

    pub fn fuse(&self) -> &OwnedFd {
        &self.fuse
    }

    pub fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut SourceFd(&self.fuse.as_raw_fd()), token, Interest::READABLE)
    }

    pub fn deregister(&self, registry: &Registry) {
        if let Err(error) = registry.deregister(&mut SourceFd(&self.fuse.as_raw_fd())) {
            tracing::warn!(volume = %self.volume, %error, "a device's descriptor stays watched");
        }
    }

    pub fn on_ready(&mut self) {
        self.readable = true;
    }

    pub fn on_made(&mut self, number: u32) {
        self.stage = Stage::Ready(number);
    }

    pub fn on_kept(&mut self) {
        if let Stage::Removing(number) = self.stage {
            self.stage = Stage::Ready(number);
        }
    }

    /// The loop device learns of it from a thread of its own, which asks this one for the file's size.
    pub fn on_resized(&mut self, geometry: Geometry) {
        self.session.set_geometry(geometry);
        let Stage::Ready(number) = self.stage else { return };
        let volume = self.volume;
        let spawned = std::thread::Builder::new().name("device".into()).spawn(move || {
            if let Err(error) = loop_device::grow(number) {
                tracing::error!(%volume, error = error.text(), "the device keeps its size");
            }
        });
        if let Err(error) = spawned {
            tracing::error!(%volume, %error, "the device keeps its size");
        }
    }

    /// Begins to end the loop device; [`Outcome::Removed`] tells the end of that. The device is served meanwhile: its
    /// last writes come now.
    pub fn remove(&mut self, removal: Removal, devices: &Devices) -> io::Result<()> {
        let Stage::Ready(number) = self.stage else { return Ok(()) };
        let name = self.name.clone();
        devices.start(self.volume, move || Outcome::Removed(loop_device::remove(number, &name, removal)))?;
        self.stage = Stage::Removing(number);
        Ok(())
    }

    /// Reads one request and answers it, or leaves its parts in `pending`.
    pub fn turn(&mut self, devices: &mut Devices) -> Turn {
        if !self.readable || self.ended {
            return Turn::Waits;
        }
        assert!(self.pending.is_empty(), "a request is read after the last one was taken");
        let length = match rustix::io::read(&self.fuse, &mut devices.buffer[..]) {
            Ok(length) => length,
            Err(rustix::io::Errno::AGAIN) => {
                self.readable = false;
                return Turn::Waits;
            }
            // The request was taken back while it was read.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => return Turn::Progress,
            Err(rustix::io::Errno::NODEV) => return self.end("the loop device is gone".into()),
            Err(error) => return self.end(format!("reading its requests failed: {error}")),
        };
        let request = Bytes::copy_from_slice(&devices.buffer[..length]);
        match self.session.on_request(&request) {
            Ok(Input::Reply(reply)) => self.reply(&reply),
            Ok(Input::Requests(requests)) => self.pending.extend(requests),
            Ok(Input::Nothing) => {}
            Ok(Input::End) => return self.end("the kernel has ended the file system".into()),
            Err(error) => return self.end(format!("the kernel sent what is no request: {error}")),
        }
        Turn::Progress
    }

    pub fn on_completion(&mut self, completion: Completion) {
        if let Some(reply) = self.session.on_completion(completion) {
            self.reply(&reply);
        }
    }

    fn end(&mut self, reason: String) -> Turn {
        self.ended = true;
        if self.is_removing() { Turn::Waits } else { Turn::Ended(reason) }
    }

    fn reply(&mut self, reply: &Reply) {
        let written = rustix::io::writev(&self.fuse, &[IoSlice::new(&reply.header), IoSlice::new(&reply.data)]);
        match written {
            Ok(_) => {}
            // Nobody waits for it any more.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::PERM) => {}
            Err(error) => tracing::error!(volume = %self.volume, %error, "the kernel does not take a reply"),
        }
    }
}

/// Why this machine cannot have devices.
pub(crate) fn check_machine() -> Result<(), String> {
    loop_device::check_machine().map_err(|error| error.text())
}
