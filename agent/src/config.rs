//! What an agent is told at its start, and what a volume needs to be attached.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use holdfast_id::{ClusterId, NodeId, VolumeId};
use serde::{Deserialize, Serialize};

/// More would be more than a volume has replicas, learners on their way included.
pub(crate) const NODES_MAX: usize = 16;

/// Longest DNS name, with the dot at its end.
const HOST_BYTES_MAX: usize = 254;

#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Who attaches: the machine's name as an operator knows it. At most 256 bytes, not empty.
    pub holder: String,
    pub identity: IdentityPaths,
    /// `None` accepts any cluster that the roots vouch for.
    pub cluster: Option<ClusterId>,
    /// A folder with the Unix sockets of storage nodes of this machine; a node that has none there, or does not answer
    /// on it, is reached at its address.
    pub sockets: Option<PathBuf>,
    /// Where attachments are remembered; one agent at a time.
    pub state_directory: PathBuf,
    pub control_socket: PathBuf,
    /// `None` refuses every volume that asks for a device.
    pub keeper: Option<KeeperConfig>,
    pub volumes: Vec<VolumeSpec>,
}

/// The process that keeps devices alive while no agent runs.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// One per agent: what a keeper holds belongs to one agent and its successors.
    pub socket: PathBuf,
    /// Started where none runs, as `PROGRAM keeper --socket SOCKET --until-idle`. `None`: somebody else runs it, under the
    /// user that owns the socket's folder, and the agent only connects.
    pub program: Option<PathBuf>,
}

/// PEM files; see `holdfast_transport::pki`.
#[derive(Clone, Debug)]
pub struct IdentityPaths {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub roots: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    pub volume: VolumeId,
    /// The nodes that hold its replicas, 1 to 16.
    pub nodes: Vec<NodeAddress>,
    /// What to do where nothing is recorded; a recorded epoch is resumed whatever stands here.
    #[serde(default)]
    pub mode: AttachMode,
    /// Serve it over NBD on this Unix socket. Either this or `device`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_socket: Option<PathBuf>,
    /// Serve it as a loop device of this machine, which outlives the agent.
    #[serde(default)]
    pub device: bool,
    /// Fail a request that has waited so long; without it requests wait for ever.
    #[serde(default)]
    pub unavailable_after_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachMode {
    #[default]
    Attach,
    /// Fences a live holder.
    TakeOver,
    Resume {
        epoch: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeAddress {
    pub node: NodeId,
    pub address: Address,
}

/// `192.0.2.1:7000`, `[2001:db8::1]:7000`, `name:7000`, or `unix:/path` for a node on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    Tcp(SocketAddr),
    /// A host's name and a port; resolved anew for each attempt to connect, for pods keep their names only.
    Name(String),
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: HOST:PORT or unix:/PATH is expected")]
pub struct ParseAddressError(String);

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Address, ParseAddressError> {
        let parsed = match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Some(Address::Unix(path.into())),
            Some(_) => None,
            None => text.parse().ok().map(Address::Tcp).or_else(|| is_name(text).then(|| Address::Name(text.into()))),
        };
        parsed.ok_or_else(|| ParseAddressError(text.chars().take(120).collect()))
    }
}

/// A DNS name and a port; without the port nobody could be connected to.
fn is_name(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let named = (1..=HOST_BYTES_MAX).contains(&host.len()) && host.bytes().all(fits);
    named && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl TryFrom<String> for Address {
    type Error = ParseAddressError;

    fn try_from(text: String) -> Result<Address, ParseAddressError> {
        text.parse()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Name(name) => name.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl VolumeSpec {
    /// What is wrong with it, in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.nodes.is_empty() || self.nodes.len() > NODES_MAX {
            return Err(format!("a volume has 1 to {NODES_MAX} nodes, not {}", self.nodes.len()));
        }
        for (at, entry) in self.nodes.iter().enumerate() {
            if self.nodes[..at].iter().any(|other| other.node == entry.node) {
                return Err(format!("node {} stands there twice", entry.node));
            }
        }
        match &self.nbd_socket {
            None if !self.device => Err("it is to be served neither on a socket nor as a device".into()),
            Some(_) if self.device => Err("it is served on a socket or as a device, not both".into()),
            Some(path) if !path.is_absolute() => Err(format!("the socket path {} is not absolute", path.display())),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_others_are_refused() {
        for text in ["192.0.2.1:7000", "[2001:db8::1]:7000", "a-0.nodes.ns.svc:7700", "unix:/run/holdfast/node.sock"] {
            assert_eq!(text.parse::<Address>().map(String::from), Ok(text.to_owned()));
        }
        for text in ["", "node-1", "node-1:", "node 1:7", "a:0", ":7", "192.0.2.1", "unix:relative", "/run/node.sock"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
