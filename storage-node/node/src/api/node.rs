//! The service `Node`: what concerns this node alone.

use holdfast_api::refusal::refuse;
use holdfast_api::v1;
use holdfast_api::v1::node_server::Node;
use holdfast_id::ClusterId;
use holdfast_metadata::catalogue::Founder;
use holdfast_metadata::command::COMMAND_VERSION;
use holdfast_metadata::spec::Name;
use holdfast_protocol::session::{Epoch, Instance};
use holdfast_shard::{AdminReply, AdminRequest, AttachVolume, NodeAddress};
use holdfast_transport::{PeerIdentity, PeerRole};
use tonic::{Code, Request, Response, Status};

use super::{Services, convert, health, random_id, register_once};
use crate::control::{Answer, Call, DiskState, DiskView};

#[tonic::async_trait]
impl Node for Services {
    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeResponse>, Status> {
        let view = self.disk().await?;
        let (state, reason) = disk_state(&view.state);
        let metadata_member = match &view.state {
            DiskState::Formatted(_) => self.report().await?.metadata.is_some(),
            _ => false,
        };
        let (disk_id, cluster_id) = match view.state {
            DiskState::Formatted(superblock) => (superblock.disk.to_string(), superblock.cluster.to_string()),
            _ => Default::default(),
        };
        Ok(Response::new(v1::ProbeResponse {
            node_id: self.node.to_string(),
            name: self.config.name.clone(),
            disk_state: state.into(),
            disk_reason: reason,
            disk_id,
            cluster_id,
            versions: Some(versions()),
            disk_bytes: view.bytes,
            metadata_member,
            peer_address: self.config.peer_address(),
            api_address: self.config.api_address(),
            zone: self.config.zone.clone().unwrap_or_default(),
        }))
    }

    async fn bootstrap(
        &self,
        request: Request<v1::BootstrapRequest>,
    ) -> Result<Response<v1::BootstrapResponse>, Status> {
        let request = request.into_inner();
        let cluster: ClusterId = convert::parse("cluster_id", &request.cluster_id)?;
        let founders = request.members.iter().map(founder).collect::<Result<Vec<Founder>, Status>>()?;
        if !founders.iter().any(|founder| founder.node == self.node) {
            let message = format!("this is node {}, which is not among the founding members", self.node);
            return Err(refuse(Code::InvalidArgument, "NotAFounder", &message));
        }
        let already = matches!(self.disk().await?.state, DiskState::Formatted(_));
        let view = self.format(cluster).await?;
        match self.admin(AdminRequest::Found { founders: founders.clone() }).await? {
            AdminReply::Founded => {}
            reply => return Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
        }
        let addresses = founders.into_iter().map(|founder| NodeAddress {
            node: founder.node,
            peer: founder.peer_address,
            api: founder.api_address,
        });
        self.call(Call::Learn(addresses.collect())).await?;
        Ok(Response::new(v1::BootstrapResponse { disk_id: view, already }))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let request = request.into_inner();
        let cluster: ClusterId = convert::parse("cluster_id", &request.cluster_id)?;
        if request.seeds.is_empty() {
            return Err(refuse(Code::InvalidArgument, "InvalidArgument", "seeds: at least one node is needed"));
        }
        let seeds = convert::addresses(request.seeds)?;
        let disk_id = self.format(cluster).await?;
        self.call(Call::Learn(seeds)).await?;
        let registered = match self.registration().await {
            Some(registration) => register_once(self, &registration).await.is_ok(),
            None => false,
        };
        Ok(Response::new(v1::JoinResponse { disk_id, registered }))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let view = self.disk().await?;
        let (state, reason) = disk_state(&view.state);
        let mut response = v1::StatusResponse {
            node_id: self.node.to_string(),
            name: self.config.name.clone(),
            versions: Some(versions()),
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            reasons: reason.into_iter().collect(),
            ..v1::StatusResponse::default()
        };
        let mut disk = v1::DiskStatus { state: state.into(), ..v1::DiskStatus::default() };
        if let DiskState::Formatted(superblock) = view.state {
            let report = self.report().await?;
            response.cluster_id = superblock.cluster.to_string();
            disk.disk_id = report.disk.to_string();
            disk.capacity_bytes = report.usage.data_total;
            disk.used_bytes = report.usage.data_used;
            disk.reserved_bytes = report.usage.data_reserved;
            disk.wal_bytes = report.usage.wal_total;
            disk.wal_used_bytes = report.usage.wal_used;
            disk.boot_epoch = report.boot_epoch;
            disk.replicas = u32::try_from(report.volumes.len()).unwrap_or(u32::MAX);
            let leaders = report.volumes.iter().filter(|volume| volume.replica.serving).count();
            disk.leaders = u32::try_from(leaders).unwrap_or(u32::MAX);
            let health = health::disk(&report);
            response.reasons.extend(health::disk_reasons(&disk.disk_id, &health));
            disk.health = Some(health);
            response.metadata = report.metadata.as_ref().map(|metadata| v1::MetadataStatus {
                role: convert::role(metadata).into(),
                term: metadata.term.0,
                leader_node_id: metadata.leader.map(|leader| leader.to_string()).unwrap_or_default(),
                applied_index: metadata.applied.0,
                state_hash: report.catalogue_hash.unwrap_or_default(),
                voters: u32::try_from(metadata.voters).unwrap_or(u32::MAX),
                stopped: metadata.stopped.as_ref().map(|reason| stopped(reason)),
            });
            response.peers = report
                .peers
                .iter()
                .map(|(node, connected, suspected)| v1::PeerStatus {
                    node_id: node.to_string(),
                    connected: *connected,
                    suspected: *suspected,
                    ..v1::PeerStatus::default()
                })
                .collect();
            response.reasons.extend(report.damaged.iter().map(|(group, reason)| v1::Reason {
                code: "ReplicaDamaged".into(),
                message: format!("this disk's copy of {group} is damaged: {reason}"),
                action: "the other copies serve; replace this one".into(),
                subject: format!("volume/{}", group.volume),
            }));
        }
        response.disks.push(disk);
        Ok(Response::new(response))
    }

    async fn list_replicas(
        &self,
        request: Request<v1::ListReplicasRequest>,
    ) -> Result<Response<v1::ListReplicasResponse>, Status> {
        let wanted = request.into_inner().volume_ids;
        let volumes = wanted.iter().map(|id| convert::parse("volume_ids", id)).collect::<Result<_, _>>()?;
        let AdminReply::Volumes(reports) = self.admin(AdminRequest::Volumes { volumes }).await? else {
            return Err(Status::internal("an answer of the wrong kind"));
        };
        let replicas = reports.iter().map(|volume| {
            let replica = &volume.replica;
            v1::LocalReplica {
                volume_id: volume.volume.to_string(),
                replica_id: replica.replica.to_string(),
                role: convert::role(replica).into(),
                term: replica.term.0,
                leader_node_id: replica.leader.map(|leader| leader.to_string()).unwrap_or_default(),
                serving: replica.serving,
                last_index: replica.last.0,
                flushed_index: replica.flushed.0,
                committed_index: replica.committed.0,
                applied_index: replica.applied.0,
                checkpointed_index: replica.checkpointed.0,
                size_bytes: volume.size_bytes,
                epoch: volume.epoch.0,
                attached_to: volume.holder.clone().unwrap_or_default(),
                stopped: replica.stopped.as_ref().map(|reason| stopped(reason)),
                lagging_replica_ids: volume.lagging.iter().map(ToString::to_string).collect(),
                repair: Some(health::repair(&volume.repair)),
                may_vote: replica.may_vote,
                rebuilding: replica.rebuilding,
                rebuilds: volume
                    .rebuilds
                    .iter()
                    .map(|(replica, progress)| convert::rebuild(*replica, progress))
                    .collect(),
            }
        });
        Ok(Response::new(v1::ListReplicasResponse { replicas: replicas.collect() }))
    }

    async fn attach_volume(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Result<Response<v1::AttachVolumeResponse>, Status> {
        only_admin(&request)?;
        let request = request.into_inner();
        let attach = AttachVolume {
            volume: convert::parse("volume_id", &request.volume_id)?,
            holder: request.holder,
            instance: Instance(u128::from_be_bytes(random_id()?)),
            take_over: request.take_over,
        };
        match self.admin(AdminRequest::Attach(attach)).await? {
            AdminReply::Attached { epoch, already } => {
                Ok(Response::new(v1::AttachVolumeResponse { epoch: epoch.0, already }))
            }
            reply => Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
        }
    }

    async fn detach_volume(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::DetachVolumeResponse>, Status> {
        only_admin(&request)?;
        let request = request.into_inner();
        let volume = convert::parse("volume_id", &request.volume_id)?;
        if request.epoch == 0 {
            return Err(refuse(Code::InvalidArgument, "InvalidArgument", "epoch: name the attachment that is to end"));
        }
        match self.admin(AdminRequest::Detach { volume, epoch: Epoch(request.epoch) }).await? {
            AdminReply::Detached => Ok(Response::new(v1::DetachVolumeResponse {})),
            reply => Err(Status::internal(format!("an answer of the wrong kind: {reply:?}"))),
        }
    }
}

/// Who attaches decides whose data is written.
fn only_admin<T>(request: &Request<T>) -> Result<(), Status> {
    match request.extensions().get::<PeerIdentity>() {
        Some(peer) if peer.role == PeerRole::Admin => Ok(()),
        _ => {
            let message = "attaching and detaching for others takes a certificate of role admin";
            Err(refuse(Code::PermissionDenied, "NotAllowed", message))
        }
    }
}

impl Services {
    pub(crate) async fn disk(&self) -> Result<DiskView, Status> {
        match self.call(Call::Probe).await? {
            Answer::Disk(view) => Ok(view),
            answer => Err(Status::internal(format!("an answer of the wrong kind: {answer:?}"))),
        }
    }

    /// The disk's identifier.
    async fn format(&self, cluster: ClusterId) -> Result<String, Status> {
        match self.call(Call::Format { cluster }).await? {
            Answer::Disk(DiskView { state: DiskState::Formatted(superblock), .. }) => Ok(superblock.disk.to_string()),
            answer => Err(Status::internal(format!("an answer of the wrong kind: {answer:?}"))),
        }
    }
}

fn stopped(reason: &str) -> v1::Reason {
    v1::Reason {
        code: "ReplicaStopped".into(),
        message: reason.to_owned(),
        action: "the other copies serve; look at this node's log".into(),
        subject: String::new(),
    }
}

fn founder(member: &v1::FoundingMember) -> Result<Founder, Status> {
    let name =
        Name::new(&member.name).map_err(|error| refuse(Code::InvalidArgument, "InvalidSpec", &error.to_string()))?;
    Ok(Founder {
        node: convert::parse("node_id", &member.node_id)?,
        replica: convert::parse("replica_id", &member.replica_id)?,
        name,
        peer_address: member.peer_address.clone(),
        api_address: member.api_address.clone(),
        zone: (!member.zone.is_empty()).then(|| member.zone.clone()),
    })
}

fn disk_state(state: &DiskState) -> (v1::DiskState, Option<v1::Reason>) {
    let reason = |code: &str, message: &str, action: &str| {
        Some(v1::Reason { code: code.into(), message: message.into(), action: action.into(), subject: String::new() })
    };
    match state {
        DiskState::Empty => (v1::DiskState::Empty, None),
        DiskState::Formatted(_) => (v1::DiskState::Formatted, None),
        DiskState::Foreign(message) => {
            (v1::DiskState::Foreign, reason("ForeignDisk", message, "erase its first 64 KiB to give it to Holdfast"))
        }
        DiskState::Failed(message) => {
            (v1::DiskState::Failed, reason("DiskFailed", message, "replace the disk; its copies are on other nodes"))
        }
    }
}

fn versions() -> v1::Versions {
    v1::Versions {
        build: env!("CARGO_PKG_VERSION").into(),
        revision: String::new(),
        disk_format: holdfast_store::superblock::VERSION,
        metadata: COMMAND_VERSION,
    }
}
