//! The keeper: holds the descriptors of FUSE devices while no agent does, so that a device outlives its agent.
//!
//! The kernel ends a FUSE file system when its last descriptor closes. One copy here keeps it, and its unanswered
//! requests, until the next agent takes the descriptor and asks for them again. The keeper reads no request, knows no
//! volume, and does so little that there is no reason for it ever to end or to be replaced; if it ends nevertheless,
//! the agent starts another one and hands it the descriptors anew. Only both ending at once lose the devices.
//!
//! What holds:
//! 1. A descriptor is handed out only after its owner's connection is at its end, so when the last thread of the
//!    owner is gone: two processes never answer for one device.
//! 2. Only processes of the keeper's own user and root are heard.
//! 3. Where an agent has started it, it ends by itself once it holds nothing and nobody is connected.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_id::VolumeId;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit};

use crate::packet::{self, KEEPER_VERSION, Reply, Request};
use crate::socket::with_owner_only_umask;

/// Devices of one machine.
pub(crate) const ENTRIES_MAX: usize = 512;
/// One agent, its successor, and whoever looks.
const CONNECTIONS_MAX: usize = 8;
/// Between two looks for descriptors whose file system has ended. Their error state is not waited for: a descriptor
/// whose file system is not made yet has it too, and the wait would never sleep.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long a keeper waits for the agent that started it.
const IDLE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("another keeper serves {0}")]
    Running(PathBuf),
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("waiting for connections failed")]
    Poll(#[source] io::Error),
}

struct Entry {
    descriptor: OwnedFd,
    note: serde_json::Value,
    /// The connection of the process that serves it.
    owner: Option<u64>,
}

pub struct Keeper {
    entries: BTreeMap<VolumeId, Entry>,
    connections: BTreeMap<u64, OwnedFd>,
    connection_next: u64,
    listener: OwnedFd,
    path: PathBuf,
    idle_since: Instant,
    /// Held as long as the keeper lives.
    _lock: File,
}

impl Keeper {
    /// Serves for ever, or `until_idle`: until there is nothing to keep and nobody to keep it for.
    ///
    /// # Errors
    /// Another keeper is there, or the socket cannot be used.
    pub fn run(path: &Path, until_idle: bool) -> Result<(), KeeperError> {
        // A descriptor is held for every device; the usual limit is made for programs with few.
        let limit = rustix::process::getrlimit(Resource::Nofile);
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
        Keeper::bind(path)?.serve(until_idle)
    }

    fn bind(path: &Path) -> Result<Keeper, KeeperError> {
        let failed = |source: io::Error| KeeperError::Io { path: path.to_owned(), source };
        let lock = path.with_extension("lock");
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(KeeperError::Running(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        // The lock says that whoever bound it is dead.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let bind = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            let address = SocketAddrUnix::new(path)?;
            with_owner_only_umask(|| rustix::net::bind(&listener, &address))?;
            rustix::net::listen(&listener, CONNECTIONS_MAX as i32)?;
            Ok(listener)
        };
        Ok(Keeper {
            entries: BTreeMap::new(),
            connections: BTreeMap::new(),
            connection_next: 0,
            listener: bind().map_err(failed)?,
            path: path.to_owned(),
            idle_since: Instant::now(),
            _lock: lock,
        })
    }

    fn serve(mut self, until_idle: bool) -> Result<(), KeeperError> {
        loop {
            self.turn(LOOK_EVERY)?;
            if !self.entries.is_empty() || !self.connections.is_empty() {
                self.idle_since = Instant::now();
            } else if until_idle && self.idle_since.elapsed() >= IDLE_MAX {
                let _ = fs::remove_file(&self.path);
                return Ok(());
            }
        }
    }

    /// Waits for something to do, not longer than `wait`, and does it.
    fn turn(&mut self, wait: Duration) -> Result<(), KeeperError> {
        let (listener, serials) = self.wait(wait).map_err(KeeperError::Poll)?;
        // Who has gone is noticed before anybody is told that something is still owned.
        for serial in serials {
            self.hear(serial);
        }
        if listener {
            self.accept();
        }
        self.forget_ended();
        Ok(())
    }

    fn wait(&self, wait: Duration) -> io::Result<(bool, Vec<u64>)> {
        let mut watched = vec![PollFd::new(&self.listener, PollFlags::IN)];
        watched.extend(self.connections.values().map(|connection| PollFd::new(connection, PollFlags::IN)));
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        match rustix::event::poll(&mut watched, Some(&wait)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok((false, Vec::new())),
            Err(error) => return Err(error.into()),
        }
        let ready = |watched: &PollFd<'_>| !watched.revents().is_empty();
        let serials = self.connections.keys().zip(&watched[1..]).filter(|(_, fd)| ready(fd)).map(|(serial, _)| *serial);
        Ok((ready(&watched[0]), serials.collect()))
    }

    fn accept(&mut self) {
        while let Ok(connection) =
            rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            let own = rustix::process::geteuid().as_raw();
            let known = packet::peer_user(&connection).is_ok_and(|user| user == own || user == 0);
            if !known || self.connections.len() >= CONNECTIONS_MAX {
                continue;
            }
            self.connection_next += 1;
            self.connections.insert(self.connection_next, connection);
        }
    }

    /// Answers what has come on the connection, or lets go of it.
    fn hear(&mut self, serial: u64) {
        while let Some(connection) = self.connections.get(&serial) {
            match packet::receive::<Request>(connection, RecvFlags::DONTWAIT) {
                Ok(Some((request, descriptor))) => {
                    let (reply, taken) = self.answer(serial, request, descriptor);
                    let descriptor = taken.and_then(|id| self.entries.get(&id)).map(|entry| entry.descriptor.as_fd());
                    let connection = self.connections.get(&serial).expect("it was there a few lines ago");
                    if packet::send(connection, &reply, descriptor, SendFlags::DONTWAIT).is_err() {
                        return self.close(serial);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => return self.close(serial),
            }
        }
    }

    fn close(&mut self, serial: u64) {
        self.connections.remove(&serial);
        for entry in self.entries.values_mut().filter(|entry| entry.owner == Some(serial)) {
            entry.owner = None;
        }
    }

    /// The reply, and the volume whose descriptor goes with it.
    fn answer(&mut self, serial: u64, request: Request, descriptor: Option<OwnedFd>) -> (Reply, Option<VolumeId>) {
        let refused = |message: String| (Reply::Refused { message }, None);
        if request.version() != KEEPER_VERSION {
            return refused(format!("version {} is not spoken here, {KEEPER_VERSION} is", request.version()));
        }
        match (request, descriptor) {
            (Request::Put { volume, note, .. }, Some(descriptor)) => {
                match self.entries.get(&volume) {
                    Some(entry) if entry.owner != Some(serial) => return (Reply::Busy, None),
                    None if self.entries.len() >= ENTRIES_MAX => {
                        return refused(format!("it holds {ENTRIES_MAX} devices already"));
                    }
                    _ => {}
                }
                self.entries.insert(volume, Entry { descriptor, note, owner: Some(serial) });
                (Reply::Done, None)
            }
            (Request::Put { .. }, None) => refused("no descriptor came with it".into()),
            (Request::Take { .. }, _) => {
                let others = self.entries.values().any(|entry| entry.owner != Some(serial));
                match self.entries.iter_mut().find(|(_, entry)| entry.owner.is_none()) {
                    Some((volume, entry)) => {
                        entry.owner = Some(serial);
                        (Reply::Taken { volume: *volume, note: entry.note.clone() }, Some(*volume))
                    }
                    None if others => (Reply::Busy, None),
                    None => (Reply::Nothing, None),
                }
            }
            (Request::Drop { volume, .. }, _) => match self.entries.get(&volume) {
                Some(entry) if entry.owner != Some(serial) => (Reply::Busy, None),
                _ => {
                    self.entries.remove(&volume);
                    (Reply::Done, None)
                }
            },
        }
    }

    /// Closes what nobody owns and nobody can serve any more.
    fn forget_ended(&mut self) {
        self.entries.retain(|_, entry| {
            let mut watched = [PollFd::new(&entry.descriptor, PollFlags::empty())];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let ended =
                rustix::event::poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::ERR);
            entry.owner.is_some() || !ended
        });
    }
}

#[cfg(test)]
mod tests;
