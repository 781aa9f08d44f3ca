//! The agent's end of the keeper: started where none runs and nobody else runs one, told of every device, asked once for
//! those left behind.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_id::VolumeId;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::KeeperConfig;
use crate::packet::{self, KEEPER_VERSION, Reply, Request};

/// A keeper answers within microseconds; one that does not is stopped, and the agent must not stop with it.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// For a keeper that was just started to listen.
const START_WITHIN: Duration = Duration::from_secs(5);
/// For the predecessor's last thread to end after it was killed.
const OWNER_GONE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub enum KeeperLinkError {
    #[error("the keeper at {0} does not begin to listen")]
    Start(PathBuf),
    #[error("the keeper cannot be started")]
    Spawn(#[source] io::Error),
    #[error("the keeper at {path} does not answer")]
    Io { path: PathBuf, source: io::Error },
    #[error("the keeper refuses: {0}")]
    Refused(String),
    #[error("another process still serves this agent's devices")]
    Busy,
}

/// A device that an earlier agent served.
pub(crate) struct Left {
    pub volume: VolumeId,
    pub note: serde_json::Value,
    pub descriptor: OwnedFd,
}

pub(crate) struct KeeperLink {
    config: KeeperConfig,
    socket: Option<OwnedFd>,
    /// The keeper that this process has started; waited for once it is gone.
    child: Option<Child>,
}

impl KeeperLink {
    pub fn new(config: KeeperConfig) -> KeeperLink {
        KeeperLink { config, socket: None, child: None }
    }

    /// Somebody else starts it, and starts it again.
    pub fn is_external(&self) -> bool {
        self.config.program.is_none()
    }

    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Everything that an earlier agent left with a keeper. Where there may be something, a keeper that others run is
    /// waited for: without it nobody could tell a device that waits for this agent from a dead one.
    ///
    /// # Errors
    /// A keeper is there, or should be, and cannot be asked: nothing may be done to the devices then.
    pub fn take_left(&mut self, expects_any: bool) -> Result<Vec<Left>, KeeperLinkError> {
        let until = Instant::now() + START_WITHIN;
        loop {
            match self.connect() {
                Ok(socket) => {
                    self.socket = Some(socket);
                    break;
                }
                Err(error) if is_nobody(&error) && self.config.program.is_none() && expects_any => {
                    if Instant::now() >= until {
                        return Err(KeeperLinkError::Start(self.config.socket.clone()));
                    }
                    std::thread::sleep(LOOK_EVERY);
                }
                Err(error) if is_nobody(&error) => return Ok(Vec::new()),
                Err(source) => return Err(self.io(source)),
            }
        }
        let until = Instant::now() + OWNER_GONE_WITHIN;
        let mut all = Vec::new();
        loop {
            match self.call(&Request::Take { version: KEEPER_VERSION }, None)? {
                (Reply::Taken { volume, note }, Some(descriptor)) => all.push(Left { volume, note, descriptor }),
                (Reply::Nothing, _) => return Ok(all),
                (Reply::Busy, _) if Instant::now() < until => std::thread::sleep(LOOK_EVERY),
                (reply, _) => return Err(refusal(reply)),
            }
        }
    }

    /// Starts a keeper where none runs; true where there is a new connection. One that others run is tried once.
    pub fn ensure(&mut self) -> Result<bool, KeeperLinkError> {
        if self.socket.is_some() {
            return Ok(false);
        }
        let Some(program) = self.config.program.clone() else {
            return match self.connect() {
                Ok(socket) => {
                    self.socket = Some(socket);
                    Ok(true)
                }
                Err(source) => Err(self.io(source)),
            };
        };
        let until = Instant::now() + START_WITHIN;
        loop {
            if let Ok(socket) = self.connect() {
                self.socket = Some(socket);
                return Ok(true);
            }
            // One that ends right now keeps its lock a moment longer, and the next one is started after it.
            if self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None))) {
                self.child = Some(self.spawn(&program).map_err(KeeperLinkError::Spawn)?);
            }
            if Instant::now() >= until {
                return Err(KeeperLinkError::Start(self.config.socket.clone()));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub fn put(
        &mut self,
        volume: VolumeId,
        note: serde_json::Value,
        fuse: BorrowedFd<'_>,
    ) -> Result<(), KeeperLinkError> {
        match self.call(&Request::Put { version: KEEPER_VERSION, volume, note }, Some(fuse))? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(refusal(reply)),
        }
    }

    /// The keeper closes its copy. Without a connection there is nothing to do: the next keeper is never told of it.
    pub fn drop_entry(&mut self, volume: VolumeId) -> Result<(), KeeperLinkError> {
        if self.socket.is_none() {
            return Ok(());
        }
        match self.call(&Request::Drop { version: KEEPER_VERSION, volume }, None)? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(refusal(reply)),
        }
    }

    /// After an event: true where the connection is lost.
    pub fn has_ended(&mut self) -> bool {
        let Some(socket) = &self.socket else { return false };
        // Every reply is waited for when it is asked for; what comes otherwise is the end.
        match packet::receive::<Reply>(socket, RecvFlags::DONTWAIT) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => false,
            Ok(_) | Err(_) => {
                self.socket = None;
                true
            }
        }
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let path = &self.config.socket;
        // Who owns the folder decides who serves in it.
        let folder = path.parent().filter(|_| self.config.program.is_none());
        let keeper = folder.map(std::fs::metadata).transpose()?.map(|folder| folder.uid());
        connect(path, keeper)
    }

    fn spawn(&self, program: &Path) -> io::Result<Child> {
        let mut command = Command::new(program);
        command.arg("keeper").arg("--until-idle").arg("--socket").arg(&self.config.socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0).spawn()
    }

    fn io(&self, source: io::Error) -> KeeperLinkError {
        KeeperLinkError::Io { path: self.config.socket.clone(), source }
    }

    fn call(
        &mut self,
        request: &Request,
        fuse: Option<BorrowedFd<'_>>,
    ) -> Result<(Reply, Option<OwnedFd>), KeeperLinkError> {
        let ended = || io::Error::from(io::ErrorKind::NotConnected);
        let result = match &self.socket {
            None => Err(ended()),
            Some(socket) => packet::send(socket, request, fuse, SendFlags::empty())
                .and_then(|()| packet::receive::<Reply>(socket, RecvFlags::empty())?.ok_or_else(ended)),
        };
        result.map_err(|source| {
            // A late answer would be taken for that of the next request.
            self.socket = None;
            self.io(source)
        })
    }
}

fn refusal(reply: Reply) -> KeeperLinkError {
    match reply {
        Reply::Busy => KeeperLinkError::Busy,
        Reply::Refused { message } => KeeperLinkError::Refused(message),
        reply => KeeperLinkError::Refused(format!("it answers {reply:?}")),
    }
}

/// Whether nobody serves there.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// To a keeper of our own user, or of `other`.
fn connect(path: &Path, other: Option<u32>) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(ANSWER_WITHIN))?;
    }
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let found = packet::peer_user(&socket)?;
    if found != rustix::process::geteuid().as_raw() && other != Some(found) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(socket)
}

#[cfg(test)]
mod tests;
