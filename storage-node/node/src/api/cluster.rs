//! The service `Cluster`: what concerns the catalogue. Answered by the metadata leader; others say who that is.

use futures::future::join_all;
use holdfast_api::refusal::refuse;
use holdfast_api::v1;
use holdfast_api::v1::cluster_server::Cluster;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_id::{DiskId, VolumeId};
use holdfast_metadata::Refusal;
use holdfast_metadata::catalogue::{Catalogue, DiskState, NodeState, Place, Volume, VolumeState};
use holdfast_metadata::command::{
    Command, DeleteVolume, RegisterDisk, RegisterNode, ResizeVolume, SetDiskState, SetNodeState, SetVolumeReplicas,
    UpdateDisk,
};
use holdfast_metadata::reason::{explain_metadata, explain_nodes, explain_volume};
use holdfast_metadata::spec::{Name, VolumeSpec, check_labels};
use holdfast_shard::{AdminReply, AdminRequest, NewVolume};
use holdfast_transport::{PeerIdentity, PeerRole};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

use super::{PEER_WITHIN, Services, convert, health, new_replica_id, new_volume_id};

/// Volumes of one page.
const LIST_MAX: usize = 1000;
/// How long `wait_ready` waits at the longest, and how often it looks.
const READY_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A copy this many entries behind its leader could not take over at once.
const BEHIND_MAX: u64 = 1024;

/// A node tells who and where it is; see the service.
pub(crate) async fn register(
    services: &Services,
    request: &v1::RegisterRequest,
) -> Result<v1::RegisterResponse, Status> {
    let node = convert::parse("node_id", &request.node_id)?;
    let disk = convert::parse("disk_id", &request.disk_id)?;
    let catalogue = services.catalogue().await?;
    let known = catalogue.nodes().get(&node).is_some_and(|known| {
        known.name.as_str() == request.name
            && known.peer_address == request.peer_address
            && known.api_address == request.api_address
            && known.zone.as_deref().unwrap_or_default() == request.zone
    });
    if !known {
        let register = RegisterNode {
            node,
            name: name(&request.name)?,
            peer_address: request.peer_address.clone(),
            api_address: request.api_address.clone(),
            zone: (!request.zone.is_empty()).then(|| request.zone.clone()),
        };
        change(services, Command::RegisterNode(register)).await?;
    }
    if catalogue.nodes().get(&node).is_some_and(|known| known.state == NodeState::Away) {
        change(services, Command::SetNodeState(SetNodeState { node, state: NodeState::Active })).await?;
    }
    let (capacity_bytes, free_bytes) = (request.capacity_bytes, request.free_bytes);
    match catalogue.disks().get(&disk) {
        None => {
            // A node has one disk.
            let register = RegisterDisk { disk, node, capacity_bytes, only: true };
            change(services, Command::RegisterDisk(register)).await?;
        }
        Some(known) if known.state.is_gone() && !request.disk_failed => {
            return Err(convert::refused(&Refusal::DiskRetired { disk }));
        }
        // Figures that moved by less than a sixty-fourth decide no placement.
        Some(known)
            if known.free_bytes.abs_diff(free_bytes) > capacity_bytes / 64
                || known.capacity_bytes != capacity_bytes
                || request.disk_failed =>
        {
            let update = UpdateDisk { disk, capacity_bytes, free_bytes, failed: request.disk_failed };
            change(services, Command::UpdateDisk(update)).await?;
        }
        Some(_) => {}
    }
    let nodes = catalogue.peers().into_iter().map(|(node, peer)| v1::NodeAddress {
        node_id: node.to_string(),
        peer_address: peer.peer_address.to_owned(),
        api_address: peer.api_address.to_owned(),
    });
    Ok(v1::RegisterResponse { nodes: nodes.collect() })
}

async fn change(services: &Services, command: Command) -> Result<bool, Status> {
    convert::changed(services.admin(AdminRequest::Change(command)).await?)
}

fn name(text: &str) -> Result<Name, Status> {
    Name::new(text).map_err(|error| refuse(Code::InvalidArgument, "InvalidSpec", &error.to_string()))
}

/// By name or identifier.
fn find<'a>(catalogue: &'a Catalogue, wanted: &str) -> Result<(VolumeId, &'a Volume), Status> {
    if let Some(found) = catalogue.volume_named(wanted) {
        return Ok(found);
    }
    let by_id = wanted.parse().ok().and_then(|id| catalogue.volumes().get(&id).map(|volume| (id, volume)));
    by_id.ok_or_else(|| {
        refuse(Code::NotFound, "UnknownVolume", &format!("there is no volume {wanted}; list those there are"))
    })
}

fn generation(expected: u64) -> Option<u64> {
    (expected != 0).then_some(expected)
}

#[tonic::async_trait]
impl Cluster for Services {
    async fn list_nodes(&self, _: Request<v1::ListNodesRequest>) -> Result<Response<v1::ListNodesResponse>, Status> {
        let catalogue = self.catalogue().await?;
        let report = self.report().await?;
        let mut nodes: Vec<v1::ClusterNode> = Vec::new();
        let mut asked = Vec::new();
        for (id, node) in catalogue.nodes() {
            let mut view = convert::node(&catalogue, *id, node);
            let peer = report.peers.iter().find(|(peer, ..)| peer == id);
            view.connected = *id == self.node || peer.is_some_and(|(_, connected, suspected)| *connected && !suspected);
            view.metadata_leader = *id == self.node;
            if !view.connected && node.state != NodeState::Removed {
                asked.push((nodes.len(), tokio::spawn(look_at(self.tls(), node.api_address.clone()))));
            }
            nodes.push(view);
        }
        for (number, answer) in asked {
            let view = &mut nodes[number];
            match answer.await.ok().flatten() {
                Some(probe) if probe.disk_state() == v1::DiskState::Formatted => view.connected = true,
                Some(probe) => view.reasons.push(no_disk(view, probe)),
                None => view.reasons.push(v1::Reason {
                    code: "NodeUnreachable".into(),
                    message: format!("node {} does not answer the metadata leader", view.name),
                    action: "start it, or mend its network; if it is lost for ever: holdfast node replace".into(),
                    subject: format!("node/{}", view.name),
                }),
            }
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        self.ask_nodes(&mut nodes).await;
        Ok(Response::new(v1::ListNodesResponse {
            nodes,
            cluster_id: catalogue.cluster().to_string(),
            revision: catalogue.revision(),
        }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let replicas = if request.replicas == 0 { 3 } else { request.replicas };
        let spec = VolumeSpec {
            size_bytes: request.size_bytes,
            logical_block_bytes: if request.logical_block_bytes == 0 { 512 } else { request.logical_block_bytes },
            replicas: u8::try_from(replicas).unwrap_or(u8::MAX),
            spread: convert::spread(&request.spread)?,
        };
        let name = name(&request.name)?;
        let labels = request.labels.into_iter().collect();
        // Checked before identifiers are minted for it.
        let invalid = |message: &str| refuse(Code::InvalidArgument, "InvalidSpec", message);
        spec.check().and_then(|()| check_labels(&labels)).map_err(|error| invalid(&error.to_string()))?;
        let preferred = request.preferred_nodes;
        if preferred.len() > usize::from(spec.replicas) {
            return Err(invalid("more nodes are preferred than there are copies"));
        }
        let ids = (0..spec.replicas).map(|_| new_replica_id()).collect::<Result<Vec<_>, Status>>()?;
        let new = NewVolume { volume: new_volume_id()?, replicas: ids, name: name.clone(), spec, preferred, labels };
        let already = match self.admin(AdminRequest::CreateVolume(new)).await? {
            AdminReply::Exists { same: true, .. } => true,
            AdminReply::Exists { same: false, .. } => {
                let message =
                    format!("a volume {name} exists with another size, block size, number or spread of replicas");
                return Err(refuse(Code::AlreadyExists, "VolumeDiffers", &message));
            }
            reply => !convert::changed(reply)?,
        };
        let until = Instant::now() + READY_WITHIN;
        loop {
            let catalogue = self.catalogue().await?;
            let (id, volume) = find(&catalogue, name.as_str())?;
            let waits = request.wait_ready && volume.state == VolumeState::Creating && Instant::now() < until;
            if !waits {
                let volume = Some(convert::volume(&catalogue, id, volume));
                return Ok(Response::new(v1::CreateVolumeResponse { volume, already }));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.limit as usize {
            0 => LIST_MAX,
            limit => limit.min(LIST_MAX),
        };
        let catalogue = self.catalogue().await?;
        let by_name: BTreeMap<&str, (VolumeId, &Volume)> =
            catalogue.volumes().iter().map(|(id, volume)| (volume.name.as_str(), (*id, volume))).collect();
        let mut rest = by_name.into_iter().filter(|(name, _)| *name > request.after.as_str());
        let page: Vec<(&str, (VolumeId, &Volume))> = rest.by_ref().take(limit).collect();
        let next = match (page.last(), rest.next()) {
            (Some((last, _)), Some(_)) => (*last).to_owned(),
            _ => String::new(),
        };
        let page: Vec<(VolumeId, &Volume)> = page.into_iter().map(|(_, found)| found).collect();
        let mut volumes: Vec<v1::Volume> =
            page.iter().map(|(id, volume)| convert::volume(&catalogue, *id, volume)).collect();
        if request.with_replicas {
            let answers = self.ask_replicas(&catalogue, &page).await;
            for ((_, volume), view) in page.iter().zip(&mut volumes) {
                judge_volume(&catalogue, volume, view, &answers);
            }
        }
        Ok(Response::new(v1::ListVolumesResponse { volumes, next, revision: catalogue.revision() }))
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::GetVolumeResponse>, Status> {
        let catalogue = self.catalogue().await?;
        let (id, volume) = find(&catalogue, &request.into_inner().volume)?;
        let view = self.look_at_volume(&catalogue, id, volume).await;
        Ok(Response::new(v1::GetVolumeResponse { volume: Some(view) }))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let catalogue = self.catalogue().await?;
        let Ok((id, _)) = find(&catalogue, &request.volume) else {
            return Ok(Response::new(v1::DeleteVolumeResponse { gone: true }));
        };
        let expected_generation = generation(request.expected_generation);
        change(self, Command::DeleteVolume(DeleteVolume { volume: id, expected_generation })).await?;
        let until = Instant::now() + PEER_WITHIN;
        loop {
            let gone = !self.catalogue().await?.volumes().contains_key(&id);
            if gone || Instant::now() >= until {
                return Ok(Response::new(v1::DeleteVolumeResponse { gone }));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::ResizeVolumeResponse>, Status> {
        let request = request.into_inner();
        let catalogue = self.catalogue().await?;
        let (id, _) = find(&catalogue, &request.volume)?;
        let expected_generation = generation(request.expected_generation);
        let resize = ResizeVolume { volume: id, size_bytes: request.size_bytes, expected_generation };
        change(self, Command::ResizeVolume(resize)).await?;
        let until = Instant::now() + PEER_WITHIN;
        loop {
            let catalogue = self.catalogue().await?;
            let (id, volume) = find(&catalogue, &id.to_string())?;
            if volume.provisioned_bytes >= request.size_bytes || Instant::now() >= until {
                let volume = Some(convert::volume(&catalogue, id, volume));
                return Ok(Response::new(v1::ResizeVolumeResponse { volume }));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn set_volume_replicas(
        &self,
        request: Request<v1::SetVolumeReplicasRequest>,
    ) -> Result<Response<v1::SetVolumeReplicasResponse>, Status> {
        let request = request.into_inner();
        let (id, _) = find(&*self.catalogue().await?, &request.volume)?;
        let set = SetVolumeReplicas {
            volume: id,
            replicas: u8::try_from(request.replicas).unwrap_or(u8::MAX),
            expected_generation: generation(request.expected_generation),
        };
        change(self, Command::SetVolumeReplicas(set)).await?;
        let catalogue = self.catalogue().await?;
        let (id, volume) = find(&catalogue, &id.to_string())?;
        let volume = Some(convert::volume(&catalogue, id, volume));
        Ok(Response::new(v1::SetVolumeReplicasResponse { volume }))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let request = request.into_inner();
        let catalogue = self.catalogue().await?;
        let reasons = match request.kind() {
            v1::SubjectKind::Volume => {
                let (id, volume) = find(&catalogue, &request.name)?;
                let view = self.look_at_volume(&catalogue, id, volume).await;
                let planned = explain_volume(&catalogue, id).into_iter().map(convert::reason);
                let names =
                    catalogue.nodes().iter().map(|(id, node)| (id.to_string(), node.name.to_string())).collect();
                let repairs = view.replicas.iter().flat_map(|replica| {
                    let repair = replica.repair.clone().unwrap_or_default();
                    health::repair_reasons(&view.name, &replica.node_name, &repair, &names)
                });
                let repairs: Vec<v1::Reason> = repairs.collect();
                let judged = view.replicas.into_iter().filter_map(|replica| replica.reason);
                planned.chain(judged).chain(repairs).collect()
            }
            v1::SubjectKind::Node => {
                let subject = format!("node/{}", request.name);
                let nodes = self.list_nodes(Request::new(v1::ListNodesRequest {})).await?.into_inner().nodes;
                let node = nodes.into_iter().find(|node| node.name == request.name || node.node_id == request.name);
                let Some(node) = node else {
                    let message = format!("there is no node {}", request.name);
                    return Err(refuse(Code::NotFound, "UnknownNode", &message));
                };
                let planned = explain_nodes(&catalogue).into_iter().filter(|reason| reason.subject == subject);
                let id = catalogue.node_named(&node.name).map(|(id, _)| id);
                let moves = explain_places(&catalogue, |place| Some(place.node) == id);
                node.reasons.into_iter().chain(planned.map(convert::reason)).chain(moves).collect()
            }
            v1::SubjectKind::Disk => {
                let disk = find_disk(&catalogue, &request.name)?;
                let mut reasons: Vec<v1::Reason> = disk_reason(&catalogue, disk).into_iter().collect();
                reasons.extend(explain_places(&catalogue, |place| place.disk == Some(disk)));
                reasons
            }
            v1::SubjectKind::Cluster | v1::SubjectKind::Unspecified => {
                let nodes = self.list_nodes(Request::new(v1::ListNodesRequest {})).await?.into_inner().nodes;
                let volumes = catalogue.volumes().keys().flat_map(|id| explain_volume(&catalogue, *id));
                let own = explain_metadata(&catalogue).into_iter();
                let planned = own.chain(explain_nodes(&catalogue)).chain(volumes).map(convert::reason);
                nodes.into_iter().flat_map(|node| node.reasons).chain(planned).collect()
            }
        };
        Ok(Response::new(v1::ExplainResponse { reasons }))
    }

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let peer = request.extensions().get::<PeerIdentity>().copied();
        let request = request.into_inner();
        let node: holdfast_id::NodeId = convert::parse("node_id", &request.node_id)?;
        if peer != Some(PeerIdentity { role: PeerRole::Node, id: node.as_u128() }) {
            return Err(refuse(Code::PermissionDenied, "NotYourself", "a node registers itself only"));
        }
        register(self, &request).await.map(Response::new)
    }

    async fn set_node_state(
        &self,
        request: Request<v1::SetNodeStateRequest>,
    ) -> Result<Response<v1::SetNodeStateResponse>, Status> {
        let request = request.into_inner();
        let state = match request.state() {
            v1::NodeState::Active => NodeState::Active,
            v1::NodeState::Draining => NodeState::Draining,
            v1::NodeState::Removed => NodeState::Removed,
            v1::NodeState::Removing => NodeState::Removing,
            v1::NodeState::Away => NodeState::Away,
            v1::NodeState::Unspecified => {
                return Err(refuse(Code::InvalidArgument, "InvalidArgument", "state: none was given"));
            }
        };
        let catalogue = self.catalogue().await?;
        let by_id = request.node.parse().ok().filter(|id| catalogue.nodes().contains_key(id));
        let Some(node) = catalogue.node_named(&request.node).map(|(id, _)| id).or(by_id) else {
            return Err(refuse(Code::NotFound, "UnknownNode", &format!("there is no node {}", request.node)));
        };
        change(self, Command::SetNodeState(SetNodeState { node, state })).await?;
        let catalogue = self.catalogue().await?;
        let view = catalogue.nodes().get(&node).map(|known| convert::node(&catalogue, node, known));
        Ok(Response::new(v1::SetNodeStateResponse { node: view }))
    }

    async fn set_disk_life(
        &self,
        request: Request<v1::SetDiskLifeRequest>,
    ) -> Result<Response<v1::SetDiskLifeResponse>, Status> {
        let request = request.into_inner();
        let state = match request.life() {
            v1::DiskLife::Active => DiskState::Active,
            v1::DiskLife::Removing => DiskState::Removing,
            v1::DiskLife::Lost => DiskState::Failed,
            v1::DiskLife::Removed | v1::DiskLife::Unspecified => {
                let message = "life: ACTIVE, REMOVING or LOST; a disk is REMOVED by itself once it holds nothing";
                return Err(refuse(Code::InvalidArgument, "InvalidArgument", message));
            }
        };
        let catalogue = self.catalogue().await?;
        let disk = find_disk(&catalogue, &request.disk)?;
        if state == DiskState::Failed {
            self.must_not_serve(&catalogue, disk).await?;
        }
        change(self, Command::SetDiskState(SetDiskState { disk, state })).await?;
        let catalogue = self.catalogue().await?;
        let placed = catalogue.placed().get(&disk).copied().unwrap_or_default();
        let view = catalogue.disks().get(&disk).map(|known| convert::disk(disk, known, placed));
        Ok(Response::new(v1::SetDiskLifeResponse { disk: view }))
    }
}

/// By identifier, or by the name of a node that has one disk which is not gone.
fn find_disk(catalogue: &Catalogue, wanted: &str) -> Result<DiskId, Status> {
    if let Some(disk) = wanted.parse().ok().filter(|disk| catalogue.disks().contains_key(disk)) {
        return Ok(disk);
    }
    let unknown = || {
        let message = format!("there is no disk {wanted}; list those there are with: holdfast disk list");
        refuse(Code::NotFound, "UnknownDisk", &message)
    };
    let (node, _) = catalogue.node_named(wanted).ok_or_else(unknown)?;
    let mut disks = catalogue.disks().iter().filter(|(_, disk)| disk.node == node && !disk.state.is_gone());
    match (disks.next(), disks.next()) {
        (Some((disk, _)), None) => Ok(*disk),
        (None, _) => Err(unknown()),
        (Some(_), Some(_)) => {
            let message = format!("node {wanted} has several disks; name the one by its identifier");
            Err(refuse(Code::InvalidArgument, "InvalidArgument", &message))
        }
    }
}

fn disk_reason(catalogue: &Catalogue, disk: DiskId) -> Option<v1::Reason> {
    let known = catalogue.disks().get(&disk)?;
    let node = catalogue.node_label(known.node);
    let (code, message) = match known.state {
        DiskState::Active => return None,
        DiskState::Removing => {
            ("DiskRemoving", format!("disk {disk} of {node} is being removed: what it holds is moved"))
        }
        DiskState::Removed => ("DiskRemoved", format!("disk {disk} of {node} was removed for good")),
        DiskState::Failed => ("DiskLost", format!("disk {disk} of {node} failed or was declared lost, for good")),
    };
    Some(v1::Reason { code: code.into(), message, action: String::new(), subject: format!("disk/{disk}") })
}

/// What is moving or to be moved of everything that has a replica at such a place, and what waits for a deletion there.
fn explain_places(catalogue: &Catalogue, there: impl Fn(&Place) -> bool) -> Vec<v1::Reason> {
    let ids = catalogue.volumes().keys().copied().chain([catalogue.metadata_id()]);
    let concerned = ids.filter_map(|id| catalogue.placement(id)).filter(|placement| {
        let coming = placement.coming().map(|new| Place::from(new.member));
        placement.members.iter().chain(&coming).any(&there)
    });
    let mut reasons: Vec<v1::Reason> = concerned
        .flat_map(|placement| match placement.volume {
            id if id == catalogue.metadata_id() => explain_metadata(catalogue),
            id => explain_volume(catalogue, id),
        })
        .map(convert::reason)
        .collect();
    for (replica, tombstone) in catalogue.tombstones() {
        if there(&Place { replica: *replica, node: tombstone.node, disk: Some(tombstone.disk) }) {
            let (what, node) = (catalogue.volume_label(tombstone.volume), catalogue.node_label(tombstone.node));
            reasons.push(v1::Reason {
                code: "WaitingForDeletion".into(),
                message: format!("waiting for {node} to delete a former copy of {what}"),
                action: "if the node is down, start it; if its disk is lost for ever: holdfast disk replace".into(),
                subject: format!("disk/{}", tombstone.disk),
            });
        }
    }
    reasons
}

/// What a node that is not connected says of itself.
async fn look_at(tls: holdfast_transport::TlsConfigs, address: String) -> Option<v1::ProbeResponse> {
    let channel = holdfast_api::channel::connect(&address, &tls, PEER_WITHIN).await.ok()?;
    let answer = tokio::time::timeout(PEER_WITHIN, NodeClient::new(channel).probe(v1::ProbeRequest {})).await;
    Some(answer.ok()?.ok()?.into_inner())
}

/// Why a node that runs serves nothing.
fn no_disk(node: &v1::ClusterNode, probe: v1::ProbeResponse) -> v1::Reason {
    let subject = format!("node/{}", node.name);
    match probe.disk_reason {
        Some(reason) => v1::Reason { message: format!("node {}: {}", node.name, reason.message), subject, ..reason },
        None => v1::Reason {
            code: "NotJoined".into(),
            message: format!("node {} runs with an empty disk that it has not joined with", node.name),
            action: "give it back the disk it had, or join it again with the empty one".into(),
            subject,
        },
    }
}

impl Services {
    /// A disk that its node serves from is not lost.
    async fn must_not_serve(&self, catalogue: &Catalogue, disk: DiskId) -> Result<(), Status> {
        let node = catalogue.disks().get(&disk).and_then(|known| catalogue.nodes().get(&known.node));
        let Some(node) = node else { return Ok(()) };
        let probe = look_at(self.tls(), node.api_address.clone()).await;
        let serves = |probe: &v1::ProbeResponse| {
            probe.disk_state() == v1::DiskState::Formatted && probe.disk_id == disk.to_string()
        };
        if !probe.as_ref().is_some_and(serves) {
            return Ok(());
        }
        let message = format!(
            "node {} serves from this disk, so it is not lost: stop the node first, or move what the disk holds with: \
             holdfast disk remove",
            node.name
        );
        Err(refuse(Code::FailedPrecondition, "DiskServes", &message))
    }

    async fn look_at_volume(&self, catalogue: &Catalogue, id: VolumeId, volume: &Volume) -> v1::Volume {
        let mut view = convert::volume(catalogue, id, volume);
        let answers = self.ask_replicas(catalogue, &[(id, volume)]).await;
        judge_volume(catalogue, volume, &mut view, &answers);
        view
    }

    /// What the replicas of these volumes say, by their identifiers. Every node is asked once, all side by side; who does
    /// not answer in time is missing.
    async fn ask_replicas(
        &self,
        catalogue: &Catalogue,
        volumes: &[(VolumeId, &Volume)],
    ) -> BTreeMap<String, v1::LocalReplica> {
        let mut asked: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (id, volume) in volumes {
            for place in places(volume).filter(|place| catalogue.counts(place)) {
                let Some(node) = catalogue.nodes().get(&place.node) else { continue };
                asked.entry(&node.api_address).or_default().push(id.to_string());
            }
        }
        let asked = asked.into_iter().map(async |(address, volume_ids)| {
            let ask = async {
                let channel = self.peer(address).await?;
                NodeClient::new(channel).list_replicas(v1::ListReplicasRequest { volume_ids }).await
            };
            tokio::time::timeout(PEER_WITHIN, ask).await.ok()?.ok()
        });
        let answers = join_all(asked).await.into_iter().flatten().flat_map(|answer| answer.into_inner().replicas);
        answers.map(|answer| (answer.replica_id.clone(), answer)).collect()
    }
}

/// Where copies of a volume are, or are about to be.
fn places(volume: &Volume) -> impl Iterator<Item = Place> {
    volume.members.iter().chain(volume.coming()).map(|entry| Place::from(entry.member))
}

fn judge_volume(
    catalogue: &Catalogue,
    volume: &Volume,
    view: &mut v1::Volume,
    answers: &BTreeMap<String, v1::LocalReplica>,
) {
    let places: Vec<Place> = places(volume).collect();
    let answers: Vec<Option<&v1::LocalReplica>> =
        places.iter().map(|place| answers.get(&place.replica.to_string())).collect();
    let leader = answers.iter().flatten().filter(|answer| answer.serving).max_by_key(|answer| answer.term).copied();
    for ((replica, answer), place) in view.replicas.iter_mut().zip(answers).zip(&places) {
        judge(replica, answer.cloned(), leader, catalogue.counts(place), &view.name);
    }
    // One that is on its way in is not missed yet.
    let members = &view.replicas[..volume.members.len()];
    let enough = members.len() >= usize::from(volume.spec.replicas);
    view.health = match (leader, enough && members.iter().all(|replica| replica.healthy)) {
        (None, _) => v1::VolumeHealth::Unavailable,
        (Some(_), true) => v1::VolumeHealth::Healthy,
        (Some(_), false) => v1::VolumeHealth::Degraded,
    }
    .into();
    if let Some(leader) = leader {
        view.leader_node_id.clone_from(&leader.leader_node_id);
        view.epoch = leader.epoch;
        view.attached_to.clone_from(&leader.attached_to);
    }
}

fn judge(
    replica: &mut v1::ReplicaStatus,
    answer: Option<v1::LocalReplica>,
    leader: Option<&v1::LocalReplica>,
    counts: bool,
    volume: &str,
) {
    use v1::ReplicaCondition as Condition;
    let reason = |code: &str, message: String, action: &str| {
        Some(v1::Reason { code: code.into(), message, action: action.into(), subject: format!("volume/{volume}") })
    };
    let node = replica.node_name.clone();
    let Some(answer) = answer else {
        let (condition, why) = if !counts {
            let message = format!("the disk of the copy on {node} failed or was lost");
            (Condition::Lost, reason("CopyLost", message, "wait: another copy is made"))
        } else if !replica.created {
            let message = format!("waiting for {node} to create its copy");
            (Condition::Creating, reason("WaitingForReplica", message, ""))
        } else {
            let action = "start the node, or mend its network";
            let message = format!("the copy on {node} does not answer");
            (Condition::Unreachable, reason("ReplicaUnreachable", message, action))
        };
        replica.condition = condition.into();
        replica.reason = why;
        return;
    };
    replica.role = answer.role;
    replica.term = answer.term;
    replica.flushed_index = answer.flushed_index;
    replica.applied_index = answer.applied_index;
    replica.repair = answer.repair.clone();
    let behind = leader.map_or(0, |leader| leader.committed_index.saturating_sub(answer.flushed_index));
    replica.behind = behind;
    let lagging = leader.is_some_and(|leader| leader.lagging_replica_ids.contains(&replica.replica_id));
    let mut rebuilds = leader.into_iter().flat_map(|leader| &leader.rebuilds);
    replica.rebuild = rebuilds.find(|rebuild| rebuild.replica_id == replica.replica_id).cloned();
    let learns = replica.role() == v1::ReplicaRole::Learner;
    let (condition, why) = if answer.stopped.is_some() {
        (Condition::Stopped, answer.stopped)
    } else if !answer.may_vote {
        let message = format!(
            "the log of the copy on {node} was damaged at a start: it does not vote before it has followed an elected leader"
        );
        let action = "wait; where there is no leader, start the nodes with the other copies";
        (Condition::CatchingUp, reason("LogDamaged", message, action))
    } else if lagging || answer.rebuilding {
        let message = match &replica.rebuild {
            Some(rebuild) if rebuild.phase() == v1::RebuildPhase::Copying => format!(
                "the copy on {node} is being rebuilt: {} bytes copied, {} parts of 64 KiB compared",
                rebuild.bytes_copied, rebuild.slots_compared
            ),
            _ => format!("the copy on {node} needs more than the leader's log has, and waits for its rebuild"),
        };
        (Condition::Rebuilding, reason("ReplicaRebuilding", message, "wait for its rebuild"))
    } else if learns {
        let message = format!("the copy on {node} is {behind} entries behind and does not vote yet");
        (Condition::Learner, reason("ReplicaLearning", message, "wait: it is catching up"))
    } else if behind > BEHIND_MAX {
        let message = format!("the copy on {node} is {behind} entries behind");
        (Condition::CatchingUp, reason("ReplicaBehind", message, "wait: it is catching up"))
    } else {
        (Condition::Healthy, None)
    };
    replica.condition = condition.into();
    replica.reason = why;
    replica.healthy = replica.reason.is_none();
}
