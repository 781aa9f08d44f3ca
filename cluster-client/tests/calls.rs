//! Against servers of this process: who is asked, and what a caller hears.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use holdfast_api::refusal::{self, LeaderHint};
use holdfast_api::v1::cluster_server::{Cluster, ClusterServer};
use holdfast_api::v1::node_server::{Node, NodeServer};
use holdfast_api::{channel, v1};
use holdfast_cluster_client::{CallError, Client, Times};
use holdfast_transport::pki::{Authority, Roots, Validity};
use holdfast_transport::{PeerIdentity, PeerRole, TlsConfigs};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

/// A storage node as its API shows it.
#[derive(Clone)]
struct Served {
    /// Whom it names instead of answering; itself: it leads.
    led_by: String,
    address: String,
    asked: Arc<AtomicUsize>,
    /// Its answer to ListNodes where it leads.
    nodes: v1::ListNodesResponse,
}

impl Served {
    fn lead(&self) -> Result<(), Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.led_by == self.address {
            return Ok(());
        }
        let hint = LeaderHint { node_id: "b".into(), api_address: self.led_by.clone() };
        Err(refusal::not_leader("it", (!self.led_by.is_empty()).then_some(&hint)))
    }
}

/// The whole `impl`, as the attribute has to see it.
macro_rules! serve {
    ($service:ident { $($own:item)* } $($name:ident($request:ident) -> $response:ident),*) => {
        #[tonic::async_trait]
        impl $service for Served {
            $($own)*
            $(async fn $name(&self, _: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                Err(Status::unimplemented(stringify!($name)))
            })*
        }
    };
}

serve! { Cluster {
        async fn list_nodes(&self, _: Request<v1::ListNodesRequest>) -> Result<Response<v1::ListNodesResponse>, Status> {
            self.lead()?;
            Ok(Response::new(self.nodes.clone()))
        }
        async fn get_volume(&self, _: Request<v1::GetVolumeRequest>) -> Result<Response<v1::GetVolumeResponse>, Status> {
            self.lead()?;
            let replicas = self.nodes.nodes.iter().map(|node| v1::ReplicaStatus { node_id: node.node_id.clone(), ..Default::default() });
            let volume = v1::Volume { replicas: replicas.collect(), ..Default::default() };
            Ok(Response::new(v1::GetVolumeResponse { volume: Some(volume) }))
        }
        async fn delete_volume(&self, _: Request<v1::DeleteVolumeRequest>) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
            Err(refusal::refuse(Code::FailedPrecondition, "Attached", "it is attached"))
        }
    }
    create_volume(CreateVolumeRequest) -> CreateVolumeResponse,
    list_volumes(ListVolumesRequest) -> ListVolumesResponse,
    resize_volume(ResizeVolumeRequest) -> ResizeVolumeResponse,
    set_volume_replicas(SetVolumeReplicasRequest) -> SetVolumeReplicasResponse,
    explain(ExplainRequest) -> ExplainResponse,
    register(RegisterRequest) -> RegisterResponse,
    set_node_state(SetNodeStateRequest) -> SetNodeStateResponse,
    set_disk_life(SetDiskLifeRequest) -> SetDiskLifeResponse
}

serve! { Node {
        async fn attach_volume(&self, _: Request<v1::AttachVolumeRequest>) -> Result<Response<v1::AttachVolumeResponse>, Status> {
            self.lead()?;
            Ok(Response::new(v1::AttachVolumeResponse { epoch: 7, already: false }))
        }
    }
    probe(ProbeRequest) -> ProbeResponse,
    bootstrap(BootstrapRequest) -> BootstrapResponse,
    join(JoinRequest) -> JoinResponse,
    status(StatusRequest) -> StatusResponse,
    list_replicas(ListReplicasRequest) -> ListReplicasResponse,
    detach_volume(DetachVolumeRequest) -> DetachVolumeResponse
}

fn tls(authority: &Authority, role: PeerRole) -> TlsConfigs {
    let identity = authority.issue(PeerIdentity { role, id: 1 }, validity()).unwrap();
    TlsConfigs::new(&identity, &Roots::from_pem(authority.certificate_pem()).unwrap()).unwrap()
}

fn validity() -> Validity {
    let now = SystemTime::now();
    Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_secs(3600) }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Two nodes, of which the second leads where `led`.
async fn two(authority: &Authority, led: bool) -> [Served; 2] {
    let ((one, first), (other, second)) = (listen().await, listen().await);
    let node = |id: &str, address: &str| v1::ClusterNode {
        node_id: id.into(),
        api_address: address.into(),
        ..v1::ClusterNode::default()
    };
    let nodes = v1::ListNodesResponse { nodes: vec![node("a", &first), node("b", &second)], ..Default::default() };
    let led_by = if led { second.clone() } else { String::new() };
    let mut served = Vec::new();
    for (listener, address) in [(one, first), (other, second)] {
        let node = Served { led_by: led_by.clone(), address, asked: Arc::default(), nodes: nodes.clone() };
        // The sender lives as long as the server: nobody replaces certificates here.
        let (keep, configs) = watch::channel(tls(authority, PeerRole::Node));
        let (cluster, own) = (ClusterServer::new(node.clone()), NodeServer::new(node.clone()));
        tokio::spawn(async move {
            let served = Server::builder().add_service(cluster).add_service(own);
            let result = served.serve_with_incoming(channel::incoming(listener, configs)).await;
            drop(keep);
            result
        });
        served.push(node);
    }
    served.try_into().ok().unwrap()
}

fn client(nodes: &[Served], authority: &Authority) -> Client {
    let endpoints = nodes.iter().map(|node| node.address.clone()).collect();
    let times = Times { leader: Duration::from_millis(300), ..Times::default() };
    Client::new(endpoints, tls(authority, PeerRole::Admin)).with_times(times)
}

fn authority() -> Authority {
    Authority::create("test", validity()).unwrap()
}

fn asked(node: &Served) -> usize {
    node.asked.load(Ordering::SeqCst)
}

#[tokio::test]
async fn who_leads_is_asked_first_the_next_time() {
    let authority = authority();
    let nodes = two(&authority, true).await;
    let client = client(&nodes, &authority);
    for _ in 0..3 {
        client.call(|mut cluster| async move { cluster.list_nodes(v1::ListNodesRequest {}).await }).await.unwrap();
    }
    assert_eq!((asked(&nodes[0]), asked(&nodes[1])), (1, 3));
}

#[tokio::test]
async fn a_refusal_of_the_leader_is_the_answer() {
    let authority = authority();
    let nodes = two(&authority, true).await;
    let request = v1::DeleteVolumeRequest::default();
    let client = client(&nodes, &authority);
    let result = client.call(|mut cluster| {
        let request = request.clone();
        async move { cluster.delete_volume(request).await }
    });
    let error = result.await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, "Attached"));
    assert_eq!(error.to_string(), "it is attached (Attached)");
}

#[tokio::test]
async fn without_a_leader_it_ends_and_says_what_the_nodes_said() {
    let authority = authority();
    let nodes = two(&authority, false).await;
    let client = client(&nodes, &authority);
    let result = client.call(|mut cluster| async move { cluster.list_nodes(v1::ListNodesRequest {}).await }).await;
    let error = result.unwrap_err();
    assert!(matches!(&error, CallError::NoLeader { last, .. } if last.contains("no leader")), "{error}");
    assert!(asked(&nodes[0]) > 1 && asked(&nodes[1]) > 1, "each was asked again");
}

#[tokio::test]
async fn a_certificate_that_nobody_accepts_is_told_at_once() {
    let authority = authority();
    let nodes = two(&authority, true).await;
    let other = self::authority();
    let strange = Client::new(vec![nodes[0].address.clone()], tls(&other, PeerRole::Admin));
    let result = strange.call(|mut cluster| async move { cluster.list_nodes(v1::ListNodesRequest {}).await }).await;
    let error = result.unwrap_err();
    assert!(matches!(error, CallError::CertificateRefused { .. }), "{error}");
}

#[tokio::test]
async fn a_volume_is_asked_for_where_it_is_led() {
    let authority = authority();
    let nodes = two(&authority, true).await;
    let client = client(&nodes, &authority);
    let request = v1::AttachVolumeRequest::default();
    let answer = client.call_volume("v", |mut node| {
        let request = request.clone();
        async move { node.attach_volume(request).await }
    });
    assert_eq!(answer.await.unwrap().epoch, 7);
}
