//! The controller service: CSI's words in, Volume objects and the cluster's attachments out.
//!
//! A volume is what its object says, and the operator carries that out; an attachment is an epoch, and the cluster's
//! word on it is asked for each time, never remembered.

pub mod capacity;
pub mod cluster;
mod error;
pub mod health;
mod objects;
pub mod outcome;
pub mod page;
pub mod spec;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use holdfast_api::v1;
use holdfast_crds::{ClusterRef, Volume, quantity};
use tonic::{Request, Response, Status};

use self::cluster::Cluster;
use self::error::ControllerError;
use self::objects::Objects;
use self::spec::{Class, SIZE_BYTES_MIN, Sizes, Wanted};
use crate::capability::{Access, CapabilityError};
use crate::csi::controller_server::ControllerServer;
use crate::csi::controller_service_capability::{self, rpc::Type};
use crate::csi::{self, controller_get_volume_response, list_volumes_response, validate_volume_capabilities_response};
use crate::identity::Ready;
use crate::locks::Locks;
use crate::metrics::Metrics;
use crate::{context, names, rpc};

/// Where a class names none.
const REPLICAS_DEFAULT: usize = 3;
/// For the cluster to answer a probe; its leader may be on the way.
const PROBE_WITHIN: Duration = Duration::from_secs(5);

pub struct Controller {
    inner: Arc<Inner>,
    locks: Locks,
    metrics: Arc<Metrics>,
}

/// Everything that an RPC works with.
pub struct Inner {
    ours: ClusterRef,
    objects: Objects,
    cluster: Cluster,
}

impl Inner {
    pub fn new(ours: ClusterRef, kubernetes: kube::Client, cluster: Cluster) -> Arc<Inner> {
        Arc::new(Inner { ours, objects: Objects::new(kubernetes), cluster })
    }
}

/// Whether the storage cluster answers.
pub struct ClusterReady(pub Arc<Inner>);

#[tonic::async_trait]
impl Ready for ClusterReady {
    async fn is_ready(&self) -> bool {
        matches!(tokio::time::timeout(PROBE_WITHIN, self.0.cluster.nodes()).await, Ok(Ok(_)))
    }
}

impl Controller {
    pub fn service(inner: Arc<Inner>, metrics: Arc<Metrics>) -> ControllerServer<Controller> {
        ControllerServer::new(Controller { inner, locks: Locks::default(), metrics })
    }

    /// Changes one volume, which nobody else does meanwhile.
    async fn work<T: Send + 'static, F>(
        &self,
        method: &'static str,
        volume: String,
        work: impl FnOnce(Arc<Inner>) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, ControllerError>> + Send + 'static,
    {
        let locks = self.locks.clone();
        let (work, name) = (work(self.inner.clone()), volume.clone());
        let run = async move {
            let _lock = locks.lock(&name).map_err(ControllerError::from)?;
            work.await.map_err(Status::from)
        };
        rpc::run(&self.metrics, method, volume, run).await
    }

    /// Looks at one volume, or at all.
    async fn look<T: Send + 'static, F>(
        &self,
        method: &'static str,
        volume: String,
        look: impl FnOnce(Arc<Inner>) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, ControllerError>> + Send + 'static,
    {
        let look = look(self.inner.clone());
        rpc::run(&self.metrics, method, volume, async move { look.await.map_err(Status::from) }).await
    }
}

impl Inner {
    async fn create(&self, request: csi::CreateVolumeRequest) -> Result<csi::CreateVolumeResponse, ControllerError> {
        let wanted = Wanted::of(&request, &self.ours)?;
        let name = wanted.object.clone();
        let volume = match self.objects.volume(&name).await? {
            Some(volume) => volume,
            None => self.objects.create(&wanted).await?,
        };
        if let Some(how) = wanted.differs(&volume) {
            return Err(ControllerError::Differs { name, how });
        }
        match self.objects.done(&name).await {
            Ok(bytes) => {
                let volume = csi_volume(name, bytes, wanted.volume_context);
                Ok(csi::CreateVolumeResponse { volume: Some(volume) })
            }
            Err(error) => {
                // The provisioner takes it for the end, and will not ask for its deletion.
                if let ControllerError::Refused { code, .. } = &error
                    && outcome::is_final(*code)
                    && volume.metadata.deletion_timestamp.is_none()
                {
                    self.objects.delete(&volume).await?;
                }
                Err(error)
            }
        }
    }

    async fn delete(&self, name: &str) -> Result<(), ControllerError> {
        let Some(volume) = self.objects.volume(name).await? else { return Ok(()) };
        // Deleting an object cannot be taken back, so the cluster is asked first.
        if let Some(there) = self.of_cluster(&volume).await?
            && !there.attached_to.is_empty()
        {
            return Err(ControllerError::Attached { name: name.to_owned(), node: there.attached_to });
        }
        self.objects.delete(&volume).await?;
        self.objects.gone(name).await
    }

    async fn publish(
        &self,
        request: csi::ControllerPublishVolumeRequest,
    ) -> Result<csi::ControllerPublishVolumeResponse, ControllerError> {
        present("volume_id", &request.volume_id)?;
        present("node_id", &request.node_id)?;
        Access::of(request.volume_capability.as_ref())?;
        let volume = self.must_volume(&request.volume_id).await?;
        if !self.objects.has_node(&request.node_id).await? {
            return Err(ControllerError::UnknownNode(request.node_id));
        }
        let there = self.of_cluster(&volume).await?;
        let there = there.ok_or_else(|| ControllerError::NotMade(request.volume_id.clone()))?;
        if !there.attached_to.is_empty() && there.attached_to != request.node_id {
            return Err(ControllerError::Attached { name: request.volume_id, node: there.attached_to });
        }
        let epoch = self.cluster.attach(&there.volume_id, &request.node_id).await?;
        Ok(csi::ControllerPublishVolumeResponse { publish_context: publish_context(&there, epoch) })
    }

    async fn unpublish(&self, name: &str, node: &str) -> Result<(), ControllerError> {
        // What is not there is attached to nobody.
        let Some(volume) = self.objects.volume(name).await? else { return Ok(()) };
        let Some(there) = self.of_cluster(&volume).await? else { return Ok(()) };
        // No node named: wherever it is.
        let is_there = !there.attached_to.is_empty() && (node.is_empty() || there.attached_to == node);
        if is_there {
            self.cluster.detach(&there.volume_id, there.epoch).await?;
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: csi::ValidateVolumeCapabilitiesRequest,
    ) -> Result<csi::ValidateVolumeCapabilitiesResponse, ControllerError> {
        present("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(CapabilityError::Missing.into());
        }
        self.must_volume(&request.volume_id).await?;
        let refused = |message: String| csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message };
        if let Err(error) = Access::of_all(&request.volume_capabilities) {
            return Ok(refused(error.to_string()));
        }
        if let Err(error) = Class::of(&request.parameters, &self.ours) {
            return Ok(refused(error.to_string()));
        }
        let confirmed = validate_volume_capabilities_response::Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: request.mutable_parameters,
        };
        Ok(csi::ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() })
    }

    async fn list(&self, request: csi::ListVolumesRequest) -> Result<csi::ListVolumesResponse, ControllerError> {
        let volumes = self.ours().await?;
        let (page, next_token) = page::of(volumes, name_of, request.max_entries, &request.starting_token)?;
        let entry = |volume: &Volume| list_volumes_response::Entry {
            volume: Some(csi_volume(name_of(volume), bytes_of(volume), BTreeMap::new())),
            status: Some(list_volumes_response::VolumeStatus { published_node_ids: published(volume) }),
        };
        Ok(csi::ListVolumesResponse { entries: page.iter().map(entry).collect(), next_token })
    }

    async fn get(&self, name: &str) -> Result<csi::ControllerGetVolumeResponse, ControllerError> {
        present("volume_id", name)?;
        let volume = self.must_volume(name).await?;
        let status = controller_get_volume_response::VolumeStatus { published_node_ids: published(&volume) };
        Ok(csi::ControllerGetVolumeResponse {
            volume: Some(csi_volume(name_of(&volume), bytes_of(&volume), BTreeMap::new())),
            status: Some(status),
        })
    }

    async fn capacity(&self, request: csi::GetCapacityRequest) -> Result<csi::GetCapacityResponse, ControllerError> {
        let answer = |available: u64, largest: u64| csi::GetCapacityResponse {
            available_capacity: signed(available),
            maximum_volume_size: Some(signed(largest)),
            minimum_volume_size: Some(signed(SIZE_BYTES_MIN)),
        };
        let class = Class::of(&request.parameters, &self.ours)?;
        if request.volume_capabilities.iter().any(|capability| Access::of(Some(capability)).is_err()) {
            // As much as there is for what cannot be had.
            return Ok(answer(0, 0));
        }
        let replicas = class.replicas.and_then(|replicas| usize::try_from(replicas).ok()).unwrap_or(REPLICAS_DEFAULT);
        // The same from every machine: volumes are reached over the network.
        let capacity = capacity::placeable(&self.cluster.nodes().await?, replicas, class.spread);
        Ok(answer(capacity.available_bytes, capacity.largest_bytes))
    }

    async fn expand(
        &self,
        request: csi::ControllerExpandVolumeRequest,
    ) -> Result<csi::ControllerExpandVolumeResponse, ControllerError> {
        let name = request.volume_id;
        present("volume_id", &name)?;
        if request.capacity_range.is_none() {
            return Err(ControllerError::Missing("capacity_range"));
        }
        let block = match &request.volume_capability {
            Some(capability) => Access::of(Some(capability))?.is_block(),
            None => false,
        };
        let sizes = Sizes::of(request.capacity_range.as_ref())?;
        let volume = self.must_volume(&name).await?;
        let limit = request.capacity_range.map(|range| range.limit_bytes).unwrap_or_default();
        let now = bytes_of(&volume);
        if limit > 0 && now > limit.unsigned_abs() {
            return Err(ControllerError::Shrink { now, limit: limit.unsigned_abs() });
        }
        // What was asked before may be on its way still, and is not taken back.
        let wanted = sizes.bytes.max(quantity::bytes(&volume.spec.size).unwrap_or_default());
        if wanted > now {
            let there = self.of_cluster(&volume).await?.ok_or_else(|| ControllerError::NotMade(name.clone()))?;
            // What the object asks for cannot be taken back, so it is asked only where there is room.
            self.check_room(&there, wanted).await?;
            self.objects.grow(&name, wanted).await?;
        }
        let bytes = self.objects.done(&name).await?;
        Ok(csi::ControllerExpandVolumeResponse {
            capacity_bytes: signed(bytes),
            // A device grows by itself.
            node_expansion_required: !block,
        })
    }

    async fn list_health(
        &self,
        request: csi::ControllerListVolumeHealthRequest,
    ) -> Result<csi::ControllerListVolumeHealthResponse, ControllerError> {
        let entry =
            |volume: &Volume| csi::VolumeHealth { volume_id: name_of(volume), health_statuses: health::of(volume) };
        let all: Vec<csi::VolumeHealth> = self.ours().await?.iter().map(entry).collect();
        let abnormal = all.into_iter().filter(|entry| !entry.health_statuses.is_empty()).collect();
        let name = |entry: &csi::VolumeHealth| entry.volume_id.clone();
        let (entries, next_token) = page::of(abnormal, name, request.max_entries, &request.starting_token)?;
        Ok(csi::ControllerListVolumeHealthResponse { entries, next_token })
    }

    async fn health(&self, name: &str) -> Result<csi::ControllerGetVolumeHealthResponse, ControllerError> {
        present("volume_id", name)?;
        let health_statuses = health::of(&self.must_volume(name).await?);
        let volume_health = Some(csi::VolumeHealth { volume_id: name.to_owned(), health_statuses });
        Ok(csi::ControllerGetVolumeHealthResponse { volume_health })
    }

    async fn must_volume(&self, name: &str) -> Result<Volume, ControllerError> {
        let volume = self.objects.volume(name).await?;
        volume.ok_or_else(|| ControllerError::UnknownVolume(name.to_owned()))
    }

    /// Volumes of the driver's own cluster that exist.
    async fn ours(&self) -> Result<Vec<Volume>, ControllerError> {
        let mut volumes = self.objects.volumes().await?;
        volumes.retain(|volume| volume.spec.cluster_ref == self.ours && volume_id(volume).is_some());
        Ok(volumes)
    }

    /// What the cluster says of a volume; `None` where it does not have it.
    async fn of_cluster(&self, volume: &Volume) -> Result<Option<v1::Volume>, ControllerError> {
        match volume_id(volume) {
            Some(id) => Ok(self.cluster.volume(id).await?),
            None => Ok(None),
        }
    }

    /// Every disk with a copy must have room for what the volume grows by.
    async fn check_room(&self, volume: &v1::Volume, bytes: u64) -> Result<(), ControllerError> {
        let growth = bytes.saturating_sub(volume.size_bytes);
        let nodes = self.cluster.nodes().await?;
        for replica in &volume.replicas {
            let disk = nodes.iter().flat_map(|node| &node.disks).find(|disk| disk.disk_id == replica.disk_id);
            // A disk that is lost, or leaves, is no part of what grows in the end.
            let Some(room) = disk.map(|disk| disk.placeable_bytes) else { continue };
            if room < growth {
                let (node, disk) = (replica.node_name.clone(), replica.disk_id.clone());
                return Err(ControllerError::NoRoom { node, disk, room, growth });
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl csi::controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = names::object_name(&request.name);
        self.work("CreateVolume", name, |inner| async move { inner.create(request).await }).await
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let name = request.into_inner().volume_id;
        self.work("DeleteVolume", name.clone(), |inner| async move {
            present("volume_id", &name)?;
            inner.delete(&name).await?;
            Ok(csi::DeleteVolumeResponse {})
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("ControllerPublishVolume", name, |inner| async move { inner.publish(request).await }).await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        let csi::ControllerUnpublishVolumeRequest { volume_id: name, node_id, .. } = request.into_inner();
        self.work("ControllerUnpublishVolume", name.clone(), |inner| async move {
            present("volume_id", &name)?;
            inner.unpublish(&name, &node_id).await?;
            Ok(csi::ControllerUnpublishVolumeResponse {})
        })
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.look("ValidateVolumeCapabilities", name, |inner| async move { inner.validate(request).await }).await
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        self.look("ListVolumes", String::new(), |inner| async move { inner.list(request).await }).await
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerListVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let list = |inner: Arc<Inner>| async move { inner.list_health(request).await };
        self.look("ControllerListVolumeHealth", String::new(), list).await
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeHealthResponse>, Status> {
        let name = request.into_inner().volume_id;
        let get = |inner: Arc<Inner>, name: String| async move { inner.health(&name).await };
        self.look("ControllerGetVolumeHealth", name.clone(), |inner| get(inner, name)).await
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        self.look("GetCapacity", String::new(), |inner| async move { inner.capacity(request).await }).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let types = [
            Type::CreateDeleteVolume,
            Type::PublishUnpublishVolume,
            Type::ListVolumes,
            Type::GetCapacity,
            Type::ExpandVolume,
            Type::ListVolumesPublishedNodes,
            Type::GetVolume,
            Type::SingleNodeMultiWriter,
            Type::GetVolumeHealth,
            Type::ListVolumeHealth,
        ];
        let capability = |kind: Type| csi::ControllerServiceCapability {
            r#type: Some(controller_service_capability::Type::Rpc(controller_service_capability::Rpc {
                r#type: kind.into(),
            })),
        };
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities: types.map(capability).into() }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.volume_id.clone();
        self.work("ControllerExpandVolume", name, |inner| async move { inner.expand(request).await }).await
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        let name = request.into_inner().volume_id;
        let get = |inner: Arc<Inner>, name: String| async move { inner.get(&name).await };
        self.look("ControllerGetVolume", name.clone(), |inner| get(inner, name)).await
    }

    async fn create_snapshot(
        &self,
        _: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        Err(not_offered("snapshots"))
    }

    async fn delete_snapshot(
        &self,
        _: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        Err(not_offered("snapshots"))
    }

    async fn list_snapshots(
        &self,
        _: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        Err(not_offered("snapshots"))
    }

    async fn get_snapshot(
        &self,
        _: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        Err(not_offered("snapshots"))
    }

    async fn controller_modify_volume(
        &self,
        _: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        Err(not_offered("mutable parameters"))
    }
}

fn not_offered(what: &str) -> Status {
    Status::unimplemented(format!("{what} are not offered, and no capability says so"))
}

fn present(what: &'static str, text: &str) -> Result<(), ControllerError> {
    if text.is_empty() { Err(ControllerError::Missing(what)) } else { Ok(()) }
}

fn publish_context(volume: &v1::Volume, epoch: u64) -> BTreeMap<String, String> {
    let node =
        |replica: &v1::ReplicaStatus| serde_json::json!({ "node": replica.node_id, "address": replica.peer_address });
    let nodes: Vec<serde_json::Value> = volume.replicas.iter().map(node).collect();
    [
        (context::VOLUME_ID.to_owned(), volume.volume_id.clone()),
        (context::EPOCH.to_owned(), epoch.to_string()),
        (context::NODES.to_owned(), serde_json::Value::Array(nodes).to_string()),
    ]
    .into()
}

fn csi_volume(name: String, bytes: u64, volume_context: BTreeMap<String, String>) -> csi::Volume {
    csi::Volume {
        capacity_bytes: signed(bytes),
        volume_id: name,
        volume_context,
        content_source: None,
        // Reached from every machine.
        accessible_topology: vec![],
    }
}

fn name_of(volume: &Volume) -> String {
    volume.metadata.name.clone().unwrap_or_default()
}

fn volume_id(volume: &Volume) -> Option<&str> {
    volume.status.as_ref()?.volume_id.as_deref()
}

/// What the cluster has, or what is asked of it.
fn bytes_of(volume: &Volume) -> u64 {
    let has = volume.status.as_ref().and_then(|status| status.size.as_ref());
    quantity::bytes(has.unwrap_or(&volume.spec.size)).unwrap_or_default()
}

fn published(volume: &Volume) -> Vec<String> {
    let attachment = volume.status.as_ref().and_then(|status| status.attachment.as_ref());
    attachment.map(|attachment| attachment.node.clone()).into_iter().collect()
}

/// Sizes stay far below 2^63.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
