//! The node service: CSI's words in, [`Volumes`] called on a thread with the volume locked, gRPC codes out.

pub mod agent;
mod error;
mod health;
mod plan;
pub mod record;
mod request;
pub mod volumes;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use self::error::NodeError;
use self::request::{Publish, Stage};
use self::volumes::Volumes;
use crate::capability::Access;
use crate::csi::node_server::NodeServer;
use crate::csi::node_service_capability::{self, rpc::Type};
use crate::csi::{self, node_server, volume_usage};
use crate::identity::Ready;
use crate::locks::Locks;
use crate::metrics::Metrics;
use crate::{TOPOLOGY_NODE, rpc};

/// As many volumes as an agent takes.
const VOLUMES_MAX: i64 = 1024;
/// RPCs that work at once, each on a thread; the next ones wait for their turn until their caller gives up.
pub const WORKERS_MAX: usize = 48;

pub struct Node {
    name: String,
    volumes: Arc<Volumes>,
    locks: Locks,
    workers: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// Whether the agent answers.
pub struct AgentReady(pub Arc<Volumes>);

#[tonic::async_trait]
impl Ready for AgentReady {
    async fn is_ready(&self) -> bool {
        let volumes = self.0.clone();
        tokio::task::spawn_blocking(move || volumes.agent.status().is_ok()).await.unwrap_or(false)
    }
}

impl Node {
    /// `name`: this machine's name in Kubernetes.
    pub fn service(name: String, volumes: Arc<Volumes>, metrics: Arc<Metrics>) -> NodeServer<Node> {
        let workers = Arc::new(Semaphore::new(WORKERS_MAX));
        NodeServer::new(Node { name, volumes, locks: Locks::default(), workers, metrics })
    }

    /// Works on one volume, on a thread. Refused where another request does.
    async fn work<T: Send + 'static>(
        &self,
        method: &'static str,
        volume: &str,
        work: impl FnOnce(&Volumes) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let (volumes, locks, workers) = (self.volumes.clone(), self.locks.clone(), self.workers.clone());
        let name = volume.to_owned();
        let run = async move {
            let _turn = workers.acquire_owned().await.expect("the semaphore is never closed");
            let lock = locks.lock(&name).map_err(NodeError::from)?;
            let work = move || {
                let result = work(&volumes);
                drop(lock);
                result
            };
            let result = tokio::task::spawn_blocking(work).await;
            result.map_err(|error| Status::internal(format!("the work ended early: {error}")))?.map_err(Status::from)
        };
        rpc::run(&self.metrics, method, volume.to_owned(), run).await
    }

    /// Looks at one volume, or at all; takes no lock, so that it answers while something works on it.
    async fn look<T: Send + 'static>(
        &self,
        method: &'static str,
        volume: &str,
        look: impl FnOnce(&Volumes) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let (volumes, workers) = (self.volumes.clone(), self.workers.clone());
        let run = async move {
            let _turn = workers.acquire_owned().await.expect("the semaphore is never closed");
            let result = tokio::task::spawn_blocking(move || look(&volumes)).await;
            result.map_err(|error| Status::internal(format!("the look ended early: {error}")))?.map_err(Status::from)
        };
        rpc::run(&self.metrics, method, volume.to_owned(), run).await
    }
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("NodeStageVolume", &name, move |volumes| {
            let stage = Stage::of(&request)?;
            volumes.stage(&stage)?;
            Ok(csi::NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("NodeUnstageVolume", &name, move |volumes| {
            let name = request::name(&request.volume_id)?;
            let staging = request::path("staging_target_path", &request.staging_target_path)?;
            volumes.unstage(&name, &staging)?;
            Ok(csi::NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("NodePublishVolume", &name, move |volumes| {
            let publish = Publish::of(request)?;
            volumes.publish(&publish)?;
            Ok(csi::NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("NodeUnpublishVolume", &name, move |volumes| {
            let name = request::name(&request.volume_id)?;
            let target = request::path("target_path", &request.target_path)?;
            volumes.unpublish(&name, &target)?;
            Ok(csi::NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("NodeExpandVolume", &name, move |volumes| {
            let name = request::name(&request.volume_id)?;
            let path = request::place("volume_path", &request.volume_path)?;
            if request.volume_capability.is_some() {
                Access::of(request.volume_capability.as_ref())?;
            }
            let range = request.capacity_range.unwrap_or_default();
            let bytes = |bytes: i64| {
                let detail = format!("{bytes} bytes");
                u64::try_from(bytes).map_err(|_| NodeError::Malformed { what: "capacity_range", detail })
            };
            let size = volumes.expand(&name, &path, bytes(range.required_bytes)?, bytes(range.limit_bytes)?)?;
            Ok(csi::NodeExpandVolumeResponse { capacity_bytes: signed(size) })
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.look("NodeGetVolumeStats", &name, move |volumes| {
            let name = request::name(&request.volume_id)?;
            let path = request::place("volume_path", &request.volume_path)?;
            let usage = volumes.usage(&name, &path)?;
            let mut entries = vec![csi::VolumeUsage {
                available: signed(usage.available_bytes),
                total: signed(usage.total_bytes),
                used: signed(usage.used_bytes),
                unit: volume_usage::Unit::Bytes.into(),
            }];
            if usage.total_inodes > 0 {
                entries.push(csi::VolumeUsage {
                    available: signed(usage.free_inodes),
                    total: signed(usage.total_inodes),
                    used: signed(usage.total_inodes.saturating_sub(usage.free_inodes)),
                    unit: volume_usage::Unit::Inodes.into(),
                });
            }
            Ok(csi::NodeGetVolumeStatsResponse { usage: entries })
        })
        .await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<csi::NodeGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.look("NodeGetVolumeHealth", &name, move |volumes| {
            let name = request::name(&request.volume_id)?;
            let (record, status) = volumes.known(&name, &PathBuf::new())?;
            let device = status.as_ref().and_then(|status| status.device.as_deref());
            let read_only = device.map_or(Ok(false), |device| volumes::is_read_only_by_error(&record, device))?;
            let health_statuses = health::of_volume(&record, status.as_ref(), read_only);
            let volume_health = Some(csi::VolumeHealth { volume_id: name, health_statuses });
            Ok(csi::NodeGetVolumeHealthResponse { volume_health })
        })
        .await
    }

    async fn node_get_storage_health(
        &self,
        _: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Result<Response<csi::NodeGetStorageHealthResponse>, Status> {
        self.look("NodeGetStorageHealth", "", |volumes| {
            let backend_health = health::of_storage(volumes.agent.status().as_deref());
            Ok(csi::NodeGetStorageHealthResponse { backend_health })
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let types = [
            Type::StageUnstageVolume,
            Type::GetVolumeStats,
            Type::ExpandVolume,
            Type::SingleNodeMultiWriter,
            Type::GetVolumeHealth,
            Type::GetStorageHealth,
        ];
        let capability = |kind: Type| csi::NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(node_service_capability::Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities: types.map(capability).into() }))
    }

    /// Local, and cannot fail: a driver that asks others here vanishes from its node when they are away.
    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let segments = [(TOPOLOGY_NODE.to_owned(), self.name.clone())].into();
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.name.clone(),
            max_volumes_per_node: VOLUMES_MAX,
            accessible_topology: Some(csi::Topology { segments }),
        }))
    }
}

/// Sizes stay far below 2^63.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The volumes of this machine, from the agent's control socket and the folder of records.
pub fn open(agent_socket: &Path, records: PathBuf) -> Result<Arc<Volumes>, record::RecordError> {
    let agent = agent::Agent::new(agent_socket.to_owned());
    Ok(Arc::new(Volumes { agent, records: record::Records::open(records)? }))
}
