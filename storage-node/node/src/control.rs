//! What the control thread asks of the data thread.

use holdfast_id::ClusterId;
use holdfast_shard::{AdminReply, AdminRequest, NodeAddress};
use holdfast_store::superblock::Superblock;

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
    Stop,
}

#[derive(Debug)]
pub(crate) enum Answer {
    Disk(DiskView),
    Shard(AdminReply),
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
