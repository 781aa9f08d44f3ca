//! `holdfast storage-node` and `holdfast node …`.

use std::path::PathBuf;

use anyhow::Result;

use crate::args::{Node, StorageNode};
use crate::show;

pub fn serve(options: StorageNode) -> Result<()> {
    holdfast_node::run(holdfast_node::Config {
        device: options.device.unwrap_or_else(|| options.dir.join("disk")),
        name: options.name,
        dir: options.dir,
        disk_bytes: options.disk_size,
        listen: options.listen,
        api: options.api,
        pki: options.pki,
        sockets: options.sockets,
        device_fault: options.device_fault,
    })
}

pub fn run(cluster: Option<PathBuf>, verb: Node) -> Result<()> {
    match verb {
        Node::List(format) => show::nodes(cluster, format),
    }
}
