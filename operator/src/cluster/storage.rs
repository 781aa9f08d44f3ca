//! Calls to storage nodes: who they are, the founding, the catalogue. I/O; nothing is decided here.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt as _;
use holdfast_api::v1;
use holdfast_cluster_client::{CallError, Client, Times};
use holdfast_transport::TlsConfigs;

use super::founding::{Record, Said};
use super::layout::Layout;
use super::observed::Catalogue;

/// A storage node answers at once or not at all.
const TIMES: Times = Times { call: Duration::from_secs(10), leader: Duration::from_secs(3) };
/// Formatting a disk takes seconds, on a slow one many.
const FORMAT: Times = Times { call: Duration::from_secs(60), leader: Duration::from_secs(3) };
/// Members asked at the same time.
const AT_ONCE: usize = 16;
/// Volumes in one answer.
const PAGE: u32 = 1000;
/// Pages read of one catalogue: more volumes than one Kubernetes cluster has.
const PAGES_MAX: usize = 100;

/// A client of the cluster's control API, by the names of its members.
pub fn client(layout: &Layout, members: &[String], tls: TlsConfigs) -> Client {
    let endpoints = members.iter().map(|member| layout.api_address(member)).collect();
    Client::new(endpoints, tls).with_times(TIMES)
}

/// What each member says of itself, and its build.
pub async fn probe(client: &Client, layout: &Layout, members: &[String]) -> BTreeMap<String, (Said, Option<String>)> {
    futures::stream::iter(members.iter().cloned())
        .map(|member| async move {
            let answer = probe_one(client, &layout.api_address(&member)).await;
            let said = match answer {
                Ok(answer) => (said(&answer), answer.versions.map(|versions| versions.build)),
                Err(why) => (Said::Nothing { why }, None),
            };
            (member, said)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await
}

async fn probe_one(client: &Client, address: &str) -> Result<v1::ProbeResponse, String> {
    let mut node = client.node(address).await.map_err(|error| error.to_string())?;
    let answer = node.probe(v1::ProbeRequest {}).await.map_err(|status| status.message().to_owned())?;
    Ok(answer.into_inner())
}

fn said(answer: &v1::ProbeResponse) -> Said {
    let reason = || answer.disk_reason.as_ref().map_or_else(String::new, |reason| reason.message.clone());
    match answer.disk_state() {
        v1::DiskState::Empty => Said::Empty { node_id: answer.node_id.clone() },
        v1::DiskState::Formatted if !answer.cluster_id.is_empty() => Said::Formatted {
            node_id: answer.node_id.clone(),
            cluster_id: answer.cluster_id.clone(),
            disk_id: answer.disk_id.clone(),
        },
        v1::DiskState::Foreign => Said::Unusable {
            why: format!("its disk holds something else, and is left alone: {}; give it an empty one", reason()),
        },
        v1::DiskState::Failed => Said::Unusable { why: format!("its disk has failed: {}; replace it", reason()) },
        _ => Said::Nothing { why: format!("its disk is not known yet {}", reason()) },
    }
}

/// Has these members found the recorded cluster. Tells the first failure, after all were told.
///
/// # Errors
/// A member refused or did not answer.
pub async fn found(client: &Client, layout: &Layout, record: &Record, names: &[String]) -> Result<(), String> {
    let members: Vec<v1::FoundingMember> = record
        .founders
        .iter()
        .map(|founder| v1::FoundingMember {
            node_id: founder.node_id.clone(),
            name: founder.name.clone(),
            peer_address: layout.peer_address(&founder.name),
            api_address: layout.api_address(&founder.name),
            replica_id: founder.replica_id.clone(),
            zone: founder.zone.clone(),
        })
        .collect();
    let request = v1::BootstrapRequest { cluster_id: record.cluster_id.clone(), members };
    let client = client.clone().with_times(FORMAT);
    let told = futures::stream::iter(names.to_vec()).map(|name| {
        let (client, request, address) = (client.clone(), request.clone(), layout.api_address(&name));
        async move {
            let told = async {
                let mut node = client.node(&address).await.map_err(|error| error.to_string())?;
                node.bootstrap(request).await.map_err(|status| status.message().to_owned())
            };
            told.await.map_err(|why| format!("{name} does not found the cluster: {why}")).map(|_| ())
        }
    });
    first_failure(told.buffer_unordered(AT_ONCE).collect().await)
}

fn first_failure(answers: Vec<Result<(), String>>) -> Result<(), String> {
    answers.into_iter().find(Result::is_err).unwrap_or(Ok(()))
}

/// Has these members join the cluster that the others are of.
///
/// # Errors
/// A member refused or did not answer.
pub async fn join(
    client: &Client,
    layout: &Layout,
    cluster_id: &str,
    said: &BTreeMap<String, Said>,
    names: &[String],
) -> Result<(), String> {
    let seeds: Vec<v1::NodeAddress> = said
        .iter()
        .filter_map(|(name, said)| match said {
            Said::Formatted { node_id, cluster_id: of, .. } if of == cluster_id => Some(v1::NodeAddress {
                node_id: node_id.clone(),
                peer_address: layout.peer_address(name),
                api_address: layout.api_address(name),
            }),
            _ => None,
        })
        .collect();
    if seeds.is_empty() {
        return Err("no member of the cluster answers, so nobody can join it".to_owned());
    }
    let request = v1::JoinRequest { cluster_id: cluster_id.to_owned(), seeds };
    let client = client.clone().with_times(FORMAT);
    let told = futures::stream::iter(names.to_vec()).map(|name| {
        let (client, request, address) = (client.clone(), request.clone(), layout.api_address(&name));
        async move {
            let told = async {
                let mut node = client.node(&address).await.map_err(|error| error.to_string())?;
                node.join(request).await.map_err(|status| status.message().to_owned())
            };
            told.await.map_err(|why| format!("{name} does not join: {why}")).map(|_| ())
        }
    });
    first_failure(told.buffer_unordered(AT_ONCE).collect().await)
}

/// Nodes, disks and volumes, as the metadata leader knows them.
///
/// # Errors
/// Nobody leads.
pub async fn catalogue(client: &Client) -> Result<Catalogue, CallError> {
    let nodes =
        client.call(|mut cluster| async move { cluster.list_nodes(v1::ListNodesRequest {}).await }).await?.nodes;
    let mut volumes = Vec::new();
    let mut after = String::new();
    for _ in 0..PAGES_MAX {
        let request = v1::ListVolumesRequest { after: after.clone(), limit: PAGE, with_replicas: false };
        let page = client
            .call(|mut cluster| {
                let request = request.clone();
                async move { cluster.list_volumes(request).await }
            })
            .await?;
        volumes.extend(page.volumes);
        after = page.next;
        if after.is_empty() {
            break;
        }
    }
    Ok(Catalogue { nodes, volumes })
}

/// Has a node take copies, or has what it holds moved elsewhere.
///
/// # Errors
/// The metadata plane refused, or nobody leads it.
pub async fn set_node_state(client: &Client, node: &str, state: v1::NodeState) -> Result<(), CallError> {
    let request = v1::SetNodeStateRequest { node: node.to_owned(), state: state.into() };
    client
        .call(|mut cluster| {
            let request = request.clone();
            async move { cluster.set_node_state(request).await }
        })
        .await
        .map(|_| ())
}
