//! [`Credentials`]: certificates that are replaced while the agent runs, looked at by a thread of their own, for a slow
//! disk must not delay I/O.
//!
//! Connections keep what they began with; new ones use what the files say now. Files that cannot be used change
//! nothing: they may be half way through being replaced.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use holdfast_transport::PeerRole;
use holdfast_transport::pki::{Identity, PkiError, Roots};
use mio::Waker;

use crate::config::IdentityPaths;

/// Between two looks; certificates are replaced long before they end.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What the thread has found since it was last asked. It ends with this.
pub(crate) struct Credentials {
    replaced: Receiver<(Identity, Roots)>,
    _stop: Sender<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("the certificate is that of machine {certified}, this is {holder}: configure the right files or holder")]
    OtherMachine { certified: String, holder: String },
}

/// What this machine shows and whom it trusts; checked, so that a wrong one is told before the peers do.
///
/// # Errors
/// A file that cannot be read, or a certificate that is expired, another role's, machine's or authority's.
pub(crate) fn load(paths: &IdentityPaths, holder: &str) -> Result<(Identity, Roots), CredentialsError> {
    let identity = Identity::load(&paths.certificate, &paths.key)?;
    let roots = Roots::load(&paths.roots)?;
    check(&identity, &roots, holder, SystemTime::now())?;
    Ok((identity, roots))
}

pub(crate) fn check(identity: &Identity, roots: &Roots, holder: &str, now: SystemTime) -> Result<(), CredentialsError> {
    match &identity.bearer().holder {
        Some(certified) if **certified != *holder => {
            Err(CredentialsError::OtherMachine { certified: certified.to_string(), holder: holder.to_owned() })
        }
        Some(_) => Ok(identity.check(PeerRole::NodeAgent, roots, now)?),
        None => Ok(identity.check(PeerRole::Agent, roots, now)?),
    }
}

impl Credentials {
    /// `waker` ends the agent's wait when there is something to take.
    pub(crate) fn watch(paths: IdentityPaths, holder: String, waker: Arc<Waker>) -> io::Result<Credentials> {
        let (found, replaced) = channel();
        let (stop, stopped) = channel::<()>();
        let mut looked_at = contents(&paths);
        thread::Builder::new().name("certificates".into()).spawn(move || {
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = contents(&paths);
                if now == looked_at {
                    continue;
                }
                looked_at = now;
                match load(&paths, &holder) {
                    Ok(credentials) => {
                        if found.send(credentials).is_err() {
                            return;
                        }
                        // It fails only where the agent has ended.
                        let _ = waker.wake();
                    }
                    Err(error) => tracing::error!(%error, "the certificates in the folder cannot be used"),
                }
            }
        })?;
        Ok(Credentials { replaced, _stop: stop })
    }

    pub(crate) fn take(&self) -> Option<(Identity, Roots)> {
        self.replaced.try_iter().last()
    }
}

fn contents(paths: &IdentityPaths) -> [Option<Vec<u8>>; 3] {
    [&paths.certificate, &paths.key, &paths.roots].map(|path| fs::read(path).ok())
}
