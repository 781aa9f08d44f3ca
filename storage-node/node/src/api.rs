//! The control thread: gRPC over the cluster's mutual TLS, registration with the metadata plane, signals.

mod cluster;
mod convert;
mod credentials;
mod health;
mod metrics;
mod node;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_api::channel;
use holdfast_api::refusal::{self, LeaderHint};
use holdfast_api::v1;
use holdfast_api::v1::cluster_client::ClusterClient;
use holdfast_api::v1::cluster_server::ClusterServer;
use holdfast_api::v1::node_server::NodeServer;
use holdfast_id::{NodeId, ReplicaId, VolumeId};
use holdfast_metadata::Catalogue;
use holdfast_shard::{AdminError, AdminReply, AdminRequest, NodeAddress, ShardReport};
use holdfast_transport::TlsConfigs;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tonic::transport::{Channel, Server};
use tonic::{Code, Status};

use crate::addresses::Address;
use crate::config::Config;
use crate::control::{Answer, Call, DiskState, DiskView};
use crate::rim::Control;

/// How long the data thread may take to answer; beyond it something is wrong with the disk or the quorum.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A call from node to node.
const PEER_WITHIN: Duration = Duration::from_secs(2);
/// Between two attempts to register, and between two reports once registered: new nodes are known to all within that.
const REGISTER_EVERY: Duration = Duration::from_millis(250);
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// What every service needs.
pub(crate) struct Services {
    pub(crate) config: Arc<Config>,
    pub(crate) control: Control,
    tls: watch::Receiver<TlsConfigs>,
    channels: Mutex<Channels>,
    pub(crate) node: NodeId,
    pub(crate) started: Instant,
}

/// Channels to other nodes by address, kept: a handshake costs more than many calls.
struct Channels {
    /// What those were opened with.
    tls: watch::Receiver<TlsConfigs>,
    open: BTreeMap<String, Channel>,
}

/// Serves until a signal, or until the data thread has ended by itself; stops the data thread, also where it fails.
pub(crate) fn serve(
    config: &Arc<Config>,
    control: Control,
    listener: std::net::TcpListener,
    http: Option<std::net::TcpListener>,
    ended: oneshot::Receiver<()>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let result = serve_calls(config, &control, listener, http, ended).await;
        control.call(Call::Stop).await;
        result
    })
}

async fn serve_calls(
    config: &Arc<Config>,
    control: &Control,
    listener: std::net::TcpListener,
    http: Option<std::net::TcpListener>,
    ended: oneshot::Receiver<()>,
) -> Result<()> {
    let (identity, roots) = config.credentials()?;
    let tls = TlsConfigs::new(&identity, &roots).context("certificates make no TLS configuration")?;
    let node = NodeId::from_bytes(identity.peer().id.to_be_bytes()).context("the certificate names no node")?;
    listener.set_nonblocking(true).context("listen without blocking")?;
    let listener = TcpListener::from_std(listener).context("listen")?;
    let http = http.map(|http| {
        http.set_nonblocking(true)?;
        TcpListener::from_std(http)
    });
    let http = http.transpose().context("listen for probes")?;
    let (tls_changes, tls) = watch::channel(tls);
    let context = Arc::new(Services {
        config: Arc::clone(config),
        control: control.clone(),
        tls: tls.clone(),
        channels: Mutex::new(Channels { tls: tls.clone(), open: BTreeMap::new() }),
        node,
        started: Instant::now(),
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {}, _ = ended => {} }
        // At once, and not only when the last call has ended: others are to lead what this node leads.
        control.call(Call::Stop).await;
    };
    let mut tasks = vec![
        tokio::spawn(register(Arc::clone(&context))),
        tokio::spawn(watch_credentials(Arc::clone(&context), tls_changes)),
    ];
    if let Some(http) = http {
        let source = Arc::new(metrics::NodeSource(Arc::clone(&context)));
        tasks.push(tokio::spawn(async move { match holdfast_http::serve(http, source).await {} }));
    }
    let served = Server::builder()
        .add_service(NodeServer::from_arc(Arc::clone(&context)))
        .add_service(ClusterServer::from_arc(context))
        .serve_with_incoming_shutdown(channel::incoming(listener, tls), stop)
        .await;
    tasks.iter().for_each(|task| task.abort());
    served.context("the control API failed")
}

impl Services {
    /// Asks the data thread; a refusal becomes a status.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, Status> {
        match tokio::time::timeout(ANSWER_WITHIN, self.control.call(call)).await {
            Ok(Answer::Refused(reason)) => Err(refusal::refuse(Code::FailedPrecondition, "NotReady", &reason)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(refusal::refuse(
                Code::DeadlineExceeded,
                "NoAnswer",
                "no answer within ten seconds: the metadata plane has no quorum, or the disk hangs",
            )),
        }
    }

    pub(crate) async fn admin(&self, request: AdminRequest) -> Result<AdminReply, Status> {
        let what = match request {
            AdminRequest::Attach(_) | AdminRequest::Detach { .. } => "the volume",
            _ => "the metadata plane",
        };
        match self.call(Call::Shard(request)).await? {
            Answer::Shard(AdminReply::Failed(AdminError::NotLeader { leader })) => {
                Err(refusal::not_leader(what, self.hint(leader).await.as_ref()))
            }
            Answer::Shard(AdminReply::Failed(error)) => Err(convert::failed(&error)),
            Answer::Shard(reply) => Ok(reply),
            answer => Err(Status::internal(format!("an answer of the wrong kind: {answer:?}"))),
        }
    }

    async fn hint(&self, leader: Option<NodeId>) -> Option<LeaderHint> {
        let node = leader?;
        // Members of the metadata group know them as of what they have applied, others as of their last registration.
        let api_address = self.addresses().await.remove(&node)?.api;
        Some(LeaderHint { node_id: node.to_string(), api_address })
    }

    /// Where nodes were last known to be; none while this one belongs to no cluster.
    async fn addresses(&self) -> BTreeMap<NodeId, Address> {
        match self.call(Call::Addresses).await {
            Ok(Answer::Addresses(addresses)) => addresses,
            _ => BTreeMap::new(),
        }
    }

    /// What new connections show and trust.
    pub(crate) fn tls(&self) -> TlsConfigs {
        self.tls.borrow().clone()
    }

    pub(crate) async fn catalogue(&self) -> Result<Arc<Catalogue>, Status> {
        match self.admin(AdminRequest::Catalogue).await? {
            AdminReply::Catalogue(catalogue) => Ok(catalogue),
            reply => Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
        }
    }

    pub(crate) async fn report(&self) -> Result<Box<ShardReport>, Status> {
        match self.admin(AdminRequest::Report).await? {
            AdminReply::Report(report) => Ok(report),
            reply => Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
        }
    }

    /// Another node's control API. The channel connects anew by itself where it has to.
    pub(crate) async fn peer(&self, address: &str) -> Result<Channel, Status> {
        let tls = {
            let mut channels = self.channels.lock().expect("no holder panics");
            if channels.tls.has_changed().unwrap_or(false) {
                channels.open.clear();
            }
            if let Some(channel) = channels.open.get(address) {
                return Ok(channel.clone());
            }
            channels.tls.borrow_and_update().clone()
        };
        let channel = channel::connect(address, &tls, PEER_WITHIN).await;
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut channels = self.channels.lock().expect("no holder panics");
        if !channels.tls.has_changed().unwrap_or(false) {
            channels.open.insert(address.to_owned(), channel.clone());
        }
        Ok(channel)
    }

    /// Formats an empty disk where the node was told to join.
    async fn maybe_format(&self) {
        let Some(join) = &self.config.join else { return };
        if matches!(self.call(Call::Probe).await, Ok(Answer::Disk(DiskView { state: DiskState::Empty, .. }))) {
            tracing::info!(cluster = %join.cluster, "the disk is empty: it is formatted and joins");
            if let Err(status) = self.call(Call::Format { cluster: join.cluster }).await {
                tracing::error!(%status, "the disk cannot be formatted");
            }
        }
    }

    /// What this node tells the catalogue of itself; `None` while it belongs to no cluster.
    async fn registration(&self) -> Option<v1::RegisterRequest> {
        let Ok(Answer::Disk(view)) = self.call(Call::Probe).await else { return None };
        let (disk, failed) = match view.state {
            DiskState::Formatted(superblock) => (superblock.disk, false),
            _ => return None,
        };
        let Ok(AdminReply::Usage(usage)) = self.admin(AdminRequest::Usage).await else { return None };
        Some(v1::RegisterRequest {
            node_id: self.node.to_string(),
            name: self.config.name.clone(),
            peer_address: self.config.peer_address(),
            api_address: self.config.api_address(),
            zone: self.config.zone.clone().unwrap_or_default(),
            disk_id: disk.to_string(),
            capacity_bytes: usage.data_total,
            free_bytes: usage.data_total.saturating_sub(usage.data_used + usage.data_reserved),
            disk_failed: failed,
        })
    }
}

async fn watch_credentials(services: Arc<Services>, tls: watch::Sender<TlsConfigs>) {
    if let Err(error) = credentials::keep(services, tls).await {
        tracing::error!(%error, "no signals: certificates that are replaced count from the next start on");
    }
}

/// Tells the metadata plane who this node is and how full its disk is, and learns where the others are.
async fn register(services: Arc<Services>) {
    let mut pause = REGISTER_EVERY;
    let mut told = String::new();
    services.maybe_format().await;
    loop {
        tokio::time::sleep(pause).await;
        let Some(request) = services.registration().await else { continue };
        match register_once(&services, &request).await {
            Ok(nodes) => {
                pause = REPORT_EVERY;
                services.control.call(Call::Learn(nodes)).await;
            }
            Err(status) if refusal::reason(&status).is_some_and(|code| code != refusal::NOT_LEADER) => {
                // The cluster does not want this node or its disk as they are: a person has to look.
                pause = REPORT_EVERY;
                if told != status.message() {
                    tracing::error!(reason = status.message(), "the cluster refuses this node");
                    told = status.message().to_owned();
                }
            }
            Err(status) => {
                pause = REGISTER_EVERY;
                tracing::debug!(%status, "not registered yet");
            }
        }
    }
}

/// At this node if it leads the metadata plane, else where it says, else anywhere.
async fn register_once(services: &Services, request: &v1::RegisterRequest) -> Result<Vec<NodeAddress>, Status> {
    let mut last = match cluster::register(services, request).await {
        Ok(response) => return convert::addresses(response.nodes),
        Err(status) => status,
    };
    let mut addresses: Vec<String> = refusal::leader(&last).into_iter().map(|hint| hint.api_address).collect();
    addresses.extend(services.addresses().await.into_values().map(|address| address.api));
    addresses.extend(services.config.join.iter().flat_map(|join| join.seeds.clone()));
    for address in addresses {
        let result = async {
            let channel = services.peer(&address).await?;
            ClusterClient::new(channel).register(request.clone()).await
        };
        match result.await {
            Ok(response) => return convert::addresses(response.into_inner().nodes),
            Err(status) => last = status,
        }
    }
    Err(last)
}

pub(crate) fn random_id() -> Result<[u8; 16], Status> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Status::internal(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

pub(crate) fn new_volume_id() -> Result<VolumeId, Status> {
    VolumeId::from_bytes(random_id()?).ok_or_else(|| Status::internal("a random identifier of all zeroes"))
}

pub(crate) fn new_replica_id() -> Result<ReplicaId, Status> {
    ReplicaId::from_bytes(random_id()?).ok_or_else(|| Status::internal("a random identifier of all zeroes"))
}
