//! The folder of a development cluster: one file that tells what runs, one folder a node, certificates.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_id::{ClusterId, NodeId};
use serde::{Deserialize, Serialize};

const LAYOUT_VERSION: u32 = 1;

/// `DIR/cluster.json`: kept true by the supervisor while it runs. `pid` is 0 for a node that is not running.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterFile {
    pub version: u32,
    pub cluster: ClusterId,
    pub supervisor_pid: u32,
    /// Every node has been part of the cluster: from now on an empty disk joins, and nobody founds again.
    #[serde(default)]
    pub founded: bool,
    pub nodes: Vec<NodeEntry>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeEntry {
    pub name: String,
    pub id: NodeId,
    pub pid: u32,
    /// Where nodes and attached machines connect.
    pub endpoint: String,
    /// Where the control API is.
    pub api: String,
    pub dir: PathBuf,
}

pub fn random_id() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("the system has no random numbers")?;
    Ok(bytes)
}

impl ClusterFile {
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("cluster.json")
    }

    pub fn pki(dir: &Path) -> PathBuf {
        dir.join("pki")
    }

    /// Where nodes and agents of this machine meet without TLS.
    pub fn sockets(dir: &Path) -> PathBuf {
        dir.join("sockets")
    }

    pub fn load(dir: &Path) -> Result<ClusterFile> {
        let path = Self::path(dir);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "{}: no development cluster here; make one with: holdfast dev up --dir {}",
                path.display(),
                dir.display()
            )
        })?;
        let file: ClusterFile =
            serde_json::from_str(&text).with_context(|| format!("{} cannot be read", path.display()))?;
        ensure!(
            file.version == LAYOUT_VERSION,
            "{}: written by another release (layout {}, this one reads {LAYOUT_VERSION})",
            path.display(),
            file.version
        );
        Ok(file)
    }

    /// Replaces the file in one step, so that a reader never sees half of it.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let path = Self::path(dir);
        let temporary = path.with_extension("json.new");
        let mut file = fs::File::create(&temporary).with_context(|| format!("create {}", temporary.display()))?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &path).with_context(|| format!("replace {}", path.display()))
    }

    /// Chooses names, identities and free ports for a new cluster; writes nothing.
    pub fn plan(dir: &Path, nodes: usize) -> Result<ClusterFile> {
        let cluster = ClusterId::from_bytes(random_id()?).context("a random identifier of all zeroes")?;
        // All listeners are held until every port is chosen, so that none is chosen twice.
        let mut held = Vec::new();
        let mut free_port = || -> Result<String> {
            let listener = TcpListener::bind("127.0.0.1:0").context("no free port on loopback")?;
            let address = listener.local_addr()?.to_string();
            held.push(listener);
            Ok(address)
        };
        let mut entries = Vec::with_capacity(nodes);
        for number in 0..nodes {
            let name = format!("node-{number}");
            entries.push(NodeEntry {
                id: NodeId::from_bytes(random_id()?).context("a random identifier of all zeroes")?,
                pid: 0,
                endpoint: free_port()?,
                api: free_port()?,
                dir: dir.join(&name),
                name,
            });
        }
        Ok(ClusterFile { version: LAYOUT_VERSION, cluster, supervisor_pid: 0, founded: false, nodes: entries })
    }

    /// One more node, with an identity and ports of its own; writes nothing.
    pub fn plan_node(&self, dir: &Path, name: &str) -> Result<NodeEntry> {
        ensure!(self.nodes.iter().all(|node| node.name != name), "there is a node {name} already");
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let fits = !name.is_empty() && name.len() <= 63 && name.bytes().all(label);
        ensure!(fits, "the node name {name:?} must be 1 to 63 lower-case letters, digits and hyphens");
        let listeners = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        Ok(NodeEntry {
            name: name.to_owned(),
            id: NodeId::from_bytes(random_id()?).context("a random identifier of all zeroes")?,
            pid: 0,
            endpoint: listeners[0].local_addr()?.to_string(),
            api: listeners[1].local_addr()?.to_string(),
            dir: dir.join(name),
        })
    }

    pub fn node_mut(&mut self, name: &str) -> Result<&mut NodeEntry> {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        let known = names.join(", ");
        self.nodes
            .iter_mut()
            .find(|node| node.name == name)
            .with_context(|| format!("no node {name}; there are: {known}"))
    }
}
