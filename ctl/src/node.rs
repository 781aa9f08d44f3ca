//! `holdfast storage-node` and `holdfast node …`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_api::v1;
use holdfast_api::v1::DiskLife;

use crate::args::{Format, Node, StorageNode, Where};
use crate::client::{Cluster, block_on};
use crate::{dev, disk, show};

/// For a node that was just started to format its disk and register.
const ADD_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub fn serve(options: StorageNode) -> Result<()> {
    holdfast_node::run(holdfast_node::Config {
        device: options.device.unwrap_or_else(|| options.dir.join("disk")),
        name: options.name,
        dir: options.dir,
        disk_bytes: options.disk_size,
        listen: options.listen,
        api: options.api,
        advertise: options.advertise,
        advertise_api: options.advertise_api,
        // A pod on a machine without a zone is given an empty one.
        zone: options.zone.filter(|zone| !zone.is_empty()),
        http: options.http,
        pki: options.pki,
        join: options.join.map(|cluster| holdfast_node::Join { cluster, seeds: options.seeds }),
        sockets: options.sockets,
        device_fault: options.device_fault,
    })
}

pub fn run(cluster: Where, verb: Node) -> Result<()> {
    match verb {
        Node::List(format) => show::nodes(cluster, format),
        Node::Add { name, format } => {
            let cluster = show::open(cluster)?;
            block_on(add(&cluster, &name, format))
        }
        Node::Remove { name, format } => {
            let cluster = show::open(cluster)?;
            block_on(set_state(&cluster, &name, v1::NodeState::Removing, format))
        }
        Node::Replace { name, format } => {
            let cluster = show::open(cluster)?;
            block_on(replace(&cluster, &name, format))
        }
    }
}

async fn set_state(cluster: &Cluster, name: &str, state: v1::NodeState, format: Format) -> Result<()> {
    let request = v1::SetNodeStateRequest { node: name.to_owned(), state: state.into() };
    let response = cluster.call(|mut client| {
        let request = request.clone();
        async move { client.set_node_state(request).await }
    });
    let node = response.await?.node.context("an answer without a node")?;
    show::changed_node(&node, format)
}

/// A node that is known takes copies again; one that is not is started where the cluster is this machine's.
async fn add(cluster: &Cluster, name: &str, format: Format) -> Result<()> {
    let known = show::list_nodes(cluster).await?.nodes.into_iter().any(|node| node.name == name);
    if known {
        return set_state(cluster, name, v1::NodeState::Active, format).await;
    }
    dev::control::call(cluster.home()?.1, &dev::control::Command::Add(name.to_owned()))?;
    let until = Instant::now() + ADD_WITHIN;
    loop {
        let nodes = show::list_nodes(cluster).await?.nodes;
        if let Some(node) = nodes.iter().find(|node| node.name == name && !node.disks.is_empty()) {
            return show::changed_node(node, format);
        }
        ensure!(Instant::now() < until, "node {name} was started and has not joined yet: look into its log");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Every disk it has in the catalogue is declared lost; what it comes back with is another.
async fn replace(cluster: &Cluster, name: &str, format: Format) -> Result<()> {
    let nodes = show::list_nodes(cluster).await?.nodes;
    let node = nodes.into_iter().find(|node| node.name == name || node.node_id == name);
    let node = node.with_context(|| format!("there is no node {name} (UnknownNode)"))?;
    ensure!(
        !node.connected,
        "node {name} is connected and serves its disk: stop it first, or move what it holds with: holdfast node remove"
    );
    for disk in node.disks.iter().filter(|disk| matches!(disk.life(), DiskLife::Active | DiskLife::Removing)) {
        disk::set_life(cluster, &disk.disk_id, DiskLife::Lost).await?;
    }
    let nodes = show::list_nodes(cluster).await?.nodes;
    let node = nodes.into_iter().find(|other| other.node_id == node.node_id).context("the node has gone")?;
    show::changed_node(&node, format)
}
