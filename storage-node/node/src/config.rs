//! What a storage node is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use holdfast_id::ClusterId;
use holdfast_transport::PeerRole;
use holdfast_transport::pki::{Identity, PkiError, Roots};

/// Smallest disk: room for the WAL, the group table and a few volumes.
pub const DISK_BYTES_MIN: u64 = 256 << 20;

/// Longest zone; values of Kubernetes labels have at most 63 bytes.
const ZONE_BYTES_MAX: usize = 253;
/// Longest advertised address: a DNS name, a colon and a port; what the session protocol can tell of a replica.
const ADDRESS_BYTES_MAX: usize = 261;

#[derive(Clone, Debug)]
pub struct Config {
    /// Told to people; the identity is in the certificate.
    pub name: String,
    /// Where the node keeps what is not on its disk; created if need be.
    pub dir: PathBuf,
    /// A block device or a file; a file is created with `disk_bytes` where there is none.
    pub device: PathBuf,
    pub disk_bytes: u64,
    /// Nodes and attached machines connect here.
    pub listen: SocketAddr,
    /// The control API.
    pub api: SocketAddr,
    /// Where others reach `listen` and `api`, `host:port`; names are resolved at each connection. `None`: at what is
    /// listened on.
    pub advertise: Option<String>,
    pub advertise_api: Option<String>,
    /// The failure domain above this node.
    pub zone: Option<String>,
    /// Plain HTTP for probes and scrapers; `None`: none.
    pub http: Option<SocketAddr>,
    /// A folder with `ca.pem`, `<name>.pem` and `<name>.key`.
    pub pki: PathBuf,
    /// An empty disk is formatted for this cluster and joins it without being asked; another cluster's is refused.
    pub join: Option<Join>,
    /// A folder for a Unix socket by which agents of this machine connect: named after the node, without TLS, for
    /// processes of this user and root.
    pub sockets: Option<PathBuf>,
    /// Faults the device is to have, in the store's fault language.
    pub device_fault: Option<String>,
}

/// The cluster a node belongs to, and where it asks first.
#[derive(Clone, Debug)]
pub struct Join {
    pub cluster: ClusterId,
    /// Control APIs of other nodes, `host:port`.
    pub seeds: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("a disk of {found} bytes is too small: at least {DISK_BYTES_MIN} are needed")]
    DiskTooSmall { found: u64 },
    #[error("{address:?} is no address that others could be told: HOST:PORT is expected")]
    Advertise { address: String },
    #[error(
        "{address} is no address that others could be told: say where they reach it, with --advertise and --advertise-api"
    )]
    Unspecified { address: SocketAddr },
    #[error("a zone has 1 to 253 bytes, not {length}")]
    Zone { length: usize },
    #[error("the node name {name:?} must be 1 to 63 lower-case letters, digits and hyphens")]
    Name { name: String },
}

impl Config {
    /// # Errors
    /// A field that breaks its bound, in words for the operator.
    pub fn check(&self) -> Result<(), ConfigError> {
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if self.name.is_empty() || self.name.len() > 63 || !self.name.bytes().all(label) {
            return Err(ConfigError::Name { name: self.name.clone() });
        }
        if self.disk_bytes < DISK_BYTES_MIN {
            return Err(ConfigError::DiskTooSmall { found: self.disk_bytes });
        }
        for (advertised, address) in [(&self.advertise, self.listen), (&self.advertise_api, self.api)] {
            match advertised {
                Some(address) if !is_host_and_port(address) => {
                    return Err(ConfigError::Advertise { address: address.clone() });
                }
                None if address.ip().is_unspecified() => return Err(ConfigError::Unspecified { address }),
                _ => {}
            }
        }
        match self.zone.as_ref().map(String::len) {
            None | Some(1..=ZONE_BYTES_MAX) => Ok(()),
            Some(length) => Err(ConfigError::Zone { length }),
        }
    }

    /// Where nodes and attached machines reach it.
    pub fn peer_address(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// Where its control API is reached.
    pub fn api_address(&self) -> String {
        self.advertise_api.clone().unwrap_or_else(|| self.api.to_string())
    }

    /// The node's certificate and key, and whom it trusts; checked, so that a wrong one is told at the start.
    ///
    /// # Errors
    /// A file that is missing or unreadable, or a certificate that is expired, another role's or another authority's.
    pub fn credentials(&self) -> Result<(Identity, Roots), PkiError> {
        let [roots, certificate, key] = self.credential_paths();
        let roots = Roots::load(&roots)?;
        let identity = Identity::load(&certificate, &key)?;
        identity.check(PeerRole::Node, &roots, SystemTime::now())?;
        Ok((identity, roots))
    }

    fn credential_paths(&self) -> [PathBuf; 3] {
        ["ca.pem".to_owned(), format!("{}.pem", self.name), format!("{}.key", self.name)]
            .map(|file| self.pki.join(file))
    }

    /// What the files hold now, to see whether they were replaced; `None` for one that cannot be read.
    pub(crate) fn credential_files(&self) -> [Option<Vec<u8>>; 3] {
        self.credential_paths().map(|path| std::fs::read(path).ok())
    }
}

/// A name, an IPv4 address or an IPv6 one in brackets, and a port.
fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let named = |host: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
        !host.is_empty() && host.bytes().all(fits)
    };
    let port = port.parse::<u16>().is_ok_and(|port| port > 0);
    port && address.len() <= ADDRESS_BYTES_MAX && (named(host) || address.parse::<SocketAddr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            name: "node-1".into(),
            dir: "/d".into(),
            device: "/d/disk".into(),
            disk_bytes: DISK_BYTES_MIN,
            listen: ([127, 0, 0, 1], 1).into(),
            api: ([127, 0, 0, 1], 2).into(),
            advertise: None,
            advertise_api: None,
            zone: None,
            http: None,
            pki: "/pki".into(),
            join: None,
            sockets: None,
            device_fault: None,
        }
    }

    #[test]
    fn what_others_are_told_is_what_is_listened_on_unless_said() {
        let plain = config();
        assert_eq!((plain.peer_address(), plain.api_address()), ("127.0.0.1:1".into(), "127.0.0.1:2".into()));
        let any = Config { listen: ([0, 0, 0, 0], 7700).into(), ..config() };
        assert!(matches!(any.check(), Err(ConfigError::Unspecified { .. })));
        let named = Config { advertise: Some("a-0.nodes.ns.svc:7700".into()), ..any };
        assert_eq!((named.check(), named.peer_address()), (Ok(()), "a-0.nodes.ns.svc:7700".into()));
    }

    #[test]
    fn addresses_that_nobody_could_use_are_refused() {
        for good in ["a:1", "a-0.nodes.ns.svc:7700", "10.0.0.1:7700", "[2001:db8::1]:7700"] {
            assert_eq!(Config { advertise: Some(good.into()), ..config() }.check(), Ok(()), "{good}");
        }
        let long = format!("{}:7700", "a".repeat(300));
        for bad in ["", "a", "a:", ":1", "a:0", "a:70000", "a b:1", "http://a:1", "2001:db8::1:7700", &long] {
            let checked = Config { advertise_api: Some(bad.into()), ..config() }.check();
            assert!(matches!(checked, Err(ConfigError::Advertise { .. })), "{bad}");
        }
        for length in [0, 254] {
            let checked = Config { zone: Some("z".repeat(length)), ..config() }.check();
            assert_eq!(checked, Err(ConfigError::Zone { length }));
        }
    }
}
