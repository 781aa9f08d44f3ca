//! What a storage node is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use holdfast_id::ClusterId;
use holdfast_transport::PeerRole;
use holdfast_transport::pki::{Identity, PkiError, Roots};

/// Smallest disk: room for the WAL, the group table and a few volumes.
pub const DISK_BYTES_MIN: u64 = 256 << 20;

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
        Ok(())
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
