//! What people and programs see: tables, and the same as JSON.

use anyhow::{Result, bail};
use holdfast_api::v1;
use holdfast_api::v1::DiskLife;
use serde_json::{Value, json};

use crate::args::{Explain, Format, Subject, Where};
use crate::client::{Cluster, block_on};
use crate::health;

/// The labels that the operator gives a volume.
const LABEL_CLAIM: &str = "holdfast.dev/pvc";
const LABEL_CLAIM_NAMESPACE: &str = "holdfast.dev/pvc-namespace";

pub fn open(cluster: Where) -> Result<Cluster> {
    match (cluster.dir, cluster.pki) {
        (Some(dir), _) => Cluster::open(&dir),
        (None, Some(pki)) if !cluster.api.is_empty() => Cluster::at(cluster.api, &pki),
        _ => bail!(
            "which cluster? say --cluster DIR, the folder given to `dev up`, or --cluster-api ADDRESS with --cluster-pki DIR"
        ),
    }
}

pub fn print_json(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Columns as wide as their longest cell.
pub fn print_table(head: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(head.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

pub fn bytes(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >= 1 << shift) {
        Some((shift, unit)) if bytes.is_multiple_of(1 << shift) => format!("{}{unit}", bytes >> shift),
        Some((shift, unit)) => format!("{:.1}{unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes}B"),
    }
}

fn reason_json(reason: &v1::Reason) -> Value {
    json!({ "code": reason.code, "message": reason.message, "action": reason.action, "subject": reason.subject })
}

pub fn volume_json(volume: &v1::Volume) -> Value {
    let replicas: Vec<Value> = volume
        .replicas
        .iter()
        .map(|replica| {
            json!({
                "replica": replica.replica_id,
                "node": replica.node_name,
                "nodeId": replica.node_id,
                "address": replica.peer_address,
                "disk": replica.disk_id,
                "state": role(replica),
                "term": replica.term,
                "flushed": replica.flushed_index,
                "applied": replica.applied_index,
                "healthy": replica.healthy,
                "condition": condition(replica),
                "behind": replica.behind,
                "repair": replica.repair.as_ref().map(health::repair_json),
                "rebuild": replica.rebuild.as_ref().map(rebuild_json),
                "reason": replica.reason.as_ref().map(reason_json),
            })
        })
        .collect();
    let leader = volume.replicas.iter().find(|replica| replica.node_id == volume.leader_node_id);
    json!({
        "id": volume.volume_id,
        "name": volume.name,
        "sizeBytes": volume.size_bytes,
        "logicalBlockBytes": volume.logical_block_bytes,
        "replicasWanted": volume.replicas_wanted,
        "state": state(volume),
        "health": health(volume),
        "leader": leader.map(|replica| replica.node_name.clone()),
        "epoch": volume.epoch,
        "attachedTo": volume.attached_to,
        "generation": volume.generation,
        "replicas": replicas,
        "reason": volume.reason.as_ref().map(reason_json),
    })
}

fn condition(replica: &v1::ReplicaStatus) -> &'static str {
    match replica.condition() {
        v1::ReplicaCondition::Unspecified => "unknown",
        v1::ReplicaCondition::Healthy => "healthy",
        v1::ReplicaCondition::Creating => "creating",
        v1::ReplicaCondition::CatchingUp => "catching-up",
        v1::ReplicaCondition::Rebuilding => "rebuilding",
        v1::ReplicaCondition::Learner => "learner",
        v1::ReplicaCondition::Unreachable => "unreachable",
        v1::ReplicaCondition::Stopped => "stopped",
        v1::ReplicaCondition::Lost => "lost",
    }
}

fn rebuild_json(rebuild: &v1::Rebuild) -> Value {
    let phase = match rebuild.phase() {
        v1::RebuildPhase::Unspecified => "unknown",
        v1::RebuildPhase::Waiting => "waiting",
        v1::RebuildPhase::Copying => "copying",
        v1::RebuildPhase::Done => "done",
    };
    json!({
        "phase": phase,
        "slotsCompared": rebuild.slots_compared,
        "bytesCopied": rebuild.bytes_copied,
        "bytesListed": rebuild.bytes_listed,
    })
}

fn role(replica: &v1::ReplicaStatus) -> &'static str {
    match replica.role() {
        v1::ReplicaRole::Unspecified if !replica.created => "creating",
        v1::ReplicaRole::Unspecified => "unknown",
        v1::ReplicaRole::Leader => "leader",
        v1::ReplicaRole::Follower => "follower",
        v1::ReplicaRole::Candidate => "candidate",
        v1::ReplicaRole::Learner => "learner",
    }
}

fn state(volume: &v1::Volume) -> &'static str {
    match volume.state() {
        v1::VolumeState::Unspecified => "unknown",
        v1::VolumeState::Creating => "creating",
        v1::VolumeState::Ready => "ready",
        v1::VolumeState::Deleting => "deleting",
    }
}

fn health(volume: &v1::Volume) -> &'static str {
    match volume.health() {
        v1::VolumeHealth::Unspecified => "unknown",
        v1::VolumeHealth::Healthy => "healthy",
        v1::VolumeHealth::Degraded => "degraded",
        v1::VolumeHealth::Unavailable => "unavailable",
    }
}

pub fn print_volumes(volumes: &[v1::Volume]) {
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|volume| {
            let node = |replica: &v1::ReplicaStatus| match replica.condition() {
                v1::ReplicaCondition::Unspecified | v1::ReplicaCondition::Healthy => replica.node_name.clone(),
                _ => format!("{}({})", replica.node_name, condition(replica)),
            };
            let nodes: Vec<String> = volume.replicas.iter().map(node).collect();
            let why = volume.reason.as_ref().map_or(String::new(), |reason| reason.message.clone());
            vec![
                volume.name.clone(),
                bytes(volume.size_bytes),
                state(volume).into(),
                health(volume).into(),
                nodes.join(","),
                if volume.attached_to.is_empty() { "-".into() } else { volume.attached_to.clone() },
                why,
            ]
        })
        .collect();
    print_table(&["NAME", "SIZE", "STATE", "HEALTH", "NODES", "ATTACHED", "REASON"], &rows);
}

pub fn print_volume(volume: &v1::Volume) {
    print_volumes(std::slice::from_ref(volume));
    println!();
    let rows: Vec<Vec<String>> = volume
        .replicas
        .iter()
        .map(|replica| {
            let reason = replica.reason.as_ref().map_or(String::new(), |reason| reason.message.clone());
            vec![
                replica.node_name.clone(),
                role(replica).into(),
                condition(replica).into(),
                replica.flushed_index.to_string(),
                replica.applied_index.to_string(),
                reason,
            ]
        })
        .collect();
    print_table(&["NODE", "STATE", "CONDITION", "FLUSHED", "APPLIED", "REASON"], &rows);
}

pub async fn list_nodes(cluster: &Cluster) -> Result<v1::ListNodesResponse> {
    cluster.call(|mut client| async move { client.list_nodes(v1::ListNodesRequest {}).await }).await
}

/// Every volume with what its replicas say.
pub async fn all_volumes(cluster: &Cluster) -> Result<Vec<v1::Volume>> {
    let mut volumes = Vec::new();
    let mut after = String::new();
    loop {
        let request = v1::ListVolumesRequest { after, limit: 0, with_replicas: true };
        let page = cluster.call(|mut client| {
            let request = request.clone();
            async move { client.list_volumes(request).await }
        });
        let page = page.await?;
        volumes.extend(page.volumes);
        if page.next.is_empty() {
            return Ok(volumes);
        }
        after = page.next;
    }
}

fn disk_json(disk: &v1::ClusterDisk) -> Value {
    json!({
        "disk": disk.disk_id,
        "state": life(disk),
        "capacityBytes": disk.capacity_bytes,
        "freeBytes": disk.free_bytes,
        "placedBytes": disk.placed_bytes,
        "replicas": disk.replicas,
        "health": disk.health.as_ref().map(health::disk_json),
    })
}

fn life(disk: &v1::ClusterDisk) -> &'static str {
    match disk.life() {
        v1::DiskLife::Unspecified => "unknown",
        v1::DiskLife::Active => "active",
        v1::DiskLife::Removing => "removing",
        v1::DiskLife::Removed => "removed",
        v1::DiskLife::Lost => "lost",
    }
}

fn node_state(node: &v1::ClusterNode) -> &'static str {
    match node.state() {
        v1::NodeState::Unspecified => "unknown",
        v1::NodeState::Active => "active",
        v1::NodeState::Draining => "draining",
        v1::NodeState::Removing => "removing",
        v1::NodeState::Removed => "removed",
        v1::NodeState::Away => "away",
    }
}

fn node_json(node: &v1::ClusterNode) -> Value {
    let disks: Vec<Value> = node.disks.iter().map(disk_json).collect();
    let reasons: Vec<Value> = node.reasons.iter().map(reason_json).collect();
    json!({
        "id": node.node_id,
        "name": node.name,
        "endpoint": node.peer_address,
        "api": node.api_address,
        "state": node_state(node),
        "connected": node.connected,
        "metadataMember": node.metadata_member,
        "metadataLeader": node.metadata_leader,
        "disks": disks,
        "reasons": reasons,
    })
}

fn print_nodes(nodes: &[v1::ClusterNode]) {
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|node| {
            let used = node.disks.iter().filter(|disk| !matches!(disk.life(), DiskLife::Removed | DiskLife::Lost));
            let sum = |figure: fn(&v1::ClusterDisk) -> u64| used.clone().map(figure).sum::<u64>();
            let metadata = match (node.metadata_leader, node.metadata_member) {
                (true, _) => "leader",
                (_, true) => "member",
                _ => "-",
            };
            let reasons: Vec<&str> = node.reasons.iter().map(|reason| reason.message.as_str()).collect();
            vec![
                node.name.clone(),
                node_state(node).into(),
                if node.connected { "yes".into() } else { "no".into() },
                metadata.into(),
                bytes(sum(|disk| disk.capacity_bytes)),
                bytes(sum(|disk| disk.free_bytes)),
                sum(|disk| u64::from(disk.replicas)).to_string(),
                node.peer_address.clone(),
                reasons.join("; "),
            ]
        })
        .collect();
    print_table(&["NAME", "STATE", "CONNECTED", "METADATA", "CAPACITY", "FREE", "COPIES", "ENDPOINT", "REASON"], &rows);
}

pub fn nodes(cluster: Where, format: Format) -> Result<()> {
    let cluster = open(cluster)?;
    let nodes = block_on(list_nodes(&cluster))?.nodes;
    if format.json {
        return print_json(&Value::Array(nodes.iter().map(node_json).collect()));
    }
    print_nodes(&nodes);
    Ok(())
}

/// A node as it is after a change.
pub fn changed_node(node: &v1::ClusterNode, format: Format) -> Result<()> {
    if format.json {
        return print_json(&node_json(node));
    }
    print_nodes(std::slice::from_ref(node));
    Ok(())
}

fn print_disks<'a>(disks: impl Iterator<Item = (&'a str, &'a v1::ClusterDisk)>) {
    let rows = disks.map(|(node, disk)| {
        let figures = [disk.capacity_bytes, disk.free_bytes, disk.placed_bytes].map(bytes);
        let mut row = vec![disk.disk_id.clone(), node.to_owned(), life(disk).into()];
        row.extend(figures);
        row.push(disk.replicas.to_string());
        row
    });
    let rows: Vec<Vec<String>> = rows.collect();
    print_table(&["DISK", "NODE", "STATE", "CAPACITY", "FREE", "PLACED", "COPIES"], &rows);
}

pub fn changed_disk(disk: &v1::ClusterDisk, format: Format) -> Result<()> {
    if format.json {
        return print_json(&disk_json(disk));
    }
    print_disks([("", disk)].into_iter());
    Ok(())
}

pub fn disks(cluster: Where, format: Format) -> Result<()> {
    let cluster = open(cluster)?;
    let nodes = block_on(list_nodes(&cluster))?.nodes;
    let disks = || nodes.iter().flat_map(|node| node.disks.iter().map(|disk| (node.name.as_str(), disk)));
    if format.json {
        let with_node = disks().map(|(node, disk)| {
            let mut value = disk_json(disk);
            value["node"] = json!(node);
            value
        });
        return print_json(&Value::Array(with_node.collect()));
    }
    print_disks(disks());
    Ok(())
}

pub fn status(cluster: Where, format: Format) -> Result<()> {
    let cluster = open(cluster)?;
    let (nodes, volumes) = block_on(async { Ok((list_nodes(&cluster).await?, all_volumes(&cluster).await?)) })?;
    if format.json {
        return print_json(&json!({
            "cluster": nodes.cluster_id,
            "revision": nodes.revision,
            "nodes": nodes.nodes.iter().map(node_json).collect::<Vec<_>>(),
            "volumes": volumes.iter().map(volume_json).collect::<Vec<_>>(),
        }));
    }
    println!("cluster {}", nodes.cluster_id);
    println!();
    print_nodes(&nodes.nodes);
    println!();
    print_volumes(&volumes);
    Ok(())
}

fn volume_of_claim(cluster: &Cluster, claim: &str) -> Result<String> {
    let parts = claim.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
    let Some((namespace, name)) = parts else { bail!("{claim} is not NAMESPACE/NAME") };
    let has = |volume: &v1::Volume, label: &str, value: &str| volume.labels.get(label).is_some_and(|v| v == value);
    let volumes = block_on(all_volumes(cluster))?;
    let made = volumes.into_iter().find(|v| has(v, LABEL_CLAIM, name) && has(v, LABEL_CLAIM_NAMESPACE, namespace));
    let Some(volume) = made else {
        bail!(
            "no volume of this cluster was made for the claim {claim}: kubectl describe pvc --namespace {namespace} {name}"
        )
    };
    Ok(volume.volume_id)
}

pub fn explain(cluster: Where, options: Explain) -> Result<()> {
    let cluster = open(cluster)?;
    let (kind, name) = match options.subject {
        Subject::Cluster => (v1::SubjectKind::Cluster, String::new()),
        Subject::Volume { name } => (v1::SubjectKind::Volume, name),
        Subject::Pvc { claim } => (v1::SubjectKind::Volume, volume_of_claim(&cluster, &claim)?),
        Subject::Node { name } => (v1::SubjectKind::Node, name),
        Subject::Disk { name } => (v1::SubjectKind::Disk, name),
    };
    let request = v1::ExplainRequest { kind: kind.into(), name };
    let reasons = block_on(async {
        let explained = cluster.call(|mut client| {
            let request = request.clone();
            async move { client.explain(request).await }
        });
        match explained.await {
            Ok(response) => Ok(response.reasons),
            // Without a leader of the metadata plane each node still knows itself.
            Err(error) => health::ask_each(&cluster, error).await,
        }
    })?;
    if options.json {
        return print_json(&Value::Array(reasons.iter().map(reason_json).collect()));
    }
    if reasons.is_empty() {
        println!("all is well");
    }
    for reason in &reasons {
        println!("{}: {}", reason.code, reason.message);
        if !reason.action.is_empty() {
            println!("  what to do: {}", reason.action);
        }
    }
    Ok(())
}
