//! [`Client`]: one cluster, as whoever uses its API sees it.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_api::v1::cluster_client::ClusterClient;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_api::{channel, refusal, v1};
use holdfast_transport::TlsConfigs;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::error::{CallError, is_worth_another_try, message, unreachable};

/// For a name to be resolved.
const RESOLVE_WITHIN: Duration = Duration::from_secs(3);
/// Between two rounds over nodes of which none leads: an election takes several hundred milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long a call may take.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// One call at one node, the handshake included.
    pub call: Duration,
    /// For a node that leads to be found; a call that one has begun is not cut short by it.
    pub leader: Duration,
}

impl Default for Times {
    /// Creating a volume waits for its copies, for up to thirty seconds; elections end within a few.
    fn default() -> Times {
        Times { call: Duration::from_secs(40), leader: Duration::from_secs(10) }
    }
}

/// Cheap to clone; clones share what they know of the leader. Certificates that are replaced take a new client.
#[derive(Clone)]
pub struct Client {
    endpoints: Arc<[String]>,
    tls: TlsConfigs,
    times: Times,
    /// Where the metadata plane was led last, to be asked first.
    led: Arc<Mutex<Option<Channel>>>,
}

/// What one attempt at one node came to.
enum Attempt<T> {
    Done(T),
    /// Somebody else has to be asked; `hint`: who, as this node says.
    Elsewhere {
        hint: Option<String>,
        last: String,
        certificate: bool,
    },
    Failed(CallError),
}

impl Client {
    /// `endpoints` are API addresses, `host:port`, of some of the cluster's nodes; more survive the loss of the first.
    pub fn new(endpoints: Vec<String>, tls: TlsConfigs) -> Client {
        Client { endpoints: endpoints.into(), tls, times: Times::default(), led: Arc::default() }
    }

    #[must_use]
    pub fn with_times(mut self, times: Times) -> Client {
        self.times = times;
        self
    }

    /// The service `Node` of the node at this address.
    ///
    /// # Errors
    /// Nobody there, or nobody that we may speak to.
    pub async fn node(&self, address: &str) -> Result<NodeClient<Channel>, CallError> {
        match channel::connect(address, &self.tls, self.times.call).await {
            Ok(channel) => Ok(NodeClient::new(channel)),
            Err(error) if channel::is_certificate_refused(&error) => Err(CallError::CertificateRefused {
                what: address.to_owned(),
                last: unreachable(address, &error).to_string(),
            }),
            Err(error) => Err(unreachable(address, &error)),
        }
    }

    /// Calls the metadata leader, wherever it is.
    ///
    /// # Errors
    /// The leader's refusal, or nobody led within the client's times.
    pub async fn call<T, F, R>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(ClusterClient<Channel>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let known = self.led.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(channel) = known {
            match attempt(call(ClusterClient::new(channel)).await) {
                Attempt::Done(answer) => return Ok(answer),
                Attempt::Failed(error) => return Err(error),
                Attempt::Elsewhere { .. } => self.remember(None),
            }
        }
        let endpoints = self.endpoints.to_vec();
        self.follow("the metadata plane", endpoints, |channel| {
            let (client, call) = (ClusterClient::new(channel.clone()), &call);
            async move {
                let result = attempt(call(client).await);
                if let Attempt::Done(_) | Attempt::Failed(_) = result {
                    self.remember(Some(channel));
                }
                result
            }
        })
        .await
    }

    /// Calls the node that leads the volume, wherever it is.
    ///
    /// # Errors
    /// That node's refusal, nobody led within the client's times, or there is no such volume.
    pub async fn call_volume<T, F, R>(&self, volume_id: &str, call: F) -> Result<T, CallError>
    where
        F: Fn(NodeClient<Channel>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let request = v1::GetVolumeRequest { volume: volume_id.to_owned() };
        let volume = self.call(|mut client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        });
        let volume = volume.await?.volume.unwrap_or_default();
        let nodes =
            self.call(|mut client| async move { client.list_nodes(v1::ListNodesRequest {}).await }).await?.nodes;
        let mut holders: Vec<&v1::ClusterNode> =
            nodes.iter().filter(|node| volume.replicas.iter().any(|r| r.node_id == node.node_id)).collect();
        holders.sort_by_key(|node| node.node_id != volume.leader_node_id);
        let addresses = holders.into_iter().map(|node| node.api_address.clone()).collect();
        self.follow(&format!("volume {volume_id}"), addresses, |channel| {
            let (client, call) = (NodeClient::new(channel), &call);
            async move { attempt(call(client).await) }
        })
        .await
    }

    fn remember(&self, led: Option<Channel>) {
        *self.led.lock().unwrap_or_else(PoisonError::into_inner) = led;
    }

    /// Asks one after the other, and at once who is named as the leader, for as long as there may be one.
    async fn follow<T, F, R>(&self, what: &str, addresses: Vec<String>, ask: F) -> Result<T, CallError>
    where
        F: Fn(Channel) -> R,
        R: Future<Output = Attempt<T>>,
    {
        let until = Instant::now() + self.times.leader;
        let mut hint: Option<String> = None;
        let mut said = "no node is known".to_owned();
        loop {
            // No node accepts our certificate, or we not theirs.
            let mut refused = !addresses.is_empty();
            let mut round: Vec<String> = hint.take().into_iter().collect();
            for address in &addresses {
                round.extend(each(address).await);
            }
            for address in &round {
                let channel = match channel::connect(address, &self.tls, self.times.call).await {
                    Ok(channel) => channel,
                    Err(error) => {
                        refused &= channel::is_certificate_refused(&error);
                        said = unreachable(address, &error).to_string();
                        continue;
                    }
                };
                match ask(channel).await {
                    Attempt::Done(answer) => return Ok(answer),
                    Attempt::Failed(error) => return Err(error),
                    Attempt::Elsewhere { hint: named, last, certificate } => {
                        refused &= certificate;
                        said = last;
                        hint = named;
                        if hint.is_some() || Instant::now() >= until {
                            break;
                        }
                    }
                }
            }
            if refused {
                return Err(CallError::CertificateRefused { what: what.to_owned(), last: said });
            }
            if Instant::now() >= until {
                return Err(CallError::NoLeader { what: what.to_owned(), last: said });
            }
            if hint.is_none() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// Every address that a name stands for: only some of the nodes behind the name of a cluster may know who leads it.
async fn each(address: &str) -> Vec<String> {
    let found = tokio::time::timeout(RESOLVE_WITHIN, tokio::net::lookup_host(address)).await;
    let found: BTreeSet<SocketAddr> = found.ok().and_then(Result::ok).map(Iterator::collect).unwrap_or_default();
    match found.len() {
        // As it was given: whoever connects says what is wrong with it.
        0 | 1 => vec![address.to_owned()],
        _ => found.into_iter().map(|address| address.to_string()).collect(),
    }
}

fn attempt<T>(result: Result<Response<T>, Status>) -> Attempt<T> {
    match result {
        Ok(response) => Attempt::Done(response.into_inner()),
        Err(status) if is_worth_another_try(&status) => Attempt::Elsewhere {
            hint: refusal::leader(&status).map(|leader| leader.api_address),
            certificate: channel::is_certificate_refused(&status),
            last: message(&status),
        },
        Err(status) => Attempt::Failed(CallError::refused(&status)),
    }
}
