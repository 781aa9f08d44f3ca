//! A gRPC server on a Unix socket, as CSI and kubelet want it.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;

use crate::authority;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("{0} is there and is no socket: it is somebody else's")]
    NotASocket(PathBuf),
    #[error("signals cannot be waited for")]
    Signal(#[source] io::Error),
    #[error("the server on {path} failed")]
    Serve { path: PathBuf, source: tonic::transport::Error },
}

/// Listens on `path`, in place of a socket that an earlier process has left. Only root and this user may connect.
pub fn listen(path: &Path) -> Result<UnixListenerStream, ServerError> {
    let failed = |source| ServerError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(ServerError::NotASocket(path.to_owned())),
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(failed)?;
        }
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // The sidecars of the controller run as another user of the same group.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(UnixListenerStream::new(listener))
}

/// Becomes true when the process is told to end.
pub fn shutdown() -> Result<watch::Receiver<bool>, ServerError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Signal)?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to end; what is under way is finished");
        // Nobody listens any more: it ends already.
        let _ = sender.send(true);
    });
    Ok(receiver)
}

/// Serves until the shutdown; calls that are under way are answered first.
pub async fn serve(
    routes: tonic::service::Routes,
    path: &Path,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let incoming = listen(path)?.map(|connection| connection.map(authority::relay));
    let ended = async move {
        // An error means that nobody can tell any more: it ends then, too.
        let _ = shutdown.wait_for(|ends| *ends).await;
    };
    let server = tonic::transport::Server::builder().add_routes(routes);
    server
        .serve_with_incoming_shutdown(incoming, ended)
        .await
        .map_err(|source| ServerError::Serve { path: path.to_owned(), source })
}
