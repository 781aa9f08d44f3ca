//! Listening Unix sockets: for this user only, taken over from a dead process, never from a live one.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mio::net::{UnixListener, UnixStream};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("{0} is served by a live process")]
    InUse(PathBuf),
    #[error("{0} exists and is no socket")]
    NotASocket(PathBuf),
    #[error("cannot listen at {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// A bound socket; its file goes when this goes.
#[derive(Debug)]
pub(crate) struct ServerSocket {
    pub listener: UnixListener,
    path: PathBuf,
}

impl ServerSocket {
    pub fn bind(path: &Path) -> Result<ServerSocket, SocketError> {
        let failed = |source| SocketError::Io { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                // Its process is dead: a socket's file outlives it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(failed)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // A full backlog is a live process too.
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(SocketError::InUse(path.to_owned()));
                }
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = with_owner_only_umask(|| UnixListener::bind(path)).map_err(failed)?;
        Ok(ServerSocket { listener, path: path.to_owned() })
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a socket's file stays behind");
        }
    }
}

/// The socket is never open to others, not even between its making and a change of its mode.
#[allow(unsafe_code)]
pub(crate) fn with_owner_only_umask<T>(make: impl FnOnce() -> T) -> T {
    // SAFETY: umask only sets a number of this process. The recording thread names its files' modes itself, and
    // none wider than this.
    let before = unsafe { libc::umask(0o177) };
    let made = make();
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    made
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dropped listener of std leaves its file");
        let live = ServerSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(ServerSocket::bind(&path), Err(SocketError::InUse(_))));
        drop(live);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_is_not_removed_for_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(ServerSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }
}
