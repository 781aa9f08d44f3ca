//! From an empty folder to a cluster: certificates, identities, and the one-time founding.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use holdfast_api::v1;
use holdfast_id::ReplicaId;
use holdfast_transport::pki::{Authority, Identity, Validity};
use holdfast_transport::{PeerIdentity, PeerRole};

use super::layout::{ClusterFile, NodeEntry, random_id};
use super::supervisor::make_folders;
use crate::client::Cluster;

/// Members of the metadata plane at most; further nodes join.
const FOUNDERS_MAX: usize = 3;
/// For all nodes to start and the first election to be over.
const FOUND_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(25);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn validity() -> Validity {
    let now = SystemTime::now();
    // A day back, for machines whose clocks disagree.
    Validity { not_before: now - DAY, not_after: now + 3650 * DAY }
}

/// Plans the cluster and makes its folders and certificates.
pub fn prepare(dir: &Path, nodes: usize) -> Result<ClusterFile> {
    let file = ClusterFile::plan(dir, nodes)?;
    let pki = ClusterFile::pki(dir);
    std::fs::create_dir_all(&pki).with_context(|| format!("create {}", pki.display()))?;
    let authority = Authority::create(&format!("holdfast dev {}", file.cluster), validity())?;
    authority.save(&pki.join("ca.pem"), &pki.join("ca.key"))?;
    let issue = |name: &str, role, id| -> Result<()> {
        let identity = authority.issue(PeerIdentity { role, id }, validity())?;
        Ok(identity.save(&pki.join(format!("{name}.pem")), &pki.join(format!("{name}.key")))?)
    };
    for node in &file.nodes {
        issue(&node.name, PeerRole::Node, node.id.as_u128())?;
    }
    issue("admin", PeerRole::Admin, u128::from_be_bytes(random_id()?))?;
    make_folders(dir, &file)?;
    Ok(file)
}

/// The certificate of one more node.
pub fn node_identity(dir: &Path, node: &NodeEntry) -> Result<()> {
    let pki = ClusterFile::pki(dir);
    let authority = Authority::load(&pki.join("ca.pem"), &pki.join("ca.key"))?;
    let identity = authority.issue(PeerIdentity { role: PeerRole::Node, id: node.id.as_u128() }, validity())?;
    Ok(identity.save(&pki.join(format!("{}.pem", node.name)), &pki.join(format!("{}.key", node.name)))?)
}

/// The certificate of one agent of this machine, made where it is missing.
pub fn agent_identity(dir: &Path, holder: &str) -> Result<()> {
    let pki = ClusterFile::pki(dir);
    let (certificate, key) = (pki.join(format!("agent-{holder}.pem")), pki.join(format!("agent-{holder}.key")));
    if Identity::load(&certificate, &key).is_ok() {
        return Ok(());
    }
    let authority = Authority::load(&pki.join("ca.pem"), &pki.join("ca.key"))?;
    let peer = PeerIdentity { role: PeerRole::Agent, id: u128::from_be_bytes(random_id()?) };
    Ok(authority.issue(peer, validity())?.save(&certificate, &key)?)
}

/// Founds the cluster where it is not founded yet, and waits until every node is part of it. Repeating is harmless.
pub async fn found(cluster: &Cluster) -> Result<()> {
    let until = Instant::now() + FOUND_WITHIN;
    // What was founded is not founded again: a member of the metadata plane that begins anew under its former identity
    // would vote a second time. A node with an empty disk joins by itself.
    if !cluster.home()?.0.founded {
        loop {
            match try_found(cluster).await {
                Ok(()) => break,
                Err(error) if Instant::now() >= until => return Err(error),
                Err(error) => tracing::debug!(%error, "not founded yet"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    loop {
        let nodes = cluster.call(|mut client| async move { client.list_nodes(v1::ListNodesRequest {}).await }).await?;
        if nodes.nodes.iter().filter(|node| !node.disks.is_empty()).count() >= cluster.api().len() {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("not every node has registered its disk within {} s", FOUND_WITHIN.as_secs());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn try_found(cluster: &Cluster) -> Result<()> {
    let (file, _) = cluster.home()?;
    let count = if file.nodes.len() >= FOUNDERS_MAX { FOUNDERS_MAX } else { 1 };
    let mut members = Vec::new();
    for node in &file.nodes[..count] {
        // The same identifiers at every attempt: derived from the node's own, which is as random.
        let replica = ReplicaId::from_bytes((!node.id.as_u128()).to_be_bytes()).context("all ones is no node")?;
        members.push(v1::FoundingMember {
            node_id: node.id.to_string(),
            name: node.name.clone(),
            peer_address: node.endpoint.clone(),
            api_address: node.api.clone(),
            replica_id: replica.to_string(),
            zone: String::new(),
        });
    }
    for node in &file.nodes[..count] {
        let mut client = cluster.node(&node.api).await?;
        let probe = client.probe(v1::ProbeRequest {}).await?.into_inner();
        if probe.metadata_member {
            continue;
        }
        let request = v1::BootstrapRequest { cluster_id: file.cluster.to_string(), members: members.clone() };
        client.bootstrap(request).await.with_context(|| format!("found the cluster on {}", node.name))?;
    }
    let seeds: Vec<v1::NodeAddress> = file.nodes[..count]
        .iter()
        .map(|node| v1::NodeAddress {
            node_id: node.id.to_string(),
            peer_address: node.endpoint.clone(),
            api_address: node.api.clone(),
        })
        .collect();
    for node in &file.nodes[count..] {
        let mut client = cluster.node(&node.api).await?;
        let probe = client.probe(v1::ProbeRequest {}).await?.into_inner();
        if probe.cluster_id.is_empty() {
            let request = v1::JoinRequest { cluster_id: file.cluster.to_string(), seeds: seeds.clone() };
            client.join(request).await.with_context(|| format!("join {}", node.name))?;
        }
    }
    Ok(())
}
