//! Certificates that are replaced while the node runs: looked at now and then, and on SIGHUP.
//!
//! Connections keep what they began with; new ones, both ways, use what the files say now. Files that cannot be used
//! change nothing: they may be half way through being replaced.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_transport::TlsConfigs;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Services;
use crate::control::{Answer, Call};

/// Between two looks; certificates are replaced long before they end.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// For as long as the node runs.
pub(crate) async fn keep(services: Arc<Services>, tls: watch::Sender<TlsConfigs>) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut looked_at = services.config.credential_files();
    loop {
        tokio::select! { _ = hangup.recv() => {}, () = tokio::time::sleep(LOOK_EVERY) => {} }
        let found = services.config.credential_files();
        if found == looked_at {
            continue;
        }
        looked_at = found;
        match replace(&services, &tls).await {
            Ok(()) => tracing::info!("the certificates were replaced: new connections use them"),
            Err(error) => tracing::error!("the certificates in the folder cannot be used: {error:#}"),
        }
    }
}

async fn replace(services: &Services, tls: &watch::Sender<TlsConfigs>) -> Result<()> {
    let (identity, roots) = services.config.credentials()?;
    let id = identity.peer().id;
    ensure!(id == services.node.as_u128(), "the certificate is another node's: {id:032x}");
    let configs = TlsConfigs::new(&identity, &roots).context("they make no TLS configuration")?;
    if let Answer::Refused(reason) = services.control.call(Call::Credentials(Box::new((identity, roots)))).await {
        anyhow::bail!(reason);
    }
    tls.send_replace(configs);
    Ok(())
}
