//! The control API as the command line uses it: any node of the cluster will do, and says who leads.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use holdfast_api::v1::cluster_client::ClusterClient;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_api::{channel, refusal};
use holdfast_transport::TlsConfigs;
use holdfast_transport::pki::{Identity, Roots};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::dev::layout::{ClusterFile, NodeEntry};

/// One call; creating a volume waits for its copies.
const CALL_WITHIN: Duration = Duration::from_secs(40);
/// How long a command looks for a node that leads.
const LEADER_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub struct Cluster {
    pub file: ClusterFile,
    pub dir: PathBuf,
    tls: TlsConfigs,
}

impl Cluster {
    pub fn open(dir: &Path) -> Result<Cluster> {
        let file = ClusterFile::load(dir)?;
        let pki = ClusterFile::pki(dir);
        let identity = Identity::load(&pki.join("admin.pem"), &pki.join("admin.key"))?;
        let roots = Roots::load(&pki.join("ca.pem"))?;
        let dir = dir.to_owned();
        Ok(Cluster {
            file,
            dir,
            tls: TlsConfigs::new(&identity, &roots).context("certificates make no TLS configuration")?,
        })
    }

    pub fn nodes(&self) -> &[NodeEntry] {
        &self.file.nodes
    }

    pub async fn node(&self, address: &str) -> Result<NodeClient<Channel>> {
        Ok(NodeClient::new(channel::connect(address, &self.tls, CALL_WITHIN).await?))
    }

    /// Calls the metadata leader, wherever it is, as long as there may be one.
    pub async fn call<T, F, R>(&self, call: F) -> Result<T>
    where
        F: Fn(ClusterClient<Channel>) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let until = Instant::now() + LEADER_WITHIN;
        let mut hint: Option<String> = None;
        let mut last = anyhow!("the cluster has no nodes");
        loop {
            // No node accepts our certificate, or we not theirs: waiting mends nothing.
            let mut refused = true;
            let hinted = hint.take();
            for address in hinted.iter().chain(self.file.nodes.iter().map(|node| &node.api)) {
                let client = match channel::connect(address, &self.tls, CALL_WITHIN).await {
                    Ok(channel) => ClusterClient::new(channel),
                    Err(error) => {
                        refused &= channel::is_certificate_refused(&error);
                        last = error.into();
                        continue;
                    }
                };
                match call(client).await {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(status) if is_worth_another_try(&status) => {
                        refused &= channel::is_certificate_refused(&status);
                        hint = refusal::leader(&status).map(|leader| leader.api_address);
                        last = describe(&status);
                        if hint.is_some() {
                            break;
                        }
                    }
                    Err(status) => return Err(describe(&status)),
                }
            }
            if refused || Instant::now() >= until {
                return Err(last.context("no node answers for the metadata plane"));
            }
            if hint.is_none() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// Also where the connection broke under the call, as when that node is killed: every call may be repeated.
fn is_worth_another_try(status: &Status) -> bool {
    let broken = std::error::Error::source(status).is_some();
    broken || status.code() == Code::Unavailable || refusal::reason(status) == Some("NotReady")
}

fn describe(status: &Status) -> anyhow::Error {
    if let Some(reason) = refusal::reason(status) {
        return anyhow!("{} ({reason})", status.message());
    }
    // Where the connection broke under the call, only the innermost cause says why.
    let mut innermost = std::error::Error::source(status);
    while let Some(next) = innermost.and_then(std::error::Error::source) {
        innermost = Some(next);
    }
    match innermost {
        Some(cause) => anyhow!("{cause}; a node that always hangs up does not accept the certificate in this folder"),
        None => anyhow!("{}", status.message()),
    }
}

/// Runs one asynchronous command.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?.block_on(future)
}
