//! What the control thread asks of the data thread.

use std::collections::BTreeMap;

use holdfast_id::{ClusterId, NodeId};
use holdfast_shard::{AdminReply, AdminRequest, NodeAddress};
use holdfast_store::superblock::Superblock;
use holdfast_transport::pki::{Identity, Roots};

use crate::addresses::Address;

#[derive(Debug)]
pub(crate) enum Call {
    Probe,
    /// Formats the empty disk for the cluster; harmless where it was done before.
    Format {
        cluster: ClusterId,
    },
    Shard(AdminRequest),
    /// Where nodes are to be reached.
    Learn(Vec<NodeAddress>),
    /// Where nodes were last known to be.
    Addresses,
    /// What this node shows and trusts from now on.
    Credentials(Box<(Identity, Roots)>),
    /// Hands over what this node leads, then ends; answered at once.
    Stop,
}

#[derive(Debug)]
pub(crate) enum Answer {
    Disk(DiskView),
    Shard(AdminReply),
    Addresses(BTreeMap<NodeId, Address>),
    Done,
    Refused(String),
}

#[derive(Clone, Debug)]
pub(crate) struct DiskView {
    pub(crate) bytes: u64,
    pub(crate) state: DiskState,
}

#[derive(Clone, Debug)]
pub(crate) enum DiskState {
    Empty,
    Formatted(Superblock),
    /// Why it is not touched.
    Foreign(String),
    Failed(String),
}
